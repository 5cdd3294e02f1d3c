"""Training attention with gates: forward and gradients against the formula, written down in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvrewrite.ops  # noqa: F401
from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.groups import Logits, Placed, Tokens
from kvrewrite.tools.training import gated_attention as module
from kvrewrite.tools.training.gated_attention import gated_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# name -> (query heads, kv heads, D, Dv, options)
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "one head": (1, 1, 4, 4, {}),
    "grouped": (6, 2, 8, 4, {}),
    "window": (4, 2, 4, 4, {"window": 5}),
    "chunked": (2, 1, 4, 4, {"chunk": 8}),
    "softcap": (4, 2, 4, 4, {"softcap": 2.0}),
    "sinks": (4, 2, 4, 4, {"sinks": True}),
    "alibi": (4, 2, 4, 4, {"alibi": True, "window": 9}),
    "all": (6, 3, 4, 8, {"alibi": True, "sinks": True, "softcap": 3.0, "window": 7}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks for a short text."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(module, "BLOCK_BYTES_CPU", 4096)


def example(case: str, dtype: torch.dtype = torch.float64, t: int = 21, batch: int = 2) -> tuple[list[Any], list[Any]]:
    """Tensors (q, k, v, gate, sinks), all with gradients, and the rest of the arguments."""
    h, hkv, d, dv, options = CASES[case]
    g = torch.Generator().manual_seed(len(case))

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)

    gate = (torch.rand(batch, hkv, t, generator=g) < 0.5).to(DEVICE, torch.promote_types(dtype, torch.float32))
    tensors = [rand(batch, h, t, d) * 2, rand(batch, hkv, t, d), rand(batch, hkv, t, dv), gate]
    tensors.append(rand(h) if options.get("sinks") else None)
    alibi = torch.linspace(0.1, 0.5, h, device=DEVICE) if options.get("alibi") else None
    shape = [0.6, float(options.get("softcap", 0.0)), options.get("window", 0), options.get("chunk", 0)]
    return [x if x is None else x.requires_grad_() for x in tensors], [alibi, *shape]


def naive(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, sinks: Tensor | None, alibi: Tensor | None, scale: float,
    softcap: float, window: int, chunk: int,
) -> Tensor:  # fmt: skip
    """The formula with everything in memory."""
    t, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v, m = (x.repeat_interleave(group, dim=1) for x in (k, v, gate))
    logits = q @ k.transpose(2, 3) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    i, j = torch.arange(t, device=q.device)[:, None], torch.arange(t, device=q.device)
    if alibi is not None:
        logits = logits - alibi[:, None, None].to(logits) * (i - j)
    seen = j <= i
    if window:
        seen = seen & (i - j < window)
    if chunk:
        seen = seen & (i // chunk == j // chunk)
    weights = torch.exp(logits) * seen * torch.where(i == j, 1.0, m[:, :, None, :].to(logits))
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks)[:, None, None]
    return weights @ v / total


def gradients(out: Tensor, tensors: list[Any]) -> list[Tensor]:
    """Those of a fixed random projection of the output."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return list(torch.autograd.grad(out, [x for x in tensors if x is not None], direction))


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_those_of_the_formula(case: str) -> None:
    tensors, rest = example(case)
    out, _ = gated_attention(*tensors, *rest, False)
    expected = naive(*tensors, *rest)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for got, wanted in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", ["grouped", "all"])
def test_gradients_are_finite_differences_also_at_gates_that_are_closed(case: str) -> None:
    tensors, rest = example(case, t=9, batch=1)
    assert (tensors[3] == 0).any() and (tensors[3] == 1).any()
    given = [x for x in tensors if x is not None]

    def function(*xs: Tensor) -> Tensor:
        return gated_attention(*xs, *([None] * (5 - len(xs))), *rest, False)[0]

    assert torch.autograd.gradcheck(function, given, eps=1e-6, atol=1e-6)


