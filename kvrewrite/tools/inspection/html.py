"""Writes the report of `kvrewrite inspect --html`: one page without scripts that loads nothing from anywhere."""

from __future__ import annotations

import dataclasses
from html import escape

from kvrewrite import __version__
from kvrewrite.analysis.flops import cost_table
from kvrewrite.analysis.memory import LayerPlan, MemoryPlan, carried_bytes, plan_layers, plan_memory
from kvrewrite.cache.memory import human
from kvrewrite.policies import Policy
from kvrewrite.tools.inspection import svg
from kvrewrite.tools.inspection.code import Group, SiteCode
from kvrewrite.tools.inspection.gather import Inspection
from kvrewrite.tools.inspection.style import STYLE

BREAK = "\n"


def report(found: Inspection, context: int | None = None) -> str:
    """Returns the page. context: tokens of the memory plan, default the longest in the model's config, or 4096."""
    longest = getattr(found.config.get_text_config(decoder=True), "max_position_embeddings", None) or 4096
    context = context or longest
    parts = [
        _head(found, context),
        _section("sites", "Attention sites", _sites(found)),
        _section("policy", "Policy", _policy(found.policy)) if found.policy else "",
        _section("memory", "Memory plan", _memory(found, context)) if found.policy else "",
        _section("cost", "Cost model", _cost(found, max(context, longest))),
        _section("code", "What changed in the graph", "".join(_group(g, i == 0) for i, g in enumerate(found.groups))),
        _section("passes", "Passes", _passes(found)),
    ]
    title = escape(f"{found.name}: kvrewrite")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n{BREAK.join(p for p in parts if p)}\n"
        f"<footer>kvrewrite {escape(__version__)}</footer></main></body></html>\n"
    )


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{body}</section>'


