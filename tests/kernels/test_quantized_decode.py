"""The decode kernels of quantized caches against the torch reference: attention of one token, and the update of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvrewrite.ops  # noqa: F401
from kvrewrite.kernels.attention.decode import Config
from kvrewrite.kernels.groups import Codes, QuantizedCache
from kvrewrite.kernels.quantized import decode
from kvrewrite.kernels.quantized.scheme import KINDS, Scheme, quantize_keys, quantize_values
from kvrewrite.kernels.quantized.tiles import tiles
from kvrewrite.kernels.quantized.update import decode_update_quantized
from tests.kernels.test_decode import DEVICE, NAN, PAGE, TOLERANCE, page_table, paged, relative
from tests.support.flat import flat


class Case:
    """Arguments of decode_attention_quantized: random, with garbage wherever nothing may be read. tail: slots of each head in
    full precision, or as many as there are."""

    def __init__(
        self, lens, *, kind="int8", group=32, residual=64, tail=None, h=4, d=32, dv=None, width=None,
        dtype=torch.float32, valid=None, window=0, chunk=0, softcap=0.0, sinks=False, alibi=False, spread=1, seed=0,
        offset=0.0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.scheme = Scheme(kind, group)
        lens = torch.tensor(lens, dtype=torch.int32)
        b, hkv = lens.shape
        dv = d if dv is None else dv
        width = max(1, -(-int(lens.max()) // PAGE)) if width is None else width
        c = width * PAGE
        most = torch.randint(0, residual + group, (b, hkv), generator=g) if tail is None else torch.tensor(tail)
        qlens = (lens - most).clamp(min=0).to(torch.int32)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        q = normal(b, 1, h * d).view(b, 1, h, d).transpose(1, 2)
        k = normal(b, 1, (hkv + 1) * d)[..., d:].view(b, 1, hkv, d).transpose(1, 2)
        v = normal(b, 1, hkv * dv).view(b, 1, hkv, dv).transpose(1, 2)
        table, count = page_table(lens, width, g)
        where = torch.rand(b, hkv, c, generator=g).argsort(-1) * spread
        keys, values = normal(b, hkv, c, d) + offset * torch.randn(d, generator=g).to(dtype), normal(b, hkv, c, dv)
        slot = torch.arange(c)
        coded = slot < qlens[..., None]
        pools: dict[str, torch.Tensor] = {}
        grouped = coded.unflatten(2, (-1, group)).any(-1)
        for name, x, live in (("k", keys, grouped), ("v", values, coded)):
            codes, params = (quantize_keys if name == "k" else quantize_values)(x, coded, self.scheme)
            # 255 is NaN in fp8.
            codes[~coded] = 255
            params[~live] = NAN
            pool = torch.full((count, PAGE, codes.shape[-1]), 255, dtype=torch.uint8)
            pool[table.long()] = codes.unflatten(2, (width, PAGE))
            pool[0] = 255
            ends = torch.full((count, params.shape[2] // width, *params.shape[3:]), NAN, dtype=dtype)
            ends[table.long()] = params.unflatten(2, (width, -1))
            ends[0] = NAN
            entry = torch.arange(residual + group)
            at = (qlens[..., None] + entry).clamp(max=c - 1).long()[..., None].expand(-1, -1, -1, x.shape[-1])
            newest = torch.where((entry < (lens - qlens)[..., None])[..., None], torch.gather(x, 2, at), NAN)
            pools.update({f"{name}_pages": pool, f"{name}_params": ends, f"{name}_tail": newest.contiguous()})
        places = torch.stack([where, where], dim=-1).to(torch.int32)
        self.args = {
            "q": q, "k": k, "v": v,
            **{n: pools[n] for n in ("k_pages", "v_pages", "k_params", "v_params", "k_tail", "v_tail")},
            "pos_pages": paged(places, table, lens, count, 2**31 - 1), "table": table,
            # one layer of several, as the cache keeps lengths
            "lens": torch.stack([lens, lens + 7, lens - 3], dim=-1)[..., 0],
            "qlens": qlens, "positions": torch.full((b, 1), c * spread) + torch.arange(b)[:, None],
            "valid": torch.ones(b, dtype=torch.int32) if valid is None else torch.tensor(valid, dtype=torch.int32),
            "sinks": torch.randn(h, generator=g) if sinks else None,
            "alibi": torch.rand(h, generator=g) * 0.1 if alibi else None,
        }  # fmt: skip
        self.options = {"scale": d**-0.5, "softcap": softcap, "window": window, "chunk": chunk}

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """out, LSE and mass of the reference, in float64 from the codes on."""
        a: dict[str, Any] = {
            n: x.double() if x is not None and x.is_floating_point() else x for n, x in self.args.items()
        }
        return torch.ops.kvrewrite.decode_attention_quantized(
            *a.values(), self.scheme.kind, self.scheme.group, *self.options.values(), True
        )

    def on_device(self) -> dict[str, Any]:
        """The arguments on DEVICE, with the strides they have here."""
        moved: dict[str, Any] = {}
        for name, x in self.args.items():
            if x is None or DEVICE == "cpu":
                moved[name] = x
                continue
            there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
            moved[name] = there.copy_(x)
        return moved

    def run(self, per_sm: int = 3, mass: bool = True, warps: int = 4, stages: int = 3, pages: int = 1) -> tuple:
        """The kernel's out, LSE and mass."""
        launch = Config(per_sm, warps, stages, pages)
        return decode_attention_quantized(
            **self.on_device(), scheme=self.scheme, **self.options, mass=mass, launch=launch
        )

    def check(self, per_sm: int = 3, **launch: int) -> None:
        """Compares with the reference, row by row; per_sm: workers of a multiprocessor."""
        out, lse, mass = self.run(per_sm, **launch)
        ref_out, ref_lse, ref_mass = self.expected()
        dtype = self.args["q"].dtype
        # fp16 models, too, are computed with products of bf16 numbers.
        limit = TOLERANCE[torch.bfloat16 if dtype == torch.float16 else dtype]
        real = self.args["valid"] > 0
        assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
        assert relative(out.cpu()[real], ref_out[real]) < limit
        assert (lse.cpu()[real] - ref_lse[real]).abs().max() < 20 * limit if real.any() else True
        assert relative(mass.cpu(), ref_mass) < limit
        assert (mass.cpu() == 0).logical_or(ref_mass > 0).all(), "slots that nobody sees get exactly 0"
        assert out.isfinite().all()


