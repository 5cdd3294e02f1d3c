"""Every op that has a kernel, at any head dims, against fp64: errors, and how large they may be.

`sweep` draws a layer's tokens and cache (what is not live is NaN), runs each op with its kernel and compares. How large an error
may be is derived from the dtype: FACTOR times that of the torch reference in the same dtype, or of one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvrewrite.ops  # noqa: F401
from kvrewrite.errors import OptionError
from kvrewrite.kernels import pages
from kvrewrite.kernels.quantized.scheme import KINDS, Scheme
from kvrewrite.ops.dispatch import kernels
from tests.kernels.test_decode import PAGE, page_table, paged
from tests.kernels.test_quantized_decode import Cache as QuantizedCache
from tests.kernels.test_quantized_decode import Case as QuantizedCase

ops = torch.ops.kvrewrite
NAN = float("nan")
DIMS = (1, 17, 100, *range(8, 257, 8))
UNEQUAL = ((17, 40), (24, 40), (40, 24), (100, 64), (136, 72), (192, 128), (256, 8))  # of keys and values
FACTOR = 4.0
# One rounding. In fp32 that of a GPU's exponential, which is right to 2 units and is multiplied by sums of such.
SMALLEST = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
PLAIN = {"softcap": 0.0, "window": 0, "chunk": 0}


@dataclass(frozen=True)
class Shape:
    """New tokens, of which each row has `valid`, and what its kv heads hold in the cache."""

    name: str
    tokens: int
    valid: tuple[int, int]
    lens: tuple[tuple[int, int], tuple[int, int]]


SHAPES = (
    Shape("prompt", 150, (150, 97), ((0, 0), (0, 0))),
    Shape("chunk", 70, (70, 66), ((128, 77), (1, 65))),
    Shape("token", 1, (1, 1), ((128, 77), (1, 65))),
)
SMALL_SHAPES = (  # for the interpreter
    Shape("chunk", 18, (18, 13), ((40, 21), (0, 64))),
    Shape("token", 1, (1, 1), ((40, 21), (1, 64))),
)


@dataclass(frozen=True)
class Found:
    """What an op did: its error, and how large it may be (0: bits must be equal); `missing`: why there is no kernel."""

    op: str
    shape: str
    error: float = 0.0
    bar: float = 0.0
    missing: str = ""

    @property
    def right(self) -> bool:
        return bool(self.missing) or self.error <= self.bar  # NaN is not


class Layer:
    """One layer's arguments: the projections' views of new tokens, and pools with NaN wherever nothing may be read."""

    def __init__(self, shape: Shape, d: int, dv: int, dtype: torch.dtype, device: str, seed: int, heads: int = 4):
        g = torch.Generator().manual_seed(seed)
        lens = torch.tensor(shape.lens, dtype=torch.int32)
        (b, hkv), t = lens.shape, shape.tokens
        width = -(-(int(lens.max()) + t) // PAGE)
        c = width * PAGE

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g).to(dtype)

        valid = torch.tensor(shape.valid, dtype=torch.int32)
        padding = torch.arange(t) >= valid[:, None]
        projected = [normal(b, t, n) for n in (heads * d, hkv * d, hkv * dv)]
        for x in projected:
            x[padding] = NAN
        table, count = page_table(torch.full_like(lens, c), width, g)
        places = torch.rand(b, hkv, c, generator=g).argsort(-1)[..., None].expand(-1, -1, -1, 2).to(torch.int32)
        dense = {
            "k_pages": (normal(b, hkv, c, d), NAN), "v_pages": (normal(b, hkv, c, dv), NAN),
            "score_pages": (torch.randn(b, hkv, c, generator=g), NAN), "pos_pages": (places, 2**31 - 1),
        }  # fmt: skip
        pools = {name: paged(x, table, lens, count, dead).to(device) for name, (x, dead) in dense.items()}
        self.k_pages, self.v_pages = pools["k_pages"], pools["v_pages"]
        self.score_pages, self.pos_pages = pools["score_pages"], pools["pos_pages"]
        self.table, self.lens, self.valid = table.to(device), lens.to(device), valid.to(device)
        sizes = ((heads, d), (hkv, d), (hkv, dv))
        self.q, self.k, self.v = (
            x.to(device).view(b, t, n, e).transpose(1, 2) for x, (n, e) in zip(projected, sizes, strict=True)
        )
        self.positions = (c + torch.arange(t)).expand(b, t).contiguous().to(device)
        self.hidden = (torch.rand(b, hkv, t, generator=g) < 0.5).to(device)
        self.scores = torch.randn(b, hkv, t, generator=g).to(device)
        self.tables = [x.to(dtype).to(device) for x in torch.rand(2, b, t, d, generator=g) * 2 - 1]
        self.key_tables = [x.to(dtype).to(device) for x in torch.rand(2, c + t + 1, d, generator=g) * 2 - 1]
        self.real = ~padding.to(device)
        self.scale = d**-0.5

    def double(self) -> Layer:
        """The same numbers in fp64."""
        twin = object.__new__(Layer)
        twin.__dict__.update(self.__dict__)
        for name in ("q", "k", "v", "k_pages", "v_pages"):
            setattr(twin, name, getattr(self, name).double())
        twin.tables = [x.double() for x in self.tables]
        twin.key_tables = [x.double() for x in self.key_tables]
        return twin

    def to(self, device: str) -> Layer:
        """The same on a device, where tensors have the strides they have here."""
        twin = object.__new__(Layer)
        for name, x in self.__dict__.items():
            if isinstance(x, Tensor):
                x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
            elif isinstance(x, list):
                x = [y.to(device) for y in x]
            setattr(twin, name, x)
        return twin

    def copy(self) -> Layer:
        """The same with a cache of its own."""
        twin = object.__new__(Layer)
        twin.__dict__.update(self.__dict__)
        for name in ("k_pages", "v_pages", "score_pages", "pos_pages", "lens"):
            setattr(twin, name, getattr(self, name).clone())
        return twin

    def held(self) -> dict[str, Tensor]:
        """What live slots hold, by position (update kernels order slots as they like); -1 elsewhere."""
        pos = pages.read(self.pos_pages, self.table)[..., 0].long()
        dead = torch.arange(pos.shape[-1], device=pos.device) >= self.lens[..., None]
        order = pos.masked_fill(dead, 2**40).argsort(-1)
        found = {"lens": self.lens}
        for name in ("k_pages", "v_pages", "score_pages", "pos_pages"):
            x = pages.read(getattr(self, name), self.table)
            wide = (*dead.shape, *(1,) * (x.dim() - 3))
            found[name] = torch.gather(x.masked_fill(dead.view(wide), -1), 2, order.view(wide).expand_as(x))
        return found


# ---------------------------------------------------------------------------------------------- ops on a layer
def attention(a: Layer, *, hidden: bool = False, **options: Any) -> dict[str, Tensor]:
    """Output and log-sum-exp of the real tokens."""
    out, lse = ops.cached_attention(
        a.q, a.k, a.v, None, a.k_pages, a.v_pages, a.pos_pages, a.table, a.lens, a.positions, a.valid, None, None,
        a.hidden if hidden else None, a.scale, *(PLAIN | options).values(),
    )  # fmt: skip
    real = a.real[:, None].expand(lse.shape)
    return {"out": out[real], "lse": lse[real]}


def mass(a: Layer, newest: int) -> dict[str, Tensor]:
    """What slots and tokens get from the newest (0: all) tokens; log-sum-exps are those of fp64."""
    exact = a.to("cpu").double()
    with kernels("reference"):
        old = (exact.pos_pages, exact.table, exact.lens, exact.positions, exact.valid)
        attended = (exact.q, exact.k, exact.v, None, exact.k_pages, exact.v_pages, *old)
        lse = ops.cached_attention(*attended, None, None, None, a.scale, *PLAIN.values())[1].to(a.q.device)
    old = (a.pos_pages, a.table, a.lens, a.positions, a.valid)
    index = torch.arange(a.real.shape[1], device=a.real.device)
    rows = a.real & (index >= a.valid[:, None] - newest if newest else index >= 0)
    call = (a.q, a.k, lse, rows, None, a.k_pages, *old, None, None, a.scale, *PLAIN.values(), None, newest)
    return {"mass": ops.observe(*call)}


def token(a: Layer, *, turned: bool, keys: bool = False) -> dict[str, Tensor]:
    """Attention of a token with the mass, by queries and keys (`turned`) and cached keys (`keys`) that are not rotated yet.

    Log-sum-exps are one row, as those of `attention` are: one of them may be near 0, and its own size says nothing of its error.
    """
    cos, sin = (x[:, :1] for x in a.tables) if turned else (None, None)
    following = (a.positions[:, 0], *a.key_tables) if keys else (None, None, None)
    out, lse, found = ops.decode_attention(
        a.q, a.k, a.v, None, None, a.k_pages, a.v_pages, a.pos_pages, a.table, a.lens, a.positions, a.valid, None, None,
        a.scale, *PLAIN.values(), True, cos, sin, False, *following,
    )  # fmt: skip
    return {"out": out, "lse": lse.flatten(), "mass": found}


def _budgets(a: Layer) -> tuple[Tensor, Tensor]:
    """(keep, recent): heads that evict much, little and nothing."""
    keep = torch.tensor([[40, 300], [3, 66]], dtype=torch.int32, device=a.lens.device)
    return keep, torch.full((2,), 2, dtype=torch.int32, device=a.lens.device)


def update(a: Layer) -> dict[str, Tensor]:
    """What is held after the new tokens came."""
    a = a.copy()
    pools = (a.k_pages, a.v_pages, a.score_pages, a.pos_pages, a.table, a.lens)
    rows = (a.k, a.v, a.scores, None, a.positions, a.positions, a.valid, *_budgets(a))
    ops.cache_update(*rows, *pools, 2, 0, 0, *(None,) * 6)
    return a.held()


def both(a: Layer) -> dict[str, Tensor]:
    """Attention, and the update beside it."""
    a = a.copy()
    pools = (a.k_pages, a.v_pages, a.score_pages, a.pos_pages, a.table, a.lens)
    rows = (a.k, a.v, a.scores, None, a.positions, a.positions, a.valid, *_budgets(a))
    attended = (a.q, a.k, a.v, None, None, None, None, None, a.scale, *PLAIN.values())
    out, lse = ops.attend_and_update(*attended, *rows, *pools, 2, 0, 0, None, None)
    real = a.real[:, None].expand(lse.shape)
    return {"out": out[real], "lse": lse[real], **a.held()}


def turned_update(a: Layer) -> dict[str, Tensor]:
    """`update` of one token whose key is not rotated yet."""
    a = a.copy()
    pools = (a.k_pages, a.v_pages, a.score_pages, a.pos_pages, a.table, a.lens)
    rows = (a.k, a.v, a.scores, None, a.positions, a.positions, a.valid, *_budgets(a))
    cos, sin = (x[:, :1] for x in a.tables)
    ops.token_update(*rows, *pools, 2, 0, 0, None, None, None, "silu", cos, sin)
    return a.held()


def turn(a: Layer) -> dict[str, Tensor]:
    """RoPE of the new tokens."""
    q, k = ops.turn_both(a.q, a.k, *a.tables)
    return {"q": q.transpose(1, 2)[a.real], "k": k.transpose(1, 2)[a.real]}


def read(a: Layer, half: bool) -> dict[str, Tensor]:
    """Cached keys, dense and rotated; by halves, or with any partners."""
    d = a.k_pages.shape[2]
    partner = torch.arange(d, device=a.lens.device).roll(d // 2 if half else 1)
    places = pages.read(a.pos_pages, a.table)[..., 1].long()
    live = torch.arange(places.shape[2], device=places.device) < a.lens[..., None]
    places = torch.where(live, places, 0)
    found = ops.read_rotated(a.k_pages, a.table, a.lens, *a.key_tables, places, partner, d // 2 if half else 0)
    return {"keys": found[live]}


def rotate_keys(a: Layer) -> dict[str, Tensor]:
    """Cached keys, rotated where they lie."""
    a = a.copy()
    d = a.k_pages.shape[2]
    partner = torch.arange(d, device=a.lens.device).roll(d // 2)
    ops.settle_keys(a.k_pages, a.pos_pages, a.table, a.lens, *a.key_tables, partner, False)
    return a.held()


# ---------------------------------------------------------------------------------------------- errors
def distance(found: Tensor, exact: Tensor) -> float:
    """The larger of the relative errors of the whole and, weighed by FACTOR, of the worst row. Infinities must be the same."""
    found, exact = found.double(), exact.double()
    if found.shape != exact.shape or not torch.equal(found.isinf(), exact.isinf()):
        return float("inf")
    off = torch.where(exact.isinf(), 0.0, found - exact)
    exact = exact.masked_fill(exact.isinf(), 0.0)
    tiny = torch.finfo(torch.float64).tiny
    whole = off.norm() / exact.norm().clamp(min=tiny)
    rows = whole
    if exact.dim() > 1 and off.numel():
        rows = (off.norm(dim=-1) / exact.norm(dim=-1).clamp(min=tiny)).max()
    worst = float(torch.maximum(whole, rows / FACTOR))
    return worst if worst == worst else float("inf")


def unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of numbers that are not the same."""
    parts = [
        (found[n] != x).double().mean() if found[n].shape == x.shape else 1.0 for n, x in expected.items() if x.numel()
    ]
    return float(max(parts))


