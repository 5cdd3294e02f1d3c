"""Training of Locret's heads: labels and losses against their definitions, steps against a plain loop, resuming, saving."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import kvrewrite
from kvrewrite.artifact.policy_weights import read_policy_weights
from kvrewrite.errors import KVRewriteError, OptionError, TrainingError
from kvrewrite.tools.training import locret
from kvrewrite.tools.training.labels import answer_index, causal_importance
from kvrewrite.tools.training.locret import LocretOptions, LocretTask, head_loss, top_overlap
from kvrewrite.tools.training.trainer import IGNORED, FitOptions, collate, fit, last_checkpoint
from tests.support.products import few
from tests.support.rewritten import build, own

needs_trainer = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("accelerate", "datasets")), reason="needs kvrewrite[train]"
)
OPTIONS = LocretOptions(hidden_size=8, lr=1e-2)


def row(seed: int, prompt: int = 20, answer: int = 5) -> dict[str, list[int]]:
    ids = torch.randint(3, 97, (prompt + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


ROWS = [row(0), row(1, 13, 3), row(2, 24, 1), row(3, 17, 6)]


def task(family: str, **changes: Any) -> LocretTask:
    """A task on a model of its own, with the capture that all tests share."""
    model, found = own(family)
    sites = [n.meta["kvrewrite_site"] for n in found.graph.graph.nodes if "kvrewrite_site" in n.meta]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locret, "capture", lambda _: found)
        patch.setattr(locret, "canonical", lambda _: sites)
        return LocretTask(model, LocretOptions(**{"hidden_size": 8, "lr": 1e-2, **changes}))


def naive(q: Tensor, k: Tensor, prompt: int, end: int, scale: float, window: int = 0) -> Tensor:
    """S (Hkv, prompt) of one row, by loops in float64. q (H, T, D), k (Hkv, T, D)."""
    group = q.shape[0] // k.shape[0]
    found = torch.full((k.shape[0], prompt), -torch.inf, dtype=torch.float64)
    for head in range(k.shape[0]):
        for token in range(prompt):
            for query in range(prompt, end):
                if window and query - token >= window:
                    continue
                for member in range(group):
                    logit = float(q[head * group + member, query].double() @ k[head, token].double()) * scale
                    found[head, token] = max(float(found[head, token]), logit)
    return found


def test_labels_are_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 16, 8, generator=generator) for h in (4, 2))
    ends, prompts = (16, 12), (11, 7)
    at = torch.arange(16)
    prompt = torch.stack([at < n for n in prompts])
    answer = torch.stack([(at >= n) & (at < end) for n, end in zip(prompts, ends)])
    for window in (0, 6):
        for block in (1 << 27, 1):
            got = causal_importance(q, k, prompt, answer_index(answer), scale=0.3, mask=(window, 0), block=block)
            for i in range(2):
                expected = naive(q[i], k[i], prompts[i], ends[i], 0.3, window)
                torch.testing.assert_close(got[i, :, : prompts[i]].double(), expected, rtol=0, atol=1e-5)
                assert (got[i, :, prompts[i] :] == -torch.inf).all()


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        ("llama", (20, 13)),
        pytest.param("qwen3", (20, 13), marks=pytest.mark.thorough),
        ("phi3", (20, 13)),
        ("phi3", (55, 41)),
    ],
)
def test_labels_are_the_models_own_logits(family: str, lengths: tuple[int, int]) -> None:
    """The unmodified model says what its attention weights are; the labels' logarithms must be theirs. phi3 has other
    rotary frequencies from 33 tokens on."""
    model = build(family)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    batch = collate([row(0, lengths[0]), row(1, lengths[1], 3)])
    with torch.no_grad():
        weights = model(batch["input_ids"], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    made = LocretTask(model, LocretOptions(hidden_size=8, label="log_probability"))
    _, labels = made.observe(**batch)
    for layer, label in zip(weights, labels, strict=True):
        kv_heads = label.shape[1]
        for i, (prompt, end) in enumerate(((lengths[0], lengths[0] + 5), (lengths[1], lengths[1] + 3))):
            seen = layer[i, :, prompt:end, :prompt].reshape(kv_heads, -1, end - prompt, prompt)
            torch.testing.assert_close(label[i, :, :prompt].exp(), seen.amax(dim=(1, 2)), rtol=1e-4, atol=1e-7)


def test_labels_from_a_file_are_those_of_the_batch(tmp_path: Path) -> None:
    """Rows of different lengths, and a text that comes twice."""
    made = task("llama")
    batch = collate(ROWS)
    _, expected = made.observe(**batch)
    texts = SimpleNamespace(once=lambda: iter([*ROWS, ROWS[0]]))
    made.use_labels(tmp_path / "l.safetensors", texts, {"model": "a"}, quiet=True)
    _, found = made.observe(**batch)
    assert len(load_file(tmp_path / "l.safetensors")) == len(ROWS)  # the format that everybody reads
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    save_file({"x": torch.ones(2)}, tmp_path / "heads.safetensors")
    with pytest.raises(TrainingError, match=r"heads\.safetensors is no file of labels"):
        made.use_labels(tmp_path / "heads.safetensors", texts, {"model": "a"}, quiet=True)
    content = (tmp_path / "l.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    with pytest.raises(KVRewriteError, match=r"cut\.safetensors"):
        made.use_labels(tmp_path / "cut.safetensors", texts, {"model": "a"}, quiet=True)
    with pytest.raises(TrainingError, match=r"model is a, expected b"):
        made.use_labels(tmp_path / "l.safetensors", texts, {"model": "b"}, quiet=True)
    stranger = SimpleNamespace(once=lambda: iter([row(9)]))
    with pytest.raises(TrainingError, match=r"no labels for a text of 20 \+ 5 tokens.*another tokenizer"):
        made.use_labels(tmp_path / "l.safetensors", stranger, {"model": "a"}, quiet=True)


def test_tokens_outside_of_a_window_are_not_learned() -> None:
    made = task("mistral")
    scores, labels = made.observe(**collate(ROWS[:1]))
    # The last query stands at 24 and sees 8 tokens; the first answer's query stands at 20: 13 to 19 are seen.
    assert (labels[0][0, :, :13] == -torch.inf).all() and torch.isfinite(labels[0][0, :, 13:20]).all()
    assert torch.isfinite(head_loss(scores, labels, 0.0025).total)


def test_loss_is_the_authors() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randn(2, 2, 9, generator=generator) * 2 for _ in range(3)]
    labels = [torch.randn(2, 2, 9, generator=generator) * 2 for _ in range(3)]
    for x in labels:
        x[1, :, 6:] = -torch.inf
    per_row = []
    for i, count in ((0, 9), (1, 6)):
        s = torch.stack([x[i, :, :count] for x in scores]).double()
        target = torch.stack([x[i, :, :count] for x in labels]).double()
        error = (s - target).abs()
        regression = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
        smooth = sum(((layer[:, :-1] - layer[:, 1:]) ** 2).mean() for layer in s)
        per_row.append(float(regression + 0.0025 * smooth))
    assert head_loss(scores, labels, 0.0025).total.item() == pytest.approx(sum(per_row) / 2, rel=1e-6)


def test_overlap_of_the_best() -> None:
    labels = torch.arange(40.0).view(1, 1, 40)
    labels[..., 30:] = -torch.inf  # the best tenth of 30: 27, 28, 29
    scores = torch.zeros(1, 1, 40)
    scores[..., [29, 28, 3, 35]] = torch.tensor([3.0, 2.0, 4.0, 9.0])
    assert float(top_overlap(scores, labels)) == pytest.approx(2 / 3)


def test_a_batch_is_its_rows() -> None:
    made = task("llama")
    alone = [made(**collate([r]))["loss"].item() for r in ROWS]
    assert made(**collate(ROWS))["loss"].item() == pytest.approx(sum(alone) / len(alone), rel=1e-5)


@pytest.mark.parametrize("family", few(["llama", "phi3", "RopeTable", "gemma2"], rest=["llama", "phi3"]))
def test_gradients_reach_the_heads_alone(family: str) -> None:
    """Against a plain implementation of the head on the features that the unmodified projections give."""
    model = build(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = LocretTask(model, OPTIONS)
    assert {id(p) for p in made.parameters()} == {id(p) for p in made.heads}
    assert all(p.grad is None for p in model.parameters())
    made(**collate(ROWS[:2]))["loss"].backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.heads)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for n, p in made.graph.named_parameters() if "policy_weights" not in n} <= theirs  # type: ignore[union-attr]


def test_scores_are_the_head_of_the_raw_projections() -> None:
    model = build("llama")
    caught: dict[tuple[int, str], Tensor] = {}
    for i, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        for name in ("q_proj", "k_proj", "v_proj"):
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(lambda m, a, out, key=(i, name): caught.__setitem__(key, out))
    batch = collate(ROWS[:1])
    with torch.no_grad():
        model(batch["input_ids"], use_cache=False)
    made = task("llama")
    scores, _ = made.observe(**batch)
    weights = dict(zip(made.names, made.heads))
    for i, got in enumerate(scores):
        x = torch.cat([caught[i, n] for n in ("q_proj", "k_proj", "v_proj")], -1)
        wide = F.silu(x @ weights[f"model.layers.{i}.self_attn.fc1.weight"].T)
        expected = (wide @ weights[f"model.layers.{i}.self_attn.fc2.weight"].T).transpose(1, 2)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, poison: int | None = None):
        self.poison = poison

    def __iter__(self) -> Any:
        seed = 0
        while True:
            yield row(seed, 18, 4) if seed != self.poison else row(-1, 18, 4)
            seed += 1


@needs_trainer
def test_steps_are_those_of_a_plain_loop() -> None:
    made = task("llama")
    plain = copy.deepcopy([p.detach().clone().requires_grad_() for p in made.heads])
    options = FitOptions(steps=6, warmup=2, batch_size=2, clip_value=0.01, log_every=1, quiet=True)
    fitted = fit(made, Endless(), options)
    reference = task("llama")
    optimizer = torch.optim.AdamW(plain, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01, eps=1e-8)
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 2 if step < 2 else (6 - step) / 4)
        with torch.no_grad():
            for mine, theirs in zip(reference.heads, plain):
                mine.copy_(theirs)
                mine.grad = None
        loss = reference(**collate([row(2 * step, 18, 4), row(2 * step + 1, 18, 4)]))["loss"]
        loss.backward()
        for mine, theirs in zip(reference.heads, plain):
            assert mine.grad is not None
            theirs.grad = mine.grad.clamp(-0.01, 0.01)
        optimizer.step()
        losses.append(loss.item())
    for mine, theirs in zip(made.heads, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert [entry["loss"] for entry in fitted.log] == pytest.approx(losses, rel=1e-5)
    assert {"regression", "smoothing", "top_overlap"} <= set(fitted.log[0])


@needs_trainer
@pytest.mark.thorough  # test_stopped_and_resumed of tests/tools/test_train_cli.py is the same kind
def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole, half, rest = task("llama"), task("llama"), task("llama", seed=9)
    shared: dict[str, Any] = {"warmup": 1, "batch_size": 2, "quiet": True}
    fit(whole, Endless(), FitOptions(steps=6, **shared))
    saved = FitOptions(steps=6, save_every=4, checkpoints=tmp_path, **shared)
    fit(half, Endless(), saved)
    newest = last_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-6"
    for path in newest.iterdir():  # as if it had been stopped behind step 4
        path.unlink()
    newest.rmdir()
    fitted = fit(rest, Endless(), FitOptions(**{**vars(saved), "resume": True}))
    assert fitted.resumed_at == 4
    for a, b in zip(whole.heads, rest.heads):
        assert torch.equal(a, b)


@needs_trainer
def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    class Breaks(LocretTask):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            found = super().forward(*args, **kwargs)
            self.calls += 1
            return {**found, "loss": found["loss"] * (float("nan") if self.calls > 5 else 1.0)}

    made = Breaks(build("llama"), OPTIONS)
    options = FitOptions(steps=8, warmup=1, save_every=2, checkpoints=tmp_path, log_every=100, quiet=True)
    with pytest.raises(TrainingError, match=r"not a number.*last good checkpoint is .*checkpoint-4"):
        fit(made, Endless(), options)
    kept = last_checkpoint(tmp_path)
    assert kept is not None and kept.name == "checkpoint-4"
    from safetensors.torch import load_file

    assert all(torch.isfinite(x).all() for x in load_file(kept / "model.safetensors").values())
    with pytest.raises(TrainingError, match="no checkpoint in"):
        fit(made, Endless(), FitOptions(steps=8, warmup=1, checkpoints=tmp_path / "none", resume=True))


def test_saved_heads_are_what_transform_reads(tmp_path: Path) -> None:
    model = build("llama")
    made = LocretTask(model, LocretOptions(hidden_size=8, init=0.5))
    made.save(tmp_path / "heads.safetensors", {"data": "abc"})
    tensors, metadata = read_policy_weights(tmp_path / "heads.safetensors")
    assert sorted(tensors) == sorted(made.names) and metadata["data"] == "abc" and metadata["hidden_size"] == "8"
    options = {"budget": 12, "chunk": 8, "stabilizers": 2, "local_tail": 2}
    small = kvrewrite.transform(model, "locret", policy_weights=tmp_path / "heads.safetensors", **options)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    cache = small.new_cache(1)
    small(ids, past_key_values=cache)
    scores = made.observe(**collate(ROWS[:1]))[0][0][0]
    # The first chunk's scores depend on nothing that was evicted: of tokens 0 to 7, the best are kept first.
    kept = [p for p in cache.positions()[0][0][0] if p < 8]
    best = torch.topk(scores[0, :8], len(kept)).indices.tolist()
    assert sorted(kept) == sorted(best)


def test_refusals() -> None:
    with pytest.raises(KVRewriteError, match="no attention"):
        LocretTask(nn.Sequential(nn.Embedding(97, 16), nn.Linear(16, 97)), OPTIONS)
    with pytest.raises(KVRewriteError, match="latent attention"):
        task("deepseek_v3")
    with pytest.raises(OptionError, match="label is 'max'"):
        LocretOptions(label="max")
    with pytest.raises(OptionError, match="warmup is 2000 of 10"):
        FitOptions(steps=10)


def test_heads_use_the_models_activation() -> None:
    """What inference will use (`transform` asks the same way), under whatever name the configuration has it."""
    model = build("gpt2")
    made = LocretTask(model, OPTIONS)
    assert made.policy.activation == model.config.activation_function == "gelu_new"  # type: ignore[union-attr]
