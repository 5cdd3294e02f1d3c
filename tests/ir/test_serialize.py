"""Graphs as JSON: the round trip, devices, and what hand-edited or hostile files get."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.allow_list import ATEN, op_name, resolve_op
from kvrewrite.ir.fx import fingerprint, get_attr
from kvrewrite.ir.schema import TensorFact
from kvrewrite.ir.serialize import graph_from_dict, graph_to_dict, retarget_device
from kvrewrite.ir.value_facts import FactReader
from kvrewrite.passes.canonical.normalize import normalize
from kvrewrite.passes.lower.decode import lower_decode
from kvrewrite.passes.lower.partition import partition
from kvrewrite.passes.lower.prompt import fold, lower_prefill
from tests.support.rewritten import rewritten, traced

aten = torch.ops.aten


def tensors_of(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {n.target: get_attr(gm, n.target) for n in gm.graph.nodes if n.op == "get_attr"}


def small() -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A graph with every kind of argument."""
    root = nn.Module()
    root.register_parameter("weight", nn.Parameter(torch.arange(6.0).reshape(2, 3)))
    graph = fx.Graph()
    x = graph.placeholder("x")
    w = graph.get_attr("weight")
    y = graph.call_function(aten.linear.default, (x, w))
    size = graph.call_function(aten.sym_size.int, (y, 0))
    twice = graph.call_function(operator.mul, (size, 2))
    z = graph.call_function(aten.masked_fill.Scalar, (y, graph.call_function(aten.gt.Scalar, (y, 1.5)), -math.inf))
    ones = graph.call_function(
        aten.full.default, ([twice, 2], 1), {"dtype": torch.float32, "device": torch.device("cpu"), "pin_memory": False}
    )
    c = graph.call_function(aten.clone.default, (z,), {"memory_format": torch.contiguous_format})
    graph.output((c, [ones, None], graph.call_function(math.floor, (2.5,))))
    gm = fx.GraphModule(root, graph)
    facts = FactReader(torch.device("cpu"))
    for value, fact in ((x, TensorFact("float32", ["d0", 3])), (size, "d0"), (twice, "d1")):
        value.meta["val"] = facts(fact, "")
    return gm, tensors_of(gm)


def data() -> dict[str, Any]:
    return json.loads(json.dumps(graph_to_dict(small()[0]), allow_nan=False))


def node(d: dict[str, Any], target: str) -> dict[str, Any]:
    return next(n for n in d["nodes"] if n["target"] == target)


def test_round_trip_of_every_kind_of_argument() -> None:
    gm, tensors = small()
    d = data()
    again = graph_from_dict(d, tensors)
    assert graph_to_dict(again) == d
    x = torch.randn(4, 3)
    for a, b in zip(gm(x)[:1], again(x)[:1]):
        assert torch.equal(a, b)
    assert again(x)[1][0].shape == (8, 2)
    assert isinstance(again.weight, nn.Parameter)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "falcon"])
def test_round_trip_of_captured_models(name: str) -> None:
    captured = traced(name)
    normalize(captured)  # as the pipeline does
    d = graph_to_dict(captured.graph)
    again = graph_from_dict(json.loads(json.dumps(d, allow_nan=False)), tensors_of(captured.graph))
    assert json.dumps(graph_to_dict(again)) == json.dumps(d)
    ids = torch.randint(0, 97, (3, 9))
    inputs = (ids, torch.arange(9).expand(3, 9))[: sum(n.op == "placeholder" for n in again.graph.nodes)]
    with torch.no_grad():
        assert torch.equal(captured.graph(*inputs), again(*inputs))


@pytest.mark.parametrize(
    ("name", "policy"),
    [("llama", "locret"), ("gemma2", "streaming_llm"), ("mixtral", "h2o"), ("deepseek_v3", "snapkv")],
)
def test_what_was_read_is_compiled_like_what_was_written(name: str, policy: str) -> None:
    """Kernels are fused by shapes, and parts are compiled by the sizes that move: a file must not lose either."""
    options = {"locret": {"stabilizers": 2}, "snapkv": {"window": 6}}.get(policy, {})
    program = rewritten(name, policy, budget=16, **options).program
    gm = program.graph
    again = graph_from_dict(json.loads(json.dumps(graph_to_dict(gm), allow_nan=False)), tensors_of(gm))
    program.layout.attach(again)
    for lower in (lower_prefill, lambda graph: lower_decode(graph, False)):
        wanted, found = (partition(lower(fold(graph))) for graph in (gm, again))
        assert any(len(dims) > 1 for part in wanted.parts for dims in part.moving)
        assert [p.moving for p in found.parts] == [p.moving for p in wanted.parts]
        assert [fingerprint(p.graph.graph) for p in found.parts] == [fingerprint(p.graph.graph) for p in wanted.parts]


