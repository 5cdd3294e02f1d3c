"""Prints what was measured of each model family: `python -m tests.families`.

The unmodified model's logits against those of its rewrite with nothing evicted: batch 2, uneven chunks of 7, 5, 1, 1,
10 and 9 tokens through one cache, then token by token; tiny models with random weights in fp32.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import kvrewrite
from kvrewrite.errors import KVRewriteError
from kvrewrite.site import AttentionSite
from kvrewrite.verify import pieces, run_in_pieces, without_eviction
from tests import foreign, zoo

LENGTH, IN_CHUNKS = 40, 33


@dataclass
class Measured:
    """One family: its sites and the largest logit difference, or why it is refused."""

    name: str
    sites: list[AttentionSite]
    difference: float
    largest: float
    refused: str = ""


def families() -> list[str]:
    """Every model that can be made."""
    return [*zoo.FAMILIES, *zoo.WALKED, *foreign.FOREIGN, *zoo.REFUSED]


def make(name: str) -> nn.Module:
    """The model called `name`, of transformers or foreign."""
    return foreign.make_foreign(name) if name in foreign.FOREIGN else zoo.make(name)


@torch.no_grad()
def measure(name: str) -> Measured:
    """Rewrites one model and compares its logits."""
    model = make(name)
    ids = torch.randint(0, zoo.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    try:
        small = without_eviction(kvrewrite.transform(model, policy="full"))
    except KVRewriteError as error:
        return Measured(name, [], float("nan"), float("nan"), str(error))
    out = model(ids)
    reference = out if isinstance(out, torch.Tensor) else out.logits
    cuts = [*pieces(IN_CHUNKS), *((i, i + 1) for i in range(IN_CHUNKS, LENGTH))]
    got = run_in_pieces(small, ids, cuts, LENGTH)
    return Measured(name, small.sites, float((got - reference).abs().max()), float(reference.abs().max()))


def _kinds(sites: list[AttentionSite]) -> str:
    found = []
    for s in sites:
        kind = f"{s.mask} {s.window or s.chunk}" if s.window or s.chunk else s.mask
        extra = [name for name, has in (("softcap", s.softcap), ("sinks", s.sinks), ("ALiBi", s.alibi)) if has]
        if s.shares_kv_with is not None:
            extra.append("shared k, v")
        if s.head_dim != s.v_head_dim:
            extra.append(f"k {s.head_dim}, v {s.v_head_dim}")
        text = " + ".join([kind, *extra])
        if text not in found:
            found.append(text)
    return "; ".join(found)


def table() -> Iterator[str]:
    """The lines of the markdown tables. A model that breaks is in the last one, with the exit status 1."""
    refused, broken = [], []
    yield "| family | sites | found as | attention | RoPE | max logit difference | largest logit |"
    yield "|---|---|---|---|---|---|---|"
    for name in families():
        try:
            m = measure(name)
        except Exception as error:  # not meant to happen; the rest of the table is still of use
            broken.append((name, f"{type(error).__name__}: {error}"))
            continue
        if m.refused:
            refused.append(m)
            continue
        sources, rope = "/".join(sorted({s.source for s in m.sites})), any(s.rope for s in m.sites)
        yield (
            f"| {name} | {len(m.sites)} | {sources} | {_kinds(m.sites)} | {'yes' if rope else 'no'} | "
            f"{m.difference:.1e} | {m.largest:.2f} |"
        )
    if refused:
        yield ""
        yield "| refused | because |"
        yield "|---|---|"
        for m in refused:
            reason = " ".join(m.refused.split()).replace("|", "\\|")
            yield f"| {m.name} | {reason} |"
    if broken:
        yield ""
        yield "| broken | error |"
        yield "|---|---|"
        for name, text in broken:
            yield f"| {name} | {' '.join(text.split())[:300]} |"
        raise SystemExit(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in table():
        print(line)
        sys.stdout.flush()
