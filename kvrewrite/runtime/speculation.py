"""Speculative decoding: a draft says what may come next, and the model checks several tokens in one pass.

The draft is most often the model itself with a small cache, which costs less to read. What comes out is what the model
alone would give, token by token; for sampling, it has the same distribution. One round: the draft proposes k tokens, one
pass appends them to the model's cache and gives k + 1 logits, those that the model would have chosen stay, one more follows,
and both caches take the rest back (kvrewrite/cache/rollback.py). The host waits for the device once a round.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kvrewrite.cache.eviction_cache import CACHE_NAME, EvictionCache
from kvrewrite.cache.rollback import why_never
from kvrewrite.errors import CacheError, InputError, OptionError
from kvrewrite.policies import UNLIMITED, Policy
from kvrewrite.runtime import acceptance
from kvrewrite.runtime.drafts import Draft, Drafted, LookupDraft, ModelDraft

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

LOOKUP = "prompt_lookup"
NGRAM = 3  # words at the end of the text that prompt lookup looks for, at most
# Processors of transformers that remember what they were called with, or call the model.
_STATEFUL = ("UnbatchedClassifierFreeGuidance", "SynthIDTextWatermark", "WhisperTimeStamp", "ClassifierFreeGuidance")


@dataclass
class Statistics:
    """What drafting brought. rounds: passes of the model after the prompt; drafted, accepted: tokens; tokens: of the answer."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float:
        """The part of the drafted tokens that stayed."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a pass of the model gave; 1 without a draft."""
        return (self.tokens - 1) / max(1, self.rounds)  # the first is the prompt's


