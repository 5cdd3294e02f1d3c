"""Which shapes the attention kernels take, and how they split a head's channels. (Ops ask without loading Triton.)"""

from __future__ import annotations

MOST_CHANNELS = 256  # of a head, where its new tokens are one, or some are hidden
MOST_CHANNELS_OF_A_CHUNK = 512
FEWEST_CHANNELS = 8  # of a head in 16 bits, where its new tokens are several: one channel came out wrong on an H200
FEW_TOKENS = 8  # new tokens of a row that read a long cache together, by the kernel of single ones
MOST_GROUP = 128  # query heads that share a kv head, of one token


def why_not(d: int, dv: int, group: int, tokens: int, hidden: bool, bits: int = 32) -> str | None:
    """The reason why no kernel attends from so many new tokens at these head dims and query heads per kv head
    (`group`), in numbers of that many bits; None where one does."""
    one = tokens == 1 and not hidden
    most = MOST_CHANNELS if one or hidden else MOST_CHANNELS_OF_A_CHUNK
    if max(d, dv) > most:
        return f"it takes head dims up to {most}, not {d} and {dv}"
    if not one and bits < 32 and min(d, dv) < FEWEST_CHANNELS:
        return f"it takes head dims from {FEWEST_CHANNELS} on in {bits} bits, not {d} and {dv}"
    if one and group > MOST_GROUP:
        return f"it takes groups of up to {MOST_GROUP} query heads, not of {group}"
    return None


def why_not_latent(v_dim: int) -> str | None:
    """The reason why no kernel takes a cache whose values are part of its keys (mla=latent: values of width 0), or
    None."""
    return None if v_dim else "a cache of latents, whose values are a part of the keys (mla=latent)"


def split_width(width: int) -> tuple[int, int]:
    """A head dim as two powers of two of at least 16, which is what one tl.dot takes; the second is as small as will
    do, or 0. 96 = 64 + 32 costs less than 128."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = width - first
    return (first, 0) if rest <= 0 else (first, max(16, 1 << (rest - 1).bit_length()))