def test_a_closed_gate_is_a_hidden_key_of_the_inference_op() -> None:
    tensors, rest = example("grouped")
    q, k, v, gate, _ = (x if x is None else x.detach() for x in tensors)
    b, hkv, t = gate.shape
    at = torch.arange(t, device=DEVICE)
    live = torch.ones(b, hkv, t, dtype=torch.bool, device=DEVICE)
    placed, logits = Placed(at.expand(b, t), at.expand(b, hkv, t), live), Logits(hidden=gate == 0, scale=rest[1])
    expected, lse = reference.attend(Tokens(q, k, v), placed, logits)
    out, got = gated_attention(q, k, v, gate, None, *rest, False)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.float(), lse)


def test_flip_is_the_difference_that_one_flag_makes() -> None:
    """For one query at the end of the text and one closed gate, in the direction of the output."""
    tensors, rest = example("grouped", batch=1)
    q, k, v, gate, _ = tensors
    out, _ = gated_attention(q, k, v, gate, None, *rest, True)
    direction = torch.randn(out.shape[3], dtype=out.dtype, device=DEVICE)
    weight = torch.zeros_like(out)
    weight[0, 1, -1] = direction
    (grad,) = torch.autograd.grad(out, gate, weight)
    closed = int((gate[0, 0, :-1] == 0).nonzero()[0])
    opened = gate.detach().clone()
    opened[0, 0, closed] = 1
    other, _ = gated_attention(q, k, v, opened, None, *rest, True)
    difference = ((other - out)[0, 1, -1] * direction).sum()
    torch.testing.assert_close(grad[0, 0, closed], difference, rtol=1e-8, atol=1e-12)
    # Where gates are open it is the derivative, and elsewhere it is smaller.
    (exact,) = torch.autograd.grad(gated_attention(q, k, v, gate, None, *rest, False)[0], gate, weight)
    torch.testing.assert_close(grad[gate == 1], exact[gate == 1], rtol=1e-10, atol=1e-12)
    assert (grad[gate == 0].abs() <= exact[gate == 0].abs()).all() and not torch.equal(grad, exact)


def test_hidden_keys_that_outweigh_all_others_leave_gradients_finite() -> None:
    tensors, rest = example("grouped", torch.float32)
    with torch.no_grad():
        tensors[0] *= 60
    for flip in (False, True):
        grads = gradients(gated_attention(*tensors, *rest, flip)[0], tensors)
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    tensors, rest = example("all", dtype)
    wide = [x if x is None else x.detach().double().requires_grad_() for x in tensors]
    expected = naive(*wide, *rest)
    out, _ = gated_attention(*tensors, *rest, False)
    assert out.dtype == dtype
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    pairs = [(out, expected), *zip(gradients(out, tensors), gradients(expected, wide), strict=True)]
    for got, wanted in pairs:
        error = torch.linalg.vector_norm(got.double() - wanted) / torch.linalg.vector_norm(wanted)
        assert error < limit


@pytest.mark.parametrize("case", ["grouped", "all"])
def test_opcheck(case: str) -> None:
    tensors, rest = example(case, torch.float32, t=5, batch=1)
    torch.library.opcheck(gated_attention, (*tensors, *rest, True))
    plain = [x if x is None else x.detach() for x in tensors]
    out, lse = gated_attention(*plain, *rest, True)
    inputs = (torch.ones_like(out), *plain[:4], out, lse, plain[4], *rest, True)
    torch.library.opcheck(torch.ops.kvrewrite.gated_attention_backward.default, inputs)


def test_memory_is_not_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 tokens: no tensor of either pass is larger than a block, and what is kept between them is linear in T."""
    t, limit = 1024, 1 << 18
    monkeypatch.setattr(module, "BLOCK_BYTES", limit)
    monkeypatch.setattr(module, "BLOCK_BYTES_CPU", limit)
    q, k, v = (torch.randn(1, 2, t, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    gate = torch.ones(1, 2, t, device=DEVICE, requires_grad=True)
    rest = (None, None, 0.5, 0.0, 0, 0, False)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
            return result

    groups = Tokens(q, k, v), gate, Logits(scale=0.5)
    with torch.no_grad(), Watch():  # a dispatch mode does not look into an op, so its function is called
        out, lse = module.gated(*groups, False)
        module.gated_attention_backward(out, *groups[:2], out, lse, groups[2], False)
    assert len(sizes) > 100 and max(sizes) <= limit // 4 < t * t
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gated_attention(q, k, v, gate, *rest)
    assert 0 < kept <= 5 * q.numel()
