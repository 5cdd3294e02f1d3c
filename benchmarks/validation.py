"""What proving a rewrite takes of `transform`, with the weights of Llama-3.1-8B's shape on a GPU. Needs a GPU.

    python -m benchmarks.validation

Random weights, bf16, h2o; each kind of check twice, the first round with what is loaded only once.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

import kvrewrite
from kvrewrite.tools.benchmark.shapes import SHAPES

CHECKS: tuple[Literal["off", "sites", "full"], ...] = ("off", "sites", "full")


def main() -> None:
    with torch.device("cuda"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(SHAPES["llama-3.1-8b"](), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    for check in CHECKS * 2:
        begin = time.perf_counter()
        kvrewrite.transform(model.eval(), policy="h2o", budget=2048, check=check)
        print(f"check={check!r}: {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