class Speculator:
    """A model that answers with the help of a draft. Make one with `kvrewrite.speculate`.

    model: whose tokens come out; draft: a rewritten model with the same vocabulary, or "prompt_lookup"; tokens: how many are
    drafted a round. last: statistics of the last `generate`.
    """

    def __init__(self, model: RewrittenModel, draft: RewrittenModel | str, tokens: int = 5):
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise OptionError(f"tokens is {tokens!r}, expected how many tokens are drafted a round, at least 1")
        if isinstance(draft, str) and draft != LOOKUP:
            raise OptionError(f'draft is {draft!r}, expected a rewritten model, "self" or "{LOOKUP}"')
        if not isinstance(draft, str) and draft.program.vocab_size != model.program.vocab_size:
            raise OptionError(
                f"the draft has a vocabulary of {draft.program.vocab_size} tokens and the model one of "
                f"{model.program.vocab_size}; expected the same"
            )
        self.model, self.draft, self.tokens, self.last = model, draft, tokens, Statistics()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with the same arguments and the same tokens; of one text at a time.

        Beams, several sequences, `output_scores`, and logits processors that remember what they saw are refused
        (InputError), as are models whose cache can't take tokens back (CacheError).
        """
        for name in ("output_scores", "output_logits", "num_beams", "num_return_sequences", "assistant_model"):
            given = kwargs.get(name)
            if given is True or (given and given != 1):
                raise InputError(f"{name}={given!r} does not go together with a draft; leave one of them out")
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        if strings := kwargs.pop("stop_strings", None):
            if kwargs.get("tokenizer") is None:
                raise InputError("stop_strings need a tokenizer=")
            criteria.append(StopStringCriteria(kwargs["tokenizer"], strings))
        loop = functools.partial(self._loop, streamer=kwargs.get("streamer"))
        return self.model.generate(*args, custom_generate=loop, stopping_criteria=criteria, **kwargs)

    # -- the loop ------------------------------------------------------------------------------------------------------
    def _loop(self, model: Any, input_ids: Tensor, **given: Any) -> Any:
        """Called by transformers' `generate` once everything is prepared."""
        cache: EvictionCache = given[CACHE_NAME]
        kept = cache.windows_from is not None
        try:
            return self._rounds(model, input_ids, **given)
        finally:
            cache.keep_windows(kept)

    def _rounds(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The prompt, and rounds until the answer ends."""
        cache: EvictionCache = model_kwargs[CACHE_NAME]
        self._check(generation_config, logits_processor, input_ids, cache)
        self._check_embeds(model_kwargs.get("inputs_embeds"), cache)
        draws = bool(generation_config.do_sample)
        out = model._prefill(input_ids, generation_config, model_kwargs)
        model._update_model_kwargs_for_generation(out, model_kwargs)
        scores = logits_processor(input_ids, out.logits[:, -1].float())
        newest = torch.multinomial(scores.softmax(-1), 1) if draws else scores.argmax(-1, keepdim=True)
        text = torch.cat([input_ids, newest.to(input_ids)], 1)
        self.last = statistics = Statistics(tokens=1)
        if streamer is not None:
            streamer.put(newest[0].cpu())
        draft: Draft | None = None
        ended = bool(stopping_criteria(text, None).all())
        cache.keep_windows(True)
        while not ended:
            if draft is None:
                draft = self._start(cache, input_ids.shape[1], logits_processor, draws)
            count = max(0, min(self.tokens, generation_config.max_length - text.shape[1] - 1))
            drafted = draft.propose(text, count) if count else Drafted(text.new_empty(0))
            tried = torch.cat([text, drafted.tokens[None]], 1)
            begin, k = text.shape[1], len(drafted.tokens)
            logits = model(tried[:, begin - 1 :], cache=cache, generated=True).logits[0].float()
            if logits_processor:
                each = [logits_processor(tried[:, : begin + i], logits[i : i + 1]) for i in range(k + 1)]
                logits = torch.cat(each)
            if draws:
                verdict = acceptance.sampled(drafted.tokens, drafted.q, logits)
            else:
                verdict = acceptance.greedy(drafted.tokens, logits)
            new, accepted, ended = settle(text, drafted.tokens, verdict, stopping_criteria)
            text = torch.cat([text, new], 1)
            cache.crop(text.shape[1] - 1 - begin - k)
            draft.accepted(text.shape[1])
            statistics.rounds += 1
            statistics.drafted += k
            statistics.accepted += accepted
            statistics.tokens += new.shape[1]
            if streamer is not None:
                streamer.put(new[0].cpu())
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return text
        found: dict[str, Any] = {"sequences": text, CACHE_NAME: cache}
        return GenerateDecoderOnlyOutput(**found)

    def _start(self, cache: EvictionCache, columns: int, process: Any, draws: bool) -> Draft:
        """A draft that has read what the model's cache has. columns: of the text that `generate` was given."""
        if isinstance(self.draft, str):
            return LookupDraft(NGRAM)
        ids = cache.history.ids(cache.columns).to(self.draft.device)
        mask = torch.from_numpy(cache.history.real(cache.columns)).to(ids.device)
        own = cache.columns - columns
        return ModelDraft(self.draft, (ids, mask), cache.max_length, process, draws, own)

    def _check_embeds(self, embeds: Tensor | None, cache: EvictionCache) -> None:
        """Raises InputError where what drafts reads ids, and some tokens came as embeddings."""
        if isinstance(self.draft, str):
            return
        if embeds is not None or bool((cache.history.ids(cache.columns) < 0).any()):
            raise InputError(
                'a draft that is a model reads the text as ids, and some of it came as inputs_embeds; use draft="prompt_lookup", '
                "or generate without a draft"
            )

    def _check(self, config: Any, processors: Any, ids: Tensor, cache: EvictionCache) -> None:
        """Raises for what a draft can't do."""
        if len(ids) != 1 or cache.batch_size != 1 or (config.num_beams or 1) > 1:
            raise InputError(
                f"a draft helps one text at a time, because rows accept different numbers of tokens; got {len(ids)} rows and "
                f"{config.num_beams or 1} beams. Call generate once for each, or without a draft"
            )
        if config.output_scores or config.output_logits:
            raise InputError("output_scores and output_logits do not go together with a draft; leave them out")
        for processor in processors:
            name = type(processor).__name__
            if not from_transformers(processor) or name.startswith(_STATEFUL):
                raise InputError(
                    f"the logits processor {name} may remember what it was called with, and drafted tokens are tried and "
                    "taken back, so the answer would be another; leave it out, or generate without a draft"
                )
        if not cache.is_croppable:
            raise CacheError(
                f"{self.model.policy.name} can't be helped by a draft, whose rejected tokens have to be taken back: "
                f"{cache.why_never or 'it evicts while it generates'}. Use the full cache (policy full), or a policy that "
                "only adds what is generated (snapkv)"
            )


def from_transformers(what: Any) -> bool:
    """Whether a processor or criterion is one of transformers, which are known."""
    return type(what).__module__.startswith("transformers.")


# -- what a round leaves --------------------------------------------------------------------------
def settle(text: Tensor, drafted: Tensor, verdict: acceptance.Verdict, criteria: Any) -> tuple[Tensor, int, bool]:
    """What joins the text (1, n), how many of that were drafted, and whether it ends there. The only place that waits
    for the device: once, or twice where a criterion is not of transformers. Such a one may remember what it saw, so it
    is asked as in `generate`: about tokens that stay, in their order, up to the end."""
    place = torch.arange(len(drafted) + 1, device=drafted.device)
    last = torch.cat([drafted, verdict.token])
    new = torch.where(place < verdict.accepted, last, verdict.token)[None].to(text)
    whole, begin = torch.cat([text, new], 1), text.shape[1]
    asked = (criteria(whole[:, : begin + i + 1], None) for i in range(new.shape[1]))
    if all(from_transformers(criterion) for criterion in criteria):
        ends = torch.cat(list(asked))
        accepted, *stops = torch.cat([verdict.accepted[None], ends.to(drafted)]).tolist()
        ends_at = next((i + 1 for i in range(accepted + 1) if stops[i]), 0)
    else:
        accepted = int(verdict.accepted)
        ends_at = next((i + 1 for i, end in zip(range(accepted + 1), asked) if bool(end.all())), 0)
    count = ends_at or accepted + 1
    return new[:, :count], min(accepted, count), bool(ends_at)


# -- which model drafts for which ------------------------------------------------------------------------------------------
def with_policy(model: RewrittenModel, policy: Policy) -> RewrittenModel:
    """A view of a model that plans by another policy; its graph stays as it is, so that policies differ in budgets only."""
    return model.viewed(policy=policy)


def full_cache(model: RewrittenModel) -> RewrittenModel:
    """A view of a model that evicts nothing, so that it answers as the original. Raises OptionError where the policy's graph
    hides tokens whatever its budget is."""
    policy = model.policy
    why = why_never(model.program.layout, policy)
    if policy.head_pattern and why is None:
        why = f"heads of {policy.name} have windows of their own"
    if why is not None:
        raise OptionError(
            f"{policy.name} has no full cache to check drafts against: {why}. Transform the original with policy full and "
            "draft for that (kvrewrite.speculate)"
        )
    if not policy.evicts_ever:
        return model
    return with_policy(model, dataclasses.replace(policy, budget=UNLIMITED))


def self_draft(
    model: RewrittenModel, budget: int | float | None, policy: str | None, **options: Any
) -> tuple[Any, Any]:
    """(model, draft): a model with its full cache, and the same weights with a small one. A model that evicts drafts itself,
    with `budget` in the place of its own; one with policy full is rewritten once more, with `policy` (default snapkv)."""
    if model.policy.evicts_ever:
        if policy is not None or options:
            raise OptionError(
                f"the model evicts by {model.policy.name} and drafts by that; got {policy!r} and {options}. Leave the draft's "
                "policy and options out, or begin with the original or policy full"
            )
        small = model.policy if budget is None else dataclasses.replace(model.policy, budget=budget)
        return full_cache(model), with_policy(model, small)
    again: Callable[..., RewrittenModel] | None = model.__dict__.get("rewrite_again")
    if again is None:
        raise OptionError(
            "a model with policy full that was loaded from a directory has no small cache to draft with; load one that evicts "
            '(generate(draft="self") then checks its drafts against the full cache), or call kvrewrite.speculate(original)'
        )
    if budget is None:
        raise OptionError(
            "a draft of a model with policy full needs a budget (draft_budget=): how many tokens its cache keeps"
        )
    known: dict[Any, RewrittenModel] = model.__dict__.setdefault("_drafts", {})
    key = (policy, budget, *sorted(options.items()))
    if key not in known:
        known.clear()  # one at a time: each is a program of its own
        known[key] = again(policy or "snapkv", budget=budget, **options)
        if model.executor is not None and model.executor.options is not None:
            known[key].compile(**model.executor.options)
    return model, known[key]
