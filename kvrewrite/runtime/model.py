"""The rewritten model: a program and its parameters with the interface of a transformers causal LM."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvrewrite.cache.eviction_cache import CACHE_NAME, EvictionCache
from kvrewrite.cache.pages import PageStore
from kvrewrite.cache.request import Owner, exclusive
from kvrewrite.cache.signature import signatures
from kvrewrite.capture.third_party import AdapterWatch
from kvrewrite.errors import InputError
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.node_errors import named_failure
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import retarget_device
from kvrewrite.ir.waits import told
from kvrewrite.passes.insert.axes import insert_axes
from kvrewrite.passes.insert.embeds import embedding_form, embedding_graph, insert_embeds
from kvrewrite.passes.insert.keep_windows import keep_windows
from kvrewrite.passes.insert.pins import insert_pins
from kvrewrite.policies import Policy
from kvrewrite.policies import make as make_policy
from kvrewrite.policies.question import join_question
from kvrewrite.runtime.arguments import COUNTED, check_arguments, check_columns
from kvrewrite.runtime.call import (
    Call,
    check_axes,
    check_cache,
    check_embeds,
    check_form,
    check_ids,
    check_ids_form,
    check_rows,
    new_tokens,
    note_deltas,
)
from kvrewrite.runtime.decode_graph import DecodeRunner
from kvrewrite.runtime.executor import Executor, compiled, fewer_launches
from kvrewrite.runtime.generation import Generation, drop_unsupported
from kvrewrite.runtime.key_rotation import KeyRotation
from kvrewrite.runtime.loss import check_labels, with_loss
from kvrewrite.runtime.parts import Staged
from kvrewrite.runtime.pickling import model_of, program_state
from kvrewrite.runtime.pins import Pin, pin_spans
from kvrewrite.runtime.pretrained import Pretrained
from kvrewrite.runtime.saved_cache import save_cache
from kvrewrite.runtime.whole_prompts import check_pieces, warn_of_scores

VIEWS = (
    "_pinning",
    "_embedding",
    "_placing",
    "_keeping_windows",
)  # attributes with views of a model, None until needed
MADE = (*VIEWS, "_embedder", "_for_gpu")  # and with the graph that embeds ids, and what runs op by op on a GPU

# Pipelines know the models that they support by class name and complain about any other.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("kvrewrite", "RewrittenModel")


def on_its_device(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward with the model's GPU as the current one: Triton launches, streams and graphs belong to that."""

    @functools.wraps(forward)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        index = self.gpu
        if index is None or index == torch.cuda.current_device():
            return forward(self, *args, **kwargs)
        with torch.cuda.device(index):
            return forward(self, *args, **kwargs)

    return guarded


