"""A configuration for modules that are not from transformers."""

from __future__ import annotations

from typing import Any

from kvrewrite.ir.program import Program


def foreign_config(program: Program, name: str) -> Any:
    """A configuration with what `generate` asks for, for modules that are not from transformers."""
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    config.vocab_size = program.vocab_size
    config.num_hidden_layers = len(program.sites)
    config.architectures = [name]
    config.is_encoder_decoder = False
    if program.max_positions is not None:
        config.max_position_embeddings = program.max_positions
    return config
