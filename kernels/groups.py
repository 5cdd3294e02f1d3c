"""What ops and kernels take, in groups: each is written once here. kvrewrite/ops/groups.py makes the ops' flat schemas
of them.

Shapes: B rows, T new tokens, H query heads, Hkv kv heads, D and Dv head dims, P pages of a head at most, PAGE slots per
page, C = P * PAGE slots. All positions are those of the original text, never slots.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """New tokens that attend: q (B, H, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor


class Dense(NamedTuple):
    """What stands for cached keys (B, Hkv, C, D) or values (B, Hkv, C, Dv) that had to be rotated or dequantized
    first."""

    k_dense: Tensor | None = None
    v_dense: Tensor | None = None


class Pages(NamedTuple):
    """A cache to read: pools k_pages (pages, PAGE, D), v_pages (pages, PAGE, Dv) and pos_pages (pages, PAGE, 2) int32
    (original and rotary position); table (B, Hkv, P) int32; lens (B, Hkv) int32 live slots. A width of 0 of v_pages
    says that a value is the first Dv channels of its key (a latent cache)."""

    k_pages: Tensor
    v_pages: Tensor
    pos_pages: Tensor
    table: Tensor
    lens: Tensor


class KeyPages(NamedTuple):
    """The keys of a cache to read, as `Pages` has them."""

    k_pages: Tensor
    pos_pages: Tensor
    table: Tensor
    lens: Tensor


class Cache(NamedTuple):
    """A cache to write to: `Pages`, and the slots' scores (pages, PAGE) fp32."""

    k_pages: Tensor
    v_pages: Tensor
    score_pages: Tensor
    pos_pages: Tensor
    table: Tensor
    lens: Tensor

    @property
    def pages(self) -> Pages:
        """What attention reads of it."""
        return Pages(self.k_pages, self.v_pages, self.pos_pages, self.table, self.lens)


class Slots(NamedTuple):
    """A cache whose slots have been gathered: k_cache (B, Hkv, C, D) and v_cache (B, Hkv, C, Dv), contiguous, of which
    the first lens (B, Hkv) int32 slots of each head are live. cache_pos (B, Hkv, C) int32, contiguous: their positions;
    None where no window, chunk or ALiBi asks for them."""

    k_cache: Tensor
    v_cache: Tensor
    lens: Tensor
    cache_pos: Tensor | None = None


class KeySlots(NamedTuple):
    """The keys of a cache whose slots have been gathered, as `Slots` has them."""

    k_cache: Tensor
    lens: Tensor
    cache_pos: Tensor | None = None


class At(NamedTuple):
    """Where new tokens stand: positions (B, T) int64, of which the first valid (B,) int32 of each row are real."""

    positions: Tensor
    valid: Tensor


class Logits(NamedTuple):
    """How logits are made, and which of them count.

    sinks: (H,) extra logits in the denominator. alibi: (H,) slopes m, adding -m * (query position - key position).
    hidden (B, Hkv, T) bool: new tokens that a gate evicts before attention; only they themselves see them. scale
    multiplies the logits, then softcap * tanh(x / softcap) (0: none), then the mask: causal, within `window` tokens (0:
    none), within chunks of `chunk` tokens (0: none).
    """

    sinks: Tensor | None = None
    alibi: Tensor | None = None
    hidden: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    window: int = 0
    chunk: int = 0

    @property
    def placed(self) -> bool:
        """Whether the positions of keys matter."""
        return bool(self.window or self.chunk or self.alibi is not None)


class Placed(NamedTuple):
    """Positions of queries (B, T) and of keys (B, Hkv, N), and which keys are live (B, Hkv, N) bool."""

    q_pos: Tensor
    k_pos: Tensor
    live: Tensor


class Watch(NamedTuple):
    """Whose attention is observed: q (B, H, T, D), k (B, Hkv, T, D), lse (B, H, T) fp32 the natural log-sum-exp of each
    query row, rows (B, T) its weight.

    above: (B, T) fp32; where given, weights larger than their row's threshold count as 1 and others as 0. newest: only
    the last so many valid tokens of each row have a weight in `rows` (0: any may), so the others need no work."""

    q: Tensor
    k: Tensor
    lse: Tensor
    rows: Tensor
    above: Tensor | None = None
    newest: int = 0


class TokenOptions(NamedTuple):
    """What attention of one new token per row can do besides, see `decode_attention`."""

    mass: bool = False
    cos: Tensor | None = None
    sin: Tensor | None = None
    early: bool = False
    following: Tensor | None = None
    key_cos: Tensor | None = None
    key_sin: Tensor | None = None


PLAIN = TokenOptions()


class NewTokens(NamedTuple):
    """New tokens that enter a cache: k (B, Hkv, T, D), v (B, Hkv, T, Dv), new_scores (B, Hkv, T); slot_scores (B, Hkv,
    C) replaces the cached slots' scores first (None leaves them)."""

    k: Tensor
    v: Tensor
    new_scores: Tensor
    slot_scores: Tensor | None = None


class Rows(NamedTuple):
    """Each row's tokens and limits: `At`; rotary (B, T) int64, the positions that keys are or will be rotated by; keep
    (B, Hkv) int32, how many slots each head keeps; recent (B,) int32, how many of its newest are protected."""

    positions: Tensor
    rotary: Tensor
    valid: Tensor
    keep: Tensor
    recent: Tensor

    @property
    def at(self) -> At:
        """Where attention finds the tokens."""
        return At(self.positions, self.valid)


class Eviction(NamedTuple):
    """What an eviction goes by: positions below `protected_first` stay; slots that no later query can see through
    `window` or `chunk` go in any case; select (B, Hkv, C + T) stands for the stored scores; drop (B, Hkv, T) bool:
    tokens that never enter."""

    protected_first: int = 0
    window: int = 0
    chunk: int = 0
    select: Tensor | None = None
    drop: Tensor | None = None


class Ragged(NamedTuple):
    """Heads that share budgets, and slots that are merged.

    floor (B,) float64: in rows where it is not negative the heads of a layer compete for the layer's budget, of which
    this fraction is reserved equally (Ada-KV). spare (B, W) int32: pages to be dealt to the heads of a row, -1 after
    the last and in rows that keep their pages; next_table (B, Hkv, W) is filled in and holds from then on. threshold
    (B,) fp32, renewed in place: what goes is merged into what stays (D2O; kernels/update/merge.py)."""

    floor: Tensor | None = None
    spare: Tensor | None = None
    next_table: Tensor | None = None
    threshold: Tensor | None = None


EQUAL = Ragged()  # heads that share nothing and merge nothing


class Preceding(NamedTuple):
    """What the update of one token takes in, see `token_update`: a retaining head and a rotation."""

    head: Tensor | None = None
    activation: str = "silu"
    cos: Tensor | None = None
    sin: Tensor | None = None


NOTHING = Preceding()


class Codes(NamedTuple):
    """Quantized slots, as kernels/quantized/reference.py has them: codes and parameters by page, and the newest slots
    in full."""

    k_pages: Tensor
    v_pages: Tensor
    k_params: Tensor
    v_params: Tensor
    k_tail: Tensor
    v_tail: Tensor


class QuantizedPages(NamedTuple):
    """Where quantized slots lie: as in `Pages`; slots [0, qlens) (B, Hkv) int32 of each head are quantized."""

    pos_pages: Tensor
    table: Tensor
    lens: Tensor
    qlens: Tensor


class QuantizedCache(NamedTuple):
    """`QuantizedPages` to write to, with the slots' scores. k_cached, v_cached (B, Hkv, C, ...): what `read_quantized`
    gave in this step, not rotated; None: it is read once more."""

    score_pages: Tensor
    pos_pages: Tensor
    table: Tensor
    lens: Tensor
    qlens: Tensor
    k_cached: Tensor | None = None
    v_cached: Tensor | None = None


class Rotation(NamedTuple):
    """RoPE by position: cos and sin (N, D), and each channel's partner (D,) int64; None where there is no rotation."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    partner: Tensor | None = None


class KeyRotation(NamedTuple):
    """How cached keys are rotated as they are gathered: by rotary (B, Hkv, C) int64, with cos and sin (N, D),
    contiguous, and partner (D,) int64. half: h where partner is [h..2h - 1, 0..h - 1, 2h..] and the channels from 2h on
    are not rotated; 0: it may be anything."""

    rotary: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    partner: Tensor | None = None
    half: int = 0


UNROTATED = KeyRotation()


class Forecast(NamedTuple):
    """What expected attention is estimated from, see kernels/scores/reference.py."""

    scale: float
    sinks: int
    future: int
    epsilon: float


class Repetition(NamedTuple):
    """Tokens that repeat a part of their row's text, all of which is cached and nothing was evicted from: q (B, H, T,
    D), k (B, Hkv, T, D) of them; stored (B, Hkv, C) fp32, the scores that slots have; begins, ends (B,) int32: the slots
    of the part (ends 0: the row repeats nothing), at most `most`; first: the slots before all parts."""

    q: Tensor
    k: Tensor
    stored: Tensor
    begins: Tensor
    ends: Tensor
    first: int
    most: int


class Question(NamedTuple):
    """What new tokens ask a memory for: q (B, H, T, D), queries as they meet what is in it; positions (B, T), of which the
    first valid (B,) int32 of each row are real; before, after (B,) int32: how many of the row's tokens are in the memory
    before and after this step; looks (B,) int32: 1 where the row chooses blocks anew, 0 where it stays with the last."""

    q: Tensor
    positions: Tensor
    valid: Tensor
    before: Tensor
    after: Tensor
    looks: Tensor


class Attended(NamedTuple):
    """What attention has given: out (B, H, T, Dv), and the natural log-sum-exp lse (B, H, T) of each query."""

    out: Tensor
    lse: Tensor


class Entering(NamedTuple):
    """New tokens as a memory takes them: far_q (B, H, T, D) and far_k (B, Hkv, T, D), as queries and keys meet there; v (B,
    Hkv, T, Dv); q, k: as attention sees them, by which representatives are chosen."""

    far_q: Tensor
    far_k: Tensor
    v: Tensor
    q: Tensor
    k: Tensor


class Memory(NamedTuple):
    """A memory of blocks of L tokens (kernels/recall/). All of it is the row's own, and written to.

    first_k, first_v (B, F, Hkv, D): the first tokens, which every query sees once they have left the cache. host_k,
    host_v (B, S, Hkv, D), in host memory: every token by its position; block i is [F + i L, F + (i + 1) L). near_k,
    near_v (B, N, L, Hkv, D): blocks on the device; near_use (B, N, 2) int64, in host memory: which block a place has, plus
    one, and when it was last asked for. marks (B, S', Hkv, D): by block, the sum of its representative keys. latest (B, R,
    2 or 3, Hkv, D): the last R tokens by position modulo R: queries summed over their group, keys as attention sees them,
    and, where those are others, keys as the memory has them.
    """

    first_k: Tensor
    first_v: Tensor
    host_k: Tensor
    host_v: Tensor
    near_k: Tensor
    near_v: Tensor
    near_use: Tensor
    marks: Tensor
    latest: Tensor


class Recalling(NamedTuple):
    """How a memory is attended to and kept: scale and softcap as in `Logits`; window: after how many later queries a token
    may leave the cache; representatives: keys that stand for a block."""

    scale: float
    softcap: float
    window: int
    representatives: int


class VisibleBlocks(NamedTuple):
    """What the queries of a chunk see (sparse prefill). blocks (B, H, Q, K) bool: whether a block of 128 queries sees a
    block of 64 keys, those of the cache first, then those of the new tokens. columns (B, H, N) int32: keys that every
    later query sees besides, counted from the first slot, new tokens from C on; ascending, -1 after the last. A query
    sees of them what is alive and not after it."""

    blocks: Tensor | None = None
    columns: Tensor | None = None


class Sparse(NamedTuple):
    """Sparse prefill. patterns: which part of a chunk's attention each head computes (kernels/attention/patterns.py);
    "": all of it."""

    patterns: str = ""


WHOLE = Sparse()  # every query sees every key before it


# Reserved for what is planned. Such a group is the last piece of an op's `define`, `Fields(Packing, optional=True)`:
# calls and artifacts without it stay as they are, ops that do not take it stay as they are, and functions get one more
# parameter.
class Packing(NamedTuple):
    """Whose tokens a packed row holds: request (B, T) int32, the row of tables and lengths that each token belongs
    to."""

    request: Tensor | None = None
