"""Layers that are no attention and carry a state beside the cache: ops, what is recognized, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvrewrite
from kvrewrite.analysis.memory import carried_bytes, plan_memory
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.kernels.recurrence import reference
from kvrewrite.runtime.parts import why_not_captured
from tests.capture.test_refusals import Decoder
from tests.support.rewritten import captured, logits, original, rewrite, rewritten
from tests.support.zoo import VOCAB

ops = torch.ops.kvrewrite


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ ops
def scan_inputs(length: int, by_channel: bool, delta: bool, seed: int = 0) -> list[Any]:
    """q, k, v, decay, beta, state of 2 rows, 3 heads, 4 x 5 channels, in fp64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=g, dtype=torch.float64)

    k = F.normalize(draw(length, 3, 4), dim=-1)
    decay = -draw(length, 3, *([4] if by_channel else [])).abs()
    beta = draw(length, 3).sigmoid() if delta else None
    return [draw(length, 3, 4), k, draw(length, 3, 5), decay, beta, draw(3, 4, 5)]


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written down."""
    out = []
    for t in range(q.shape[1]):
        kept = decay[:, t].exp()
        state = state * (kept[..., None] if kept.dim() == 3 else kept[..., None, None])
        update = v[:, t]
        if beta is not None:
            update = beta[:, t, :, None] * (update - torch.einsum("bhn,bhnp->bhp", k[:, t], state))
        state = state + k[:, t, :, :, None] * update[:, :, None]
        out.append(torch.einsum("bhn,bhnp->bhp", q[:, t], state))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("length", [1, 7, 150])
def test_linear_scan(length: int, by_channel: bool, delta: bool) -> None:
    *given, state = scan_inputs(length, by_channel, delta)
    expected, last = token_by_token(*given, state)
    got, end = reference.linear_scan(*given, state)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-12)


def test_decays_of_any_size_overflow_nothing() -> None:
    *given, state = scan_inputs(100, True, True)
    given[3] = given[3] * 1000
    got, end = reference.linear_scan(*given, state)
    expected, last = token_by_token(*given, state)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-12)


def padded(x: Tensor, width: int) -> Tensor:
    """x (T, ...) with sevens behind it, up to `width` tokens."""
    return torch.cat([x, x.new_full((width - len(x), *x.shape[1:]), 7.0)])


@pytest.mark.parametrize("kind", ["past", "scan", "sum"])
def test_rows_of_different_lengths_go_on_where_they_were(kind: str) -> None:
    """Two calls, in each of which one row has fewer tokens, are each row alone; what stands behind a row's end is nothing."""
    lengths = ([5, 0], [2, 6])
    if kind == "scan":
        *given, state = scan_inputs(11, False, True)
    elif kind == "sum":
        given, state = (
            [torch.rand(2, 11, 4, dtype=torch.float64), torch.randn(2, 11, 4).double()],
            torch.randn(2, 4).double(),
        )
    else:
        given, state = [torch.randn(2, 11, 4).double()], torch.zeros(2, 3, 4).double()
    cached = {"past": ops.cached_past, "scan": ops.cached_scan, "sum": ops.cached_sum}[kind]
    dim = [] if kind == "scan" else [1]
    kept, at, outputs = state.clone(), [0, 0], [[], []]  # type: ignore[var-annotated]
    for valid in lengths:
        width = max(valid)
        part = [torch.stack([padded(x[b, at[b] : at[b] + n], width) for b, n in enumerate(valid)]) for x in given]
        out = cached(*part, kept, torch.tensor(valid, dtype=torch.int32), *dim)
        first = 3 if kind == "past" else 0
        for b, n in enumerate(valid):
            outputs[b].append(out[b, first : first + n])
            at[b] += n
    for b in range(2):
        alone = [x[b : b + 1, : at[b]] for x in given]
        own = state[b : b + 1].clone()
        if kind == "scan":
            expected, last = token_by_token(*alone, own)  # type: ignore[arg-type]
        elif kind == "sum":
            expected, last = own[:, None], own
            for t in range(at[b]):
                last = alone[0][:, t] * last + alone[1][:, t]
                expected = torch.cat([expected, last[:, None]], 1)
            expected = expected[:, 1:]
        else:
            expected, last = alone[0], torch.cat([own, alone[0]], 1)[:, -3:]
        torch.testing.assert_close(torch.cat(outputs[b]), expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(kept[b], last[0], rtol=0, atol=1e-12)


def test_opcheck() -> None:
    valid, some = torch.tensor([3, 0], dtype=torch.int32), ("test_schema", "test_faketensor")
    *given, state = scan_inputs(4, True, True)
    torch.library.opcheck(ops.cached_scan.default, (*given, state, valid), test_utils=some)
    torch.library.opcheck(ops.linear_scan.default, tuple(given), test_utils=some)
    x = torch.randn(2, 4, 3)
    torch.library.opcheck(ops.cached_past.default, (x, torch.zeros(2, 4, 2), valid, 2), test_utils=some)
    torch.library.opcheck(ops.cached_sum.default, (x.sigmoid(), x, torch.zeros(2, 3), valid, 1), test_utils=some)
    torch.library.opcheck(ops.decayed_sum.default, (x.sigmoid(), x, 1), test_utils=some)
    torch.library.opcheck(ops.with_past.default, (x, 2, 1), test_utils=some)


def test_gradients() -> None:
    """What training differentiates: against the recurrence token by token, and numerically."""
    given = [None if t is None else t.requires_grad_() for t in scan_inputs(5, False, True)[:5]]
    assert torch.autograd.gradcheck(lambda *a: ops.linear_scan(*a), given)
    decay, x = (
        torch.rand(2, 5, dtype=torch.float64).requires_grad_(),
        torch.rand(2, 5, dtype=torch.float64).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda a, b: ops.decayed_sum(a, b, 1), (decay, x))


# ------------------------------------------------------------------------------------------------ recognition
class Carrying(Decoder):
    """Convolved queries, keys and values, and behind attention everything that is carried, in several spellings."""

    WINDOWS = (
        "depthwise",
        "dense",
        "padded_left",
        "zeros_in_front",
        "delayed",
        "token_shift",
        "zeros_like_the_first",
        "shifted_sum",
        "unfolded",
    )

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(96, 96, 4, padding=3, groups=96, bias=False)
        self.short = nn.Conv1d(32, 32, 4, padding=3, groups=32)
        self.wide = nn.Conv1d(32, 32, 3, dilation=2, groups=4)
        self.taps = nn.Parameter(torch.randn(3, 32))
        self.slow = False

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        mixed = self.before(self.qkv(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in mixed.chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        for name in [*self.WINDOWS, "retention", "scan"]:
            x = x + getattr(self, name)(F.rms_norm(x, (32,)))
        return self.head(x)

    def depthwise(self, x: Tensor) -> Tensor:
        """transformers' way: padded on both sides, cut."""
        return F.silu(self.short(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)

    def dense(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)

    def padded_left(self, x: Tensor) -> Tensor:
        return self.wide(F.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2)

    def zeros_in_front(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(x.shape[0], 1, x.shape[2]), x], 1)[:, :-1] * 0.5

    def delayed(self, x: Tensor) -> Tensor:
        """What stands in front is a projection of zeros, and of x only the shape counts there."""
        first = F.linear(x.new_zeros(x.shape[0], 1, 32), self.qkv.weight[:32])
        return torch.cat([first, F.linear(x, self.qkv.weight[:32])[:, :-1]], 1)

    def token_shift(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, 0))[:, :-1]

    def zeros_like_the_first(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) * self.taps[0] + x * self.taps[1]

    def shifted_sum(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 2, 0))
        return torch.stack([padded[:, i : i + x.shape[1]] * self.taps[i] for i in range(3)]).sum(0)

    def unfolded(self, x: Tensor) -> Tensor:
        return (F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1) * self.taps.T).sum(-1)

    def retention(self, x: Tensor) -> Tensor:
        """Linear attention with decays as a matrix over the sequence, padded on the right as those that work in chunks are, and
        scaled behind that."""
        length = x.shape[1]
        q, k, v = (F.pad(t.unflatten(-1, (4, 8)), (0, 0, 0, 0, 0, 1)) for t in self.qkv(x).chunk(3, -1))
        since = F.pad(-F.softplus(x[..., :4]), (0, 0, 0, 1)).cumsum(1).transpose(1, 2)
        later = torch.ones(length + 1, length + 1, dtype=torch.bool, device=x.device).triu(1)
        decay = (since[..., None] - since[:, :, None]).masked_fill(later, float("-inf")).exp()
        scores = torch.einsum("bihn,bjhn->bhij", q * 8**-0.5, k) * decay
        return torch.einsum("bhij,bjhp->bihp", scores, v)[:, :length].flatten(2)

    def scan(self, x: Tensor) -> Tensor:
        """torch's own scan, which without torch.compile does not run: `slow` for the loop that it stands for."""
        if not self.slow:
            from torch._higher_order_ops.associative_scan import associative_scan

            return associative_scan(combine, (x.sigmoid(), x), dim=1, combine_mode="generic")[1]
        sums, total = [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            total = x[:, t].sigmoid() * total + x[:, t]
            sums.append(total)
        return torch.stack(sums, 1)


def combine(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]


def test_what_is_carried() -> None:
    """Uneven calls, single tokens, two rows, one of them padded on the left, against the unmodified model."""
    plain = Carrying().eval()
    small = kvrewrite.transform(plain, "streaming_llm", budget=64, start=2, chunk=5, positions="original")
    plain.slow = True
    states = {s.name: tuple(s.shape) for s in small.program.layout.states}
    windows = [(96, 3), (32, 3), (32, 2), (32, 4), (1, 32), (1, 32), (1, 32), (1, 32), (2, 32), (2, 32)]
    expected_states = {f"past_{i}": shape for i, shape in enumerate(windows)}
    assert states == {**expected_states, "scan_0": (4, 8, 8), "sum_0": (32,)}
    text = ids(2, 23)
    expected = logits(plain, text)
    tolerance = 1e-5 * float(expected.abs().max())
    for widths in ((23,), (7, 1, 3, 12), (1,) * 23):
        cache, at, out = small.new_cache(2), 0, []
        for width in widths:
            out.append(small(text[:, at : at + width], past_key_values=cache).logits)
            at += width
        torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=tolerance)
    mask = torch.ones_like(text)
    mask[1, :6] = 0
    got = small(text, attention_mask=mask).logits
    torch.testing.assert_close(got[1:, 6:], logits(plain, text[1:, 6:]), rtol=0, atol=tolerance)


