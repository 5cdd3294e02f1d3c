"""Budgets of layers: what the option `layer_budgets` can say."""

from __future__ import annotations

NAMED = ("equal", "pyramid")


def layer_numbers(text: str) -> list[int] | None:
    """Slots of each layer ("96,64,32") as numbers; None where the text is not such a list."""
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        return None
    return [int(p) for p in parts]


def pyramid(budget: int, protected: int, tokens: int, layers: int, beta: int = 20) -> list[int]:
    """Layer budgets on a line from large to small (PyramidKV, arXiv 2406.02069; code Zefan-Cai/KVCache-Factory).

    With b = budget - protected: from 2b - b // beta (or all tokens) down in equal steps to b // beta, plus what is
    protected in every layer. Prompts of fewer than 2b tokens have equal budgets.
    """
    b = budget - protected
    if tokens < 2 * b or layers < 2:
        return [budget] * layers
    low = b // beta
    high = 2 * b - low
    if high > tokens - protected:
        high = tokens - protected
        low = 2 * b - high
    step = (high - low) // (layers - 1)
    return [protected + high - layer * step for layer in range(layers)]
