"""Asks a rewritten model questions about contexts, greedily and in batches, and measures its cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from kvrewrite.errors import OptionError
from kvrewrite.policies import Policy
from kvrewrite.policies.question import join_question

SLACK = 4  # tokens that an answer may have beyond the expected ones

POINTS = ("context", "prompt")  # where the cache is measured: before and after the question


def question_first(policy: Policy, mode: str) -> bool:
    """Whether a policy's context begins with the question. Raises OptionError where such a one is measured blind."""
    if policy.question_first and mode == "blind":
        raise OptionError(
            f"{policy.name} puts the question before the context, so there is no blind mode; leave --mode blind out"
        )
    return policy.question_first


@dataclass(frozen=True)
class Question:
    """A sample in tokens. limit: most tokens of an answer; one_line: whether it ends with its first line."""

    sample: Any
    context: tuple[int, ...]
    question: tuple[int, ...]
    limit: int
    one_line: bool = True


@dataclass
class Held:
    """Sums over rows of what caches held at one point: tokens seen, live slots, and bytes (live, leased).

    heads: the live slots of each kv head, by layer.
    """

    rows: int = 0
    tokens: int = 0
    slots: int = 0
    live: int = 0
    leased: int = 0
    heads: dict[int, list[int]] = field(default_factory=dict)

    def add(self, cache: Any) -> None:
        """Adds what a cache holds now."""
        memory = cache.memory()
        self.rows += cache.batch_size
        self.tokens += sum(cache.seen)
        for layer, lens in cache.live_slots().items():
            found = lens.sum(dim=0).tolist()
            self.slots += sum(found)
            before = self.heads.get(layer, [0] * len(found))
            self.heads[layer] = [a + b for a, b in zip(before, found, strict=True)]
        self.live += memory.live
        self.leased += memory.leased

    def means(self) -> dict[str, Any]:
        """Returns means per row; heads: {layer number as text: the live slots of each kv head}."""
        rows = max(1, self.rows)
        found: dict[str, Any] = {name: getattr(self, name) / rows for name in ("tokens", "slots", "live", "leased")}
        return {**found, "heads": {str(layer): [x / rows for x in sums] for layer, sums in self.heads.items()}}


@dataclass
class Answers:
    """The answer to each question, in order, and what the caches held at each of `POINTS` (no rows: not measured)."""

    texts: list[str]
    held: dict[str, Held] = field(default_factory=lambda: {point: Held() for point in POINTS})