@pytest.mark.parametrize(("kind", "workers"), [("int8", 1), ("int4", 3), ("fp8", 2)])
def test_workers_share_ragged_heads(kind: str, workers: int) -> None:
    """Twice, with the same bits; mass or not."""
    case = Case([[150, 1, 64, 0]], kind=kind)
    case.check(workers)
    first, again = case.run(workers), case.run(workers, mass=False)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and again[2] is None


@pytest.mark.parametrize(("kind", "group", "heads"), [("int8", 16, 1), ("int4", 64, 7), ("fp8", 64, 9)])
def test_groups(kind: str, group: int, heads: int) -> None:
    """Of slots and of heads."""
    Case([[150, 70]], kind=kind, group=group, h=2 * heads, d=16).check(1)


@pytest.mark.parametrize(("d", "dv", "kind"), [(16, 24, "int8"), (80, 96, "int4"), (40, 136, "int8"), (96, 80, "fp8")])
def test_head_dims(d: int, dv: int, kind: str) -> None:
    Case([[130, 70]], kind=kind, d=d, dv=dv).check(1)


@pytest.mark.parametrize(("d", "dv", "kind"), [(17, 16, "int8"), (32, 27, "fp8"), (18, 16, "int4")])
def test_codes_that_are_not_whole_words(d: int, dv: int, kind: str) -> None:
    """Two bytes are loaded as one number; of odd widths each is one."""
    assert tiles(Scheme(kind), d, dv, 2).word == 1
    Case([[130, 70]], kind=kind, d=d, dv=dv).check(1)


def test_more_query_heads_than_a_worker_takes() -> None:
    case = Case([[90]], kind="int4", tail=[[20]], h=40, d=64)
    assert tiles(case.scheme, 64, 64, 40).heads == 32
    case.check(1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_groups_of_keys_at_a_time(kind: str) -> None:
    """The last pair may have one group, or a part of one."""
    Case([[150, 96, 70]], kind=kind, h=3, tail=[[0, 0, 6]], spread=2, window=100).check(1, pages=2)
    Case([[100, 33]], kind=kind, group=16, softcap=2.0, alibi=True).check(2, pages=2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)])