def _table(head: list[str], rows: list[list[str]], numeric: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    """Returns a table; cells are HTML already."""

    def cell(tag: str, i: int, text: str) -> str:
        return f'<{tag} class="n">{text}</{tag}>' if i in numeric else f"<{tag}>{text}</{tag}>"

    top = "".join(cell("th", i, escape(h)) for i, h in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _tile(value: str, label: str, note: str = "") -> str:
    more = f'<div class="note">{escape(note)}</div>' if note else ""
    return f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>{more}</div>'


def _head(found: Inspection, context: int) -> str:
    parameters = sum(p.numel() for p in found.model.parameters())
    owners = sum(s.shares_kv_with is None for s in found.sites)
    tiles = [
        _tile(
            _count(parameters), "parameters", f"{type(found.model).__name__}, {str(found.dtype).removeprefix('torch.')}"
        ),
        _tile(str(len(found.sites)), "attention sites", f"{owners} own a cache, {_kinds(len(found.groups))}"),
    ]
    policy = "no policy: the graph as it was found"
    if found.policy is not None:
        plan = _plan(found, found.policy, context)
        ratio = f"{plan.full / plan.evicted:.1f} x smaller" if plan.full > plan.evicted else "no smaller"
        note = f"of {human(plan.full)} for {context:,} tokens: {ratio}"
        tiles.append(_tile(human(plan.evicted), "cache after the prompt, planned", note))
        tiles.append(_tile(human(plan.peak), "cache peak in prefill, planned", "batch 1"))
        policy = f"rewritten for <b>{escape(found.policy.name)}</b>: {escape(found.policy.summary)}"
    links = [
        ("sites", "Sites"),
        ("policy", "Policy"),
        ("memory", "Memory"),
        ("cost", "Cost"),
        ("code", "Code"),
        ("passes", "Passes"),
    ]
    if found.policy is None:
        links = [link for link in links if link[0] not in ("policy", "memory")]
    nav = "".join(f'<a href="#{name}">{text}</a>' for name, text in links)
    return (
        f'<header><div class="brand">kvrewrite inspect</div><h1>{escape(found.name)}</h1><p class="lead">{policy}</p>'
        f'<div class="tiles">{"".join(tiles)}</div><nav>{nav}</nav></header>'
    )


def _kinds(number: int) -> str:
    return "all alike" if number == 1 else f"{number} kinds"


def _count(number: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:.0f}"


def _flops(number: float) -> str:
    for size, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {name}FLOP"
    return f"{number:.0f} FLOP"


def _bytes(number: float) -> str:
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}B"
    return f"{number:.0f} B"


# ------------------------------------------------------------------------------------------------------------- sections
def _sites(found: Inspection) -> str:
    rows = []
    for s in found.sites:
        dims = str(s.head_dim) if s.head_dim == s.v_head_dim else f"{s.head_dim}, v {s.v_head_dim}"
        more = (
            [f"softcap {s.softcap:g}"] * bool(s.softcap) + ["sinks"] * s.sinks + ["ALiBi"] * s.alibi + ["RoPE"] * s.rope
        )
        if s.latent:
            more.append(f"latent {s.latent} + {s.latent_rotary}{' cached' * s.latent_cached}")
        if s.shares_kv_with is not None:
            more.append(f"k, v of layer {s.shares_kv_with}")
        chips = "".join(f'<span class="chip">{escape(name)}</span>' for name in s.inserted)
        mask = f"{s.mask} {s.window or s.chunk}" if s.window or s.chunk else s.mask
        row = [str(s.layer), f"<code>{escape(s.module or '(top)')}</code>", str(s.heads), str(s.kv_heads), dims, mask]
        row += [f"{s.scale:.5g}", escape(", ".join(more) or "-"), escape(s.source), chips or "-"]
        rows.append(row)
    head = ["layer", "module", "heads", "kv heads", "head dim", "mask", "scale", "with", "found as", "inserted"]
    table = _table(head, rows, {0, 2, 3, 4, 6})
    if len(rows) <= 12:
        return table
    return f"<details open><summary>{len(rows)} sites</summary>{table}</details>"


def _policy(policy: Policy | None) -> str:
    assert policy is not None
    rows = []
    for option in dataclasses.fields(policy):
        value = getattr(policy, option.name)
        changed = value != option.default
        shown = f'<b class="set">{escape(str(value))}</b>' if changed else escape(str(value))
        rows.append([f"<code>{escape(option.name)}</code>", shown, escape(str(option.default))])
    about = f"<p><b>{escape(policy.name)}</b>: {escape(policy.summary)} <span class='dim'>({escape(policy.source)})</span></p>"
    half = -(-len(rows) // 2)
    head = ["option", "value", "default"]
    return f'{about}<div class="two">{_table(head, rows[:half])}{_table(head, rows[half:])}</div>'


def _plan(found: Inspection, policy: Policy, context: int) -> MemoryPlan:
    """Returns the plan of one row, including what layers without attention carry."""
    assert found.program is not None
    carried = carried_bytes(found.program.layout)
    return plan_memory(found.sites, policy, found.dtype.itemsize, context, carried=carried)


def _slots(plan: LayerPlan) -> str:
    """Formats the slots per head, or their range."""
    low, high = min(plan.slots), max(plan.slots)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _memory(found: Inspection, context: int) -> str:
    policy = found.policy
    assert policy is not None
    size = found.dtype.itemsize
    layers = plan_layers(found.sites, policy, size, context)
    plan = _plan(found, policy, context)

    def says(p: LayerPlan) -> str:
        return (
            f"layer {p.site.layer}: {_slots(p)} slots a head, {p.pages:,} pages, {human(p.evicted)} after the prompt, "
            f"{human(p.largest)} at the most; a full cache {human(p.full)}"
        )

    bars = svg.bars([(str(p.site.layer), p.full, p.evicted, p.largest, says(p)) for p in layers])
    cells = []
    largest = max((n for p in layers for n in p.slots), default=1) or 1
    for p in layers:
        place = f"layer {p.site.layer}, head"
        shown = [(n, n / largest, f"{place} {h}: {n:,} of {context:,} slots") for h, n in enumerate(p.slots)]
        cells.append((str(p.site.layer), shown))
    shared = (
        " Heads of a layer share its budget while the model runs, so what one head has can't be said ahead: cells are the mean."
        if policy.ragged
        else ""
    )
    rows = [
        [
            str(p.site.layer),
            _slots(p),
            f"{p.most:,}",
            f"{p.pages:,}",
            human(p.evicted),
            human(p.largest),
            human(p.full),
        ]
        for p in layers
    ]
    if plan.carried:
        rows.append(["carried by other layers", "", "", "", *[human(plan.carried)] * 3])
    rows.append(
        [
            "<b>all</b>",
            "",
            "",
            f"{sum(p.pages for p in layers):,}",
            human(plan.evicted),
            human(plan.peak),
            human(plan.full),
        ]
    )
    more = any(p.largest > p.evicted for p in layers)
    between = '<i class="k-most"></i>at the most ' if more else ""
    head = ["layer", "slots a head", "at the most", "pages", "after the prompt", "peak", "full cache"]
    return (
        f"<p>One row with a prompt of <b>{context:,}</b> tokens, from shapes and options alone; pages are counted whole. The "
        f"peak of all layers holds the keys and values of one segment besides.{shared}</p>"
        '<div class="two"><figure><figcaption>Bytes by layer, as a part of a full cache '
        f'<span class="key"><i class="k-full"></i>full {between}<i class="k-kept"></i>after the prompt'
        f"</span></figcaption>{bars}</figure>"
        "<figure><figcaption>Slots by layer (down) and kv head (across), darkest: most</figcaption>"
        f"{svg.heat(cells)}</figure></div>"
        f"<details><summary>Numbers</summary>{_table(head, rows, set(range(7)))}</details>"
    )


def _cost(found: Inspection, longest: int) -> str:
    rows = cost_table(found.model, found.sites, found.policy, found.dtype.itemsize, longest)
    contexts = [r["context"] for r in rows]
    plots = []
    kinds = [
        ("prefill_flops", "Prefill: FLOPs of a prompt", _flops),
        ("prefill_bytes", "Prefill: bytes moved", _bytes),
        ("decode_flops", "Decode: FLOPs of a step", _flops),
        ("decode_bytes", "Decode: bytes read by a step", _bytes),
    ]
    name = found.policy.name if found.policy else ""
    key = '<span class="key"><i class="k-full"></i>full cache'
    key += f' <i class="k-kept"></i>{escape(name)}</span>' if name else "</span>"
    for field, title, unit in kinds:
        series = [("full cache", "c-full", [r["full"][field] for r in rows])]
        if found.policy:
            series.append((name, "c-policy", [r["policy"][field] for r in rows]))
        note = ""
        if found.policy:
            ratio = rows[-1]["full"][field] / rows[-1]["policy"][field]
            note = (
                f'<div class="at">at {contexts[-1]:,} tokens: <b>{ratio:.2f} x</b> less</div>' if ratio > 1.005 else ""
            )
        caption = f"<figcaption>{escape(title)} {key}</figcaption>"
        plots.append(f"<figure>{caption}{svg.lines(title, unit, contexts, series)}{note}</figure>")
    head, body = ["context"], []
    for _, title, _ in kinds:
        head += [f"{title.split(':')[0]} {'FLOPs' if 'FLOP' in title else 'bytes'}, full"]
        head += [f"with {name}"] if name else []
    for r in rows:
        row = [f"{r['context']:,}"]
        for field, _, unit in kinds:
            row.append(unit(r["full"][field]))
            if found.policy:
                row.append(unit(r["policy"][field]))
        body.append(row)
    return (
        '<p><span class="badge">a model, not a measurement</span> Batch 1. FLOPs of linear layers and attention; bytes of '
        "weights, read once a segment of the prompt and once a decode step, and of keys and values. What a policy's scores, "
        "its own weights and evictions cost is not in it. <code>kvrewrite bench</code> measures.</p>"
        f'<div class="two">{"".join(plots)}</div><details><summary>Numbers</summary>{_table(head, body, set(range(9)))}</details>'
    )


def _group(group: Group, opened: bool) -> str:
    sides = [("before", group.before, "as the model has it, in canonical form")]
    if group.after is not None:
        sides.append(("after", group.after, "with cache and policy; marked lines are new"))
    body = "".join(
        f'<div class="side"><h4>{name} <span class="dim">{escape(says)}</span></h4>{_code(code)}{_inputs(code)}</div>'
        for name, code, says in sides
    )
    state = " open" if opened else ""
    module = f"<code>{escape(group.before.module or '(top)')}</code>"
    return f"<details{state}><summary><b>{escape(group.title)}</b> {module}</summary>{body}</details>"


def _code(code: SiteCode) -> str:
    """Returns highlighted lines; those that the compiler added are marked."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    rows = []
    for row in code.text(marks=True).splitlines():
        html = highlight(row[2:], PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip("\n")
        kind = ' class="new"' if row.startswith("+") else ""
        rows.append(f"<span{kind}>{html or ' '}</span>")
    return f'<pre class="code">{"".join(rows)}</pre>'


def _inputs(code: SiteCode) -> str:
    told = ", ".join(
        f"<code>{escape(i['name'])}</code> {escape(i['shape'])} from <code>{escape(i['from'])}</code>"
        for i in code.inputs
        if i["from"] != "input of the graph"
    )
    return f'<p class="dim small">{told}</p>' if told else ""


def _passes(found: Inspection) -> str:
    slowest = max((p.seconds for p in found.passes), default=1) or 1
    rows, before = [], 0
    for p in found.passes:
        bar = f'<span class="meter"><i style="width:{100 * p.seconds / slowest:.1f}%"></i></span>'
        change = f"{p.nodes - before:+,}" if before else ""
        rows.append(
            [f"<code>{escape(p.name)}</code>", escape(p.what), f"{p.nodes:,}", change, f"{p.seconds:.3f} s", bar]
        )
        before = p.nodes
    head = ["pass", "what it leaves", "nodes", "change", "time", ""]
    return (
        _table(head, rows, {2, 3, 4})
        + '<p class="dim small">Times are of this run on this machine, checks included.</p>'
    )
