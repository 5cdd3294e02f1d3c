"""What a policy, or a layer without attention, remembers of a request besides its slots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvrewrite.ir.layout import PAGE, State


class PolicyState:
    """A tensor (B, ...), or (B, capacity, ...) that grows with the text."""

    def __init__(self, spec: State, batch: int, device: torch.device):
        self.input, self.per_token, self.slots = spec.input, spec.per_token, spec.slots
        self.shape = tuple(spec.shape)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.fill, self.batch = float(spec.fill), batch
        lead = (batch, 0) if self.per_token else (0,)  # nothing is held before the first token
        self.value = torch.empty(*lead, *self.shape, dtype=self.dtype, device=device)

    def hold(self, tokens: int) -> None:
        """Makes room for `tokens` tokens of every row."""
        if not self.per_token:
            if not len(self.value):
                self.value = self.value.new_full((self.batch, *self.shape), self.fill)
            return
        have = self.value.shape[1]
        if tokens <= have:
            return
        grown = self.value.new_zeros(self.value.shape[0], max(tokens, have + have // 2, PAGE), *self.shape)
        grown[:, :have] = self.value
        self.value = grown

    def has_room(self, tokens: int) -> bool:
        """Whether `hold` has nothing to do."""
        return self.value.shape[1] >= tokens if self.per_token else bool(len(self.value))

    def room(self, tokens: int) -> Tensor:
        """Another tensor like the one that holds this, for so many tokens."""
        lead = (self.batch, tokens) if self.per_token else (self.batch,)
        return torch.zeros(*lead, *self.shape, dtype=self.dtype, device=self.value.device)

    def live(self, seen: Sequence[int]) -> int:
        """Bytes that mean something, but for slots, which are counted as such."""
        if self.slots:
            return 0
        rows = sum(seen) if self.per_token else sum(n > 0 for n in seen)
        return rows * math.prod(self.shape) * self.dtype.itemsize

    def fork(self) -> PolicyState:
        """A copy that goes on by itself."""
        twin: PolicyState = object.__new__(PolicyState)
        twin.__dict__.update(self.__dict__, value=self.value.clone())
        return twin

    def select(self, source: list[int]) -> None:
        """Row i becomes a copy of row source[i], for as many rows as `source` has."""
        self.batch = len(source)
        if len(self.value):
            self.value = self.value[source]
