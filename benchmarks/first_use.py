"""First use: what one waits for before a model's first answer, and how fast it runs op by op.

    python -m benchmarks.first_use MODEL [--prompt 512] [--tokens 32] [--policy h2o] [--budget 256] [--only PROCESS ...]

MODEL is a directory of transformers. Three processes, one after the other, each of which prints a JSON line as soon as it ends:

- `eager`: `transform` (`capture_s`: the trace, and the proof of the attention found in it; `rewrite_s`: the policy, and the proof
  of the whole), writes the model directory, then transformers' own forward beside the rewritten one's, both op by op: medians in
  ms of a prompt and of a decode step, and their ratios; `generate_s` and `generate_again_s` without `compile()`.
- `empty` and `filled`: `load`, `compile()` and `generate` from that directory, with compile caches that are empty, and with those
  that the process before has filled. `graphs`: how many Dynamo made; `hits`, `misses`: of Inductor's cache; `where_s`:
  torch's own account of compiling, whose entries overlap.

On a CPU times are of the process (CPU time, torch's threads included), for machines that others use, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
PROCESSES = ("eager", "empty", "filled")


class Clock:
    """Seconds between marks, by name."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        self.seconds: dict[str, float] = {"import_s": round(time.perf_counter() - BEGAN, 2)}
        self.last = self.now()

    def now(self) -> float:
        """Seconds of a clock: what was queued on the device is waited for."""
        import torch

        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, name: str) -> None:
        """Names what was done since the last mark."""
        self.seconds[name] = round(self.now() - self.last, 2)
        self.last = self.now()

    def median(self, run: Callable[[], Any], repeat: int) -> float:
        """Median milliseconds of a call."""
        run()
        times = []
        for _ in range(repeat):
            begun = self.now()
            run()
            times.append(self.now() - begun)
        return round(statistics.median(times) * 1e3, 2)


def prompt_ids(vocabulary: int, length: int, device: Any) -> Any:
    """A prompt of random tokens, (1, length)."""
    import torch

    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(device)


def generate(model: Any, ids: Any, tokens: int) -> None:
    """An answer of so many tokens."""
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": ids * 0 + 1}
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)


def eager(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rewrites, writes, and runs both models op by op."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from kvrewrite.api import Rewriter

    clock = Clock()
    original = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    original = original.to("cuda" if clock.cuda else "cpu").eval()
    clock.mark("from_pretrained_s")
    rewriter = Rewriter(original)
    clock.mark("capture_s")
    model = rewriter.rewrite(given.policy, budget=given.budget)
    clock.mark("rewrite_s")
    model.save_pretrained(folder / "out")
    clock.mark("save_s")
    ids = prompt_ids(original.config.vocab_size, given.prompt, model.device)
    with torch.no_grad():
        generate(model, ids, given.tokens)
        clock.mark("generate_s")
        generate(model, ids, given.tokens)
        clock.mark("generate_again_s")
        ways: dict[str, tuple[Any, Callable[[], Any]]] = {
            "transformers": (original, lambda: DynamicCache(config=original.config)),
            "kvrewrite": (model, lambda: model.new_cache(1)),
        }
        found: dict[str, Any] = {}
        for name, (subject, new_cache) in ways.items():

            def prompt(subject: Any = subject, new_cache: Callable[[], Any] = new_cache) -> Any:
                cache = new_cache()
                subject(ids, past_key_values=cache, logits_to_keep=1)
                return cache

            found[f"{name}_prompt_ms"] = clock.median(prompt, 5)
            cache = prompt()
            found[f"{name}_step_ms"] = clock.median(lambda s=subject, c=cache: s(ids[:, :1], past_key_values=c), 20)
    for what in ("prompt", "step"):
        ours, theirs = found[f"kvrewrite_{what}_ms"], found[f"transformers_{what}_ms"]
        found[f"{what}_ratio"] = round(ours / theirs, 3)
    return {**clock.seconds, **found}


def answer(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Loads the directory, compiles it and makes two answers."""
    import torch

    import kvrewrite

    clock = Clock()
    model = kvrewrite.load(folder / "out", device="cuda" if clock.cuda else "cpu")
    clock.mark("load_s")
    model.compile()
    clock.mark("compile_s")
    ids = prompt_ids(model.program.vocab_size, given.prompt, model.device)
    with torch.no_grad():
        generate(model, ids, given.tokens)
        clock.mark("generate_s")
        generate(model, ids, given.tokens)
        clock.mark("generate_again_s")
    counters = torch._dynamo.utils.counters
    inductor = counters["inductor"]
    counts = {"graphs": counters["stats"]["unique_graphs"]}
    counts |= {"hits": inductor["fxgraph_cache_hit"], "misses": inductor["fxgraph_cache_miss"]}
    spent = {name: round(sum(times), 2) for name, times in torch._dynamo.utils.compilation_time_metrics.items()}
    where = dict(sorted(spent.items(), key=lambda item: -item[1])[:12])
    return {**clock.seconds, "wall_s": round(time.perf_counter() - BEGAN, 1), **counts, "where_s": where}


def main() -> int:
    """Parses the command line and runs the processes; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--policy", default="h2o")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=PROCESSES, default=PROCESSES)
    parser.add_argument("--folder", type=Path, help="where files go; a temporary folder unless given")
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        found = (eager if given.process == "eager" else answer)(given, given.folder)
        print(json.dumps({"process": given.process, **found}), flush=True)
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
        for name in given.only:
            command = [sys.executable, "-m", "benchmarks.first_use", *sys.argv[1:], "--process", name]
            begun = time.perf_counter()
            done = subprocess.run([*command, "--folder", str(folder)], env={**os.environ, **caches})
            print(f"{name}: {time.perf_counter() - begun:.1f} s, exit status {done.returncode}", flush=True)
            failed += done.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
