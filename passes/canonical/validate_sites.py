"""Are the sites what they were recognized as? Each canonical op is run beside the subgraph that it replaced."""

from __future__ import annotations

import math

import torch
from torch import fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.evaluate import TOLERANCE, EvaluationError, difference
from kvrewrite.ir.fx import ancestors, arg, get_attr
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.both_graphs import LENGTHS, BothGraphs, layer_of
from kvrewrite.passes.canonical.canonicalize import REPLACED, RESULT
from kvrewrite.passes.canonical.probe import subgraph_text
from kvrewrite.passes.canonical.proof import Proof

LONGEST = 4096  # longest text that a site is run on
MOST_SCORES = 1 << 24  # most elements of a site's scores
GAINS = (1.5, 4.0)  # of queries and keys: scores are about the square of this


def compare_sites(run: BothGraphs, proof: Proof) -> None:
    """Compares each site with what it replaced; sites with the same subgraph are compared once."""
    known: set[str] = set()
    together: dict[str, list[fx.Node]] = {}
    for source in run.sources:
        if REPLACED in source.meta:  # captured as the canonical op itself
            together.setdefault(source.meta[REPLACED], []).append(source)
    for name, sources in together.items():
        source = sources[0]
        replaced, result = run.snapshot.nodes[name], source.meta[RESULT]
        starts = list(dict.fromkeys(n for s in sources for n in run.starts[s]))
        proof.sites += len(sources)
        names = [n.name for n in starts]
        key = "\n".join(subgraph_text(run.captured, [n], names, parameters=False) for n in (replaced, result))
        if key in known:
            continue
        known.add(key)
        for length in _site_lengths(run, [s.meta["kvrewrite_site"] for s in sources]):
            _run_site(run, source, replaced, result, starts, length)
            if length not in proof.lengths:
                proof.lengths.append(length)
    proof.distinct = len(known)
    proof.lengths.sort()


def _site_lengths(run: BothGraphs, sites: list[AttentionSite]) -> list[int]:
    most = min(run.limit, LONGEST, math.isqrt(MOST_SCORES // sum(s.heads for s in sites)))
    sizes = {size for s in sites for size in (s.window, s.chunk) if size}
    around = [k * size + d for size in sizes for k in (1, 2) for d in (-1, 0, 1)]
    wanted = {*LENGTHS, *around, most}
    return sorted(n for n in wanted if 1 <= n <= most)


def _run_site(
    run: BothGraphs, source: fx.Node, replaced: fx.Node, result: fx.Node, starts: list[fx.Node], length: int
) -> None:
    rows = 2 if length <= max(LENGTHS) else 1
    for gain in GAINS if rows == 2 else GAINS[:1]:
        values = {n: run.random(n, rows, length, gain) for n in starts}
        inputs = run.inputs(run.ids(rows, length))
        try:
            want = run.before(inputs, [replaced], {run.snapshot.nodes[n.name]: v for n, v in values.items()})
            got = run.after(inputs, [result], values)
        except EvaluationError as error:
            raise UnsupportedModelError(
                f"{layer_of(source)}: its attention fails on a text of {length} tokens, which a cache needs: {error}"
            ) from error
        # ALiBi's slopes are kept in float32.
        tolerance = TOLERANCE + 1e-7 * length * (arg(source, "alibi") is not None)
        problem = difference(got[result], want[replaced], tolerance)
        if problem:
            raise UnsupportedModelError(
                f"{layer_of(source)}: its attention is not {_described(source)}, as which it was recognized: on a text of "
                f"{length} tokens {problem}{_weights_between(run, replaced, starts)}"
            )


def _weights_between(run: BothGraphs, replaced: fx.Node, starts: list[fx.Node]) -> str:
    """Names the parameters between a site's inputs and output: one that was folded into a number explains a
    mismatch."""
    names = {n.name for n in starts}
    between = ancestors([replaced], stop=lambda n: n.name in names)
    learned = sorted(
        str(n.target)
        for n in between
        if n.op == "get_attr" and isinstance(get_attr(run.captured.graph, str(n.target)), torch.nn.Parameter)
    )
    if not learned:
        return ""
    return f" (it depends on {', '.join(learned)}, which can't be folded into a number: weights may change)"


def _described(source: fx.Node) -> str:
    site: AttentionSite = source.meta["kvrewrite_site"]
    mask = f"a window of {site.window}" if site.window else f"chunks of {site.chunk}" if site.chunk else "a causal mask"
    more = [f"a scale of {site.scale:.6g}"]
    more += [f"a softcap of {site.softcap:g}"] if site.softcap else []
    more += ["ALiBi"] if site.alibi else []
    more += ["sinks"] if site.sinks else []
    return f"softmax attention with {mask} and {', '.join(more)}"
