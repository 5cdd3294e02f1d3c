"""Refuses requests that ask for what the program does not compute, before they reach the engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor


class RequestCheck(LogitsProcessor):
    """vLLM asks the logits processors of an engine about each request; this one changes no logits."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
        pass

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which a client gets as HTTP 400."""
        if sampling_params.prompt_logprobs is not None:
            raise ValueError(
                "prompt_logprobs: logits are computed for the last token of a prompt only, because eviction follows each chunk; "
                "leave it out (`kvrewrite eval` and model(ids) score texts)"
            )

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass
