"""What the compiler knows about one attention call in the model: an `AttentionSite`, or a `NoSite` with the reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class AttentionSite:
    """One attention call, as found in the captured graph.

    `layer` counts sites in execution order; `module` is the path of the `nn.Module` that made the call. `window` and
    `chunk` are in tokens, 0 if the mask has none: a query at position p sees keys at positions in (p - window, p],
    or in [chunk * (p // chunk), p].

    latent: channels of the compressed latent that the keys and values of all heads are made of (MLA), 0 if there is
    none; latent_rotary: channels of the rotated part of the keys that all heads share. latent_cached: the cache holds
    these two instead; then kv_heads, head_dim and v_head_dim are 1, latent + latent_rotary and latent, and a token's
    value is the first channels of its key. expanded: the model's own [kv_heads, head_dim, v_head_dim] in that case.
    """

    layer: int
    module: str
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    source: str  # what was found: "interface", "sdpa", "softmax", "flex_attention"
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    rope: bool = False
    latent: int = 0
    latent_rotary: int = 0
    latent_cached: bool = False
    expanded: list[int] | None = None
    shares_kv_with: int | None = None
    inserted: list[str] = field(default_factory=list)

    @property
    def mask(self) -> str:
        """Returns the kind of mask: "causal", "sliding" or "chunked"."""
        return "sliding" if self.window else "chunked" if self.chunk else "causal"

    @property
    def cached_v_dim(self) -> int:
        """Returns the channels of a value that the cache holds beside the key."""
        return 0 if self.latent_cached else self.v_head_dim

    @property
    def cached_channels(self) -> int:
        """Returns how many numbers the cache holds per token and kv head."""
        return self.head_dim + self.cached_v_dim

    def as_dict(self) -> dict[str, Any]:
        """Returns the site as plain data, for reports and for the artifact."""
        return {**asdict(self), "mask": self.mask}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionSite:
        """Inverts `as_dict`."""
        return cls(**{k: v for k, v in data.items() if k != "mask"})


@dataclass
class NoSite:
    """An anchor that looked like attention but cannot be rewritten, and the reason. Falsy, like a failed match."""

    node: str
    module: str
    reason: str

    def __bool__(self) -> bool:
        return False
