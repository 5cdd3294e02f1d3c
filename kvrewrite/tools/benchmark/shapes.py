"""Chooses the model to measure: a directory, or a named shape with random weights, which takes the same time."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kvrewrite
from kvrewrite import policies
from kvrewrite.errors import OptionError
from kvrewrite.tools.subjects import Arm, Source

STD = 0.02  # of the random weights
# Number and width of Attention-Gates' heads, which have no usual size, if neither options nor weights give one.
GATE = {"gate_heads": 8, "gate_dim": 64}


# ---------------------------------------------------------------------------------------------------------------
# configs
def _llama_8b() -> Any:
    """meta-llama/Llama-3.1-8B."""
    from transformers import LlamaConfig

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
    )


def _phi3_mini() -> Any:
    """microsoft/Phi-3-mini-128k-instruct. Its factors are trained; these grow similarly. Its window of 262144 never
    bites."""
    from transformers import Phi3Config

    pairs = 48
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + 1.8 * i / (pairs - 1) for i in range(pairs)],
        "long_factor": [1.0 + 63.0 * (i / (pairs - 1)) ** 2 for i in range(pairs)],
    }
    return Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=rope,
        sliding_window=None,
    )


def _qwen3_8b() -> Any:
    """Qwen/Qwen3-8B, without YaRN."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def _tiny() -> Any:
    """Two layers, to try the command on a CPU."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "llama-3.1-8b": _llama_8b,
    "phi-3-mini": _phi3_mini,
    "qwen3-8b": _qwen3_8b,
    "tiny": _tiny,
}


# ---------------------------------------------------------------------------------------------------------------
# weights
def build(config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """Makes a model of random weights N(0, 0.02), norms 1 and biases 0, directly on the device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, STD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        rebuilt = set()
        for path, module in list(model.named_modules()):
            if "RotaryEmbedding" in type(module).__name__:  # to_empty left its tables uninitialized
                fresh = type(module)(config).to(device)
                rebuilt |= {f"{path}.{name}" for name, _ in fresh.named_buffers()}
                model.set_submodule(path, fresh)
    if left := [n for n, _ in model.named_buffers() if n not in rebuilt]:
        raise OptionError(
            f"{type(model).__name__} can't be given random weights: its tables {', '.join(left)} are not known; use a checkpoint"
        )
    model.requires_grad_(False)
    return model


class ShapeSource:
    """A named shape with the interface of `kvrewrite.tools.subjects.Source`. The model is made once and rewritten ones
    share its weights; policies that need trained weights get random ones."""

    manifest = None

    def __init__(self, name: str, *, device: str | torch.device, dtype: str = "auto", seed: int = 0):
        if name not in SHAPES:
            raise OptionError(f"unknown shape {name!r}; there are: {', '.join(SHAPES)}")
        self.name, self.device, self.seed = name, torch.device(device), seed
        automatic = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype = automatic if dtype == "auto" else dtype
        self.hf_config = SHAPES[name]()
        self._base: Any = None

    @property
    def config(self) -> dict[str, Any]:
        """Returns the configuration as data."""
        return self.hf_config.to_dict()

    def fingerprint(self) -> str:
        """Returns a hash that is the same for equal models."""
        return f"{self.name}, random weights, seed {self.seed}"

    @property
    def base(self) -> Any:
        """Returns the unmodified model."""
        if self._base is None:
            self._base = build(self.hf_config, self.device, getattr(torch, self.dtype), self.seed)
        return self._base

    def random_weights(self, arm: Arm) -> bool:
        """Whether the arm's policy weights are random."""
        return policies.POLICIES[arm.spec.name].needs_weights and arm.spec.weights is None

    def rewritten(self, arm: Arm) -> Any:
        """Returns the model with an arm's policy."""
        policy = policies.make(arm.spec.name, **arm.options)
        if not self.random_weights(arm):
            return kvrewrite.transform(self.base, policy, policy_weights=arm.spec.weights)
        if hasattr(policy, "gate_heads"):
            given = {k: getattr(policy, k) or v for k, v in GATE.items()}
            policy = dataclasses.replace(policy, **given)  # type: ignore[arg-type]
        return kvrewrite.transform(self.base, policy, policy_weights=self._make_weights(policy))

    def _make_weights(self, policy: policies.Policy) -> dict[str, Tensor]:
        """Makes random policy weights. A one-layer model gives their shapes: all layers of a named shape are alike."""
        from kvrewrite.capture.frontend import capture
        from kvrewrite.passes.pipeline import canonical, expected_weights

        config = copy.deepcopy(self.hf_config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 64, None
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        dtype = getattr(torch, self.dtype)
        captured = capture(build(config, torch.device("cpu"), dtype, 0))
        shapes = expected_weights(captured, canonical(captured), policy)
        generator = torch.Generator(device=self.device).manual_seed(self.seed + 1)
        made = {}
        for layer in range(self.hf_config.num_hidden_layers):
            for name, shape in shapes.items():
                values = torch.randn(shape, generator=generator, device=self.device, dtype=dtype)
                made[re.sub(r"\b(layers|gates)\.0\.", rf"\g<1>.{layer}.", name)] = values / shape[-1] ** 0.5
        return made


def open_source(model: str, *, device: str | torch.device, dtype: str = "auto", seed: int = 0) -> Source | ShapeSource:
    """Opens MODEL as a directory if it is one, else as a shape's name; raises OptionError or ArtifactError."""
    if not Path(model).exists() and model in SHAPES:
        return ShapeSource(model, device=device, dtype=dtype, seed=seed)
    if not Path(model).exists() and "/" not in model:
        raise OptionError(
            f"{model!r} is neither a directory nor a named shape; give a checkpoint directory, or one of: "
            f"{', '.join(SHAPES)}"
        )
    from kvrewrite.artifact.local_directory import checkpoint_directory

    return Source(checkpoint_directory(model), device=device, dtype=dtype)
