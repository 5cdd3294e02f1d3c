"""Speculative decoding: what its steps cost at Llama-3.1-8B's shape, and how much of a draft a real model accepts.

    python -m benchmarks.speculate steps [--shape llama-3.1-8b] [--tokens 131072] [--budget 32768 2048] [--drafted 1 3] [--eager]
    python -m benchmarks.speculate real MODEL QUOTES [--budget 0.25] [--policies snapkv h2o] [--texts 3] [--new 64] [--device cpu]

steps: random weights, one row, a full cache of `tokens` and a draft's (snapkv) of each budget, filled by hand: what is in
them does not change what a step costs. Prints milliseconds of a step of the full cache alone, of a step of each draft, of
the pass that checks k drafted tokens, and of whole rounds (k drafted tokens, the pass, what is taken back), and the speed
against the full cache alone that follows for given rates of acceptance. Random weights accept next to nothing, so the
rates are assumed, and each token is accepted independently of the others. "lookup" drafts from the text itself, which
costs nothing: its rounds are the pass and what is taken back. What a step and a pass consist of: milliseconds that the
host needs to queue it, that the GPU is at work for it, and the kernels that take longest (`breakdown`).

real: greedy answers to the first question of texts of QUOTES (JSON lines with "context" and "turns", pairs), by
the full cache alone and with drafts of the same weights. Prints whether the tokens are equal, the part of the
drafted tokens that was accepted, and seconds. A line each is printed as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

import kvrewrite
from kvrewrite.api import Rewriter
from kvrewrite.kernels.groups import Cache, NewTokens, Rows
from kvrewrite.kernels.update.reference import append
from kvrewrite.policies import UNLIMITED, Segment
from kvrewrite.runtime import acceptance
from kvrewrite.runtime.drafts import ModelDraft
from kvrewrite.runtime.speculation import Speculator, settle

RATES = (0.3, 0.5, 0.7, 0.8, 0.9)
ROUNDS, STEPS = 12, 24
LONGEST = 12  # kernels of a breakdown


def clock(device: torch.device) -> float:
    """Seconds, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(device: torch.device, run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the median run; three more warm up (and capture)."""
    found = []
    for _ in range(repeats + 3):
        begin = clock(device)
        run()
        found.append(1e3 * (clock(device) - begin))
    return statistics.median(found[3:])


def host_ms(device: torch.device, run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the median run until the host is through with it, whatever the device still has to do."""
    found = []
    for _ in range(repeats):
        begin = clock(device)
        run()
        found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found)


def breakdown(device: torch.device, name: str, run: Callable[[], Any]) -> dict[str, Any]:
    """Where a run's time goes: of the host, of the GPU (the sum over kernels), and its longest kernels. On the CPU: its
    longest ops."""
    from torch.profiler import ProfilerActivity, profile

    row: dict[str, Any] = {"breakdown": name, "host_ms": round(host_ms(device, run, 5), 3)}
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        run()
        clock(device)
    events: list[Any] = list(seen.key_averages())
    found = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in events]
    found.sort(reverse=True)
    row["kernels_ms"] = round(sum(us for us, _, _ in found) / 1e3, 3)
    row["kernels"] = sum(count for us, count, _ in found if us)
    row["longest"] = [[round(us / 1e3, 3), count, key[:48]] for us, count, key in found[:LONGEST]]
    return row


def speed(rate: float, drafted: int, round_ms: float, alone_ms: float) -> float:
    """How many times as fast as the full cache alone, where each drafted token is accepted with this probability."""
    tokens = sum(rate**i for i in range(drafted + 1))
    return tokens * alone_ms / round_ms


def filled(model: Any, tokens: int, room: int) -> Any:
    """A cache as a prompt of so many tokens leaves it that all stay, with random keys and values."""
    cache = model.new_cache(1, max_length=tokens + room)
    plan = cache.plan([Segment(tokens, UNLIMITED)])
    cache.begin_step()
    cache.hold(plan, tokens + room)
    positions = torch.arange(tokens, device=cache.device)[None]
    valid = torch.tensor([tokens], dtype=torch.int32, device=cache.device)
    rows = Rows(positions, positions, valid, valid, valid)
    for lease in cache.leases:
        pools = [getattr(lease.store, name) for name in ("k_pages", "v_pages", "score_pages", "pos_pages")]
        k, v = (torch.randn(1, lease.kv_heads, tokens, x.shape[2], device=x.device).to(x.dtype) for x in pools[:2])
        new = NewTokens(k, v, torch.zeros(k.shape[:3], device=k.device))
        for table, lens in zip(lease.table, lease.lens, strict=True):
            append(new, rows, Cache(*pools, table, lens))
    cache.commit(plan)
    cache.record(torch.ones(1, tokens, dtype=torch.int64, device=cache.device), None, False)
    cache.end_prompt()
    return cache


def a_round(model: Any, cache: Any, draft: ModelDraft | None, text: Tensor, drafted: int) -> Tensor:
    """One round as `Speculator` runs it; the text that it leaves. draft: None for the text itself."""
    tokens = text[0, -drafted:] if draft is None else draft.propose(text, drafted).tokens
    tried = torch.cat([text, tokens[None]], 1)
    logits = model(tried[:, text.shape[1] - 1 :], cache=cache, generated=True).logits[0].float()
    never = StoppingCriteriaList([MaxLengthCriteria(1 << 30)])
    new, _, _ = settle(text, tokens, acceptance.greedy(tokens, logits), never)
    cache.crop(new.shape[1] - 1 - drafted)
    text = torch.cat([text, new], 1)
    if draft is not None:
        draft.accepted(text.shape[1])
    return text


