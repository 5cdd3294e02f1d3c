"""Validates the rewrite: runs the rewritten graph beside the captured one; both must give the same.

Finding an attention only says what the compiler believes; this pass tests it. It asks three questions about the
canonical graph and answers each by running both graphs in float64 on random inputs (`kvrewrite/ir/evaluate.py`):

- **sites**: does the canonical op give what the captured subgraph gives, from queries, keys and values to the attention's
  output, at several lengths and with scores large enough to show a mask or a scale?
- **positions**: with the sites cut, does the canonical graph give what the captured one gives?
- **locality**: with the sites and the carried states cut, is the rest a function of one token and its position? The same
  tokens are run alone and in texts of several lengths, in several rows and with other neighbours.

`validate_sites.py` answers the first, `validate_rest.py` the others, both with the graphs of `both_graphs.py`.

A module that computes something else is refused with the layer, whatever its ops.
"""

from __future__ import annotations

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.evaluate import StandIns
from kvrewrite.passes.canonical.both_graphs import BothGraphs, Snapshot
from kvrewrite.passes.canonical.proof import Proof
from kvrewrite.passes.canonical.validate_rest import check_locality, compare_positions
from kvrewrite.passes.canonical.validate_sites import compare_sites


def validate(captured: Captured, before: Snapshot, stand_ins: StandIns, check: str) -> Proof:
    """Requires a canonical graph with lifted positions, and the normalized graph that it was made from.

    Ensures that the rewritten graph computes what was captured; raises UnsupportedModelError with layer and reason.
    """
    run = BothGraphs(captured, before, stand_ins)
    proof = Proof(check, masks=min(captured.compared, captured.max_positions or captured.compared))
    compare_sites(run, proof)
    if check == "full":
        compare_positions(run, proof)
        check_locality(run, proof)
    return proof
