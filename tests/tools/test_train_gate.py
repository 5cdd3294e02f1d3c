"""Training Attention-Gates: the training graph is the inference graph's, losses, LoRA, what is saved."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvrewrite
from kvrewrite.artifact.policy_weights import read_policy_weights
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import InputError, OptionError
from kvrewrite.passes.pipeline import canonical
from kvrewrite.policies.attention_gate import AttentionGate
from kvrewrite.tools.training import lora
from kvrewrite.tools.training.gate import (
    GateOptions,
    GateTask,
    eviction_loss,
    eviction_ratios,
    gate_loss,
    kept_share,
    plot_eviction,
    save_gates,
    target_index,
)
from kvrewrite.tools.training.gate_graph import GatedModel, attend_to_all, calibrate, initial_weights, straight_through
from tests.support.rewritten import build, captured, fork, logits, original, rewrite

POLICY = AttentionGate(gate_heads=2, gate_dim=8)
VOCAB = 97


@functools.cache
def weights(family: str) -> dict[str, Tensor]:
    """Gates that drop about half of the tokens, by content."""
    copy, sites = fork(captured(family))
    found = initial_weights(copy, sites, POLICY, bias=0.0, seed=3)
    return {n: w * 20 if n.endswith("o_proj.weight") else w for n, w in found.items()}


def gated(family: str, given: dict[str, Tensor] | None = None, **options: Any) -> GatedModel:
    copy, sites = fork(captured(family))
    return GatedModel(copy, sites, POLICY, weights(family) if given is None else given, **options)


def text(batch: int = 2, length: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_training_computes_what_inference_does(family: str) -> None:
    ids = text()
    model = gated(family)
    got, gates = model(ids)
    assert all(0.2 < float(m.mean()) < 0.9 for m in gates)
    for chunk in (1024, 11):
        rewritten = rewrite(
            original(family), captured(family), "attention_gate", weights(family), gate_heads=2, chunk=chunk
        )
        torch.testing.assert_close(got, rewritten(ids).logits, rtol=1e-4, atol=2e-5)
    assert float((got - logits(original(family), ids)).abs().max()) > 1e-2


@torch.no_grad()
def test_all_tokens_stay_at_first() -> None:
    copy, sites = fork(captured("llama"))
    model = gated("llama", initial_weights(copy, sites, POLICY, bias=2.0, seed=0))
    got, gates = model(text())
    torch.testing.assert_close(got, logits(original("llama"), text()), rtol=1e-4, atol=1e-5)
    assert all(bool((m == 1).all()) for m in gates)


@torch.no_grad()
def test_padding_changes_nothing_and_answers_stay() -> None:
    model, ids = gated("llama"), text()
    alone, gates = model(ids[1:, :17])
    padded = ids.clone()
    padded[1, 17:] = 0
    together, all_gates = model(padded)
    torch.testing.assert_close(together[1:, :17], alone, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a[1:, :, :17], g) for a, g in zip(all_gates, gates, strict=True))
    prompt = torch.arange(30).expand(2, 30) < 20
    _, some = model(ids, prompt)
    assert all(bool((m[:, :, 20:] == 1).all()) and bool((m[:, :, 4:20] == 0).any()) for m in some)
    picked, _ = model(ids, None, torch.tensor([[3, 9], [29, 0]]))
    whole, _ = model(ids)
    torch.testing.assert_close(picked, torch.stack([whole[0, [3, 9]], whole[1, [29, 0]]]), rtol=1e-5, atol=1e-6)


def test_parameters_are_the_models_own_and_only_gates_train() -> None:
    for parameter in original("llama").parameters():
        parameter.requires_grad_(False)
    model, own = gated("llama"), dict(original("llama").named_parameters())
    backbone = {n: p for n, p in model.graph.named_parameters() if not n.startswith("policy_weights.")}
    assert backbone and all(p is own[n] for n, p in backbone.items())
    out, _ = model(text())
    out.square().mean().backward()
    trained = {n for n, p in model.graph.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert trained == {f"policy_weights.{n}" for n in weights("llama")}


def test_straight_through() -> None:
    p = torch.tensor([[[0.9, 0.2, 0.5, 0.7, 0.1]]], requires_grad=True)
    m = straight_through(p, torch.arange(5)[None], torch.tensor([[True, True, True, False, True]]), 0.5, 1)
    assert m.tolist() == [[[1, 0, 0, 1, 0]]]
    m.sum().backward()
    assert p.grad is not None and p.grad.tolist() == [[[0, 1, 1, 0, 1]]]


def test_losses() -> None:
    options = GateOptions(keep_target=0.4, ramp=0.5)
    assert [options.target_at(x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.7, 0.4, 0.4])
    assert GateOptions(keep_target=0.4, ramp=0.0).target_at(0.0) == 0.4
    counted = torch.tensor([[True, True, True, False], [True, False, False, False]])
    gates = [torch.ones(2, 2, 4), torch.zeros(2, 1, 4)]
    gates[0][0, 0, :2] = 0
    kept = kept_share(gates, counted)
    assert [k.tolist() for k in kept] == [[0.5, 1.0], [0.0]]
    assert float(eviction_loss(kept, 0.6, "layer", two_sided=True)) == pytest.approx((0.15 + 0.6) / 2)
    assert float(eviction_loss(kept, 0.6, "layer", two_sided=False)) == pytest.approx(0.075)
    assert float(eviction_loss(kept, 0.6, "head", two_sided=True)) == pytest.approx((0.1 + 0.4 + 0.6) / 3)
    assert float(eviction_loss(kept, 0.6, "head", two_sided=False)) == pytest.approx(0.4 / 3)
    assert float(eviction_loss(kept, 0.6, "model", two_sided=True)) == pytest.approx(0.225)
    index, targets = target_index(torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]]))
    assert index[0].tolist() == [1, 2] and index[1, 0] == 0 and targets.tolist() == [[7, 8], [5, -100]]
    with pytest.raises(OptionError, match="no token of a batch is a target"):
        target_index(torch.full((2, 4), -100))


def example(ids: Tensor, answers: int) -> tuple[Tensor, Tensor]:
    """(labels, real) where the last tokens are the answer."""
    labels = ids.clone()
    labels[:, : ids.shape[1] - answers] = -100
    return labels, torch.ones_like(ids, dtype=torch.bool)


def test_loss_of_each_mode_is_what_the_original_model_gives_while_all_stays() -> None:
    copy, sites = fork(captured("llama"))
    model = gated("llama", initial_weights(copy, sites, POLICY, bias=2.0, seed=0))
    ids = text()
    out = logits(original("llama"), ids).float().log_softmax(-1)
    each = -out[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    pretrain = GateOptions(gate_heads=2, gate_dim=8, keep_target=0.4)
    found = gate_loss(model, pretrain, ids, ids, torch.ones_like(ids, dtype=torch.bool), 0.25)
    torch.testing.assert_close(found.task, each.mean(), rtol=1e-5, atol=1e-6)
    assert float(found.eviction.detach()) == pytest.approx(1 - pretrain.target_at(0.25))
    finetune = GateOptions(mode="finetune", gate_heads=2, gate_dim=8, distill=0.5)
    labels, real = example(ids, 5)
    found = gate_loss(model, finetune, ids, labels, real, 1.0)
    torch.testing.assert_close(found.task, each[:, -5:].mean(), rtol=1e-5, atol=1e-6)
    assert float(found.distill.detach()) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(found.total, found.task + finetune.eviction * found.eviction, rtol=1e-5, atol=1e-5)
    assert found.kept.detach().tolist() == [1.0, 1.0] and float(found.eviction.detach()) == pytest.approx(0.6)


def test_adapters_alone_are_trained_with_all_gates_open() -> None:
    options = GateOptions(mode="finetune", gate_heads=2, gate_dim=8, gates=False, distill=1.0)
    ids = text()
    found = gate_loss(gated("llama"), options, ids, *example(ids, 5), 1.0)
    out = logits(original("llama"), ids).float().log_softmax(-1)
    expected = -out[:, -6:-1].gather(2, ids[:, -5:, None]).mean()
    torch.testing.assert_close(found.total.detach(), expected, rtol=1e-5, atol=1e-6)
    assert found.kept.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "options", [{}, {"distill": 1.0, "gradient": "derivative", "level": "layer"}, {"two_sided": False}], ids=str
)
def test_training_evicts_as_much_as_the_target_says(options: dict[str, Any]) -> None:
    for parameter in original("llama").parameters():
        parameter.requires_grad_(False)
    copy, sites = fork(captured("llama"))
    chosen = GateOptions(gate_heads=2, gate_dim=8, keep_target=0.4, **options)
    flip = chosen.gradient == "flip"
    model = GatedModel(copy, sites, POLICY, initial_weights(copy, sites, POLICY, bias=2.0, seed=0), flip=flip)
    optimizer = torch.optim.AdamW(model.gate_weights().values(), lr=2e-2, weight_decay=0.0)
    losses = []
    for step in range(60):
        ids = text(seed=step)
        found = gate_loss(model, chosen, ids, ids, torch.ones_like(ids, dtype=torch.bool), step / 40)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        losses.append(found)
    assert losses[0].kept.detach().tolist() == [1.0, 1.0]
    kept = losses[-1].kept.detach()
    assert bool((kept < 0.65).all()) and (not chosen.two_sided or bool((kept > 0.2).all()))


def test_lora_and_gates_as_adapted_and_as_merged(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    chosen = GateOptions(mode="finetune", gate_heads=2, gate_dim=8, lora_rank=2, merge=True)
    task = GateTask(build("llama"), chosen)
    training = task.gates
    with torch.no_grad():
        for name, weight in training.model.gate_weights().items():
            weight.copy_(weights("llama")[name])
        for name, parameter in training.adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    ids = text()
    labels, real = example(ids, 5)
    task.progress = 1.0
    parts = task(ids, labels, real)
    parts["loss"].backward()
    parts = {name: float(x.detach()) for name, x in parts.items()}
    assert parts["loss"] == pytest.approx(parts["task"] + chosen.eviction * parts["eviction"], rel=1e-5)
    assert 0 < parts["kept_least"] <= parts["kept"] < 1 and task.needs == "answer"
    groups = {str(group["name"]): group["params"] for group in training.parameter_groups()}
    gates, adapters = groups["gates"] + groups["gate biases"], groups["lora"]
    assert len(gates) == 2 * 5 and len(adapters) == 2 * 2 * 7 and all(p.grad is not None for p in [*gates, *adapters])
    trained = {id(p) for p in [*gates, *adapters]}
    assert (
        {id(p) for p in training.model.parameters() if p.requires_grad} == trained == {id(p) for p in task.parameters()}
    )
    with torch.no_grad():
        got, _ = training.model(ids)
        assert float((got - gated("llama")(ids)[0]).abs().max()) > 1e-2
        graph = capture(training.base)
        canonical(graph)
        rewritten = rewrite(training.base, graph, "attention_gate", weights("llama"), gate_heads=2)
        torch.testing.assert_close(got, rewritten(ids).logits, rtol=1e-4, atol=5e-5)
        expected = logits(training.base, ids)
    ratios = eviction_ratios(training.model, [(ids, labels == -100)])
    written = task.save(tmp_path / "gates.safetensors", {"data": "abc"})
    assert [p.name for p in written] == ["gates.safetensors", "gates-adapter", "gates-model", "gates.png"]
    assert written[3].read_bytes().startswith(b"\x89PNG")
    _, metadata = read_policy_weights(written[0])
    assert metadata["data"] == "abc" and metadata["lora_rank"] == "2" and metadata["mode"] == "finetune"
    assert float(metadata["evicted"]) == pytest.approx(float(ratios.mean()), abs=1e-4)
    assert {p.name for p in written[1].iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(OptionError, match="merged"):
        task(ids, labels, real)
    merged = AutoModelForCausalLM.from_pretrained(written[2], dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=5e-5)


def test_fresh_gates_fit_the_model_and_tell_tokens_apart() -> None:
    """Whatever the size of the layers' inputs: p is spread as asked, and the gates' attention is on the token itself."""
    ids = text()
    every = torch.ones_like(ids, dtype=torch.bool)
    found: dict[str, list[Tensor]] = {"logits": [], "attended": []}

    class Watch(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            out = super().call_function(target, args, kwargs)
            if target is torch.ops.aten.sigmoid.default:
                found["logits"].append(args[0])
            if target is attend_to_all:
                found["attended"].append((out - args[2]).norm() / args[2].norm())
            return out

    for size in (1.0, 0.01):
        copy, sites = fork(captured("llama"))
        model = GatedModel(copy, sites, POLICY, initial_weights(copy, sites, POLICY, bias=2.0, seed=0))
        norms = [p for n, p in original("llama").named_parameters() if n.endswith("input_layernorm.weight")]
        try:
            with torch.no_grad():
                for norm in norms:
                    norm.mul_(size)
            calibrate(model, ids, every, spread=0.4)
            with torch.no_grad():
                Watch(model.graph).run(*model.arguments(ids, every, None))
        finally:
            with torch.no_grad():
                for norm in norms:
                    norm.div_(size)
    for x in found["logits"]:
        assert 0.2 < float(x.std(dim=1).mean()) < 0.6 and abs(float(x.mean()) - 2) < 0.4
    assert all(float(x) < 0.6 for x in found["attended"])


def test_what_is_forgotten_is_computed_again() -> None:
    results = []
    for checkpoint in (False, True):
        model, kept = gated("llama", checkpoint=checkpoint), 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, gates = model(text())
        (out.square().mean() + sum(m.mean() for m in gates)).backward()
        results.append((kept, out.detach(), [p.grad for p in model.gate_weights().values()]))
    (whole, out, grads), (less, other, others) = results
    assert less < 0.6 * whole and torch.equal(out, other)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))  # type: ignore[arg-type]


def test_what_is_saved(tmp_path: Path) -> None:
    model = gated("llama")
    save_gates(tmp_path / "gates.safetensors", model, {"data": "abc", "keep_target": "0.4"})
    tensors, metadata = read_policy_weights(tmp_path / "gates.safetensors")
    assert tensors.keys() == weights("llama").keys()
    assert all(torch.equal(tensors[n], w) for n, w in weights("llama").items())
    assert metadata["gate_heads"] == "2" and metadata["gate_dim"] == "8" and metadata["policy"] == "attention_gate"
    assert metadata["data"] == "abc" and metadata["kvrewrite"] == kvrewrite.__version__
    assert metadata["base_model"] == "4,2,16,16;4,2,16,16"


@torch.no_grad()
def test_eviction_is_what_caches_lack(tmp_path: Path) -> None:
    ids = text(batch=1)
    ratios = eviction_ratios(gated("llama"), [(ids, torch.ones_like(ids, dtype=torch.bool))])
    rewritten = rewrite(original("llama"), captured("llama"), "attention_gate", weights("llama"), gate_heads=2)
    cache = rewritten(ids, use_cache=True).past_key_values
    lens = torch.stack([cache.live_slots()[layer][0] for layer in range(2)])
    assert bool((lens < ids.shape[1]).all())
    torch.testing.assert_close(ratios, 1 - lens.double() / ids.shape[1])
    plot_eviction(ratios, tmp_path / "gates.png", [0, 1])
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="no text"):
        eviction_ratios(gated("llama"), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sft"}, "mode is 'sft', expected one of pretrain, finetune"),
        ({"keep_target": 1.0}, "keep_target is 1.0, expected a share between 0 and 1"),
        ({"keep_target": 0.0}, "between 0 and 1"),
        ({"initial_bias": -1.0}, "gates start closed"),
        ({"ramp": 1.5}, "ramp is 1.5"),
        ({"eviction": float("nan")}, "eviction is nan"),
        ({"gate_dim": 6}, "multiple of 4"),
        ({"level": "token"}, "expected one of head, layer, model"),
        ({"gradient": "soft"}, "expected one of flip, derivative"),
        ({"start": -1}, "start is -1"),
        ({"gates": False}, "nothing is left to train"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GateOptions(**options)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, sites = fork(dataclasses.replace(captured("llama"), max_positions=20))
    with pytest.raises(InputError, match=r"texts of 30 tokens are too long .* at most 20"):
        GatedModel(copy, sites, POLICY, weights("llama"))(text())
    with pytest.raises(OptionError, match="do not fit this model"):
        gated("llama", {"model.layers.0.gate.q_proj.weight": torch.zeros(1, 1)})
    with pytest.raises(OptionError, match="rank is 0"):
        lora.add_lora(nn.Linear(2, 2), rank=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="needs peft: pip install"):
        lora.add_lora(nn.Linear(2, 2))
