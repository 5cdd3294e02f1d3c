"""The loss of a causal language model, as `Trainer.evaluate` asks a model for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvrewrite.errors import InputError

IGNORED = -100


def check_labels(labels: Any, input_ids: Tensor, logits_to_keep: int, training: bool) -> None:
    """Raises InputError where no loss can be computed for these labels."""
    if training:
        raise InputError(
            "labels were given in training mode, but a rewritten model's forward runs without gradients: train the original, or "
            "policy weights with kvrewrite train; for the loss alone call model.eval() first"
        )
    if not isinstance(labels, Tensor) or labels.shape != input_ids.shape:
        got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise InputError(f"labels: got {got}, expected a tensor of shape {tuple(input_ids.shape)}, like input_ids")
    if logits_to_keep:
        raise InputError(f"labels need the logits of all columns, but logits_to_keep is {logits_to_keep}; leave it out")


def causal_loss(
    logits: Tensor, labels: Tensor, first: list[int], counts: list[int], items: Tensor | int | None = None
) -> Tensor:
    """Mean cross entropy in fp32 of each label (B, T) given the logits (B, T, vocabulary) of the column before it.

    first, counts: where the real tokens of each row begin and how many there are; what padding would predict or be is left
    out, so a row counts as it does alone, and so are labels of -100. items: what the sum is divided by instead of the number
    of labels (`num_items_in_batch`).
    """
    labels = labels.to(logits.device)
    column = torch.arange(labels.shape[1], device=logits.device)
    begin = torch.tensor(first, device=logits.device)[:, None]
    end = begin + torch.tensor(counts, device=logits.device)[:, None]
    predicted = (column > begin) & (column < end)  # the column before is real, too
    target = labels.long().masked_fill(~predicted, IGNORED)[:, 1:].reshape(-1)
    scores = logits[:, :-1].float().flatten(0, 1)
    if items is None:
        return F.cross_entropy(scores, target, ignore_index=IGNORED)
    total = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