@torch.no_grad()
def steps(given: argparse.Namespace) -> None:
    """The costs of steps."""
    from kvrewrite.tools.benchmark.shapes import ShapeSource

    device, begin = torch.device(given.device), time.perf_counter()
    source = ShapeSource(given.shape, device=device)
    rewriter = Rewriter(source.base, check="off")
    full, small = rewriter.rewrite("full"), rewriter.rewrite("snapkv", budget=max(given.budget))
    if not given.eager:
        full.compile()
        small.compile()
    room = 2048
    cache = filled(full, given.tokens, room)
    print(f"# models and the full cache after {clock(device) - begin:.0f} s", flush=True)
    one = cache.ids()[:, :1].to(device)
    alone = median_ms(device, lambda: full(one, cache=cache, generated=True), STEPS)
    print(json.dumps({"alone_ms": round(alone, 3)}), flush=True)
    print(json.dumps(breakdown(device, "alone", lambda: full(one, cache=cache, generated=True))), flush=True)
    for drafted in given.drafted:
        several = one.expand(1, drafted + 1).contiguous()

        def check(several: Tensor = several) -> None:
            full(several, cache=cache, generated=True)
            cache.crop(-several.shape[1])

        print(json.dumps({"check_of": drafted, "ms": round(median_ms(device, check, ROUNDS), 3)}), flush=True)
        print(json.dumps(breakdown(device, f"check of {drafted}", check)), flush=True)
    text = torch.cat([cache.ids().to(device), one], 1)
    for budget in (None, *given.budget):
        draft = None
        if budget is not None:
            prompt = (one, torch.ones_like(one))
            draft = ModelDraft(small, prompt, given.tokens + room, LogitsProcessorList(), draws=False)
            draft.cache = filled(small, budget, given.tokens + room - budget)
            draft.cache.append_only()
            of_draft = draft.cache
            step_ms = median_ms(device, lambda: small(one, cache=of_draft, generated=True), STEPS)  # noqa: B023
            print(json.dumps({"draft": budget, "step_ms": round(step_ms, 3)}), flush=True)
        for drafted in given.drafted:
            if draft is not None:
                draft.own = draft.cache.columns - text.shape[1] + 1

            def run() -> None:
                nonlocal text
                text = a_round(full, cache, draft, text, drafted)  # noqa: B023

            round_ms = median_ms(device, run, ROUNDS)
            row = {"draft": budget or "lookup", "drafted": drafted, "round_ms": round(round_ms, 3)}
            row |= {f"speed_at_{r}": round(speed(r, drafted, round_ms, alone), 2) for r in RATES}
            print(json.dumps(row), flush=True)


@torch.no_grad()
def real(given: argparse.Namespace) -> None:
    """The acceptance of a real model."""
    from kvrewrite.artifact.companions import read_original

    device = torch.device(given.device)
    dtype = "float32" if device.type == "cpu" else given.dtype
    original, tokenizer = read_original(Path(given.model), dtype, "give the original")
    rewriter = Rewriter(original.to(device), check="off")
    full = rewriter.rewrite("full")
    drafts = {name: rewriter.rewrite(name, budget=given.budget) for name in given.policies}
    settings: dict[str, Any] = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": given.new,
    }
    with open(given.quotes, encoding="utf-8") as lines:
        texts = [json.loads(line) for line, _ in zip(lines, range(given.texts), strict=False)]
    for number, text in enumerate(texts):
        prompt = text["context"] + text["turns"][0][0]
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
        begin = clock(device)
        expected = full.generate(ids, **settings)
        alone_s = clock(device) - begin
        for name in [*drafts, "prompt_lookup"]:
            speculator = Speculator(full, drafts.get(name, name), given.drafted[-1])
            begin = clock(device)
            got = speculator.generate(ids, **settings)
            last = speculator.last
            row = {
                "text": number, "tokens": ids.shape[1], "draft": name, "drafted": given.drafted[-1],
                "equal": torch.equal(got, expected), "acceptance": round(last.acceptance, 3),
                "tokens_a_round": round(last.tokens_per_round, 2),
                "seconds": round(clock(device) - begin, 2), "alone_s": round(alone_s, 2),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def main() -> None:
    """Parses arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("steps")
    one.add_argument("--shape", default="llama-3.1-8b")
    one.add_argument("--tokens", type=int, default=131072)
    one.add_argument("--budget", type=int, nargs="+", default=[32768, 2048])
    one.add_argument("--drafted", type=int, nargs="+", default=[1, 3])
    one.add_argument("--eager", action="store_true", help="do not compile")
    one.add_argument("--device", default="cuda")
    one.set_defaults(run=steps)
    two = commands.add_parser("real")
    two.add_argument("model")
    two.add_argument("quotes")
    two.add_argument("--budget", type=float, default=0.25)
    two.add_argument("--policies", nargs="+", default=["snapkv", "h2o"])
    two.add_argument("--drafted", type=int, nargs="+", default=[5])
    two.add_argument("--texts", type=int, default=3)
    two.add_argument("--new", type=int, default=64)
    two.add_argument("--dtype", default="bfloat16")
    two.add_argument("--device", default="cpu")
    two.set_defaults(run=real)
    given = parser.parse_args()
    print(f"# kvrewrite {kvrewrite.__version__}, torch {torch.__version__}, {given.device}", flush=True)
    given.run(given)


if __name__ == "__main__":
    main()
