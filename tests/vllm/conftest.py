"""A vLLM that runs on a CPU, and directories for it."""

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


@pytest.fixture(scope="session")
def vllm() -> Any:
    """The package vllm, ready for a CPU."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    os.environ.update(SETTINGS)
    import vllm as package

    import tests.vllm.cpu_ops  # noqa: F401

    return package


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
