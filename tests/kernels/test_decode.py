"""The decode kernels against the torch reference: attention of one token on a paged cache, and the update of the cache."""

from __future__ import annotations

import math

import pytest
import torch

import kvrewrite.ops  # noqa: F401
from kvrewrite.kernels import pages
from kvrewrite.kernels.attention import decode
from kvrewrite.kernels.groups import Cache as Written
from kvrewrite.kernels.groups import Eviction, NewTokens, Preceding, Rows
from kvrewrite.kernels.update.decode import decode_update as update
from kvrewrite.ops.dispatch import kernels
from kvrewrite.ops.linear import ACTIVATIONS
from kvrewrite.ops.rotary import rope
from tests.support.flat import flat

attend = flat(decode.decode_attention)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 64
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAN = float("nan")


def paged(dense: torch.Tensor, table: torch.Tensor, lens: torch.Tensor, count: int, dead: float) -> torch.Tensor:
    """A pool of `count` pages that holds dense (B, Hkv, C, ...) in its live slots and `dead` everywhere else."""
    pool = torch.full((count, PAGE, *dense.shape[3:]), dead, dtype=dense.dtype, device=dense.device)
    slot = torch.arange(dense.shape[2], device=dense.device)
    live = slot < lens[..., None]
    pages.write(pool, table, slot.expand(live.shape), dense, live)
    pool[0] = dead
    return pool