def test_large_head_dims(d: int, dv: int, dtype: torch.dtype, kind: str) -> None:
    case = Case([[1300, 70, 4000]], kind=kind, h=12, d=d, dv=dv, dtype=dtype)
    found = decode_attention_quantized(**case.on_device(), scheme=case.scheme, **case.options)
    limit = TOLERANCE[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    assert relative(found[0].cpu(), case.expected()[0]) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_keys_far_from_zero(kind: str) -> None:
    """In some channels; on a GPU in half precision, which the interpreter does not multiply in bf16."""
    for dtype in (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
        Case([[150, 64]], kind=kind, dtype=dtype, offset=4.0).check()


@pytest.mark.parametrize(
    "options",
    [
        {"spread": 3, "window": 20}, {"window": 1, "chunk": 100, "softcap": 2.0, "kind": "fp8"}, {"alibi": True, "width": 9},
        {"kind": "int4", "softcap": 5.0, "sinks": True, "alibi": True, "window": 100, "width": 5},
    ],
)  # fmt: skip
def test_masks_and_logits(options: dict) -> None:
    Case([[150, 1, 64, 0]], h=8, **options).check(1)


def test_what_is_quantized_may_end_anywhere() -> None:
    """Heads without a tail, with nothing but a tail, and borders inside a page and a group."""
    Case([[100, 90, 128, 64]], tail=[[0, 90, 64, 1]]).check()
    Case([[100, 65, 33, 1]], tail=[[37, 33, 1, 0]]).check(1)


def test_rows_without_a_new_token() -> None:
    Case([[70, 0], [5, 66]], valid=[0, 1], sinks=True).check(1)
    Case([[70, 0], [5, 66]], valid=[0, 0]).check(1)


def test_nothing_cached() -> None:
    Case([[0, 0]], width=2).check()
    Case([[1]], tail=[[1]], width=1).check()


def random_case(seed: int, most: int) -> Case:
    """A case of any shape."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):  # type: ignore[no-untyped-def]
        return values[int(torch.randint(len(values), (1,), generator=g))]

    b, hkv = pick(1, 2, 3), pick(1, 2, 3)
    lens = torch.randint(0, most, (b, hkv), generator=g).tolist()
    group = pick(16, 32, 64)
    return Case(
        lens, kind=pick(*KINDS), group=group, residual=group * pick(0, 1, 4), h=hkv * pick(1, 2, 3, 4, 7),
        d=pick(16, 32, 40, 64), dv=pick(16, 32), window=pick(0, 0, 30, 500), chunk=pick(0, 0, 50),
        softcap=pick(0.0, 0.0, 3.0), sinks=pick(True, False), alibi=pick(True, False),
        width=-(-most // PAGE) + pick(0, 1), valid=[pick(0, 1, 1, 1) for _ in range(b)], seed=seed,
        dtype=torch.float32 if DEVICE == "cpu" else pick(torch.float32, torch.float16, torch.bfloat16),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_random_shapes(seed: int) -> None:
    random_case(seed, 150).check(1 + seed)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_random_shapes(seed: int) -> None:
    random_case(seed, 3000).check(1 + seed % 4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_cuda_graph(kind: str) -> None:
    case = Case([[1500, 100, 64, 900]], kind=kind, h=16, d=128, dtype=torch.bfloat16)
    a = case.on_device()

    def attend() -> tuple:
        return decode_attention_quantized(**a, scheme=case.scheme, **case.options)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    a["lens"][0, 0] -= 1
    for _ in range(3):
        graph.replay()
    eager = attend()
    assert torch.equal(eager[0], captured[0]) and torch.equal(eager[1], captured[1])


def test_refuses_what_it_does_not_do() -> None:
    case = Case([[5]])
    a = case.on_device()

    def attend(scheme: Scheme = case.scheme, **changed: torch.Tensor) -> None:
        decode_attention_quantized(**a | changed, scheme=scheme, **case.options)

    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        attend(q=a["q"].double())
    with pytest.raises(ValueError, match="16, 32 or 64 slots, not of 8"):
        attend(Scheme("int8", 8))
    with pytest.raises(ValueError, match=r"k_tail is .* expected"):
        attend(k_tail=a["k_tail"].half())


# -------------------------------------------------------------------------------------------- decode_update_quantized
class Cache:
    """A quantized cache of `width` pages a head with nothing in it but garbage, and how tokens come in."""

    def __init__(
        self, scheme: Scheme, residual: int, b: int, hkv: int, width: int, d: int, dv: int, dtype: torch.dtype, seed: int
    ):  # fmt: skip
        self.scheme, self.d, self.dv, self.dtype = scheme, d, dv, dtype
        self.generator = torch.Generator().manual_seed(seed)
        total, tail, p = 2 + b * hkv * width, residual + scheme.group, scheme.parameters
        self.table = (1 + torch.randperm(total - 2, generator=self.generator)).to(torch.int32).view(b, hkv, width)
        self.k_pages = torch.full((total, PAGE, scheme.code_width(d)), 255, dtype=torch.uint8)
        self.v_pages = torch.full((total, PAGE, scheme.code_width(dv)), 255, dtype=torch.uint8)
        self.k_params = torch.full((total, PAGE // scheme.group, d, p), NAN, dtype=dtype)
        self.v_params = torch.full((total, PAGE, dv // scheme.value_group(dv), p), NAN, dtype=dtype)
        self.score_pages = torch.full((total, PAGE), NAN)
        self.pos_pages = torch.full((total, PAGE, 2), -7, dtype=torch.int32)
        self.k_tail = torch.full((b, hkv, tail, d), NAN, dtype=dtype)
        self.v_tail = torch.full((b, hkv, tail, dv), NAN, dtype=dtype)
        self.lens, self.qlens = (torch.zeros(b, hkv, dtype=torch.int32) for _ in range(2))
        self.seen = 0

    def to(self, device: str) -> Cache:
        """A copy on a device."""
        twin = object.__new__(Cache)
        twin.__dict__.update({n: x.clone().to(device) if torch.is_tensor(x) else x for n, x in self.__dict__.items()})
        return twin

    def tokens(self, t: int) -> dict[str, Any]:
        """What t random tokens bring along; some keys lie beyond all before."""
        b, hkv, g = *self.lens.shape, self.generator
        k = torch.randn(b, hkv, t, self.d, generator=g) * 2.0 ** torch.randint(-3, 3, (b, hkv, t, 1), generator=g)
        v = torch.randn(b, hkv, t, self.dv, generator=g)
        positions = self.seen + torch.arange(t).expand(b, t)
        # Few different scores, so that some are equal.
        scores = torch.randint(0, 40, (b, hkv, t), generator=g).float()
        return {
            "k": k.to(self.dtype), "v": v.to(self.dtype), "new_scores": scores, "slot_scores": None,
            "positions": positions.contiguous(), "rotary": positions + 5,
            "valid": torch.full((b,), t, dtype=torch.int32),
        }  # fmt: skip

    def update(self, new: dict[str, Any], keep: torch.Tensor, recent: int, more: dict[str, Any], kernel: bool) -> None:
        """By the kernel, or by the reference."""
        device = self.table.device
        new = {n: x.to(device) if torch.is_tensor(x) else x for n, x in new.items()}
        more = {n: x.to(device) if torch.is_tensor(x) else x for n, x in more.items()}
        near = torch.full((self.lens.shape[0],), recent, dtype=torch.int32, device=device)
        pools = (self.k_pages, self.v_pages, self.k_params, self.v_params, self.score_pages, self.pos_pages)
        where = (self.k_tail, self.v_tail, self.table, self.lens, self.qlens)
        if kernel:
            stored = {n: getattr(self, n) for n in (*Codes._fields, *QuantizedCache._fields[:5])}
            rows = {**new, "keep": keep.to(device), "recent": near}
            flat(decode_update_quantized)(**rows, **stored, scheme=self.scheme, protected_first=2, **more)
        else:
            options = {"window": 0, "chunk": 0, "select": None, "drop": None, **more}
            torch.ops.kvrewrite.cache_update_quantized(
                *new.values(), keep.to(device), near, None, None, *pools, *where, self.scheme.kind, self.scheme.group, 2,
                *(options[n] for n in ("window", "chunk", "select", "drop")), None, None, None, None,
            )  # fmt: skip
        self.seen += new["k"].shape[2]

    def held(self) -> dict[str, torch.Tensor]:
        """Everything that means something; -1 elsewhere."""
        c = self.to("cpu")
        slot = torch.arange(c.table.shape[2] * PAGE)
        live, coded = slot < c.lens[..., None], slot < c.qlens[..., None]
        grouped = coded.unflatten(2, (-1, c.scheme.group)).any(-1)
        entry = torch.arange(c.k_tail.shape[2]) < (c.lens - c.qlens)[..., None]
        found = {"lens": c.lens, "qlens": c.qlens}
        for name, there in (
            ("score_pages", live), ("pos_pages", live), ("k_pages", coded), ("v_pages", coded), ("v_params", coded),
            ("k_params", grouped),
        ):  # fmt: skip
            x = getattr(c, name)[c.table.long()].flatten(2, 3)
            found[name] = torch.where(there.view(*there.shape, *(1,) * (x.dim() - 3)), x.float(), -1)
        for name in ("k_tail", "v_tail"):
            found[name] = torch.where(entry[..., None], getattr(c, name).float(), -1)
        return found


decode_attention_quantized = flat(decode.decode_attention_quantized)
UPDATES = [("int8", 0, torch.float16), ("int4", 16, torch.float32), ("fp8", 16, torch.float16)]


def run_updates(
    kind: str, group: int, residual: int, dtype: torch.dtype, seed: int, steps: int, d: int = 32, dv: int = 24,
    width: int = 3, b: int = 2, device: str = DEVICE,
) -> None:  # fmt: skip
    """A prompt and single tokens: what is stored is bit for bit what the reference stores."""
    g = torch.Generator().manual_seed(1000 + seed)

    def pick(*values):  # type: ignore[no-untyped-def]
        return values[int(torch.randint(len(values), (1,), generator=g))]

    hkv = 2
    ours = Cache(Scheme(kind, group), residual, b, hkv, width, d, dv, dtype, seed)
    room = width * PAGE
    first = pick(room // 3, room - 20)
    budget = torch.randint(max(4, room // 3), room, (b, hkv), generator=g).to(torch.int32)
    ours.update(ours.tokens(first), budget, 3, {}, False)
    slow, fast = ours, ours.to(device)
    options: dict[str, Any] = {"window": pick(0, 0, 0, room // 2), "chunk": pick(0, 0, 0, room // 2)}
    quantized = 0
    by_slots, selects = pick(False, True), pick(False, False, True)
    for step in range(steps):
        new, more = slow.tokens(1), dict(options)
        keep = (budget - pick(0, 0, 0, 0, 5, 40)).clamp(min=3).to(torch.int32)
        if step % 7 == 5:
            new["valid"][-1] = 0
        if by_slots:
            new["slot_scores"] = torch.randint(0, 40, (b, hkv, room), generator=g).float()
        if selects:
            more["select"] = torch.randint(0, 40, (b, hkv, room + 1), generator=g).float()
        if step % 5 == 4:
            more["drop"] = torch.rand(b, hkv, 1, generator=g) < 0.5
        recent = pick(0, 3, 3, 30)
        slow.update(new, keep, recent, more, False)
        fast.update(new, keep, recent, more, True)
        got = fast.held()
        for name, expected in slow.held().items():
            assert torch.equal(got[name], expected), f"{name} at step {step}"
        quantized = max(quantized, int(slow.qlens.max()))
    assert quantized > 0


@pytest.mark.parametrize(("kind", "residual", "dtype"), UPDATES)
def test_updates(kind: str, residual: int, dtype: torch.dtype) -> None:
    run_updates(kind, 16, residual, dtype, 10 + len(kind), 7, 16, 24, 2, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_many_updates(kind: str, seed: int) -> None:
    group, dtype = (16, 32, 64)[seed % 3], (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    d, dv = ((80, 256), (128, 128), (64, 96))[seed % 3]
    run_updates(kind, group, group * (0, 1, 2)[seed // 2], dtype, seed, 60, d, dv, 4 + 4 * (seed % 2))
