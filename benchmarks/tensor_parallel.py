"""A model over several GPUs beside one: seconds of a prompt, milliseconds of a decode step.

    python -m benchmarks.tensor_parallel [--layers N] [--prompt TOKENS ...] [--rows N ...] [--out FILE]
    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.tensor_parallel ...   (or torchrun)

Llama-3.1-8B shape (32 layers unless fewer are asked for), random bf16 weights, of which each process makes its own. The first
process prints and writes; give both runs the same arguments and compare.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kvrewrite import policies
from kvrewrite.artifact.meta_model import parameters_on_meta
from kvrewrite.capture.fake_parameters import capture_on_meta
from kvrewrite.compiler import compile_captured, quiet
from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.runtime import executor
from kvrewrite.runtime.model import RewrittenModel
from kvrewrite.runtime.parallel import find_peers, leave, own_device, part_of
from kvrewrite.tools.benchmark.shapes import SHAPES

REPEATS = 3


def build(layers: int, policy: str, options: dict[str, Any], device: torch.device) -> RewrittenModel:
    """The model, or this process's part of it, with random weights."""
    config = SHAPES["llama-3.1-8b"]()
    config.num_hidden_layers = layers
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    captured = capture_on_meta(model)
    program = compile_captured(captured, policies.make(policy, **options), None, config, None, quiet, "off")
    peers = find_peers("auto", None, device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if peers is not None:
        program = part_of(program, peers, prove=False)
    generator = torch.Generator(device).manual_seed(0 if peers is None else peers.rank)
    made: dict[int, nn.Parameter] = {}
    for name in program.base:
        blank = get_attr(program.graph, name)
        if not isinstance(blank, nn.Parameter):
            continue
        if id(blank) not in made:
            value = torch.empty(blank.shape, dtype=blank.dtype, device=device)
            value = value.normal_(0, 0.02, generator=generator) if blank.dim() > 1 else value.fill_(1)
            made[id(blank)] = nn.Parameter(value, requires_grad=False)
        set_attr(program.graph, name, made[id(blank)])
    return RewrittenModel(program, config)


def seconds(call: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(model: RewrittenModel, prompt: int, rows: int, steps: int) -> dict[str, Any]:
    """Medians of a prompt, and of a step of generated tokens after it."""
    ids = torch.randint(0, model.program.vocab_size, (rows, prompt), device=model.device)
    fills, decodes = [], []
    for _ in range(REPEATS + 1):  # the first one compiles and captures
        cache = model.new_cache(rows)
        fills.append(seconds(lambda: model(ids, past_key_values=cache, logits_to_keep=1)))  # noqa: B023
        token = ids[:, :1]
        for _ in range(4):
            model(token, past_key_values=cache, generated=True)

        def run() -> None:
            for _ in range(steps):
                model(token, past_key_values=cache, generated=True)  # noqa: B023

        decodes.append(seconds(run) / steps)
        cache.reset()
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "rows": rows,
        "prompt": prompt,
        "prefill_s": round(median(fills[1:]), 4),
        "decode_ms": round(1e3 * median(decodes[1:]), 3),
        "peak_gib": round(peak, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, nargs="+", default=[32768], help="one, or one for each of --rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--policy", default="streaming_llm")
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--nccl", action="store_true", help="sums of decode steps by NCCL, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = own_device("cuda")
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    options = {"budget": args.budget, "chunk": 4096, "positions": "original"}
    model = build(args.layers, args.policy, options, device)
    parallel = model.program.parallel
    ranks, first = (1, True) if parallel is None else (parallel.peers.ranks, parallel.peers.rank == 0)
    if args.nccl:
        executor.sums_directly = lambda peers, device: False
    model.compile()
    found = []
    prompts = args.prompt if len(args.prompt) > 1 else args.prompt * len(args.rows)
    for rows, prompt in zip(args.rows, prompts, strict=True):
        found.append(
            {
                "processes": ranks,
                "layers": args.layers,
                "budget": args.budget,
                **measure(model, prompt, rows, args.steps),
            }
        )
        if first:
            print(json.dumps(found[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1))
    del model
    if parallel is not None:
        leave()


if __name__ == "__main__":
    main()
