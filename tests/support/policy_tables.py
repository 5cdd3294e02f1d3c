"""The tables of policies in docs/, from the registry: `python -m tests.support.policy_tables` writes them into the pages."""

from __future__ import annotations

from pathlib import Path

from kvrewrite import policies
from tests.support.rewritten import ours

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- {}: written by python -m tests.support.policy_tables -->", "<!-- end -->"


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def in_order() -> list[type[policies.Policy]]:
    """The baseline, then policies that need no training, then the others, each in the registry's order."""
    return sorted(ours(), key=lambda p: (p.evicts_ever, p.needs_weights))


def policy_table() -> str:
    """All policies with what they say of themselves."""
    rows = []
    for policy in in_order():
        also = [alias for alias, name in policies.ALIASES.items() if name == policy.name]
        names = f"`{policy.name}`" + (f" ({', '.join(f'`{a}`' for a in also)})" if also else "")
        weights = "-" if not policy.needs_weights else policy.published or "yours (`kvrewrite train`)"
        rows.append([names, policy.summary, policy.evicts_when, policy.source, weights])
    return table(("policy", "what is kept", "evicts", "source", "trained weights"), rows)


def latent_table() -> str:
    """Which policies can keep latents of multi-head latent attention."""
    able, unable = (", ".join(f"`{p.name}`" for p in in_order() if p.latent_scores is can) for can in (True, False))
    both = "refused: the latent is key and value at once, and is cached rotated in part"
    rows = {
        "possible": able,
        "refused: made for the keys, values or budgets of single heads": f"{unable}, `head_budgets`",
        both: "`merge`, `quantize`, `positions=contiguous`",
    }
    return table(("with `mla=latent`", "policies and options"), [list(row) for row in rows.items()])


BLOCKS = {
    DOCS / "reference/policies.md": ("policies", policy_table),
    DOCS / "guide/latent_caches.md": ("policies on latents", latent_table),
}


def written(page: Path) -> str:
    """A page's text with its table as the registry has it."""
    name, make = BLOCKS[page]
    before, begin, rest = page.read_text().partition(BEGIN.format(name))
    _, end, after = rest.partition(END)
    assert begin and end, f"{page.name} has no block {BEGIN.format(name)} ... {END}"
    return f"{before}{begin}\n{make()}\n{end}{after}"


if __name__ == "__main__":
    for page in BLOCKS:
        page.write_text(written(page))
