"""Published trained heads: files with the names and shapes that their authors write, imported, put into a model and saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvrewrite
from kvrewrite import policies
from kvrewrite.artifact.policy_weights import read_policy_weights
from kvrewrite.artifact.published import import_published
from kvrewrite.compiler import model_facts
from kvrewrite.errors import KVRewriteError, OptionError, PolicyWeightsError
from kvrewrite.passes.pipeline import insert
from kvrewrite.policies import UNLIMITED
from kvrewrite.runtime.model import RewrittenModel
from tests.support import learned
from tests.support.products import few
from tests.support.rewritten import captured, fork, original, rewritten

pytestmark = pytest.mark.xdist_group("llama")
LAYERS = 2  # of the model here


def transform(policy: str, weights: Any = None, **options: Any) -> Any:
    """`kvrewrite.transform` of a model that is captured already. weights: a file, tensors or None."""
    model, (copied, sites) = original("llama"), fork(captured("llama"))
    given = weights if weights is None or not isinstance(weights, dict) else (weights, {})
    if isinstance(weights, Path):
        given = read_policy_weights(weights)
    program = insert(copied, sites, policies.make(policy, **options), given, model_facts(model.config))
    return RewrittenModel(program, model.config, model.generation_config, source=model)


# -- what the authors' code writes
def write_kvzap(directory: Path, linear: bool = False, **config: Any) -> Path:
    """KVzapModel.save_pretrained."""
    save_file(learned.kvzap_file(linear, LAYERS), directory / "model.safetensors", {"format": "pt"})
    told = {"model_type": "kvzap", "input_dim": 64, "output_dim": 2, "n_modules": LAYERS}
    told["hidden_dim"] = None if linear else learned.WIDTH  # type: ignore[assignment]
    (directory / "config.json").write_text(json.dumps({**told, **config}))
    return directory


def write_fast_kvzip(directory: Path, gates: list[dict[str, Tensor]] | None = None) -> Path:
    """optim.py: gates, and numpy arrays of losses."""
    file = directory / "q2_dim6_sink5.pt"
    notes = {n: np.ones((3, LAYERS)) for n in ("loss", "acc", "loss_train", "acc_train")}
    torch.save({"module": learned.fast_kvzip_file(LAYERS) if gates is None else gates, **notes}, file)
    return file


def write_trim_kv(directory: Path, kind: str = "rg", **config: Any) -> Path:
    """trimkv_weights.pth and the model's configuration."""
    torch.save(learned.trim_kv_file(kind, LAYERS), directory / "trimkv_weights.pth")
    told = {"retention_gate": kind, "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "memory_size": 512}
    (directory / "config.json").write_text(json.dumps({**told, "base_model": "Qwen/Qwen3-4B", **config}))
    return directory


def write_duo(directory: Path) -> Path:
    """np.savetxt, and the arguments of the training."""
    np.savetxt(directory / "full_attention_heads.tsv", np.array(learned.ALPHA[:LAYERS]), delimiter="\t")
    told = {"model_name": "models/Some-8B", "sink_size": 128, "recent_size": 256}
    (directory / "config.json").write_text(json.dumps(told))
    return directory


def write_qfilters(directory: Path, shape: tuple[int, ...] = (LAYERS, 2, 16), **config: Any) -> Path:
    """model.safetensors and config.json, as PyTorchModelHubMixin saves the authors' module."""
    filters = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    save_file({"q_filters": filters}, directory / "model.safetensors")
    told = {"num_layers": LAYERS, "num_kv_heads": 2, "kv_head_dim": 16}
    (directory / "config.json").write_text(json.dumps({**told, **config}))
    return directory


def write_locret(directory: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    names = {"fc1": (24, 128), "fc2": (2, 24)}
    torch.save(
        {
            f"model.layers.{i}.self_attn.{n}.weight": torch.randn(s, generator=generator, dtype=torch.float64)
            for i in range(LAYERS)
            for n, s in names.items()
        },
        directory / "heads.bin",
    )
    return directory / "heads.bin"


# name -> (policy, what writes its file, options of the policy, what it must know afterwards)
FORMATS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any], dict[str, Any]]] = {
    "kvzap mlp": ("kvzap", write_kvzap, {"threshold": -1.0, "window": 4}, {"hidden_size": 12}),
    "kvzap linear": (
        "kvzap", lambda d: write_kvzap(d, linear=True), {"threshold": -1.0, "window": 4}, {"hidden_size": 0}
    ),
    "fast_kvzip": ("fast_kvzip", write_fast_kvzip, {"budget": 14, "interval": 3}, {"rank": 6, "gate_sinks": 5}),
    "trim_kv rg": ("trim_kv", write_trim_kv, {"budget": 10, "buffer_size": 2}, {"hidden_size": 12, "retention_gate": "rg"}),
    "trim_kv rg2": ("trim_kv", lambda d: write_trim_kv(d, "rg2"), {"budget": 10, "buffer_size": 3}, {"retention_gate": "rg2"}),
    "trim_kv rg3": ("trim_kv", lambda d: write_trim_kv(d, "rg3"), {"budget": 10, "buffer_size": 1}, {"retention_gate": "rg3"}),
    "duo_attention": ("duo_attention", write_duo, {"budget": 10, "start": 4}, {"heads": "10,10"}),
    "qfilters": ("qfilters", write_qfilters, {"budget": 12, "window": 3}, {}),
    "locret": ("locret", write_locret, {"budget": 12, "chunk": 8, "stabilizers": 3, "local_tail": 4}, {"hidden_size": 24}),
}  # fmt: skip


