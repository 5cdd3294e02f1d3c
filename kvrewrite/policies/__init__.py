"""Eviction policies by name. To add one: a file with a `Policy` subclass, and its line here."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.attention_gate import AttentionGate
from kvrewrite.policies.base import UNLIMITED, Policy, RowState, Scores, Segment
from kvrewrite.policies.duo_attention import DuoAttention
from kvrewrite.policies.expected_attention import ExpectedAttention
from kvrewrite.policies.fast_kvzip import FastKVzip
from kvrewrite.policies.full import Full
from kvrewrite.policies.h2o import H2O
from kvrewrite.policies.keys import KeyDiff, Knorm
from kvrewrite.policies.kvzap import KVzap
from kvrewrite.policies.locret import Locret, LocretQ
from kvrewrite.policies.nacl import NACL
from kvrewrite.policies.random import Random
from kvrewrite.policies.scissorhands import Scissorhands
from kvrewrite.policies.sirllm import SirLLM
from kvrewrite.policies.snapkv import AdaKV, PyramidKV, SnapKV
from kvrewrite.policies.streaming_llm import StreamingLLM
from kvrewrite.policies.tova import TOVA
from kvrewrite.policies.trim_kv import TrimKV

POLICIES: dict[str, type[Policy]] = {
    p.name: p
    for p in (
        Full,
        StreamingLLM,
        H2O,
        Scissorhands,
        TOVA,
        SirLLM,
        SnapKV,
        PyramidKV,
        AdaKV,
        NACL,
        ExpectedAttention,
        KeyDiff,
        Knorm,
        Random,
        Locret,
        LocretQ,
        KVzap,
        FastKVzip,
        TrimKV,
        DuoAttention,
        AttentionGate,
    )
}
ALIASES = {"msrnn": "tova"}  # what NACL's paper calls TOVA


def register(cls: type[Policy]) -> type[Policy]:
    """Makes a policy of your own known by its name; a class decorator. Needed before `transform` and before `load`."""
    if cls.name in ALIASES:
        raise OptionError(f"{cls.name!r} is another name of {ALIASES[cls.name]!r} already; choose a different one")
    if POLICIES.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise OptionError(f"there is a policy called {cls.name!r} already: {POLICIES[cls.name].__qualname__}")
    POLICIES[cls.name] = cls
    return cls


def make(name: str | Policy, **options: Any) -> Policy:
    """The policy called `name` with `options`; raises OptionError for unknown names and options."""
    if isinstance(name, Policy):
        return dataclasses.replace(name, **options) if options else name
    name = ALIASES.get(name, name)
    if name not in POLICIES:
        raise OptionError(
            f"unknown policy {name!r}{_hint(name, POLICIES)}; there are: {', '.join(POLICIES)}. A policy of your own must be "
            "registered first: kvrewrite.policies.register(cls)"
        )
    cls = POLICIES[name]
    known = {f.name for f in dataclasses.fields(cls)}
    for option in options:
        if option not in known:
            raise OptionError(
                f"policy {name} has no option {option!r}{_hint(option, known)}; it has: {', '.join(sorted(known))}"
            )
    return cls(**options)


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


__all__ = [
    "ALIASES",
    "H2O",
    "NACL",
    "POLICIES",
    "TOVA",
    "UNLIMITED",
    "AdaKV",
    "AttentionGate",
    "DuoAttention",
    "ExpectedAttention",
    "FastKVzip",
    "Full",
    "KVzap",
    "KeyDiff",
    "Knorm",
    "Locret",
    "LocretQ",
    "Policy",
    "PyramidKV",
    "Random",
    "RowState",
    "Scissorhands",
    "Scores",
    "Segment",
    "SirLLM",
    "SnapKV",
    "StreamingLLM",
    "TrimKV",
    "make",
    "register",
]
