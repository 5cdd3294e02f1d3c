"""Ops whose arguments come in groups (kernels/groups.py): the dispatcher sees a flat schema, functions get the groups.

A piece of a schema is a group (all its fields), some `Fields` of one, or one argument as the schema has it ("bool mass").
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvrewrite.ops.dispatch import unversioned

F = TypeVar("F", bound=Callable[..., Any])
_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool", str: "str"}


@dataclasses.dataclass(frozen=True)
class Fields:
    """Some fields of a group, in this order, "field" or "name in the schema=field". A group whose fields are in several pieces
    is one parameter all the same; fields in none have their defaults. optional: the defaults are the schema's, too."""

    group: type
    names: str = ""
    optional: bool = False

    def pairs(self) -> list[tuple[str, str]]:
        """(name in the schema, field)."""
        words = self.names.split() or list(typing.get_type_hints(self.group))
        return [(word.partition("=")[0], word.rpartition("=")[2]) for word in words]


Piece = type | Fields | str


def define(name: str, *pieces: Piece, returns: str, writes: Iterable[str] = (), namespace: str = "kvrewrite") -> Op:
    """An op of these pieces, whose implementation and fake get one parameter for each group and each single argument, in the
    order of their first pieces. writes: names of arguments that it writes to; their versions are not counted. See `Op`."""
    texts: list[str] = []
    calls: list[type | str] = []
    groups: dict[type, dict[str, str]] = {}  # group -> field -> argument
    for piece in pieces:
        if isinstance(piece, str):
            texts.append(piece)
            calls.append(piece.partition("=")[0].split()[-1])
            continue
        fields = piece if isinstance(piece, Fields) else Fields(piece)
        hints = typing.get_type_hints(fields.group)
        if fields.group not in groups:
            calls.append(fields.group)
            groups[fields.group] = {}
        for argument, field in fields.pairs():
            default = f"={_in_schema(_defaults(fields.group)[field])}" if fields.optional else ""
            texts.append(f"{_KINDS[hints[field]]} {argument}{default}")
            groups[fields.group][field] = argument
    written = set(writes)
    schema = [_marked(text, place, written) for place, text in enumerate(texts)]
    if written:
        raise ValueError(f"{name} writes to {sorted(written)}, which it does not take")
    source = _source(texts, calls, groups)
    return Op(f"{namespace}::{name}", f"({', '.join(schema)}) -> {returns}", tuple(writes), source, groups)


def _marked(text: str, place: int, written: set[str]) -> str:
    """An argument's text, marked where it is written to; takes it from `written` then."""
    argument = text.partition("=")[0].split()[-1]
    if argument not in written:
        return text
    written.remove(argument)
    return text.replace("Tensor", f"Tensor(a{place}!)", 1)


def _in_schema(value: Any) -> str:
    """A default as a schema writes it."""
    return f'"{value}"' if isinstance(value, str) else str(value)


def _defaults(group: type) -> dict[str, Any]:
    return getattr(group, "_field_defaults", {})


def _source(texts: list[str], calls: list[type | str], groups: dict[type, dict[str, str]]) -> str:
    """A function of the flat arguments that calls `implementation` with the groups; written out, so that a call costs no loop."""
    given = [text.split(" ", 1)[1] for text in texts]
    parameters = []
    for call in calls:
        if isinstance(call, str):
            parameters.append(call)
            continue
        values = [groups[call].get(field, repr(_defaults(call).get(field))) for field in typing.get_type_hints(call)]
        made = f"{call.__name__}({', '.join(values)})"
        # What a NamedTuple's own constructor does, without the call of a function in Python.
        parameters.append(f"new({call.__name__}, ({', '.join(values)},))" if issubclass(call, tuple) else made)
    return f"def flat({', '.join(given)}):\n    return implementation({', '.join(parameters)})"


class Op:
    """A defined op. As a decorator it registers the implementation, which stays a function of groups for others to call."""

    def __init__(self, name: str, schema: str, writes: Sequence[str], source: str, groups: Iterable[type]):
        self.name, self.schema, self.writes = name, schema, writes
        self._source = compile(source, f"<{name}>", "exec")
        self._names = {group.__name__: group for group in groups}

    def _flat(self, implementation: Callable[..., Any]) -> Callable[..., Any]:
        names: dict[str, Any] = {**self._names, "new": tuple.__new__, "implementation": implementation}
        exec(self._source, names)  # of the pieces alone, which stand in this repository
        flat: Callable[..., Any] = names["flat"]
        return flat

    def __call__(self, implementation: F) -> F:
        flat = self._flat(implementation)
        self._op = torch.library.custom_op(self.name, flat, mutates_args=self.writes, schema=self.schema)
        if self.writes:
            unversioned(self.name)
        return implementation

    def fake(self, implementation: F) -> F:
        """Registers what the results look like."""
        self._op.register_fake(self._flat(implementation))
        return implementation

    def gradient(self, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
        """Registers the backward pass; both functions see flat arguments."""
        self._op.register_autograd(backward, setup_context=setup)
