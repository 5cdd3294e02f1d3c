"""Which implementation an op takes: the fused kernels (Triton, on CUDA) or the torch reference. Decided in the open.

`auto` takes the kernels on CUDA for fp32, fp16 and bf16 tensors, and the reference elsewhere (CPU, fp64). `reference` and
`fused` are explicit: `fused` raises where there is no kernel, instead of falling back. The environment variable
KVREWRITE_KERNELS sets the mode that a process begins with. Each choice is logged once under `kvrewrite.kernels`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from kvrewrite.errors import OptionError

MODES = ("auto", "reference", "fused")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
log = logging.getLogger("kvrewrite.kernels")
_told: set[tuple[str, ...]] = set()


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise OptionError(f"kernels: got {mode!r}, expected one of {', '.join(MODES)}")
    return mode


_mode = _checked(os.environ.get("KVREWRITE_KERNELS", "auto"))


@contextlib.contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Within this context ops take `mode` ("auto", "reference" or "fused")."""
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before


def latent_values(v_pages: Tensor) -> str:
    """Why there is no kernel for a cache whose values are a part of its keys (mla=latent: v_pages of width 0); "" for others."""
    return "" if v_pages.shape[-1] else "a cache of latents, whose values are a part of the keys (mla=latent)"


def fused(op: str, x: Tensor, missing: str = "") -> bool:
    """Whether `op` runs its fused kernel on tensors like x. missing: why there is no kernel for this case, if there is none."""
    chosen = _mode != "reference"
    why = missing
    if chosen and not why and x.dtype not in DTYPES:
        why = f"kernels compute in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not in {x.dtype}"
    if _mode == "fused" and why:
        raise OptionError(f"kernels=fused: {op} has no kernel here: {why}")
    chosen = chosen and not why and (x.is_cuda or _mode == "fused")
    key = (op, str(x.device), str(x.dtype), why)
    if key not in _told:
        _told.add(key)
        log.info(
            "%s on %s in %s: %s%s", op, x.device, x.dtype, "kernel" if chosen else "reference", why and f" ({why})"
        )
    return chosen
