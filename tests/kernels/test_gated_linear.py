"""The gated GEMM for chunks: it compiles for Hopper anywhere, and runs there only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu

from kvrewrite.kernels.linear.gated_hopper import choose_config
from kvrewrite.ops.dispatch import kernels

COMPILE = """
import os, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kvrewrite.kernels.linear import gated_hopper as hopper

fn = hopper._gated
pointers = dict.fromkeys(("X", "GATE", "UP", "OUT"), "*bf16")
for config in hopper.CONFIGS:
    constants = {"CONSUMERS": config.consumers, "BLOCK_N": config.block_n, "BLOCK_K": hopper.BLOCK_K, "STAGES": config.stages}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if n in (*pointers, "channels", "outputs")}
    source = GluonASTSource(fn, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    path = sys.argv[1] + "/gated.cubin"
    open(path, "wb").write(binary.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    print(binary.metadata.shared, int(re.search(r"STACK:(\\d+)", usage).group(1)))
"""


def test_it_compiles_without_spills(tmp_path: Path) -> None:
    """Gluon has no interpreter, but Triton compiles for a GPU that is not there (in a process that does not interpret)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = [[int(x) for x in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for shared, stack in lines:
        assert shared <= 232448 and stack == 0  # an H100's shared memory for a block; spilled bytes


def test_configs_by_size() -> None:
    """On 132 multiprocessors, 14336 outputs: large tiles, but where those leave much of the last round empty."""
    chosen = [choose_config(tokens, 14336, 132).consumers for tokens in (100, 1024, 2048, 3072, 4096)]
    assert chosen == [2, 2, 2, 3, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((65, 64), 8), ((2, 97, 72), 136), ((257, 520), 1408), ((3072, 1024), 512), ((1000, 4096), 14336)],
)
def test_against_float64(shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> None:
    """Through the op: tokens, channels and outputs that fill no tile; no further from float64 than linears and activation one by
    one, the same bits again, and nothing read beyond the tensors."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper")
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(*shape, generator=g, device="cuda").to(dtype)
    gate, up = (torch.randn(2, outputs, shape[-1], generator=g, device="cuda") * 2 / shape[-1] ** 0.5).to(dtype)
    with kernels("fused"):
        out, again = [torch.ops.kvrewrite.gated_linear(x, gate, up, "silu") for _ in range(2)]
    exact = silu(linear(x.double(), gate.double())) * linear(x.double(), up.double())
    apart = silu(linear(x, gate)) * linear(x, up)
    assert out.shape == exact.shape and torch.equal(out, again)
    assert (out.double() - exact).norm() <= 1.02 * (apart.double() - exact).norm()
