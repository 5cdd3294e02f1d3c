"""Trains KVzap's surrogates (arXiv 2601.07891): linear models or MLPs of a layer's input that predict a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kvrewrite.ir.site import AttentionSite
from kvrewrite.policies.kvzap import KVzap
from kvrewrite.tools.training.labels import RECONSTRUCTION
from kvrewrite.tools.training.locret import HeadLoss, LocretOptions, LocretTask, top_overlap


@dataclass(frozen=True, kw_only=True)
class KVzapOptions(LocretOptions):
    """What is trained. hidden_size: of the MLP, 0: a linear model. The others as in `LocretOptions`; lr is the authors'.

    The label is the log of KVzip's score. Theirs is that of KVzip+, which also weighs the value's norm.
    """

    least_hidden: ClassVar[int] = 0

    hidden_size: int = 512
    smoothing: float = 0.0
    lr: float = 5e-3
    label: str = RECONSTRUCTION


class KVzapTask(LocretTask):
    """KVzap's models in training; squared error, as theirs."""

    def __init__(self, model: nn.Module, options: KVzapOptions):
        super().__init__(model, options, KVzap(threshold=None, budget=2 * KVzap.window))

    def learns(self, site: AttentionSite) -> bool:
        """A layer with a window keeps that."""
        return self.policy.judges(site)

    @torch.no_grad()
    def prepare(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> None:
        """Last biases begin at the mean of the first batch's labels."""
        means = []
        for label in self.observe(input_ids, labels, real)[1]:
            counted = label > -torch.inf
            means.append(torch.where(counted, label, 0.0).sum((0, 2)) / counted.sum((0, 2)).clamp(min=1))
        self.begin(means)

    @torch.no_grad()
    def begin(self, means: Sequence[Tensor]) -> None:
        """Last biases begin at the mean of the labels."""
        last = "bias" if not self.options.hidden_size else "2.bias"
        for site, mean in zip(self.owners, means, strict=True):
            self.heads[self.names.index(f"layers.{site.layer}.{last}")].copy_(mean)

    @staticmethod
    def error(scores: Tensor, labels: Tensor) -> Tensor:
        """The square."""
        return (scores - labels).square()

    def loss(self, scores: list[Tensor], labels: list[Tensor]) -> HeadLoss:
        """The mean squared error over layers, heads and tokens; tokens without a label do not count."""
        errors, overlap = [], []
        for score, label in zip(scores, labels, strict=True):
            counted = label > -torch.inf
            error = self.error(score, torch.where(counted, label, score.detach()))
            errors.append(error.sum() / counted.sum().clamp(min=1))
            overlap.append(top_overlap(score.detach(), label))
        total = torch.stack(errors).mean()
        return HeadLoss(total, total, torch.zeros_like(total), torch.stack(overlap).mean())
