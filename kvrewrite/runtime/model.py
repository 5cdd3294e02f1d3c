"""The rewritten model: a program and its parameters behind the interface of a transformers causal LM."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvrewrite.cache.eviction_cache import CACHE_NAME, EvictionCache
from kvrewrite.cache.pages import PageStore, to_device
from kvrewrite.cache.request import Owner, exclusive
from kvrewrite.capture.third_party import AdapterWatch
from kvrewrite.errors import CacheError, InputError, OptionError, UnsupportedModelError
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.node_errors import failures_named
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import retarget_device
from kvrewrite.passes.lower.prompt import fold, lower_prefill
from kvrewrite.policies import Policy, RowState, Segment
from kvrewrite.policies import make as make_policy
from kvrewrite.policies.question import join_question
from kvrewrite.runtime.arguments import (
    COUNTED,
    check_arguments,
    check_columns,
    check_ids_form,
    check_logits_to_keep,
    check_tensor,
)
from kvrewrite.runtime.decode_graph import DecodeRunner, Settling, reason_against
from kvrewrite.runtime.loss import check_labels, with_loss
from kvrewrite.runtime.parts import Execution, Staged
from kvrewrite.runtime.pickling import program_of, program_state
from kvrewrite.runtime.prompt_graph import PrefillRunner
from kvrewrite.runtime.prompt_graph import reason_against as reason_against_chunks

SPAN_STEP = 4096  # graph input `span` is a multiple of this, and of an eighth of the power of two below it
# What may stand between token ids and the table of their embeddings.
_RESHAPING = {getattr(torch.ops.aten, n).default for n in ("view", "reshape", "clone", "alias", "unsqueeze", "squeeze")}
# Pipelines know the models that they support by class name and complain about any other.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("kvrewrite", "RewrittenModel")
RUNTIME = ("_execution", "_decoder", "_prefill_runner", "_stores", "_compile_options")  # what compile() makes


def on_its_device(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward with the model's GPU as the current one: Triton launches, streams and graphs belong to that."""

    @functools.wraps(forward)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        index = self.__dict__["_gpu"]
        if index is None or index == torch.cuda.current_device():
            return forward(self, *args, **kwargs)
        with torch.cuda.device(index):
            return forward(self, *args, **kwargs)

    return guarded


