"""Runs a benchmark, (policies and baselines) x context lengths x batch sizes, in one process; JSON after every cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvrewrite import policies
from kvrewrite.analysis.flops import sites_of
from kvrewrite.errors import KVRewriteError, OptionError
from kvrewrite.policies import UNLIMITED, Policy
from kvrewrite.tools.benchmark.baselines import FULL, PRESSES, Skipped, forget_compiled, subject_of
from kvrewrite.tools.benchmark.measure import Rewritten, measure, tokens_of
from kvrewrite.tools.benchmark.results import FORMAT, KIND, Settings, Warn, cell_key, describe, earlier_cells, machine
from kvrewrite.tools.benchmark.roofline import Rates, first_line, is_fatal, is_out_of_memory, limits, release
from kvrewrite.tools.benchmark.shapes import ShapeSource, open_source
from kvrewrite.tools.subjects import CONVERTED, Arm, Source, arms, file_hash, write_json

Progress = Callable[[str, int, int], None]


def _quiet(*_: Any) -> None:
    """Reports no progress and no warnings."""


class DeviceBroken(KVRewriteError):
    """Every GPU call fails; only a new process helps."""


# -----------------------------------------------------------------------------------------------------------------
# cells


def _policy_cell(arm: Arm, source: Source | ShapeSource, context: int, batch: int) -> dict[str, Any]:
    made_up = isinstance(source, ShapeSource) and arm.spec.name != CONVERTED and source.random_weights(arm)
    return {
        "kind": "policy",
        "name": arm.spec.name,
        "label": str(arm),
        "options": dict(arm.spec.options),
        "budget": arm.budget,
        "weights": "random" if made_up else file_hash(arm.spec.weights),
        "context": context,
        "batch": batch,
    }


def _baseline_cell(name: str, context: int, batch: int, budget: int | None = None) -> dict[str, Any]:
    label = name if budget is None else f"{name} at {budget:,}"
    return {
        "kind": "baseline",
        "name": name,
        "label": label,
        "options": {},
        "budget": budget,
        "weights": None,
        "context": context,
        "batch": batch,
    }


def _press_budgets(chosen: Sequence[Arm], context: int) -> list[int | None]:
    """Returns the policies' budgets in slots at this length, without those that evict nothing."""
    found: dict[int, None] = {}
    for arm in chosen:
        if arm.spec.name == CONVERTED:
            continue
        slots = policies.make(arm.spec.name, **arm.options).slots(context)
        if slots < min(context, UNLIMITED):
            found[slots] = None
    return list(found) or [None]


def _plan(settings: Settings, source: Source | ShapeSource) -> list[tuple[Arm | str, dict[str, Any]]]:
    """Returns every cell in running order: the full cache, the policies, the other baselines."""
    chosen = arms(settings.policies, settings.budgets)
    sizes = [(c, b) for c in sorted(set(settings.contexts)) for b in sorted(set(settings.batches))]
    first: list[tuple[Arm | str, dict[str, Any]]] = []
    last: list[tuple[Arm | str, dict[str, Any]]] = []
    for name in settings.baselines:
        for full in PRESSES if name == "kvpress" else (name,):
            for c, b in sizes:
                budgets = _press_budgets(chosen, c) if name == "kvpress" else [None]
                (first if name == FULL else last).extend((full, _baseline_cell(full, c, b, n)) for n in budgets)
    middle = [(arm, _policy_cell(arm, source, c, b)) for arm in chosen for c, b in sizes]
    return [*first, *middle, *last]


def compare(cells: list[dict[str, Any]]) -> None:
    """Adds to every cell its comparison with the full cache (how many times as fast, what part of the memory) and with
    the roofline (how many times the floor)."""
    full = {(c["context"], c["batch"]): c for c in cells if c["kind"] == "baseline" and c["name"] == FULL}
    for cell in cells:
        base = full.get((cell["context"], cell["batch"]), {})
        limit = cell.get("limits") or {}
        beside: dict[str, float | None] = {}
        for part, bound in (("prefill", "floor"), ("decode", "limit")):
            ours, theirs = median(cell, part), median(base, part)
            least = (limit.get(part) or {}).get(bound)
            beside[f"{part}_speedup"] = theirs / ours if ours and theirs else None
            beside[f"{part}_over_{bound}"] = ours / least if ours and least else None
            mine, other = ((c.get(part) or {}).get("peak_bytes") for c in (cell, base))
            beside[f"{part}_peak_share"] = mine / other if mine and other else None
        cell["beside"] = beside


