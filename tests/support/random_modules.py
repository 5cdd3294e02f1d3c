"""Random decoders: every seed is one, put together from ops that keep tokens apart and ops that mix them.

What a module is made of is drawn independently: how positions come in, how the heads are laid out (views, permutes, einsums
with their letters in any order, kv heads shared or repeated in several ways), which mask there is and by which arithmetic, what
happens to the scores and to the weights, and up to three ops on the hidden states or token ids, over random axes and at random
places.
Many of these are attention over a cache, many are not; the module does not know. `outcome` says what kvrewrite made of it:
"exact", "refused" or what is wrong.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, DIM, MOST = 53, 16, 4, 4, 96
LENGTH = 70  # beyond most windows that are drawn
TOLERANCE = 1e-4  # of the largest logit
Op = Callable[[Tensor], Tensor]


def _distance(s: int) -> Tensor:
    at = torch.arange(s)
    return at[:, None] - at


# ------------------------------------------------------------------------------------------------ ops on hidden states
def _hidden_ops(draw: random.Random) -> tuple[str, Op]:
    """An op (B, S, WIDTH) -> (B, S, WIDTH), over a random axis."""
    dim = draw.choice([-1, -1, 2, 1, 1, 0])
    shift = draw.choice([1, 2, -1, 5])
    size = draw.choice([2, 3, 8])
    number = draw.choice([0.5, 1.7, 30.0])
    table: dict[str, Op] = {
        "gelu": F.gelu,
        "softmax": lambda x: x.softmax(dim),
        "log_softmax": lambda x: x.log_softmax(dim),
        "cumsum": lambda x: x.cumsum(dim) * 0.3,
        "cummax": lambda x: x.cummax(dim).values,
        "cumprod": lambda x: x.sigmoid().cumprod(dim),
        "logcumsumexp": lambda x: x.logcumsumexp(dim),
        "centre": lambda x: x - x.mean(dim, keepdim=True),
        "by maximum": lambda x: x / x.abs().amax(dim, keepdim=True),
        "by norm": lambda x: x / (1e-3 + x.norm(dim=dim, keepdim=True)),
        "normalize": lambda x: F.normalize(x, dim=dim),
        "standard": lambda x: (x - x.mean(dim, keepdim=True)) / (0.1 + x.var(dim, keepdim=True, unbiased=False)),
        "flip": lambda x: x.flip(dim),
        "roll": lambda x: x.roll(shift, dim),
        "sort": lambda x: x.sort(dim).values,
        "argsort": lambda x: x.argsort(dim).to(x.dtype) * 0.1,
        "median": lambda x: x - x.median(dim, keepdim=True).values,
        "all maximum": lambda x: x / x.abs().max(),
        "all mean": lambda x: x - x.mean(),
        "fake quantization": lambda x: (x / x.abs().amax(dim, keepdim=True) * 7).round(),
        "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
        "layer norm of two": lambda x: F.layer_norm(x, x.shape[-2:]),
        "group norm": lambda x: F.group_norm(x.mT, 4).mT,
        "group norm of tokens": lambda x: F.group_norm(x.reshape(-1, WIDTH), 4).view(x.shape),
        "batch norm": lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
        "pool": lambda x: F.avg_pool1d(x.mT, 3, 1, 1).mT,
        "pool features": lambda x: F.avg_pool1d(x, 3, 1, 1),
        "causal convolution": lambda x: (
            F.conv1d(F.pad(x.mT, (size - 1, 0)), torch.ones(WIDTH, 1, size) / size, groups=WIDTH).mT
        ),
        "convolution": lambda x: F.conv1d(x.mT, torch.ones(WIDTH, 1, 3) / 3, padding=1, groups=WIDTH).mT,
        "fft": lambda x: torch.fft.fft(x, dim=dim).real * 0.2,
        "shift by cat": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
        "shift by pad": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
        "shift features": lambda x: torch.cat([x[..., 1:], x[..., :1]], -1),
        "first token": lambda x: x + x[:, :1],
        "last token": lambda x: x + x[:, -1:],
        "length": lambda x: x * (number / x.shape[1]),
        "batch": lambda x: x / x.shape[0],
        "elements": lambda x: x / x.numel() ** 0.5,
        "number": lambda x: x * number,
        "scramble": lambda x: x.reshape(x.shape[0], WIDTH, -1).mT,
        "scramble rows": lambda x: x.reshape(-1, x.shape[0], WIDTH).transpose(0, 1),
        "there and back": lambda x: (
            x.transpose(0, 1).reshape(-1, WIDTH).view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1)
        ),
        "flat mean": lambda x: x - x.flatten(0, 1).mean(0),
        "flat softmax": lambda x: x.flatten(0, 1).softmax(0).view(x.shape),
        "flat features": lambda x: x.flatten(0, 1).softmax(1).view(x.shape),
        "tokens as features": lambda x: x.view(x.shape[0], x.shape[1], 4, 4).softmax(2).reshape(x.shape),
        "gram": lambda x: x + (x.mT @ x).mean(1, keepdim=True) * 0.05,
        "features with features": lambda x: (x.unsqueeze(-1) * x.unsqueeze(-2)).mean(-1),
        "einsum of tokens": lambda x: torch.einsum("bsd,btd->bs", x, x)[..., None] * 0.01 + x,
        "einsum of features": lambda x: torch.einsum("bsd,bsd->bs", x, x)[..., None] * 0.1 + x,
        "gather": lambda x: x.gather(1, (torch.arange(x.shape[1]) * 0)[None, :, None].expand(x.shape)),
        "gather features": lambda x: x.gather(2, x.argsort(-1)),
        "top features": lambda x: torch.zeros_like(x).scatter(2, x.topk(4, 2).indices, 1.0),
        "top tokens": lambda x: x * (x >= x.topk(min(4, x.shape[1]), 1).values[:, -1:]),
        "positions": lambda x: x + torch.arange(x.shape[1])[:, None].sin(),
        "positions over length": lambda x: x + (torch.arange(x.shape[1]) / x.shape[1])[:, None],
        "positions backwards": lambda x: x + (x.shape[1] - torch.arange(x.shape[1]))[:, None].sin(),
        "even positions": lambda x: torch.where((torch.arange(x.shape[1]) % 2 == 0)[:, None], x, -x),
        "masked mean": lambda x: x + torch.where(x > 0, x, 0.0).sum(dim, keepdim=True) * 0.1,
        "threshold": lambda x: torch.where(x > x.mean(dim, keepdim=True), x, 0.0),
        "experts": _experts,
        "full experts": _full_experts,
    }
    name = draw.choice(list(table))
    return f"{name}({dim})", table[name]


def _experts(x: Tensor) -> Tensor:
    """Top-1 of four, by one-hot: every token by itself."""
    chosen = F.one_hot(x[..., :4].argmax(-1), 4).to(x.dtype)
    return x * (chosen * torch.tensor([0.5, 1.0, 1.5, 2.0])).sum(-1, keepdim=True)


def _full_experts(x: Tensor) -> Tensor:
    """The same, but an expert takes only the first five tokens of all rows."""
    flat = x.flatten(0, 1)
    chosen = F.one_hot(flat[:, :4].argmax(-1), 4)
    rank = (chosen.cumsum(0) * chosen).sum(-1)
    return (flat * (rank <= 5)[:, None]).view(x.shape)


def _id_ops(draw: random.Random) -> tuple[str, Op]:
    """An op on token ids (B, S) that gives token ids."""
    dim = draw.choice([1, 1, 0])
    table: dict[str, Op] = {
        "modulo": lambda ids: (ids * 7 + 3) % VOCAB,
        "bigram": lambda ids: (ids * 31 + torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1) * 17) % VOCAB,
        "roll": lambda ids: ids.roll(2, dim),
        "flip": lambda ids: ids.flip(dim),
        "maximum": lambda ids: ids.amax(dim, keepdim=True).expand_as(ids),
        "running maximum": lambda ids: ids.cummax(dim).values,
        "any": lambda ids: (ids == 5).any(dim, keepdim=True).long().expand_as(ids),
        "count": lambda ids: ((ids == 5).cumsum(1)).clamp(max=VOCAB - 1),
        "first": lambda ids: ids[:, :1].expand_as(ids),
        "sorted": lambda ids: ids.sort(dim).values,
        "same": lambda ids: torch.where(ids > 20, ids, 0),
    }
    name = draw.choice(list(table))
    return f"ids {name}({dim})", table[name]


# ------------------------------------------------------------------------------------------------ masks, scores, weights
def _masks(draw: random.Random) -> tuple[str, Op]:
    """Distances (S, S) -> what is seen, (S, S) or (HEADS, S, S)."""
    w = draw.choice([1, 2, 7, 16, 33, 40])
    at = lambda d: torch.arange(d.shape[0])  # noqa: E731
    table: dict[str, Op] = {
        "causal": lambda d: d >= 0,
        "tril": lambda d: torch.ones_like(d, dtype=torch.bool).tril(),
        "window": lambda d: (d >= 0) & (d < w),
        "window by tril": lambda d: (lambda o: o.tril() & ~o.tril(-w))(torch.ones_like(d, dtype=torch.bool)),
        "window by float": lambda d: (d >= 0) & (d * 0.5 < w * 0.5 - 0.1),
        "window by square": lambda d: (d >= 0) & (d * d < w * w),
        "window by exponential": lambda d: (d >= 0) & ((-d.clamp(min=0) / w).exp() > 0.3),
        "chunks": lambda d: (d >= 0) & (at(d)[:, None] // w == at(d) // w),
        "blocks": lambda d: (d >= 0) & (at(d)[:, None] // w - at(d) // w <= 1),
        "dilated": lambda d: (d >= 0) & (d % 3 == 0),
        "window and first": lambda d: (d >= 0) & ((d < w) | (at(d) < 2)),
        "prefix": lambda d: (d >= 0) | (at(d) < w),
        "all": lambda d: torch.ones_like(d, dtype=torch.bool),
        "windows per head": lambda d: (d >= 0) & (d < torch.tensor([w, 50, w, 1000])[:, None, None]),
        "late hole": lambda d: (d >= 0) & (d != 45),
        "one ahead": lambda d: d >= -1,
        "from the end": lambda d: (d >= 0) & (d.shape[0] - at(d) > w)[:, None].expand_as(d) | (d == 0),
    }
    name = draw.choice(["causal"] * 12 + list(table))
    return f"mask {name}({w})", table[name]


def _score_ops(draw: random.Random) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """Scores (B, HEADS, S, S) and distances -> scores."""
    n = draw.choice([0.3, 2.0, 7.5])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.3])[:, None, None]
    table: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "as they are": lambda x, d: x,
        "number": lambda x, d: x * n,
        "softcap": lambda x, d: n * torch.tanh(x / n),
        "clamp": lambda x, d: x.clamp(-n, n),
        "cube": lambda x, d: x + 0.01 * x**3,
        "alibi": lambda x, d: x - slopes * d,
        "alibi that ends": lambda x, d: x - slopes * d.clamp(max=50),
        "alibi by keys": lambda x, d: x + slopes * torch.arange(d.shape[0]),
        "square alibi": lambda x, d: x - 0.001 * d.float() ** 2,
        "per head": lambda x, d: x * slopes,
        "log-n": lambda x, d: x * (torch.arange(1, d.shape[0] + 1).log() / 3).clamp(min=1)[:, None],
        "per key": lambda x, d: x * (1 + torch.arange(d.shape[0]) * 0.01),
        "log of the length": lambda x, d: x * torch.tensor(float(d.shape[0])).log(),
        "per query added": lambda x, d: x + torch.arange(d.shape[0]).sin()[:, None],
        "less the maximum": lambda x, d: x - x.amax(-1, keepdim=True),
        "over the maximum": lambda x, d: x / x.abs().amax(-1, keepdim=True),
        "top 20": lambda x, d: x.masked_fill(x < x.topk(min(20, x.shape[-1]), -1).values[..., -1:], -1e9),
        "near the maximum": lambda x, d: x.masked_fill(x < x.amax(-1, keepdim=True) - 3, -1e9),
        "heads mixed": lambda x, d: x + 0.1 * x.mean(1, keepdim=True),
        "rounded": lambda x, d: (x * 4).round() / 4,
    }
    name = draw.choice(["as they are"] * 18 + list(table))
    return f"scores {name}({n})", table[name]


def _weight_ops(draw: random.Random) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """Attention weights (B, HEADS, S, S) and distances -> weights."""
    table: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "as they are": lambda w, d: w,
        "late window": lambda w, d: w * (d < 30),
        "decay": lambda w, d: w * 0.98 ** d.clamp(min=0),
        "small ones dropped": lambda w, d: torch.where(w < 0.02, 0.0, w),
        "renormalized": lambda w, d: w / w.sum(-1, keepdim=True),
        "scaled": lambda w, d: w * 0.5,
        "less the mean": lambda w, d: w - w.mean(-1, keepdim=True),
        "heads mixed": lambda w, d: w + 0.1 * w.mean(1, keepdim=True),
    }
    name = draw.choice(["as they are"] * 28 + list(table))
    return f"weights {name}", table[name]


# ------------------------------------------------------------------------------------------------ attention
class _Attention(nn.Module):
    def __init__(self, draw: random.Random, notes: list[str]) -> None:
        super().__init__()
        self.kv_heads = draw.choice([1, 2, 4, 4])
        self.q, self.out = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * self.kv_heads * DIM)
        self.form = draw.choice(["sdpa", "matmul", "einsum", "einsum", "grouped einsum", "baddbmm"])
        self.repeats = draw.choice(["interleave", "tile", "expand"])
        self.rope = draw.random() < 0.3
        self.before = draw.choice(
            ["", "", "", "", "norm", "norm", "norm of tokens", "unit", "view", "shift q", "gate k"]
        )
        self.additive = (
            draw.choice([-math.inf, -math.inf, -1e9, -1e9, -1e4, -1e4, -50.0]) if draw.random() < 0.4 else None
        )
        (mask, self.mask), (score, self.score), (weight, self.weight) = (
            _masks(draw),
            _score_ops(draw),
            _weight_ops(draw),
        )
        letters = draw.sample("bhqkdxyz", 5)
        order = draw.sample(range(4), 4)
        self.letters, self.order = letters, order
        notes += [
            self.form,
            f"kv {self.kv_heads} {self.repeats}",
            self.before,
            f"fill {self.additive}",
            mask,
            score,
            weight,
        ]
        notes += ["rope"] if self.rope else []

    def heads(self, x: Tensor, n: int) -> Tensor:
        if self.before == "view":  # without a transpose: tokens become heads
            return x.reshape(x.shape[0], n, x.shape[1], DIM)
        return x.view(x.shape[0], x.shape[1], n, DIM).transpose(1, 2)

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[2]).float(), 10.0 ** -torch.arange(DIM // 2).float()).repeat(1, 2)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def repeated(self, x: Tensor) -> Tensor:
        n = HEADS // self.kv_heads
        if n == 1:
            return x
        if self.repeats == "interleave":
            return x.repeat_interleave(n, 1)
        if self.repeats == "tile":
            return x.repeat(1, n, 1, 1)
        return x[:, :, None].expand(-1, -1, n, -1, -1).reshape(x.shape[0], HEADS, x.shape[2], DIM)

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        if self.additive is None:
            return scores.masked_fill(~seen, -math.inf)
        return scores + torch.zeros(seen.shape).masked_fill(~seen, self.additive)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.heads(self.q(x), HEADS)
        k, v = (self.heads(t, self.kv_heads) for t in self.kv(x).chunk(2, -1))
        if self.before == "norm":
            q, k = F.layer_norm(q, (DIM,)), F.layer_norm(k, (DIM,))
        elif self.before == "norm of tokens":
            k = F.layer_norm(k, k.shape[-2:])
        elif self.before == "unit":
            q, k = F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1)
        elif self.before == "shift q":
            q = torch.cat([q[:, :, :1], q[:, :, :-1]], 2)
        elif self.before == "gate k":
            k = k * v.sigmoid()
        if self.rope:
            q, k = self.rotated(q), self.rotated(k)
        d = _distance(s)
        seen = self.mask(d)
        if self.form == "grouped einsum":
            return self.out(self.grouped(q, k, v, d, seen))
        k, v = self.repeated(k), self.repeated(v)
        if self.form == "sdpa":
            bias = torch.zeros(1, 1, s, s).expand(1, HEADS, s, s)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masked(self.score(bias, d), seen))
        elif self.form == "einsum":
            y = self.einsum(q, k, v, d, seen)
        elif self.form == "baddbmm":
            flat = [t.reshape(b * HEADS, s, DIM) for t in (q, k, v)]
            scores = torch.baddbmm(torch.zeros(b * HEADS, s, s), flat[0], flat[1].mT, beta=0.5, alpha=0.5)
            w = self.weight(self.masked(self.score(scores.view(b, HEADS, s, s), d), seen).softmax(-1), d)
            y = torch.bmm(w.reshape(b * HEADS, s, s), flat[2]).view(b, HEADS, s, DIM)
        else:
            w = self.weight(self.masked(self.score(q @ k.mT * DIM**-0.5, d), seen).softmax(-1), d)
            y = w @ v
        return self.out(y.transpose(1, 2).reshape(b, s, HEADS * DIM))

    def einsum(self, q: Tensor, k: Tensor, v: Tensor, d: Tensor, seen: Tensor) -> Tensor:
        """With the result's letters in any order."""
        n, h, i, j, c = self.letters
        scores = torch.einsum(f"{n}{h}{i}{c},{n}{h}{j}{c}->{n}{h}{i}{j}", q, k) * DIM**-0.5
        w = self.weight(self.masked(self.score(scores, d), seen).softmax(-1), d)
        dims = [n, h, i, c]
        out = "".join(dims[o] for o in self.order)
        y = torch.einsum(f"{n}{h}{i}{j},{n}{h}{j}{c}->{out}", w, v)
        return y.permute([self.order.index(o) for o in range(4)])

    def grouped(self, q: Tensor, k: Tensor, v: Tensor, d: Tensor, seen: Tensor) -> Tensor:
        """kv heads that are not repeated, with the group before or after them."""
        b, _, s, _ = q.shape
        groups = HEADS // self.kv_heads
        q = q.reshape(b, self.kv_heads, groups, s, DIM)
        after = self.repeats != "tile"
        letters = "bngid,bnjd->bngij" if after else "bngid,bnjd->bgnij"
        scores = torch.einsum(letters, q, k) * DIM**-0.5
        shape = scores.shape
        scores = self.masked(self.score(scores.reshape(b, HEADS, s, s), d), seen)
        w = self.weight(scores.softmax(-1), d).view(shape)
        back = "bngij,bnjd->bingd" if after else "bgnij,bnjd->bingd"
        return torch.einsum(back, w, v).reshape(b, s, HEADS * DIM)


