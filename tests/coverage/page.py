"""Makes docs/coverage.md of the outcomes in docs/results/coverage-VERSION.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.coverage import configs
from tests.coverage.modules import ALL_MODULES

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "coverage.md"

Outcomes = dict[str, dict[str, Any]]

HEAD = """# Coverage

This page says which models convert. It has every model type that `AutoModelForCausalLM` of transformers knows. Each
was converted as a tiny model with random weights, in fp32 on a CPU, and compared with the unmodified model. Nothing
here was measured on full-size checkpoints. Made by

    python -m tests.coverage

on each version of transformers ({versions}); `pytest -m coverage` checks that the table still holds.

An architecture is **exact** when both of these hold:

- Nothing evicted: its logits are the unmodified model's, to 1e-4 of the largest logit. Tried are batch 2, uneven
  chunks of 7, 5, 1, 1, 10 and 9 tokens through one cache and then token by token, and a row with padding on its left.
  MLA models also run with `mla=latent`.
- With StreamingLLM (budget 12, 2 sinks, chunks of 7): every layer and head keeps exactly the sinks and the newest
  tokens. Layers with a window or chunk keep at least what that still sees, and never more than the budget. Where all
  layers have windows within the budget, the logits under eviction are the original's, too.

How the tiny models are made: sizes are shrunk (tests/coverage/configs.py), windows and chunks become 8, GQA stays
where a type has it. All weights are random with unit gain, so that attention is not uniform and no bias, sink or gate
is zero. Where scores are capped, the unmodified model runs with `attn_implementation="eager"`: sdpa has no cap, and
transformers 5.17 leaves it out without a word.

dory's difference is its own rounding: the unmodified model in fp32 is 3.7e-4 from itself in float64, where the
difference is 0. With torch 2.11 on another processor both versions gave the same outcomes, but for dory (6.0e-4,
where 5.2e-4 is the limit: the same rounding) and minimax, whose rounded tables of powers were taken for a scale; that
is mended, and minimax is exact there.

**Hybrids.** Layers that are no attention are carried exactly where what they do is one of three things, found in the
traced graph by evaluating it (`passes/canonical/carry_state.py`): a window of the last inputs (short convolutions,
token shifts), a linear recurrence with a matrix as state (state-space duality, gated delta rule, linear attention
with decays that depend on the text or are a number for each head), or torch's associative scan of a linear
recurrence. Their state is an input and lies beside the cache, row by row; eviction concerns the attention layers
alone. "sites" counts attention layers. Loops over chunks are traced with a first, a middle and a last chunk; that
more chunks repeat the middle one is an assumption. Everything else that mixes tokens is refused, with the op and the
reason.

"found as": `interface` is transformers' attention interface; `sdpa`, `softmax` and `flex_attention` were found in the
traced graph. "difference" is the largest absolute difference of two logits, "largest" the largest logit, "s" the
seconds of the conversion on a busy CPU. "–": not in that version, or not measured with it yet (`--missing` goes on
where a run stopped).
"""

ROPES = """Each by the same criterion; where a row is a variant of its own, its logits also differ from those of the default RoPE
with the same weights, so that the row says something. transformers chooses the frequencies of dynamic and longrope by the
length of each call; here they are fixed for a request by its greatest length (`max_length`), and compared with the unmodified
model's on the whole text. mrope is traced with text alone; positions of images are an input of their own (docs/vision.md)."""

EXPERTS = """`experts_implementation` grouped_mm (transformers' default) and batched_mm are traced as they are; eager, a loop
over the experts that were hit, can't be traced, so it becomes grouped_mm. The comparison is with the eager loop each time.
Mixtures that have a loop of their own instead are refused (data-dependent control flow)."""


def versions() -> list[str]:
    """The versions of transformers that were measured, newest first."""
    found = [p.stem.removeprefix("coverage-") for p in RESULTS.glob("coverage-*.json")]
    return sorted(found, key=lambda v: [int(n) for n in v.split(".")[:3]], reverse=True)


def results_file(version: str) -> Path:
    """Where the outcomes of a transformers version are."""
    return RESULTS / f"coverage-{version}.json"


def read(version: str) -> Outcomes:
    """Name -> outcome; empty where a version was never measured."""
    path = results_file(version)
    return json.loads(path.read_text())["outcomes"] if path.exists() else {}


def write() -> None:
    """Writes the page."""
    PAGE.write_text("\n".join(_lines({v: read(v) for v in versions()})) + "\n")


def is_architecture(name: str) -> bool:
    """Whether `name` is a model type, and not a variant of one or a module that is not from transformers."""
    return name not in configs.VARIANTS and name not in ALL_MODULES


