"""KVzip as a teacher: what a repetition of the text looks up in it (arXiv 2505.23416), as labels for retaining heads.

A text and its repetition go through the model together, one after the other, which is what the policy `kvzip` does with
prompts of one part and nothing asked. Longer texts than a part of the policy's are labelled as one part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.attention.reference import largest_weights
from kvrewrite.kernels.groups import Logits, Placed, Tokens

LEAST = 1e-6  # of a weight, before its logarithm


class Repeated(NamedTuple):
    """Texts (B, T) with their repetitions: ids (B, W); text, again (B, W) bool: which tokens are the text's, and which
    repeat it; queries (B, Q): places of the latter; counts (B, Q) bool: which of these are real."""

    ids: Tensor
    text: Tensor
    again: Tensor
    queries: Tensor
    counts: Tensor


def repeat(input_ids: Tensor, real: Tensor, first: int) -> Repeated:
    """Each row's real tokens, left-aligned, and then those from number `first` on once more. Reads lengths on the host."""
    lengths = real.sum(1, keepdim=True)
    more = (lengths - first).clamp(min=0)
    place = torch.arange(int((lengths + more).max()), device=input_ids.device).expand(len(input_ids), -1)
    text, again = place < lengths, (place >= lengths) & (place < lengths + more)
    source = torch.where(again, place - lengths + first, place.minimum(lengths - 1))
    number = torch.arange(int(more.max()), device=input_ids.device).expand(len(input_ids), -1)
    counts = number < more
    return Repeated(torch.gather(input_ids, 1, source), text, again, torch.where(counts, lengths + number, 0), counts)


def reconstruction_label(
    site: AttentionSite, q: Tensor, k: Tensor, texts: Repeated, sinks: Tensor | None = None, alibi: Tensor | None = None
) -> Tensor:
    """The logarithm of KVzip's score of each token, (B, Hkv, W) fp32: of the largest softmax weight that any token of the
    repetition gives it, in any head of the group. -inf for what is no token of the text, and what no query sees.

    q (B, H, W, D), k (B, Hkv, W, D) of texts and repetitions as they enter attention; sinks, alibi (H,): the layer's own.
    In blocks of queries.
    """
    (b, hkv, w, _), places = k.shape, texts.queries[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    at = torch.arange(w, device=q.device).expand(b, hkv, w)
    placed = Placed(texts.queries, at, (texts.text | texts.again)[:, None].expand(b, hkv, w))
    how = Logits(sinks, alibi, None, site.scale, site.softcap, site.window, site.chunk)
    weights = largest_weights(Tokens(torch.gather(q, 2, places), k, k), placed, how, texts.counts)
    unseen = ~texts.text[:, None] | (weights == 0 if site.window or site.chunk else weights < 0)
    return weights.clamp(min=LEAST).log().masked_fill(unseen, -torch.inf)