@pytest.mark.parametrize("name", few(FORMATS, rest=("trim_kv rg2", "trim_kv rg3")))
def test_imported_transformed_saved_loaded(name: str, tmp_path: Path) -> None:
    """The tensors are the file's, bit for bit; the policy takes its sizes from them; a saved model goes on the same."""
    policy, write, options, known = FORMATS[name]
    out = tmp_path / "weights.safetensors"
    tensors, metadata = import_published(write(tmp_path), out, policy)
    read, told = read_policy_weights(out)
    assert told["policy"] == policy and metadata.items() <= told.items()
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], t) for n, t in tensors.items())
    model = transform(policy, out, **options)
    assert all(getattr(model.policy, n) == v for n, v in known.items())
    attached = {
        n.removeprefix("policy_weights."): model.graph_module.get_parameter(n) for n in model.program.policy_weights
    }
    assert attached.keys() == (set() if policy == "duo_attention" else read.keys())
    assert all(torch.equal(t, read[n].float()) for n, t in attached.items())
    model.save_pretrained(tmp_path / "saved")
    again = kvrewrite.load(tmp_path / "saved")
    assert again.policy == model.policy
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(1))[None, :40] + 1
    caches = [m.new_cache(1) for m in (model, again)]
    for at, width in ((0, 30), (30, 1), (31, 9)):
        got = [m(ids[:, at : at + width], past_key_values=c).logits for m, c in zip((model, again), caches)]
        assert torch.equal(*got)
    assert caches[0].positions() == caches[1].positions()
    assert min(len(h) for rows in caches[0].positions().values() for h in rows[0]) < 40


def test_kvzap_files_need_no_import(tmp_path: Path) -> None:
    """They are safetensors with the names that the policy has."""
    file = write_kvzap(tmp_path) / "model.safetensors"
    model = transform("kvzap", file)
    assert model.policy.hidden_size == learned.WIDTH and len(model.program.policy_weights) == len(load_file(file))


def test_what_was_noted_goes_along(tmp_path: Path) -> None:
    _, trim = import_published(write_trim_kv(tmp_path), tmp_path / "t.safetensors", "trim_kv")
    assert trim["trained_for"] == "Qwen/Qwen3-4B" and trim["trained_memory_size"] == "512"
    _, duo = import_published(write_duo(tmp_path), tmp_path / "d.safetensors", "duo_attention")
    assert duo["trained_sink_size"] == "128" and duo["trained_recent_size"] == "256"


# -- the pattern
@pytest.mark.parametrize(
    ("sparsity", "heads"), [(0.0, "11,11"), (0.25, "10,11"), (0.5, "10,10"), (0.75, "00,10"), (1.0, "00,00")]
)
def test_duo_sparsity(sparsity: float, heads: str) -> None:
    """The authors compare with numpy's quantile; of equal numbers the first ones stream. 1.3 counts as 1."""
    alpha = torch.tensor([[0.6, 0.0], [1.3, 0.01]])
    model = transform("duo_attention", {"full_attention_heads": alpha}, sparsity=sparsity)
    assert model.policy.heads == heads
    if 0 < sparsity < 1:
        clipped = np.clip(alpha.numpy(), 0, 1)
        full = clipped >= np.quantile(clipped, sparsity)
        assert heads == ",".join("".join(str(int(x)) for x in row) for row in full)