def against_exact(op: str, shape: str, run: Callable[[Layer], dict[str, Tensor]], a: Layer) -> Found:
    """Compares with fp64 on the CPU, and with the error of the torch reference there in the same dtype."""
    try:
        with kernels("fused"):
            found = {name: x.cpu() for name, x in run(a).items()}
    except OptionError as why:
        return Found(op, shape, missing=str(why))
    here = a.to("cpu")
    with kernels("reference"):
        same, exact = run(here), run(here.double())
    smallest = SMALLEST[a.q.dtype]
    worst = Found(op, shape, 0.0, 1.0)
    for name, x in exact.items():
        bar = FACTOR * max(distance(same[name], x), smallest)
        error = distance(found[name], x)
        if not error / bar <= worst.error / worst.bar:
            worst = Found(op, shape, error, bar)
    return worst


def against_bits(op: str, shape: str, run: Callable[[Layer], dict[str, Tensor]], a: Layer) -> Found:
    """Compares with the torch reference in the same dtype, bit by bit."""
    try:
        with kernels("fused"):
            found = {name: x.cpu() for name, x in run(a).items()}
    except OptionError as why:
        return Found(op, shape, missing=str(why))
    with kernels("reference"):
        return Found(op, shape, unequal(found, run(a.to("cpu"))))


