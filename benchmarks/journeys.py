"""How many of the project's modules a prompt and a token enter: what a reader has to open to follow one.

    python -m benchmarks.journeys

A tiny random Llama of two layers with h2o, on a GPU if there is one; a token is one of `generate`'s. A module counts
if one of its functions is called. On a GPU, what was captured as a CUDA graph enters no ops.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parents[1]
FOLDERS = ("kvrewrite", "passes", "kernels")
GROUPS = {
    "runtime and cache": ("kvrewrite/runtime/", "kvrewrite/cache/"),
    "policies": ("kvrewrite/policies/",),
    "ops and kernels": ("kvrewrite/ops/", "kernels/"),
}


class Journey:
    """What a call goes through. modules: how often each module's functions are called; switches: calls and returns that lead
    from one module of the project to another."""

    def __init__(self, call: Callable[[], Any]):
        self.modules: Counter[str] = Counter()
        self.switches = 0
        self._names: dict[str, str] = {}
        self._stack: list[str] = []
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        try:
            call()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def groups(self) -> dict[str, int]:
        """How many modules of each group were entered, and of no group ("others")."""
        counts = {name: sum(m.startswith(folders) for m in self.modules) for name, folders in GROUPS.items()}
        return {**counts, "others": len(self.modules) - sum(counts.values())}

    def _module(self, file: str) -> str:
        """A file's path in the project, or "". (kvrewrite/passes and kvrewrite/kernels are links.)"""
        if file not in self._names:
            real = Path(os.path.realpath(file))
            inside = real.is_relative_to(HOME) and real.relative_to(HOME).parts[0] in FOLDERS
            self._names[file] = str(real.relative_to(HOME)) if inside else ""
        return self._names[file]

    def _event(self, frame: Any, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        name = self._module(frame.f_code.co_filename)
        if not name:
            return
        if event == "call":
            self.modules[name] += 1
            self.switches += bool(self._stack) and self._stack[-1] != name
            self._stack.append(name)
        elif self._stack:
            self._stack.pop()
            self.switches += bool(self._stack) and self._stack[-1] != name


def tiny_model(static: bool) -> Any:
    """A rewritten Llama of two layers; static: single tokens run from static buffers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import kvrewrite

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kvrewrite.transform(LlamaForCausalLM(config).eval().to(device), policy="h2o", budget=32)
    if static:
        model.compile(static_decode=True, backend="eager")
    return model


def journeys(static: bool) -> dict[str, Journey]:
    """Of a prompt, and of the third token after it: the first ones make buffers."""
    model, found = tiny_model(static), {}
    ids = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(1)).to(model.device)
    with torch.no_grad():
        for _ in range(2):  # what is made at the first request is no part of a journey
            cache = model.new_cache(1)
            found["prompt"] = Journey(lambda c=cache: model(ids, past_key_values=c, logits_to_keep=1))
            for _ in range(3):
                found["token"] = Journey(lambda c=cache: model(ids[:, :1], past_key_values=c, generated=True))
    return found


def main() -> None:
    """Prints a table."""
    for static in (False, True):
        for name, journey in journeys(static).items():
            kind = "static buffers" if static else "eager"
            counts = ", ".join(f"{count} of {group}" for group, count in journey.groups().items() if count)
            print(f"{name}, {kind}: {len(journey.modules)} modules ({counts}), {journey.switches} switches")
            for module, calls in sorted(journey.modules.items()):
                print(f"    {calls:5d}  {module}")


if __name__ == "__main__":
    main()