class RandomModule(nn.Module):
    """The decoder of one seed. notes: what it is made of."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.notes: list[str] = []
        self.positions = draw.choice(["table", "table", "slice", "sinusoids", "none"])
        self.notes.append(f"positions {self.positions}")
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(MOST, WIDTH)
        self.attention, self.norm = _Attention(draw, self.notes), nn.LayerNorm(WIDTH)
        self.mlp, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.ops: dict[str, Op] = {}
        for place in draw.sample(["ids", "embedding", "block", "branch", "logits"], draw.choice([0, 0, 1, 1, 2, 3])):
            name, op = _id_ops(draw) if place == "ids" else _hidden_ops(draw)
            self.ops[place] = op
            self.notes.append(f"{place}: {name}")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                size = 1.5 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
                p.add_(torch.randn(p.shape, generator=generator) * size)
        self.eval()

    def at(self, place: str, x: Tensor) -> Tensor:
        return self.ops[place](x) if place in self.ops else x

    def forward(self, ids: Tensor) -> Tensor:
        s = ids.shape[1]
        x = self.wte(self.at("ids", ids))
        if self.positions == "table":
            x = x + self.wpe(torch.arange(s))
        elif self.positions == "slice":
            x = x + self.wpe.weight[:s]
        elif self.positions == "sinusoids":
            x = x + torch.sin(torch.arange(s)[:, None] / 10.0 ** torch.linspace(0, 2, WIDTH))
        x = self.at("embedding", x)
        x = x + self.attention(self.norm(x))
        x = self.at("block", x)
        x = x + self.at("branch", self.mlp(x).relu())
        return self.head(self.at("logits", x))


def outcome(seed: int) -> str:
    """What kvrewrite makes of the module of `seed`: "exact", "refused: ...", "no model: ...", or what is wrong with it."""
    import kvrewrite
    from kvrewrite.errors import KVRewriteError

    model = RandomModule(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (2, LENGTH), generator=generator)
    with torch.no_grad():
        try:
            want = model(ids)
        except RuntimeError as error:
            return f"no model: {error}"
    if not bool(torch.isfinite(want).all()):
        return "no model: its logits are not finite"
    try:
        small = kvrewrite.transform(model, "full", budget=4 * LENGTH)
    except KVRewriteError as error:
        return f"refused: {' '.join(str(error).split())[:300]}"
    problem = _compare(model, small, ids, want)
    return f"WRONG {problem}" if problem else "exact"


@torch.no_grad()
def _compare(model: nn.Module, small: Any, ids: Tensor, want: Tensor) -> str:
    """How the rewritten module differs from the unmodified one, "" where it does not."""
    limit = TOLERANCE * float(want.abs().max())

    def run(pieces: list[int], rows: Tensor, mask: Tensor | None = None) -> Tensor:
        cache, at, out = small.new_cache(rows.shape[0]), 0, []
        for n in pieces:
            given = {} if mask is None else {"attention_mask": mask[:, : at + n]}
            out.append(small(rows[:, at : at + n], past_key_values=cache, **given).logits)
            at += n
        return torch.cat(out, 1)

    for pieces in ([LENGTH], [37, 7, 1, 1, 5, *[1] * 19]):
        off = float((run(pieces, ids) - want).abs().max())
        if not off <= limit:
            return f"in pieces of {pieces[:5]}: off by {off:.3g} of {float(want.abs().max()):.3g}"
    pad = 9
    row, mask = ids.clone(), torch.ones_like(ids)
    row[1, :pad], row[1, pad:], mask[1, :pad] = 0, ids[1, :-pad], 0
    got = run([LENGTH // 2, LENGTH // 4, *[1] * (LENGTH - LENGTH // 2 - LENGTH // 4)], row, mask)
    alone = model(ids[1:, :-pad])
    off = max(float((got[0] - model(ids[:1])[0]).abs().max()), float((got[1, pad:] - alone[0]).abs().max()))
    if not off <= limit:
        return f"padded: off by {off:.3g}"
    for n in (1, 3):
        off = float((small(ids[:, :n]).logits - model(ids[:, :n])).abs().max())
        if not off <= limit:
            return f"on {n} tokens: off by {off:.3g}"
    return ""


def main() -> None:
    """python -m tests.support.random_modules FIRST LAST: what kvrewrite makes of these seeds, counted; what is wrong, in full."""
    import collections
    import sys

    torch.set_num_threads(1)
    count: collections.Counter[str] = collections.Counter()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            found = outcome(seed)
        except Exception as error:
            found = f"CRASH {type(error).__name__}: {error}"
        kind = found.partition(":")[0].partition(" ")[0] if found[0].isupper() else found.partition(":")[0]
        count[kind] += 1
        if kind in ("WRONG", "CRASH"):
            print(seed, found, RandomModule(seed).notes, flush=True)
    print(dict(count), flush=True)


if __name__ == "__main__":
    main()
