"""RoPE of a chunk's queries and keys in one launch, against the op's reference."""

from __future__ import annotations

import pytest
import torch

from kvrewrite.kernels.rotary.rope import turn_both
from kvrewrite.ops.rotary import rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],  # the interpreter cuts bf16 off
)
@pytest.mark.parametrize(
    ("b", "h", "hkv", "t", "d", "shared"), [(2, 9, 3, 70, 16, False), (1, 4, 4, 5, 12, True), (2, 1, 1, 1, 6, True)]
)
def test_turn_both(b: int, h: int, hkv: int, t: int, d: int, shared: bool, dtype: torch.dtype) -> None:
    """Slices of one projection, with cos and sin of each row or of all, whose halves differ. In fp32 the reference's bits; in
    others nearer to float64 than the reference, which rounds three times."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(b, t, (h + 2 * hkv) * d, generator=g).to(DEVICE, dtype)
    q = wide[..., : h * d].unflatten(-1, (h, d)).transpose(1, 2)
    k = wide[..., h * d : (h + hkv) * d].unflatten(-1, (hkv, d)).transpose(1, 2)
    cos, sin = torch.randn(2, 1 if shared else b, t, d, generator=g).to(DEVICE, dtype)
    for x, got in zip((q, k), turn_both(q, k, cos, sin), strict=True):
        assert got.shape == x.shape and got.transpose(1, 2).is_contiguous()
        if dtype == torch.float32:
            assert torch.equal(got, rope(x, cos, sin))
        exact = rope(x.double(), cos.double(), sin.double())
        assert (got.double() - exact).norm() <= (rope(x, cos, sin).double() - exact).norm() + 1e-12


def test_what_is_refused() -> None:
    """Shapes that do not fit."""
    x = torch.zeros(1, 2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"cos has shape \(1, 2, 4\), expected \(3, 4\)"):
        turn_both(x, x, x[:, 0, :2], x[:, 0])
    with pytest.raises(ValueError, match="head dimensions must be even"):
        turn_both(x[..., :3], x[..., :3], x[:, 0, :, :3], x[:, 0, :, :3])
