"""Spares ops that write to caches a count of the writes.

`torch.library.custom_op` counts up a version of every tensor that an op writes to, by which autograd would notice that a tensor
it kept has changed. Nothing keeps caches for a backward pass, and for the count all arguments are looked up in the schema, each
of which copies the list of them: 0.2 ms a call for an op of 24 arguments. With torch before 2.13, where this was not tried,
versions are counted.
"""

from __future__ import annotations

import warnings

import torch

SPARES = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
_library = torch.library.Library("kvrewrite", "IMPL")


def unversioned(*names: str) -> None:
    """Makes kvrewrite's ops of these names, which are defined, leave the versions of what they write to alone."""
    if not SPARES:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*[Oo]verriding a previously registered kernel", category=UserWarning
        )
        for name in names:
            _library.impl(name, torch.library.fallthrough_kernel, "ADInplaceOrView", allow_override=True)
