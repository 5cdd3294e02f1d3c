"""Measures one cell: the time of a prompt and of single steps, and their peak memory. All times are host times between
device synchronizations, so that they include planning and launching."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from kvrewrite.tools.benchmark.roofline import first_line, is_fatal, release

COLD_STEPS = 8  # decode steps before the timed ones: compiling, capturing
FEW = 10  # with fewer samples shows minimum and maximum, otherwise the 10th and 90th percentile
TOP = 30  # kernels listed in a profile
PROFILED_CHUNK = 2048  # tokens of the profiled chunk if a policy has no chunks


@dataclass(frozen=True)
class Options:
    """How much is measured. seconds: a cell's time after its cold start; after that, nothing new is begun."""

    repeat: int = 3
    steps: int = 64
    new_tokens: int = 64
    seconds: float = 300.0
    profile: bool = False
    seed: int = 0


class Subject(Protocol):
    """Something to measure. no_prefill, no_generate: the reason why it has none. captures_prompts: whether a second
    prompt captures what the first one compiled, so that both are cold."""

    no_prefill: str | None
    no_generate: str | None
    captures_prompts: bool

    def begin(self, batch: int, length: int) -> Any:
        """Returns an empty cache for so many tokens per row."""

    def prefill(self, cache: Any, ids: Tensor) -> Tensor:
        """Runs a prompt and returns the next token of each row (B, 1)."""

    def step(self, cache: Any, ids: Tensor, position: int) -> Tensor:
        """Feeds a token and returns the next."""

    def memory(self, cache: Any) -> dict[str, int]:
        """Returns the bytes of the cache, by kind."""

    def generate(self, ids: Tensor, tokens: int, clock: Clock) -> None:
        """Runs transformers' own generate: greedy, exactly so many tokens, with a cache that it makes itself; clock is
        a stopping criterion."""

    def chunk(self, cache: Any, ids: Callable[[int], Tensor]) -> Callable[[], Any] | None:
        """Returns a call that adds one more chunk to a filled cache, for profiling; ids makes that many tokens."""


class Clock(StoppingCriteria):
    """Records when `generate` has each token; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Called by `generate` after every token."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


# ---------------------------------------------------------------------------------------------------------------
# numbers
def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Returns the median and the range of most samples."""
    values = np.asarray(samples, dtype=np.float64)
    low, high = (values.min(), values.max()) if len(values) < FEW else np.quantile(values, [0.1, 0.9])
    return {
        "median": float(np.median(values)),
        "low": float(low),
        "high": float(high),
        "samples": [*map(float, values)],
    }


class Device:
    """Clock and memory of a device; memory is None on a CPU, where it is not counted."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"

    def synchronize(self) -> None:
        """Waits until all work is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Returns how long a call takes, and its result."""
        self.synchronize()
        started = time.perf_counter()
        out = call()
        self.synchronize()
        return time.perf_counter() - started, out

    def allocated(self) -> int | None:
        """Returns the bytes in use."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else None

    def peak(self) -> tuple[int, int] | None:
        """Returns the most bytes in use and the most reserved by torch since `forget`."""
        if not self.cuda:
            return None
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def forget(self) -> None:
        """Starts a new peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)


class Peak:
    """The largest peak over `base` of several stretches."""

    def __init__(self, device: Device, base: int | None):
        self.device, self.base = device, base
        self.over: int | None = None
        self.reserved: int | None = None

    def note(self) -> None:
        """Ends a stretch that `device.forget` began."""
        found = self.device.peak()
        if found is not None and self.base is not None:
            self.over = max(self.over or 0, found[0] - self.base)
            self.reserved = max(self.reserved or 0, found[1])

    def as_dict(self) -> dict[str, Any]:
        """Returns the data for the results."""
        return {"peak_bytes": self.over, "reserved_bytes": self.reserved}


# ------------------------------------------------------------------------------------------------------------- the cell
def tokens_of(context: int, batch: int, vocabulary: int, seed: int, device: torch.device) -> Tensor:
    """Returns random ids (batch, context): the same for every subject."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, context), generator=generator).to(device)


