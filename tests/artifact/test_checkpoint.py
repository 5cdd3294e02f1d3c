"""Checkpoint directories: recipes give what transformers loads, and broken directories get a reason."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvrewrite.artifact.checkpoint import Checkpoint, read_header
from kvrewrite.artifact.meta_model import build_on_meta
from kvrewrite.artifact.parameter_sources import parameter_sources
from kvrewrite.artifact.recipes import check_recipe, load_parameters
from kvrewrite.capture.fake_parameters import capture_on_meta
from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.ir.serialize import graph_to_dict, retarget_device
from tests.support.products import few
from tests.support.rewritten import traced
from tests.support.zoo import FAMILIES, VOCAB, make

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def saved(path: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny checkpoint in which no two parameters are equal, norms included."""
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(dtype).save_pretrained(path, **options)
    return path


def reference(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def assert_same(path: Path) -> None:
    """What the recipes give is what `from_pretrained` loads, to the bit and in dtype."""
    checkpoint = Checkpoint.open(path)
    model, config = build_on_meta(path)
    assert all(p.is_meta for p in model.parameters())
    loaded = load_parameters(checkpoint, json.loads(json.dumps(parameter_sources(model, config, checkpoint))))
    wanted = reference(path)
    assert loaded.keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    buffers = dict(model.named_buffers())
    for name, buffer in wanted.named_buffers():
        if name not in loaded:
            assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("name", FAMILIES)
def test_recipes_give_what_from_pretrained_loads(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "whole", name)
    assert_same(tmp_path / "whole")
    saved(tmp_path / "shards", name, torch.bfloat16, max_shard_size="50KB")
    assert len(Checkpoint.open(tmp_path / "shards").files) > 2
    assert_same(tmp_path / "shards")


@pytest.mark.parametrize("name", few(["gemma2", "mixtral", "falcon"], rest=("mixtral", "falcon")))
def test_capture_on_meta_is_capture(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, name)
    model, config = build_on_meta(path)
    sources = parameter_sources(model, config, Checkpoint.open(path))
    captured = capture_on_meta(model)
    real, expected = reference(path), traced(name)
    assert graph_to_dict(captured.graph) == graph_to_dict(expected.graph)
    assert captured.aliases == expected.aliases and captured.persistent == expected.persistent
    for node in captured.graph.graph.nodes:
        if node.op == "get_attr":
            value = get_attr(captured.graph, node.target)
            assert type(value) in (Tensor, nn.Parameter)
            assert value.is_meta == (node.target in sources), node.target
    assert all(type(p) is nn.Parameter and p.is_meta for p in model.parameters())
    loaded = load_parameters(Checkpoint.open(path), sources)
    for name in {n.target for n in captured.graph.graph.nodes if n.op == "get_attr"} & loaded.keys():
        parameter = isinstance(get_attr(captured.graph, name), nn.Parameter)
        set_attr(captured.graph, name, nn.Parameter(loaded[name]) if parameter else loaded[name])
    retarget_device(captured.graph, "cpu")
    real.set_attn_implementation("eager")  # the sdpa of transformers 5.17 drops Gemma 2's softcap
    ids = torch.randint(0, VOCAB, (2, 11))
    inputs = (ids, torch.arange(11).expand(2, 11))[: sum(n.op == "placeholder" for n in captured.graph.graph.nodes)]
    with torch.no_grad():
        torch.testing.assert_close(captured.graph(*inputs), real(ids).logits, rtol=1e-5, atol=1e-5)


def test_building_on_meta_allocates_no_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m", "llama")
    largest = 0
    make_parameter = nn.Parameter.__new__

    def spy(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        nonlocal largest
        if data is not None and not data.is_meta:
            largest = max(largest, data.dim())
        return make_parameter(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", spy)
    build_on_meta(path)
    assert largest < 2  # vectors of norms are made by torch.ones; no matrix is real
    monkeypatch.undo()
    assert not nn.Linear(2, 2).weight.is_meta  # and the patch is gone


def edit(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def sources_of(path: Path) -> dict[str, Any]:
    model, config = build_on_meta(path)
    return parameter_sources(model, config, Checkpoint.open(path))


def test_missing_unexpected_and_misshapen_are_listed(tmp_path: Path) -> None:
    path = saved(tmp_path, "llama")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.extra.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(3)

    edit(path, change)
    with pytest.raises(ArtifactError) as caught:
        sources_of(path)
    text = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in text
    assert "unexpected: model.layers.0.extra.weight" in text
    assert "model.norm.weight: [3] in the checkpoint, [64] in the model" in text


def test_missing_expert_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, "mixtral")
    keys = [k for k in Checkpoint.open(path).tensors if "experts.3" in k]
    assert keys
    edit(path, lambda tensors: [tensors.pop(k) for k in keys])
    with pytest.raises(ArtifactError, match="experts"):
        sources_of(path)


def test_keys_that_transformers_ignores_are_fine(tmp_path: Path) -> None:
    path = saved(tmp_path, "llama")
    edit(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert sources_of(path)


def test_keys_without_the_base_models_prefix_are_found(tmp_path: Path) -> None:
    """A checkpoint of the base model, as OPT's and GPT-2's on the hub."""
    path = saved(tmp_path, "gpt2")
    edit(path, lambda t: [t.update({k.removeprefix("transformer."): t.pop(k)}) for k in list(t)])
    assert_same(path)


def test_tied_weights_with_two_different_values_are_untied(tmp_path: Path) -> None:
    path = saved(tmp_path, "gemma2")
    edit(path, lambda t: t.update({"lm_head.weight": torch.randn(VOCAB, 64)}))
    assert_same(path)
    model, config = build_on_meta(path)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    parameter_sources(model, config, Checkpoint.open(path))
    assert model.get_parameter(head) is not model.get_parameter(embedding)
    edit(path, lambda t: t.update({head: t[embedding].clone()}))
    model, config = build_on_meta(path)
    parameter_sources(model, config, Checkpoint.open(path))
    assert model.get_parameter(head) is model.get_parameter(embedding)


def test_tied_weights_are_loaded_once(tmp_path: Path) -> None:
    path = saved(tmp_path, "gemma2")
    loaded = load_parameters(Checkpoint.open(path), sources_of(path))
    assert loaded["lm_head.weight"] is loaded["model.embed_tokens.weight"]


def test_dtypes(tmp_path: Path) -> None:
    path = saved(tmp_path, "llama")
    model, config = build_on_meta(path, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    checkpoint = Checkpoint.open(path)
    recipes = parameter_sources(model, config, checkpoint)
    assert load_parameters(checkpoint, recipes, ["lm_head.weight"])["lm_head.weight"].dtype == torch.bfloat16
    half = load_parameters(checkpoint, recipes, ["lm_head.weight"], dtype=torch.float16)
    assert list(half) == ["lm_head.weight"] and half["lm_head.weight"].dtype == torch.float16


def test_every_kind_of_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    a, b = torch.randn(2, 6), torch.randn(2, 6)
    save_file({"a": a, "b": b}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    ka, kb = {"key": "a"}, {"key": "b"}
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"stack": [ka, kb], "dim": 1}, torch.stack([a, b], 1)),
        ({"cat": [ka, {"narrow": kb, "dim": 0, "start": 1, "length": 1}], "dim": 0}, torch.cat([a, b[1:]])),
        ({"transpose": {"cat": [ka, kb], "dim": 1}, "dims": [0, 1]}, torch.cat([a, b], 1).T),
        ({"reshape": {"transpose": ka, "dims": [0, 1]}, "shape": [3, 4]}, a.T.reshape(3, 4)),
        ({"stack": [{"transpose": ka, "dims": [1, 0]}], "dim": 2}, a.T[..., None]),
    ]
    for recipe, wanted in cases:
        shape = list(wanted.shape)
        whole = (
            {**recipe, "dtype": "float32"} if "reshape" in recipe else {**recipe, "shape": shape, "dtype": "float32"}
        )
        assert torch.equal(load_parameters(checkpoint, {"w": whole})["w"], wanted), recipe


@pytest.mark.parametrize(
    "recipe",
    [
        {"key": "other"}, {"key": 3}, {"stack": [], "dim": 0}, {"stack": [{"key": "a"}], "dim": 9},
        {"cat": [{"key": "a"}, {"key": "b"}], "dim": 0}, {"transpose": {"key": "a"}, "dims": [0, 7]},
        {"reshape": {"key": "a"}, "shape": [5]}, {"narrow": {"key": "a"}, "dim": 0, "start": 1, "length": 2}, {}, None,
        {"run": "code"}, {"key": "a", "shape": [1]},
    ],
)  # fmt: skip
def test_broken_recipes_name_the_parameter(tmp_path: Path, recipe: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"layer\.w"):
        check_recipe("layer.w", recipe, Checkpoint.open(tmp_path).tensors)


# ---------------------------------------------------------------------------------------------- broken directories
def test_what_broken_directories_get(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", "llama", max_shard_size="50KB")
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"

    def fails(says: str) -> None:
        with pytest.raises(ArtifactError, match=says):
            Checkpoint.open(path)

    with pytest.raises(ArtifactError, match="not a directory"):
        Checkpoint.open(path / "config.json")
    Checkpoint.open(path)

    whole = (path / shards[0]).read_bytes()
    (path / shards[0]).write_bytes(whole[:-5])
    fails(f"{shards[0]} was cut off")
    (path / shards[0]).write_bytes(whole[:30])
    fails("cut off")
    (path / shards[0]).write_bytes(b"")
    fails("0 bytes")
    (path / shards[0]).write_bytes(b"\x89PNG" * 100)
    fails("not a safetensors file")
    (path / shards[0]).write_text(LFS)
    fails("git lfs pull")
    (path / shards[0]).unlink()
    fails(f"lacks the shard {shards[0]}")
    (path / shards[0]).write_bytes(whole)

    text = index.read_text()
    table = json.loads(text)
    table["weight_map"]["model.more"] = shards[0]
    index.write_text(json.dumps(table))
    fails("model.more")
    table["weight_map"]["model.more"] = "../outside.safetensors"
    index.write_text(json.dumps(table))
    fails("outside.safetensors")
    index.write_text("{")
    fails("not JSON")
    index.write_text("[" * 100_000)
    fails("nested too deep|not JSON")
    index.unlink()
    fails("no model.safetensors.index.json")
    index.write_text(text)

    config = (path / "config.json").read_text()
    (path / "config.json").write_text("[]")
    fails("not a JSON object")
    (path / "config.json").write_text(LFS)
    fails("git lfs pull")
    (path / "config.json").unlink()
    fails("config.json")
    (path / "config.json").write_text(config)
    Checkpoint.open(path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="which writes safetensors"):
        Checkpoint.open(tmp_path)


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    def header(table: Any, data: bytes = b"\0" * 8) -> Path:
        text = json.dumps(table).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        return tmp_path / "x.safetensors"

    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert read_header(header({"a": good}))[0]["a"].shape == (2,)
    for change in (
        {"shape": [3]}, {"shape": [-2]}, {"shape": "2"}, {"shape": [1 << 61, 1 << 61]}, {"dtype": "F4000"},
        {"data_offsets": [0]}, {"data_offsets": [8, 16]}, {"data_offsets": None},
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=r"x\.safetensors"):
            read_header(header({"a": {**good, **change}}))
    for table in ([], {"a": 3}, {"__metadata__": {"a": 1}}):
        with pytest.raises(ArtifactError, match=r"x\.safetensors"):
            read_header(header(table))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "nobody", "auto_map": {"AutoConfig": "x.Y"}}, "auto_map"), ({"model_type": "nobody"}, "nobody"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"), ({"model_type": "vit"}, "vit"),
        ({"hidden_size": "many"}, "config.json"),
    ],
)  # fmt: skip
def test_models_that_can_not_be_built_say_why(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = saved(tmp_path, "llama")
    config = {**json.loads((path / "config.json").read_text()), **change}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=says):
        build_on_meta(path)