def sweep(
    d: int, dv: int, dtype: torch.dtype, device: str, shapes: tuple[Shape, ...] = SHAPES, seed: int = 0, quantized: bool = True
) -> Iterator[Found]:  # fmt: skip
    """Every op at head dims d and dv, in every shape that it takes."""
    even = d % 2 == 0
    for shape in shapes:
        a = Layer(shape, d, dv, dtype, device, seed)
        name = shape.name
        yield against_exact("attention", name, attention, a)
        yield against_exact("attention, options", name, lambda a: attention(a, softcap=3.0, window=40), a)
        yield against_exact("column mass", name, lambda a: mass(a, 0), a)
        yield against_bits("update", name, update, a)
        if even:
            yield against_exact("rope", name, turn, a)
        if shape.tokens > 1:
            yield against_exact("gated attention", name, lambda a: attention(a, hidden=True), a)
            yield against_exact("column mass, newest", name, lambda a: mass(a, 9), a)
            yield against_exact("attention and update", name, both, a)
            continue
        yield against_exact("token", name, lambda a: token(a, turned=False), a)
        yield against_exact("read rotated, any partners", name, lambda a: read(a, False), a)
        if even:
            yield against_exact("token, rope", name, lambda a: token(a, turned=True), a)
            yield against_exact("token, rope of keys", name, lambda a: token(a, turned=True, keys=True), a)
            yield against_exact("update, rope", name, turned_update, a)
            yield against_exact("read rotated", name, lambda a: read(a, True), a)
            yield against_bits("rotate cached keys", name, rotate_keys, a)
    if quantized:
        for kind in KINDS:
            if even or kind != "int4":  # int4 packs two channels into a byte
                yield quantized_attention(kind, d, dv, dtype, device, seed)
                yield quantized_update(kind, d, dv, dtype, device, seed)