def encode(sample: Any, tokenizer: Any, at_least: int = 0, one_line: bool = True) -> Question:
    """Tokenizes a sample: context and question separately, so that both modes see the same ids.

    at_least: tokens that an answer may have; more if the expected one is longer in this tokenizer. one_line: whether an
    answer ends with its first line.
    """
    context = tokenizer(sample.context)["input_ids"]
    # Some tokenizers add an end-of-text token without saying so; a prompt must not end with one.
    while context and context[-1] == tokenizer.eos_token_id:
        context = context[:-1]
    question = tokenizer(sample.question, add_special_tokens=False)["input_ids"]
    reply = getattr(sample, "target", "") or " " + ", ".join(sample.answers)
    expected = tokenizer(reply, add_special_tokens=False)["input_ids"]
    return Question(sample, tuple(context), tuple(question), max(at_least, len(expected) + SLACK), one_line)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns ids (B, T) and mask (B, T), padded on the left."""
    width = max(1, max(len(r) for r in rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], dtype=torch.int64)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], dtype=torch.int64)
    return ids, mask


class _Watch(StoppingCriteria):
    """Ends rows whose answer is complete, and measures the cache once, when it holds exactly the prompt."""

    def __init__(self, tokenizer: Any, prompt: int, questions: Sequence[Question], cache: Any, held: Held):
        self.tokenizer, self.prompt, self.questions = tokenizer, prompt, questions
        self.cache, self.held, self.measured = cache, held, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.measured:
            self.measured = True
            self.held.add(self.cache)
        made = input_ids[:, self.prompt :].tolist()
        done = [
            len(ids) >= q.limit or (q.one_line and "\n" in self.tokenizer.decode(ids).lstrip())
            for ids, q in zip(made, self.questions)
        ]
        return torch.tensor(done, device=input_ids.device)


def _special(tokenizer: Any, model: Any) -> tuple[int, list[int]]:
    """Returns the id to pad with, and those that end a text."""
    ends = {tokenizer.eos_token_id}
    given = getattr(model.generation_config, "eos_token_id", None)
    ends.update(given if isinstance(given, list) else [given])
    stops = sorted(e for e in ends if e is not None)
    pad = tokenizer.pad_token_id
    return pad if pad is not None else stops[0] if stops else 0, stops


def generate(
    model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, cache: Any, questions: Sequence[Question], held: Held
) -> list[str]:
    """Generates greedy answers after `ids` (B, T); the cache may already hold the first columns.

    An answer is the first line that is not empty (or all, as its question says), up to the end-of-text token or the
    question's limit of tokens.
    """
    pad, stops = _special(tokenizer, model)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(q.limit for q in questions),
        pad_token_id=pad,
        eos_token_id=stops or None,
        use_cache=True,
    )
    watch = _Watch(tokenizer, ids.shape[1], questions, cache, held)
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        cache=cache,
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    texts = []
    for row, question in zip(out[:, ids.shape[1] :].tolist(), questions):
        made = row[: question.limit]
        end = next((i for i, token in enumerate(made) if token in stops), len(made))
        text = tokenizer.decode(made[:end], skip_special_tokens=True).strip()
        texts.append(text.split("\n", 1)[0].strip() if question.one_line else text)
    return texts


def prefill(model: Any, ids: Tensor, mask: Tensor, max_length: int) -> Any:
    """Returns a cache that holds a compressed context; the caller handles the policies' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.prefill(ids.to(model.device), mask.to(model.device), max_length=max_length)


def ask_aware(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: int, *, question_first: bool = False
) -> Iterator[tuple[int, Answers]]:
    """Puts context and question into one prompt, compressed as a whole. Yields (questions done, answers so far)."""
    answers = Answers([])
    pad, _ = _special(tokenizer, model)
    for at in range(0, len(questions), batch_size):
        batch = questions[at : at + batch_size]
        bos = tokenizer.bos_token_id
        rows = [join_question(q.context, q.question, first=question_first, bos=bos) for q in batch]
        ids, mask = pad_left(rows, pad)
        cache = model.new_cache(len(batch), max_length=ids.shape[1] + max(q.limit for q in batch))
        answers.texts += generate(model, tokenizer, ids, mask, cache, batch, answers.held["prompt"])
        yield len(answers.texts), answers


def ask_blind(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: int
) -> Iterator[tuple[int, Answers]]:
    """Compresses the context before its question is known; questions about the same context share its cache.

    Yields (questions done, answers so far).
    """
    answers = Answers([""] * len(questions))
    pad, _ = _special(tokenizer, model)
    about: dict[tuple[int, ...], list[int]] = {}
    for i, question in enumerate(questions):
        about.setdefault(question.context, []).append(i)
    groups, done = list(about.values()), 0
    for at in range(0, len(groups), batch_size):
        batch = groups[at : at + batch_size]
        contexts, context_mask = pad_left([questions[g[0]].context for g in batch], pad)
        longest = max(len(questions[i].question) + questions[i].limit for g in batch for i in g)
        cache = prefill(model, contexts, context_mask, contexts.shape[1] + longest)
        answers.held["context"].add(cache)
        rounds = max(len(g) for g in batch)
        for turn in range(rounds):
            # A row whose questions are all answered repeats its last one; the result is ignored.
            asked = [g[min(turn, len(g) - 1)] for g in batch]
            ids, mask = pad_left([questions[i].question for i in asked], pad)
            texts = generate(
                model,
                tokenizer,
                torch.cat([contexts, ids], 1),
                torch.cat([context_mask, mask], 1),
                cache if turn == rounds - 1 else cache.fork(),
                [questions[i] for i in asked],
                answers.held["prompt"],
            )
            for group, i, text in zip(batch, asked, texts):
                if turn < len(group):
                    answers.texts[i] = text
                    done += 1
        yield done, answers
