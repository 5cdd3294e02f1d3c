"""Parses what users type: options of policies, budgets, models; and the flags that several commands share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvrewrite.errors import OptionError

if TYPE_CHECKING:
    from kvrewrite.tools.subjects import PolicySpec


UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str, option: str) -> int:
    """Parses a size such as "24GiB" to bytes; option: the one that has it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in UNITS or float(found[1]) <= 0:
        raise OptionError(f"{option} {text}: expected a size such as 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


def parse_value(text: str, hint: str) -> Any:
    """Parses `text` as one of the types in an annotation such as "int | None"; raises ValueError if it is none of
    them."""
    kinds = [k.strip() for k in hint.split("|")]
    if "None" in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        if kind == "bool":
            if text.lower() in ("true", "yes", "on", "1"):
                return True
            if text.lower() in ("false", "no", "off", "0"):
                return False
            raise ValueError("true or false")
        if kind == "int" and re.fullmatch(r"[+-]?\d[\d_]*", text):
            return int(text)
        if kind == "float":
            try:
                return float(text)
            except ValueError:
                continue
        if kind == "str":
            return text
    raise ValueError(hint.replace("int", "an integer").replace("float", "a number").replace(" | ", " or "))


def parse_options(policy: str, pairs: Iterable[str], **given: Any) -> dict[str, Any]:
    """Parses `key=value` pairs to the types of the policy's fields. given: options with their own flag, None if
    unset."""
    from kvrewrite.policies import ALIASES, POLICIES
    from kvrewrite.policies.options import annotation

    policy = ALIASES.get(policy, policy)
    hints = {f.name: annotation(f) for f in dataclasses.fields(POLICIES[policy])} if policy in POLICIES else {}
    # An unknown option passes unchanged: the policy names it and its likely spelling.
    return parse_pairs(policy, pairs, hints, {k: v for k, v in given.items() if v is not None})


def parse_pairs(
    policy: str, pairs: Iterable[str], hints: Mapping[str, str], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Parses `key=value` pairs to the types in `hints`; a key without a hint keeps its text. given: options already
    set."""
    options = dict(given or {})
    for pair in pairs:
        key, sign, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key:
            raise click.BadParameter(f"{pair!r} is not of the form key=value", param_hint="--option")
        if key in options:
            raise click.BadParameter(f"{key} is given twice", param_hint="--option")
        try:
            options[key] = parse_value(text.strip(), hints[key]) if key in hints else text
        except ValueError as error:
            raise OptionError(f"{policy}: {key} is {text!r}, expected {error}") from error
    return options


AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
TRUST = click.option(
    "--trust-compiled",
    is_flag=True,
    help="Load the steps that DIRECTORY has compiled (--compile aot): native code, so only from whom you trust.",
)
ALL = "all"  # every policy that needs no trained weights
# Of commands that measure many cells and write each as it comes: eval and bench.
POLICY_WEIGHTS = click.option(
    "--policy-weights", multiple=True, metavar="NAME=FILE", help="safetensors file of a policy's trained weights."
)
CELLS_OUT = click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file, written after every cell."
)
RESUME = click.option("--resume", is_flag=True, help="Continue from --out where it has results.")
DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])


def parse_budget(text: str) -> int | float:
    """Parses a fraction of the cache ("0.25", "25%") or a number of slots ("1024")."""
    try:
        if text.endswith("%"):
            value: int | float = float(text[:-1]) / 100
        elif re.fullmatch(r"\d[\d_]*", text):
            value = int(text)
        else:
            value = float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise OptionError(f"--budget {text}: expected a fraction such as 0.25 or a whole number of slots such as 1024")
    return value


def split_policy(text: str) -> tuple[str, list[str]]:
    """Splits `name:key=value,key=value` into name and pairs; a part without "=" belongs to the value before it."""
    name, _, rest = text.partition(":")
    pairs: list[str] = []
    for part in rest.split(",") if rest else []:
        if "=" in part or not pairs:
            pairs.append(part)
        else:
            pairs[-1] += f",{part}"
    return name.strip(), pairs


def parse_policies(texts: tuple[str, ...], weights: tuple[str, ...]) -> tuple[PolicySpec, ...]:
    """Returns the policies of --policy and --policy-weights; raises OptionError for unknown names."""
    from kvrewrite.policies import ALIASES, POLICIES
    from kvrewrite.tools.subjects import PolicySpec

    files = {}
    for text in weights:
        name, sign, file = text.partition("=")
        if not sign or not file:
            raise OptionError(f"--policy-weights {text}: expected NAME=FILE, such as locret=heads.safetensors")
        files[ALIASES.get(name, name)] = Path(file)
    specs = []
    for text in texts:
        if text == ALL:
            ready = [n for n, p in POLICIES.items() if p.evicts_ever and (n in files or not p.needs_weights)]
            specs += [PolicySpec(n, {}, files.get(n)) for n in ready]
            continue
        name, pairs = split_policy(text)
        name = ALIASES.get(name, name)
        spec = PolicySpec(name, parse_options(name, pairs), files.get(name))
        spec.check()
        specs.append(spec)
    unused = set(files) - {s.name for s in specs}
    if unused:
        raise OptionError(f"--policy-weights for {', '.join(sorted(unused))}, which --policy does not name")
    return tuple(specs)


def with_shipped_weights(specs: tuple[PolicySpec, ...]) -> tuple[PolicySpec, ...]:
    """Gives policies without weights those that ship with the small model."""
    from kvrewrite.assets import small_policies

    shipped = small_policies()
    return tuple(dataclasses.replace(s, weights=s.weights or shipped.get(s.name)) for s in specs)


def model_directory(model: str | None) -> Path:
    """Returns MODEL's directory, or that of the small model that ships with kvrewrite."""
    if model is not None:
        from kvrewrite.artifact.local_directory import checkpoint_directory

        return checkpoint_directory(model)
    from kvrewrite.assets import small_model

    return small_model()
