"""Builds parameters from a checkpoint's tensors by recipe.

Recipes are plain JSON data that `parameter_sources.py` made once with transformers' own code. A recipe is {"key": name
in the checkpoint}, or one of these around other recipes: {"stack": [...], "dim": d}, {"cat": [...], "dim": d},
{"transpose": r, "dims": [a, b]}, {"reshape": r, "shape": [...]}, {"narrow": r, "dim": d, "start": s, "length": n}. The
outermost object also has "shape" and "dtype", the model's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kvrewrite.artifact.checkpoint import Block, Checkpoint, Reader, TensorInfo, are_sizes, some
from kvrewrite.artifact.copier import Copier
from kvrewrite.errors import ArtifactError

Recipe = dict[str, Any]
_READS, _SPARE = 256, 1 << 20  # how often recipes may read everything; elements that any files may become
_MAX_DEPTH = 8  # of a recipe; Mixtral's experts need 2


def recipe_keys(recipe: Recipe) -> list[str]:
    """Returns the checkpoint tensors that a recipe reads."""
    if "key" in recipe:
        return [recipe["key"]]
    inner: Any = next((recipe[k] for k in ("stack", "cat", "transpose", "reshape", "narrow") if k in recipe), [])
    return [key for r in (inner if isinstance(inner, list) else [inner]) for key in recipe_keys(r)]


def check_recipe(name: str, recipe: Any, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Returns a recipe's result shape, computed from headers; raises ArtifactError if the recipe can't be followed."""
    shape = _recipe_shape(name, recipe, tensors, 0)
    wanted = recipe.get("shape") if "reshape" not in recipe else None
    if wanted is not None and list(shape) != wanted:
        raise ArtifactError(f"the parameter {name} has shape {wanted} in the model, but its files give {list(shape)}")
    return shape


def _recipe_shape(name: str, recipe: Any, tensors: Mapping[str, TensorInfo], depth: int) -> tuple[int, ...]:
    bad = f"the recipe of the parameter {name} is damaged (convert the model again)"
    if not isinstance(recipe, dict) or depth > _MAX_DEPTH:
        raise ArtifactError(f"{bad}: {str(recipe)[:80]!r}")
    if "key" in recipe:
        key = recipe["key"]
        if not isinstance(key, str) or key not in tensors:
            raise ArtifactError(
                f"the parameter {name} is made from {key!r:.120}, which the weight files don't have. Copy the directory again"
            )
        return tensors[key].shape
    if "stack" in recipe or "cat" in recipe:
        parts, dim = recipe.get("stack", recipe.get("cat")), recipe.get("dim")
        if not isinstance(parts, list) or not parts:
            raise ArtifactError(f"{bad}: nothing to put together")
        shapes = [_recipe_shape(name, r, tensors, depth + 1) for r in parts]
        rank = len(shapes[0]) + ("stack" in recipe)
        if type(dim) is not int or not 0 <= dim < rank:
            raise ArtifactError(f"{bad}: there is no dimension {dim!r}")
        if "stack" in recipe:
            if len(set(shapes)) > 1:
                raise ArtifactError(f"{bad}: tensors of different shapes can't be stacked: {some(set(shapes))}")
            return (*shapes[0][:dim], len(parts), *shapes[0][dim:])
        if len({(*s[:dim], *s[dim + 1 :]) for s in shapes}) > 1 or len({len(s) for s in shapes}) > 1:
            raise ArtifactError(f"{bad}: tensors of shapes {some(set(shapes))} can't be put together along {dim}")
        return (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])
    if "transpose" in recipe:
        inner, dims = _recipe_shape(name, recipe["transpose"], tensors, depth + 1), recipe.get("dims")
        if (
            not isinstance(dims, list)
            or len(dims) != 2
            or not all(type(d) is int and 0 <= d < len(inner) for d in dims)
        ):
            raise ArtifactError(f"{bad}: can't transpose {dims!r} of {list(inner)}")
        swapped = list(inner)
        swapped[dims[0]], swapped[dims[1]] = inner[dims[1]], inner[dims[0]]
        return tuple(swapped)
    if "reshape" in recipe:
        inner, shape = _recipe_shape(name, recipe["reshape"], tensors, depth + 1), recipe.get("shape")
        if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape):
            raise ArtifactError(f"{bad}: {shape!r} is not a shape; expected sizes")
        if torch.Size(shape).numel() != torch.Size(inner).numel():
            raise ArtifactError(f"{bad}: can't reshape {list(inner)} to {shape}")
        return tuple(shape)
    if "narrow" in recipe:
        inner = _recipe_shape(name, recipe["narrow"], tensors, depth + 1)
        place = [recipe.get("dim"), recipe.get("start"), recipe.get("length")]
        if not are_sizes(place) or place[0] >= len(inner) or place[1] + place[2] > inner[place[0]]:
            raise ArtifactError(f"{bad}: there is no dimension, start, length {place!r} in {list(inner)}")
        return (*inner[: place[0]], place[2], *inner[place[0] + 1 :])
    raise ArtifactError(f"{bad}: expected one of key, stack, cat, transpose, reshape, narrow")


