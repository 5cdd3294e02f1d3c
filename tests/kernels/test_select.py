"""The GPU kernels of `cache_update` against the reference: which positions stay, with what belongs to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.kernels.update import reference as evict
from kvrewrite.kernels.update import select
from tests.support.flat import flat
from tests.support.products import covering

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 64
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 3.2e38, -3.2e38, -3.35e38)


cache_update = flat(select.cache_update, sinks="protected_first")


def draw(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scores: distinct numbers, numbers of half precision, few different ones, or those that are hard to compare."""
    x = torch.randn(shape, generator=generator)
    if kind == "half":
        return x.bfloat16().float()
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=generator).float()
    if kind == "equal":
        return torch.full(shape, -0.25)
    if kind == "mass":
        return torch.where(x > 0.3, x.abs().exp() ** 3, 0.0)
    if kind == "special":
        choice = torch.randint(0, 2 * len(SPECIAL), shape, generator=generator)
        for i, value in enumerate(SPECIAL):
            x[choice == i] = value
    return x


def setting(
    seed: int, lens: list[list[int]], valid: list[int], tokens: int, pages: int, *, scores: str = "plain",
    dims: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32, rescore: bool = False, by: bool = False,
    drop: bool = False, gaps: bool = False, shuffle: bool = True, **rest: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `cache_update`. What is not live holds garbage; slots are in any order; lens, k, v and others are views
    with strides. rest: sinks, window, chunk, and keep (B, Hkv) and recent (B,) as lists."""
    g = torch.Generator().manual_seed(seed)
    b, hkv = len(lens), len(lens[0])
    total = 1 + b * hkv * pages
    k_pages, v_pages = (torch.full((total, PAGE, d), math.nan, dtype=dtype) for d in dims)
    score_pages = torch.full((total, PAGE), math.nan)
    pos_pages = torch.full((total, PAGE, 2), -(2**31), dtype=torch.int32)
    order = torch.randperm(total - 1, generator=g) + 1
    table = torch.zeros(b, hkv, pages, dtype=torch.int32)
    most = max(max(row) for row in lens)
    start = 3 * most if gaps else most
    for i in range(b):
        for h in range(hkv):
            n = lens[i][h]
            own = order[(i * hkv + h) * pages :][:pages]
            table[i, h, : -(-n // PAGE)] = own[: -(-n // PAGE)]
            table[i, h, -(-n // PAGE) :] = own[-(-n // PAGE) :]
            where = torch.arange(n)
            pos = torch.randperm(start, generator=g)[:n] if gaps else torch.arange(start - n, start)
            pos = pos[torch.randperm(n, generator=g)] if shuffle else pos.sort().values
            page, at = table[i, h, where // PAGE].long(), where % PAGE
            k_pages[page, at] = torch.randn(n, dims[0], generator=g).to(dtype)
            v_pages[page, at] = torch.randn(n, dims[1], generator=g).to(dtype)
            score_pages[page, at] = draw(scores, (n,), g)
            pos_pages[page, at] = torch.stack([pos, pos + 7], dim=-1).to(torch.int32)
    positions = (start + torch.arange(tokens)).expand(b, tokens)
    stacked_lens = torch.full((b, hkv, 3), 10**6, dtype=torch.int32)
    stacked_lens[..., 1] = torch.tensor(lens, dtype=torch.int32)
    k, v = (torch.randn(b, tokens, hkv, d, generator=g).to(dtype).transpose(1, 2) for d in dims)
    new_scores = draw(scores, (b, hkv, tokens), g)
    for i, n in enumerate(valid):  # what is not real would win
        k[i, :, n:], new_scores[i, :, n:] = math.nan, math.inf
    slot_scores = draw(scores, (b, pages * PAGE, hkv), g).transpose(1, 2) if rescore else None
    args: dict[str, Any] = {
        "k": k, "v": v, "new_scores": new_scores, "slot_scores": slot_scores, "positions": positions,
        "rotary": positions + 11, "valid": torch.tensor(valid, dtype=torch.int32),
        "keep": torch.tensor(rest["keep"], dtype=torch.int64).clamp(max=2**31 - 1).to(torch.int32),
        "recent": torch.tensor(rest.get("recent", [0] * b), dtype=torch.int32),
        "k_pages": k_pages, "v_pages": v_pages, "score_pages": score_pages, "pos_pages": pos_pages, "table": table,
        "lens": stacked_lens[..., 1], "sinks": rest.get("sinks", 0), "window": rest.get("window", 0),
        "chunk": rest.get("chunk", 0), "select": draw(scores, (b, hkv, pages * PAGE + tokens), g) if by else None,
        "drop": torch.rand(b, hkv, tokens, generator=g) < 0.4 if drop else None,
    }  # fmt: skip
    return {n: x.to(DEVICE) if isinstance(x, Tensor) and n != "lens" else x for n, x in args.items()} | {
        "lens": stacked_lens.to(DEVICE)[..., 1]
    }


POOLS = ("k_pages", "v_pages", "score_pages", "pos_pages")


def dealt_pages(
    args: dict[str, Any], dealt: list[bool], floor: list[float] | None, own: float = 0.5, seed: int = 0
) -> dict[str, Any]:
    """The same arguments for a ragged eviction. dealt: which rows are offered pages, of which a part `own` are their own;
    floor: (B,), or None: no row shares budgets. What is offered is enough for everything."""
    g = torch.Generator().manual_seed(seed)
    b, hkv, width = args["table"].shape
    most = width * PAGE + args["k"].shape[2]
    need = hkv * -(-most // PAGE)
    count = len(args["k_pages"])
    pools = {}
    for name in POOLS:
        x = args[name]
        fresh = torch.full((b * need, *x.shape[1:]), -5 if name == "pos_pages" else math.nan, dtype=x.dtype)
        pools[name] = torch.cat([x, fresh.to(DEVICE)])
    spare = torch.full((b, need + 2), -1, dtype=torch.int32)
    for i in range(b):
        if dealt[i]:
            held = args["table"][i].flatten().cpu()
            held = held[torch.rand(len(held), generator=g) < own]
            fresh = count + i * need + torch.randperm(need, generator=g).to(torch.int32)
            spare[i, :need] = torch.cat([held, fresh])[:need]
    next_table = torch.full((-(-most // PAGE) + 1, b, hkv), -9, dtype=torch.int32).movedim(0, -1)
    floors = None if floor is None else torch.tensor(floor, dtype=torch.float64)
    ragged = {"floor": floors, "spare": spare, "next_table": next_table}
    return args | pools | {n: x if x is None else x.to(DEVICE) for n, x in ragged.items()}


def copies(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with pools and lengths of their own."""
    mine = dict(args) | {name: args[name].clone() for name in (*POOLS, "next_table") if name in args}
    mine["lens"] = args["lens"]._base.clone()[..., 1] if args["lens"]._base is not None else args["lens"].clone()
    return mine


def contents(args: dict[str, Any]) -> list[Tensor]:
    """Of every head its live slots in order of position, as rows of bits: [position, rotary, score, key..., value...]."""
    found = []
    table = args.get("next_table", args["table"])
    b, hkv, _ = table.shape
    for i in range(b):
        for h in range(hkv):
            slot = torch.arange(int(args["lens"][i, h]), device=DEVICE)
            page, at = table[i, h, slot // PAGE].long(), slot % PAGE
            pos = args["pos_pages"][page, at]
            rows = [pos.long(), args["score_pages"][page, at][:, None].view(torch.int32).long()]
            for name in ("k_pages", "v_pages"):
                x = args[name][page, at]
                rows.append(x.view(torch.int32 if x.element_size() == 4 else torch.int16).long())
            found.append(torch.cat(rows, dim=1)[torch.argsort(pos[:, 0])])
    return found


def reference(args: dict[str, Any]) -> dict[str, Any]:
    mine: dict[str, Any] = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in copies(args).items()}
    flat(evict.cache_update, sinks="protected_first")(**mine)
    return mine


def check(args: dict[str, Any], **options: Any) -> dict[str, Any]:
    mine, wanted = copies(args), reference(args)
    rest = {n: x.clone() for n, x in mine.items() if isinstance(x, Tensor) and n not in (*POOLS, "lens", "next_table")}
    cache_update(**mine, **options)
    assert torch.equal(mine["lens"].cpu(), wanted["lens"])
    expected = contents({n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in wanted.items()})
    for head, (got, want) in enumerate(zip(contents(mine), expected)):
        assert torch.equal(got, want), f"head {head}: {got[:, 0].tolist()} stay, expected {want[:, 0].tolist()}"
    for name, x in rest.items():
        assert torch.equal(x.nan_to_num(5.0), mine[name].nan_to_num(5.0)), f"{name} was written"
    others = mine["lens"]._base
    assert others is None or bool((others[..., [0, 2]] == 10**6).all())
    own = torch.zeros(len(mine["k_pages"]), dtype=torch.bool, device=DEVICE)
    own[mine["table"].flatten().long()] = True
    if "spare" in mine:
        assert torch.equal(mine["next_table"].cpu(), wanted["next_table"])
        for table, spare in zip(mine["table"], mine["spare"]):
            if spare[0] >= 0:  # pages that are not offered may be another cache's, too
                own[table.flatten().long()] = False
        own[mine["spare"].clamp(min=0).flatten().long()] = True
        own[0] = False
    for name in POOLS:
        foreign = (mine[name][~own], args[name][~own])
        assert torch.equal(*(x.contiguous().view(torch.uint8) for x in foreign)), f"{name}: a foreign page was written"
    return mine


LENS = [[100, 60], [0, 128]]
CASES: dict[str, dict[str, Any]] = {
    "room for all": {"keep": [[2**31 - 1] * 2] * 2},
    "a budget": {"keep": [[100, 60], [40, 128]]},
    "shrinking": {"keep": [[30, 10], [1, 0]], "recent": [4, 2]},
    "growing": {"keep": [[110, 62], [64, 192]]},
    "one goes": {"keep": [[139, 99], [9, 137]], "scores": "mass"},
    "sinks and recent": {"keep": [[80, 50], [20, 100]], "sinks": 3, "recent": [9, 30]},
    "more protected than kept": {"keep": [[5, 4], [3, 8]], "sinks": 150, "recent": [9, 9]},
    "more recent than kept": {"keep": [[25, 44], [3, 8]], "sinks": 2, "recent": [99, 500]},
    "recent in gaps": {"keep": [[80, 50], [20, 100]], "recent": [70, 60], "gaps": True},
    "window": {"keep": [[100, 60], [40, 128]], "window": 75, "sinks": 4, "recent": [7, 8]},
    "window and room": {"keep": [[999, 999], [999, 999]], "window": 50},
    "chunk": {"keep": [[50, 20], [30, 40]], "chunk": 48, "gaps": True},
    "ties": {"keep": [[80, 50], [20, 100]], "scores": "ties", "recent": [3, 3]},
    "all equal": {"keep": [[80, 50], [7, 100]], "scores": "equal"},
    "mass with zeros": {"keep": [[90, 55], [30, 110]], "scores": "mass"},
    "half precision": {"keep": [[80, 50], [20, 100]], "scores": "half"},
    "hard to compare": {"keep": [[80, 50], [20, 100]], "scores": "special", "sinks": 2},
    "replaced scores": {"keep": [[80, 50], [20, 100]], "rescore": True},
    "replaced scores and room": {"keep": [[999, 999], [999, 999]], "rescore": True},
    "selected by other scores": {"keep": [[80, 50], [20, 100]], "by": True, "scores": "special"},
    "both": {"keep": [[80, 50], [20, 100]], "by": True, "rescore": True, "scores": "half"},
    "dropped": {"keep": [[80, 50], [20, 100]], "drop": True, "recent": [12, 12]},
    "dropped and room": {"keep": [[999, 999], [999, 999]], "drop": True},
}


@covering({"case": 1, ("valid", "tokens"): 8})
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("valid", "tokens"), [([40, 9], 40), ([1, 1], 1), ([0, 3], 5)], ids=["chunk", "token", "idle"])
def test_cases(case: dict[str, Any], valid: list[int], tokens: int) -> None:
    check(setting(3, LENS, valid, tokens, 3, **case))


