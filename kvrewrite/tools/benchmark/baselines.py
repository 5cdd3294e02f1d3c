"""Runs other systems on the same model: transformers' caches and attention functions, and kvpress."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvrewrite.errors import OptionError
from kvrewrite.tools.benchmark.measure import Clock, generate

# name -> description
BASELINES = {
    "sdpa": "transformers' full cache, SDPA",
    "eager": "transformers' full cache, eager attention",
    "static": "transformers' static cache, decoding compiled",
    "kvpress": "kvpress at the policies' budgets",
}
FULL = "sdpa"  # the others are compared with this one
PRESSES = {"kvpress-snapkv": "SnapKVPress", "kvpress-expected_attention": "ExpectedAttentionPress"}


class Skipped(Exception):
    """A baseline that can't be measured here, and the reason."""


def parse_baselines(text: str) -> tuple[str, ...]:
    """Parses `sdpa,static` to names; "none" is no baseline, "all" every one that is available."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    if names == ["none"]:
        return ()
    if names == ["all"]:
        return tuple(n for n in BASELINES if n != "kvpress" or has_kvpress())
    for name in names:
        if name not in BASELINES:
            raise OptionError(f"unknown baseline {name!r}; there are: {', '.join(BASELINES)}, or all, or none")
    return tuple(dict.fromkeys(names))


def has_kvpress() -> bool:
    """Whether kvpress is installed."""
    return importlib.util.find_spec("kvpress") is not None


class Transformers:
    """The unmodified model with a DynamicCache."""

    no_prefill: str | None = None
    no_generate: str | None = None
    captures_prompts = False

    def __init__(self, model: Any):
        self.model = model

    def begin(self, batch: int, length: int) -> Any:
        """Returns an empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def prefill(self, cache: Any, ids: Tensor) -> Tensor:
        """Runs the whole prompt in one call."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def step(self, cache: Any, ids: Tensor, position: int) -> Tensor:
        """Decodes one token per row."""
        places = torch.full_like(ids, position)
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=places)
        return out.logits[:, -1:].argmax(-1)

    def memory(self, cache: Any) -> dict[str, int]:
        """Returns the bytes of keys and values."""
        size = 0
        for layer in cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name, None)
                size += tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
        return {"live": size, "leased": size, "reserved": size}

    def generate(self, ids: Tensor, tokens: int, clock: Clock) -> None:
        """Runs transformers' generate."""
        generate(self.model, ids, tokens, clock)

    def chunk(self, cache: Any, ids: Callable[[int], Tensor]) -> Callable[[], Any] | None:
        """Returns None: there are no chunks."""
        return None


class Static(Transformers):
    """The compiled model on a StaticCache filled with zeros: its time does not depend on the content."""

    no_prefill = "a static cache's prompt is not compiled; see the sdpa row"
    no_generate = "only compiled single steps are measured"

    def __init__(self, model: Any, context: int):
        super().__init__(model)
        self.context = context
        self.compiled: Any = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def begin(self, batch: int, length: int) -> Any:
        """Returns a cache that already holds the context."""
        from transformers import StaticCache

        config = self.model.config.get_text_config(decoder=True)
        cache: Any = StaticCache(config=config, max_cache_len=length)
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache.early_initialization(batch, heads, dim, self.model.dtype, self.model.device)
        for layer in cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.fill_(self.context)
        return cache

    def step(self, cache: Any, ids: Tensor, position: int) -> Tensor:
        """Decodes one token per row; on a GPU by replaying a CUDA graph."""
        torch.compiler.cudagraph_mark_step_begin()
        places = torch.full_like(ids, position)
        out = self.compiled(input_ids=ids.clone(), past_key_values=cache, use_cache=True, position_ids=places)
        return out.logits[:, -1:].argmax(-1).clone()


class Press(Transformers):
    """kvpress: compresses after the prompt's attention, layer by layer."""

    no_generate = "a press is not made for generate without its pipeline"

    def __init__(self, model: Any, press: str, context: int, budget: int):
        super().__init__(model)
        import kvpress

        self.press = getattr(kvpress, PRESSES[press])(compression_ratio=max(0.0, 1 - budget / context))

    def prefill(self, cache: Any, ids: Tensor) -> Tensor:
        """Runs the whole prompt in one call, inside the press."""
        # kvpress 0.5.5 reads cache_position, which transformers since 5.17 does not pass by itself.
        places = torch.arange(ids.shape[1], device=ids.device)
        with self.press(self.model):
            out = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, cache_position=places
            )
        return out.logits[:, -1:].argmax(-1)


# --------------------------------------------------------------------------------------------------------------- choice
def _free_bytes(device: torch.device, limit: int | None) -> int:
    """Returns the bytes that may still be allocated."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    return free if limit is None else min(free, limit - torch.cuda.memory_allocated(device))


@contextlib.contextmanager
def subject_of(name: str, model: Any, context: int, batch: int, budget: int | None, limit: int | None) -> Iterator[Any]:
    """Returns the subject of a baseline; the model is restored afterwards. Raises Skipped."""
    if name == "sdpa":
        yield Transformers(model)
    elif name == "static":
        try:
            yield Static(model, context)
        finally:
            forget_compiled()
    elif name == "eager":
        # Scores in the model's dtype, the softmax in fp32, its result in the model's dtype, and the mask.
        config = model.config.get_text_config(decoder=True)
        item = model.dtype.itemsize
        need = batch * context * context * (config.num_attention_heads * (4 + 2 * item) + item)
        if need > (free := _free_bytes(model.device, limit)):
            raise Skipped(
                f"eager attention holds {context:,} x {context:,} scores: {need / 2**30:,.0f} GiB, and "
                f"{free / 2**30:,.0f} are free"
            )
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield Transformers(model)
        finally:
            model.set_attn_implementation(before)
    else:
        if not has_kvpress():
            raise Skipped("kvpress is not installed: pip install kvpress")
        if budget is None:
            raise Skipped("no policy here has a budget to compare with")
        yield Press(model, name, context, budget)


def forget_compiled() -> None:
    """Frees what torch.compile holds: code, and the memory of CUDA graphs."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        with contextlib.suppress(ImportError, AttributeError):
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
