"""What an evaluation runs: its settings as data, its cells in order, and what an interrupted run has done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrewrite.errors import OptionError
from kvrewrite.tools.evaluation.cells import BASELINE, FIXED, read_results
from kvrewrite.tools.subjects import FULL_CACHE, Arm, PolicySpec, Source, beside_baseline, file_hash, versions

MODES = ("aware", "blind")

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and on what. tokens: prompt lengths; dtype: "auto" is the checkpoint's own, fp32 on a CPU."""

    model: Path
    policies: tuple[PolicySpec, ...] = ()
    budgets: tuple[int | float, ...] = ()
    modes: tuple[str, ...] = MODES
    tasks: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (4096,)
    samples: int = 50
    seed: int = 0
    batch_size: int = 4
    device: str = "cpu"
    dtype: str = "auto"
    data: tuple[tuple[str, Path], ...] = ()
    """(task, file) of tasks that read the user's documents."""
    shard: tuple[int, int] = (0, 1)
    """(i, n): every n-th policy and budget, from the i-th on."""
    check: str = "full"
    """What is proved of each rewrite, as for `kvrewrite.transform`."""
    record_kept: bool = False
    """Records what each head keeps of the first text, for the report's heat maps."""
    breadth_first: bool = False
    """All policies at the first mode and budget, then at the next; not all of a policy first."""


def plan(settings: Settings) -> list[tuple[Arm, str]]:
    """Returns which arms run in which modes, in order; of a shard, its part. The full cache is in the first shard."""
    found = beside_baseline(settings.policies, settings.budgets)
    if settings.breadth_first:
        order: dict[int | float | None, int] = {budget: i for i, budget in enumerate(settings.budgets)}
        found.sort(key=lambda arm: order.get(arm.budget, -1))
    number, shards = settings.shard
    mine = found[number::shards]
    if settings.breadth_first:
        pairs = [(arm, mode) for mode in settings.modes for arm in mine]
    else:
        pairs = [(arm, mode) for arm in mine for mode in settings.modes]
    return ([(FULL_CACHE, BASELINE)] if number == 0 else []) + pairs


def describe(settings: Settings, source: Source) -> dict[str, Any]:
    """Returns the settings as data. Those in `FIXED` must be the same to resume."""
    return {
        "model": str(settings.model),
        "fingerprint": source.fingerprint(),
        "samples": settings.samples,
        "seed": settings.seed,
        "dtype": source.dtype,
        "device": str(source.device),
        "batch_size": settings.batch_size,
        "policies": [s.label for s in settings.policies],
        "budgets": list(settings.budgets),
        "modes": list(settings.modes),
        "tasks": list(settings.tasks),
        "tokens": list(settings.tokens),
        "data": {task: file_hash(path) for task, path in settings.data},
        "shard": list(settings.shard),
    }


def earlier(path: Path, wanted: Mapping[str, Any], warn: Warn) -> dict[str, Any]:
    """Returns the results of an interrupted run whose cells can be kept; raises OptionError if they are of another one."""
    data = read_results(path)
    for name in FIXED:
        if data["settings"].get(name) != wanted[name]:
            what = "the model's files" if name == "fingerprint" else name
            shown = "" if name == "fingerprint" else f" ({data['settings'].get(name)} there, {wanted[name]} now)"
            raise OptionError(f"--resume: {path} was made with another {what}{shown}; give another --out or --force")
    for task, digest in wanted["data"].items():
        if data["settings"].get("data", {}).get(task, digest) != digest:
            raise OptionError(
                f"--resume: {path} was made with other documents for {task}; give another --out or --force"
            )
    if data["versions"] != (now := versions()):
        changed = [f"{k} {data['versions'].get(k)} -> {v}" for k, v in now.items() if data["versions"].get(k) != v]
        warn(f"{path} was begun with other versions: {', '.join(changed)}")
    return data