def median(cell: Mapping[str, Any], part: str) -> float | None:
    """Returns the seconds of "prefill" or "decode", if measured."""
    found = cell.get(part)
    return found["seconds"]["median"] if found else None


# -------------------------------------------------------------------------------------------------------------------
# run
def check(settings: Settings, source: Source | ShapeSource) -> None:
    """Raises OptionError for errors that can be found before anything is loaded."""
    for spec in settings.policies:
        spec.check()
        if spec.name == CONVERTED:
            if source.manifest is None:
                raise OptionError(f"{settings.model} is no converted model; name the policies to run with --policy")
        elif (
            not isinstance(source, ShapeSource) and policies.POLICIES[spec.name].needs_weights and spec.weights is None
        ):
            raise OptionError(f"{spec.name} needs trained weights: --policy-weights {spec.name}=FILE")
    if not settings.policies and not settings.baselines:
        raise OptionError("there is nothing to measure; name a policy (-p) or a baseline (--baselines)")
    text = source.config.get("text_config") or source.config
    longest = text.get("max_position_embeddings")
    if longest and max(settings.contexts) > longest:
        raise OptionError(
            f"--context {max(settings.contexts):,}: {settings.model} was made for {longest:,} tokens; expected at most that"
        )


def limit_memory(device: torch.device, limit: int | None) -> None:
    """Caps what torch takes from the GPU; raises OptionError."""
    if limit is None:
        return
    if device.type != "cuda":
        raise OptionError("--memory-limit: only a GPU's memory can be limited; leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        raise OptionError(f"--memory-limit {limit / 2**30:.1f} GiB: the GPU has {total / 2**30:.1f} GiB")
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(limit / total, index)


def bench(
    settings: Settings,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress = _quiet,
    warn: Warn = _quiet,
) -> dict[str, Any]:
    """Runs every cell and returns the results as data.

    out: written after every cell. resume: continues from `out`; failed cells are tried again. A cell that could not be
    measured completely has another status than "ok" ("out of memory", "refused", "skipped", "failed") and a reason.
    """
    source = open_source(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.options.seed)
    check(settings, source)
    device = torch.device(settings.device)
    described, here = describe(settings, source), machine(device)
    kept = earlier_cells(out, described, here, warn) if resume and out is not None and out.exists() else {}
    limit_memory(device, settings.memory_limit)
    results: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["kvrewrite", *sys.argv[1:]],
        "machine": here,
        "settings": described,
        "complete": False,
        "rates": {},
        "cells": [],
    }
    cells: list[dict[str, Any]] = results["cells"]
    plan = _plan(settings, source)
    runner = _Runner(settings, source, progress, len(plan))
    try:
        for i, (what, cell) in enumerate(plan):
            runner.done = i
            known = kept.get(cell_key(cell))
            cells.append(known or cell)
            if known is None:
                try:
                    runner.run(what, cell, cells[:-1])
                except KeyboardInterrupt:
                    cells.pop()
                    raise
            results["rates"] = dict(runner.rates.known)
            compare(cells)
            if out is not None and known is None:
                write_json(out, results)
        results["complete"] = True
    finally:
        runner.close()
        compare(cells)
        results["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        if out is not None and cells:
            write_json(out, results)
    progress("done", len(plan), len(plan))
    return results


class _Runner:
    """Runs cells one by one; keeps a rewritten model while the arm stays the same."""

    def __init__(self, settings: Settings, source: Source | ShapeSource, progress: Progress, total: int):
        self.settings, self.source, self.progress, self.total, self.done = settings, source, progress, total, 0
        self.device = torch.device(settings.device)
        self.rates = Rates(self.device, torch.float32)
        self.arm: Arm | None = None
        self.model: Any = None
        self.refusal: str | None = None
        self.cold: dict[str, Any] = {}
        self.base_bytes: int | None = None

    def run(self, what: Arm | str, cell: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
        """Measures a cell and stores the result in it."""
        started = time.perf_counter()
        cell["status"], cell["reason"] = "ok", None
        try:
            if reason := self._too_long(cell, earlier):
                raise Skipped(reason)
            if isinstance(what, Arm):
                self._policy(what, cell)
            else:
                self._baseline(what, cell)
        except Skipped as error:
            cell["status"], cell["reason"] = "skipped", str(error)
        except KVRewriteError as error:
            cell["status"], cell["reason"] = "refused", str(error)
        except Exception as error:
            if is_fatal(error):
                raise DeviceBroken(
                    f"{cell['label']} at {cell['context']:,} tokens broke the GPU's context ({first_line(error)}); what was "
                    "measured is in --out: the same command with --resume continues, without this cell if you leave it out"
                ) from error
            if is_out_of_memory(error):
                cell["status"], cell["reason"] = "out of memory", first_line(error)
            else:
                cell["status"], cell["reason"] = "failed", first_line(error)
        finally:
            release(self.device)
        cell["seconds"] = round(time.perf_counter() - started, 3)

    def _say(self, cell: Mapping[str, Any], text: str) -> None:
        self.progress(f"{cell['label']}, {cell['context']:,} x {cell['batch']}: {text}", self.done, self.total)

    def _too_long(self, cell: Mapping[str, Any], earlier: list[dict[str, Any]]) -> str | None:
        """The reason why a cell would take too long, judged by a smaller size (time grows at least linearly), or
        None."""
        limit = self.settings.options.seconds
        for other in earlier:
            if any(other[n] != cell[n] for n in ("kind", "name", "options", "budget")):
                continue
            seconds = median(other, "prefill")
            grows = cell["context"] * cell["batch"] / (other["context"] * other["batch"])
            if seconds and grows > 1 and seconds * grows > limit:
                return (
                    f"too long: at least {seconds * grows:,.0f} s a prefill, from {seconds:,.1f} s at {other['context']:,} x "
                    f"{other['batch']}, and a cell may take {limit:,.0f} s (--seconds)"
                )
        return None

    def _ids(self, cell: Mapping[str, Any], vocabulary: int) -> torch.Tensor:
        return tokens_of(cell["context"], cell["batch"], vocabulary, self.settings.options.seed, self.device)

    def _allocated(self) -> int | None:
        release(self.device)
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None

    def _baseline(self, name: str, cell: dict[str, Any]) -> None:
        self.close()
        self._say(cell, "loading")
        model = self.source.base
        self._limits(cell, model, sites_of(model.config), None)
        base = self._allocated()
        limit = self.settings.memory_limit
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        with subject_of(name, model, cell["context"], cell["batch"], cell["budget"], limit) as subject:
            self._measure(subject, cell, base, vocabulary)
            del subject

    def _policy(self, arm: Arm, cell: dict[str, Any]) -> None:
        if arm is not self.arm:
            self._rewrite(arm, cell)
        if self.refusal is not None:
            raise KVRewriteError(self.refusal)
        model = self.model
        cell["resolved"] = {"name": model.policy.name, **model.policy.options()}
        cell["policy_weight_bytes"] = sum(
            p.numel() * p.element_size()
            for n, p in model.graph_module.named_parameters()
            if n.startswith("policy_weights.")
        )
        if arm.spec.name != CONVERTED:  # a converted directory may have no original to count
            self._limits(cell, self.source.base, model.sites, model.policy)
        cell["cold"] = {"transform_seconds": None, **self.cold}
        self.cold = {}  # only an arm's first cell has it
        self._measure(Rewritten(model), cell, self.base_bytes, model.program.vocab_size)

    def _measure(self, subject: Any, cell: dict[str, Any], base: int | None, vocabulary: int) -> None:
        ids = self._ids(cell, vocabulary)
        cell["base_bytes"] = base
        measure(subject, cell, ids, self.settings.options, base, vocabulary, lambda text: self._say(cell, text))

    def _rewrite(self, arm: Arm, cell: dict[str, Any]) -> None:
        self.close()
        self.arm = arm
        if arm.spec.name != CONVERTED:
            self._say(cell, "loading")
            _ = self.source.base
        self._say(cell, "rewriting")
        started = time.perf_counter()
        try:
            self.model = self.source.rewritten(arm)
        except KVRewriteError as error:
            self.refusal = str(error)
            return
        self.cold = {"transform_seconds": time.perf_counter() - started}
        if self.settings.compiled:
            self.model.compile()
        self.base_bytes = self._allocated()

    def _limits(self, cell: dict[str, Any], model: Any, sites: Any, policy: Policy | None) -> None:
        """Measures rates before the cell, on an otherwise idle device."""
        self._say(cell, "rates")
        self.rates.dtype = model.dtype
        steps = self.settings.options.steps
        cell["limits"] = limits(self.rates, model, sites, policy, cell["context"], cell["batch"], steps)

    def close(self) -> None:
        """Releases the rewritten model and what was compiled for it."""
        if self.model is not None and self.settings.compiled:
            forget_compiled()
        self.arm = self.model = self.refusal = self.base_bytes = None
        self.cold = {}
        release(self.device)


__all__ = ["Settings", "bench", "compare"]
