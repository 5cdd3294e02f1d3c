"""Kernels take groups of arguments (kernels/groups.py); tests make and change them one by one."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any


def flat(function: Callable[..., Any], **called: str) -> Callable[..., Any]:
    """The same function with its groups' fields by name. called: what a test calls a field -> its name."""
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters

    def call(**given: Any) -> Any:
        given = {called.get(name, name): value for name, value in given.items()}
        arguments = {}
        for name in parameters:
            fields = getattr(hints[name], "_fields", ())
            if fields:
                arguments[name] = hints[name](**{field: given.pop(field) for field in fields if field in given})
            elif name in given:
                arguments[name] = given.pop(name)
        if given:
            raise TypeError(f"{function.__name__} takes no {', '.join(given)}")
        return function(**arguments)

    return call
