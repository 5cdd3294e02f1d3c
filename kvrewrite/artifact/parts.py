"""Loads one process's part of a model's weights: only its blocks are read from the safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kvrewrite.artifact.checkpoint import Block, Checkpoint
from kvrewrite.artifact.copier import Copier
from kvrewrite.artifact.recipes import Recipe, check_recipe, cut_recipe, described, load_parameters
from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.ir.program import Program


def empty_parameters(checkpoint: Checkpoint, recipes: Mapping[str, Recipe], names: Iterable[str]) -> dict[str, Tensor]:
    """What `load_parameters` gives, on meta."""
    made: dict[str, Tensor] = {}
    found = {}
    for name in names:
        recipe, shape, own = described(name, recipes, checkpoint)
        signature = json.dumps(recipe, sort_keys=True)
        if signature not in made:
            made[signature] = torch.empty(shape, dtype=own, device="meta")
        found[name] = made[signature]
    return found


def load_part(
    program: Program, checkpoint: Checkpoint, recipes: Mapping[str, Recipe], device: torch.device, copier: Copier
) -> None:
    """Gives a program's base parameters, which are on meta, their values."""
    parallel, own = program.parallel, {}
    for name in program.base:
        recipe = recipes[name]
        if parallel is not None and name in parallel.cut:
            dim, _ = parallel.cut[name]
            shape = check_recipe(name, recipe, checkpoint.tensors)
            recipe = cut_recipe(recipe, [Block(dim, *b) for b in parallel.blocks(name)], shape)
        own[name] = recipe
    wrapped: dict[int, Tensor] = {}
    for name, tensor in load_parameters(checkpoint, own, program.base, device, copier=copier).items():
        if isinstance(get_attr(program.graph, name), nn.Parameter):  # names that share a tensor share the parameter
            tensor = wrapped.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
        set_attr(program.graph, name, tensor)