def _lines(all_outcomes: dict[str, Outcomes]) -> list[str]:
    lines = HEAD.format(versions=", ".join(all_outcomes)).splitlines()
    lines += [
        "",
        "| transformers | model types measured | exact | refused | no model | not right |",
        "|---|---|---|---|---|---|",
    ]
    for version, outcomes in all_outcomes.items():
        kinds = [o["status"] for n, o in outcomes.items() if is_architecture(n)]
        counts = [kinds.count(k) for k in ("exact", "refused", "no model")]
        cells = [version, len(kinds), *counts, len(kinds) - sum(counts)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for title, wanted in (
        ("Architectures", is_architecture),
        ("Variants", lambda n: n in configs.OTHERS),
        ("Not from transformers", lambda n: n in ALL_MODULES),
    ):
        lines += ["", f"## {title}", "", *_exact(all_outcomes, wanted)]
        if title == "Architectures":
            lines += [*_ropes(all_outcomes), *_experts(all_outcomes)]
    for status, title, text in (
        ("refused", "Refused", "With an error that says why, before anything runs."),
        (
            "no model",
            "No model",
            "The unmodified model does not run on token ids alone, or has no tiny configuration here.",
        ),
        ("other", "Not right", "Neither exact nor refused: defects."),
    ):
        lines += _reasons(all_outcomes, status, title, text)
    return lines


def _exact(all_outcomes: dict[str, Outcomes], wanted: Any) -> list[str]:
    head = " | ".join(f"difference {v} | s" for v in all_outcomes)
    lines = [f"| architecture | sites | found as | attention | RoPE | largest | {head} |"]
    lines.append("|---" * (6 + 2 * len(all_outcomes)) + "|")
    names = sorted({n for outcomes in all_outcomes.values() for n in outcomes if wanted(n)})
    for name in names:
        rows = [outcomes.get(name) for outcomes in all_outcomes.values()]
        exact = [o for o in rows if o and o["status"] == "exact"]
        if not exact:
            continue
        first = exact[0]
        cells = [name, first["sites"], first["found_as"], first["idiom"], first["rope"], f"{first['largest']:.2f}"]
        for o in rows:
            if o is None:
                cells += ["–", ""]
            elif o["status"] == "exact":
                cells += [f"{o['difference']:.1e}", f"{o['seconds']:.1f}"]
            else:
                cells += [o["status"], ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _ropes(all_outcomes: dict[str, Outcomes]) -> list[str]:
    lines = ["", "## RoPE types", "", *ROPES.splitlines(), ""]
    lines += [f"| RoPE | as in | {' | '.join(f'difference {v}' for v in all_outcomes)} |"]
    lines += ["|---" * (2 + len(all_outcomes)) + "|"]
    for kind, name in configs.ROPE_ROWS.items():
        rows = [outcomes.get(name) for outcomes in all_outcomes.values()]
        lines.append(f"| {kind} | {name} | {' | '.join(map(_difference, rows))} |")
    return lines


def _experts(all_outcomes: dict[str, Outcomes]) -> list[str]:
    lines = ["", "## Experts", "", *EXPERTS.splitlines(), ""]
    lines += [f"| model, loaded with | traced as | {' | '.join(f'difference {v}' for v in all_outcomes)} |"]
    lines += ["|---" * (2 + len(all_outcomes)) + "|"]
    for name in configs.EXPERTS:
        rows = [outcomes.get(name) for outcomes in all_outcomes.values()]
        traced = next((o["experts"] for o in rows if o and o.get("experts")), "–")
        lines.append(f"| {name} | {traced} | {' | '.join(map(_difference, rows))} |")
    return lines


def _difference(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "–"
    return f"{outcome['difference']:.1e}" if outcome["status"] == "exact" else outcome["status"]


def _reasons(all_outcomes: dict[str, Outcomes], status: str, title: str, text: str) -> list[str]:
    rows: dict[tuple[str, str], list[str]] = {}
    for version, outcomes in all_outcomes.items():
        for name, o in outcomes.items():
            kind = o["status"] if o["status"] in ("exact", "refused", "no model") else "other"
            if kind == status:
                reason = o["reason"] if status != "other" else f"{o['status']}: {o['reason']}"
                rows.setdefault((name, reason), []).append(version)
    if not rows:
        return []
    lines = ["", f"## {title}", "", text, "", "| architecture | transformers | because |", "|---|---|---|"]
    for (name, reason), found in sorted(rows.items()):
        lines.append(f"| {name} | {', '.join(found)} | {reason.replace('|', chr(92) + '|')[:360]} |")
    return lines
