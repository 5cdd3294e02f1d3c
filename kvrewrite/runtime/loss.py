"""The loss of a causal language model, as `Trainer.evaluate` asks a model for it."""

from __future__ import annotations

from typing import Any

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


def causal_loss(logits: Tensor, labels: Tensor, mask: Tensor | None, items: Tensor | int | None = None) -> Tensor:
    """Mean cross entropy in fp32 of each label (B, T) given the logits (B, T, vocabulary) of the column before it.

    mask: (B, past + T) or (B, T), 1 for real tokens, None where all are: what padding would predict, or is, is left out, so
    a row counts as it does alone; so are labels of -100. items: what the sum is divided by instead of the number of labels
    (`num_items_in_batch`).
    """
    labels = labels.to(logits.device).long()
    if mask is not None:
        real = mask[:, mask.shape[1] - labels.shape[1] :].to(labels.device).bool()
        labels = labels.masked_fill(~real, IGNORED)
        labels[:, 1:].masked_fill_(~real[:, :-1], IGNORED)
    target, scores = labels[:, 1:].reshape(-1), logits[:, :-1].float().flatten(0, 1)
    if items is None:
        return F.cross_entropy(scores, target, ignore_index=IGNORED)
    total = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def with_loss(out: Any, logits: Tensor, labels: Tensor, mask: Tensor | None, items: Tensor | int | None) -> Any:
    """What `forward` returns (a tuple, or an output of transformers) with the loss in the first place."""
    loss = causal_loss(logits, labels, mask, items)
    return (loss, *out) if isinstance(out, tuple) else type(out)(**{**out, "loss": loss})