class Lightning(Decoder):
    """Linear attention whose heads decay by numbers of their own, as a loop over blocks of 8 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor([0.05, 0.1, 0.4, 0.8]))

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        rate, length = self.rate[:, None], x.shape[1]  # type: ignore[index]
        state, out = x.new_zeros(x.shape[0], 4, 8, 8), []
        for first in (8 * i for i in range((length + 7) // 8)):
            last = min(first + 8, length)
            qs, ks, vs = (t[:, :, first:last] for t in (q, k, v))
            at = torch.arange(1, 9, device=x.device)[: last - first]
            back = at[:, None] - at
            within = torch.where(back >= 0, torch.exp(-rate[..., None] * back), 0) * (qs @ ks.transpose(2, 3))
            out.append(within @ vs + (qs * torch.exp(-rate * at)[..., None]) @ state)
            left = torch.exp(-rate * (last - first - at))[..., None]
            state = state * torch.exp(-rate * (last - first))[..., None] + (ks * left).transpose(2, 3) @ vs
        return x + torch.cat(out, 2).transpose(1, 2).flatten(2)


def test_a_loop_over_blocks_is_carried_for_any_number_of_them() -> None:
    """The trace has three blocks; the text has six, and is longer than those."""
    plain = Lightning().eval()
    small = kvrewrite.transform(plain, "streaming_llm", budget=64, start=2, chunk=5, positions="original")
    assert small.program.max_positions is None
    assert [s.name for s in small.program.layout.states] == ["scan_0"]
    text = ids(2, 43)
    expected = logits(plain, text)
    cache = small.new_cache(2)
    out = [small(text[:, a:b], past_key_values=cache).logits for a, b in ((0, 21), (21, 22), (22, 43))]
    torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class Retentive(Decoder):
    """Linear attention in its parallel form, with a constant factor and powers of a number per head."""

    factor = 8**-0.5

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([0.75, 0.9, 0.95, 0.99]))
        self.gain = nn.Parameter(torch.tensor(1.0))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * self.factor

    def decays(self, since: Tensor) -> Tensor:
        return torch.where(since >= 0, self.gamma[:, None, None] ** since.clamp(min=0), 0.0)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(x.shape[1], device=x.device)
        return x + (self.scores(q, k) * self.decays(at[:, None] - at) @ v).transpose(1, 2).flatten(2)


class RetentiveExp(Retentive):
    """The decays as exponentials, and a factor."""

    def decays(self, since: Tensor) -> Tensor:
        return torch.where(since >= 0, torch.exp(-self.gamma[:, None, None] * since), 0.0)


class Undecayed(Retentive):
    """A causal mask alone, and a factor."""

    def decays(self, since: Tensor) -> Tensor:
        return since >= 0


class LearnedFactor(Retentive):
    """A factor that is one now."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * self.gain


