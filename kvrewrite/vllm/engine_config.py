"""What an engine of vLLM must be like to run a directory of kvrewrite: options are set, switched off or refused."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from kvrewrite.artifact.directory import read_manifest
from kvrewrite.errors import OptionError
from kvrewrite.vllm.labels import AXES

log = logging.getLogger(__name__)
_CHECK = "kvrewrite.vllm.request_check:RequestCheck"


class EngineConfig(VerifyAndUpdateConfig):
    """vLLM asks it once for the model's part of the configuration and once for the whole."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Sets the dtype that the program was captured in, and asks for positions with several axes."""
        manifest = read_manifest(model_config.model)
        dtype = getattr(torch, manifest["dtype"])
        if model_config.dtype != dtype:
            log.warning(
                "the model was converted in %s, so vLLM's dtype is that instead of %s", dtype, model_config.dtype
            )
            model_config.dtype = dtype
        if _CHECK not in (given := model_config.logits_processors or []):
            model_config.logits_processors = [*given, _CHECK]
        # vLLM's copy; the program has its own RoPE.
        model_config.hf_config.rope_parameters = {"rope_type": "default", "mrope_section": [1] * AXES}

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises OptionError for what would change answers or can't be done."""
        for reason in _refused(vllm_config):
            raise OptionError(reason)
        cache, compilation = vllm_config.cache_config, vllm_config.compilation_config
        if cache.enable_prefix_caching:
            log.warning("prefix caching is switched off: blocks of vLLM's cache hold no tokens here")
            cache.enable_prefix_caching = False
        cache.mamba_cache_mode = "none"
        cache.mamba_block_size = vllm_config.model_config.max_model_len
        # kvrewrite compiles its program and captures its steps itself.
        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode.NONE


def _refused(config: Any) -> list[str]:
    """Why this engine can't run the model, each with what to do."""
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    reasons = []
    for option in (
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if (size := getattr(parallel, option, 1)) > 1:
            reasons.append(
                f"{option}={size}: kvrewrite's program can't be cut so; use tensor_parallel_size, or an engine on each device"
            )
    workers = getattr(parallel, "tensor_parallel_size", 1)
    sites = read_manifest(model.model)["sites"]
    heads = {site["kv_heads"] for site in sites if not site["latent_cached"]}
    if uneven := [n for n in sorted(heads) if n % workers]:
        reasons.append(
            f"tensor_parallel_size={workers}: a layer has {uneven[0]} kv heads, which can't be dealt out over so many workers"
        )
    if config.lora_config is not None:
        reasons.append(
            "LoRA adapters change layers that the program has compiled in; merge them before `kvrewrite convert`"
        )
    if config.speculative_config is not None:
        reasons.append("speculative decoding takes tokens back, which an evicted cache can't; leave it out")
    if model.quantization is not None:
        reasons.append(
            f"quantization={model.quantization}: the program has weights as they were converted; convert a quantized model, or "
            "quantize the cache (kvrewrite convert --quantize)"
        )
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        reasons.append(
            f"kv_cache_dtype={cache.cache_dtype}: the cache is kvrewrite's; quantize it with kvrewrite convert --quantize"
        )
    if config.kv_transfer_config is not None or getattr(cache, "kv_offloading_size", None):
        reasons.append(
            "KV transfer and offloading move blocks of vLLM's cache, which hold no tokens here; leave them out"
        )
    if model.runner_type != "generate":
        reasons.append(f"runner={model.runner_type}: the program makes text; expected runner=generate")
    if model.enable_sleep_mode:
        reasons.append("sleep mode moves vLLM's memory, which is kvrewrite's here; leave enable_sleep_mode out")
    if model.enable_prompt_embeds:
        reasons.append("prompt embeddings: the program takes token ids; leave enable_prompt_embeds out")
    return reasons
