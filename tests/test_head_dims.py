"""Every head dim: each op that has a kernel against fp64, on a GPU; a few dims in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.head_dims import DIMS, SMALL_SHAPES, UNEQUAL, Found, sweep

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def wrong(found: list[Found]) -> list[Found]:
    assert found
    return [x for x in found if not x.right]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "dv"), [*((d, d) for d in DIMS), *UNEQUAL])
def test_on_a_gpu(d: int, dv: int, dtype: torch.dtype) -> None:
    found = list(sweep(d, dv, dtype, "cuda", seed=d))
    assert not wrong(found)
    missing = {x.op for x in found if x.missing}
    assert all(op.startswith(("token, ", "update, ")) for op in missing), missing  # some ways to quantize


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU above")
@pytest.mark.parametrize(
    ("d", "dv", "dtype"),
    [(1, 1, torch.float32), (17, 40, torch.float16), (40, 40, torch.float16), (100, 24, torch.float32)],
)
def test_in_the_interpreter(d: int, dv: int, dtype: torch.dtype) -> None:
    found = list(sweep(d, dv, dtype, "cpu", SMALL_SHAPES, quantized=False))
    assert not wrong(found)
    assert not [x for x in found if x.missing]