@pytest.mark.parametrize("kind", [Retentive, RetentiveExp, Undecayed])
def test_a_constant_factor_and_learned_decays(kind: type[Retentive]) -> None:
    """In pieces as in one call, and still after the decays were changed."""
    plain = kind().eval()
    small = kvrewrite.transform(plain, "full", budget=64)
    text = ids(2, 21)
    for _ in range(2):
        expected = logits(plain, text)
        cache = small.new_cache(2)
        out = [small(text[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 10), (10, 21))]
        torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        with torch.no_grad():
            plain.gamma.mul_(0.8)


def test_a_learned_factor_is_no_constant() -> None:
    with pytest.raises(UnsupportedModelError, match="a weight is a factor of its results"):
        kvrewrite.inspect(LearnedFactor())


class LooksAhead(Decoder):
    """Linear attention in which tokens see the one that follows."""

    def mix(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (t.unflatten(-1, (4, 8)) for t in self.qkv(x).chunk(3, -1))
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(2)
        scores = torch.einsum("bihn,bjhn->bhij", q, k).masked_fill(later, 0)
        return x + torch.einsum("bhij,bjhp->bihp", scores, v).flatten(2)


class ConvolvesAhead(Decoder):
    """Padded on the left, and yet it sees the token that follows."""

    def mix(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 2, 0))
        return x + padded[:, : x.shape[1]] + torch.cat([padded[:, 3:], padded[:, :1]], 1)


