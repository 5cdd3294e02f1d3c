"""InfLLM with a million tokens: Llama-3.1-8B's shape, bf16, batch 1, the memory in pinned host memory. Needs a GPU.

    python -m benchmarks.infllm [--tokens 1000000] [--real 65536] [--steps 5] [--chunk 2048] [--budget 4224] [--seconds 110]

The first `--real` tokens are a prompt, chunk by chunk. From there the row is taken to `--steps` places up to `--tokens`: its
positions are moved on, and the blocks between get random representatives and whatever host memory holds, so that all that is
done from then on is what a text of that length needs. At each place: milliseconds of a chunk and of a generated token, blocks
that were looked up and that had to be copied (per layer), and the peak of GPU memory; "all new": the same where no block that is
looked up is on the device, the worst case. All layers share one layer's host memory, which would be 131 GB of them all; copies
take the same time. What is computed is what `model(ids)` computes, op by op. It ends after `--seconds`, with the places that it
reached.
On a CPU: --device cpu --shape tiny --tokens 4000 --real 600 --chunk 64 --budget 192.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import kvrewrite
from kvrewrite.kernels.recall import memory
from kvrewrite.kernels.recall.lookup import settle
from kvrewrite.tools.benchmark.shapes import ShapeSource


class Copies:
    """Counts blocks that are looked up and that are copied, while it is on."""

    def __init__(self) -> None:
        self.found = self.copied = 0

    def __call__(self, use: Tensor, blocks: list[int]) -> Any:
        places, copied = settle(use, blocks)
        self.found, self.copied = self.found + len(blocks), self.copied + len(copied)
        return places, copied


def share_host_memory(cache: Any, tokens: int) -> None:
    """Gives all layers of a cache one layer's keys and values in host memory, for so many tokens."""
    made: dict[str, Tensor] = {}
    for state in cache.states:
        kind = state.input.rpartition("_")[0]
        if state.host and state.per_token:
            if kind not in made:
                state.hold(tokens)
                made[kind] = state.value.zero_()
            state.value = made[kind]


def move_on(cache: Any, policy: Any, tokens: int) -> None:
    """Takes the only row of a cache, whose window is full, to a place after about `tokens` tokens."""
    ring = policy.budget + policy.chunk
    step = policy.block * ring  # so that blocks and places among the newest stay where they are
    step //= torch.gcd(torch.tensor(policy.block), torch.tensor(ring)).item()
    jump = max(0, tokens - cache.seen[0]) // step * step
    before = policy.gone(cache.seen[0])
    for lease in cache.leases:
        lease.store.pos_pages += jump
    cache.seen[0] += jump
    blocks = [(n - policy.start) // policy.block for n in (before, policy.gone(cache.seen[0]))]
    for state in cache.states:
        if "_marks_" in state.input:
            state.hold(cache.seen[0])
            known = state.value[:, : blocks[0]].float()
            state.value[:, blocks[0] : blocks[1]].normal_(float(known.mean()), float(known.std()))


def forget(cache: Any) -> None:
    """No block is on the device any more."""
    for state in cache.states:
        if "_near_use_" in state.input:
            state.value.zero_()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(model: Any, cache: Any, ids: Tensor, generated: bool) -> float:
    """Seconds of one call."""
    synchronize(model.device.type)
    begin = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1, generated=generated)
    synchronize(model.device.type)
    return time.perf_counter() - begin


def measured(given: argparse.Namespace, model: Any, cache: Any) -> dict[str, Any]:
    """A row: what chunks and generated tokens cost where the cache stands."""
    device, vocabulary = model.device, model.program.vocab_size
    row: dict[str, Any] = {"tokens": cache.seen[0]}
    calls_of = {"chunk": (given.chunk, given.chunks), "token": (1, given.generated)}
    for name, all_new in itertools.product(calls_of, (False, True)):
        (width, count), copies, took = calls_of[name], Copies(), []
        with unittest.mock.patch.object(memory, "settle", copies):
            for _ in range(count):
                if all_new:
                    forget(cache)
                ids = torch.randint(1, vocabulary, (1, width), device=device)
                took.append(timed(model, cache, ids, width == 1))
        name += "_all_new" * all_new
        calls = count * len(model.sites)
        row[f"{name}_ms"] = round(1e3 * statistics.median(took), 2)
        row[f"{name}_blocks"], row[f"{name}_copied"] = (round(n / calls, 1) for n in (copies.found, copies.copied))
    row["us_per_token_of_a_chunk"] = round(1e3 * row["chunk_ms"] / given.chunk, 1)
    if device.type != "cpu":
        row["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each place, and one for what the cache holds."""
    begin = time.perf_counter()

    def say(what: str) -> None:
        print(f"# {time.perf_counter() - begin:6.1f} s  {what}", flush=True)

    source = ShapeSource(given.shape, device=given.device)
    if given.layers:
        source.hf_config.num_hidden_layers = given.layers
    model = kvrewrite.transform(
        source.base, "infllm", check="off", budget=given.budget, chunk=given.chunk, distant=given.distant
    )
    say(f"model made: {source.name}, {source.hf_config.num_hidden_layers} layers")
    cache = model.new_cache()
    share_host_memory(cache, given.tokens + 64 * given.chunk)
    say("host memory made")
    ids = torch.randint(1, source.hf_config.vocab_size, (1, given.real), device=given.device)
    took = [timed(model, cache, part, False) for part in ids.split(given.chunk, 1)]
    say(
        f"a prompt of {given.real} tokens: {sum(took):.2f} s; its last chunks {[round(1e3 * s, 1) for s in took[-4:]]} ms"
    )
    for place in [given.real, *(given.tokens * (n + 1) // given.steps for n in range(given.steps))]:
        if time.perf_counter() - begin > given.seconds:
            say("no time left")
            break
        move_on(cache, model.policy, place)
        row = measured(given, model, cache)
        say(f"after {row['tokens']} tokens")
        yield row
    held = cache.memory()
    all_host = 2 * len(model.sites) * given.tokens * source.hf_config.num_key_value_heads * source.hf_config.head_dim
    yield {"cache_device_gib": round(held.reserved / 2**30, 2), "host_gb_of_all_layers": round(all_host * 2 / 1e9, 1)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: all")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--real", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=4224)
    parser.add_argument("--distant", default="constant", choices=["constant", "original"])
    parser.add_argument("--chunks", type=int, default=5, help="that are timed at each place")
    parser.add_argument("--generated", type=int, default=12, help="tokens, the same")
    parser.add_argument("--seconds", type=float, default=110)
    given = parser.parse_args()
    for row in rows(given):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
