"""The rewritten model: a program and its parameters with the interface of a transformers causal LM."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvrewrite.cache.eviction_cache import CACHE_NAME, EvictionCache
from kvrewrite.cache.pages import PageStore
from kvrewrite.cache.request import Owner, exclusive
from kvrewrite.capture.third_party import AdapterWatch
from kvrewrite.errors import CacheError, InputError, OptionError, UnsupportedModelError
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.node_errors import failures_named
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import retarget_device
from kvrewrite.passes.lower.prompt import fold, lower_prefill
from kvrewrite.policies import Policy
from kvrewrite.policies import make as make_policy
from kvrewrite.policies.question import join_question
from kvrewrite.runtime import inputs
from kvrewrite.runtime.arguments import (
    COUNTED,
    check_arguments,
    check_columns,
    check_ids_form,
    check_logits_to_keep,
    check_tensor,
)
from kvrewrite.runtime.decode_graph import DecodeRunner, reason_against
from kvrewrite.runtime.generation import Generation, drop_unsupported
from kvrewrite.runtime.key_rotation import KeyRotation
from kvrewrite.runtime.loss import check_labels, with_loss
from kvrewrite.runtime.parts import Execution, Staged
from kvrewrite.runtime.pickling import program_of, program_state
from kvrewrite.runtime.prompt_graph import PrefillRunner
from kvrewrite.runtime.prompt_graph import reason_against as reason_against_chunks
from kvrewrite.runtime.segments import SegmentedCall

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


def _unpickled(cls: type[RewrittenModel], program: dict[str, Any], rest: dict[str, Any]) -> RewrittenModel:
    """A model from what `RewrittenModel.__reduce_ex__` keeps."""
    training = rest.pop("training")
    return cls(program_of(program), **rest).train(training)


class RewrittenModel(nn.Module, Generation):
    """A decoder whose attention reads and writes an `EvictionCache`; driven by transformers' own `generate`.

    Made by `kvrewrite.transform` and `kvrewrite.load`. `forward` takes what a causal LM of transformers takes; prompts
    of any length are cut into the policy's segments inside. Rows may be padded anywhere. Threads may share a model: its
    steps run one after another.
    """

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
        drop_unsupported(self.generation_config)
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
        if self.program.parallel is not None:
            raise OptionError("one process's part of a model can't be pickled; the others would not know of it")
        rest = {name: getattr(self, name) for name in ("config", "generation_config", "source", "adapters", "training")}
        return _unpickled, (type(self), program_state(self.program), rest)

    def __copy__(self) -> RewrittenModel:
        """A view of the same model, which takes its caches, too."""
        twin: RewrittenModel = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    @exclusive
    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModel:
        """A model of its own, compiled if `compile()` made this one so. Caches stay with the model that they were made
        for."""
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
        """Remembers the number of the model's GPU, if it has one: looking the device up takes microseconds at every
        token."""
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
        """The table of token embeddings, whose weight is the graph's own parameter. A factor that some models (Gemma)
        put on them is part of the graph. Raises UnsupportedModelError where tokens are not looked up in one table."""
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
        """Compiles the model with torch.compile (options as there); layers that repeat are compiled once. Planning and
        caches stay in Python.

        static_decode: single tokens run from static buffers, on CUDA as one captured graph a step; default: on CUDA.
        Caches made from then on lease pages from pools that belong to the model, so that new requests replay what was
        captured, also the chunks of a prompt without logits that have the same shape
        (`kvrewrite/runtime/prompt_graph.py`). A policy for which that is not possible decodes through compiled parts
        instead, and a warning says why. Locret's heads are folded into one linear layer of the hidden states; compile
        again after a change of weights.
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
        """Back to running op by op, also from steps that were loaded compiled. Captured graphs and the model's pools
        are dropped with the last cache that uses them."""
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
        """The pools that this model's caches lease from, one for each cache class; None where each cache has its
        own."""
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
        """An empty cache for `batch_size` rows; max_length: tokens that a row will have in all, where RoPE depends on
        it."""
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
        wants: the question last, and with locret_q also first, after a BOS token that begins the context.

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

        input_ids: (B, T) int64, rows padded anywhere according to attention_mask (B, past + T) or (B, T), 1 for real
        tokens. Its past must be what the cache was given; columns in which a row paused (0 then) may be 1 at last, and
        go in before the new ones. One token on a row that has some is decoding, more are a prompt. position_ids are
        counted by the cache; given ones must agree. logits_to_keep: how many of the last columns to return logits for,
        0 for all. cache: another name for past_key_values. generated: the ids were chosen from this model's own logits
        (`generate` says so), so they are not looked at, which would stall a GPU at every token. labels: (B, T) int64,
        -100 where none is wanted; the result has a `loss` then, the mean cross entropy of each label given the column
        before it, its sum divided by num_items_in_batch if that is given. Returns logits (B, T or logits_to_keep,
        vocabulary), zero at padding, and the cache. Logits are made before the eviction that follows their segment of
        the prompt.

        Raises InputError, CacheError, and ArgumentError (a TypeError) for arguments that it does not know.
        """
        if generated and self.decoder is not None and not kwargs and attention_mask is None and labels is None:
            known = past_key_values if cache is None else cache
            if self.decoder.has_planned(input_ids, known):
                return self._output(self._planned_token(input_ids, known, True), known, use_cache, return_dict)
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
            inputs.check_ids(input_ids, self.program.vocab_size, decoding=True)
            return self._output(self._planned_token(input_ids, cache, False), cache, use_cache, return_dict)
        scores = cache is None or labels is not None
        if cache is None:
            # Where RoPE depends on the length, a call without a cache is as long as it is, as in the original model.
            cache = self.new_cache(batch, max_length=width)
        self._check_cache(cache, batch)
        tokens = inputs.new_tokens(input_ids, attention_mask, cache)
        check_columns(kwargs.get(COUNTED), cache.columns, width)
        self._check_tokens(tokens, position_ids, cache)
        if not generated:
            inputs.check_ids(input_ids, self.program.vocab_size, all(tokens.decoding))
        if scores and logits_to_keep != 1:
            self._warn_of_scores(tokens.counts, cache)
        cache.begin_step()
        if self.decoder is not None and tokens.ids.shape[1] == 1 and all(tokens.decoding) and all(tokens.counts):
            logits = self.decoder.step(input_ids, cache)
        else:
            if cache.keys_settled:
                KeyRotation(self).undo(cache)  # also where the model is not compiled any more
            cache.ranks_held = False
            columns = width if logits_to_keep == 0 else min(logits_to_keep, width)
            logits = SegmentedCall(self, tokens, cache).run(columns)
        cache.record(input_ids, tokens.real, generated)
        out = self._output(logits, cache, use_cache, return_dict)
        return out if labels is None else with_loss(out, logits, labels, attention_mask, num_items_in_batch)

    def _planned_token(self, ids: Any, cache: Any, generated: bool) -> Tensor:
        """The logits of the token that the decoder has planned."""
        assert self.decoder is not None
        cache.begin_step()
        logits = self.decoder.planned_step(ids, cache)
        cache.record(ids, None, generated)
        return logits

    @staticmethod
    def _output(logits: Tensor, cache: EvictionCache | None, use_cache: bool | None, return_dict: bool | None) -> Any:
        keep_cache = use_cache is not False
        if return_dict is False:
            return (logits, cache) if keep_cache else (logits,)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache if keep_cache else None})  # type: ignore[arg-type]

    def _check_tokens(self, tokens: inputs.Tokens, position_ids: Tensor | None, cache: EvictionCache) -> None:
        """Raises InputError or CacheError where a row can't take its new tokens."""
        for row, (count, decodes) in enumerate(zip(tokens.counts, tokens.decoding)):
            problem = cache.no_room(row, count, decodes)
            if problem is not None:
                raise problem
        if position_ids is not None and not all(tokens.decoding):
            inputs.check_positions(position_ids, tokens, cache)
        self._check_pieces(tokens, cache)

    def _check_pieces(self, tokens: inputs.Tokens, cache: EvictionCache) -> None:
        """A policy that evicts once needs a row's first prompt whole: of pieces it would keep everything, whatever its
        budget. (More of a prompt that fits the budget is right, because nothing goes.)"""
        if not self.policy.whole_prompt:
            return
        for row, n in enumerate(tokens.counts):
            seen = cache.seen[row]
            if not n or not seen or tokens.decoding[row] or cache.prompted[row]:
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
        """Warns once where logits of several columns are asked for, the policy evicts, and no column's logits can show
        it."""
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

    def run_graph(self, given: dict[str, Tensor], logits: bool) -> Tensor | None:
        """One pass through the graph, by what runs it. logits: whether they are wanted; without them the result may be
        None."""
        given = {name: given[name] for name in self.program.layout.input_names}
        execution: Execution | None = self.__dict__["_execution"]
        prefill = self.prefill_runner
        if execution is None:
            run = self.graph_module if self.on_one_device else self.__dict__["_staged"]
            with failures_named(self.source):
                out: Tensor = run(*given.values())
            return out
        if prefill is None or logits:
            return execution(given, logits=logits)
        prefill(given)
        return None

    # -- saving --------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        force: bool = False,
        compile: str | None = None,
        compile_batch: int = 1,
        **kwargs: Any,
    ) -> None:
        """Writes the model as a directory that `kvrewrite.load` reads; see `kvrewrite.artifact.directory`, and
        `kvrewrite.runtime.aot` for compile="aot"."""
        from kvrewrite.artifact.saving import save
        from kvrewrite.runtime.aot import check_kind, compile_ahead

        check_kind(compile, self.device)
        if self.program.parallel is not None:
            raise OptionError("one process's part of a model can't be saved; save the whole model, in one process")
        steps = None if compile is None else lambda folder: compile_ahead(self, folder, compile_batch)
        out, source, config = save_directory, self.source, self.config
        save(self.program, out, source=source, config=config, force=force, compile_steps=steps)
