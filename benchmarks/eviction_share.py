"""What eviction costs at Llama-3.1-8B's shapes (32 query heads, 8 kv heads, head dim 128, bf16), batch 1. Needs a GPU.

    python -m benchmarks.eviction_share [mass] [gated] [ragged] [decode] [share] [--layers 2] [--policy NAME] [--json FILE]

mass: column mass of H2O (all rows), SnapKV and NACL. gated: attention with 60% of the tokens evicted, beside dense chunk
attention. ragged: an Ada-KV eviction, beside the torch reference and the same with equal heads. decode: steps of ragged policies,
of positions that change with every token, and of policies with states. share: the part of a prompt's time that eviction takes.

Prints a Markdown table; JSON has the same rows. Times are medians; `error` is against the torch reference where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor

import kvrewrite.ops  # noqa: F401
from benchmarks.column_mass import HKV, PLAIN, D, H, error, tokens
from benchmarks.evict import PAGE, arguments
from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.attention.chunk import chunk_attention
from kvrewrite.kernels.attention.column_mass import column_mass
from kvrewrite.kernels.attention.gated import gated_attention
from kvrewrite.kernels.groups import At, KeySlots, Logits, Placed, Slots, Tokens, Watch
from kvrewrite.kernels.update import reference as evict
from kvrewrite.kernels.update import select
from kvrewrite.ops.dispatch import kernels
from kvrewrite.passes.lower import decode as lower_decode
from kvrewrite.passes.lower import prompt as lower
from tests.support.flat import flat

# Launches that a prompt makes for eviction alone. Elementwise work that Inductor fuses with other things is not among them.
EVICTION = (
    "cache_update", "observe", "pool_window", "newest_rows", "newest_ranks", "ranks", "uniform", "slot_positions",
    "slot_rotary", "slot_rotary_layers", "read_pages", "kept_above", "share_layers",
)  # fmt: skip


def milliseconds(run: Callable[[], Any], rep: int = 60) -> float:
    """Median."""
    return float(triton.testing.do_bench(run, warmup=10, rep=rep, return_mode="median"))


def row(part: str, what: str, shape: str, ms: float, note: str = "", wrong: float | None = None) -> dict[str, Any]:
    """One line of the table."""
    found = {"part": part, "what": what, "shape": shape, "ms": round(ms, 4), "note": note, "error": wrong}
    print(found, flush=True)
    return found


# --------------------------------------------------------------------------------------------------------- column mass
def mass() -> list[dict[str, Any]]:
    """Rows of queries that are summed over all keys."""
    found = []
    cases = (
        ("H2O, all rows", 3072, 16384, 3072),
        ("SnapKV, window of 32", 131072, 0, 32),
        ("NACL, 1% of the prompt (preset code)", 131072, 0, 1310),
        ("NACL, a fifth of the prompt (preset paper)", 131072, 0, 26214),
    )
    for name, t, c, rows in cases:
        q, k, cache = tokens(t, H), tokens(t, HKV), tokens(c, HKV).contiguous()
        positions = c + torch.arange(t, device="cuda")[None]
        valid = torch.tensor([t], device="cuda", dtype=torch.int32)
        lens = torch.full((1, HKV), c, device="cuda", dtype=torch.int32)
        places = torch.arange(c + t, device="cuda").expand(1, HKV, -1)
        live = torch.ones_like(places, dtype=torch.bool)
        keys = torch.cat([cache, k], 2)
        # A log-sum-exp of about the right size: what weights sum up to does not change the time.
        lse = torch.full((1, H, t), float(torch.tensor(c + t).log()) + 0.5, device="cuda")
        weights = (torch.arange(t, device="cuda") >= t - rows).float()[None]
        newest = 0 if rows == t else rows

        def run(
            q: Tensor = q, k: Tensor = k, lse: Tensor = lse, weights: Tensor = weights, cache: Tensor = cache,
            lens: Tensor = lens, positions: Tensor = positions, valid: Tensor = valid, newest: int = newest,
        ) -> Tensor:  # fmt: skip
            watch = Watch(q, k, lse, weights, newest=newest)
            return column_mass(watch, KeySlots(cache, lens), At(positions, valid), Logits(**PLAIN))

        want = torch.zeros(1, HKV, c + t, device="cuda")
        for at in range(t - rows, t, 128) if rows <= 3072 else ():  # the matrix of 128 rows at a time
            cut = slice(at, min(at + 128, t))
            watch = Watch(q[:, :, cut], keys, lse[:, :, cut], weights[:, cut])
            want += reference.column_mass(watch, Placed(positions[:, cut], places, live), Logits(**PLAIN))
        wrong = error(run(), want) if rows <= 3072 else None
        ms = milliseconds(run)
        pairs = rows * (c + t) - rows * (rows - 1) // 2
        found.append(
            row("mass", name, f"{t} tokens, {c} slots", ms, f"{2 * H * D * pairs / ms / 1e9:.0f} TFLOP/s", wrong)
        )
        del q, k, cache, keys, lse, want
        torch.cuda.empty_cache()
    return found


# -------------------------------------------------------------------------------------------------------------- gates
def gated() -> list[dict[str, Any]]:
    """60% of a prompt's tokens hidden, each head its own, beside the dense kernel on the same tokens."""
    found = []
    for t in (32768, 131072):
        q, k, v, none = tokens(t, H), tokens(t, HKV), tokens(t, HKV), tokens(64, HKV).contiguous()
        lens = torch.zeros(1, HKV, device="cuda", dtype=torch.int32)
        positions, valid = torch.arange(t, device="cuda")[None], torch.tensor([t], device="cuda", dtype=torch.int32)
        rest = (Slots(none, none, lens), At(positions, valid))
        hidden = (torch.rand(1, t, HKV, device="cuda") < 0.6).transpose(1, 2)

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v, rest: Any = rest) -> Any:
            return chunk_attention(Tokens(q, k, v), *rest, Logits(**PLAIN))

        def sparse(q: Tensor = q, k: Tensor = k, v: Tensor = v, rest: Any = rest, hidden: Tensor = hidden) -> Any:
            return gated_attention(Tokens(q, k, v), *rest, Logits(hidden=hidden, **PLAIN))

        places = torch.arange(t, device="cuda").expand(1, HKV, -1)
        placed = Placed(positions[:, -64:], places, torch.ones_like(places, dtype=torch.bool))
        want, _ = reference.attend(Tokens(q[:, :, -64:], k, v), placed, Logits(hidden=hidden, **PLAIN))
        wrong = error(sparse()[0][:, :, -64:], want)
        whole, part = milliseconds(dense, 300), milliseconds(sparse, 300)
        found.append(row("gated", "dense chunk attention", f"{t} tokens", whole))
        found.append(row("gated", "60% evicted", f"{t} tokens", part, f"{part / whole:.2f} of dense", wrong))
        del q, k, v, want
        torch.cuda.empty_cache()
    return found


