"""Small ops that vLLM calls on a CPU, and that its wheel, which is built for GPUs, does not have."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_argmax(logits: Tensor, seeds: Tensor) -> Tensor:
    """A random token of each row (rows, vocabulary), by the row's seed."""
    noise = [torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()]
    return (logits - torch.log(-torch.log(torch.stack(noise)))).argmax(dim=-1)


OPS = {
    "init_cpu_memory_env(int[] nodes) -> ()": lambda nodes: None,
    "greedy_argmax(Tensor logits) -> Tensor": lambda logits: logits.argmax(dim=-1),
    "fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor": gumbel_argmax,
    # Places of tokens in blocks, which the program does not use (0.24 and 0.25).
    "compute_slot_mapping_kernel_impl(Tensor starts, Tensor positions, Tensor table, Tensor(a!) out, int size) -> ()": (
        lambda *_: None
    ),
}
LIBRARY = torch.library.Library("_C", "FRAGMENT")
for signature, function in OPS.items():
    LIBRARY.define(signature)
    LIBRARY.impl(signature.split("(")[0], function, "CompositeExplicitAutograd")
