"""Draws results as PNG files with matplotlib (an optional dependency), without a display."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.tools.evaluation.cells import BASELINE, means
from kvrewrite.tools.plotting import GREY, add_legend, new_figure, require_matplotlib, save_figure, styles, tidy
from kvrewrite.tools.subjects import Arm, Source, budget_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT = "cividis"  # looks the same to people with and without colour blindness
DODGE = 1.012  # factor by which a policy's points are moved from its neighbour's
BINS = 256  # most columns of a retention map


def _only(results: Mapping[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the cells that ran of these policies (default: all) and of the baseline."""
    there = list(dict.fromkeys(c["label"] for c in results["cells"]))
    for label in labels:
        if label not in there:
            raise OptionError(f"the results have no policy {label!r}; they have: {', '.join(there)}")
    cells = [c for c in results["cells"] if c["status"] == "ok"]
    return [c for c in cells if not labels or c["label"] in labels or c["mode"] == BASELINE]


# ------------------------------------------------------------------------------------------------------------- accuracy
def accuracy(results: Mapping[str, Any], out: Path, *, tasks: Sequence[str] = (), labels: Sequence[str] = ()) -> Figure:
    """Plots accuracy against what was kept, a panel per mode (and length); error bars are 95% intervals.

    tasks: their mean is drawn; default: all tasks of the results. labels: policies, as on eval's command line. A
    policy's points are at the measured share of slots, moved slightly so that error bars do not overlap. A policy is
    left out at budgets where not all of the tasks ran, as in the table of means.
    """
    there = list(dict.fromkeys(c["task"] for c in results["cells"]))
    for task in tasks:
        if task not in there:
            raise OptionError(f"the results have no task {task!r}; they have: {', '.join(there)}")
    wanted = set(tasks or there)
    _only(results, labels)
    # Refused cells stay in, so that a mean over fewer tasks is not drawn beside one over all.
    cells = [c for c in results["cells"] if c["task"] in wanted]
    rows = [m for m in means(cells) if set(m["tasks"]) == wanted]
    rows = [m for m in rows if not labels or m["label"] in labels or m["mode"] == BASELINE]
    if not rows:
        raise OptionError(
            "there is nothing to draw: no policy ran on all of the tasks; run `kvrewrite eval` to its end"
        )
    modes = [m for m in ("aware", "blind") if any(r["mode"] == m for r in rows)] or [BASELINE]
    lengths = list(dict.fromkeys(r["tokens"] for r in rows))
    panels = [(length, mode) for length in lengths for mode in modes]
    figure, axes = new_figure(
        4.3 * len(modes) + 2.4, 0.8 + 3.4 * len(lengths), len(lengths), len(modes), sharey=True, sharex=True
    )
    looks = styles(list(dict.fromkeys(r["label"] for r in rows if r["mode"] != BASELINE)))
    ticks: set[float] = set()
    order = {label: i - (len(looks) - 1) / 2 for i, label in enumerate(looks)}
    for a, (length, mode) in zip(axes, panels):
        here = [r for r in rows if r["tokens"] == length]
        for row in (r for r in here if r["mode"] == BASELINE):
            value = row["accuracy"]
            a.axhspan(100 * value["low"], 100 * value["high"], color="#e4e4e4", zorder=0)
            a.axhline(100 * value["mean"], color=GREY, linewidth=1.2, label="full cache", zorder=1)
        for label, look in looks.items():
            points = sorted(
                (r for r in here if r["label"] == label and r["mode"] == mode and r["kept"] is not None),
                key=lambda r: r["kept"],
            )
            if not points:
                continue
            ticks.update(p["budget"] for p in points if isinstance(p["budget"], float))
            mean = [100 * p["accuracy"]["mean"] for p in points]
            low = [max(0.0, m - 100 * p["accuracy"]["low"]) for m, p in zip(mean, points)]
            high = [max(0.0, 100 * p["accuracy"]["high"] - m) for m, p in zip(mean, points)]
            kept = [100 * p["kept"] * DODGE ** order[label] for p in points]
            a.errorbar(kept, mean, [low, high], label=label, capsize=2.5, elinewidth=0.9, **look)
        a.set_title(f"question-{mode}" if mode != BASELINE else "full cache", loc="left", fontsize=11)
        if len(lengths) > 1:
            a.text(1, 1.02, f"{length:,} tokens", transform=a.transAxes, ha="right", fontsize=9, color=GREY)
        a.set_xlabel("cache slots kept (%)")
        a.set_ylabel("accuracy (%)")
        a.label_outer()
        a.set_ylim(-3, 103)
        tidy(a)
    _share_axis(axes, sorted(ticks), [100 * r["kept"] for r in rows if r["mode"] != BASELINE and r["kept"]])
    shown = f"{len(wanted)} tasks (mean)" if len(wanted) > 1 else next(iter(wanted))
    length_text = f"{lengths[0]:,} tokens, " if len(lengths) == 1 else ""
    figure.suptitle(
        f"{shown}; {length_text}{results['settings']['samples']} samples a task, 95% intervals", fontsize=11
    )
    add_legend(figure, axes)
    save_figure(figure, out)
    return figure