@torch.no_grad()
def measure(
    subject: Subject,
    cell: dict[str, Any],
    ids: Tensor,
    options: Options,
    base: int | None,
    vocabulary: int,
    progress: Callable[[str], None],
) -> None:
    """Measures a cell and stores each part in `cell` when it is found, so that a failure keeps the parts before it.

    base: bytes allocated with only the model and the policy's weights; peaks are over it.
    """
    device = Device(ids.device)
    batch, context = ids.shape
    length = context + max(COLD_STEPS + options.steps, options.new_tokens) + 1
    cell["notes"] = []
    cell["cold"] = {**cell.get("cold", {}), "first_prefill_seconds": None, "first_steps_seconds": []}
    before = device.allocated()
    cell["left_over_bytes"] = None if before is None or base is None else before - base

    def fresh() -> Any:
        release(ids.device)
        return subject.begin(batch, length)

    progress("cold start")
    if subject.no_prefill is not None:
        cell["prefill"] = None
        cell["notes"].append(f"no prefill: {subject.no_prefill}")
    cache, token = _cold(subject, cell, fresh, ids, device)
    deadline = time.perf_counter() + options.seconds
    if subject.no_prefill is None:
        cache = None  # before the next is made, so that only one is alive
        cache, token = _prefill(subject, cell, ids, options, Peak(device, base), fresh, deadline, progress)
    cell["cache"] = subject.memory(cache)
    progress("decode")
    _decode(subject, cell, (cache, token), context, options, Peak(device, base), deadline)
    if options.profile:
        progress("profile")
        with _part(cell, "profile"):
            at = context + COLD_STEPS + options.steps
            cell["profile"] = _profile(subject, cache, token, at, ids, vocabulary, device)
    del cache
    release(ids.device)
    if options.new_tokens < 2:
        return
    if subject.no_generate is not None:
        cell["notes"].append(f"no generate: {subject.no_generate}")
    elif time.perf_counter() > deadline:
        cell["notes"].append("no generate: the cell's time was over")
    else:
        progress("generate")
        with _part(cell, "generate"):
            _generate(subject, cell, ids, options, device)


@contextlib.contextmanager
def _part(cell: dict[str, Any], name: str) -> Iterator[None]:
    """Measures a part besides the cell's numbers; if it fails, they stay."""
    try:
        yield
    except Exception as error:
        if is_fatal(error):
            raise
        cell["status"], cell["reason"] = "incomplete", f"no {name}: {first_line(error)}"


def _cold(
    subject: Subject, cell: dict[str, Any], fresh: Callable[[], Any], ids: Tensor, device: Device
) -> tuple[Any, Tensor]:
    """Runs the first prompts and steps, which compile and capture."""
    cache, token = fresh(), ids[:, -1:].clone()
    if subject.no_prefill is None:
        cell["cold"]["first_prefill_seconds"], token = device.seconds(lambda: subject.prefill(cache, ids))
        if subject.captures_prompts:
            cache = None
            cache = fresh()
            cell["cold"]["second_prefill_seconds"], token = device.seconds(lambda: subject.prefill(cache, ids))
    for i in range(COLD_STEPS):
        seconds, token = device.seconds(lambda i=i, token=token: subject.step(cache, token, ids.shape[1] + i))  # type: ignore[misc]
        cell["cold"]["first_steps_seconds"].append(seconds)
    return cache, token


def _prefill(
    subject: Subject,
    cell: dict[str, Any],
    ids: Tensor,
    options: Options,
    peak: Peak,
    fresh: Callable[[], Any],
    deadline: float,
    progress: Callable[[str], None],
) -> tuple[Any, Tensor]:
    device, token, cache = peak.device, ids[:, -1:], None
    times: list[float] = []
    for i in range(options.repeat):
        if times and time.perf_counter() + max(times) > deadline:
            cell["notes"].append(f"{i} of {options.repeat} prefills: the cell's time was over")
            break
        progress(f"prefill {i + 1} of {options.repeat}")
        cache = None
        cache = fresh()
        device.forget()
        seconds, token = device.seconds(lambda cache=cache: subject.prefill(cache, ids))  # type: ignore[misc]
        times.append(seconds)
        peak.note()
        cell["prefill"] = {"seconds": spread(times), **peak.as_dict()}
    return cache, token


def _decode(
    subject: Subject,
    cell: dict[str, Any],
    prompt: tuple[Any, Tensor],
    context: int,
    options: Options,
    peak: Peak,
    deadline: float,
) -> None:
    """prompt: the cache and the last token."""
    (cache, token), device, at = prompt, peak.device, context
    times: list[float] = []
    if subject.no_prefill is None:
        for _ in range(COLD_STEPS):  # the cache is new: its first steps may make room, or rank its slots
            token = subject.step(cache, token, at)
            at += 1
    else:
        at += COLD_STEPS
    device.forget()
    for i in range(options.steps):
        seconds, token = device.seconds(lambda token=token, i=i: subject.step(cache, token, at + i))  # type: ignore[misc]
        times.append(seconds)
        if time.perf_counter() > deadline and i + 1 < options.steps:
            cell["notes"].append(f"{i + 1} of {options.steps} decode steps: the cell's time was over")
            break
    peak.note()
    found = spread(times)
    rows = int(token.shape[0])
    cell["decode"] = {"seconds": found, "tokens_per_second": rows / found["median"], **peak.as_dict()}


