"""Sparse prefill (MInference) beside dense chunked prefill: Llama-3.1-8B's shape, bf16, batch 1. Needs a GPU.

    python -m benchmarks.sparse_prefill layer [--tokens 131072] [--chunk 8192] [--patterns vertical_slash:1000:58]
    python -m benchmarks.sparse_prefill model [--tokens 131072] [--budget 0] [--chunk 8192] [--patterns ...] [--repeat 3]

layer: attention of one layer's chunk at a quarter, half and all of the tokens: dense and sparse from pages ("read" is part of
both), and sparse's parts (reading, sums of the last queries, choice of blocks, attention on them), medians in ms, with the
relative error of the attention kernel.
model: seconds of a prefill of the whole model, dense and sparse at the same budget (0: nothing is evicted), medians, the share
of dense attention's work that was computed, and where the time goes. Weights are random, so diagonals lie apart where trained
models have them side by side: fewer of them make the same share. --patterns: one text for all heads, or several that heads take
in turn. --out adds JSON lines to a file. On a CPU: model --device cpu --shape tiny.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvrewrite
from kvrewrite.kernels import composed
from kvrewrite.kernels.attention import chunk as dense_kernel
from kvrewrite.kernels.attention import reference, sparse_chunk, sparse_index
from kvrewrite.kernels.attention.patterns import parse_head
from kvrewrite.kernels.attention.sparse_sums import last_sums
from kvrewrite.kernels.groups import At, Dense, Logits, Pages, Placed, Slots, Tokens, VisibleBlocks
from kvrewrite.passes.insert.sparse_prefill import insert_sparse_prefill
from kvrewrite.tools.benchmark.shapes import ShapeSource

HEADS, KV_HEADS, D = 32, 8, 128
Row = dict[str, Any]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], repeat: int = 10) -> float:
    """The median of some calls, after one."""
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


# -------------------------------------------------------------------------------------------------------- one layer
def layer(given: argparse.Namespace) -> Iterator[Row]:
    """One row for each length of the text."""
    for tokens in (given.tokens // 4, given.tokens // 2, given.tokens):
        yield {"part": "layer", "tokens": tokens, "chunk": given.chunk, **one_length(given, tokens - given.chunk)}


def one_length(given: argparse.Namespace, c: int) -> Row:
    """A chunk after c cached tokens."""
    t, made = given.chunk, {"device": "cuda", "dtype": torch.bfloat16}
    words = ",".join(given.patterns[h % len(given.patterns)] for h in range(HEADS))
    q, k, v = (torch.randn(1, t, h * D, **made).view(1, t, h, D).transpose(1, 2) for h in (HEADS, KV_HEADS, KV_HEADS))
    k_cache, v_cache = (torch.randn(1, KV_HEADS, c, D, **made) for _ in range(2))
    slots = Slots(k_cache, v_cache, torch.full((1, KV_HEADS), c, dtype=torch.int32, device="cuda"))
    at = At(torch.arange(c, c + t, device="cuda")[None], torch.full((1,), t, dtype=torch.int32, device="cuda"))
    fresh, logits = Tokens(q, k, v), Logits(scale=D**-0.5)
    table = torch.randperm(KV_HEADS * c // 64, device="cuda").int().view(1, KV_HEADS, -1)
    where = torch.argsort(table.flatten())  # of each page, its place in the tensors
    pools = [x.view(-1, 64, D)[where].contiguous() for x in (k_cache, v_cache)]
    cache = Pages(*pools, torch.zeros(len(pools[0]), 64, 2, dtype=torch.int32, device="cuda"), table, slots.lens)
    keys, values = sparse_chunk.gathered_together(cache, k, v)
    sums = last_sums(q, keys, slots.lens, at, logits)

    def choose() -> VisibleBlocks:
        return sparse_index.find_visible(words, fresh, slots, at, logits, lambda *_: sums)

    visible = choose()
    share = float(sparse_index.computed_share(visible, fresh, slots, at).mean())
    took = {
        "dense": milliseconds(lambda: dense_kernel.chunk_attention(fresh, slots, at, logits)),
        "sparse, read": milliseconds(lambda: sparse_chunk.sparse_attention(words, fresh, Dense(), cache, at, logits)),
        "dense, read": milliseconds(lambda: composed.cached_attention(fresh, Dense(), cache, at, logits)),
        "read": milliseconds(lambda: sparse_chunk.gathered_together(cache, k, v)),
        "sums": milliseconds(lambda: last_sums(q, keys, slots.lens, at, logits)),
        "choice": milliseconds(choose),
        "attention": milliseconds(
            lambda: sparse_chunk.attend_visible(q, keys, values, visible, slots.lens, at, logits)
        ),
    }
    flops = share * 4 * HEADS * D * (t * c + t * (t + 1) / 2)
    return {
        "patterns": given.patterns, "share": round(share, 4), "ms": {name: round(ms, 3) for name, ms in took.items()},
        "attention_tflops": round(flops / took["attention"] / 1e9, 1),
        "error": first_rows_error(fresh, slots, keys, values, visible, at, logits),
    }  # fmt: skip


def first_rows_error(
    fresh: Tokens, slots: Slots, keys: Tensor, values: Tensor, visible: VisibleBlocks, at: At, logits: Logits
) -> float:
    """Relative error of the kernel on the first 128 queries, against float64."""
    out, _ = sparse_chunk.attend_visible(fresh.q, keys, values, visible, slots.lens, at, logits)
    blocks, columns = visible
    assert blocks is not None and columns is not None
    c, t, n = slots.k_cache.shape[2], fresh.q.shape[2], 128
    end = c + n
    live = torch.ones(1, KV_HEADS, end, dtype=torch.bool, device="cuda")
    places = torch.arange(end, device="cuda").expand(1, KV_HEADS, end)
    cut = VisibleBlocks(blocks[:, :, :1, : -(-end // 64)], torch.where(columns < end, columns, -1))
    wrong, size = 0.0, 0.0
    for h in range(HEADS):  # a head at a time: float64 of all is large
        kv = h // (HEADS // KV_HEADS)
        one = Tokens(fresh.q[:, h : h + 1, :n].double(), *(x[:, kv : kv + 1, :end].double() for x in (keys, values)))
        placed = Placed(at.positions[:, :n], places[:, :1], live[:, :1])
        seen = VisibleBlocks(cut.blocks[:, h : h + 1], cut.columns[:, h : h + 1])  # type: ignore[index]
        want, _ = reference.attend(one, placed, logits, own=True, visible=seen)
        wrong += float((out[:, h : h + 1, :n].double() - want).square().sum())
        size += float(want.square().sum())
    assert t >= n
    return float((wrong / size) ** 0.5)


# ------------------------------------------------------------------------------------------------------- whole model
def prefill(model: Any, ids: Tensor) -> float:
    """Seconds of a prompt."""
    cache = model.new_cache(1, max_length=ids.shape[1] + 128)
    synchronize()
    begin = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    synchronize()
    return time.perf_counter() - begin


class Shares:
    """Watches `find_visible`: what share of dense attention's work was computed."""

    def __init__(self, module: Any) -> None:
        self.module, self.find, self.computed, self.dense = module, module.find_visible, 0.0, 0.0

    def __enter__(self) -> Shares:
        self.module.find_visible = self._find
        return self

    def _find(self, text: str, tokens: Tokens, slots: Slots, at: At, *rest: Any) -> VisibleBlocks:
        visible: VisibleBlocks = self.find(text, tokens, slots, at, *rest)
        t, c = tokens.q.shape[2], slots.k_cache.shape[2]
        work = t * c + t * t / 2
        self.computed += work * float(sparse_index.computed_share(visible, tokens, slots, at).mean())
        self.dense += work
        return visible

    def __exit__(self, *_: object) -> None:
        self.module.find_visible = self.find

    @property
    def share(self) -> float:
        return self.computed / max(1.0, self.dense)


