"""A vLLM that runs on a CPU. Its wheel is built for GPUs, so three small ops that it calls on a CPU are missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
POLICIES: dict[str, dict[str, Any]] = {
    "streaming_llm": {"chunk": 32},
    "h2o": {"chunk": 32},
    "tova": {"chunk": 48},
    "snapkv": {},
    "locret": {"chunk": 32, "stabilizers": 16},
}


def gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """A random token of each row (rows, vocabulary), by the row's seed."""
    noise = [torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()]
    return (logits - torch.log(-torch.log(torch.stack(noise)))).argmax(dim=-1)


@pytest.fixture(scope="session")
def vllm() -> Any:
    """The package vllm, ready for a CPU."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    os.environ.update(SETTINGS)
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("init_cpu_memory_env(int[] nodes) -> ()")
    library.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")
    library.define("greedy_argmax(Tensor logits) -> Tensor")
    library.impl("greedy_argmax", lambda logits: logits.argmax(dim=-1), "CompositeExplicitAutograd")
    library.define("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor")
    library.impl("fused_gumbel_argmax", gumbel_argmax, "CompositeExplicitAutograd")
    import vllm as package

    yield package
    del library


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the directory of a policy, once: a small trained model in float32."""
    from transformers import AutoModelForCausalLM

    import kvrewrite

    root = tmp_path_factory.mktemp("models")
    assets = Path(kvrewrite.__file__).parent / "assets"

    def make(policy: str) -> Path:
        base, out = root / "base", root / policy
        if not base.exists():
            model = AutoModelForCausalLM.from_pretrained(assets / "small", dtype=torch.float32)
            model.save_pretrained(base)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(assets / "small" / name, base)
        if not out.exists():
            weights = assets / "small_policies" / "locret.safetensors" if policy == "locret" else None
            kvrewrite.convert(base, out, policy, budget=48, policy_weights=weights, **POLICIES[policy])
        return out

    return make