# ------------------------------------------------------------------------------------------------------------- ragged
def ragged() -> list[dict[str, Any]]:
    """One eviction of a layer: equal heads, heads that share their budget, and the latter in torch."""
    found = []
    for slots, new, keep in ((16384, 3072, 16384), (0, 131072, 16384), (0, 131072, 2048)):
        args = arguments(slots, new, keep, 0, "plain", 32)
        shape = f"{slots} slots + {new} tokens -> {keep}"
        width = -(-(slots + new) // PAGE)
        need = HKV * (-(-keep // PAGE) + 1)
        before = len(args["k_pages"])
        pools = ("k_pages", "v_pages", "score_pages", "pos_pages")
        for name in pools:
            x = args[name]
            args[name] = torch.cat([x, x.new_zeros(need, *x.shape[1:])])
        shared = args | {
            "floor": torch.tensor([0.2], dtype=torch.float64, device="cuda"),
            "spare": torch.arange(before, before + need, dtype=torch.int32, device="cuda")[None],
            "next_table": torch.zeros(1, HKV, width, dtype=torch.int32, device="cuda"),
        }
        # Only lengths and, in equal heads, positions are written to where they are read.
        kept = {n: args[n].clone() for n in ("lens", "pos_pages")}

        def back(args: dict[str, Any] = args, kept: dict[str, Tensor] = kept) -> None:
            for n, x in kept.items():
                args[n].copy_(x)

        idle = milliseconds(back)
        times = {}
        calls = (
            ("equal heads", flat(select.cache_update), args),
            ("heads share", flat(select.cache_update), shared),
            ("heads share, torch", flat(evict.cache_update), shared),
        )
        lens = {}
        for name, update, given in calls:

            def run(update: Any = update, given: dict[str, Any] = given, back: Callable[[], None] = back) -> None:
                back()
                update(**given)

            times[name] = milliseconds(run) - idle
            lens[name] = args["lens"].tolist()
            back()
        for name, ms in times.items():
            same = "" if "share" not in name else f"same lengths: {lens['heads share'] == lens['heads share, torch']}"
            found.append(row("ragged", name, shape, ms, same))
        del args, shared, kept
        torch.cuda.empty_cache()
    return found


# ------------------------------------------------------------------------------------------------------------- decode
def prepared(policy: str, options: dict[str, Any], layers: int, prompt: int, static: bool) -> tuple[Any, Any]:
    """The compiled model of `layers` layers, and a cache with a prompt. The prompt runs uncompiled: that is not measured."""
    from kvrewrite.runtime.parts import Execution
    from kvrewrite.tools.benchmark.shapes import ShapeSource
    from kvrewrite.tools.subjects import Arm, PolicySpec

    source = ShapeSource("llama-3.1-8b", device="cuda")
    source.hf_config.num_hidden_layers = layers
    model = source.rewritten(Arm(PolicySpec(policy, options)))
    model.compile(static_decode=static)
    if static:
        model.executor.prompt = Execution(lower.lower_prefill(model.graph_module), None)
    generator = torch.Generator(device="cuda").manual_seed(0)
    cache = model.new_cache(1)
    ids = torch.randint(1, 128000, (1, prompt), generator=generator, device="cuda")
    model(ids, past_key_values=cache, logits_to_keep=1)
    return model, cache


def step_ms(model: Any, cache: Any, steps: int = 40) -> float:
    """Median of single synchronized steps."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    times = []
    for token in torch.randint(1, 128000, (1, steps + 6), generator=generator, device="cuda").split(1, dim=1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model(token, past_key_values=cache)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[6:])


def as_before() -> Any:
    """Lowers decoding with keys that are rotated into a copy at every token."""
    from unittest.mock import patch

    return patch.object(lower_decode, "_turn_keys_in_attention", lambda gm: None)


def decode(layers: int) -> list[dict[str, Any]]:
    """Captured steps; each beside what it can be compared with."""
    found = []
    budget = {"budget": 16384}
    cases: list[tuple[str, str, dict[str, Any], Any]] = [
        ("snapkv (equal heads)", "snapkv", budget, nullcontext),
        ("adakv (heads share)", "adakv", budget, nullcontext),
        (
            "streaming_llm, original positions",
            "streaming_llm",
            {**budget, "chunk": 4096, "positions": "original"},
            nullcontext,
        ),
        ("streaming_llm, contiguous", "streaming_llm", {**budget, "chunk": 4096}, nullcontext),
        ("streaming_llm, contiguous, as before", "streaming_llm", {**budget, "chunk": 4096}, as_before),
        ("sirllm, contiguous", "sirllm", {**budget, "chunk": 4096}, nullcontext),
        ("attention_gate", "attention_gate", {"chunk": 4096}, nullcontext),
    ]
    for name, policy, options, context in cases:
        try:
            with context():
                model, cache = prepared(policy, options, layers, 20480, static=True)
            ms = step_ms(model, cache)
            held = torch.stack(list(cache.live_slots().values())).float()
            note = f"{held.mean():.0f} slots a head ({held.min():.0f} to {held.max():.0f}), captures {model.decoder.captures}"
            found.append(row("decode", name, f"{layers} layers", ms, note))
            model.uncompile()
            del model, cache
        except Exception as failure:  # the other rows are still wanted
            found.append(row("decode", name, f"{layers} layers", float("nan"), repr(failure)[:300]))
        torch.cuda.empty_cache()
    return found


# -------------------------------------------------------------------------------------------------------------- share
# Kernels of an update: inside `attend_and_update` only their names tell them from attention.
UPDATE_KERNELS = ("_plan", "_move", "_enumerate", "_lists", "_copy_out", "_settle")


def profiled(run: Callable[[], Any]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Milliseconds that a GPU computes in a run (of all kernels, one behind the other), those of each of our ops, and those of
    the kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    ops = {
        e.key.removeprefix("kvrewrite::"): e.device_time_total / 1e3
        for e in profile.key_averages()
        if e.key.startswith("kvrewrite::")
    }
    kernels = {
        e.key: e.self_device_time_total / 1e3
        for e in profile.key_averages()
        if e.device_type == torch.autograd.DeviceType.CUDA
    }
    return sum(kernels.values()), ops, kernels


def share(layers: int, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Prompts of 131072 tokens through compiled layers (no logits but the last); Locret: its last chunk at a full cache."""
    from kvrewrite.tools.benchmark.shapes import ShapeSource
    from kvrewrite.tools.subjects import Arm, PolicySpec

    found = []
    cases: list[tuple[str, dict[str, Any], int, int]] = [
        ("locret", {"budget": 16384, "chunk": 3072}, 18432, 3072),
        ("nacl", {"budget": 16384, "preset": "code"}, 0, 131072),
        ("snapkv", {"budget": 16384}, 0, 131072),
        ("adakv", {"budget": 16384}, 0, 131072),
    ]
    for policy, options, before, length in cases:
        if only and policy not in only:
            continue
        source = ShapeSource("llama-3.1-8b", device="cuda")
        source.hf_config.num_hidden_layers = layers
        model = source.rewritten(Arm(PolicySpec(policy, options)))
        model.compile(static_decode=False)
        generator = torch.Generator(device="cuda").manual_seed(0)
        ids = torch.randint(1, 128000, (1, before + length), generator=generator, device="cuda")
        cache = model.new_cache(1)
        if before:
            model(ids[:, :before], past_key_values=cache, logits_to_keep=1)

        def run(model: Any = model, cache: Any = cache, ids: Tensor = ids, before: int = before) -> None:
            """Whole prompts begin anew; a chunk is one more of a cache that stays full."""
            model(ids[:, before:], past_key_values=cache if before else model.new_cache(1), logits_to_keep=1)

        whole, ops, launched = profiled(run)
        took = {n: ms for n, ms in ops.items() if n in EVICTION}
        if "attend_and_update" in ops:
            took.pop("cache_update", None)
            took |= {n: ms for n, ms in launched.items() if n.startswith(UPDATE_KERNELS)}
        parts = ", ".join(f"{n} {ms:.2f}" for n, ms in sorted(took.items(), key=lambda e: -e[1]))
        others = ", ".join(f"{n} {ms:.1f}" for n, ms in sorted(ops.items(), key=lambda e: -e[1]) if n not in EVICTION)
        shape = f"{before + length} tokens" if not before else f"a chunk of {length}, cache of {options['budget']}"
        text = f"{sum(took.values()) / whole:.2%} of {whole:.1f} ms ({layers} layers): {parts}; beside {others}"
        found.append(row("share", policy, shape, sum(took.values()), text))
        if policy == "locret":
            extra = retaining_heads(length) * layers
            found.append(row("share", "locret's heads, alone", shape, extra, f"{extra / whole:.2%} more"))
        model.uncompile()
        del model, cache, run
        torch.cuda.empty_cache()
    return found


def retaining_heads(length: int) -> float:
    """Milliseconds of what a retaining head adds to a layer where it is folded: 1024 more channels of the projection of the
    hidden states, the activation, and the second layer."""
    x = torch.randn(length, 4096, device="cuda", dtype=torch.bfloat16)
    narrow, wide = (torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16) for n in (6144, 7168))
    second = torch.randn(HKV, 1024, device="cuda", dtype=torch.bfloat16)
    linear = torch.nn.functional.linear
    more = milliseconds(lambda: linear(x, wide)) - milliseconds(lambda: linear(x, narrow))
    hidden = torch.randn(length, 1024, device="cuda", dtype=torch.bfloat16)
    return more + milliseconds(lambda: linear(torch.nn.functional.silu(hidden), second))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| part | what | shape | ms | | error |", "|---|---|---|---|---|---|"]
    for r in rows:
        wrong = "" if r["error"] is None else f"{r['error']:.1e}"
        lines.append(f"| {r['part']} | {r['what']} | {r['shape']} | {r['ms']:.3f} | {r['note']} | {wrong} |")
    return "\n".join(lines)


def main() -> None:
    parts: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "mass": lambda _: mass(), "gated": lambda _: gated(), "ragged": lambda _: ragged(), "decode": decode,
        "share": lambda layers: share(layers, given.policy),
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("parts", nargs="*", default=[], help=f"any of {', '.join(parts)}; default: all")
    parser.add_argument("--layers", type=int, default=2, help="of the model, in decode and share")
    parser.add_argument("--policy", action="append", default=[], help="of share; repeatable, default: all")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    unknown = set(given.parts) - set(parts)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; expected any of {', '.join(parts)}")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), kernels("auto"):
        for part in given.parts or list(parts):
            rows += parts[part](given.layers)
            if given.json:
                kind = torch.cuda.get_device_name()
                given.json.write_text(json.dumps({"device": kind, "layers": given.layers, "rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
