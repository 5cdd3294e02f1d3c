"""Programmatic dependent launch: a kernel begins while the one before it ends (CUDA, from compute capability 9.0 on).

These rules hold for every kernel here that is launched so, and make that safe whatever comes before or after it:

- every program waits (`begin`) before it reads or writes anything that another kernel may write or read. Before the wait
  stand only reads of weights, which no kernel writes;
- only after its wait it lets the next kernel begin. So all that came before the kernel before it has ended by then.

The wait ends when the kernel before has ended and its results can be seen, so that after it all is as in launches one
after the other. KVREWRITE_PDL=0 in the environment launches them so.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

_WANTED = os.environ.get("KVREWRITE_PDL", "1") != "0"


@cache
def overlapping(device: torch.device) -> bool:
    """Whether kernels on a device may begin before the previous one has ended; never in the interpreter."""
    if not _WANTED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for launching a kernel that has a PDL argument and calls `begin`."""
    return {"PDL": True, "launch_pdl": True} if overlapping(device) else {"PDL": False}


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel before, then lets the next one begin."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(at):
    """Begins to bring the cache lines at pointers into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
