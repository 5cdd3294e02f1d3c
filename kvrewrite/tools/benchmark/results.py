"""Handles benchmark results: describes a run's machine and settings, and reads an earlier file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvrewrite.errors import OptionError
from kvrewrite.tools.benchmark.baselines import FULL
from kvrewrite.tools.benchmark.measure import Options
from kvrewrite.tools.benchmark.shapes import ShapeSource
from kvrewrite.tools.subjects import PolicySpec, Source, read_json, versions

FORMAT = 1
KIND = "kvrewrite bench"
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured. compile: None: only on a GPU. memory_limit: bytes that torch may take from the GPU."""

    model: str
    policies: tuple[PolicySpec, ...] = ()
    budgets: tuple[int | float, ...] = ()
    contexts: tuple[int, ...] = (4096,)
    batches: tuple[int, ...] = (1,)
    baselines: tuple[str, ...] = (FULL,)
    device: str = "cpu"
    dtype: str = "auto"
    compile: bool | None = None
    memory_limit: int | None = None
    options: Options = field(default_factory=Options)

    @property
    def compiled(self) -> bool:
        """Whether rewritten models are compiled."""
        return torch.device(self.device).type == "cuda" if self.compile is None else self.compile


def cell_key(cell: Mapping[str, Any]) -> str:
    """Returns a cell's key as text: equal keys are the same measurement."""
    names = ("kind", "name", "options", "budget", "weights", "context", "batch")
    return json.dumps([cell.get(n) for n in names], sort_keys=True, default=str)


def machine(device: torch.device) -> dict[str, Any]:
    """Describes the machine of the measurements."""
    found: dict[str, Any] = {**versions(), "platform": platform.platform(), "cpus": os.cpu_count(), "gpu": None}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return found


def describe(settings: Settings, source: Source | ShapeSource) -> dict[str, Any]:
    """Returns the settings as data. Those in `FIXED` must be the same to resume."""
    o = settings.options
    return {
        "model": settings.model,
        "fingerprint": source.fingerprint(),
        "random_weights": isinstance(source, ShapeSource),
        "device": settings.device,
        "dtype": source.dtype,
        "compile": settings.compiled,
        "memory_limit": settings.memory_limit,
        "seed": o.seed,
        "repeat": o.repeat,
        "steps": o.steps,
        "new_tokens": o.new_tokens,
        "seconds_a_cell": o.seconds,
        "profile": o.profile,
        "policies": [s.label for s in settings.policies],
        "budgets": list(settings.budgets),
        "contexts": list(settings.contexts),
        "batches": list(settings.batches),
        "baselines": list(settings.baselines),
    }


FIXED = ("fingerprint", "device", "dtype", "compile", "memory_limit", "seed", "repeat", "steps", "new_tokens")


def earlier_cells(
    path: Path, wanted: Mapping[str, Any], here: Mapping[str, Any], warn: Warn
) -> dict[str, dict[str, Any]]:
    """Returns the cells of an interrupted run that can be kept, by key."""
    data = read_json(path, KIND, FORMAT)
    for name in FIXED:
        if data["settings"].get(name) != wanted[name]:
            what = "model" if name == "fingerprint" else name
            raise OptionError(
                f"--resume: {path} was made with another {what} ({data['settings'].get(name)} there, {wanted[name]} now); "
                "give another --out or --force"
            )
    if data["machine"].get("gpu") != here["gpu"]:
        raise OptionError(
            f"--resume: {path} was made on {data['machine'].get('gpu') or 'a CPU'}, this is {here['gpu'] or 'a CPU'}; give "
            "another --out or --force"
        )
    changed = [f"{k} {data['machine'].get(k)} -> {v}" for k, v in here.items() if data["machine"].get(k) != v]
    if changed:
        warn(f"{path} was begun on another machine or with other versions: {', '.join(changed)}")
    return {cell_key(c): c for c in data["cells"] if c["status"] == "ok"}