def test_devices_become_the_given_one() -> None:
    _, tensors = small()
    d = data()
    assert "cpu" not in json.dumps(d)
    again = graph_from_dict(d, {k: t.to("meta") for k, t in tensors.items()})
    assert next(n for n in again.graph.nodes if n.target is aten.full.default).kwargs["device"].type == "meta"
    assert again(torch.empty(4, 3, device="meta"))[1][0].is_meta
    retarget_device(again, "cpu")
    assert graph_to_dict(again) == d
    assert next(n for n in again.graph.nodes if n.target is aten.full.default).kwargs["device"].type == "cpu"


def test_retarget_gives_a_device_to_ops_that_name_none() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(aten.arange.default, (5,)))
    gm = fx.GraphModule(nn.Module(), graph)
    assert gm().device.type == "cpu"
    retarget_device(gm, "meta")
    assert gm().is_meta


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default", "aten.add_.Tensor", "aten.add.out", "aten.bernoulli.default",
        "aten.rand.default", "aten.add.nonsense", "os.system", "builtins.eval", "operator.attrgetter",
        "torch.load", "kvrewrite.nothing.default", "transformers.other.default", "aten.__class__.default",
        "aten.add.__class__", "prims.device_put.default", "aten", "higher_order.cond.default",
        "torch._sym_sqrt.__globals__",
    ],
)  # fmt: skip
def test_ops_outside_the_list_are_refused_by_name_when_reading(name: str) -> None:
    _, tensors = small()
    d = data()
    node(d, "aten.linear.default")["target"] = name
    with pytest.raises(ArtifactError, match=r"linear") as caught:
        graph_from_dict(d, tensors)
    assert name in str(caught.value)


@pytest.mark.parametrize("target", [aten.add_.Tensor, aten.bernoulli.default, print, operator.attrgetter, torch.load])
def test_ops_outside_the_list_are_refused_when_writing(target: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, x)))
    with pytest.raises(ArtifactError, match="not on the list"):
        graph_to_dict(fx.GraphModule(nn.Module(), graph))


def test_no_listed_op_writes_or_leaves_the_process() -> None:
    for base in sorted(ATEN):
        packet = getattr(aten, base)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if op._schema.is_mutable:
                with pytest.raises(ArtifactError):
                    resolve_op(str(op))
            else:
                assert resolve_op(op_name(op)) is op
    suspicious = ("file", "save", "load", "rand", "print", "bernoulli", "dropout", "set_", "resize")
    assert not [b for b in ATEN if any(s in b for s in suspicious)]


