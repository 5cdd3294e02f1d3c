"""Chooses tokens: greedy rows together by one argmax, others as transformers' `generate` does, each with a seed of its own.

A row's token does not depend on the rows beside it: every sampling row draws from its own generator, and what works on
several rows at once either treats elements one by one or always runs on as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from kvrewrite.cache.pages import to_device
from kvrewrite.errors import OptionError

ROWS = 8  # warpers run on so many rows at a time on a GPU, where a scan's rounding may depend on how many there are
# Processors that look at a row's scores alone: rows with equal ones go together.
TOGETHER = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
)


def check_generation_config(config: Any) -> None:
    """Raises OptionError where a model's generation config asks for what a server of many requests does not do."""
    for name, off in (("num_beams", 1), ("guidance_scale", 1), ("num_return_sequences", 1), ("penalty_alpha", 0)):
        if (value := getattr(config, name, None)) not in (None, off, False):
            raise OptionError(
                f"the model's generation config has {name}={value!r}, which kvrewrite serve does not do; take it out of "
                "generation_config.json"
            )


@dataclass
class Logprobs:
    """Of one token: its log probability, and the likeliest tokens with theirs."""

    token: int
    value: float
    top: list[tuple[int, float]]


def _processors(model: Any, config: Any, prompt: int, device: torch.device) -> list[Any]:
    """transformers' processors of a generation config for a prompt of so many tokens."""
    model._prepare_special_tokens(config, True, device=device, batch_size=1)
    return list(model._get_logits_processor(config, prompt, logits_processor=[], device=device))


class Sampler:
    """How the tokens of one answer are chosen. prompt: its ids; most: tokens that the answer may have.

    ends: ids that end it. plain: whether it is nothing but the likeliest token.
    """

    def __init__(self, model: Any, request: Any, prompt: Sequence[int], most: int, index: int = 0):
        config, _ = model._prepare_generation_config(None, **request.sampling)
        if config.pad_token_id is None:
            config.pad_token_id = 0  # nothing is padded here
        config.max_length = len(prompt) + most
        # On the host, as long as no processor needs a tensor: a copy to a GPU waits for what that has still to do.
        self.processors = _processors(model, config, len(prompt), torch.device("cpu"))
        ends = getattr(config, "_eos_token_tensor", None)
        self.ends = set() if ends is None or request.ignore_eos else set(ends.reshape(-1).tolist())
        self.ends |= set(request.stop_ids)
        if model.device.type != "cpu" and any(isinstance(x, Tensor) for p in self.processors for x in vars(p).values()):
            self.processors = _processors(model, config, len(prompt), model.device)
        self.samples = bool(config.do_sample)
        alone = any(type(p) not in TOGETHER for p in self.processors)
        # Rows with equal keys go through their processors together; None: this one is alone.
        self.key = None if alone else str([(type(p).__name__, sorted(vars(p).items())) for p in self.processors])
        self.bias, self.frequency, self.presence = request.logit_bias, request.frequency, request.presence
        self.logprobs: int | None = request.logprobs
        self.plain = not (self.samples or self.processors or self.bias or self.frequency or self.presence)
        self.grammar: Any = None
        self.generator: torch.Generator | None = None
        if self.samples:
            self.generator = torch.Generator(model.device)
            if request.seed is None:
                self.generator.seed()
            else:
                # Answers to one prompt differ, and those of near seeds do, too.
                self.generator.manual_seed(
                    (request.seed + index * 0x9E3779B97F4A7C15) % (1 << 63) if index else request.seed
                )
        device, vocabulary = model.device, model.program.vocab_size
        self._ids = self._counts = self._bias = None
        if alone:
            self._ids = torch.zeros(1, len(prompt) + most, dtype=torch.int64, device=device)
            self._ids[0, : len(prompt)] = to_device(prompt, device)
        if self.frequency or self.presence:
            self._counts, self._one = torch.zeros(vocabulary, device=device), torch.ones(1, device=device)
        if self.bias:
            self._bias = torch.zeros(vocabulary, device=device)
            values = torch.tensor(list(self.bias.values()), dtype=torch.float32)
            self._bias[to_device(list(self.bias), device)] = to_device(values, device)
        self._prompt, self._length = len(prompt), len(prompt)

    def restart(self) -> None:
        """The answer is computed again: its tokens come once more."""
        self._length = self._prompt
        if self._counts is not None:
            self._counts.zero_()

    def note(self, token: Tensor) -> None:
        """Takes the token () that was chosen."""
        if self._ids is not None:
            self._ids[0, self._length] = token
        if self._counts is not None:
            self._counts.index_add_(0, token[None], self._one)
        self._length += 1

    def adjusted(self, logits: Tensor) -> Tensor:
        """The scores (1, vocabulary) fp32 of one row, before what rows share."""
        scores = logits.to(torch.float32, copy=True)
        if self._bias is not None:
            scores += self._bias
        if self._counts is not None:
            scores -= self.frequency * self._counts + self.presence * (self._counts > 0)
        if self.grammar is not None:
            self.grammar.mask(scores)
        if self.key is None:
            assert self._ids is not None
            for processor in self.processors:
                scores = processor(self._ids[:, : self._length], scores)
        return scores