def _share_axis(axes: Sequence[Axes], budgets: Sequence[float], kept: Sequence[float]) -> None:
    """Sets a logarithmic axis for shares of the cache in percent, with a tick at every budget and some margin."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for a in axes:
        a.set_xscale("log")
        if kept:
            a.set_xlim(min(kept) / 1.25, max(kept) * 1.25)
        if budgets:
            a.xaxis.set_major_locator(FixedLocator([100 * b for b in budgets]))
        a.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        if budgets:
            a.xaxis.set_minor_locator(NullLocator())


# --------------------------------------------------------------------------------------------------------------- memory
def _memory_axes(a: Axes, contexts: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    a.set_xscale("log", base=2)
    a.set_yscale("log", base=2)
    step = -(-len(contexts) // 8)
    a.xaxis.set_major_locator(FixedLocator(contexts[::step]))
    a.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    a.xaxis.set_minor_locator(NullLocator())
    a.yaxis.set_major_locator(LogLocator(base=2, numticks=10))
    a.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _bytes(y)))
    a.yaxis.set_minor_locator(NullLocator())
    a.set_xlabel("context (tokens)")
    a.set_ylabel("cache memory a row")
    tidy(a)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


Curves = Mapping[tuple[str, str], Mapping[int, float]]  # (policy, budget) -> tokens -> bytes


def _alike(curves: Curves) -> dict[str, Mapping[int, float]]:
    """Merges curves of one budget that coincide (within 1% everywhere) under all their names."""
    groups: list[tuple[str, list[str], Mapping[int, float]]] = []
    for (label, budget), curve in curves.items():
        for other_budget, names, other in groups:
            same = budget == other_budget and curve.keys() == other.keys()
            if same and all(abs(curve[n] - other[n]) <= 0.01 * other[n] for n in curve):
                names.append(label)
                break
        else:
            groups.append((budget, [label], curve))
    named = {}
    for budget, names, curve in groups:
        text = ", ".join(names) if budget == "-" else f"{budget}: {', '.join(names)}"
        named[textwrap.fill(text, 38, subsequent_indent="  ", break_long_words=False)] = curve
    return named


def _lines(curves: Curves, full: Mapping[int, float], title: str, out: Path) -> Figure:
    drawn = _alike(curves)
    legend = 1.0 + sum(0.08 + 0.165 * (1 + label.count("\n")) for label in drawn)
    figure, (a,) = new_figure(8.6, max(4.4, legend))
    contexts = sorted(set(full) | {n for curve in drawn.values() for n in curve})
    if full:
        a.plot(sorted(full), [full[n] for n in sorted(full)], color=GREY, linewidth=2.2, label="full cache")
    for (label, curve), look in zip(drawn.items(), styles(list(drawn)).values()):
        a.plot(sorted(curve), [curve[n] for n in sorted(curve)], label=label, **look)
    _memory_axes(a, contexts)
    a.set_title(title, loc="left", fontsize=11)
    add_legend(figure, [a])
    save_figure(figure, out)
    return figure


def measured_memory(results: Mapping[str, Any], out: Path, *, labels: Sequence[str] = ()) -> Figure:
    """Plots measured leased bytes per row, the mean over tasks and modes, against the length of the prompts."""
    full: dict[int, list[float]] = {}
    curves: dict[tuple[str, str], dict[int, list[float]]] = {}
    for cell in _only(results, labels):
        if cell["mode"] == BASELINE:
            full.setdefault(cell["tokens"], []).append(cell["memory"]["context"]["leased"])
            continue
        name = cell["label"], budget_text(cell["budget"])
        point = "context" if "context" in cell["memory"] else "prompt"
        curves.setdefault(name, {}).setdefault(cell["tokens"], []).append(cell["memory"][point]["leased"])
    if not full and not curves:
        raise OptionError("there is nothing to draw: no cell ran; run `kvrewrite eval` to its end")
    averaged = {n: {t: sum(v) / len(v) for t, v in c.items()} for n, c in curves.items()}
    return _lines(
        averaged, {t: sum(v) / len(v) for t, v in full.items()}, "cache memory after the prompt, measured", out
    )


def estimated_memory(source: Source, arms: Sequence[Arm], contexts: Sequence[int], out: Path) -> Figure:
    """Plots bytes per row after a prompt, computed from the model's attention sites alone."""
    from kvrewrite import policies
    from kvrewrite.analysis.memory import plan_memory
    from kvrewrite.api import inspect

    sites = inspect(source.directory)
    size = _itemsize(source)
    full: dict[int, float] = {}
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for arm in arms:
        policy = policies.make(arm.spec.name, **arm.options).adapt(sites, {})
        plans = [plan_memory(sites, policy, size, n) for n in contexts]
        curves[arm.spec.label, budget_text(arm.budget)] = {p.context: float(p.evicted) for p in plans}
        full = {p.context: float(p.full) for p in plans}
    title = f"cache memory after the prompt, estimated, {size} bytes a value"
    return _lines(curves, full, title, out)