def _generate(subject: Subject, cell: dict[str, Any], ids: Tensor, options: Options, device: Device) -> None:
    """Returns seconds per token from the first to the last of `generate`, without the prompt and its spread."""
    clock = Clock()
    total, _ = device.seconds(lambda: subject.generate(ids, options.new_tokens, clock))
    made = len(clock.times)
    if made < 2:
        cell["notes"].append(f"no generate: it made {made} tokens")
        return
    step = (clock.times[-1] - clock.times[0]) / (made - 1)
    bare = cell["decode"]["seconds"]["median"]
    cell["generate"] = {
        "total_seconds": total,
        "tokens": made,
        "seconds_per_token": step,
        "over_step": step / bare,
        "tokens_per_second": ids.shape[0] / step,
    }
    if cell.get("prefill"):
        less = total - cell["prefill"]["seconds"]["median"]
        cell["generate"]["without_prefill_per_token"] = less / made


# -------------------------------------------------------------------------------------------------------------- profile
def _profile(
    subject: Subject, cache: Any, token: Tensor, position: int, ids: Tensor, vocabulary: int, device: Device
) -> dict[str, Any]:
    found: dict[str, Any] = {"decode_step": top_kernels(lambda: subject.step(cache, token, position), device)}

    def more(count: int) -> Tensor:
        return tokens_of(count, ids.shape[0], vocabulary, 1, ids.device)

    call = subject.chunk(cache, more)
    if call is not None:
        call()  # compiles for new sizes if needed
        found["chunk"] = top_kernels(call, device)
    return found


def top_kernels(call: Callable[[], Any], device: Device) -> dict[str, Any]:
    """Finds where a call's time goes: GPU kernels or CPU operators, by name. The profiler slows the host down, so
    seconds is more than without it; busy_seconds is the sum over kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if device.cuda else [ProfilerActivity.CPU]
    device.synchronize()
    with profile(activities=activities) as profiler:
        seconds, _ = device.seconds(call)
    rows = []
    for event in profiler.key_averages():
        if device.cuda and event.device_type != DeviceType.CUDA:
            continue
        micro = event.self_device_time_total if device.cuda else event.self_cpu_time_total
        if micro > 0:
            rows.append({"name": event.key[:160], "calls": int(event.count), "seconds": micro / 1e6})
    busy = math.fsum(r["seconds"] for r in rows)
    rows.sort(key=lambda r: -r["seconds"])
    for row in rows:
        row["share"] = row["seconds"] / busy
    return {"seconds": seconds, "busy_seconds": busy, "kernels": sum(r["calls"] for r in rows), "top": rows[:TOP]}


# ------------------------------------------------------------------------------------------------------ kvrewrite
# itself
class Rewritten:
    """A model that kvrewrite made."""

    no_prefill = None
    no_generate = None

    def __init__(self, model: Any):
        self.model = model

    @property
    def captures_prompts(self) -> bool:  # type: ignore[override]
        """Whether prompts run from static buffers."""
        from kvrewrite.runtime.prompt_graph import PrefillRunner

        executor = self.model.executor
        return executor is not None and isinstance(executor.prompt, PrefillRunner)

    def begin(self, batch: int, length: int) -> Any:
        """Returns an empty cache."""
        return self.model.new_cache(batch, max_length=length)

    def prefill(self, cache: Any, ids: Tensor) -> Tensor:
        """Runs a prompt in the policy's segments."""
        return self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step(self, cache: Any, ids: Tensor, position: int) -> Tensor:
        """Decodes one token per row."""
        return self.model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    def memory(self, cache: Any) -> dict[str, int]:
        """Returns what the cache itself reports."""
        found = cache.memory()
        return {"live": found.live, "leased": found.leased, "reserved": found.reserved}

    def generate(self, ids: Tensor, tokens: int, clock: Clock) -> None:
        """Runs transformers' generate."""
        generate(self.model, ids, tokens, clock)

    def chunk(self, cache: Any, ids: Callable[[int], Tensor]) -> Callable[[], Any] | None:
        """Returns a call that adds a chunk as a new turn; with Locret, its local tail comes after it."""
        policy = self.model.policy
        cache.end_prompt()
        more = ids((policy.chunk or min(PROFILED_CHUNK, max(cache.seen))) + getattr(policy, "local_tail", 0))
        return lambda: self.model(more, past_key_values=cache, logits_to_keep=1)


def generate(model: Any, ids: Tensor, tokens: int, clock: Clock) -> None:
    """Runs greedy generation without a stop token: random weights may produce one."""
    from transformers import StoppingCriteriaList

    settings = model.generation_config
    ends, settings.eos_token_id = settings.eos_token_id, None
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    finally:
        settings.eos_token_id = ends