RAGGED: dict[str, dict[str, Any]] = {
    "shared": {"keep": [[80, 50], [20, 100]], "recent": [9, 30], "sinks": 3},
    "ties": {"keep": [[80, 50], [20, 100]], "scores": "ties", "recent": [3, 3]},
    "all equal": {"keep": [[70, 70], [7, 100]], "scores": "equal"},
    "hard to compare": {"keep": [[80, 50], [20, 100]], "scores": "special", "by": True},
    "window": {"keep": [[60, 60], [40, 128]], "window": 75, "sinks": 4, "recent": [7, 8]},
    "dropped, replaced scores": {"keep": [[999, 30], [20, 999]], "drop": True, "recent": [12, 12], "rescore": True},
    "room for all": {"keep": [[999, 999], [999, 999]], "rescore": True},
    "more protected than kept": {"keep": [[5, 4], [3, 8]], "sinks": 150, "recent": [9, 9]},
}


ON_CPU = ("shared", "ties", "window", "dropped, replaced scores")  # the interpreter is slow


@pytest.mark.parametrize("case", RAGGED if DEVICE == "cuda" else ON_CPU)
def test_ragged(case: str) -> None:
    """Heads share budgets, and what stays moves to pages that may have been another head's."""
    ways: list[tuple[list[bool], list[float] | None, float]] = [
        ([True, True], [0.2, 0.0], 0.5), ([True, False], [0.35, -1.0], 1.0), ([True, True], None, 0.0)
    ]  # fmt: skip
    at = list(RAGGED).index(case)
    for way in ways if DEVICE == "cuda" else [ways[at % 3]]:
        check(dealt_pages(setting(3, LENS, [40, 9], 40, 3, **RAGGED[case]), *way))


