"""The kernel that sums two ranks' parts, one rank after the other: what one has sent is what the other one finds. Two GPUs at
once are in tests/runtime/test_parallel.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvrewrite.kernels.collective.pair_sum import pair_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def send(buffer: Tensor, x: Tensor, epoch: int) -> None:
    """What the other rank does: each word of four bytes beside the epoch, in the half of the buffer whose turn it is."""
    words = x.cpu().contiguous().view(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    half = buffer.numel() // 2
    buffer[epoch % 2 * half :][: len(words)] = (words | (epoch << 32)).to(buffer.device)


def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers; whole ones where the interpreter cuts bf16 off instead of rounding."""
    x = torch.randn(shape, generator=generator)
    return (x if DEVICE == "cuda" or dtype != torch.bfloat16 else (8 * x).round()).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 1, 1400)])
def test_two_ranks(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    buffers = [torch.zeros(16384, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    states = [torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    for epoch in range(1, 5):
        x, y, residual = (draw(shape, dtype, generator) for _ in range(3))
        rest = residual if epoch > 2 else None
        total = x + y  # rounded
        expected = total if rest is None else residual + total
        send(buffers[0], y, epoch)
        assert torch.equal(pair_sum(x, buffers[0], buffers[1], states[0], rest), expected)
        assert torch.equal(pair_sum(y, buffers[1], buffers[0], states[1], rest), expected)  # of what the first one sent
        assert all(state.tolist() == [epoch, 0] for state in states)


def test_refused() -> None:
    buffer, state = torch.zeros(8, dtype=torch.int64, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for x in (torch.ones(3, dtype=torch.float16), torch.ones(5), torch.ones(0)):
        with pytest.raises(ValueError, match="expected 1 to 4 whole words"):
            pair_sum(x.to(DEVICE), buffer, buffer, state)
