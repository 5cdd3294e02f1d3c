"""Files of patterns for sparse prefill: which part of a prompt's attention each query head computes.

Ours, which `kvrewrite search-patterns` writes: {"format": "kvrewrite head patterns 1", "layers": {"0": [one text for
each query head]}, ...}; texts as in kernels/attention/patterns.py. Of MInference's own files, a list of layers, each
{"0": ["vertical_and_slash", 1000, 6096, score]}, the patterns are read with the numbers that its code takes them for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvrewrite.artifact.files import json_text
from kvrewrite.errors import OptionError
from kvrewrite.kernels.attention.patterns import HeadPattern, parse_head

FORMAT = "kvrewrite head patterns 1"
MINFERENCE = "minference"  # without a file: the pattern that MInference's code takes for heads that it knows nothing of
DEFAULT = HeadPattern("vertical_slash", 1000, 6096)
LayerPatterns = Mapping[int, tuple[HeadPattern, ...]]
Prefill = str | Path | LayerPatterns | None
_THEIRS = ("vertical_and_slash", "stream_llm", "block_sparse")
_LEAST = (30, 50)  # columns and diagonals, in their code
_BLOCKS = 100  # of a block_sparse head, in their code whatever the file says


def patterns_of(prefill: str | Path | LayerPatterns) -> LayerPatterns | HeadPattern:
    """What the argument `prefill` stands for. Raises OptionError."""
    if isinstance(prefill, Mapping):
        return {layer: tuple(_head(word, f"layer {layer}") for word in heads) for layer, heads in prefill.items()}
    return DEFAULT if prefill == MINFERENCE else read_patterns(prefill)


def read_patterns(path: str | Path) -> LayerPatterns:
    """The patterns of a file by layer. Raises OptionError where there is none or where they make no sense."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OptionError(
            f"prefill: {path} can't be read as JSON ({error}); expected {MINFERENCE!r}, or a file of patterns "
            "(kvrewrite search-patterns makes one)"
        ) from None
    if isinstance(data, list):
        return dict(enumerate(_theirs(layer, f"{path}: layer {i}") for i, layer in enumerate(data)))
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("layers"), dict):
        raise OptionError(f'prefill: {path} is no file of patterns: expected "format": "{FORMAT}" and "layers"')
    found: dict[int, tuple[HeadPattern, ...]] = {}
    for layer, heads in data["layers"].items():
        if not (layer.isascii() and layer.isdigit()) or not isinstance(heads, list):
            raise OptionError(f"prefill: {path}: layer {layer!r} is not a number with a list of patterns")
        found[int(layer)] = tuple(_head(word, f"{path}: layer {layer}") for word in heads)
    return found


def write_patterns(path: str | Path, patterns: LayerPatterns, about: Mapping[str, Any]) -> None:
    """Writes a file that `read_patterns` reads. about: what else it says, such as how the patterns were found."""
    layers = {str(layer): [str(head) for head in heads] for layer, heads in patterns.items()}
    text = json_text({"format": FORMAT, **about, "layers": layers}, "the file of patterns", indent=1)
    Path(path).write_text(text + "\n")


def _head(word: Any, where: str) -> HeadPattern:
    if isinstance(word, HeadPattern):
        return word
    if not isinstance(word, str):
        raise OptionError(f"prefill: {where}: got {word!r}, expected a pattern such as {str(DEFAULT)!r}")
    try:
        return parse_head(word)
    except ValueError as error:
        raise OptionError(f"prefill: {where}: {error}") from None


def _theirs(layer: Any, where: str) -> tuple[HeadPattern, ...]:
    """A layer of MInference's file."""
    if not isinstance(layer, dict) or sorted(layer) != sorted(map(str, range(len(layer)))):
        raise OptionError(f"prefill: {where} is not an object of heads from 0 on")
    found = []
    for head in range(len(layer)):
        entry = layer[str(head)]
        numbers = entry[1:3] if isinstance(entry, list) else []
        if len(numbers) != 2 or entry[0] not in _THEIRS or not all(type(n) is int and n > 0 for n in numbers):
            raise OptionError(
                f"prefill: {where}, head {head}: got {entry!r}, expected one of {_THEIRS} and two numbers"
            )
        if entry[0] == "block_sparse":
            found.append(HeadPattern("block_sparse", _BLOCKS))
        else:
            kind = "vertical_slash" if entry[0] == "vertical_and_slash" else "a_shape"
            least = _LEAST if kind == "vertical_slash" else (1, 1)
            found.append(HeadPattern(kind, *map(max, numbers, least)))
    return tuple(found)
