"""How a prompt is put together from a context and a question about it: one rule for `prompt_ids`, evaluation and training."""

from __future__ import annotations

from collections.abc import Sequence


def join_question(
    context: Sequence[int], question: Sequence[int], *, first: bool, bos: int | None, front: Sequence[int] | None = None
) -> list[int]:
    """The token ids of context and question, the question last.

    first: it also stands before the context (Locret-Q), after a BOS token that begins the context. front: what of the
    question stands there, default all of it.
    """
    context, question = list(context), list(question)
    if not first:
        return context + question
    lead = context[:1] if bos is not None and context[:1] == [bos] else []
    return [*lead, *(question if front is None else front), *context[len(lead) :], *question]