class RewrittenModel(Pretrained, Generation):
    """A decoder whose attention reads and writes an `EvictionCache`; driven by transformers' own `generate`.

    Made by `kvrewrite.transform` and `kvrewrite.load`. `forward` takes what a causal LM of transformers takes; prompts
    of any length are cut into the policy's segments inside. Rows may be padded anywhere. Threads may share a model: its
    steps run one after another.
    """

    adapters: AdapterWatch | None
    pins = False  # whether it is a view that keeps what caches have pinned
    keeps_windows = False  # whether it is a view whose layers with a window lose nothing
    embeds = False  # whether it is a view that takes embeddings in the place of ids
    places = False  # whether it is a view that takes positions of several axes
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
        self._told_scores = False
        self.executor: Executor | None = None  # None: the graph runs op by op
        self._shapes_run: set[tuple[int, int]] = set()  # rows and tokens of passes that were run
        # Tables that the compiler made lie on the CPU.
        if program.layout.devices is None:
            self.graph_module.to(self.device)
        else:
            self._staged = Staged(self.graph_module, program.layout.devices)
        self._note_gpu()
        self._rotary_graphs: list[Any] = [r.module(self.graph_module, self.device) for r in program.layout.rotary]
        self.eval()

    # -- copies --------------------------------------------------------------------------------------------------
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled without what `compile()` made: call it again on what comes out, which is a model of its own."""
        rest = {name: getattr(self, name) for name in ("config", "generation_config", "source", "adapters", "training")}
        return model_of, (type(self), program_state(self.program), rest)

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
        kept = {name: value for name, value in self.__dict__.items() if name not in ("executor", *MADE)}
        twin.__dict__.update(copy.deepcopy(kept, memo), executor=None)
        if self.executor is not None and self.executor.options is not None:
            twin.compile(**self.executor.options)
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
        self.gpu = device.index if device.type == "cuda" else None

    @property
    def on_one_device(self) -> bool:
        """Whether all layers and their caches lie on one device."""
        return self.program.layout.devices is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model was captured in."""
        return getattr(torch, self.program.dtype)

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
        again = self.executor.options if self.executor is not None else None
        if self.executor is not None and again is None and sample.device != self.device:
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
        self.__dict__.update(dict.fromkeys(MADE))
        if again is not None:
            self.compile(**again)
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
        self.uncompile()
        self.executor = compiled(self, static_decode, kwargs)

    @exclusive
    def uncompile(self) -> None:
        """Back to running op by op, also from steps that were loaded compiled. Captured graphs and the model's pools
        are dropped with the last cache that uses them."""
        if self.decoder is not None:
            self.decoder.release()
        for name in VIEWS:
            if (view := self.__dict__.get(name)) is not None:
                view.uncompile()
        self.__dict__.update(dict.fromkeys(VIEWS), executor=None)
        self._shapes_run.clear()

    @property
    def decoder(self) -> DecodeRunner | None:
        """What runs single tokens from static buffers, if anything does."""
        return None if self.executor is None else self.executor.token

    def shared_stores(self) -> list[PageStore] | None:
        """The pools that this model's caches lease from, one for each cache class; None where each cache has its
        own."""
        return None if self.decoder is None else self.decoder.stores

    # -- pinned spans, embeddings --------------------------------------------------------------------------------
    def pinning(self) -> RewrittenModel:
        """A view of this model whose evictions keep what caches have pinned (`passes/insert/pins.py`), made and compiled
        when a cache first needs it."""
        return self._view("_pinning", insert_pins, pins=True)

    def embedding(self) -> RewrittenModel:
        """A view of this model that takes embeddings in the place of ids (`passes/insert/embeds.py`), made when a call first
        has them. Compiled, it has no static buffers for single tokens: these come as ids. Raises InputError where there
        is none."""
        return self._view("_embedding", insert_embeds, embeds=True)

    def placing(self) -> RewrittenModel:
        """A view of a view that takes embeddings, which takes positions of several axes beside them (`passes/insert/axes.py`).
        Raises InputError where there is none."""
        return self._view("_placing", insert_axes, embeds=True, places=True)

    def _embedding_view(self) -> RewrittenModel:
        """The next view for a call with embeddings."""
        return self.placing() if self.embeds else self.embedding()

    def keeping_windows(self) -> RewrittenModel:
        """A view of this model whose layers with a window lose nothing (`passes/insert/keep_windows.py`), for caches that
        only append."""
        return self._view("_keeping_windows", keep_windows, keeps_windows=True)

    def viewed(self, **changed: Any) -> RewrittenModel:
        """A view of this model: the same weights and graph, but for these attributes, and views of its own."""
        view = copy.copy(self)
        view.__dict__.update(dict.fromkeys(MADE), **changed)
        return view

    def _view(self, name: str, insert: Callable[[Program], Program], **is_for: bool) -> RewrittenModel:
        """The view of this name, whose program `insert` makes of this one's."""
        view: RewrittenModel | None = self.__dict__.get(name)
        if view is None:
            program = insert(self.program)
            view = self.viewed(_modules=dict(self._modules), executor=None, **is_for)
            view.__dict__["_copied"] = self.__dict__.get("_copied") or self.program
            view.program = program
            view.graph_module = view.program.graph
            if view.program.layout.devices is not None:
                view._staged = Staged(view.graph_module, view.program.layout.devices)
            if self.executor is not None and self.executor.options is not None:
                view.compile(**self.executor.options, **({"static_decode": False} if view.embeds else {}))
            self.__dict__[name] = view
        return view

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, D) of token ids (B, T), as `inputs_embeds` takes them."""
        graph = self.__dict__.get("_embedder")
        if graph is None:
            graph = self.__dict__["_embedder"] = embedding_graph(self._base)
        made: Tensor = graph(ids.long().to(self.device))
        return made

    @property
    def _base(self) -> Program:
        """This model's own program, of which a view's is a copy."""
        return self.__dict__.get("_copied") or self.program

    def sign(self, ids: Tensor) -> Tensor:
        """The signatures (B, T) of the embeddings of ids (B, T), on the device of the ids."""
        return signatures(self.embed(ids)).to(ids.device)

    # -- caches --------------------------------------------------------------------------------------------------
    @exclusive
    def new_cache(self, batch_size: int = 1, *, max_length: int | None = None) -> EvictionCache:
        """An empty cache for `batch_size` rows; max_length: tokens that a row will have in all, where RoPE depends on
        it."""
        return EvictionCache(self, batch_size, max_length=max_length)

    def prefill(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_length: int | None = None,
        pin: Pin | None = None,
        inputs_embeds: Tensor | None = None,
        rope_positions: Tensor | None = None,
    ) -> EvictionCache:
        """Runs a prompt (B, T), or its embeddings (B, T, D), into a new cache and returns it, for questions that come later:
        fork it for each.

        pin: what stays whatever the policy says (`EvictionCache.pin`): (start, end) or a list of such positions for all
        rows, or a bool tensor (B, T).
        Warns where the policy keeps what the end of the prompt attends to: there the question belongs into the prompt.
        """
        if self.policy.needs_question:
            warnings.warn(
                f"{self.policy.name} keeps what the end of the prompt asks for; compressed without the question, a text may "
                "lose its answer. Put the question into the prompt (prompt_ids), or use a policy that needs none "
                "(keydiff, expected_attention, knorm, locret, streaming_llm)",
                stacklevel=2,
            )
        columns = self.columns(input_ids, inputs_embeds)
        cache = self.new_cache(columns.shape[0], max_length=max_length)
        pin_spans(cache, pin, columns, attention_mask)
        given = {"attention_mask": attention_mask, "past_key_values": cache, "inputs_embeds": inputs_embeds}
        self(input_ids, **given, rope_positions=rope_positions, logits_to_keep=1)
        cache.end_prompt()
        return cache

    def columns(self, input_ids: Any, inputs_embeds: Any) -> Tensor:
        """What a cache's text has of a call, (B, T): ids, or the signatures of embeddings. Raises InputError where they are
        not as they should be, or both are given."""
        if inputs_embeds is None:
            check_ids_form(input_ids)
            ids: Tensor = input_ids
            return ids
        if input_ids is not None:
            raise InputError("got both input_ids and inputs_embeds, expected one of them: embeddings stand for ids")
        check_embeds(inputs_embeds, *embedding_form(self._base))
        return signatures(inputs_embeds)

    def save_cache(self, cache: EvictionCache, path: str | Path, *, force: bool = False) -> None:
        """See `EvictionCache.save`, which calls this."""
        save_cache(self, cache, path, force=force)

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
            found = get_attr(self._base.graph, f"length_tables.{table.index}.{kind}")
            tables[table.input] = found.to(self.device)  # those of a model on several devices lie on the CPU
        return tables

    def make_rotary(self, length: int, tables: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """cos and sin (length, D) of each rotation."""
        positions = torch.arange(length, device=self.device)
        made = []
        for graph, entry in zip(self._rotary_graphs, self.program.layout.rotary):
            made.append(self._run(graph, positions, *(tables[name] for name in entry.length_tables)))
        return made

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
        inputs_embeds: Tensor | None = None,
        rope_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs new tokens through the model and its cache.

        input_ids: (B, T) int64, or inputs_embeds (B, T, D) in their place, in the model's dtype, such as get_input_embeddings()
        gives; rows padded anywhere according to attention_mask (B, past + T) or (B, T), 1 for real
        tokens. Its past must be what the cache was given; columns in which a row paused (0 then) may be 1 at last, and
        go in before the new ones. One token on a row that has some is decoding, more are a prompt. position_ids are
        counted by the cache; given ones must agree. logits_to_keep: how many of the last columns to return logits for,
        0 for all. cache: another name for past_key_values. generated: the ids were chosen from this model's own logits
        (`generate` says so), so they are not looked at, which would stall a GPU at every token. labels: (B, T) int64,
        -100 where none is wanted; the result has a `loss` then, the mean cross entropy of each label given the column
        before it, its sum divided by num_items_in_batch if that is given. rope_positions: (B, T, 3) int64 beside
        inputs_embeds, what the axes of M-RoPE (Qwen2-VL) turn each token by; later tokens go on after the largest.
        Returns logits (B, T or logits_to_keep, vocabulary), zero at padding, and the cache. Logits are made before the
        eviction that follows their segment of the prompt.

        Raises InputError, CacheError, and ArgumentError (a TypeError) for arguments that it does not know.
        """
        cache_given, decoder = past_key_values if cache is None else cache, self.decoder
        pinned = getattr(cache_given, "pins", None) and not self.pins
        if rope_positions is not None and inputs_embeds is None:
            raise InputError(
                "got rope_positions without inputs_embeds, expected them beside embeddings of images; leave them out"
            )
        placed = rope_positions is not None and not self.places
        keeping = getattr(cache_given, "windows_from", None) is not None and not self.keeps_windows
        if pinned or keeping or placed or (inputs_embeds is not None and not self.embeds):
            view = self.pinning() if pinned else self.keeping_windows() if keeping else self._embedding_view()
            given = (input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep, return_dict)
            return view.forward(
                *given, cache, generated, labels, num_items_in_batch, inputs_embeds, rope_positions, **kwargs
            )
        if inputs_embeds is not None:
            input_ids = self.columns(input_ids, inputs_embeds)
        plain = attention_mask is None and labels is None and not kwargs
        planned = plain and decoder is not None and decoder.has_planned(input_ids, cache_given)
        if generated and planned:
            return self._planned_token(input_ids, cache_given, generated, use_cache, return_dict)
        if kwargs:
            check_arguments(kwargs, RewrittenModel.forward)
        if self.adapters is not None and not generated:
            self.adapters.check()
        if torch.compiler.is_exporting():
            raise InputError(
                "torch.export got a rewritten model, whose forward plans evictions in Python; export its steps: "
                "kvrewrite.runtime.exported.export_steps(model)"
            )
        check_form(input_ids, attention_mask, position_ids, logits_to_keep)
        assert input_ids is not None
        if labels is not None:
            check_labels(labels, input_ids, logits_to_keep, self.training)
        if cache is not None and past_key_values is not None:
            raise InputError("got both cache and past_key_values, expected one of them: they are the same")
        if planned:
            check_ids(input_ids, self.program.vocab_size, decoding=True)
            return self._planned_token(input_ids, cache_given, generated, use_cache, return_dict)
        batch, width = input_ids.shape
        # Where RoPE depends on the length, a call without a cache is as long as it is, as in the original model.
        cache = self.new_cache(batch, max_length=width) if cache_given is None else cache_given
        check_cache(self, cache, batch)
        tokens = new_tokens(input_ids, attention_mask, cache)
        tokens.embeds = inputs_embeds
        if rope_positions is not None:
            check_axes(rope_positions, tokens, self.policy)
            tokens.axes = rope_positions
        if kwargs:
            check_columns(kwargs.get(COUNTED), cache.columns, width)
        check_rows(tokens, position_ids, cache)
        if self.policy.whole_prompt:
            check_pieces(self, tokens, cache)
        if not generated and inputs_embeds is None:
            check_ids(input_ids, self.program.vocab_size, all(tokens.decoding))
        if (cache_given is None or labels is not None) and logits_to_keep != 1 and not self._told_scores:
            self._told_scores = warn_of_scores(self, tokens, cache)
        cache.begin_step()
        columns = width if logits_to_keep == 0 else min(logits_to_keep, width)
        few = decoder.few if decoder is not None and generated else None
        if decoder is not None and tokens.ids.shape[1] == 1 and all(tokens.decoding) and all(tokens.counts):
            logits = decoder.step(input_ids, cache)
        elif decoder is not None and few is not None and (plan := few.plan(cache, tokens)) is not None:
            logits = decoder.few_step(input_ids, cache, plan)[:, -columns:]
        else:
            if cache.keys_rotated:
                KeyRotation(self).undo(cache)  # also where the model is not compiled any more
            cache.ranks_held = False
            logits = Call(self, tokens, cache, columns).run()
            if rope_positions is not None:
                note_deltas(tokens, cache)
        cache.record(input_ids, tokens.real, generated)
        out = self._output(logits, cache, use_cache, return_dict)
        return out if labels is None else with_loss(out, logits, labels, attention_mask, num_items_in_batch)

    def _planned_token(
        self, ids: Any, cache: Any, generated: bool, use_cache: bool | None, return_dict: bool | None
    ) -> Any:
        """What `forward` returns for the token that the decoder has planned."""
        assert self.decoder is not None
        cache.begin_step()
        logits = self.decoder.planned_step(ids, cache)
        cache.record(ids, None, generated)
        return self._output(logits, cache, use_cache, return_dict)

    @staticmethod
    def _output(logits: Tensor, cache: EvictionCache | None, use_cache: bool | None, return_dict: bool | None) -> Any:
        keep_cache = use_cache is not False
        if return_dict is False:
            return (logits, cache) if keep_cache else (logits,)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache if keep_cache else None})  # type: ignore[arg-type]

    @property
    def cache_owners(self) -> int:
        """How many layers own a cache."""
        return self.program.layout.owners

    def run_graph(self, given: dict[str, Tensor], logits: bool) -> Tensor | None:
        """One pass through the graph, by what runs it. logits: whether they are wanted; without them the result may be
        None."""
        given = {name: given[name] for name in self.program.layout.input_names}
        rows, tokens = next(iter(given.values())).shape[:2]
        if (rows, tokens) in self._shapes_run:
            return self._pass(given, logits)
        self._shapes_run.add((rows, tokens))
        compiles = self.executor is not None or self.gpu is not None
        with told(f"the first pass of {rows} x {tokens} tokens" + (", whose kernels may be compiled now" * compiles)):
            return self._pass(given, logits)

    def _pass(self, given: dict[str, Tensor], logits: bool) -> Tensor | None:
        if self.executor is not None:
            return self.executor.prompt(given, logits)
        out: Tensor = self._run(self._op_by_op(), *given.values())
        return out

    def _op_by_op(self) -> Callable[..., Any]:
        """What runs the graph's ops one by one; on a GPU fewer ones, where nobody asks for gradients."""
        if not self.on_one_device:
            return self._staged
        if self.gpu is None or torch.is_grad_enabled():
            return self.graph_module
        if self.__dict__.get("_for_gpu") is None:
            self.__dict__["_for_gpu"] = fewer_launches(self.graph_module)
        run: Callable[..., Any] = self.__dict__["_for_gpu"]
        return run

    def _run(self, graph: Callable[..., Any], *inputs: Tensor) -> Any:
        """Runs a graph of this model; an error says which node of a file it was."""
        try:
            return graph(*inputs)
        except Exception as error:  # torch raises many types
            if named := named_failure(error, self.source):
                raise named from error
            raise
