"""Puts a rewritten graph on the devices of its parameters: layers on different devices, as accelerate dispatches them.

Requires a graph after `insert_cache` whose cache classes have devices, and the device of each parameter. Ensures that
every op finds its tensors on one device: each parameter's own, and that of the layer's cache for ops that touch one.
What crosses is copied once, before its first reader there; so transfers stand where the devices of the parameters
change, and the logits come back to the device of the inputs. Caches and parameters are never copied.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import SIZE_OPS, is_size, mutates, output_node
from kvrewrite.ir.layout import CacheLayout, Devices, spec_of
from kvrewrite.ir.serialize import put_on

aten = torch.ops.aten
ops = torch.ops.kvrewrite
DEVICE = "kvrewrite_device"  # in a node's meta: where it runs (`execution.Staged`)


def site_devices(gm: fx.GraphModule, devices: Mapping[str, str]) -> dict[int, str]:
    """The device of each site of a canonical graph: that of the parameters read last before its attention."""
    found: dict[int, str] = {}
    for node, device in _stages(gm, devices).items():
        if node.target is ops.attention.default:
            found[node.meta["kvrewrite_site"].layer] = device
    return found


def _stages(gm: fx.GraphModule, devices: Mapping[str, str]) -> dict[fx.Node, str]:
    """For every call the device of the parameters that it reads, or that calls before it read."""
    now = _first(gm, devices)
    found = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        own = {devices[n.target] for n in node.all_input_nodes if n.op == "get_attr" and n.target in devices}
        if len(own) > 1:
            raise UnsupportedModelError(
                f"{node.name} ({node.target}) reads parameters of {' and '.join(sorted(own))}; give a device_map that keeps the "
                "parts of a layer together"
            )
        now = own.pop() if own else now
        found[node] = now
    return found


def _first(gm: fx.GraphModule, devices: Mapping[str, str]) -> str:
    """Where the inputs lie: on the device of the first parameter that is read."""
    for node in gm.graph.nodes:
        for source in node.all_input_nodes if node.op == "call_function" else ():
            if source.op == "get_attr" and source.target in devices:
                return devices[source.target]
    raise UnsupportedModelError("the graph reads no parameters, so there is no device to put it on")


def place(gm: fx.GraphModule, devices: Mapping[str, str], layout: CacheLayout) -> None:
    """Inserts the transfers, in place, and says in the layout where inputs, states, constants and policy weights lie.

    devices: parameter -> device, for those of the original model. Nodes get their device as `meta[DEVICE]`.
    """
    home = _first(gm, devices)
    stages, numbers = _stages(gm, devices), _numbers(gm)
    where: dict[fx.Node, str] = {}  # inputs and attributes that have a place
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            spec = spec_of(node)
            assert spec is not None
            if spec.cls is not None:
                where[node] = layout.classes[spec.cls].device or home
            elif spec.kind != "state":
                where[node] = home
        elif node.op == "get_attr" and node.target in devices:
            where[node] = devices[node.target]
    states: dict[str, str] = {}
    attributes: dict[str, str] = {}
    moved: dict[tuple[fx.Node, str], fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node in numbers:
            continue
        if node.target is operator.getitem:  # of several results, which are where they were made
            device = where[node.args[0]]  # type: ignore[index]
        else:
            device = _of_cache(node, where) or stages[node]
        written = _written(node)
        for source in node.all_input_nodes:
            if source in numbers:
                continue
            if source not in where:
                # States, tables and policy weights lie where they are read first.
                where[source] = device
                (states if source.op == "placeholder" else attributes)[str(source.target)] = device
            if where[source] == device:
                continue
            if source in written:
                raise UnsupportedModelError(
                    f"{node.name} ({node.target}) on {device} writes to {source.name}, which lies on {where[source]}"
                )
            if (source, device) not in moved:
                with gm.graph.inserting_before(node):
                    copy = gm.graph.call_function(aten._to_copy.default, (source,), {"device": torch.device(device)})
                copy.meta.update({"val": source.meta.get("val"), DEVICE: device})
                moved[source, device] = copy
                where[copy] = device
            node.replace_input_with(source, moved[source, device])
        where[node] = node.meta[DEVICE] = device
        put_on(node, torch.device(device))
    output = output_node(gm)
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    if where[logits] != home:
        with gm.graph.inserting_before(output):
            back = gm.graph.call_function(aten._to_copy.default, (logits,), {"device": torch.device(home)})
        back.meta.update({"val": logits.meta.get("val"), DEVICE: home})
        output.replace_input_with(logits, back)
    for state in layout.states:
        state.device = states.get(state.input, home)
    layout.devices = Devices(home, attributes)
    gm.graph.lint()
    gm.recompile()


def _of_cache(node: fx.Node, where: Mapping[fx.Node, str]) -> str | None:
    """The device of the cache that an op reads or writes."""
    for source in node.all_input_nodes:
        spec = spec_of(source)
        if spec is not None and spec.cls is not None:
            return where[source]
    return None


def _written(node: fx.Node) -> set[fx.Node]:
    """The arguments that an op writes to."""
    if not mutates(node):
        return set()
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in arguments), node.args)) | node.kwargs
    return {
        value
        for a in arguments
        if a.alias_info is not None and a.alias_info.is_write and isinstance(value := given.get(a.name), fx.Node)
    }


def _numbers(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes that compute sizes: from tensors on any device, and on none themselves."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        arithmetic = not isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes
        if node.target in SIZE_OPS or is_size(node) or (arithmetic and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found
