"""Adapts one graph of Dynamo: maps its inputs to the rewritten model's, and the results back to its outputs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.capture.attention_interface import is_transformers_model
from kvrewrite.dynamo.caches import USE_NEW_CACHE, BackendCache, StockState, cache_of, state_of
from kvrewrite.dynamo.graphs import source_of
from kvrewrite.dynamo.modules import ran
from kvrewrite.dynamo.rewrites import Rewrite, Settings, rewritten
from kvrewrite.dynamo.traced_call import (
    WHOLE,
    Argument,
    Call,
    check_logits,
    check_module,
    guard_module,
    told,
    traced_call,
)
from kvrewrite.errors import CacheError, CaptureError, InputError, UnsupportedModelError
from kvrewrite.runtime.call import check_cache, check_ids
from kvrewrite.runtime.model import RewrittenModel

CACHE_NAMES = ("cache", "past_key_values")  # transformers renamed the argument
KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHE_NAMES}


class Adapter:
    """Adapts one graph of Dynamo: takes its inputs, runs the rewritten model, returns its outputs."""

    def __init__(
        self, settings: Settings, gm: fx.GraphModule, example_inputs: list[Any], *, attention_seen: bool = True
    ):
        self.settings, self.attention_seen = settings, attention_seen
        # (The settings' key with numbers of the model, a parameter, its model's rewrite); assigned at once, for other
        # threads.
        self.served: tuple[Any, weakref.ref[Tensor], weakref.ref[Rewrite]] | None = None
        self.checked = False
        call = traced_call()
        self.module, self.hooks = weakref.ref(call.module), call.hooks
        self.transformers = is_transformers_model(call.module)
        if not self.transformers:
            check_module(call)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
            raise InputError(
                "gradients are enabled, and training through an evicted cache is not supported; call the model under "
                "torch.no_grad() or torch.inference_mode(), as generate does"
            )
        self._read_inputs(gm, call)
        width = self._read_outputs(gm)
        if self.transformers:
            check_logits(call, width)

    # -- inputs --------------------------------------------------------------------------------------------------
    def _read_inputs(self, gm: fx.GraphModule, call: Call) -> None:
        self.parameter = guard_module(gm, call)
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
        index = {source_of(n): i for i, n in enumerate(nodes)}
        self.mask: int | list[int] | None = None
        self.positions: int | None = None
        self.handle: int | None = None
        self.cached: list[int] = []
        self.keep, self.keep_input = 0, None
        used: set[int] = set()

        def take(source: str) -> int | None:
            at = index.get(source)
            if at is not None:
                used.add(at)
            return at

        ids = None
        given = {n: a for n, a in call.arguments.items() if a.value is not None and a.value is not False}
        if not self.transformers:  # one tensor, whatever its name
            given = {"input_ids" if isinstance(a.value, Tensor) else n: a for n, a in given.items()}
        for name, argument in given.items():
            value = argument.value
            if name not in KNOWN:
                raise InputError(f"{name} is not supported by the kvrewrite backend; leave it out")
            if name == "input_ids":
                ids = take(argument.source)
            elif name == "attention_mask":
                self._read_mask(argument, take)
            elif name == "position_ids":
                self.positions = take(argument.source)
            elif name == "logits_to_keep":
                if not isinstance(value, int):
                    raise InputError(f"logits_to_keep is a {type(value).__name__}, expected an int")
                self.keep, self.keep_input = value, take(argument.source)
            elif name in CACHE_NAMES:
                self._read_cache(argument, take)
        if ids is None:
            raise InputError("the model was not given token ids (input_ids); the kvrewrite backend takes nothing else")
        self.ids = ids
        # Numbers that the model holds and that have changed before; Dynamo treats these as inputs.
        self.numbers = [
            i
            for i, node in enumerate(nodes)
            if source_of(node).startswith((f"{call.source}.", f"{call.source}["))
            and (not isinstance(node.meta.get("example_value"), Tensor) or node.meta["grapharg"].pass_arg_as_tensor)
        ]
        for i, node in enumerate(nodes):
            value, source = node.meta.get("example_value"), source_of(node)
            if i not in used and isinstance(value, Tensor) and source.startswith("L["):
                if source.startswith((call.source, f"{call.source}.")):
                    continue
                raise UnsupportedModelError(
                    f"the graph reads {source}, which the kvrewrite backend does not know; {WHOLE}"
                )

    def _read_mask(self, argument: Argument, take: Callable[[str], int | None]) -> None:
        if isinstance(argument.value, dict):
            found = [take(f"{argument.source}['{k}']") for k in argument.value]
            self.mask = [i for i in found if i is not None]
        else:
            self.mask = take(argument.source)
            if self.mask is None:
                raise UnsupportedModelError(
                    "the model does not look at its attention_mask, so that padding can't be kept out"
                )

    def _read_cache(self, argument: Argument, take: Callable[[str], int | None]) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache, source = argument.value, argument.source
        if isinstance(cache, BackendCache):
            self.handle = take(f"{source}.handle")
            return
        kinds = {type(cache).__name__ if type(cache) is not DynamicCache else ""}
        kinds |= {type(layer).__name__ for layer in getattr(cache, "layers", []) if type(layer) is not DynamicLayer}
        kinds.discard("")
        if kinds:
            raise CacheError(
                f"past_key_values is made of {', '.join(sorted(kinds))}, expected a DynamicCache with layers that grow as "
                f"they need; {USE_NEW_CACHE}"
            )
        for i, layer in enumerate(cache.layers):
            if layer.is_initialized and layer.keys.numel():
                found = [take(f"{source}.layers[{i}].{x}") for x in ("keys", "values")]
                self.cached += [at for at in found if at is not None]

    # -- outputs -------------------------------------------------------------------------------------------------
    def _read_outputs(self, gm: fx.GraphModule) -> int:
        """Finds the logits and the outputs that belong to the cache, in the order in which they were computed. Returns
        the width of the logits."""
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        outputs: list[Any] = list(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])
        to_cache = [n for n in outputs if isinstance(n, fx.Node) and n.target is torch.cat and _dims(n) == 4]
        logits = [n for n in outputs if isinstance(n, fx.Node) and n not in to_cache and _dims(n) == 3]
        rest = [n for n in outputs if n not in to_cache and n not in logits]
        if any(isinstance(n, fx.Node) and _dims(n) == 4 for n in rest):
            raise CacheError(
                "a layer's cache keeps something else than all keys and values (a sliding window, or a static cache); "
                f"{USE_NEW_CACHE}"
            )
        if rest or len(logits) != 1 or (self.handle is not None and to_cache):
            what = ", ".join(str(n) for n in (rest or logits)) or "nothing else"
            raise UnsupportedModelError(
                "the graph's results are not the logits and a cache alone (hidden states, attentions, a loss, or a graph that "
                f"breaks on the way): {what}; {WHOLE}"
            )
        self.logits = outputs.index(logits[0])
        to_cache.sort(key=lambda n: order[n])
        self.to_cache = [outputs.index(n) for n in to_cache]
        self.shapes = [(n.meta["example_value"].shape[1], n.meta["example_value"].shape[3]) for n in to_cache]
        self.count = len(outputs)
        return int(logits[0].meta["example_value"].shape[-1])

    # -- a call --------------------------------------------------------------------------------------------------
    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        ran()
        rewrite = self._rewrite_of(inputs[self.parameter], tuple(float(inputs[i]) for i in self.numbers))
        model = rewrite.model
        ids: Tensor = inputs[self.ids]
        cache: Any = None
        if self.handle is not None:
            cache = cache_of(inputs[self.handle])
            cache.bind(model)
        elif self.cached:
            cache = state_of([inputs[i] for i in self.cached])
        elif self.to_cache:
            cache = StockState(model, ids.shape[0])
        elif "no cache" not in told and self.settings.policy.evicts_ever:
            told.add("no cache")
            warnings.warn(
                "kvrewrite: the model was called without a cache (use_cache=False, or it has none), so every call begins anew "
                "and evicts within its own text (said once)",
                stacklevel=2,
            )
        if self.to_cache and not self.checked:
            self._check_shapes(model)
            self.checked = True
        mask = self._real_columns(inputs, ids)
        if rewrite.appends is not None and self.cached and _is_one_token(ids, mask, cache):
            check_cache(model, cache, ids.shape[0])
            check_ids(ids, model.program.vocab_size, decoding=True)
            logits = rewrite.appends.step(ids, cache)
        else:
            logits = model(
                ids,
                attention_mask=mask,
                position_ids=None if self.positions is None else inputs[self.positions],
                past_key_values=cache,
                logits_to_keep=int(self.keep if self.keep_input is None else inputs[self.keep_input]),
            ).logits
        outputs: list[Any] = [None] * self.count
        outputs[self.logits] = logits
        if self.to_cache:
            for at, tensor in zip(self.to_cache, cache.tensors(), strict=True):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
                outputs[at] = tensor
        return tuple(outputs)

    def _rewrite_of(self, parameter: Tensor, numbers: tuple[float, ...]) -> Rewrite:
        """Returns the rewrite of the model whose parameter is an input. Looked up once per parameter: other changes of
        the model's structure, dtype or device fail Dynamo's guards, and then there is another adapter."""
        served = self.served
        if served is not None:
            key, known, rewrite = served[0], served[1](), served[2]()
            if (
                known is parameter
                and rewrite is not None
                and self.module() is not None
                and (self.settings.key(), numbers) == key
                and not rewrite.replaced()
            ):
                rewrite.follow()
                return rewrite
        module = self.module()
        if module is None or not any(parameter is p for p in module.parameters()):
            raise UnsupportedModelError("the graph was compiled for another model (torch._dynamo.reset() forgets it)")
        key = self.settings.key(), numbers
        try:
            rewrite = rewritten(module, self.settings, self.hooks)
        except (CaptureError, UnsupportedModelError) as error:
            if self.attention_seen:
                raise
            raise UnsupportedModelError(
                f"{type(module).__name__} mixes tokens, so it is not run as it is, and it can't be rewritten: {error}. What can "
                "be evicted from is attention with a softmax over the keys; compile this model with another backend"
            ) from error
        self.served = key, weakref.ref(parameter), weakref.ref(rewrite)
        return rewrite

    def _check_shapes(self, model: RewrittenModel) -> None:
        """Checks, layer by layer, that what the DynamicCache holds is what we cache."""
        owners = [s for s in model.sites if s.shares_kv_with is None]
        expected = [shape for s in owners for shape in ((s.kv_heads, s.head_dim), (s.kv_heads, s.v_head_dim))]
        if [tuple(int(n) for n in s) for s in self.shapes] != expected:
            raise CacheError(
                f"the model's DynamicCache has (heads, dims) {self.shapes} for keys and values of each layer, expected "
                f"{expected}; {USE_NEW_CACHE}"
            )

    def _real_columns(self, inputs: tuple[Any, ...], ids: Tensor) -> Tensor | None:
        """Returns the attention mask as (B, columns); folds masks expanded by generate (B, 1, T, past + T)."""
        if self.mask is None:
            return None
        masks: list[Tensor] = [inputs[i] for i in ([self.mask] if isinstance(self.mask, int) else self.mask)]
        if len(masks) == 1 and masks[0].dim() == 2:
            return masks[0]
        folded = None
        for mask in masks:
            width = ids.shape[1]
            if mask.dim() != 4 or mask.shape[2] != width:
                raise InputError(f"attention_mask has shape {tuple(mask.shape)}, expected (batch, tokens)")
            seen = mask if mask.dtype == torch.bool else mask == 0
            new = seen[:, 0, :, -width:]
            real = new.diagonal(dim1=-2, dim2=-1)
            causal = torch.ones_like(new[0]).tril()
            if bool((new & ~(causal & real[:, None])).any()) or (folded is not None and not torch.equal(folded, real)):
                raise InputError("attention_mask has four dimensions and is not a causal mask with padding")
            folded = real
        return None if folded is None else folded.expand(ids.shape[0], -1).long()


def _is_one_token(ids: Tensor, mask: Tensor | None, cache: EvictionCache) -> bool:
    """Whether every row has tokens and gets one more. Raises InputError if the mask hides what is in the cache."""
    if ids.shape[1] != 1 or not all(cache.seen):
        return False
    if mask is None:
        return True
    if mask.shape != (ids.shape[0], cache.columns + 1):
        return False
    real = mask.to(torch.bool).cpu().numpy()
    return bool(real[:, -1].all()) and cache.history.late(real[:, :-1], cache.columns) == cache.columns


def _dims(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) and value.is_floating_point() else -1