def test_duo_budgets() -> None:
    """Streaming heads have the budget, the others none; memory estimates know it."""
    model = transform("duo_attention", heads="10,00", budget=80, start=4)
    assert model.policy.head_keeps(80, 0, 2) == [UNLIMITED, 80] and model.policy.head_keeps(80, 1, 2) == [80, 80]
    cache = model.new_cache(1)
    model(torch.randint(1, 97, (1, 400)), past_key_values=cache)
    assert [lens.tolist() for lens in cache.live_slots().values()] == [[[400, 80]], [[80, 80]]]
    from kvrewrite.analysis.memory import plan_memory

    plan = plan_memory(model.sites, model.policy, 4, 400)
    assert plan.evicted == cache.memory().leased and plan.evicted < plan.full


# -- what does not fit
def broken(change: Callable[[dict[str, Any]], None], kind: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        if kind == "kvzap":
            tensors = dict(learned.kvzap_file(layers=LAYERS))
            change(tensors)
            save_file(tensors, directory / "model.safetensors")
            return directory / "model.safetensors"
        if kind == "trim_kv":
            tensors = dict(learned.trim_kv_file(layers=LAYERS))
            change(tensors)
            torch.save(tensors, directory / "trimkv_weights.pth")
            return directory / "trimkv_weights.pth"
        gates = [dict(g) for g in learned.fast_kvzip_file(LAYERS)]
        change(gates[1])
        return write_fast_kvzip(directory, gates)

    return write


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return directory / name

    return write


GATE = "model.layers.1.self_attn.retention_gate."
BROKEN: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "no file": ("kvzap", lambda d: d / "none", "does not exist"),
    "empty directory": ("kvzap", lambda d: d, "has no model.safetensors or pytorch_model.bin"),
    "cut off": ("kvzap", written("m.safetensors", b"\x10"), "not a whole safetensors"),
    "kvzap names": ("kvzap", broken(lambda t: t.update({"head.weight": torch.ones(1)}), "kvzap"), "head.weight is none of"),
    "kvzap layer": ("kvzap", broken(lambda t: t.pop("layers.1.2.bias"), "kvzap"), "lacks 2.bias"),
    "kvzap shape": ("kvzap", broken(lambda t: t.update({"layers.1.2.bias": torch.ones(3)}), "kvzap"), r"\[3\], expected \(kv"),
    "kvzap first layer": ("kvzap", broken(lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.0")], "kvzap"),
                          "layers 0 are missing"),
    "kvzap integers": ("kvzap", broken(lambda t: t.update({"layers.0.0.bias": torch.ones(12, dtype=torch.int64)}), "kvzap"),
                       "expected finite numbers"),
    "kvzap config": ("kvzap", lambda d: write_kvzap(d, input_dim=128), "input_dim 64, but the config.json beside it says 128"),
    "fast_kvzip, no gates": ("fast_kvzip", lambda d: write_fast_kvzip(d, []), 'list of gates under "module"'),
    "fast_kvzip shape": ("fast_kvzip", broken(lambda g: g.update(b=torch.ones(2, 1, 3)), "fast"), r"layer 1, b is \[2, 1, 3\]"),
    "fast_kvzip nan": ("fast_kvzip", broken(lambda g: g.update(k_base=g["k_base"] / 0), "fast"), "not finite"),
    "trim_kv names": ("trim_kv", broken(lambda t: t.pop(GATE + "bias"), "trim_kv"), "lacks bias"),
    "trim_kv kind": ("trim_kv", lambda d: write_trim_kv(d, "rg", retention_gate="rg3"), "layer 0 has linear1.bias"),
    "trim_kv config": ("trim_kv", lambda d: write_trim_kv(d, retention_gate="rg9"), "retention_gate='rg9'"),
    "qfilters shape": ("qfilters", lambda d: write_qfilters(d, (2, 16)), r"q_filters \[2, 16\]; expected q_filters"),
    "qfilters config": ("qfilters", lambda d: write_qfilters(d, kv_head_dim=64), "kv_head_dim 16, but the config.json"),
    "duo words": ("duo_attention", written("full_attention_heads.tsv", "1.0\tx\n"), "not a table of numbers"),
    "duo lines": ("duo_attention", written("full_attention_heads.tsv", "1.0\t0.5\n0.5\n"), "lines of 1, 2 numbers"),
    "duo nan": ("duo_attention", written("full_attention_heads.tsv", "1.0\tnan\n"), "not finite"),
    "config that is none": ("duo_attention", lambda d: (written("config.json", "{")(d), write_text(d))[1], "is not JSON"),
    "lfs": ("duo_attention", written("full_attention_heads.tsv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "git lfs"),
}  # fmt: skip


def write_text(directory: Path) -> Path:
    return written("full_attention_heads.tsv", "1.0\t0.5\n")(directory)


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit(name: str, tmp_path: Path) -> None:
    policy, write, says = BROKEN[name]
    with pytest.raises(PolicyWeightsError, match=says):
        import_published(write(tmp_path), tmp_path / "out.safetensors", policy)
    assert not (tmp_path / "out.safetensors").exists()


class Runs:
    """A pickle that would make a file, if anything ran it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    """Also where arrays are allowed."""
    torch.save({"module": learned.fast_kvzip_file(LAYERS), "acc": Runs(tmp_path / "ran")}, tmp_path / "g.pt")
    with pytest.raises(PolicyWeightsError, match=r"g\.pt is not a pickle of plain tensors"):
        import_published(tmp_path / "g.pt", tmp_path / "out.safetensors", "fast_kvzip")
    assert not (tmp_path / "ran").exists()
    torch.save({"x": torch.ones(1), "note": np.ones(2)}, tmp_path / "n.pt")
    with pytest.raises(PolicyWeightsError, match="plain tensors"):  # only where the format has some
        import_published(tmp_path / "n.pt", tmp_path / "out.safetensors", "trim_kv")


def test_policies_without_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no trained heads are known for it; expected one of .*locret"):
        import_published(tmp_path, tmp_path / "out.safetensors", "h2o")


@pytest.mark.parametrize(
    ("policy", "weights", "options", "says"),
    [
        ("kvzap", learned.kvzap_file(layers=3), {}, "unexpected"),
        ("kvzap", learned.trim_kv_file(layers=2), {}, "missing"),
        ("fast_kvzip", learned.fast_kvzip_weights(), {}, "unexpected"),
        ("trim_kv", learned.trim_kv_file(layers=2), {}, "are they rg2, or rg"),  # 64 channels of either
        (
            "trim_kv",
            learned.trim_kv_file("rg2", layers=2),
            {"retention_gate": "rg2", "positions": "contiguous"},
            "original",
        ),
        (
            "trim_kv",
            {**learned.trim_kv_file(layers=2), "x": torch.ones(1)},
            {"retention_gate": "rg"},
            r"unexpected \(1\): x",
        ),
        (
            "duo_attention",
            {"full_attention_heads": torch.ones(3, 2)},
            {},
            "3 layers of 2 heads, but the model has 2 layers",
        ),
        ("duo_attention", {"full_attention_heads": torch.ones(2, 4)}, {}, "2 layers of 4 heads"),
        ("duo_attention", {"other": torch.ones(2, 2)}, {}, r"the weights are other \[2, 2\]"),
        ("duo_attention", None, {}, "needs a pattern"),
        ("duo_attention", None, {"heads": "10"}, "1 layers of 2 heads"),
    ],
)
def test_weights_that_do_not_fit_the_model(policy: str, weights: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(KVRewriteError, match=says):
        transform(policy, weights, **options)


@pytest.mark.parametrize(
    ("family", "policy", "says"),
    [
        ("mistral", "fast_kvzip", "every layer of this model has a sliding window"),
        *[("deepseek_v3", p, "latent attention") for p in ("kvzap", "fast_kvzip", "trim_kv")],
    ],
)
def test_models_that_are_refused(family: str, policy: str, says: str) -> None:
    with pytest.raises(KVRewriteError, match=says):
        rewritten(family, policy)