def test_ragged_rows_without_new_tokens_move() -> None:
    args = setting(5, [[100, 0, 64]] * 2, [0, 2], 2, 2, keep=[[9, 9, 9], [60, 1, 64]], rescore=True)
    check(dealt_pages(args, [True, True], [0.1, 0.1], 1.0))


def test_shares_are_rounded_to_even() -> None:
    """Halves: with a floor of a half, heads that win an odd number keep half of it, and the floor of half their share."""
    args = setting(5, [[40] * 5], [30], 30, 2, keep=[[21, 30, 13, 22, 41]], recent=[2])  # 18.5 31.5 15.5 20.5 29.5
    check(dealt_pages(args, [True], [0.5], 0.5))


@pytest.mark.parametrize("scores", ["plain", "half", "ties", "mass", "special", "equal"])
@pytest.mark.parametrize("plan", [(64, 64, 1), (128, 64, 4)], ids=str)
def test_many_blocks(scores: str, plan: tuple[int, int, int]) -> None:
    """Rows longer than a block, and more entries near the threshold than fit the tail."""
    args = setting(5, [[300, 511]], [200], 200, 8, scores=scores, keep=[[310, 400]], recent=[20], sinks=4)
    check(args, plan=plan)


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (24, 16), (192, 128), (256, 32)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])], ids=str
)
def test_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(setting(7, [[64, 10]], [70], 70, 3, keep=[[70, 60]], dims=dims, dtype=dtype))


