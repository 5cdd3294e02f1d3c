"""The compiler's result: the rewritten graph with everything that a runtime and an artifact must know about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from kvrewrite.ir.layout import CacheLayout
from kvrewrite.ir.parallel import Parallel
from kvrewrite.ir.site import AttentionSite


@dataclass
class Program:
    """A rewritten model as data.

    graph: flat GraphModule; its `get_attr` targets are parameters and buffers under dotted names, each in exactly one
    of `base` (the original checkpoint's parameters and persistent buffers), `policy_weights` (what the policy inserted)
    and `constants` (tables the model computes when it is built, such as inverse frequencies, and literals in its code).
    layout: what the runtime needs (the graph's inputs, cache classes, states, rotary tables).
    policy: {"name": str, "options": dict}, plain JSON data. aliases: names of tied parameters, each to all its names.
    embedded: name of the node that `inputs_embeds` stands for, "" where it is not known.
    """

    graph: fx.GraphModule
    sites: list[AttentionSite]
    layout: CacheLayout
    policy: dict[str, Any]
    dtype: str
    vocab_size: int
    max_positions: int | None
    frontend: str
    base: list[str] = field(default_factory=list)
    policy_weights: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    embedded: str = ""
    proof: dict[str, Any] | None = None  # what was proved by running (`passes/canonical/validate.py`)
    parallel: Parallel | None = None  # where it is one rank's part of a model