def page_table(lens: torch.Tensor, width: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """A table with the pages that `lens` need, in any order, and how many pages the pools must have."""
    b, hkv = lens.shape
    need = -(-lens // PAGE)
    column = torch.arange(width)
    used = column < need[..., None]
    table = torch.zeros(b, hkv, width, dtype=torch.int32)
    table[used] = 1 + torch.randperm(int(used.sum()), generator=generator).to(torch.int32)
    return table, 1 + int(used.sum())


class Case:
    """Arguments of decode_attention: random, with garbage wherever nothing may be read."""

    def __init__(
        self, lens, *, h=4, d=32, dv=None, width=None, dtype=torch.float32, valid=None, window=0, chunk=0, softcap=0.0,
        sinks=False, alibi=False, dense=False, spread=1, seed=0
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        lens = torch.tensor(lens, dtype=torch.int32)
        b, hkv = lens.shape
        dv = d if dv is None else dv
        width = max(1, -(-int(lens.max()) // PAGE)) if width is None else width
        c = width * PAGE

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        # The model's projections: (B, T, H * D), seen as (B, H, T, D).
        q = normal(b, 1, h * d).view(b, 1, h, d).transpose(1, 2)
        k = normal(b, 1, (hkv + 1) * d)[..., d:].view(b, 1, hkv, d).transpose(1, 2)
        v = normal(b, 1, hkv * dv).view(b, 1, hkv, dv).transpose(1, 2)
        table, count = page_table(lens, width, g)
        where = torch.rand(b, hkv, c, generator=g).argsort(-1) * spread
        places = torch.stack([where, where], dim=-1).to(torch.int32)
        keys, values = normal(b, hkv, c, d), normal(b, hkv, c, dv)
        dead = torch.arange(c) >= lens[..., None]
        keys[dead], values[dead] = NAN, NAN
        positions = torch.full((b, 1), c * spread) + torch.arange(b)[:, None]
        self.args = {
            "q": q, "k": k, "v": v, "k_dense": keys if dense else None, "v_dense": values if dense else None,
            "k_pages": paged(keys, table, lens, count, NAN), "v_pages": paged(values, table, lens, count, NAN),
            "pos_pages": paged(places, table, lens, count, 2**31 - 1), "table": table,
            # one layer of several, as the cache keeps lengths
            "lens": torch.stack([lens, lens + 7, lens - 3], dim=-1)[..., 0],
            "positions": positions,
            "valid": torch.ones(b, dtype=torch.int32) if valid is None else torch.tensor(valid, dtype=torch.int32),
            "sinks": torch.randn(h, generator=g) if sinks else None,
            "alibi": torch.rand(h, generator=g) * 0.1 if alibi else None,
        }  # fmt: skip
        self.options = {"scale": d**-0.5, "softcap": softcap, "window": window, "chunk": chunk}

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """out, LSE and mass of the reference, in float64."""
        a = {
            n: x.double() if x is not None and x.is_floating_point() and "pages" not in n else x
            for n, x in self.args.items()
        }
        a["k_pages"], a["v_pages"] = a["k_pages"].double(), a["v_pages"].double()
        out, lse = torch.ops.kvrewrite.cached_attention(
            a["q"], a["k"], a["v"], a["k_dense"], a["k_pages"], a["v_pages"], a["pos_pages"], a["table"], a["lens"],
            a["positions"], a["valid"], a["sinks"], a["alibi"], None, **self.options, v_dense=a["v_dense"],
        )  # fmt: skip
        rows = torch.ones(a["q"].shape[0], 1)
        mass = torch.ops.kvrewrite.observe(
            a["q"], a["k"], lse, rows, a["k_dense"], a["k_pages"], a["pos_pages"], a["table"], a["lens"], a["positions"],
            a["valid"], a["alibi"], None, **self.options,
        )  # fmt: skip
        return out, lse, mass

    def on_device(self) -> dict:
        """The arguments on DEVICE, with the strides they have here."""
        moved = {}
        for name, x in self.args.items():
            if x is None or DEVICE == "cpu":
                moved[name] = x
                continue
            there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
            moved[name] = there.copy_(x)
        return moved

    def run(self, launch: decode.Config, mass: bool = True) -> tuple:
        """The kernel's out, LSE and mass."""
        return attend(**self.on_device(), **self.options, mass=mass, launch=launch)

    def check(self, workers: int = 3, pages: int = 1, overlap: int = 0) -> None:
        """Compares with the reference, row by row; workers: how many a multiprocessor; pages: how many a step."""
        out, lse, mass = self.run(decode.Config(workers, 4, 3 if pages == 1 else 2, pages, overlap))
        ref_out, ref_lse, ref_mass = self.expected()
        dtype = self.args["q"].dtype
        real = self.args["valid"] > 0
        assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
        assert relative(out.cpu()[real], ref_out[real]) < TOLERANCE[dtype]
        assert (lse.cpu()[real] - ref_lse[real]).abs().max() < 20 * TOLERANCE[dtype] if real.any() else True
        assert relative(mass.cpu(), ref_mass) < TOLERANCE[dtype]
        assert (mass.cpu() == 0).logical_or(ref_mass > 0).all(), "slots that nobody sees get exactly 0"
        assert out.isfinite().all()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    found, expected = found.double(), expected.double()
    norm = expected.norm()
    return float((found - expected).norm() / norm) if norm > 0 else float(found.norm())


RAGGED = [[150, 1, 64, 0], [65, 200, 0, 63]]


@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_workers_share_ragged_heads(workers: int, pages: int) -> None:
    Case(RAGGED, h=8).check(workers, pages)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [1, 2])
def test_the_second_kernel_waits_for_the_first(overlap: int) -> None:
    case = Case([[1500, 100, 64, 9000]], h=16, d=128, dtype=torch.bfloat16)
    for workers in (1, 2, 3):
        for _ in range(10):
            case.check(workers, 1, overlap)


def test_worker_counts() -> None:
    # Equal heads are cut evenly: 132 multiprocessors, Llama-3.1-8B's 8 heads, 1, 8 and 32 rows.
    assert [decode.worker_count(264, 8 * b, 64, 1) for b in (1, 8, 32)] == [256, 256, 256]
    assert decode.worker_count(132, 8, 64, 1) == 128
    assert decode.worker_count(528, 8, 64, 2) == 256
    for limit in (1, 5, 132, 264):
        for n_heads in (1, 3, 8, 130, 200, 265, 600):
            for width in (1, 2, 63, 1000):
                count = decode.worker_count(limit, n_heads, width, 1 + width % 2)
                assert 1 <= count <= min(limit, n_heads * width)
    assert decode.worker_count(264, 1024, 1 << 20, 1) * 1024 << 20 < 2**31


@pytest.mark.parametrize("group", [1, 7, 16, 20])
def test_groups(group: int) -> None:
    Case([[150, 70]], h=2 * group, d=16).check()


@pytest.mark.parametrize(("d", "dv"), [(16, 16), (24, 24), (64, 64), (80, 80), (96, 96), (128, 128), (48, 32), (8, 8)])
def test_head_dims(d: int, dv: int) -> None:
    Case([[130, 70]], d=d, dv=dv).check()
    Case([[130, 70]], d=d, dv=dv, softcap=3.0).check(1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)])
def test_large_head_dims(d: int, dv: int, dtype: torch.dtype) -> None:
    case = Case([[1300, 70, 4000]], h=12, d=d, dv=dv, dtype=dtype)
    found = attend(**case.on_device(), **case.options)
    assert relative(found[0].cpu(), case.expected()[0]) < TOLERANCE[dtype]


def test_half_precision() -> None:
    Case(RAGGED, h=8, dtype=torch.float16).check()


@pytest.mark.parametrize(
    "options",
    [
        {"window": 40}, {"chunk": 100}, {"window": 90, "chunk": 64}, {"softcap": 2.0}, {"sinks": True}, {"alibi": True},
        {"dense": True}, {"spread": 3, "window": 20}, {"width": 9}, {"window": 1},
        {"softcap": 5.0, "sinks": True, "alibi": True, "window": 100, "dense": True, "width": 5},
    ],
)  # fmt: skip
def test_masks_and_logits(options: dict) -> None:
    Case(RAGGED, h=8, **options).check()
    if "window" in options or "chunk" in options:
        Case(RAGGED, h=8, **options).check(1, 2)


@pytest.mark.parametrize(("d", "dv"), [(16, 16), (96, 32)])
def test_rotates_queries_and_keys(d: int, dv: int) -> None:
    """As if both had been rotated before, also by tables that are parts of larger ones."""
    case = Case(RAGGED, h=8, d=d, dv=dv)
    g = torch.Generator().manual_seed(5)
    cos, sin = torch.randn(2, 3, d, generator=g)[:, 1:2].to(DEVICE), torch.randn(2, 1, d, generator=g).to(DEVICE)
    given = case.on_device()
    got = attend(**given, **case.options, mass=True, cos=cos, sin=sin)
    given["q"], given["k"] = rope(given["q"], cos, sin), rope(given["k"], cos, sin)
    expected = attend(**given, **case.options, mass=True)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one of cos and sin"):
        attend(**given, **case.options, cos=cos)
    with pytest.raises(ValueError, match="expected"):
        attend(**given, **case.options, cos=cos, sin=sin[..., :8])


@pytest.mark.parametrize(("d", "dv", "page_step"), [(16, 16, 1), (96, 32, 2)])
def test_rotates_cached_keys(d: int, dv: int, page_step: int) -> None:
    """As if they had been rotated before, by the second positions of their slots, moved to where the queries are."""
    case = Case(RAGGED, h=8, d=d, dv=dv, window=150)
    g = torch.Generator().manual_seed(6)
    given = case.on_device()
    following = given["positions"][:, 0] - torch.tensor([30, 20], device=DEVICE)
    ranks = torch.randint(30, int(given["positions"].min()), given["pos_pages"].shape[:2], generator=g).to(torch.int32)
    given["pos_pages"] = torch.stack([given["pos_pages"][..., 0], ranks.to(DEVICE)], dim=-1)
    tables = [torch.randn(int(given["positions"].max()), d, generator=g).to(DEVICE) for _ in range(2)]
    launch = decode.Config(3, 4, 2 if d == 16 else 1, page_step)  # fp32 keys and tables fill the shared memory
    turned = {"following": following, "key_cos": tables[0], "key_sin": tables[1]}
    got = attend(**given, **case.options, mass=True, launch=launch, **turned)
    with kernels("reference"):
        expected = torch.ops.kvrewrite.decode_attention(
            *given.values(), *case.options.values(), True, None, None, False, *turned.values()
        )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected contiguous key_cos and key_sin"):
        attend(**given, **case.options, **(turned | {"key_sin": None}))


def test_rows_without_a_new_token() -> None:
    Case(RAGGED, h=8, valid=[0, 1]).check()
    Case(RAGGED, h=8, valid=[1, 0], sinks=True).check(pages=2)
    Case(RAGGED, h=8, valid=[0, 0]).check()


def test_nothing_cached() -> None:
    Case([[0, 0]], width=2).check()
    Case([[1]], width=1).check()


def test_same_bits_twice() -> None:
    case = Case(RAGGED, h=8)
    first = case.run(decode.Config(3, 4, 3))
    for _ in range(2):
        again = case.run(decode.Config(3, 4, 3))
        assert all(torch.equal(x, y) for x, y in zip(first, again))
    without = case.run(decode.Config(3, 4, 3), mass=False)
    assert torch.equal(first[0], without[0]) and without[2] is None


def random_case(seed: int, most: int) -> Case:
    """A case of any shape."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):  # type: ignore[no-untyped-def]
        return values[int(torch.randint(len(values), (1,), generator=g))]

    b, hkv = pick(1, 2, 3), pick(1, 2, 3)
    lens = torch.randint(0, most, (b, hkv), generator=g).tolist()
    return Case(
        lens, h=hkv * pick(1, 2, 3, 4, 7), d=pick(16, 32, 40, 64), dv=pick(16, 32), window=pick(0, 0, 30, 500),
        chunk=pick(0, 0, 50), softcap=pick(0.0, 0.0, 3.0), sinks=pick(True, False), alibi=pick(True, False),
        dense=pick(True, False), width=-(-most // PAGE) + pick(0, 1), valid=[pick(0, 1, 1, 1) for _ in range(b)], seed=seed,
        dtype=torch.float32 if DEVICE == "cpu" else pick(torch.float32, torch.float16, torch.bfloat16),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed: int) -> None:
    random_case(seed, 200).check(1 + seed, 1 + seed % 2)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_random_shapes(seed: int) -> None:
    random_case(seed, 3000).check(1 + seed % 4, 1 + seed % 2)


@pytest.mark.gpu
def test_under_a_cuda_graph() -> None:
    case = Case([[1500, 100, 64, 900]], h=16, d=128, dtype=torch.bfloat16)
    a = case.on_device()
    eager = attend(**a, **case.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(**a, **case.options)
    a["lens"][0, 0] = 700
    for _ in range(3):
        graph.replay()
    eager = attend(**a, **case.options)
    assert torch.equal(eager[0], captured[0]) and torch.equal(eager[1], captured[1])


def test_refuses_what_it_does_not_do() -> None:
    case = Case([[5]])
    a = {**case.on_device(), "q": case.args["q"].double()}
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        attend(**a, **case.options)
    assert math.isclose(case.options["scale"], 32**-0.5)


# ------------------------------------------------------------------------------------------------ decode_update
class Cache:
    """A paged cache of `width` pages a head, filled with `lens` slots: pools, table and lens, as the update changes them."""

    def __init__(self, lens: list[list[int]], width: int, gap: int, seed: int, d: int = 16, dv: int = 8):
        g = torch.Generator().manual_seed(seed)
        held = torch.tensor(lens, dtype=torch.int32)
        b, hkv = held.shape
        c = width * PAGE
        self.table, count = page_table(torch.full((b, hkv), c), width, g)
        count += 1  # one that is nobody's
        order = torch.rand(b, hkv, c, generator=g).masked_fill(torch.arange(c) >= held[..., None], 2.0).argsort(-1)
        pos = torch.empty_like(order).scatter_(-1, order, torch.arange(c).expand_as(order) * gap)
        self.k_pages = paged(torch.randn(b, hkv, c, d, generator=g), self.table, held, count, NAN)
        self.v_pages = paged(torch.randn(b, hkv, c, dv, generator=g), self.table, held, count, NAN)
        self.score_pages = paged(torch.randn(b, hkv, c, generator=g), self.table, held, count, NAN)
        self.pos_pages = paged(torch.stack([pos, pos + 5], -1).to(torch.int32), self.table, held, count, -7)
        self.lens = torch.stack([held, held + 1], dim=-1)[..., 0]
        self.next = int(held.max()) * gap

    def state(self) -> tuple[torch.Tensor, ...]:
        """What the update takes, in its order."""
        return self.k_pages, self.v_pages, self.score_pages, self.pos_pages, self.table, self.lens

    def to(self, device: str) -> Cache:
        """A copy on a device."""
        twin = object.__new__(Cache)
        twin.__dict__.update({n: x.clone().to(device) if torch.is_tensor(x) else x for n, x in self.__dict__.items()})
        return twin

    def held(self) -> list[dict[int, tuple]]:
        """For each head, what every position holds: score, rotary position, key and value."""
        found = []
        k, v, s, p, table, lens = (x.cpu() for x in self.state())
        dense = [pages.read(x, table) for x in (k, v, s.nan_to_num(nan=1e30), p)]
        for b in range(table.shape[0]):
            for h in range(table.shape[1]):
                n = int(lens[b, h])
                rows = [x[b, h, :n].tolist() for x in dense]
                head = {p[0]: (s, p[1], k, v) for k, v, s, p in zip(*rows)}
                assert len(head) == n, "a position is held twice"
                found.append(head)
        return found

    def by_slot(self, of: torch.Tensor) -> torch.Tensor:
        """Values `of` (B, Hkv, positions), slot by slot; NaN in dead slots."""
        pos = pages.read(self.pos_pages, self.table)[..., 0].long()
        live = torch.arange(pos.shape[-1], device=pos.device) < self.lens[..., None]
        found = torch.gather(of.to(pos.device), -1, pos.clamp(min=0, max=of.shape[-1] - 1))
        return torch.where(live, found, NAN)


def run_updates(
    lens: list[list[int]], *, steps: int, keep, recent=0, sinks: int = 0, window: int = 0, chunk: int = 0, width: int = 3,
    gap: int = 1, slots: bool = False, select: bool = False, drops: float = 0.0, idle: float = 0.0, coarse: bool = False,
    nans: float = 0.0, ranks: bool = False, seed: int = 0
) -> list[int]:  # fmt: skip
    """Runs `steps` updates with the kernel and the reference; compares what is held after each. keep, recent: a number
    or a function of the step; coarse: few different scores; ranks: as `token_update` takes it. Returns the lengths at the end."""
    g = torch.Generator().manual_seed(1000 + seed)
    ref = Cache(lens, width, gap, seed)
    if ranks:
        now = torch.full((len(lens),), ref.next)
        torch.ops.kvrewrite.slot_rotary(ref.pos_pages, ref.table, ref.lens, now, torch.ones(len(lens)) > 0, None)
    mine = ref.to(DEVICE)
    b, hkv = ref.lens.shape
    untouched = mine.k_pages[0].clone(), mine.k_pages[-1].clone()
    positions = torch.full((b, 1), ref.next)
    for step in range(steps):

        def scores(*shape: int) -> torch.Tensor:
            found = torch.randint(-1, 2, shape, generator=g).float() if coarse else torch.randn(shape, generator=g)
            found = torch.where(found == 0, -0.0 if step % 2 else 0.0, found)  # noqa: B023
            return found.masked_fill(torch.rand(shape, generator=g) < nans, NAN)

        budget = keep(step) if callable(keep) else keep
        budget = torch.full((b, hkv), budget) if isinstance(budget, int) else torch.tensor(budget)
        k = torch.randn(b, 1, hkv, 16, generator=g).transpose(1, 2)
        v = torch.randn(b, 1, hkv, 8, generator=g).transpose(1, 2)
        new, table_of = scores(b, hkv, 1), scores(b, hkv, int(positions.max()) + 1)
        chosen_of, chosen_new = scores(b, hkv, int(positions.max()) + 1), scores(b, hkv, 1)
        valid = (torch.rand(b, generator=g) >= idle).to(torch.int32)
        drop = torch.rand(b, hkv, 1, generator=g) < drops if drops else None
        near = torch.full((b,), recent(step) if callable(recent) else recent, dtype=torch.int32)
        shared = (positions, positions + (0 if ranks else 5), valid, budget.to(torch.int32), near)

        def arguments(cache: Cache) -> tuple:
            of_slots = cache.by_slot(table_of) if slots else None  # noqa: B023
            by = torch.cat([cache.by_slot(chosen_of), chosen_new.to(cache.table.device)], -1) if select else None  # noqa: B023
            return of_slots, by

        of_slots, by = arguments(ref)
        torch.ops.kvrewrite.cache_update(
            k, v, new, of_slots, *shared, *ref.state(), sinks, window, chunk, by, drop, None, None, None, None
        )
        if ranks:  # all anew
            following = torch.where(valid > 0, positions[:, 0] + 1, 0)
            torch.ops.kvrewrite.slot_rotary(ref.pos_pages, ref.table, ref.lens, following, valid > 0, None)
        of_slots, by = arguments(mine)
        added = NewTokens(k.to(DEVICE), v.to(DEVICE), new.to(DEVICE), of_slots)
        eviction = Eviction(sinks, window, chunk, by, None if drop is None else drop.to(DEVICE))
        rows = Rows(*(x.to(DEVICE) for x in shared))
        update(added, rows, Written(*mine.state()), eviction, ranks=ranks)
        assert mine.lens.tolist() == ref.lens.tolist(), step
        for head, (found, expected) in enumerate(zip(mine.held(), ref.held())):
            assert sorted(found) == sorted(expected), (step, head)
            assert found == expected, (step, head)
        positions = positions + gap * valid[:, None]
    assert torch.equal(mine.k_pages[0].nan_to_num(), untouched[0].nan_to_num())
    assert torch.equal(mine.k_pages[-1].nan_to_num(), untouched[1].nan_to_num())
    return mine.lens.flatten().tolist()


UNLIMITED = 2**31 - 1


def test_appends_past_page_borders() -> None:
    assert run_updates([[60, 0], [127, 63]], steps=5, keep=UNLIMITED) == [65, 5, 132, 68]
    run_updates([[60, 0], [127, 63]], steps=3, keep=UNLIMITED, slots=True, idle=0.3)


@pytest.mark.parametrize("slots", [False, True])
def test_newcomers_replace_the_least(slots: bool) -> None:
    assert run_updates([[60, 5], [64, 66]], steps=8, keep=[[66, 9], [64, 66]], slots=slots) == [66, 9, 64, 66]


def test_sinks_and_recent_are_protected() -> None:
    run_updates([[25, 30]], steps=8, keep=30, sinks=4, recent=10)
    run_updates([[20, 30]], steps=5, keep=30, sinks=4, recent=30)
    run_updates([[8, 10]], steps=3, keep=8, sinks=4, recent=6)
    run_updates([[10, 9]], steps=3, keep=5, sinks=8, recent=UNLIMITED)
    run_updates([[30, 29]], steps=3, keep=30, gap=3, sinks=7, recent=10, coarse=True)


def test_equal_and_nan_scores() -> None:
    run_updates([[40, 64]], steps=8, keep=[[40, 64]], coarse=True)
    run_updates([[40, 60]], steps=8, keep=[[40, 60]], coarse=True, nans=0.3, recent=5)
    run_updates([[40, 64]], steps=4, keep=[[40, 64]], nans=1.0, sinks=2)


def test_windows_and_chunks() -> None:
    run_updates([[20, 10]], steps=9, keep=UNLIMITED, window=25)
    run_updates([[20, 20]], steps=8, keep=20, window=25, sinks=3, recent=4)
    run_updates([[30, 10]], steps=12, keep=UNLIMITED, chunk=20)
    run_updates([[12, 10]], steps=5, keep=12, chunk=16, window=10, recent=3)
    run_updates([[3, 1]], steps=4, keep=UNLIMITED, window=1)
    run_updates([[70, 90]], steps=2, keep=UNLIMITED, window=40, gap=2)


def test_a_budget_that_shrinks() -> None:
    run_updates([[150, 60]], steps=3, keep=lambda step: [70, 40, 0][step], sinks=2, recent=8)
    run_updates([[90, 70]], steps=2, keep=lambda step: 88 - 2 * step, slots=True, coarse=True)


def test_drops_and_selection() -> None:
    run_updates([[48, 50]], steps=8, keep=50, drops=0.5, sinks=2)
    run_updates([[40, 60]], steps=8, keep=[[40, 60]], select=True, drops=0.3, slots=True)
    run_updates([[40, 42]], steps=6, keep=42, select=True, recent=3)
    run_updates([[24, 24]], steps=8, keep=UNLIMITED, window=25, drops=0.5)


@pytest.mark.parametrize(("width", "activation"), [(24, "silu"), (16, "gelu_tanh")])
def test_makes_scores_and_rotates(width: int, activation: str) -> None:
    """As the scores of a retaining head and a rotated key, made before."""
    g = torch.Generator().manual_seed(2)
    caches = [Cache([[40, 64], [30, 64]], 3, 1, 0).to(DEVICE) for _ in range(2)]
    for step in range(4):
        k, v = (torch.randn(2, 1, 2, n, generator=g).transpose(1, 2).to(DEVICE) for n in (16, 8))
        hidden = torch.randn(2, 1, width + 3, generator=g).to(DEVICE)[..., 3:]
        head = torch.randn(2, width, generator=g).to(DEVICE)
        cos, sin = (torch.randn(2, 1, 16, generator=g).to(DEVICE) for _ in range(2))
        scores = (ACTIVATIONS[activation](hidden) @ head.T).transpose(1, 2)
        now = torch.full((2, 1), caches[0].next + step)
        rows = (now, now, torch.ones(2), torch.full((2, 2), 64), torch.full((2,), 3))
        shared = [x.to(DEVICE, torch.int64 if x is now else torch.int32) for x in rows]
        eviction = Eviction(protected_first=1)
        first, second = (cache.state() for cache in caches)
        update(NewTokens(rope(k, cos, sin), v, scores), Rows(*shared), Written(*first), eviction)
        preceding = Preceding(head, activation, cos, sin)
        update(NewTokens(k, v, hidden), Rows(*shared), Written(*second), eviction, preceding)
        for a, b in zip(first, second):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match="hidden layer and head"):
        update(NewTokens(k, v, scores), Rows(*shared), Written(*second), eviction, Preceding(head))


def test_ranks_follow_what_goes() -> None:
    """One goes, none does, the newcomer does, several do at once, and with a newcomer that is dropped."""
    run_updates([[20, 66]], steps=3, keep=[[22, 66]], ranks=True, recent=3, sinks=2)
    run_updates([[30, 20]], steps=3, keep=lambda step: 30 - 5 * (step % 3), ranks=True, drops=0.4)
    run_updates([[30], [10]], steps=4, keep=20, window=25, chunk=22, ranks=True, drops=0.3, slots=True, idle=0.2)


def test_idle_rows_keep_everything() -> None:
    run_updates([[30, 29], [30, 20]], steps=6, keep=30, idle=0.5, window=60, slots=True)


def test_recent_slots_with_gaps() -> None:
    run_updates([[50, 49]], steps=6, keep=50, recent=lambda step: 5 * step, drops=0.4)


def random_updates(seed: int, most: int, steps: int) -> None:
    """Updates of any kind."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):  # type: ignore[no-untyped-def]
        return values[int(torch.randint(len(values), (1,), generator=g))]

    b, hkv = pick(1, 2), pick(1, 3)
    lens = torch.randint(0, most, (b, hkv), generator=g).tolist()
    keep = torch.randint(1, most, (b, hkv), generator=g).tolist()
    run_updates(
        lens, steps=steps, keep=pick(keep, UNLIMITED), recent=pick(0, 3, most // 3, UNLIMITED), sinks=pick(0, 4),
        window=pick(0, 0, most // 2), chunk=pick(0, 0, most // 3), width=-(-(most + steps) // PAGE), gap=(gap := pick(1, 1, 2)),
        slots=pick(True, False), select=pick(True, False), drops=pick(0.0, 0.4), idle=pick(0.0, 0.4),
        coarse=pick(True, False), nans=pick(0.0, 0.2), ranks=gap == 1 and seed % 3 == 0, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_random_updates(seed: int) -> None:
    random_updates(seed, 100, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_random_updates(seed: int) -> None:
    random_updates(seed, (300, 1500, 9000)[seed % 3], 6)