def test_one_shot() -> None:
    """More new tokens than the cache has room for."""
    check(setting(9, [[0, 0]], [190], 190, 1, keep=[[64, 50]], recent=[30], sinks=2))


def test_scores_and_budgets_that_are_expanded() -> None:
    args = setting(11, [[70, 90]], [20], 20, 2, keep=[[70, 70]])
    args["new_scores"] = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 2, 20)
    args["keep"] = torch.tensor([[75]], dtype=torch.int32, device=DEVICE).expand(1, 2)
    check(args)


def test_same_bits_twice() -> None:
    args = setting(13, [[180, 128]], [60], 60, 3, keep=[[150, 128]], scores="half", recent=[5])
    first, second = (check(args) for _ in range(2))
    for name in (*POOLS, "lens"):
        assert torch.equal(*(x[name].contiguous().view(torch.uint8) for x in (first, second)))


def test_positions_that_are_not_unique_do_no_harm() -> None:
    """What a warm-up may bring: the result has no meaning, but nothing outside is touched and it ends."""
    args = setting(17, [[60, 64]], [40], 40, 1, keep=[[50, 64]], recent=[7], scores="equal")
    args["pos_pages"].zero_()
    args["positions"] = torch.zeros_like(args["positions"])
    before = args["k_pages"][0].clone()
    cache_update(**args)
    assert args["lens"].tolist() == [[50, 64]]
    assert torch.equal(args["k_pages"][0].nan_to_num(5.0), before.nan_to_num(5.0))


