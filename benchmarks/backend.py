"""`generate` through torch.compile: backend "kvrewrite" beside plain Inductor, on a GPU.

    python -m benchmarks.backend [layers] [prompt tokens] [new tokens] [--ways WAY ...] [--out FILE]

Llama-3.1-8B shape (32 layers unless fewer are asked for), random bf16 weights. Each row: seconds of the first call (compilation
in it) and of the prompt alone, milliseconds a new token, peak memory over weights, and the graphs that Dynamo made. --out: a JSON
file, written anew behind every way, so that a time limit leaves what was measured.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import kvrewrite.dynamo.backend  # noqa: F401 (registers the backend's name)
from kvrewrite.tools.benchmark.shapes import SHAPES

WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "streaming_llm": {
        "backend": "kvrewrite",
        "options": {"policy": "streaming_llm", "budget": 4096, "chunk": 4096, "positions": "original"},
    },
    "snapkv": {"backend": "kvrewrite", "options": {"policy": "snapkv", "budget": 4096}},
}


def timed(call: Any) -> tuple[float, float]:
    """Seconds, and the peak of allocated memory in GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30


def main(layers: int, prompt_tokens: int, new_tokens: int, ways: list[str], out: Path | None) -> None:
    from torch._dynamo.utils import counters

    config = SHAPES["llama-3.1-8b"]()
    config.num_hidden_layers = layers
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    weights = torch.cuda.memory_allocated() / 2**30
    prompt = torch.randint(0, config.vocab_size, (1, prompt_tokens), device="cuda")

    def settings(count: int) -> dict[str, Any]:
        return {
            "attention_mask": torch.ones_like(prompt), "max_new_tokens": count, "do_sample": False, "pad_token_id": 0,
            "eos_token_id": None,
        }  # fmt: skip

    rows: list[dict[str, Any]] = []
    for name in ways:
        how = WAYS[name]
        torch._dynamo.reset()
        counters.clear()
        called = model
        if how is not None:
            model.forward = torch.compile(model.forward, **how)  # what `generate` calls
        first, _ = timed(lambda: called.generate(prompt, **settings(8)))  # noqa: B023
        graphs = counters["stats"]["unique_graphs"]
        short, _ = timed(lambda: called.generate(prompt, **settings(1)))  # noqa: B023
        whole, peak = timed(lambda: called.generate(prompt, **settings(new_tokens)))  # noqa: B023
        model.__dict__.pop("forward", None)
        rows.append(
            {
                "way": name, "first_s": round(first, 2), "prompt_s": round(short, 3), "generate_s": round(whole, 3),
                "ms_per_token": round(1e3 * (whole - short) / (new_tokens - 1), 2),
                "peak_over_weights_gib": round(peak - weights, 2), "graphs": graphs,
                "graphs_at_the_end": counters["stats"]["unique_graphs"],
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        if out is not None:
            about = {
                "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
                "layers": layers, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
            }  # fmt: skip
            out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 32), ("prompt_tokens", 32768), ("new_tokens", 256)):
        parser.add_argument(name, type=int, nargs="?", default=default)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path)
    main(**vars(parser.parse_args()))
