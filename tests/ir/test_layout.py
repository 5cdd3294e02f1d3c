"""The inputs of rewritten graphs: every placeholder has one spec, and what specs say is true."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from kvrewrite.errors import ArtifactError
from kvrewrite.ir import schema
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.layout import CacheLayout, InputSpec, spec_of
from kvrewrite.ir.layout_file import layout_to_dict, read_layout
from kvrewrite.ir.serialize import attach, graph_from_dict, graph_to_dict
from kvrewrite.runtime.executor import Executor
from kvrewrite.runtime.model import RewrittenModel
from tests.support.rewritten import rewritten

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "h2o", {}), ("llama", "full", {}), ("llama", "nacl", {}), ("llama", "sirllm", {}),
    ("llama", "h2o", {"quantize": "int8", "budget": 192}), ("llama", "attention_gate", {}),
    ("llama", "expected_attention", {}), ("llama", "h2o", {"merge": True}), ("llama", "snapkv", {"head_budgets": "adakv"}),
    ("qwen3", "locret", {}), ("gemma2", "streaming_llm", {}), ("gpt2", "tova", {}), ("phi3", "streaming_llm", {}),
    ("phi3", "snapkv", {}), ("deepseek_v3", "tova", {"mla": "latent"}), ("lfm2", "h2o", {}),
]  # fmt: skip
IDS = [" ".join([family, policy, *map(str, options.values())]) for family, policy, options in CASES]
cases = pytest.mark.parametrize(("family", "policy", "options"), CASES, ids=IDS)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def written(gm: fx.GraphModule) -> set[str]:
    """The inputs that ops write to, by the ops' schemas."""
    found = set()
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments = node.target._schema.arguments
        given = dict(zip((a.name for a in arguments), node.args)) | node.kwargs
        for argument in arguments:
            source = given.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write or source is None:
                continue
            assert isinstance(source, fx.Node)
            source = source.args[0] if source.target is torch.ops.aten.select.int else source
            assert isinstance(source, fx.Node) and source.op == "placeholder"
            found.add(str(source.target))
    return found


@cases
def test_every_input_has_a_spec_and_a_value_of_its_shape(family: str, policy: str, options: dict[str, Any]) -> None:
    program = rewritten(family, policy, **options).program
    nodes, specs = placeholders(program.graph), program.layout.inputs
    assert [n.target for n in nodes] == [s.name for s in specs] == program.layout.input_names
    assert len({s.name for s in specs}) == len(specs)
    sizes: dict[str, Any] = {}
    for node, spec in zip(nodes, specs, strict=True):
        value = node.meta["val"]
        assert spec_of(node) is spec
        assert isinstance(value, Tensor) and value.dtype == spec.dtype and value.dim() == len(spec.shape)
        for size, wanted in zip(value.shape, spec.shape):
            if isinstance(wanted, int):
                assert size == wanted, spec.name
            else:  # a letter is one symbol wherever it stands, and no other letter's
                assert isinstance(size, torch.SymInt)
                assert str(sizes.setdefault(wanted, size)) == str(size), (spec.name, wanted)
    assert len({str(s) for s in sizes.values()}) == len(sizes)
    classes = program.layout.classes
    assert {s.cls for s in specs if s.kind == "pool"} == set(range(len(classes)))
    assert all(s.shape[0] == len(classes[s.cls].layers) for s in specs if s.kind == "layers")  # type: ignore[index]


@cases
def test_written_is_what_the_graph_writes_to(family: str, policy: str, options: dict[str, Any]) -> None:
    program = rewritten(family, policy, **options).program
    assert written(program.graph) == {s.name for s in program.layout.inputs if s.written}


