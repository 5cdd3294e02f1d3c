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
        self.fill, self.batch, self.every, self.host = float(spec.fill), batch, spec.every, spec.host
        self.gpu = device if spec.host and device.type == "cuda" else None  # which copies to and from it
        lead = (batch, 0) if self.per_token else (0,)  # nothing is held before the first token
        self.value = torch.empty(*lead, *self.shape, dtype=self.dtype, device="cpu" if spec.host else device)

    def hold(self, tokens: int, expected: int = 0) -> None:
        """Makes room for `tokens` tokens of every row. expected: how many there will be, if that is known: what lies in host
        memory is not moved then."""
        if not self.per_token:
            if not len(self.value):
                self.value = self._new((self.batch, *self.shape)).fill_(self.fill)
            return
        have, need = self.value.shape[1], -(-tokens // self.every)
        if need <= have:
            return
        room = max(need, have + have // 2, -(-PAGE // self.every))
        if self.host and expected >= tokens:
            room = -(-expected // self.every)
        grown = self._new((self.value.shape[0], room, *self.shape))
        self._await_copies()
        if not self.host:
            grown.zero_()
        grown[:, :have] = self.value
        self.value = grown

    def _await_copies(self) -> None:
        """Before the host touches what a GPU may still be writing to."""
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)

    def _new(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.value.device, pin_memory=self.gpu is not None)

    def has_room(self, tokens: int) -> bool:
        """Whether `hold` has nothing to do."""
        return self.value.shape[1] * self.every >= tokens if self.per_token else bool(len(self.value))

    def room(self, tokens: int) -> Tensor:
        """Another tensor like the one that holds this, for so many tokens."""
        lead = (self.batch, tokens) if self.per_token else (self.batch,)
        return torch.zeros(*lead, *self.shape, dtype=self.dtype, device=self.value.device)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.value.numel() * self.dtype.itemsize

    def live(self, seen: Sequence[int]) -> int:
        """Bytes that mean something, but for slots, which are counted as such."""
        if self.slots:
            return 0
        rows = sum(-(-n // self.every) for n in seen) if self.per_token else sum(n > 0 for n in seen)
        return rows * math.prod(self.shape) * self.dtype.itemsize

    def fork(self) -> PolicyState:
        """A copy that goes on by itself."""
        self._await_copies()
        twin: PolicyState = object.__new__(PolicyState)
        twin.__dict__.update(self.__dict__, value=self._new(tuple(self.value.shape)).copy_(self.value))
        return twin

    def select(self, source: list[int]) -> None:
        """Row i becomes a copy of row source[i], for as many rows as `source` has."""
        self.batch = len(source)
        if len(self.value):
            self._await_copies()
            rows = self.value[source]
            self.value = rows.pin_memory() if self.gpu is not None else rows