# ---------------------------------------------------------------------------------------------- quantized caches
def quantized_attention(kind: str, d: int, dv: int, dtype: torch.dtype, device: str, seed: int) -> Found:
    """One token on codes. Products with codes are of bf16 numbers in fp16 models, too."""
    case = QuantizedCase([[150, 1, 64, 33]], kind=kind, d=d, dv=dv, dtype=dtype, seed=seed)
    op = f"token, {kind}"
    given = [x.to(device) if isinstance(x, Tensor) else x for x in case.on_device().values()]
    rest = (case.scheme.kind, case.scheme.group, *case.options.values(), True)
    try:
        with kernels("fused"):
            out, lse, found = ops.decode_attention_quantized(*given, *rest)
    except OptionError as why:
        return Found(op, "token", missing=str(why))
    with kernels("reference"):
        exact = case.expected()
    bar = FACTOR * SMALLEST[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    pairs = zip((out, lse.flatten(), found), (exact[0], exact[1].flatten(), exact[2]), strict=True)  # as `token` does
    error = max(distance(x.cpu(), y) for x, y in pairs)
    return Found(op, "token", error, bar)


def quantized_update(kind: str, d: int, dv: int, dtype: torch.dtype, device: str, seed: int) -> Found:
    """Some tokens, one by one, after 100: codes, parameters and tails bit by bit."""
    scheme = Scheme(kind, 16)
    op = f"update, {kind}"
    start = QuantizedCache(scheme, 16, 1, 2, 3, d, dv, dtype, seed)
    start.update(start.tokens(100), torch.tensor([[90, 300]], dtype=torch.int32), 3, {}, False)
    mine, theirs = start.to(device), start.to("cpu")
    keep, near = torch.tensor([[90, 300]], dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)
    for _ in range(3):
        new = start.tokens(1)
        start.seen += 1
        theirs.update(new, keep, 3, {}, False)
        sent = [x.to(device) if isinstance(x, Tensor) else x for x in (*new.values(), keep, near)]
        pools = (mine.k_pages, mine.v_pages, mine.k_params, mine.v_params, mine.score_pages, mine.pos_pages)
        where = (mine.k_tail, mine.v_tail, mine.table, mine.lens, mine.qlens)
        try:
            with kernels("fused"):
                ops.cache_update_quantized(*sent, None, None, *pools, *where, kind, scheme.group, 2, 0, 0, *(None,) * 6)
        except OptionError as why:
            return Found(op, "token", missing=str(why))
    return Found(op, "token", unequal(mine.held(), theirs.held()))