def broken(change: str) -> dict[str, Any]:
    d = data()
    linear = node(d, "aten.linear.default")
    deep: Any = 1
    for _ in range(50):
        deep = [deep]
    edits: dict[str, Any] = {
        "undefined": lambda: linear.update(args=[{"node": "later"}, {"node": "weight"}]),
        "forward": lambda: linear.update(args=[{"node": "clone_default"}, {"node": "weight"}]),
        "attribute": lambda: node(d, "weight").update(target="other"),
        "path code": lambda: node(d, "weight").update(target='weight"); import os; ("'),
        "name code": lambda: linear.update(name="a = 1; import os"),
        "keyword name": lambda: linear.update(name="class"),
        "builtin name": lambda: linear.update(name="print"),
        "kwarg code": lambda: linear.update(kwargs={"bias=print(1)": None}),
        "kwarg unknown": lambda: linear.update(kwargs={"nothing": None}),
        "input code": lambda: node(d, "x").update(target="x, y=print(1)"),
        "too many": lambda: linear["args"].extend([None] * 9),
        "too few": lambda: linear.update(args=[{"node": "x"}]),
        "string for tensor": lambda: linear.update(args=["x", {"node": "weight"}]),
        "args": lambda: linear.update(args="x"),
        "deep": lambda: linear.update(args=[deep, {"node": "weight"}]),
        "huge int": lambda: node(d, "operator.mul").update(args=[1 << 70, 2]),
        "huge list": lambda: linear.update(args=[[0] * 100_000, {"node": "weight"}]),
        "huge string": lambda: linear.update(args=["x" * 100_000, {"node": "weight"}]),
        "tag": lambda: linear.update(args=[{"eval": "1"}, {"node": "weight"}]),
        "device": lambda: node(d, "aten.full.default")["kwargs"].update(device={"device": "cuda:0"}),
        "dtype": lambda: node(d, "aten.full.default")["kwargs"].update(dtype={"dtype": "load"}),
        "twice": lambda: d["nodes"].insert(3, copy.deepcopy(linear)),
        "call_module": lambda: linear.update(op="call_module"),
        "unknown key": lambda: linear.update(type="int"),
        "not an object": lambda: d["nodes"].insert(1, "x"),
        "meta": lambda: linear.update(meta={"val": 1}),
        "facts": lambda: linear.update(val={"dtype": "float32", "strides": [1]}),
        "size": lambda: linear.update(val={"dtype": "float32", "shape": ["d0*2", 3]}),
        "huge shape": lambda: linear.update(val={"dtype": "float32", "shape": [1 << 40, 1 << 40]}),
    }
    edits[change]()
    return d


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("undefined", "'linear_default'.*'later'.*not defined"),
        ("forward", "'linear_default'.*'clone_default'.*not defined"), ("attribute", "'weight'.*'other'"),
        ("path code", "'weight'.*not the dotted name"), ("name code", "node 2"), ("keyword name", "'class'.*reserved"),
        ("builtin name", "'print'.*reserved"), ("kwarg code", "'linear_default'.*kwargs.*matching"),
        ("kwarg unknown", "'linear_default'.*no further argument"), ("input code", "'x'.*input"),
        ("too many", "takes 3"), ("too few", "lacks weight"),
        ("string for tensor", "'linear_default'.*Tensor.*str"), ("args", "'linear_default'.*args.*array"),
        ("deep", r"'linear_default'.*args\[0\].*got `array`"), ("huge int", "'mul'.*args.*2\\*\\*63|<= 9223372036854775807"),
        ("huge list", "'linear_default'.*length <= 65536"),
        ("huge string", "'linear_default'.*length <= 4096"), ("tag", "'linear_default'.*unknown field `eval`"),
        ("device", "'full_default'.*Invalid enum value 'cuda:0'"), ("dtype", "'full_default'.*can't be read"),
        ("twice", "'linear_default'.*twice"), ("call_module", "'linear_default'.*call_module"),
        ("unknown key", "'linear_default'.*type"), ("not an object", "node 1"), ("meta", "'linear_default'.*meta"),
        ("facts", "'linear_default'.*val.*strides"), ("size", "'linear_default'.*val.shape.*matching"),
        ("huge shape", "'linear_default'.*no tensor has the shape"),
    ],
)  # fmt: skip
def test_broken_files_name_the_node_and_the_reason(change: str, says: str) -> None:
    _, tensors = small()
    with pytest.raises(ArtifactError, match=says):
        graph_from_dict(broken(change), tensors)


@pytest.mark.parametrize(
    "bad", [None, [], {}, {"nodes": 3}, {"nodes": []}, {"format": 1, "nodes": []}, {"format": 99, "nodes": []}]
)
def test_not_a_graph(bad: Any) -> None:
    with pytest.raises(ArtifactError):
        graph_from_dict(bad, {})


def test_output_must_be_there_and_last() -> None:
    _, tensors = small()
    d = data()
    cut = {**d, "nodes": d["nodes"][:-1]}
    with pytest.raises(ArtifactError, match="no output"):
        graph_from_dict(cut, tensors)
    d["nodes"].append(dict(d["nodes"][0], name="more"))
    with pytest.raises(ArtifactError, match="after the output"):
        graph_from_dict(d, tensors)


@pytest.mark.parametrize("index", [*range(3), *(pytest.param(i, marks=pytest.mark.thorough) for i in range(3, 9))])
def test_random_damage_never_gets_past_an_artifact_error(index: int) -> None:
    """Any value anywhere replaced by something else loads the same way or raises ArtifactError, nothing else."""
    _, tensors = small()
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    d = data()
    walk(d)
    values: list[Any] = [None, -1, 1.5, "x", [], {}, [[]], {"node": "x"}, True]
    for place in range(len(places)):
        d = data()
        places = []
        walk(d)
        container, key = places[place]
        container[key] = values[index]
        with contextlib.suppress(ArtifactError):
            assert isinstance(graph_from_dict(d, tensors), fx.GraphModule)
