"""Proves a rewritten program as a whole: in uneven chunks, token by token and padded, beside the captured graph.

`passes/canonical/validate.py` proves the parts. This runs the program through the runtime that users run, caches and all, with
the same stand-in weights, and compares its logits with those of the graph that was captured from the unmodified model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import KVRewriteError, UnsupportedModelError
from kvrewrite.ir.evaluate import EvaluationError, Evaluator, ThinProduct, difference, widen
from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.ir.program import Program
from kvrewrite.passes.canonical.both_graphs import FARTHEST

TOKENS = 24
PIECES = (7, 5, 1, 1, 4)  # tokens of the first chunks; the rest is one more
STEPS = 9  # tokens that are run one by one
PADDING = 5  # tokens by which one row is shorter than the other


@dataclass
class Reference:
    """Token ids (2, T) and the logits (2, T, vocabulary) that the captured graph gives for them, in float64."""

    ids: Tensor
    logits: Tensor


def reference_logits(captured: Captured) -> Reference:
    """Requires a canonical graph that was validated. Call it before anything is inserted: that drops what only masks read."""
    length = min(captured.trace_length if captured.unrolled else TOKENS, captured.max_positions or FARTHEST)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(captured.vocab_size, (2, length), generator=generator)
    run = Evaluator(captured.before.graph, captured.graph, captured.stand_ins)
    # Frequencies that depend on the length: the module holds those of whatever it has run last.
    tables = {t.attribute: t.short if length <= t.threshold else t.long for t in captured.rotary_tables}
    given = {n: tables[str(n.target)].double() for n in run.nodes if n.op == "get_attr" and n.target in tables}
    positions = torch.arange(length).expand_as(ids)
    return Reference(ids, _result(run, {"input_ids": ids, "position_ids": positions}, given))


def _result(run: Evaluator, inputs: Mapping[str, Any], given: Mapping[fx.Node, Any] | None = None) -> Tensor:
    found = run.result(inputs, given)
    logits: Tensor = found[0] if isinstance(found, (tuple, list)) else found
    return logits


def prove_whole(program: Program, captured: Captured, reference: Reference) -> list[int]:
    """Runs the program without evictions and compares; returns the pieces that texts were run in.

    Raises UnsupportedModelError where the logits differ.
    """
    from kvrewrite.policies.full import Full

    model = rehearsed(program, captured.stand_ins)
    kept = model.policy.quantize_residual if model.policy.quantize != "none" else None
    model.policy = Full(chunk=None, positions=model.policy.positions)
    # Of a quantized cache the newest slots are exact, and only those.
    length = reference.ids.shape[1] if kept is None else min(reference.ids.shape[1], kept)
    if length < 1:
        return []
    ids, want = reference.ids[:, :length], reference.logits[:, :length]
    first = [n for i, n in enumerate(PIECES) if sum(PIECES[: i + 1]) <= length]
    pieces = [*first, length - sum(first)] if sum(first) < length else first
    try:
        _compare(_in_pieces(model, ids, pieces), want, f"in chunks of {', '.join(map(str, pieces))} tokens")
        steps = min(STEPS, length)
        _compare(_in_pieces(model, ids[:, :steps], [1] * steps), want[:, :steps], "token by token")
        if length > PADDING:
            _padded(model, ids, want)
    except EvaluationError as error:
        raise UnsupportedModelError(f"the rewritten model can't be run: {error}") from error
    except KVRewriteError:
        raise
    except (RuntimeError, IndexError) as error:
        raise UnsupportedModelError(f"the rewritten model can't be run in chunks: {error}") from error
    return [*dict.fromkeys(pieces)]


def _in_pieces(model: Any, ids: Tensor, pieces: list[int]) -> Tensor:
    cache, at, out = model.new_cache(ids.shape[0], max_length=ids.shape[1]), 0, []
    for n in pieces:
        out.append(model(ids[:, at : at + n], past_key_values=cache).logits)
        at += n
    return torch.cat(out, 1)


def _padded(model: Any, ids: Tensor, want: Tensor) -> None:
    """A row that is padded on the left beside one that is not, in a chunk and single tokens."""
    length = ids.shape[1]
    row, mask = ids.clone(), torch.ones_like(ids)
    row[1, :PADDING], row[1, PADDING:], mask[1, :PADDING] = 0, ids[1, :-PADDING], 0
    cache, out = model.new_cache(2, max_length=length), []
    for start, end in ((0, length - 1), (length - 1, length)):
        out.append(model(row[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    got = torch.cat(out, 1)
    _compare(got[0], want[0], "beside a padded row")
    _compare(got[1, PADDING:], want[1, :-PADDING], "in a padded row")


def _compare(got: Tensor, want: Tensor, how: str) -> None:
    if problem := difference(got, want):
        raise UnsupportedModelError(
            f"run {how}, the rewritten model does not give the model's logits: {problem}. Something in it depends on more than "
            "attention over cached keys and values"
        )


# ------------------------------------------------------------------------------------------------ the model in float64
class _Run:
    """What the runtime calls instead of the program's graph."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator

    def __call__(self, inputs: dict[str, Tensor], logits: bool) -> Tensor:
        return _result(self.evaluator, inputs)


class _RunRotary:
    """What the runtime calls instead of a graph of cos and sin."""

    def __init__(self, gm: fx.GraphModule):
        self.names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
        self.evaluator = Evaluator(gm.graph, gm, _as_they_are)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.evaluator.result(dict(zip(self.names, inputs, strict=True)))


def _as_they_are(name: str, value: Any) -> Any:
    return value.to("cpu", widen(value.dtype)) if isinstance(value, Tensor) else value


def rehearsed(program: Program, stand_ins: Any, evaluator: Evaluator | None = None) -> Any:
    """The program as a model on the CPU in float64, with stand-in weights that are never multiplied out. evaluator: what
    runs its graph."""
    from kvrewrite.runtime.executor import Executor
    from kvrewrite.runtime.foreign_config import foreign_config
    from kvrewrite.runtime.model import RewrittenModel

    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph.graph, {}))
    root = fx.GraphModule(nn.Module(), fx.Graph())
    root.graph = graph
    names = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    names |= {name for name, _ in program.graph.named_buffers()}
    for name in sorted(names):
        value = get_attr(program.graph, name)
        if isinstance(value, Tensor):
            made = stand_ins(name, value)
            # Thin products are what the evaluator takes; nothing else reads these.
            made = torch.empty(0, dtype=torch.float64) if isinstance(made, ThinProduct) else made
            set_attr(root, name, nn.Parameter(made, requires_grad=False) if made.is_floating_point() else made)
    root.register_parameter("kvrewrite_device", nn.Parameter(torch.empty(0, dtype=torch.float64), requires_grad=False))
    # All of it is on the CPU, wherever the model's layers lie.
    states = [
        dataclasses.replace(state, dtype=str(widen(getattr(torch, state.dtype))).removeprefix("torch."), device=None)
        for state in program.layout.states
    ]
    classes = [dataclasses.replace(spec, device=None) for spec in program.layout.classes]
    layout = dataclasses.replace(program.layout, states=states, classes=classes, devices=None)
    copied = dataclasses.replace(program, graph=root, layout=layout, dtype="float64", proof=None)
    model = RewrittenModel(copied, foreign_config(program, "rehearsal"))
    model.executor = Executor(_Run(evaluator or Evaluator(program.graph.graph, program.graph, stand_ins)))
    model._rotary_graphs = [_RunRotary(gm) for gm in model._rotary_graphs]
    return model
