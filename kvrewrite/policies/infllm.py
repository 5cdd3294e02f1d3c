"""InfLLM: a window on the device, and a memory of blocks in host memory from which relevant ones are looked up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError, UnsupportedModelError
from kvrewrite.policies.base import Policy, Scores, rotation_known
from kvrewrite.policies.registry import register
from kvrewrite.policies.segments import NEW_ROW, RowState, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import Site

DISTANT = ("auto", "constant", "original")


@register
@dataclass(frozen=True, kw_only=True)
class InfLLM(Policy):
    """InfLLM (Xiao et al., arXiv 2402.04617, section 3; code thunlp/InfLLM). Nothing is lost.

    The cache holds the newest tokens, at most `budget`: a window of budget - block tokens, and what is no whole block yet. What
    leaves it, in blocks of `block` tokens, goes on in host memory. A chunk of a prompt, and every `refresh`-th token that is
    generated, looks the `blocks` most relevant ones of its row and layer up, which all heads then see, beside the first `start`
    tokens and the cache. block_cache: how many blocks the device has room for, so that only new ones are copied.

    A block's `representatives` are, for each kv head, those of its keys that the window tokens after them gave the largest mean
    q . k. Relevance is the sum of q . k over the new tokens, over all heads and over the representatives.

    distant: what has left the cache is seen at one distance from every query, that of the window ("constant", the paper's),
    or where it was ("original"); "auto": constant where the model's rotation was found.
    """

    name = "infllm"
    summary = "everything: a window on the device, the rest in host memory, by blocks"
    source = "arXiv 2402.04617"
    evicts_when = "chunks, decoding (to host memory)"
    has_scores = False
    protects_prompts = False
    recalls = True
    inputs = ("memory_before", "memory_after", "memory_looks")

    budget: int | float | None = 4096 + 128
    chunk: int | None = 512
    start: int = 128
    block: int = 128
    blocks: int = 16
    representatives: int = 4
    block_cache: int = 32
    refresh: int = 1
    distant: str = "auto"

    @property
    def window(self) -> int:
        """How many tokens the cache has at least, once it is full."""
        assert isinstance(self.budget, int)
        return self.budget - self.block

    @property
    def needs_rotary(self) -> bool:
        """Keys of the memory are rotated by their one distance."""
        return self.distant == "constant"

    def validate(self) -> None:
        """Sizes that go together."""
        for option in ("block", "blocks", "representatives", "block_cache", "refresh"):
            if getattr(self, option) < 1:
                raise OptionError(f"infllm: {option} is {getattr(self, option)}, expected at least 1")
        if not isinstance(self.budget, int) or self.budget <= self.block:
            raise OptionError(
                f"infllm: budget is {self.budget}, expected a number of slots above block ({self.block}): the window and a block"
            )
        if not 0 <= self.start <= self.block:
            raise OptionError(f"infllm: start is {self.start}, expected 0 to block ({self.block})")
        if self.chunk is None or self.chunk > self.window:
            raise OptionError(
                f"infllm: chunk is {self.chunk}, expected a number up to the window of budget - block = {self.window} tokens: "
                "what a chunk brings may not leave the cache with it"
            )
        if self.representatives > self.block or self.block_cache < self.blocks:
            raise OptionError(
                f"infllm: got representatives={self.representatives}, block={self.block}, blocks={self.blocks}, "
                f"block_cache={self.block_cache}; expected representatives of at most block, and a block_cache of at least blocks"
            )
        if self.distant not in DISTANT:
            raise OptionError(f"infllm: distant is {self.distant!r}, expected one of {', '.join(DISTANT)}")
        fixed = {"positions": "original", "decode_eviction": True, "layer_budgets": "equal", "quantize": "none"}
        for option, value in fixed.items():
            if getattr(self, option) != value:
                raise OptionError(
                    f"infllm: {option} is {getattr(self, option)!r}, expected {value!r}: nothing else is defined"
                )

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Settles "auto"; refuses layers that can have no memory."""
        for site in sites:
            where = f"infllm: layer {site.layer} ({site.module})"
            if max(site.window, site.chunk) > self.window:
                raise OptionError(
                    f"{where} looks back {max(site.window, site.chunk)} tokens, and the cache keeps a window of "
                    f"{self.window}; use a budget of at least {max(site.window, site.chunk) + self.block}"
                )
            if self.has_memory(site) and site.alibi:
                raise UnsupportedModelError(f"{where} has ALiBi, by which blocks that are looked up are not weighed")
            if site.shares_kv_with is not None:
                raise UnsupportedModelError(
                    f"{where} reads the keys and values of layer {site.shares_kv_with}, which has its own memory; use a policy "
                    "that evicts"
                )
        if not any(map(self.has_memory, sites)):
            raise OptionError(
                "infllm: every layer of this model has a sliding window or a chunk, so no token beyond is ever seen"
            )
        if self.distant != "auto":
            return self
        return dataclasses.replace(self, distant="constant" if rotation_known(sites, facts) else "original")

    def of_rank(self, rank: int, ranks: int) -> Policy:
        """All heads of a layer look the same blocks up."""
        raise OptionError(
            "infllm: the heads of a layer look up the same blocks, and with tensor parallelism no process has them all; use one "
            "process"
        )

    def has_memory(self, site: AttentionSite) -> bool:
        """Layers with a window or a chunk see nothing beyond."""
        return not site.window and not site.chunk

    def memory_bytes(self, site: AttentionSite, itemsize: int, context: int) -> tuple[int, int]:
        """Blocks, the first tokens, what blocks are found by, and the newest tokens; every token on the host."""
        if not self.has_memory(site):
            return 0, 0
        assert isinstance(self.budget, int) and self.chunk is not None
        token, key = (site.kv_heads * n * itemsize for n in (site.head_dim + site.v_head_dim, site.head_dim))
        held = (self.start + self.block_cache * self.block) * token
        newest = (self.budget + self.chunk) * (2 if self.distant == "original" else 3) * key
        return held + newest + -(
            -context // self.block
        ) * key + 4 * self.blocks, context * token + 16 * self.block_cache

    # -- plans
    def gone(self, seen: int) -> int:
        """How many of a row's tokens are in the memory alone, once it has seen so many."""
        assert isinstance(self.budget, int)
        if seen <= self.budget:
            return 0
        return self.start + self.block * max(0, -(-(seen - self.start - self.budget) // self.block))

    def _segment(self, length: int, seen: int, looks: bool, prompt: bool) -> Segment:
        after = self.gone(seen + length)
        values = {"memory_before": self.gone(seen), "memory_after": after, "memory_looks": int(looks)}
        return Segment(length, seen + length - after, 0, values, prompt)

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Chunks, each of which looks up."""
        step = self.chunk or length
        return [
            self._segment(min(step, length - at), row.seen + at, looks=True, prompt=True)
            for at in range(0, length, step)
        ]

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """One token, which looks up where it is its turn."""
        return self._segment(1, row.seen, looks=row.seen % self.refresh == 0, prompt=False)

    # -- graph
    def score(self, site: Site) -> Scores:
        """A token is worth its position: the oldest goes first."""
        return Scores(site.position_scores())

    def ask(self, site: Site) -> None:
        """Which blocks the new tokens look up."""
        queries, keys = self._far(site)
        b, kinds = self.blocks, 2 if keys is site.k else 3
        heads, dims = site.kv_heads, (site.facts.head_dim, site.facts.v_head_dim)
        assert isinstance(self.budget, int) and self.chunk is not None

        def state(name: str, *shape: int, dtype: Any = site.k.dtype, **kind: Any) -> Tensor:
            return site.state(f"infllm_{name}_{site.layer}", shape, dtype, **kind)

        memory = (
            *(state(f"first_{n}", self.start, heads, d) for n, d in zip("kv", dims)),
            *(state(f"host_{n}", heads, d, per_token=True, host=True) for n, d in zip("kv", dims)),
            *(state(f"near_{n}", self.block_cache, self.block, heads, d) for n, d in zip("kv", dims)),
            state("near_use", self.block_cache, 2, dtype="int64", host=True),
            state("marks", heads, dims[0], per_token=True, every=self.block),
            state("latest", self.budget + self.chunk, kinds, heads, dims[0]),
        )
        rows = (site.positions, site.valid, *map(site.input, self.inputs))
        choice = state("choice", b, dtype="int32")
        notes = site.ops.look_up(queries, *rows, memory[-2], choice, self.start, self.block)
        site.remember("infllm", (queries, keys, notes, *memory))

    def recall(self, site: Site) -> Tensor:
        """Attention to the cache and to what was looked up; the new tokens enter the memory."""
        queries, keys, notes, *memory = site.recall("infllm")
        new = (queries, keys, site.v, site.q, site.k)
        how = (site.scale, site.facts.softcap, self.window, self.representatives)
        out: Tensor = site.ops.recall(site.input("out"), site.input("lse"), *new, notes, *memory, *how)
        return out

    def _far(self, site: Site) -> tuple[Tensor, Tensor]:
        """Queries and keys as they meet in the memory."""
        cos, sin, partner = site.rotary if self.distant == "constant" else (None, None, None)
        if cos is None or sin is None:
            return site.q, site.k
        turned = []
        for x, distance in ((site.query_before_rope, self.window), (site.key_before_rope, 0)):
            # Where the tables are shorter, so is the text, and the memory is empty.
            at = site.valid.new_full((1,), distance).clamp(max=cos.shape[0] - 1)
            turns, swaps = (x.float(), cos), (x[..., partner].float(), sin)
            parts = [part * table.index_select(0, at).float() for part, table in (turns, swaps)]
            turned.append((parts[0] + parts[1]).to(x.dtype))
        return turned[0], turned[1]
