"""Policies by name: `@register` makes one known, `make` builds one from a name and options."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.base import Policy

POLICIES: dict[str, type[Policy]] = {}
ALIASES: dict[str, str] = {}  # other names of policies


def register(cls: type[Policy]) -> type[Policy]:
    """Makes a policy of your own known by its name; a class decorator. Needed before `transform` and before `load`."""
    if cls.name in ALIASES:
        raise OptionError(f"{cls.name!r} is another name of {ALIASES[cls.name]!r} already; choose a different one")
    if POLICIES.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise OptionError(f"there is a policy called {cls.name!r} already: {POLICIES[cls.name].__qualname__}")
    aliases = vars(cls).get("aliases", ())  # its own, not those of a policy that it inherits from
    for alias in aliases:
        if alias in POLICIES or ALIASES.get(alias, cls.name) != cls.name:
            raise OptionError(f"{cls.name}: its alias {alias!r} is a policy already; choose a different one")
    POLICIES[cls.name] = cls
    ALIASES.update(dict.fromkeys(aliases, cls.name))
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