def _itemsize(source: Source) -> int:
    name = source.dtype
    if name == "auto":
        name = str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(name, 4)


# ------------------------------------------------------------------------------------------------------------- eviction
def eviction(results: Mapping[str, Any], out: Path, *, labels: Sequence[str] = (), tasks: Sequence[str] = ()) -> Figure:
    """Plots the measured share of a context's tokens that each (layer, kv head) did not hold: the mean over the cells
    of one policy. labels: needed if the results have several policies; tasks: only these."""
    cells = [c for c in _only(results, labels) if c["mode"] != BASELINE and (not tasks or c["task"] in tasks)]
    names = sorted({c["label"] for c in cells})
    if len(names) != 1:
        raise OptionError(
            f"expected one policy for a map of what is evicted; the results have {', '.join(names) or 'none'}"
        )
    shares: dict[str, list[list[float]]] = {}
    for cell in cells:
        held = cell["memory"]["context" if "context" in cell["memory"] else "prompt"]
        if "heads" not in held:
            raise ArtifactError("the results do not say what each head held; run `kvrewrite eval` again")
        for layer, heads in held["heads"].items():
            shares.setdefault(layer, []).append([1 - slots / held["tokens"] for slots in heads])
    rows = [[sum(head) / len(head) for head in zip(*found, strict=True)] for found in shares.values()]
    return draw_eviction(rows, [int(layer) for layer in shares], out, names[0])