def check_cost(recipes: Mapping[str, Recipe], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises ArtifactError if a few lines of recipes make far more than the files hold, or read it over and over."""
    held = sum(torch.Size(info.shape).numel() for info in tensors.values())
    made, read = 0, 0
    for name, recipe in {json.dumps(r, sort_keys=True): (n, r) for n, r in recipes.items()}.values():
        made += torch.Size(check_recipe(name, recipe, tensors)).numel()
        read += sum(torch.Size(tensors[key].shape).numel() for key in recipe_keys(recipe))
        largest = max(_sizes(name, recipe, tensors))
        if max(made, largest) > 2 * held + _SPARE or read > _READS * held + _SPARE:
            raise ArtifactError(
                f"the recipes up to that of the parameter {name} make {made} numbers, {largest} of them at once, from the {held} "
                f"that the files hold, and read {read}; the manifest is damaged"
            )


def _sizes(name: str, recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> Iterator[int]:
    """Yields the numbers of elements of a recipe and of each one inside it."""
    yield torch.Size(_recipe_shape(name, recipe, tensors, 0)).numel()
    inner: Any = next((recipe[k] for k in ("stack", "cat", "transpose", "reshape", "narrow") if k in recipe), [])
    for part in inner if isinstance(inner, list) else [inner]:
        yield from _sizes(name, part, tensors)


def follow(name: str, recipe: Recipe, reader: Reader, out: Tensor) -> None:
    """Writes a recipe's result into `out`, a view of the final tensor; holds only one checkpoint tensor besides it."""
    tensors = reader.checkpoint.tensors
    if "key" in recipe:
        out.copy_(reader(recipe["key"]))
    elif "stack" in recipe:
        for i, part in enumerate(recipe["stack"]):
            follow(name, part, reader, out.select(recipe["dim"], i))
    elif "cat" in recipe:
        start = 0
        for part in recipe["cat"]:
            length = _recipe_shape(name, part, tensors, 0)[recipe["dim"]]
            follow(name, part, reader, out.narrow(recipe["dim"], start, length))
            start += length
    elif "transpose" in recipe:
        follow(name, recipe["transpose"], reader, out.transpose(*recipe["dims"]))
    elif (nearer := _narrowed(recipe)) is not None:
        if isinstance(nearer, Block):
            out.copy_(reader(recipe["narrow"]["key"], nearer))
        else:
            follow(name, nearer, reader, out)
    else:  # a part or another shape of something, which is made first
        inner = recipe.get("reshape", recipe.get("narrow"))
        whole = torch.empty(_recipe_shape(name, inner, tensors, 0), dtype=out.dtype)
        follow(name, inner, reader, whole)  # type: ignore[arg-type]
        if "narrow" in recipe:
            whole = whole.narrow(recipe["dim"], recipe["start"], recipe["length"])
        out.copy_(whole.reshape(out.shape))


def _narrowed(recipe: Recipe) -> Recipe | Block | None:
    """A part of something as something made of parts, so that files are read in parts: a block of a checkpoint's tensor, or a
    recipe; None where that is not possible."""
    inner = recipe.get("narrow")
    if inner is None:
        return None
    block = Block(recipe["dim"], recipe["start"], recipe["length"])

    def part(of: Recipe, dim: int) -> Recipe:
        return {"narrow": of, "dim": dim, "start": block.start, "length": block.length}

    if "key" in inner:
        return block
    if "narrow" in inner and inner["dim"] == block.dim:
        return {"narrow": inner["narrow"], **block._replace(start=inner["start"] + block.start)._asdict()}
    if "transpose" in inner:
        a, b = inner["dims"]
        return {"transpose": part(inner["transpose"], {a: b, b: a}.get(block.dim, block.dim)), "dims": [a, b]}
    for kind in ("stack", "cat"):
        if kind in inner and inner["dim"] != block.dim:
            dim = block.dim - (kind == "stack" and inner["dim"] < block.dim)
            return {kind: [part(r, dim) for r in inner[kind]], "dim": inner["dim"]}
    if "stack" in inner:
        return {"stack": inner["stack"][block.start : block.start + block.length], "dim": inner["dim"]}
    return None


def cut_recipe(recipe: Recipe, blocks: list[Block], shape: tuple[int, ...]) -> Recipe:
    """The recipe of some blocks of what a recipe gives, side by side. shape: of the whole."""
    told = {"dtype": recipe["dtype"]} if "dtype" in recipe else {}
    whole = {k: v for k, v in recipe.items() if k != "dtype" and (k != "shape" or "reshape" in recipe)}
    parts: list[Recipe] = [{"narrow": whole, **block._asdict()} for block in blocks]
    own = list(shape)
    own[blocks[0].dim] = sum(block.length for block in blocks)
    found = parts[0] if len(parts) == 1 else {"cat": parts, "dim": blocks[0].dim}
    return {**found, "shape": own, **told}


def described(
    name: str, recipes: Mapping[str, Recipe], checkpoint: Checkpoint
) -> tuple[Recipe, tuple[int, ...], torch.dtype]:
    """A parameter's recipe, and the shape and dtype of what it makes; raises ArtifactError if it can't be followed."""
    if name not in recipes:
        raise ArtifactError(f"there is no recipe for the parameter {name}; the directory is incomplete. Copy it again")
    recipe = recipes[name]
    shape = check_recipe(name, recipe, checkpoint.tensors)
    own = getattr(torch, str(recipe.get("dtype")), None) or checkpoint.tensors[recipe_keys(recipe)[0]].dtype
    if not isinstance(own, torch.dtype):
        raise ArtifactError(f"the recipe of the parameter {name} has no dtype but {recipe.get('dtype')!r:.40}")
    return recipe, shape, own


def load_parameters(
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    copier: Copier | None = None,
) -> dict[str, Tensor]:
    """Builds parameters from a checkpoint, one checkpoint tensor at a time.

    names: which; default: all that have a recipe. dtype: replaces the recipes' dtype for floating parameters. copier:
    the caller's, for `device`; on a GPU, tensors may only be filled when its context ends. Names with equal recipes get
    the same tensor (tied weights).
    """
    device = torch.device(device)
    names = list(recipes if names is None else names)
    check_cost({name: recipes[name] for name in names if name in recipes}, checkpoint.tensors)
    out: dict[str, Tensor] = {}
    made: dict[tuple[str, torch.dtype], Tensor] = {}
    with checkpoint.reader() as reader, contextlib.ExitStack() as stack:
        copy = copier or stack.enter_context(Copier(device))
        for name in names:
            recipe, shape, own = described(name, recipes, checkpoint)
            wanted = dtype if dtype is not None and own.is_floating_point else own
            signature = (json.dumps(recipe, sort_keys=True), wanted)
            if signature not in made:
                if "key" in recipe:
                    made[signature] = copy(reader, recipe["key"], wanted)
                elif isinstance(block := _narrowed(recipe), Block):
                    made[signature] = copy(reader, recipe["narrow"]["key"], wanted, block)
                else:
                    result = torch.empty(shape, dtype=wanted, device=device)
                    follow(name, recipe, reader, result)
                    made[signature] = result
            out[name] = made[signature]
    return out
