"""Caches of requests that run through the torch.compile backend.

`StockState` backs an ordinary `DynamicCache` of transformers: the tensors in its layers are views of the state's
memory, and the state is attached to those tensors, so that it lives as long as the cache object. `BackendCache` is an
`EvictionCache` that is passed to an ordinary model as its `cache` (`past_key_values` before transformers 5.24).
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from kvrewrite.cache.eviction_cache import CACHE_NAME, EvictionCache
from kvrewrite.cache.pages import Lease, PageStore, to_device
from kvrewrite.cache.request import Request
from kvrewrite.errors import CacheError
from kvrewrite.ir.layout import PAGE, CacheClass
from kvrewrite.ir.program import Program
from kvrewrite.policies.base import Policy

HELD = "_kvrewrite_held"
USE_NEW_CACHE = f"pass an EvictionCache instead: {CACHE_NAME}=kvrewrite.new_cache(model, batch_size)"


# ------------------------------------------------------------------------------------------------ stock caches
class IdentityLease(Lease):
    """A lease that owns its whole store: every head has the same number of pages, in the order layer, row, head. So the
    slots of a layer are one strided view."""

    def __init__(self, spec: CacheClass, batch: int, store: PageStore):
        super().__init__(spec, batch, store)
        self._dense: dict[str, tuple[Tensor, Tensor, tuple[Tensor, ...]]] = {}  # pool, slots, each layer's

    def resize(self, bound: np.ndarray, reserve: int) -> None:
        """Lays out the store again if the longest head needs another number of pages."""
        self.bound = bound
        have, need = self.pages.shape[-1], max(1, -(-int(bound.max(initial=0)) // PAGE))
        if self.store.total > 1 and have == need:
            return
        heads = int(np.prod(self.pages.shape[:-1]))
        for name, (shape, dtype) in self.store.shapes.items():
            old = getattr(self.store, name)
            new = torch.zeros(1 + heads * need, *shape, dtype=dtype, device=self.store.device)
            if self.store.total > 1:
                both = min(have, need)
                source = old[1:].unflatten(0, (heads, have))
                new[1:].unflatten(0, (heads, need))[:, :both] = source[:, :both]
            setattr(self.store, name, new)
        self.store.references = np.ones(1 + heads * need, dtype=np.int32)
        self.store.free = []
        self.counts = np.full(self.pages.shape[:-1], need, dtype=np.int64)
        self.pages = np.arange(1, 1 + heads * need, dtype=np.int32).reshape(*self.pages.shape[:-1], need)
        self._write_table()

    def fork(self) -> Lease:
        """Copies everything."""
        twin: IdentityLease = super().fork()  # type: ignore[assignment]
        store: PageStore = object.__new__(PageStore)
        store.__dict__.update(self.store.__dict__)
        store.references, store.free, store.leases = self.store.references.copy(), [], weakref.WeakSet([twin])
        store.gone, store.consistent = deque(), True
        for name in store.shapes:
            setattr(store, name, getattr(self.store, name).clone())
        self.store.leases.discard(twin)
        twin.store, twin._dense = store, {}
        store.references[:] = self.store.references[:] = 1  # nothing is shared
        store.several = self.store.several = 0
        return twin

    def close(self) -> None:
        """Does nothing: the store is freed with its only lease."""

    def abandon(self) -> None:
        """Does nothing, like `close`."""

    def dense(self, pool: str) -> Tensor:
        """Returns a pool as slots in order: (layers, B, Hkv, room, ...), a view."""
        whole = getattr(self.store, pool)
        found = self._dense.get(pool)
        if found is None or found[0] is not whole:
            shape = (*self.pages.shape[:3], self.pages.shape[-1] * PAGE)
            slots = whole[1:].flatten(0, 1).unflatten(0, shape)
            found = self._dense[pool] = (whole, slots, slots.unbind(0))
        return found[1]

    def views(self) -> list[tuple[Tensor, Tensor]]:
        """Returns keys and values of each layer, (B, Hkv, slots, D): the live slots; shorter rows are padded at the
        end."""
        both = []
        for pool in ("k_pages", "v_pages"):
            self.dense(pool)
            both.append(self._dense[pool][2])
        most = self.bound.max(axis=(1, 2), initial=0).tolist()
        return [(k.narrow(2, 0, n), v.narrow(2, 0, n)) for k, v, n in zip(*both, most)]


@dataclass
class Held:
    """What is attached to a tensor of a DynamicCache: the state that owns it, its index, and its step."""

    state: StockState
    place: int  # keys and values of each layer in turn
    step: int


class StockState(EvictionCache):
    """The policy's state of a request whose keys and values lie in a `DynamicCache`, with these keys and values."""

    lease_type = IdentityLease
    other_rows = "keys and values lie in a DynamicCache"

    def __init__(self, model: Any, batch_size: int):
        refuse_stock(model.program, model.policy)
        super().__init__(model, batch_size)
        self.step = 0

    def tensors(self) -> list[Tensor]:
        """Returns keys and values of each layer in turn, for the layers of a DynamicCache to hold."""
        self.step += 1
        layers = {n: pair for lease in self.stock_leases for n, pair in zip(lease.layers, lease.views())}
        found = [tensor for _, pair in sorted(layers.items(), key=lambda entry: entry[0]) for tensor in pair]
        for place, tensor in enumerate(found):
            setattr(tensor, HELD, Held(self, place, self.step))
        return found

    @property
    def stock_leases(self) -> list[IdentityLease]:
        """Returns the leases with their own type."""
        return self.leases  # type: ignore[return-value]

    # -- a token of every row that joins what is held (kvrewrite/dynamo/append_tokens.py)
    # --------------------------------------
    def next_positions(self) -> Tensor:
        """Returns the position of each row's next token, (B, 1) int64."""
        return to_device([[n] for n in self.seen], self.device)

    def live(self, c: int) -> Tensor:
        """Returns which slots of a class hold a token, the same in all its layers and heads: (B, 1, 1, room) bool."""
        lease = self.stock_leases[c]
        slot = torch.arange(lease.pages.shape[-1] * PAGE, device=self.device)
        return slot < lease.lens[0, :, :1, None, None]

    def append(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Writes one token per row after its last slot, in all layers at once; there must be room for it. keys, values:
        per class, (layers, B, Hkv, 1, D)."""
        place = self.next_positions().expand(-1, 2).to(torch.int32)
        for lease, k, v in zip(self.stock_leases, keys, values, strict=True):
            at = lease.lens[:, :, :, None].long()
            for pool, new in (("k_pages", k), ("v_pages", v), ("pos_pages", place[None, :, None, None])):
                target = lease.dense(pool)
                new = new.to(target.dtype).expand(*at.shape, target.shape[-1])
                target.scatter_(3, at[..., None].expand_as(new), new)
            lease.lens.add_(1)


def state_of(tensors: list[Tensor]) -> StockState:
    """Returns the state that backs what the layers of a DynamicCache hold; raises CacheError if there is none."""
    held = [getattr(t, HELD, None) for t in tensors]
    first = held[0]
    if first is None or any(h is None or h.state is not first.state or h.place != i for i, h in enumerate(held)):
        raise CacheError(
            "past_key_values holds keys and values that the kvrewrite backend did not leave there: the cache was filled or "
            f"changed by something else (a call that was not compiled, beam search, crop). Begin with an empty cache, or "
            f"{USE_NEW_CACHE}"
        )
    if any(h.step != first.state.step for h in held if h is not None):
        raise CacheError(
            "past_key_values is an older state of a cache that has gone on since, and evicted tokens can't come back. Copy "
            "the cache (copy.deepcopy) before it goes on"
        )
    return first.state


def refuse_stock(program: Program, policy: Policy) -> None:
    """Raises CacheError if an ordinary DynamicCache can't hold what the policy keeps of this model."""
    reason = ""
    windows = [w for c in program.layout.classes for w in c.windows]
    if policy.recalls:
        reason = "what has left the device lies in a memory of its own"
    elif policy.ragged or policy.head_pattern:
        reason = "the heads of a layer keep different numbers of slots"
    elif policy.quantize != "none":
        reason = f"keys and values are stored as {policy.quantize}"
    elif not policy.uniform_layers:
        reason = "layers keep different numbers of slots, and transformers makes its mask for one"
    elif any(windows):
        reason = "the model has layers with a window, and transformers counts their tokens by what they hold"
    elif any(site.alibi for site in program.sites):
        reason = "the model has ALiBi, which transformers makes for the whole text"
    elif program.layout.length_tables:
        reason = (
            "the model's rotary frequencies depend on the length of the request, which a DynamicCache does not know"
        )
    if reason:
        raise CacheError(f"{policy.name}: a DynamicCache can't hold this: {reason}; {USE_NEW_CACHE}")


# ------------------------------------------------------------------------------------------------ our own cache
@torch.library.custom_op("kvrewrite::through_cache", mutates_args=())
def through_cache(k: Tensor, v: Tensor, handle: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Stands for the update of a `BackendCache` in traces of ordinary models; the backend removes it. k: (B, Hkv, T,
    D); the results are as long as the mask that transformers makes, columns + T."""
    raise CacheError(
        'an EvictionCache was passed to a model that is compiled with another backend; compile it with backend="kvrewrite"'
    )


@through_cache.register_fake
def _(k, v, handle, columns):  # type: ignore[no-untyped-def]
    shape = (*k.shape[:2], columns + k.shape[2])
    return k.new_empty(*shape, k.shape[3]), v.new_empty(*shape, v.shape[3])


class BackendCache(EvictionCache):
    """An `EvictionCache` for a model that is compiled with backend="kvrewrite". Make one with `kvrewrite.new_cache`.

    The first compiled model that it goes through determines its policy.
    """

    other_rows = "compiled graphs of the backend count its tokens"

    def __init__(
        self, batch_size: int, device: torch.device, *, max_length: int | None = None, compileable: bool = False
    ):
        Cache.__init__(self, layers=[])
        if batch_size < 1:
            raise CacheError(f"batch_size is {batch_size}, expected at least 1")
        self._rows, self.device, self.max_length = batch_size, torch.device(device), max_length
        self.columns, self.seen = 0, [0] * batch_size
        self.leases, self.states = [], []
        self.bound = False
        self.is_compileable = compileable  # whether generate(compile_config=...) compiles for it
        self._make_handle()

    def _make_handle(self) -> None:
        """Makes the tensor by which a compiled graph, which only gets tensors, identifies the cache."""
        self.handle = torch.empty(0, device=self.device)
        setattr(self.handle, HELD, weakref.ref(self))

    def bind(self, model: Any) -> None:
        """Makes this a cache of `model`, a `RewrittenModel`, if it is not one yet."""
        if self.bound:
            return
        compileable = self.is_compileable
        EvictionCache.__init__(self, model, self._rows, max_length=self.max_length)
        self.is_compileable, self.bound = compileable, True

    def reset(self) -> None:
        """Forgets everything and frees the memory."""
        if self.bound:
            super().reset()

    def fork(self) -> Self:
        """Returns an independent copy that shares pages until one of the two writes to them."""
        self._check_bound()
        twin: Any = super().fork()
        twin._make_handle()
        return twin

    __copy__ = fork

    def roll_back(self, columns: int) -> None:
        """Becomes what it was at a checkpoint; graphs go on knowing it by its handle."""
        self._check_bound()
        handle = self.handle
        super().roll_back(columns)
        self.handle = handle

    def _check_bound(self) -> None:
        if not self.bound:
            raise CacheError("the cache has not been through a compiled model yet; call the model with it first")

    # -- what the layers of an ordinary model call, only while it is being traced: its rewrite runs instead ---------
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns keys and values for attention: as many as the model's mask has columns."""
        _check_traced()
        return torch.ops.kvrewrite.through_cache(key_states, value_states, self.handle, self.columns)

    def update_indexer(self, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the keys by which sparse attention chooses tokens, (B, T, D)."""
        keys = indexer_key_states[:, None]
        return self.update(keys, keys)[0][:, 0]

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer without attention carries a state. In the trace every call begins a text; the real state is
        in `states`, and the rewrite continues from it."""
        _check_traced()
        return False

    def get_conv_state(self, *args: Any, **kwargs: Any) -> None:
        """See `has_previous_state`."""
        _check_traced()

    get_recurrent_state = get_linear_cache = get_conv_state

    def update_conv_state(
        self, conv_states: Tensor, *args: Any, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Returns the inputs (B, channels, T) of a short convolution, as transformers does for a first call."""
        _check_traced()
        return nn.functional.pad(conv_states, (max(0, (conv_kernel_size or 0) - conv_states.shape[-1]), 0))

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the state after a call."""
        _check_traced()
        return recurrent_states

    def set_linear_cache(self, *args: Any, **kwargs: Any) -> None:
        """Another name for that method."""
        _check_traced()

    def __repr__(self) -> str:
        return super().__repr__() if self.bound else f"EvictionCache(batch_size={self._rows}, not used yet)"


def _check_traced() -> None:
    """Raises CacheError if a model itself runs with a `BackendCache`, not its trace."""
    if not torch.compiler.is_dynamo_compiling():
        raise CacheError(
            "an EvictionCache came to a model that is not compiled, or to a part of it that torch.compile left out (a graph "
            'break): compile the model with backend="kvrewrite", and with fullgraph=True to see what breaks its graph. generate('
            "compile_config=...) compiles prompts only if it is given a prefill_chunk_size (a large one, for one piece), and on "
            "a CPU nothing, unless compile_config._compile_all_devices = True"
        )


def type_for(model: nn.Module) -> type[BackendCache]:
    """Returns `BackendCache`, or a subclass that also passes for the cache classes that the model's module checks
    for."""
    home = type(model).__module__
    own = [c for c in vars(sys.modules[home]).values() if isinstance(c, type) and c.__module__ == home]
    own = [c for c in own if issubclass(c, Cache) and not issubclass(c, EvictionCache)]
    if not own:
        return BackendCache
    ours = {name for c in (Request, EvictionCache, BackendCache) for name in vars(c)}
    inherited = {n: v for n, v in vars(Cache).items() if (callable(v) or isinstance(v, property)) and n not in ours}
    return type(BackendCache.__name__, (BackendCache, *own), inherited)


def cache_of(handle: Tensor) -> BackendCache:
    """Returns the cache that a handle belongs to."""
    found = getattr(handle, HELD, lambda: None)()
    if found is None:
        raise CacheError("the EvictionCache of this call is gone")
    return found
