"""What a program knows of the other processes (ranks) that run it together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from kvrewrite.ops.together import gather_ranks


@dataclass(frozen=True)
class Peers:
    """One rank of a group. group: the process group's name, as torch's functional collectives take it."""

    rank: int
    ranks: int
    group: str

    def any(self, flags: np.ndarray, device: torch.device) -> np.ndarray:
        """Where some rank has a flag set. device: what the group reaches."""
        own = torch.from_numpy(flags.astype(np.uint8)).to(device)
        found: np.ndarray = torch.stack(gather_ranks(own, self.ranks, self.group)).amax(0).cpu().numpy() > 0
        return found


@dataclass
class Parallel:
    """How a program is dealt out. kv_heads: of each cache class in all ranks together. cut: of each parameter and constant
    that a rank has a part of, the dimension and the sizes of the parts that are cut into equal blocks. report: lines of
    text."""

    peers: Peers
    kv_heads: list[int]
    cut: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)

    def blocks(self, name: str) -> list[tuple[int, int]]:
        """(start in the whole dimension, length) of what this rank has of a tensor that is cut."""
        return blocks_of(self.cut[name][1], self.peers.rank, self.peers.ranks)


def blocks_of(parts: tuple[int, ...], rank: int, ranks: int) -> list[tuple[int, int]]:
    """(start, length) of a rank's block of each of the parts that a dimension consists of."""
    found, start = [], 0
    for part in parts:
        found.append((start + rank * (part // ranks), part // ranks))
        start += part
    return found