@dataclass
class Chosen:
    """Tokens of some rows, on their way to the host. ids (rows,) int64 on the device."""

    ids: Tensor
    host: Tensor
    event: Any
    asked: list[int]  # rows whose log probabilities were asked for
    logprobs: Tensor | None

    def wait(self) -> tuple[list[int], list[bool], dict[int, Logprobs]]:
        """The tokens, whether each row's logits were finite, and log probabilities by row."""
        if self.event is not None:
            self.event.synchronize()
        ids, finite = self.host.tolist()
        found = {}
        if self.logprobs is not None:
            for row, (value, *rest) in zip(self.asked, self.logprobs.tolist()):
                half = len(rest) // 2
                found[row] = Logprobs(ids[row], value, [(int(i), v) for i, v in zip(rest[half:], rest[:half])])
        return ids, [bool(f) for f in finite], found


def choose(logits: Tensor, rows: Sequence[Sampler], forced: dict[int, int]) -> Chosen:
    """One token for each row. logits (rows, vocabulary); forced: rows whose token is known (an answer that is computed
    again), for which nothing is drawn."""
    ids = logits.argmax(-1)
    finite = logits.gather(-1, ids[:, None])[:, 0].isfinite()
    drawn = [i for i, row in enumerate(rows) if not (row.plain and row.grammar is None) and i not in forced]
    if drawn:
        ids[to_device(drawn, ids.device)] = _draw(logits, drawn, rows)
    if forced:
        at = to_device([[*forced], [*forced.values()]], ids.device)
        ids[at[0]] = at[1]
    for i, row in enumerate(rows):
        if not row.plain:
            row.note(ids[i])
    asked = [i for i, row in enumerate(rows) if row.logprobs is not None]
    logprobs = _logprobs(logits, asked, rows, ids) if asked else None
    host, event = _to_host(torch.stack([ids, finite.long()]), logprobs)
    return Chosen(ids, host[0], event, asked, host[1])


def _to_host(ids: Tensor, logprobs: Tensor | None) -> tuple[tuple[Tensor, Tensor | None], Any]:
    if ids.device.type != "cuda":
        return (ids, logprobs), None

    def sent(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    found = sent(ids), None if logprobs is None else sent(logprobs)
    event = torch.cuda.Event()
    event.record()
    return found, event


def _logprobs(logits: Tensor, asked: list[int], rows: Sequence[Sampler], ids: Tensor) -> Tensor:
    """(asked, 1 + 2 k) float64: of the token, of the k likeliest, and which these are."""
    at = to_device(asked, logits.device)
    most = max(rows[i].logprobs or 0 for i in asked)
    known = logits[at].float().log_softmax(-1)
    top = known.topk(most, dim=-1)
    return torch.cat([known.gather(-1, ids[at][:, None]).double(), top.values.double(), top.indices.double()], -1)


def _draw(logits: Tensor, drawn: list[int], rows: Sequence[Sampler]) -> Tensor:
    """Tokens (drawn,) of the rows that are not plain."""
    scores = [rows[i].adjusted(logits[i : i + 1]) for i in drawn]
    found = logits.new_empty(len(drawn), dtype=torch.int64)
    groups: dict[tuple[bool, str | None], list[int]] = {}
    for at, i in enumerate(drawn):
        groups.setdefault((rows[i].samples, rows[i].key), []).append(at)
    for (samples, key), members in groups.items():
        size = ROWS if logits.device.type == "cuda" else len(members)
        for begin in range(0, len(members), size):
            part = members[begin : begin + size]
            filled = part + [part[0]] * (size - len(part))
            joined = torch.cat([scores[at] for at in filled])
            if key is not None:
                for processor in rows[drawn[part[0]]].processors:
                    joined = processor(joined, joined)  # the ids, its first argument, do not matter to it
            if samples:
                joined = _race(joined, [rows[drawn[at]].generator for at in part])
            found[to_device(part, found.device)] = joined.argmax(-1)[: len(part)]
    return found


def _race(scores: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """Values whose largest is at a token drawn by the scores: what torch.multinomial does, with a generator per row."""
    probabilities = scores.nan_to_num(nan=0.0).softmax(-1)  # rows with NaN are refused later
    waits = torch.ones_like(probabilities)
    for row, generator in enumerate(generators):
        waits[row].exponential_(generator=generator)
    return probabilities / waits
