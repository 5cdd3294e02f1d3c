"""Tells vLLM about directories of kvrewrite: how their configuration is read, which class runs them, what is refused."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm.transformers_utils.config import get_config_parser, register_config_parser

from kvrewrite.artifact.directory import is_artifact, read_manifest
from kvrewrite.errors import OptionError
from kvrewrite.vllm.versions import why_not

ARCHITECTURE = "KVRewriteForCausalLM"
_CLASS = "kvrewrite.vllm.model:KVRewriteForCausalLM"


def install() -> None:
    """Does so; calling it again changes nothing. Other models are read and run as before, also under a version of vLLM that
    is not supported."""
    # Each module that registers something is imported once.
    present = get_config_parser("hf")
    if not getattr(present, "reads_kvrewrite", False):
        register_config_parser("hf")(_parser(type(present)))
    if why_not(version("vllm")) is None:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from kvrewrite.vllm.engine_config import EngineConfig

        if ARCHITECTURE not in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[ARCHITECTURE] = EngineConfig
            ModelRegistry.register_model(ARCHITECTURE, _CLASS)


def _parser(usual: type[Any]) -> type[Any]:
    """vLLM's reader of config.json, which names our class as the architecture of a directory of kvrewrite."""

    class Parser(usual):
        reads_kvrewrite = True

        def parse(self, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            data, config = super().parse(model, *args, **kwargs)
            if not is_artifact(model):
                return data, config
            if (reason := why_not(version("vllm"))) is not None:
                raise OptionError(reason)
            read_manifest(model)  # raises where the directory is damaged or of another format
            _choose_runner()
            config.architectures = [ARCHITECTURE]
            return data, config

    return Parser


def _choose_runner() -> None:
    """Only vLLM's first model runner passes positions with several axes on as they are (`labels.py`)."""
    name = "VLLM_USE_V2_MODEL_RUNNER"
    given = os.environ.get(name, "0")
    if given.lower() not in ("0", "false"):
        raise OptionError(f"{name}={given}, but kvrewrite runs under the first model runner; unset it or set it to 0")
    logging.getLogger(__name__).info("kvrewrite sets %s=0", name)
    os.environ[name] = "0"  # processes that start later read it, too
