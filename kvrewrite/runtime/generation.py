"""What transformers' `generate` asks of a rewritten model: a cache, the inputs of a token, and refusals of what it
can't do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList

from kvrewrite.cache.eviction_cache import CACHE_NAME, EvictionCache
from kvrewrite.cache.rollback import only_appends, why_never
from kvrewrite.errors import CacheError, InputError, OptionError
from kvrewrite.ir.program import Program
from kvrewrite.policies import Policy
from kvrewrite.runtime.call import check_cache, check_ids_form
from kvrewrite.runtime.pins import Pin, pin_spans
from kvrewrite.runtime.row_ends import last_logits, padding_after
from kvrewrite.runtime.whole_prompts import check_chunk_size


class _Ending(StoppingCriteriaList):
    """Stopping criteria that tell a cache which rows have ended."""

    def __init__(self, criteria: StoppingCriteriaList, cache: EvictionCache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended, before = super().__call__(input_ids, scores, **kwargs), self.cache.ended
        self.cache.ended = ended if before is None else before | ended
        return ended


def drop_unsupported(own: GenerationConfig) -> None:
    """Takes out of a model's own generation config what `generate` would refuse though nobody passed it, with a
    word."""
    for name, off in (
        ("cache_implementation", None),
        ("prompt_lookup_num_tokens", None),
        ("output_attentions", False),
        ("output_hidden_states", False),
    ):
        if value := getattr(own, name, None):
            setattr(own, name, off)
            warnings.warn(
                f"the model's generation_config has {name}={value!r}, which a rewritten model does not support (it has a cache "
                "of its own, and returns logits alone); left out",
                stacklevel=3,
            )


def _new_alone(embeds: Tensor, mask: Tensor | None, cache: EvictionCache) -> dict[str, Tensor]:
    """What a cache has not seen of a text's embeddings (B, T, D), and a mask (B, T) of the whole text."""
    past = cache.columns
    if mask is None:
        real = torch.from_numpy(cache.history.real(past)).long().repeat_interleave(len(embeds) // cache.batch_size, 0)
        mask = torch.cat([real, real.new_ones(len(embeds), embeds.shape[1] - past)], 1).to(embeds.device)
    return {"inputs_embeds": embeds[:, past:], "attention_mask": mask}


def _as_new_tokens(given: dict[str, Any], seen: int) -> None:
    """Lengths of a text, in the arguments of `generate`, as numbers of new tokens: transformers would count the embeddings that
    it is given, and those are the new ones alone. seen: tokens of the text before the answer."""
    for length, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if given.get(length) is not None:
            asked = given.pop(length) - seen
            if given.get(new) is None:
                given[new] = asked


class Generation(GenerationMixin):
    """The part of a `RewrittenModel` that `generate` calls."""

    main_input_name = "input_ids"
    input_modalities = "text"  # pipelines print it
    _supports_cache_class = True
    base_model_prefix = ""

    policy: Policy
    program: Program
    device: Any
    cache_owners: Any
    new_cache: Callable[..., EvictionCache]
    columns: Callable[..., Tensor]
    sign: Callable[[Tensor], Tensor]

    @property
    def _is_stateful(self) -> bool:
        """Whether what transformers' assisted decoding and prompt lookup run, the prompt and first drafts in one pass, can't
        be taken back; it refuses them then."""
        return why_never(self.program.layout, self.policy) is not None or not only_appends(self.policy)

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: `generate_batch` and its manager keep pages of their own, in which nothing would be evicted."""
        raise CacheError(
            "continuous batching (generate_batch) has a paged cache of its own, and a rewritten model an EvictionCache; call "
            "generate with a padded batch"
        )

    @classmethod
    def is_remote_code(cls) -> bool:
        """No code comes from a hub."""
        return False

    def get_experts_implementation(self) -> dict[str, Any]:
        """Experts are part of the graph."""
        return {}

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: parameters that are tied are one in the graph. (lm-eval and accelerate ask every model.)"""

    def generate(
        self,
        *args: Any,
        cache: Any = None,
        past_key_values: Any = None,
        on_mismatch: str = "error",
        pin: Pin | None = None,
        draft: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' own `generate`. cache, or past_key_values: an EvictionCache of `new_cache`; both names with
        every version of transformers, which renamed it.

        inputs_embeds (B, T, D) may stand for the prompt, beside its ids or without; the ids that come back begin with those
        that were given. A cache that has seen tokens wants the whole text, which must begin with them, or the new ids (or
        embeddings) alone with an attention_mask (B, past + new). Where more rows are asked for than it has (questions about
        one text, beams, several sequences), generate works on a fork with that many rows, and the cache stays as it is. Rows
        that have ended pause: what fills them up does not go into the cache.

        on_mismatch: what is done with a text that does not begin with what the cache has seen. "error" raises InputError
        with the first token that differs (and its text, where generate is given a tokenizer); "recompute" goes back to
        the last prompt of a call with "recompute" that agrees, or to the beginning, and computes the text from there.

        pin: what stays whatever the policy says, as for `prefill`; a tensor is about the columns of the ids given.

        draft: what proposes tokens that one pass checks: "self" (draft_budget=, draft_policy=), "prompt_lookup" or a
        rewritten model; draft_tokens= a round (default 5). The answer is that of the full cache, so a model that evicts
        drafts with its own cache and is checked with a full one (docs/speculation.md).
        """
        if draft is not None:
            kwargs |= {"cache": cache, "past_key_values": past_key_values, "on_mismatch": on_mismatch, "pin": pin}
            return self._drafted(draft, *args, **kwargs)
        if on_mismatch not in ("error", "recompute"):
            raise InputError(f'on_mismatch is {on_mismatch!r}, expected "error" or "recompute"')
        if cache is not None and past_key_values is not None:
            raise InputError("got both cache and past_key_values, expected one of them: they are the same")
        given = past_key_values if cache is None else cache
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is not None:
            check_ids_form(ids)
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None:
            if isinstance(ids, Tensor) and isinstance(embeds, Tensor) and ids.shape != embeds.shape[:2]:
                raise InputError(
                    f"input_ids are {tuple(ids.shape)} and inputs_embeds {tuple(embeds.shape)}, expected the same rows and "
                    "tokens: given both, each embedding stands for the id at its place"
                )
            ids = self.columns(None, embeds)
        if given is None and pin is not None and isinstance(ids, Tensor):
            if self.program.layout.length_tables:
                raise InputError("pin= needs a cache=new_cache(max_length=...) here: RoPE depends on the text's length")
            given = self.new_cache(len(ids))
        if given is not None:
            kwargs[CACHE_NAME] = given
            check_cache(self, given, None)
            if on_mismatch == "recompute":
                self._go_back(ids, kwargs.get("attention_mask"), given)
            self._check_text(ids, kwargs.get("attention_mask"), given, kwargs.get("tokenizer"))
            if embeds is not None and self._is_text(ids, kwargs.get("attention_mask"), given):
                if (placed := kwargs.get("rope_positions")) is not None:
                    kwargs["rope_positions"] = placed[:, given.columns :]
                kwargs.update(_new_alone(embeds, kwargs.get("attention_mask"), given))
                _as_new_tokens(kwargs, embeds.shape[1])
            pin_spans(given, pin, ids, kwargs.get("attention_mask"))
        self._agree(ids)
        return super().generate(*args, **kwargs)

    def _drafted(self, draft: Any, *args: Any, **kwargs: Any) -> Any:
        """`generate` with a draft."""
        from kvrewrite.runtime.speculation import Speculator, full_cache, self_draft

        given = {name: kwargs.pop(f"draft_{name}", None) for name in ("budget", "policy")}
        tokens = kwargs.pop("draft_tokens", None)
        if draft != "self" and any(value is not None for value in given.values()):
            raise OptionError(f'draft_budget and draft_policy are those of draft="self"; got draft={draft!r}')
        model: Any = self
        pair = self_draft(model, **given) if draft == "self" else (full_cache(model), draft)
        return Speculator(*pair, *([] if tokens is None else [tokens])).generate(*args, **kwargs)

    def _agree(self, ids: Any) -> None:
        """The processes of a tensor-parallel model go on with the same ids and the same random numbers."""
        parallel = self.program.parallel
        if parallel is not None:
            from kvrewrite.runtime.parallel import check_same, share_chance

            if isinstance(ids, Tensor):
                check_same(ids.to(self.device), parallel.peers)
            share_chance(parallel.peers, self.device)

    @staticmethod
    def _is_text(ids: Any, mask: Any, cache: EvictionCache) -> bool:
        """Whether ids are a text that has to begin with what the cache holds, not the new ids alone. (Other faults are
        found where there is no cache, too.)"""
        if not cache.columns or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] % cache.batch_size:
            return False
        return not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == cache.columns + ids.shape[1])

    def _check_text(self, ids: Any, mask: Any, cache: EvictionCache, tokenizer: Any = None) -> None:
        """Refuses a text that does not go on from what the cache holds."""
        if self._is_text(ids, mask, cache):
            cache.history.check_text(ids, cache.columns, tokenizer, self.sign)

    def _go_back(self, ids: Any, mask: Any, cache: EvictionCache) -> None:
        """Takes a cache back to where a text agrees with it and has more, and has the end of this prompt marked, too."""
        if isinstance(ids, Tensor) and len(ids) != cache.batch_size:
            raise InputError(
                f'on_mismatch="recompute" changes the cache, which has {cache.batch_size} rows, and the text has {len(ids)}; '
                "fork() the cache and give the fork as many rows (batch_repeat_interleave)"
            )
        if self._is_text(ids, mask, cache):
            found = cache.history.first_difference(ids, cache.columns, self.sign)
            agree = ids.shape[1] - 1 if found is None else min(found[1], ids.shape[1] - 1)
            if agree < cache.columns:
                cache.roll_back(agree)
        cache.marking = True

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Called by `generate`: gives it an EvictionCache unless the caller brought one."""
        if getattr(generation_config, "cache_implementation", None) is not None:
            raise CacheError(
                f"cache_implementation={generation_config.cache_implementation!r}: a rewritten model has its own cache; "
                "leave cache_implementation out (of the call and of the generation_config that it was given)"
            )
        if generation_config.use_cache is False:
            raise CacheError("use_cache=False: a rewritten model always has its own cache; leave use_cache out")
        given = model_kwargs.get(CACHE_NAME)
        beams = generation_config.num_beams or 1
        rows = batch_size * max(beams, generation_config.num_return_sequences or 1)
        if given is None:
            cache = self.new_cache(rows, max_length=max_cache_length + 1)
        else:
            cache = given
            if cache.batch_size in (1, batch_size) and rows > cache.batch_size:
                cache, given.marking = given.fork(), False
                cache.batch_repeat_interleave(rows // cache.batch_size)
            check_cache(self, cache, rows)
        cache.ended = None
        model_kwargs[CACHE_NAME] = cache
        # Somebody may go on with the cache, which then should hold no padding.
        pauses = rows > 1 and beams == 1 and (given is not None or generation_config.return_dict_in_generate)
        generation_config._kvrewrite_pausing = cache if pauses else None
        self._check_prefill_chunks(generation_config.prefill_chunk_size, model_kwargs)

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by `generate`."""
        found = super()._get_stopping_criteria(generation_config, *args, **kwargs)  # type: ignore[misc]
        cache = generation_config.__dict__.pop("_kvrewrite_pausing", None)
        return found if cache is None else _Ending(found, cache)

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Called by `generate`: the prompt. The logits that it returns are those of each row's last token, wherever its padding
        is."""
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        new = embeds.shape[1] if embeds is not None else input_ids.shape[1]
        if embeds is None and mask is not None and mask.shape[1] == new:  # the whole text
            new -= model_kwargs[CACHE_NAME].columns
        after = padding_after(mask, new, generation_config.prefill_chunk_size)
        prefill: Any = GenerationMixin._prefill
        if after is None:
            return prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        model_kwargs["logits_to_keep"] = int(after.max()) + 1
        outputs = prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        model_kwargs["logits_to_keep"] = 1
        outputs.logits = last_logits(outputs.logits, after)
        return outputs

    def _check_prefill_chunks(self, size: int | None, model_kwargs: dict[str, Any]) -> None:
        """Refuses to cut a prompt that the policy needs whole, or one of embeddings."""
        if size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise InputError(
                f"prefill_chunk_size={size} cuts a prompt's ids, and this one came as inputs_embeds; leave prefill_chunk_size "
                "out (the model cuts prompts into its policy's segments by itself), or hand in pieces by calls of the model with "
                "inputs_embeds and cache="
            )
        cache, mask = model_kwargs[CACHE_NAME], model_kwargs.get("attention_mask")
        columns = mask if mask is not None else model_kwargs.get("position_ids")
        if size is None or columns is None or not self.policy.whole_prompt or any(cache.seen):
            return
        longest = columns.shape[-1] if mask is None else int(mask.sum(1).max())
        check_chunk_size(self.policy, self.cache_owners, size, columns.shape[-1], longest)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        generated: bool = False,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` calls the model with. After the prompt that is the newest token and the cache, nothing
        else."""
        if generated and next_sequence_length == 1:
            cache: EvictionCache = kwargs[CACHE_NAME]
            cache.history.follow(input_ids, cache.columns)
            chosen: dict[str, Any] = {"input_ids": input_ids[:, -1:], CACHE_NAME: cache, "generated": True}
            if cache.ended is not None and bool(cache.ended.any()):
                chosen["attention_mask"] = ~cache.ended[:, None]
            return chosen
        if inputs_embeds is not None:
            next_sequence_length = None  # `generate` has left only new ones
        found: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        return found

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Called by `generate` after every step. Every column from here on is a real token of every row and the cache
        counts positions, so masks and positions that grow with the text have served."""
        cache = model_kwargs[CACHE_NAME] = outputs[CACHE_NAME]
        if not model_kwargs.get("generated"):
            cache.end_prompt()
            if cache.marking:
                cache.checkpoint()
                cache.marking = False
        for name in ("attention_mask", "position_ids"):
            model_kwargs.pop(name, None)
        model_kwargs["generated"] = True
        return model_kwargs
