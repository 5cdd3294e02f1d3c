"""Eviction policies by name. To add one: a file in this folder with a `Policy` subclass under `@register`."""

from __future__ import annotations

import importlib
import pkgutil

from kvrewrite.policies.attention_gate import AttentionGate
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.duo_attention import DuoAttention
from kvrewrite.policies.expected_attention import ExpectedAttention
from kvrewrite.policies.fast_kvzip import FastKVzip
from kvrewrite.policies.full import Full
from kvrewrite.policies.h2o import H2O
from kvrewrite.policies.keys import KeyDiff, Knorm
from kvrewrite.policies.kvzap import KVzap
from kvrewrite.policies.kvzip import KVzip
from kvrewrite.policies.locret import Locret, LocretQ
from kvrewrite.policies.nacl import NACL
from kvrewrite.policies.random import Random
from kvrewrite.policies.registry import ALIASES, POLICIES, make, register
from kvrewrite.policies.scissorhands import Scissorhands
from kvrewrite.policies.segments import UNLIMITED, RowState, Segment
from kvrewrite.policies.sirllm import SirLLM
from kvrewrite.policies.snapkv import AdaKV, PyramidKV, SnapKV
from kvrewrite.policies.streaming_llm import StreamingLLM
from kvrewrite.policies.tova import TOVA
from kvrewrite.policies.trim_kv import TrimKV

# Files of this folder without a policy; `site` imports torch, which `kvrewrite policies` does without.
_OTHERS = ("site", "weights")

# All other files are imported, which registers their policies. The names above are for `from kvrewrite.policies import`.
for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _OTHERS:
        importlib.import_module(f"{__name__}.{_module.name}")

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
    "KVzip",
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