class BeginsWithOnes(Decoder):
    """Tokens shifted within the sequence, and no zeros in front: a row that goes on would begin with others."""

    def mix(self, x: Tensor) -> Tensor:
        return x + torch.cat([x.new_ones(x.shape[0], 1, 32), x[:, :-1]], 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (LooksAhead, "none that queries, keys, values and decays among"),
        (ConvolvesAhead, "depend on more than the 2 tokens before"),
        (BeginsWithOnes, "none puts zeros before the sequence"),
    ],
)
def test_what_only_looks_like_it(model: type[Decoder], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        kvrewrite.inspect(model())


# ------------------------------------------------------------------------------------------------ a model of transformers
def hybrid(**options: Any) -> Any:
    """The tiny LFM2 with a convolution in its first layer and attention in its second."""
    return rewritten("lfm2", "streaming_llm", start=2, chunk=7, positions="original", **options)


def test_state_of_a_cache() -> None:
    """It is counted, forked, reordered and reset with the cache, and a cache that nothing went through has none."""
    small, plain, text = hybrid(budget=64), original("lfm2"), ids(2, 20)
    cache = small.new_cache(2)
    assert cache.memory().leased == 0
    small(text[:, :9], past_key_values=cache)
    (state,) = cache.states
    assert tuple(state.value.shape) == (2, 64, 2) and state.value.dtype == torch.float32
    pages = sum(lease.leased * lease.store.page_bytes for lease in cache.leases)
    assert cache.memory().leased == pages + 2 * 64 * 2 * 4
    carried = carried_bytes(small.program.layout)
    plan = plan_memory(small.sites, small.policy, 4, 9, 2, carried)
    assert plan.evicted == cache.memory().leased and plan.carried == 2 * 64 * 2 * 4
    bare = plan_memory(small.sites, small.policy, 4, 9, 2)
    assert all(getattr(plan, n) - getattr(bare, n) == plan.carried for n in ("full", "evicted", "peak"))
    twin = cache.fork()
    expected = logits(plain, text)
    for one in (cache, twin):
        got = small(text[:, 9:], past_key_values=one).logits
        torch.testing.assert_close(got, expected[:, 9:], rtol=0, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(small(text, past_key_values=cache).logits, expected, rtol=0, atol=1e-5)
    cache.reset()
    small(text[:, :9], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    got = small(text[[1, 1], 9:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[[1, 1], 9:], rtol=0, atol=1e-5)


def test_eviction_leaves_the_state_alone() -> None:
    """Token by token under eviction: the unmodified model, whose attention sees the sinks and the newest tokens only."""
    from transformers import AttentionInterface

    budget, start = 6, 2

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        at = torch.arange(q.shape[2])
        back = at[:, None] - at
        seen = (back >= 0) & ((at < start) | (back <= budget - start))
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    small, plain, text = hybrid(budget=budget), original("lfm2"), ids(2, 24)
    AttentionInterface.register("kvrewrite_tests_sinks", attention)
    before = plain.config._attn_implementation  # type: ignore[union-attr]
    plain.set_attn_implementation("kvrewrite_tests_sinks")  # type: ignore[operator]
    try:
        expected = logits(plain, text)
    finally:
        plain.set_attn_implementation(before)  # type: ignore[operator]
        AttentionInterface._global_mapping.pop("kvrewrite_tests_sinks")
    assert float((expected - logits(plain, text)).abs().max()) > 1e-3  # evicting makes a difference
    cache = small.new_cache(2)
    got = torch.cat([small(text[:, t : t + 1], past_key_values=cache).logits for t in range(24)], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert all(len(head) <= budget for rows in cache.positions().values() for heads in rows for head in heads)


def test_static_decoding() -> None:
    """Single tokens from static buffers: the state moves there and back, also for forks and a request in between."""
    plain, text = original("lfm2"), ids(2, 20)
    small = rewrite(plain, captured("lfm2"), "streaming_llm", None, budget=64, start=2, chunk=7, positions="original")
    expected = logits(plain, text)
    small.compile(backend="eager", static_decode=True)
    assert small.decoder is not None

    def steps(cache: Any, first: int, last: int) -> None:
        for t in range(first, last):
            got = small(text[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(got, expected[:, t : t + 1], rtol=0, atol=1e-5)

    cache, other = small.new_cache(2), small.new_cache(2)
    small(text[:, :6], past_key_values=cache)
    steps(cache, 6, 9)
    small(text[:, :4], past_key_values=other)
    steps(other, 4, 7)
    twin = cache.fork()
    steps(cache, 9, 11)
    got = small(text[:, 11:15], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, 11:15], rtol=0, atol=1e-5)
    steps(cache, 15, 20)
    steps(twin, 9, 12)
    cache.reset()
    small(text[:, :3], past_key_values=cache)
    steps(cache, 3, 6)


def test_saved_and_loaded(tmp_path: Any) -> None:
    small, text = hybrid(budget=64), ids(2, 20)
    original("lfm2").save_pretrained(tmp_path / "original")  # type: ignore[operator]
    small.save_pretrained(tmp_path / "out")
    loaded = kvrewrite.load(tmp_path / "out")
    torch.testing.assert_close(loaded(text).logits, small(text).logits, rtol=0, atol=0)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(text, **settings), original("lfm2").generate(text, **settings))  # type: ignore[operator]


@pytest.mark.thorough  # test_a_loop_over_blocks_is_carried_for_any_number_of_them is the same kind
@pytest.mark.parametrize("where", ["cpu", "meta", "parameters on meta"])
def test_a_loop_over_chunks_leaves_no_limit_wherever_parameters_lie(where: str) -> None:
    """What was a loop holds for all lengths once it is a scan: as well where a trace was made without weights, or on a GPU."""
    from kvrewrite.capture.fake_parameters import capture_on_meta
    from kvrewrite.passes.pipeline import canonical
    from tests.coverage import measure

    model: nn.Module = measure.make("qwen3_next")
    if where == "meta":
        model = model.to("meta")
    for module in model.modules() if where == "parameters on meta" else ():
        for name, value in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(value.detach().to("meta"), requires_grad=False))
    found = (capture_on_meta if where == "parameters on meta" else capture)(model)
    assert found.unrolled
    found.max_positions = 5000  # as where torch bounds the length that it unrolled the loop for
    canonical(found, check="off")
    assert found.max_positions is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:decoding is compiled, but not captured")
@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "jamba", "qwen3_next"])
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short convolutions, Mamba 2, Mamba and gated delta rules, captured there: op by op, and through Inductor with CUDA graphs
    of decode steps and of chunks, in uneven calls and with padding on the left, against the unmodified model."""
    from tests.coverage import configs, measure

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain: Any = measure.make(name).to(device)
    small = kvrewrite.transform(plain, "streaming_llm", budget=96, start=2, chunk=7, positions="original")
    text = torch.randint(3, configs.VOCAB, (2, 61), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(text)
    mask[1, :9] = 0
    expected, alone = logits(plain, text), logits(plain, text[1:, 9:])
    near: dict[str, Any] = {"rtol": 0, "atol": 1e-4 * float(expected.abs().max())}
    for compiled in (False, True):
        if compiled:
            small.compile(**({} if device == "cuda" else {"backend": "eager", "static_decode": True}))
        for _ in range(2):  # the second request replays what the first one captured
            cache, at, out = small.new_cache(2), 0, []
            for width in (44, 1, 1, 5, 1, 9):
                out.append(small(text[:, at : at + width], past_key_values=cache).logits)
                at += width
            torch.testing.assert_close(torch.cat(out, 1), expected, **near)
        cache = small.new_cache(2)
        last = small(text[:, :57], attention_mask=mask[:, :57], past_key_values=cache, logits_to_keep=1).logits
        torch.testing.assert_close(last, torch.stack([expected[0, 56:57], alone[0, 47:48]]), **near)
        for t in range(57, 61):
            got = small(text[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(got, torch.stack([expected[0, t : t + 1], alone[0, t - 9 : t - 8]]), **near)
    if device == "cuda" and not why_not_captured(small.graph_module):  # experts in fp32 look at the host
        assert small.decoder.captures and small.executor.prompt.captures