class _Ending(StoppingCriteriaList):
    """Stopping criteria that tell a cache which rows have ended."""

    def __init__(self, criteria: StoppingCriteriaList, cache: EvictionCache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended, before = super().__call__(input_ids, scores, **kwargs), self.cache.ended
        self.cache.ended = ended if before is None else before | ended
        return ended


def _drop_unsupported(own: GenerationConfig) -> None:
    """Takes out of a model's own generation config what `generate` would refuse though nobody passed it, with a word."""
    for name, off in (
        ("cache_implementation", None), ("prompt_lookup_num_tokens", None), ("output_attentions", False),
        ("output_hidden_states", False),
    ):  # fmt: skip
        if value := getattr(own, name, None):
            setattr(own, name, off)
            warnings.warn(
                f"the model's generation_config has {name}={value!r}, which a rewritten model does not support (it has a cache "
                "of its own, and returns logits alone); left out",
                stacklevel=3,
            )


def _unpickled(cls: type[RewrittenModel], program: dict[str, Any], rest: dict[str, Any]) -> RewrittenModel:
    """A model from what `RewrittenModel.__reduce_ex__` keeps."""
    training = rest.pop("training")
    return cls(program_of(program), **rest).train(training)


class RewrittenModel(nn.Module, GenerationMixin):
    """A decoder whose attention reads and writes an `EvictionCache`; driven by transformers' own `generate`.

    Made by `kvrewrite.transform` and `kvrewrite.load`. `forward` takes what a causal LM of transformers takes; prompts of
    any length are cut into the policy's segments inside. Rows may be padded anywhere. Threads may share a model: its steps run
    one after another.
    """

    main_input_name = "input_ids"
    input_modalities = "text"  # pipelines print it
    _is_stateful = True
    _supports_cache_class = True
    base_model_prefix = ""
    adapters: AdapterWatch | None
    loss_type = "ForCausalLM"  # Trainer counts labels by it

    def __init__(
        self,
        program: Program,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        source: Any = None,
        adapters: AdapterWatch | None = None,
    ):
        super().__init__()
        self.program = program
        self.owner = Owner()
        self.graph_module = program.graph
        self.config = copy.deepcopy(config)
        self.generation_config = copy.deepcopy(generation_config) or GenerationConfig.from_model_config(self.config)
        self.generation_config.use_cache = True  # the configurations of some models (MPT) say no
        _drop_unsupported(self.generation_config)
        self.policy: Policy = make_policy(program.policy["name"], **program.policy["options"])
        # What save_pretrained copies the original from; not a submodule, or it would move with this model.
        self.__dict__["source"] = source
        self.__dict__["adapters"] = adapters
        self.__dict__["_told_scores"] = False
        # Not submodules: they are the same graph.
        self.__dict__.update(dict.fromkeys(RUNTIME))
        # Tables that the compiler made lie on the CPU.
        if program.layout.devices is None:
            self.graph_module.to(self.device)
        else:
            self.__dict__["_staged"] = Staged(self.graph_module, program.layout.devices)
        self._note_gpu()
        self._rotary_graphs: list[Any] = [r.module(self.graph_module, self.device) for r in program.layout.rotary]
        self.eval()

    # -- copies --------------------------------------------------------------------------------------------------
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled without what `compile()` made: call it again on what comes out, which is a model of its own."""
        rest = {name: getattr(self, name) for name in ("config", "generation_config", "source", "adapters", "training")}
        return _unpickled, (type(self), program_state(self.program), rest)

    def __copy__(self) -> RewrittenModel:
        """A view of the same model, which takes its caches, too."""
        twin: RewrittenModel = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    @exclusive
    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModel:
        """A model of its own, compiled if `compile()` made this one so. Caches stay with the model that they were made for."""
        twin = memo[id(self)] = object.__new__(type(self))
        kept = {name: value for name, value in self.__dict__.items() if name not in RUNTIME}
        twin.__dict__.update(copy.deepcopy(kept, memo), **dict.fromkeys(RUNTIME))
        if self.__dict__["_compile_options"] is not None:
            twin.compile(**self.__dict__["_compile_options"])
        return twin

    # -- what transformers asks a model --------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """The device of the parameters; of a model on several, that of the inputs and the logits."""
        devices = self.program.layout.devices
        if devices is not None:
            return torch.device(devices.inputs)
        return next(self.graph_module.parameters()).device

    def _note_gpu(self) -> None:
        """Remembers the number of the model's GPU, if it has one: looking the device up takes microseconds at every token."""
        device = self.device
        self.__dict__["_gpu"] = device.index if device.type == "cuda" else None

    @property
    def on_one_device(self) -> bool:
        """Whether all layers and their caches lie on one device."""
        return self.program.layout.devices is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model was captured in."""
        return getattr(torch, self.program.dtype)

    @property
    def name_or_path(self) -> str:
        """Where the tokenizer is: the model's directory, or where the original came from (lm-eval looks there)."""
        if isinstance(self.source, Path):
            return str(self.source)
        return str(getattr(self.config, "_name_or_path", ""))

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

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the weights have, those of the policy included; none is trainable."""
        counted = {id(p): p for p in self.parameters() if p.requires_grad or not only_trainable}
        for node in self.graph_module.graph.nodes if exclude_embeddings else ():
            if node.target is torch.ops.aten.embedding.default and node.args[0].op == "get_attr":
                counted.pop(id(get_attr(self.graph_module, node.args[0].target)), None)
        return sum(p.numel() for p in counted.values())

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, and of the tables that the graph reads. Caches have a `memory()` of their own."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(x.numel() * x.element_size() for x in held)

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings, whose weight is the graph's own parameter. A factor that some models (Gemma) put on
        them is part of the graph. Raises UnsupportedModelError where tokens are not looked up in one table."""
        for node in self.graph_module.graph.nodes:
            if node.target is not torch.ops.aten.embedding.default:
                continue
            table, ids = node.args[:2]
            while ids.target in _RESHAPING:
                ids = ids.args[0]
            if table.op == "get_attr" and ids.op == "placeholder" and ids.target == "input_ids":
                weight = get_attr(self.graph_module, table.target)
                found = nn.Embedding.from_pretrained(weight)
                found.weight = weight  # the same object, not another one over its storage
                return found
        raise UnsupportedModelError("the model's graph does not look tokens up in one table")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused: the size of the vocabulary is part of the graph."""
        raise InputError(
            "a rewritten model can't change its vocabulary, which is part of its graph; resize the original and transform that"
        )

    @property
    def sites(self) -> list[Any]:
        """The rewritten attention sites."""
        return self.program.sites

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> RewrittenModel:
        """`.to(device)`, `.cuda()` and so on; the dtype is part of the graph and can't change."""
        sample = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if sample.dtype != self.dtype:
            raise InputError(
                f"the model was captured in {self.dtype} and can't become {sample.dtype}: casts are part of its graph. Load "
                "the original in the dtype that you want and transform that"
            )
        ready = self.__dict__["_execution"] is not None and self.__dict__["_compile_options"] is None
        if ready and sample.device != self.device:
            raise InputError(
                f"the model runs steps that were compiled for {self.device} and can't move to {sample.device} with them; call "
                "model.uncompile() first, or load it there"
            )
        if not self.on_one_device:
            places = {p.device for p in self.graph_module.parameters()}
            if any(fn(torch.empty(0, dtype=self.dtype, device=p)).device != p for p in places):
                raise InputError(
                    f"the model lies on {', '.join(sorted(map(str, places)))} and can't be moved; transform the original where "
                    "it should be"
                )
        super()._apply(fn, recurse)
        for graph in self._rotary_graphs:
            graph._apply(fn)
        for graph in (self.graph_module, *self._rotary_graphs) if self.on_one_device else ():
            retarget_device(graph, sample.device)
        self._note_gpu()
        if self.__dict__["_compile_options"] is not None:
            self.compile(**self.__dict__["_compile_options"])
        return self

    # -- compile -------------------------------------------------------------------------------------------------
    @exclusive
    def compile(self, *, static_decode: bool | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Compiles the model with torch.compile (options as there); layers that repeat are compiled once. Planning and caches
        stay in Python.

        static_decode: single tokens run from static buffers, on CUDA as one captured graph a step; default: on CUDA. Caches
        made from then on lease pages from pools that belong to the model, so that new requests replay what was captured, also
        the chunks of a prompt without logits that have the same shape (`kvrewrite/runtime/prompt_graph.py`).
        A policy for which that is not possible decodes through compiled parts instead, and a warning says why. Locret's heads
        are folded into one linear layer of the hidden states; compile again after a change of weights.
        """
        if not self.on_one_device:
            raise InputError(
                "a model on several devices can't be compiled: parts that repeat are compiled once, for one device, and a CUDA "
                "graph belongs to one. It runs op by op; load it on one device to compile it"
            )
        self.uncompile()
        options = {"fullgraph": True, **kwargs}

        def compiler(part: fx.GraphModule) -> Callable[..., Any]:
            return torch.compile(part, **options)

        self.__dict__["_compile_options"] = {"static_decode": static_decode, **kwargs}
        folded = fold(self.graph_module)
        self.__dict__["_execution"] = Execution(lower_prefill(folded), compiler)
        on_cuda = self.device.type == "cuda"
        if static_decode is False or (static_decode is None and not on_cuda):
            return
        reason = reason_against(self.program, self.policy, self.device)
        if reason:
            warnings.warn(f"decoding is compiled, but not captured as a whole: {reason}", stacklevel=2)
            return
        self.__dict__["_decoder"] = DecodeRunner(self, folded, compiler, capture=on_cuda)
        if not reason_against_chunks(self.program, self.policy, self.device):
            self.__dict__["_prefill_runner"] = PrefillRunner(self.__dict__["_execution"], capture=on_cuda)

    @exclusive
    def uncompile(self) -> None:
        """Back to running op by op, also from steps that were loaded compiled. Captured graphs and the model's pools are dropped
        with the last cache that uses them."""
        decoder: DecodeRunner | None = self.__dict__.get("_decoder")
        if decoder is not None:
            decoder.release()
        self.__dict__.update(dict.fromkeys(RUNTIME))

    @property
    def decoder(self) -> DecodeRunner | None:
        """What runs single tokens from static buffers, if anything does."""
        found: DecodeRunner | None = self.__dict__["_decoder"]
        return found

    @property
    def prefill_runner(self) -> PrefillRunner | None:
        """What runs chunks of prompts from static buffers, if anything does."""
        found: PrefillRunner | None = self.__dict__["_prefill_runner"]
        return found

    def shared_stores(self) -> list[PageStore] | None:
        """The pools that this model's caches lease from, one for each cache class; None where each cache has its own."""
        if self.decoder is None:
            return None
        if self.__dict__["_stores"] is None:
            layout = self.program.layout
            self.__dict__["_stores"] = [
                PageStore(spec.k_dim, spec.v_dim, self.dtype, self.device, layout.scheme, lasting=True)
                for spec in layout.classes
            ]
        stores: list[PageStore] = self.__dict__["_stores"]
        return stores

    # -- caches --------------------------------------------------------------------------------------------------
    @exclusive
    def new_cache(self, batch_size: int = 1, *, max_length: int | None = None) -> EvictionCache:
        """An empty cache for `batch_size` rows; max_length: tokens that a row will have in all, where RoPE depends on it."""
        return EvictionCache(self, batch_size, max_length=max_length)

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_length: int | None = None
    ) -> EvictionCache:
        """Runs a prompt (B, T) into a new cache and returns it, for questions that come later: fork it for each.

        Warns where the policy keeps what the end of the prompt attends to: there the question belongs into the prompt.
        """
        if self.policy.needs_question:
            warnings.warn(
                f"{self.policy.name} keeps what the end of the prompt asks for; compressed without the question, a text may "
                "lose its answer. Put the question into the prompt (prompt_ids), or use a policy that needs none "
                "(keydiff, expected_attention, knorm, locret, streaming_llm)",
                stacklevel=2,
            )
        check_ids_form(input_ids)
        cache = self.new_cache(input_ids.shape[0], max_length=max_length)
        self(input_ids, attention_mask=attention_mask, past_key_values=cache, logits_to_keep=1)
        cache.end_prompt()
        return cache

    def prompt_ids(self, context_ids: Tensor, question_ids: Tensor, *, bos_token_id: int | None = None) -> Tensor:
        """A prompt (B, T) from a context and a question about it (without special tokens), in the order that the policy
        wants: the question last, and with locret_q in front, too, behind a BOS token that begins the context.

        bos_token_id: default: the configuration's.
        """
        if bos_token_id is None:
            bos_token_id = getattr(self.config, "bos_token_id", None)
        rows = [
            join_question(context, question, first=self.policy.question_first, bos=bos_token_id)
            for context, question in zip(context_ids.tolist(), question_ids.tolist(), strict=True)
        ]
        return torch.tensor(rows, dtype=context_ids.dtype, device=context_ids.device)

    def length_tables(self, max_length: int | None) -> dict[str, Tensor]:
        """Rotary frequencies for requests of up to `max_length` tokens (None: as long as the model goes)."""
        tables = {}
        for table in self.program.layout.length_tables:
            kind = "short" if max_length is not None and max_length <= table.threshold else "long"
            found = get_attr(self.graph_module, f"length_tables.{table.index}.{kind}")
            tables[table.input] = found.to(self.device)  # those of a model on several devices lie on the CPU
        return tables

    def make_rotary(self, length: int, tables: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """cos and sin (length, D) of each rotation."""
        positions = torch.arange(length, device=self.device)
        made = []
        for graph, entry in zip(self._rotary_graphs, self.program.layout.rotary):
            with failures_named(self.source):
                made.append(graph(positions, *(tables[name] for name in entry.length_tables)))
        return made

    def generate(self, *args: Any, cache: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        """transformers' own `generate`. cache, or past_key_values: an EvictionCache of `new_cache`; both names with every
        version of transformers, which renamed it.

        A cache that has seen tokens wants the whole text, which must begin with them, or the new ids alone with an
        attention_mask (B, past + new). Where more rows are asked for than it has (questions about one text, beams, several
        sequences), generate works on a fork with that many rows, and the cache stays as it is. Rows that have ended pause: what
        fills them up does not go into the cache.
        """
        if cache is not None and past_key_values is not None:
            raise InputError("got both cache and past_key_values, expected one of them: they are the same")
        given = past_key_values if cache is None else cache
        if given is not None:
            kwargs[CACHE_NAME] = given
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is not None:
            check_ids_form(ids)
        if given is not None:
            self._check_cache(given, None)
            self._check_text(ids, kwargs.get("attention_mask"), given)
        return super().generate(*args, **kwargs)

    @staticmethod
    def _check_text(ids: Any, mask: Any, cache: EvictionCache) -> None:
        """Refuses a text that does not go on from what the cache holds. (Other faults are found where there is no cache, too.)"""
        if not cache.columns or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] % cache.batch_size:
            return
        width = ids.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == cache.columns + width:
            return  # new ids alone
        cache.history.check_text(ids, cache.columns)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
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
                cache = given.fork()
                cache.batch_repeat_interleave(rows // cache.batch_size)
            self._check_cache(cache, rows)
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

    def _check_prefill_chunks(self, size: int | None, model_kwargs: dict[str, Any]) -> None:
        """The same as `_check_pieces`, before the first piece has run."""
        cache, mask = model_kwargs[CACHE_NAME], model_kwargs.get("attention_mask")
        columns = mask if mask is not None else model_kwargs.get("position_ids")
        if size is None or columns is None or not self.policy.whole_prompt or any(cache.seen):
            return
        longest = columns.shape[-1] if mask is None else int(mask.sum(1).max())
        if columns.shape[-1] > size and self.policy.evicts(self.policy.plan(longest), self.cache_owners):
            raise CacheError(
                f"prefill_chunk_size={size} would cut the prompt of {longest} tokens, but {self.policy.name} evicts once, from a "
                f"row's first prompt as a whole, and would keep the pieces whatever its budget ({self.policy.budget}). Leave "
                "prefill_chunk_size out (whole keys and values are alive in one layer at a time), or use a policy that evicts "
                "between chunks (tova, h2o, keydiff, locret)"
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, generated: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """What `generate` calls the model with. After the prompt that is the newest token and the cache, nothing else."""
        if generated and next_sequence_length == 1:
            cache: EvictionCache = kwargs[CACHE_NAME]
            cache.history.follow(input_ids, cache.columns)
            chosen: dict[str, Any] = {"input_ids": input_ids[:, -1:], CACHE_NAME: cache, "generated": True}
            if cache.ended is not None and bool(cache.ended.any()):
                chosen["attention_mask"] = ~cache.ended[:, None]
            return chosen
        found: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **kwargs
        )
        return found

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Called by `generate` behind every step. Every column from here on is a real token of every row and the cache counts
        positions, so masks and positions that grow with the text have served."""
        cache = model_kwargs[CACHE_NAME] = outputs[CACHE_NAME]
        if not model_kwargs.get("generated"):
            cache.end_prompt()
        for name in ("attention_mask", "position_ids"):
            model_kwargs.pop(name, None)
        model_kwargs["generated"] = True
        return model_kwargs

    def _check_cache(self, cache: Any, batch: int | None) -> None:
        if not isinstance(cache, EvictionCache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}, expected an EvictionCache from this model's new_cache()"
            )
        if cache.owner is not self.owner:
            raise CacheError(
                "the cache belongs to another model (a copy of a model is another one); make one with this model's new_cache()"
            )
        cache.check_finished()
        if batch is not None and cache.batch_size != batch:
            raise CacheError(
                f"the cache is for batch size {cache.batch_size}, but the input has {batch} rows; rows that go on from one text "
                "come of cache.fork() and batch_repeat_interleave(n) of that"
            )
        if cache.device != self.device:
            raise CacheError(f"the cache is on {cache.device}, the model on {self.device}")

    # -- forward -------------------------------------------------------------------------------------------------
    @exclusive
    @on_its_device
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EvictionCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: EvictionCache | None = None,
        generated: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs new tokens through the model and its cache.

        input_ids: (B, T) int64, rows padded anywhere according to attention_mask (B, past + T) or (B, T), 1 for real tokens. Its
        past must be what the cache was given; columns in which a row paused (0 then) may be 1 at last, and go in before the new
        ones. One token on a row that has some is decoding, more are a prompt.
        position_ids are counted by the cache; given ones must agree. logits_to_keep: how many of the last columns to
        return logits for, 0 for all. cache: another name for past_key_values. generated: the ids were chosen from this model's
        own logits (`generate` says so), so they are not looked at, which would stall a GPU at every token. labels: (B, T) int64,
        -100 where none is wanted; the result has a `loss` then, the mean cross entropy of each label given the column before
        it, its sum divided by num_items_in_batch if that is given. Returns logits (B, T or logits_to_keep, vocabulary), zero at
        padding, and the cache. Logits are made before the eviction that follows their segment of the prompt.

        Raises InputError, CacheError, and ArgumentError (a TypeError) for arguments that it does not know.
        """
        check_arguments(kwargs, RewrittenModel.forward)
        if self.adapters is not None and not generated:
            self.adapters.check()
        if torch.compiler.is_exporting():
            raise InputError(
                "torch.export got a rewritten model, whose forward plans evictions in Python; export its steps: "
                "kvrewrite.runtime.exported.export_steps(model)"
            )
        check_ids_form(input_ids)
        assert input_ids is not None
        check_tensor("attention_mask", attention_mask)
        check_tensor("position_ids", position_ids)
        check_logits_to_keep(logits_to_keep)
        if labels is not None:
            check_labels(labels, input_ids, logits_to_keep, self.training)
        batch, width = input_ids.shape
        if cache is not None and past_key_values is not None:
            raise InputError("got both cache and past_key_values, expected one of them: they are the same")
        cache = past_key_values if cache is None else cache
        plain = attention_mask is None and labels is None and not kwargs
        if self.decoder is not None and plain and self.decoder.has_planned(input_ids, cache):
            if not generated:
                self._check_ids(input_ids, decoding=True)
            assert cache is not None
            cache.begin_step()
            logits = self.decoder.planned_step(input_ids, cache)
            cache.record(input_ids, None, generated)
            return self._output(logits, cache, use_cache, return_dict)
        scores = cache is None or labels is not None
        if cache is None:
            # Where RoPE depends on the length, a call without a cache is as long as it is, as in the original model.
            cache = self.new_cache(batch, max_length=width)
        self._check_cache(cache, batch)
        ids, where, real = self._new_tokens(input_ids, attention_mask, cache)
        counts = [len(columns) for columns in where]
        # Row by row, by its real tokens, so that a row does not depend on what else is in the batch.
        # One that pauses keeps its ranks, too.
        decoding = [n <= 1 and seen > 0 for n, seen in zip(counts, cache.seen)]
        check_columns(kwargs.get(COUNTED), cache.columns, width)
        self._check_input(position_ids, where, ids.shape[1] - width, cache, decoding)
        self._check_pieces(counts, cache, decoding)
        if not generated:
            self._check_ids(input_ids, all(decoding))
        if scores and logits_to_keep != 1:
            self._warn_of_scores(counts, cache)
        cache.begin_step()
        if self.decoder is not None and ids.shape[1] == 1 and all(decoding) and all(counts):
            segments = [self.policy.decode_segment(cache.row(row)) for row in range(batch)]
            logits = self.decoder.step(input_ids, cache, segments)
        else:
            if cache.keys_settled:
                Settling(self).undo(cache)  # also where the model is not compiled any more
            cache.ranks_held = False
            columns = width if logits_to_keep == 0 else min(logits_to_keep, width)
            logits = self._run_segments(ids, where, cache, decoding, columns)
        cache.record(input_ids, real, generated)
        out = self._output(logits, cache, use_cache, return_dict)
        return out if labels is None else with_loss(out, logits, labels, attention_mask, num_items_in_batch)

    @staticmethod
    def _output(logits: Tensor, cache: EvictionCache, use_cache: bool | None, return_dict: bool | None) -> Any:
        keep_cache = use_cache is not False
        if return_dict is False:
            return (logits, cache) if keep_cache else (logits,)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache if keep_cache else None})  # type: ignore[arg-type]

    def _check_pieces(self, counts: list[int], cache: EvictionCache, decoding: list[bool]) -> None:
        """A policy that evicts once needs a row's first prompt whole: of pieces it would keep everything, whatever its budget.
        (More of a prompt that fits the budget is right, because nothing goes.)"""
        if not self.policy.whole_prompt:
            return
        for row, n in enumerate(counts):
            seen = cache.seen[row]
            if not n or not seen or decoding[row] or cache.prompted[row]:
                continue
            if cache.generated[row]:
                cache.prompted[row] = True  # what follows an answer is another prompt
            elif self.policy.evicts(self.policy.plan(seen + n), self.cache_owners):
                raise CacheError(
                    f"row {row} gets {n} more tokens of a prompt after {seen}, before any token was generated, but "
                    f"{self.policy.name} evicts once, from a row's first prompt as a whole, and would keep the pieces whatever "
                    f"its budget ({self.policy.budget}). Pass the prompt in one call (generate without prefill_chunk_size), or "
                    "use a policy that evicts between chunks (tova, h2o, keydiff, locret). If the first part is a text of its "
                    "own that is asked about, make its cache with model.prefill(text), or say so with cache.end_prompt()"
                )

    @property
    def cache_owners(self) -> int:
        """How many layers own a cache."""
        return self.program.layout.owners

    def _warn_of_scores(self, counts: list[int], cache: EvictionCache) -> None:
        """Warns once where logits of several columns are asked for, the policy evicts, and no column's logits can show it."""
        if self.__dict__["_told_scores"]:
            return
        for n, seen in zip(counts, cache.seen):
            plan = self.policy.plan(n) if n > 1 and not seen else []
            whole, before_last = (self.policy.evicts(part, self.cache_owners) for part in (plan, plan[:-1]))
            if whole and not before_last:
                self.__dict__["_told_scores"] = True
                warnings.warn(
                    f"{self.policy.name} evicts after the logits of this call ({n} tokens in one piece), so a loss, a perplexity "
                    f"or log-likelihoods made of them are those of the full cache. To score under eviction, {self._scoring()} "
                    "(docs/measuring.md; said once)",
                    stacklevel=2,
                )

    def _scoring(self) -> str:
        """How a text is scored under eviction with this policy."""
        prefill = "score what follows a context on the cache that model.prefill(context) returns"
        try:
            dataclasses.replace(self.policy, chunk=1)
        except OptionError:
            return prefill
        return f"transform with chunk=1 (every token then sees what was kept before it), or {prefill}"

    def _new_tokens(
        self, ids: Tensor, mask: Tensor | None, cache: EvictionCache
    ) -> tuple[Tensor, list[np.ndarray], np.ndarray | None]:
        """What a call gives each row: the ids with, in front of them, columns that a row has still to be given; the columns of
        each row's real tokens among them; and what is real from then on, (rows, columns) bool, None where all that is new is."""
        batch, width = ids.shape
        if mask is None:
            return ids, [np.arange(width)] * batch, None
        past = cache.columns
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (width, past + width):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {past + width}) or ({batch}, {width})"
            )
        given = mask.to(torch.bool).cpu().numpy()
        new, first = given[:, given.shape[1] - width :], past
        if given.shape[1] > width:
            first = cache.history.late(given[:, :past], past)
        if first == past and new.all():
            return ids, [np.arange(width)] * batch, None
        before = cache.history.real(past)
        after = np.concatenate([before, new], 1)
        if first < past:
            ids = torch.cat([cache.history.ids(past)[:, first:].to(ids), ids], 1)
            after = given
            new = np.concatenate([given[:, first:past] & ~before[:, first:], new], 1)
        return ids, [np.flatnonzero(row) for row in new], after

    def _check_ids(self, ids: Tensor, decoding: bool) -> None:
        """Single tokens on a GPU are not looked at: that would stall it."""
        if ids.numel() and not (decoding and ids.is_cuda):
            low, high = torch.stack(torch.aminmax(ids)).tolist()
            if low < 0 or high >= self.program.vocab_size:
                raise InputError(
                    f"token ids reach from {low} to {high}, expected 0 to {self.program.vocab_size - 1}; does the tokenizer "
                    "belong to this model?"
                )

    def no_room(self, cache: EvictionCache, row: int, count: int, decoding: bool) -> Exception | None:
        """Why a row can't take `count` more tokens, if it can't."""
        limit, total = self.program.max_positions, cache.seen[row] + count
        reach = self._reach(cache, row, count, decoding)
        if limit is not None and reach > limit:
            return InputError(
                f"row {row} would reach position {reach - 1}, but the model has {limit} positions; expected at most "
                f"{limit} tokens at a time (a table of positions can't be extended)"
            )
        if self.policy.name == "full" and total > self.policy.slots(total):
            return CacheError(
                f"row {row} would hold {total} tokens, but the full cache's capacity (budget) is {self.policy.budget}; "
                "use a larger budget or a policy that evicts"
            )
        return None

    def _check_input(
        self,
        position_ids: Tensor | None,
        where: list[np.ndarray],
        late: int,
        cache: EvictionCache,
        decoding: list[bool],
    ) -> None:
        """where: columns of each row's real tokens, of which `late` come before those that positions are given for."""
        for row, columns in enumerate(where):
            problem = self.no_room(cache, row, len(columns), decoding[row])
            if problem is not None:
                raise problem
        if position_ids is not None and not all(decoding):
            rows = position_ids.expand(len(where), -1).cpu().numpy()
            for row, columns in enumerate(where):
                new = columns >= late
                expected = (cache.seen[row] + np.arange(len(columns)))[new]
                got = rows[row, columns[new] - late]
                if not np.array_equal(got, expected):
                    paused = (
                        "; in this row some columns were padding, which attention_mask (batch, past + new) should say"
                    )
                    raise InputError(
                        f"position_ids of row {row} are {got[:8].tolist()}..., expected {expected[:8].tolist()}...: positions "
                        "are counted by the cache; leave position_ids out"
                        + (paused if cache.seen[row] < cache.columns else "")
                    )

    def _reach(self, cache: EvictionCache, row: int, count: int, decoding: bool) -> int:
        """One more than the largest position that `count` new tokens of a row will have."""
        if not self.program.layout.contiguous:
            return cache.seen[row] + count
        if decoding and cache.settled[row] and not self.policy.renews_ranks_in_decoding:
            return cache.next_rotary[row] + count
        kept, reach = cache.length[row], 0
        for segment in self._plan(count, decoding, cache.row(row)):
            reach = max(reach, kept + segment.length)
            kept = min(kept + segment.length, segment.keep)
        return reach

    def _plan(self, count: int, decoding: bool, row: RowState) -> list[Segment]:
        """What `count` new tokens of a row do."""
        if not count:
            return []
        return [self.policy.decode_segment(row)] if decoding else self.policy.plan(count, row)

    def _run_segments(
        self, ids: Tensor, where: list[np.ndarray], cache: EvictionCache, decoding: list[bool], columns: int
    ) -> Tensor:
        """Runs each row's plan, all rows side by side, and collects the logits of the last `columns` columns. where: the columns
        of each row's real tokens."""
        batch, begin = ids.shape[0], ids.shape[1] - columns
        counts = [len(found) for found in where]
        plans: list[list[Segment]] = []
        for n, decodes in zip(counts, decoding):
            plans.append(self._plan(n, decodes, cache.row(len(plans))))
        logits: Tensor | None = None
        done = [0] * batch
        reserve = self._reserve(cache, plans)
        totals = [seen + n for seen, n in zip(cache.seen, counts)]
        lowest = [
            int(np.searchsorted(found, begin)) for found in where
        ]  # each row's first token whose logits are asked for
        steps = max((len(p) for p in plans), default=0)
        for step in range(steps):
            if cache.before_chunk is not None:
                cache.before_chunk()
            row_segments = [p[step] if step < len(p) else None for p in plans]
            valid = [s.length if s else 0 for s in row_segments]
            parts = [found[d : d + n] for found, d, n in zip(where, done, valid)]
            # Which of each row's tokens (counted from the segment's start) have logits that are asked for.
            wanted = [list(range(max(0, low - d), n)) for low, d, n in zip(lowest, done, valid)]
            picks = max(1, max(len(w) for w in wanted))
            out = self._run_segment(ids, parts, row_segments, totals, wanted, picks, cache, decoding, reserve)
            if out is not None:
                if logits is None:
                    logits = out.new_zeros(batch, columns, out.shape[-1])
                for b in range(batch):
                    if wanted[b]:
                        at = parts[b][wanted[b][0] :] - begin
                        adjacent = at[-1] - at[0] + 1 == len(at)
                        target: Any = slice(int(at[0]), int(at[-1]) + 1) if adjacent else to_device(at, out.device)
                        logits[b, target] = out[b, : len(at)]
            done = [d + n for d, n in zip(done, valid)]
        if logits is None:
            return torch.zeros(batch, columns, self.program.vocab_size, device=self.device, dtype=self.dtype)
        return logits

    def _run_segment(
        self, ids: Tensor, parts: list[np.ndarray], segments: list[Segment | None], totals: list[int],
        wanted: list[list[int]], picks: int, cache: EvictionCache, decoding: list[bool], reserve: int,
    ) -> Tensor | None:  # fmt: skip
        """One pass through the graph: the same segment number of every row, left-aligned. parts: the columns of its tokens in
        each row. None where no logits are wanted, and what runs the graph can do without them."""
        device = self.device
        valid = [len(part) for part in parts]
        longest = max(valid)
        column = torch.arange(longest)
        index = np.zeros((len(parts), longest), dtype=np.int64)
        for row, part in enumerate(parts):
            index[row, : len(part)] = part
        positions = to_device(torch.tensor(cache.seen)[:, None] + column, device)
        renew: list[bool] | None = None
        if self.program.layout.contiguous:
            always = self.policy.renews_ranks_in_decoding
            # A prompt's last eviction leaves gaps, so ranks that decoding keeps are made at its first token.
            renew = [always or not (d and settled) for d, settled in zip(decoding, cache.settled)]
        plan = cache.plan(segments, totals, renew)
        cache.hold(plan, reserve)
        inputs: dict[str, Tensor] = cache.inputs(plan)
        inputs["input_ids"] = torch.gather(ids.to(device).long(), 1, to_device(index, device))
        inputs["positions"] = inputs["position_ids"] = positions
        inputs["valid"] = to_device(torch.tensor(valid, dtype=torch.int32), device)
        inputs["recent"] = to_device(torch.tensor([s.recent if s else 0 for s in segments], dtype=torch.int32), device)
        for name in self.program.layout.row_inputs:
            values = [s.values.get(name, 0) if s else 0 for s in segments]
            inputs[name] = to_device(torch.tensor(values, dtype=torch.int32), device)
        padded = [w + [0] * (picks - len(w)) for w in wanted]
        inputs["logit_index"] = to_device(torch.tensor(padded, dtype=torch.int64), device)
        if self.program.layout.contiguous:
            assert renew is not None
            cache.next_rotary = [n if r else p for n, p, r in zip(cache.length, cache.next_rotary, renew)]
            cache.settled = [d if n else s for d, n, s in zip(decoding, valid, cache.settled)]
            inputs["following"] = to_device(torch.tensor(cache.next_rotary), device)
            inputs["renew"] = to_device(torch.tensor(renew), device)
            # The same for all chunks of a prompt, and for prompts that are about as long: captured chunks ask for one shape.
            reach = max(max(totals), max(cache.seen) + longest)
            step = max(SPAN_STEP, (1 << (reach.bit_length() - 1)) // 8)
            inputs["span"] = torch.empty(0, -(-reach // step) * step, device=device)
            inputs["position_ids"] = to_device(torch.tensor(cache.next_rotary)[:, None] + column, device)
        for i, (cos, sin) in enumerate(cache.rotary(self._rotary_reach(cache, longest))):
            inputs[f"rotary_cos_{i}"], inputs[f"rotary_sin_{i}"] = cos, sin
        limit = self.program.max_positions
        if limit is not None:  # padding behind a row's end may not index out of a table of positions
            inputs["position_ids"] = inputs["position_ids"].clamp(max=limit - 1)
        inputs.update(cache.length_tables)
        names = self.program.layout.input_names
        execution: Execution | None = self.__dict__["_execution"]
        prefill = self.prefill_runner
        out: Tensor | None = None
        if execution is None and not self.on_one_device:
            out = self.__dict__["_staged"](*(inputs[name] for name in names))
        elif execution is None:
            with failures_named(self.source):
                out = self.graph_module(*(inputs[name] for name in names))
        elif prefill is None or any(wanted):
            out = execution({name: inputs[name] for name in names}, logits=any(wanted))
        else:
            prefill({name: inputs[name] for name in names})
        cache.commit(plan)
        return out

    def _rotary_reach(self, cache: EvictionCache, longest: int) -> int:
        """Positions that the tables of cos and sin must have in this step."""
        begins = cache.next_rotary if self.program.layout.contiguous else cache.seen
        reach = max(begins) + longest + self.policy.rotary_ahead
        return min(reach, self.program.max_positions or reach)

    def _reserve(self, cache: EvictionCache, plans: list[list[Segment]]) -> int:
        """Slots a head that the pools should have room for: what the longest row holds on the way and in the end, and what
        its answer will add as far as its length is known."""
        most = 0
        for row, plan in enumerate(plans):
            held = peak = cache.length[row]
            for segment in plan:
                held = min(held + segment.length, segment.keep)
                peak = max(peak, held)
            seen = cache.seen[row] + sum(s.length for s in plan)
            coming = min(max(0, (cache.max_length or 0) - seen), held + 256)
            following = self.policy.decode_segment(RowState(seen=seen + max(0, coming - 1), held=held))
            most = max(most, peak, min(held + coming, max(following.keep, held)))
        return most

    # -- saving --------------------------------------------------------------------------------------------------
    def save_pretrained(
        self, save_directory: str | Path, *, force: bool = False, compile: str | None = None, compile_batch: int = 1,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Writes the model as a directory that `kvrewrite.load` reads; see `kvrewrite.artifact.directory`, and
        `kvrewrite.runtime.aot` for compile="aot"."""
        from kvrewrite.artifact.saving import save
        from kvrewrite.runtime.aot import check_kind, compile_ahead

        check_kind(compile, self.device)
        steps = None if compile is None else lambda folder: compile_ahead(self, folder, compile_batch)
        out, source, config = save_directory, self.source, self.config
        save(self.program, out, source=source, config=config, force=force, compile_steps=steps)
