"""The load of `benchmarks.serve` on vLLM, in an environment that has it: N requests of random prompts at once, tokens a second.

    python -m benchmarks.serve_vllm shape DIR [--model llama-3.1-8b]      # a configuration and a tokenizer, no weights
    python -m benchmarks.serve_vllm weights DIR [--model llama-3.1-8b]    # with random weights, for `kvrewrite convert`
    python -m benchmarks.serve_vllm run DIR [--requests 72] [--prompt 8192] [--answer 256] [--memory 23GiB] [--dummy]
        [--ready FILE] [--wait FILE]

`run` gives DIR to vllm.LLM: vLLM's own full cache for a plain model (--dummy: weights are not read), kvrewrite's bounded one for
a directory that `kvrewrite convert` made. --ready is written once the engine is warm, and the load starts when --wait is
there, so that several engines can be ready on one GPU and be timed one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any


def save_shape(directory: Path, model: str) -> None:
    """config.json and a tokenizer of words."""
    from benchmarks.serve import words
    from kvrewrite.tools.benchmark.shapes import SHAPES

    config = SHAPES[model]()
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(directory)
    words(config.vocab_size).save_pretrained(directory)


def save_weights(directory: Path, model: str, seed: int = 0) -> None:
    """The same with random weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.serve import words
    from kvrewrite.tools.benchmark.shapes import SHAPES

    config = SHAPES[model]()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.cpu().save_pretrained(directory, max_shard_size="4GB")
    words(config.vocab_size).save_pretrained(directory)


def run(args: argparse.Namespace) -> None:
    """Prints one line of JSON."""
    import vllm

    from kvrewrite.cli.options import parse_bytes

    begin = time.perf_counter()
    extra: dict[str, Any] = {"load_format": "dummy"} if args.dummy else {}
    engine = vllm.LLM(
        args.directory,
        max_model_len=args.prompt + args.answer,
        max_num_seqs=args.requests,
        enable_prefix_caching=False,
        dtype="bfloat16",
        kv_cache_memory_bytes=parse_bytes(args.memory, "--memory"),
        gpu_memory_utilization=args.utilization,
        disable_log_stats=False,
        **extra,
    )
    vocabulary = engine.get_tokenizer().vocab_size
    generator = random.Random(0)

    def load(count: int) -> list[Any]:
        return [
            {"prompt_token_ids": [generator.randrange(vocabulary) for _ in range(args.prompt)]} for _ in range(count)
        ]

    def answers(most: int) -> Any:
        return vllm.SamplingParams(max_tokens=most, temperature=0, ignore_eos=True, detokenize=False)

    engine.generate(load(4), answers(8), use_tqdm=False)
    print(json.dumps({"ready_s": time.perf_counter() - begin}), flush=True)
    prompts = load(args.requests)
    if args.ready:
        args.ready.touch()
    while args.wait and not args.wait.exists():
        time.sleep(0.2)
    begin = time.perf_counter()
    outputs = engine.generate(prompts, answers(args.answer), use_tqdm=False)
    seconds = time.perf_counter() - begin
    spans = [(o.metrics.scheduled_ts, o.metrics.last_token_ts) for o in outputs]
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    found = {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "most_at_once": max(sum(a <= at < z for a, z in spans) for at, _ in spans),
    }
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("shape", "weights", "run"))
    parser.add_argument("directory")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--requests", type=int, default=72)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--memory", default="23GiB", help="for caches")
    parser.add_argument("--utilization", type=float, default=0.29, help="share of the GPU's memory, with weights")
    parser.add_argument("--dummy", action="store_true", help="do not read weights")
    parser.add_argument("--ready", type=Path)
    parser.add_argument("--wait", type=Path)
    args = parser.parse_args()
    if args.job == "shape":
        save_shape(Path(args.directory), args.model)
    elif args.job == "weights":
        save_weights(Path(args.directory), args.model)
    else:
        run(args)


if __name__ == "__main__":
    main()
