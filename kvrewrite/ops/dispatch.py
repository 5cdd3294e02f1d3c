"""Which implementation an op takes: the fused kernels (Triton, on CUDA) or the torch reference. Decided in the open.

`auto` takes the kernels on CUDA for fp32, fp16 and bf16 tensors, and the reference elsewhere (CPU, fp64). `reference` and
`fused` are explicit: `fused` raises where there is no kernel, instead of falling back. The environment variable
KVREWRITE_KERNELS sets the mode that a process begins with. Each choice is logged once under `kvrewrite.kernels`.

`unversioned` spares ops that write to caches autograd's count of the writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from kvrewrite.errors import OptionError

MODES = ("auto", "reference", "fused")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
log = logging.getLogger("kvrewrite.kernels")
_told: set[tuple[str, torch.device, torch.dtype, str | None]] = set()


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


def fused(op: str, x: Tensor, why_not: str | None = None) -> bool:
    """Whether `op` runs its fused kernel on tensors like x. why_not: why there is no kernel for this case; None if there is."""
    chosen = _mode != "reference"
    if chosen and why_not is None and x.dtype not in DTYPES:
        why_not = f"kernels compute in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not in {x.dtype}"
    if _mode == "fused" and why_not is not None:
        raise OptionError(f"kernels=fused: {op} has no kernel here: {why_not}")
    chosen = chosen and why_not is None and (x.is_cuda or _mode == "fused")
    key = (op, x.device, x.dtype, why_not)
    if key not in _told:
        _told.add(key)
        which, because = "kernel" if chosen else "reference", f" ({why_not})" if why_not is not None else ""
        log.info("%s on %s in %s: %s%s", op, x.device, x.dtype, which, because)
    return chosen


# ------------------------------------------------------------------------------------------------ versions
# `torch.library.custom_op` counts up a version of every tensor that an op writes to, by which autograd would notice that a tensor
# it kept has changed. Nothing keeps caches for a backward pass, and for the count all arguments are looked up in the schema, each
# of which copies the list of them: 0.2 ms a call for an op of 24 arguments. With torch before 2.13, where this was not tried,
# versions are counted.
SPARES = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
_libraries: dict[str, torch.library.Library] = {}


def unversioned(*names: str) -> None:
    """Makes ops of these names ("kvrewrite::cache_update"), which are defined, leave the versions of what they write to alone."""
    for name in names if SPARES else ():
        namespace, _, op = name.partition("::")
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*[Oo]verriding a previously registered kernel", category=UserWarning
            )
            library.impl(op, torch.library.fallthrough_kernel, "ADInplaceOrView", allow_override=True)