def draw_eviction(rows: Sequence[Sequence[float]], layers: Sequence[int], out: Path, name: str = "") -> Figure:
    """rows: the share that each kv head of a layer evicts, NaN if it has fewer heads; layers: the number of each."""
    require_matplotlib()
    import numpy

    most = max(len(row) for row in rows)
    ratios = 100 * numpy.array([[*row, *[math.nan] * (most - len(row))] for row in rows])
    figure, (axes,) = new_figure(1.8 + 0.35 * max(8, most), 1.4 + 0.24 * max(6, len(rows)))
    image = axes.imshow(ratios, cmap=HEAT, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.set_xlabel("kv head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(most))
    axes.set_yticks(range(len(layers)), [str(n) for n in layers])
    if ratios.size <= 200:
        for (i, j), share in numpy.ndenumerate(ratios):
            if not math.isnan(share):
                axes.text(j, i, f"{share:.0f}", ha="center", va="center", color="white" if share < 50 else "black")
    figure.colorbar(image, ax=axes, label="tokens evicted, %")
    axes.set_title(f"{name}{', ' if name else ''}evicted: {numpy.nanmean(ratios):.1f}%", fontsize=10)
    save_figure(figure, out)
    return figure


# ------------------------------------------------------------------------------------------------------------ retention
def retention(source: Source, arms: Sequence[Arm], prompt: str, out: Path) -> Figure:
    """Shows which positions of a prompt each (layer, kv head) keeps; one panel per policy.

    Long prompts are shown in bins of the same number of positions, coloured by the share that is kept.
    """
    import torch

    ids = source.tokenizer(prompt, return_tensors="pt")["input_ids"].to(source.device)
    if ids.shape[1] < 2:
        raise OptionError(f"the prompt has {ids.shape[1]} tokens, expected at least 2")
    panels = []
    for arm in arms:
        model = source.rewritten(arm)
        cache = model.new_cache(1, max_length=ids.shape[1])
        model(ids, torch.ones_like(ids), past_key_values=cache, logits_to_keep=1)
        kept = {layer: rows[0] for layer, rows in cache.positions().items()}
        panels.append((str(arm), kept))
    return draw_retention(panels, int(ids.shape[1]), out)


def draw_retention(
    panels: Sequence[tuple[str, Mapping[int, Sequence[Sequence[int]]]]], length: int, out: Path
) -> Figure:
    """panels: (title, layer -> kv head -> kept positions) each."""
    require_matplotlib()
    import matplotlib
    import numpy

    if not panels:
        raise ArtifactError("there is nothing to draw: no policy; name one with --policy")
    bins = min(length, BINS)
    edges = numpy.linspace(0, length, bins + 1)
    edges = numpy.unique(numpy.round(edges).astype(int))
    sizes = numpy.diff(edges)
    heights = [sum(len(heads) for heads in kept.values()) for _, kept in panels]
    ratios = [max(h, 4) for h in heights]
    inches = [0.75 + max(1.1, min(5.0, 0.16 * h)) for h in heights]
    figure, axes = new_figure(9.5, sum(inches) + 0.5, len(panels), 1, sharex=True, height_ratios=ratios)
    colours = matplotlib.colormaps[HEAT].resampled(2 if bins == length else 256)
    image: Any = None
    for a, (title, kept) in zip(axes, panels):
        rows: list[Any] = []
        marks: list[int] = []
        names: list[str] = []
        for layer, heads in kept.items():
            marks.append(len(rows))
            names.append(str(layer))
            for positions in heads:
                count, _ = numpy.histogram(numpy.asarray(positions), bins=edges)
                rows.append(count / sizes)
        image = a.pcolormesh(
            edges, numpy.arange(len(rows) + 1), numpy.array(rows), cmap=colours, vmin=0, vmax=1, rasterized=True
        )
        a.set_ylim(len(rows), 0)
        for mark in marks[1:]:
            a.axhline(mark, color="white", linewidth=1.0)
        ends = [*marks[1:], len(rows)]
        step = -(-len(marks) // 16)
        middle = [(s + e) / 2 for s, e in zip(marks, ends)]
        a.set_yticks(middle[::step], names[::step])
        a.tick_params(axis="y", length=0)
        a.set_ylabel("layer")
        share = sum(len(p) for heads in kept.values() for p in heads) / (length * max(1, len(rows)))
        a.set_title(f"{title}: {100 * share:.1f}% of {length:,} positions kept", loc="left", fontsize=10)
        a.label_outer()
    axes[-1].set_xlabel("position in the prompt (a row is a kv head of the layer)")
    width = f"share kept of {length / bins:.3g} positions" if bins < length else "kept"
    bar = figure.colorbar(image, ax=axes, label=width, fraction=0.03, pad=0.01, aspect=30)
    if bins == length:
        bar.set_ticks([0.25, 0.75], labels=["no", "yes"])
    save_figure(figure, out)
    return figure