def where_time_goes(model: Any, ids: Tensor) -> dict[str, float]:
    """Milliseconds of kernels by name, the largest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        prefill(model, ids)
    took: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            took[event.name[:60]] += event.time_range.elapsed_us()  # type: ignore[assignment]
    return {name: round(us / 1e3, 1) for name, us in took.most_common(24)}


def compile_parts(model: Any) -> None:
    """Without graphs of chunks: every chunk of a growing cache has a shape of its own, and is captured in some run."""
    model.compile()
    model.executor.prompt = model.executor.prompt.execution


def make_sparse(model: Any, patterns: list[str]) -> None:
    """Gives a model its patterns; compiled again if it was."""
    again = model.executor is not None
    model.uncompile()
    heads = [parse_head(word) for word in patterns]
    each = {s.layer: tuple(heads[h % len(heads)] for h in range(s.heads)) for s in model.sites}
    insert_sparse_prefill(model.graph_module, model.sites, each)
    if again:
        compile_parts(model)


def whole(given: argparse.Namespace) -> Iterator[Row]:
    """A row for the dense and one for the sparse prefill."""
    begin = time.perf_counter()

    def say(what: str) -> None:
        print(f"# {time.perf_counter() - begin:6.1f} s  {what}", flush=True)

    source = ShapeSource(given.shape, device=given.device)
    if given.layers:
        source.hf_config.num_hidden_layers = given.layers
    options = {"chunk": given.chunk, **({"budget": given.budget} if given.budget else {})}
    model = kvrewrite.transform(source.base, "streaming_llm" if given.budget else "full", check="off", **options)
    ids = torch.randint(1, source.hf_config.vocab_size, (1, given.tokens), device=given.device)
    say("model made")
    if given.device != "cpu":
        compile_parts(model)
    for kind in ("dense", "sparse"):
        row: Row = {"part": "model", "kind": kind, "shape": given.shape, "layers": source.hf_config.num_hidden_layers}
        row |= {"tokens": given.tokens, "budget": given.budget, "chunk": given.chunk}
        if kind == "sparse":
            make_sparse(model, given.patterns)
            row["patterns"] = given.patterns
        prefill(model, ids[:, : min(given.tokens, 3 * given.chunk + 100)])
        say(f"{kind}: compiled")
        seconds = [prefill(model, ids) for _ in range(given.repeat)]
        row |= {"seconds": [round(s, 4) for s in seconds], "median": round(statistics.median(seconds), 4)}
        say(f"{kind}: {row['seconds']}")
        if given.device != "cpu":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            row["kernels_ms"] = where_time_goes(model, ids)
        if kind == "sparse":
            with Shares(sparse_chunk if given.device != "cpu" else sys.modules["kvrewrite.ops.attention"]) as shares:
                prefill(model, ids)
            row["share"] = round(shares.share, 4)
        yield row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("part", choices=["layer", "model"])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: all")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--budget", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--patterns", nargs="+", default=["vertical_slash:1000:58"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for row in layer(given) if given.part == "layer" else whole(given):
        print(json.dumps(row), flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
