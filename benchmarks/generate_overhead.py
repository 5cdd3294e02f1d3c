"""What `generate` adds to a decode step: transformers' loop, and what this project's host code does for each token.

    python -m benchmarks.generate_overhead [--layers 8] [--tokens 256] [--prompt 1024] [--policy h2o] [--budget 512]

On CUDA: random weights in the shape of Llama-3.1-8B with a few layers, bf16, one row. Prints the median of the captured step
alone (CUDA events between replays), the time that one more token takes in `generate` (a long answer minus a short one, host
clock) and their ratio, which is that of the real model with `--layers 32`. On a CPU: a tiny model, op by op from static
buffers, in CPU time of this process.

`outside_us` is the median time from the end of a step's call to the start of the next one's, transformers' part included.
`launch_us` is the time from the moment when transformers asks for the inputs of a token to the start of the step: all that a GPU
waits for this project's code. `behind_us` is the host's work behind a step that has been started.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvrewrite
from kvrewrite.passes.lower.prompt import fold, lower_prefill
from kvrewrite.runtime import decode_graph
from kvrewrite.runtime.decode_graph import DecodeRunner
from kvrewrite.runtime.executor import Executor
from kvrewrite.runtime.model import RewrittenModel
from kvrewrite.runtime.parts import Execution

TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip


def build(layers: int, policy: str, budget: int, cuda: bool) -> Any:
    """A rewritten model that decodes from static buffers."""
    config = LlamaConfig(**(LLAMA if cuda else TINY), num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        original = LlamaForCausalLM(config).to(torch.bfloat16 if cuda else torch.float32).eval()
    model = kvrewrite.transform(original, policy=policy, budget=budget)
    if cuda:
        model.compile()
        assert model.decoder is not None, f"{policy} is not captured"
    else:
        folded = fold(model.graph_module)
        runner = DecodeRunner(model, folded, None, capture=False)
        model.executor = Executor(Execution(lower_prefill(folded), None), runner)
    return model


class Clock:
    """Where the host's time goes, token by token, in seconds of `now`."""

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.begun = self.started = self.stopped = 0.0
        self.launch: list[float] = []
        self.between: list[float] = []
        self.behind: list[float] = []

    def watch(self) -> None:
        """Puts marks around what `generate` calls."""
        prepare, step = RewrittenModel.prepare_inputs_for_generation, decode_graph._Step.__call__
        forward = RewrittenModel.forward

        @functools.wraps(prepare)
        def prepared(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.begun, self.started = self.now(), 0.0
            return prepare(model, *args, **kwargs)

        @functools.wraps(step)
        def stepped(one: Any) -> Any:
            self.started = self.now()
            self.between.append(self.started - self.stopped)
            self.launch.append(self.started - self.begun)
            out = step(one)
            self.stopped = self.now()
            return out

        @functools.wraps(forward)
        def forwarded(model: Any, *args: Any, **kwargs: Any) -> Any:
            out = forward(model, *args, **kwargs)
            if self.started:
                self.behind.append(self.now() - self.stopped)
            return out

        RewrittenModel.prepare_inputs_for_generation = prepared  # type: ignore[method-assign]
        RewrittenModel.forward = forwarded  # type: ignore[method-assign]
        decode_graph._Step.__call__ = stepped  # type: ignore[method-assign]


def bare_step(model: Any, replays: int = 100) -> float:
    """Milliseconds of the captured step alone: median over replays, back to back."""
    step = model.decoder._steps[1]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for mark in marks:
        mark.record()
        step.graph.replay()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def measure(layers: int, tokens: int, prompt: int, policy: str, budget: int) -> dict[str, Any]:
    """One line of results."""
    cuda = torch.cuda.is_available()
    model = build(layers, policy, budget, cuda)
    ids = torch.randint(1, 90, (1, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    settings: dict[str, Any] = {
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": ids * 0 + 1,
    }

    def run(count: int) -> float:
        """Seconds: on a GPU of wall clock, else of this process' CPU time."""
        now = time.perf_counter if cuda else time.process_time
        if cuda:
            torch.cuda.synchronize()
        begin = now()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **settings)
        if cuda:
            torch.cuda.synchronize()
        return now() - begin

    few = 8
    run(few)  # compiles and captures
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "CPU", "layers": layers, "policy": policy, "budget": budget,
        "prompt": prompt, "tokens": tokens,
    }  # fmt: skip
    if cuda:
        token_ms = (run(few + tokens) - run(few)) / tokens * 1e3
        result["step_ms"] = round(bare_step(model), 4)
        result["token_ms"] = round(token_ms, 4)
        result["ratio"] = round(token_ms / result["step_ms"], 4)
    clock = Clock(time.perf_counter if cuda else time.process_time)
    clock.watch()
    run(tokens)
    kept = slice(2, None)  # the first token of a request is bound to the step
    result["outside_us"] = round(statistics.median(clock.between[kept]) * 1e6, 1)
    result["launch_us"] = round(statistics.median(clock.launch[kept]) * 1e6, 1)
    result["behind_us"] = round(statistics.median(clock.behind[kept]) * 1e6, 1)
    return result


def main() -> None:
    """Parses the command line and prints one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--policy", default="h2o")
    parser.add_argument("--budget", type=int, default=512)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
