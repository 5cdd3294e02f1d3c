"""Finds windows: zeros before the sequence, and ops that look back at most as far as these."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import fake_value, is_op, shape_of, tensor_of
from kvrewrite.passes.canonical.canonicalize import add_call
from kvrewrite.passes.canonical.check import CARRIED, PADS
from kvrewrite.passes.canonical.probe import ProbeError, depends_on_data, only_shape, value_inputs
from kvrewrite.passes.canonical.regions import LONGEST, NotCarried, Padding, Region, close, layout_of, probe_region

aten = torch.ops.aten
ops = torch.ops.kvrewrite
CONV1D = (aten.conv1d.default, aten.convolution.default)


class Window:
    """A region that looks back as far as the zeros that it puts before the sequence."""

    def __init__(self, captured: Captured, region: Region):
        self.captured, self.region = captured, region
        self.body = [*region.nodes, *region.exits]

    def rewrite(self) -> None:
        """Inserts `with_past`; raises NotCarried and leaves the graph unchanged if the region is something else."""
        if len(self.region.inputs) != 1:
            raise NotCarried(f"it reads {len(self.region.inputs)} tensors with the sequence, expected one")
        x = self.region.inputs[0]
        layout = layout_of(self.captured, x)
        assert layout is not None
        if layout[0] != 0:
            raise NotCarried("the batch is not its first axis")
        found = [pad for node in self.body if (pad := self._padding(node, x, layout[1])) is not None]
        needed = value_inputs(self.region.exits)  # x[:, :1] may be there only for the shape of the zeros
        readers = [n for n in self.body if x in n.all_input_nodes and n in needed and not only_shape(n)]
        if len(found) != 1 or readers != [found[0].reader]:
            many = "several ops put" if found else "none puts"
            raise NotCarried(f"of its ops {many} zeros before the sequence for all others to read")
        pad, node, count = found[0], found[0].node, found[0].count
        limit = self.captured.max_positions or LONGEST
        length = min(2 * count + 5, limit)
        if length <= count:
            raise NotCarried(f"it looks back {count} tokens, more than the model has positions")
        before = probe_region(self.captured, self.region, 2, length)
        given = before.random(x)
        before.values[x] = given
        expected = {out: before(out) for out in self.region.exits}
        # Evaluates the nodes after it on the padded sequence, whole and from any token on, as the model will run.
        graph = self.captured.graph.graph
        with graph.inserting_before(node):
            past = add_call(self.captured.graph, ops.with_past.default, x, count, layout[1])
            taken = past
            if pad.shifts:
                taken = add_call(self.captured.graph, aten.slice.Tensor, past, layout[1], 0, -count)
        for new in {past, taken}:
            new.meta.update(nn_module_stack=node.meta.get("nn_module_stack"), **{CARRIED: ""})
        undo = node.args
        if pad.convolves:
            node.args = (past, *node.args[1:4], [0], *node.args[5:])
            self._refresh()
        padded = torch.cat([given.new_zeros(given.shape).narrow(layout[1], 0, count), given], layout[1])
        try:
            for start in (0, 1, count, length - 1):
                probe = probe_region(self.captured, self.region, 2, length - start)
                probe.values.update({n: v for n, v in before.values.items() if n.op == "get_attr"})
                window = padded.narrow(layout[1], start, count + length - start)
                probe.values[past] = window
                if not pad.convolves:
                    probe.values[node] = probe(taken)
                for out, whole in expected.items():
                    order = layout_of(self.captured, out)
                    if order is None or not close(probe(out), whole.narrow(order[1], start, length - start)):
                        raise NotCarried(f"its results depend on more than the {count} tokens before")
        except (NotCarried, ProbeError) as error:
            node.args = undo
            for new in [past] if taken is past else [taken, past]:
                graph.erase_node(new)
            self._refresh()
            raise NotCarried(str(error)) from error
        if not pad.convolves:
            node.replace_all_uses_with(taken)
            self.region.exits[:] = [taken if out is node else out for out in self.region.exits]
        self.region.nodes += [past] if taken in self.region.exits else [past, taken]

    def _padding(self, node: fx.Node, x: fx.Node, dim: int) -> Padding | None:
        """Returns the zeros that `node` puts before the sequence x, if it does."""
        rank = len(shape_of(x))
        if is_op(node, *CONV1D) and node.args[0] is x:
            stride, padding, dilation = (
                _single(node.args[i] if len(node.args) > i else d) for i, d in ((3, 1), (4, 0), (5, 1))
            )
            flipped = is_op(node, aten.convolution.default) and node.args[6]
            weight = tensor_of(node.args[1])
            if stride != 1 or not padding or flipped or weight is None or rank != 3:
                return None
            if padding != (int(weight.shape[2]) - 1) * dilation:
                return None
            return Padding(node, padding, node, convolves=True)
        if is_op(node, *PADS) and node.args[0] is x:
            widths: Any = node.args[1]
            mode = node.args[2] if len(node.args) > 2 else "constant"
            value = node.args[3] if is_op(node, aten.pad.default) and len(node.args) > 3 else mode
            at = 2 * (rank - 1 - dim)
            other = [w for i, w in enumerate(widths) if i != at]
            zero = value in (None, 0, 0.0, "constant")
            left = widths[at] if at < len(widths) else 0
            return Padding(node, left, node) if isinstance(left, int) and left > 0 and not any(other) and zero else None
        if is_op(node, aten.cat.default):
            parts: Any = node.args[0]
            at = node.args[1] if len(node.args) > 1 else 0  # type: ignore[assignment]
            if len(parts) != 2 or at % rank != dim:
                return None
            zeros, count = parts[0], shape_of(parts[0])[dim]
            if not isinstance(count, int) or any(n in self.region.inputs for n in value_inputs([zeros])):
                return None
            shifts = parts[1] is not x
            if shifts and not self._cuts(parts[1], x, dim, count):
                return None
            probe = probe_region(self.captured, self.region, 2, count + 3)
            probe.values[x] = probe.random(x)
            if depends_on_data(zeros) or bool(probe(zeros).any()):
                return None
            return Padding(node, count, parts[1] if shifts else node, shifts=shifts)
        return None

    @staticmethod
    def _cuts(node: fx.Node, x: fx.Node, dim: int, count: int) -> bool:
        """Whether `node` is x without its last `count` tokens."""
        if not is_op(node, aten.slice.Tensor) or node.args[0] is not x:
            return False
        at, start, end, step = (
            node.args[i] if len(node.args) > i else d for i, d in ((1, 0), (2, None), (3, None), (4, 1))
        )
        return bool(at == dim and start in (None, 0) and end == -count and step == 1)

    def _refresh(self) -> None:
        """Updates the shapes of the region's nodes after a change."""
        for node in self.body:
            node.meta["val"] = fake_value(node)


def _single(value: Any) -> int:
    """Returns an argument that is a number or a list of one number."""
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)