def test_refuses_strides_it_cannot_read() -> None:
    args = setting(15, [[10]], [3], 3, 1, keep=[[5]])
    with pytest.raises(ValueError, match="last dim of k and v must be contiguous"):
        cache_update(**(args | {"k": args["k"].transpose(2, 3).contiguous().transpose(2, 3)}))
    with pytest.raises(ValueError, match="v_pages must be contiguous"):
        cache_update(**(args | {"v_pages": args["v_pages"][:, ::2]}))


def random_setting(seed: int, scale: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1000 + seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=g))]

    def size(most: int) -> int:
        return int(torch.randint(most + 1, (), generator=g))

    b, hkv, most, tokens = pick(1, 2, 3), pick(1, 2, 4), pick(60, 200) * scale, pick(1, 2, 17, 70 * scale)
    lens = [[pick(0, 1, size(most), most) for _ in range(hkv)] for _ in range(b)]
    pages = -(-(most + tokens) // PAGE)
    return setting(
        seed, lens, [pick(tokens, size(tokens)) for _ in range(b)], tokens, pages,
        keep=[[pick(0, size(most), most, 2**31 - 1) for _ in range(hkv)] for _ in range(b)],
        recent=[pick(0, size(9), size(most), 2**31 - 1) for _ in range(b)], sinks=pick(0, 0, 4),
        window=pick(0, 0, 1 + size(most)), chunk=pick(0, 0, 1 + size(most)),
        scores=pick("plain", "half", "ties", "mass", "special", "equal"),
        rescore=pick(False, True), by=pick(False, False, True), drop=pick(False, False, True), gaps=pick(False, True),
        shuffle=pick(False, True), dims=pick((16, 16), (24, 8)),
    )  # fmt: skip


def random_ragged(seed: int, scale: int) -> dict[str, Any]:
    args, g = random_setting(seed, scale), torch.Generator().manual_seed(seed)
    rows = len(args["lens"])
    dealt = [bool(x) for x in torch.rand(rows, generator=g) < 0.7]
    floor = [float(x) if d else -1.0 for x, d in zip(torch.rand(rows, generator=g).double(), dealt)]
    return dealt_pages(args, dealt, None if seed % 4 == 0 else floor, float(torch.rand((), generator=g)), seed)


@pytest.mark.parametrize("seed", range(12))
def test_random(seed: int) -> None:
    check(random_setting(seed, 1))


@pytest.mark.parametrize("seed", [1])
def test_random_ragged(seed: int) -> None:
    check(random_ragged(100 + seed, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_random_on_gpu(seed: int) -> None:
    check(random_setting(seed, 1 + seed % 40))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_random_ragged_on_gpu(seed: int) -> None:
    check(random_ragged(seed, 1 + seed % 40))