@cases
def test_the_runtime_gives_what_the_specs_say(
    family: str, policy: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prompt of several segments and in single tokens, with a letter being one size in each call."""
    model = rewritten(family, policy, **options)
    calls: list[dict[str, Tensor]] = []

    def record(inputs: dict[str, Tensor], logits: bool) -> Tensor:
        calls.append(inputs)
        found: Tensor = model.graph_module(*(inputs[name] for name in model.program.layout.input_names))
        return found

    monkeypatch.setattr(model, "executor", Executor(record))
    cache = model.new_cache(2)
    ids = torch.arange(2 * 41).reshape(2, 41) % 97
    for part in (ids[:, :40], ids[:, 40:]):
        model(part, past_key_values=cache)
    assert len(calls) > 1
    for inputs in calls:
        sizes: dict[str, int] = {}
        for spec in model.program.layout.inputs:
            value = inputs[spec.name]
            assert value.dtype == spec.dtype and value.dim() == len(spec.shape), spec.name
            for size, wanted in zip(value.shape, spec.shape):
                assert size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size)), spec


def as_read(model: RewrittenModel, data: dict[str, Any]) -> CacheLayout:
    """The layout that is read from a file's data, and the same for a graph that was written and read."""
    schema.check(data, schema.Layout, "the layout")
    program = model.program
    read = {str(n.target) for n in program.graph.graph.find_nodes(op="get_attr")}
    again = graph_from_dict(graph_to_dict(program.graph), {name: get_attr(program.graph, name) for name in read})
    for name in set(program.constants) - read:
        attach(again, name, get_attr(program.graph, name))
    layout = read_layout(data, again, model.dtype, torch.device("cpu"), "x")
    assert [spec_of(n) for n in placeholders(again)] == layout.inputs
    return layout


@cases
def test_layouts_are_read_as_they_were_written(family: str, policy: str, options: dict[str, Any]) -> None:
    """The dictionary is that of format 3, which names the inputs."""
    model = rewritten(family, policy, **options)
    data = json.loads(json.dumps(layout_to_dict(model.program.layout, model.program.graph), allow_nan=False))
    assert list(data) == [
        "classes", "contiguous", "rotary", "length_tables", "states", "row_inputs", "rewrites_slots", "ragged", "quantize",
        "inputs",
    ]  # fmt: skip
    layout = as_read(model, data)
    wanted = copy.copy(model.program.layout)
    for entry, other in zip(layout.rotary, wanted.rotary, strict=True):
        assert (entry.dim, entry.dtype, entry.length_tables) == (other.dim, other.dtype, other.length_tables)
        assert entry.constants == other.constants
    layout.rotary = wanted.rotary = []
    assert layout == wanted


def test_older_states_are_read() -> None:
    """Directories from before states had `slots` or `carried`, and classes had devices."""
    model = rewritten("llama", "sirllm")
    data = layout_to_dict(model.program.layout, model.program.graph)
    for state in data["states"]:
        for name in ("fill", "slots", "carried"):
            del state[name]
    assert as_read(model, data).states == model.program.layout.states


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["inputs"].append("k_pages_9"), "not those of the manifest"),
        (lambda d: d["inputs"].reverse(), "not those of the manifest"),
        (lambda d: d["classes"].clear(), "no input 'k_"),
        (lambda d: d.update(contiguous=False), "no input"),
        (lambda d: d["rotary"].clear(), "no input 'rotary_"),
        (lambda d: d["rotary"][0].update(length_tables=["length_table_0"]), "no length table length_table_0"),
        (lambda d: d["rotary"][0]["constants"].append("missing"), "no constant missing"),
        (lambda d: d["length_tables"].append({"input": "l", "index": 7, "threshold": 1, "in_graph": True}), "no constant"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_the_graph_are_refused(change: Any, says: str) -> None:
    model = rewritten("llama", "streaming_llm")
    data = copy.deepcopy(layout_to_dict(model.program.layout, model.program.graph))
    change(data)
    with pytest.raises(ArtifactError, match=says):
        as_read(model, data)


def test_what_moves() -> None:
    """Rows and tokens move between calls; within the single tokens of a batch, the pages of its cache do."""
    specs = {s.name: s for s in rewritten("llama", "streaming_llm").program.layout.inputs}

    def moving(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        spec: InputSpec = specs[name]
        return spec.moving, spec.moving_while_decoding

    assert moving("input_ids") == ((0, 1), ()) and moving("valid") == ((0,), ())
    assert moving("k_pages_0") == ((0,), (0,)) and moving("table_0") == ((1, 3), (3,))
    assert moving("lens_0") == ((1,), ()) and moving("span") == ((1,), (1,)) and moving("rotary_cos_0") == ((0,), (0,))
