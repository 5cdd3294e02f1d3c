"""The vLLM plug-in: a directory that `kvrewrite convert` made runs under vLLM's scheduler, sampler and server (docs/vllm.md)."""

from __future__ import annotations


def register() -> None:
    """vLLM calls this in each of its processes (entry point group `vllm.general_plugins`)."""
    from kvrewrite.vllm.plugin import install

    install()
