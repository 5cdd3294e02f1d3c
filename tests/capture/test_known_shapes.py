"""What is remembered of ops while a model is traced: the graph is the one that is traced without it."""

import contextlib

import pytest
import torch
from torch import nn

from kvrewrite.capture import export
from kvrewrite.capture.frontend import capture
from kvrewrite.capture.known_shapes import _base, known_shapes
from tests.support.rewritten import build

aten = torch.ops.aten


def account(model):
    """Each node of the captured graph, with its value's metadata and which nodes' memory it shares."""
    nodes = list(capture(model).graph.graph.nodes)
    names = {node: f"n{i}" for i, node in enumerate(nodes)}
    storages, lines = {}, []
    for node in nodes:
        value = node.meta.get("val")
        about = value
        if isinstance(value, torch.Tensor):
            memory = storages.setdefault(value.untyped_storage()._cdata, names[node])
            about = (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device, memory)
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
        target = "" if node.op == "placeholder" else node.target
        lines.append(f"{node.op} {target} {arguments} {about}")
    return lines


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_graph_is_the_same(family, monkeypatch):
    """Ops, sizes, strides, dtypes and shared memory."""
    model = build(family)
    quick = account(model)
    monkeypatch.setattr(export, "known_shapes", contextlib.nullcontext)
    assert quick == account(model)


def test_ops_of_a_second_layer_are_not_computed_again(monkeypatch):
    """Only ops that one layer has not asked for are computed."""
    computed = []
    original = torch._subclasses.FakeTensorMode._dispatch_impl

    def counted(mode, op, *rest):
        computed.append(op)
        return original(mode, op, *rest)

    def of_layers(count):
        computed.clear()
        monkeypatch.setattr(torch._subclasses.FakeTensorMode, "_dispatch_impl", counted)
        capture(nn.Sequential(nn.Embedding(19, 8), *(_Layer() for _ in range(count)), nn.Linear(8, 19)))
        return sum(op in (aten.mul.Tensor, aten.sigmoid.default, aten.rsqrt.default) for op in computed)

    of_layers(1)  # torch traces some of its own decompositions once in a process
    assert of_layers(2) == of_layers(6) > 0


class _Layer(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt((x * torch.sigmoid(x)).square().mean(-1, keepdim=True) + 1)


@pytest.mark.parametrize(
    "op",
    [
        aten.to.dtype,
        aten.reshape.default,
        aten.add_.Tensor,
        aten.rand_like.default,
        aten.nonzero.default,
        aten.split.Tensor,
    ],
)
def test_ops_whose_result_is_not_in_the_metadata_are_not_remembered(op):
    """Those that may return their argument, write, are random, depend on data or have several results."""
    assert _base(op) is None


def test_views_say_whose_memory_they_share():
    """The number of their argument; -1 for results that are new."""
    assert _base(aten.transpose.int) == 0 and _base(aten.mul.Tensor) == -1


def test_torchs_own_method_is_put_back():
    """Also after an error."""
    original = torch._subclasses.FakeTensorMode._dispatch_impl
    with pytest.raises(ValueError, match="stop"), known_shapes():
        raise ValueError("stop")
    assert torch._subclasses.FakeTensorMode._dispatch_impl is original
