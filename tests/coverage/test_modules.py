"""Decoders that are not from transformers, and idioms that no other test has, checked as the coverage table is."""

from __future__ import annotations

import pytest

from tests.coverage.measure import measure
from tests.coverage.modules import MODULES
from tests.support.products import few

REFUSED = {"BucketedBias": "a learned bias", "TalkingHeads": "mixed between heads"}
# name -> attention and RoPE as the sites say it
EXACT = {
    "Einsum": ("causal", "none"),
    "StaticCacheOff": ("causal + GQA 2", "yes"),
    "GroupedExpand": ("causal + GQA 2", "yes"),
    "GroupedSdpa": ("causal + GQA 2", "yes"),
    "FunctionalMHA": ("causal", "none"),
    "Alibi": ("causal + ALiBi", "none"),
    "CappedWindow": ("sliding 8 + softcap", "none"),
    "Sinks": ("causal + sinks", "none"),
    "Parallel": ("causal + GQA 2", "yes"),
}


def test_every_module_is_here() -> None:
    assert set(REFUSED) | set(EXACT) == set(MODULES)


# tests/passes/test_canonicalize.py has the idioms of the rest.
@pytest.mark.parametrize(
    "name",
    few(EXACT, rest=("GroupedSdpa", "Einsum", "GroupedExpand", "FunctionalMHA", "Alibi", "CappedWindow", "Sinks")),
)
def test_modules(name: str) -> None:
    outcome = measure(name)
    assert outcome.status == "exact", outcome.reason
    assert (outcome.idiom, outcome.rope) == EXACT[name]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_modules(name: str) -> None:
    outcome = measure(name)
    assert outcome.status == "refused" and REFUSED[name] in outcome.reason


@pytest.mark.parametrize("name", few(["roberta", "afmoe"], rest=["afmoe"]))
def test_types(name: str) -> None:
    """Positions that begin at the padding index + 1; a model that `view`s what its attention returns."""
    outcome = measure(name)
    assert outcome.status == "exact", outcome.reason
