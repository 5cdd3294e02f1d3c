"""Computes what retaining heads learn: the causal importance of each prompt token (arXiv 2410.01805, section 4.1).

S[k] of a kv head is the largest pre-softmax logit q_p . k_k * scale over the answer's queries p and the group's query
heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

RECONSTRUCTION = "reconstruction"  # kvrewrite/tools/training/reconstruction.py
LABELS = ("logit", "log_probability", RECONSTRUCTION)
BLOCK = 1 << 27  # logits in memory at once


def answer_index(answer: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the positions of the answers' tokens, (B, A), A the most of any row, and which of them are real, (B, A)
    bool.

    answer: (B, T) bool. Reads A on the host, so call it once per batch.
    """
    count = int(answer.sum(dim=1).max())
    order = torch.argsort(answer.to(torch.int8), dim=1, descending=True, stable=True)[:, :count]
    return order, torch.gather(answer, 1, order)


def causal_importance(
    q: Tensor,
    k: Tensor,
    prompt: Tensor,
    answers: tuple[Tensor, Tensor],
    *,
    scale: float,
    mask: tuple[int, int] = (0, 0),
    kind: str = "logit",
    block: int = BLOCK,
) -> Tensor:
    """Returns S (B, Hkv, T) in fp32; -inf for a token that is not in the prompt, or that no query of the answer sees.

    q (B, H, T, D) and k (B, Hkv, T, D) as they enter attention; prompt: (B, T) bool; answers: from `answer_index`.
    mask: the layer's window and chunk, in tokens (0: none). kind "logit" is the authors' definition. "log_probability"
    (ours) is the logarithm of the attention weight, the logit minus the query's log-sum-exp over all keys that it sees:
    this makes queries and heads comparable. Queries are processed in blocks, so that about `block` logits are in
    memory.
    """
    (window, chunk), (b, heads, t, d) = mask, q.shape
    hkv = k.shape[1]
    best = torch.full((b, hkv, t), -torch.inf, device=q.device)
    order, real = answers
    at = torch.arange(t, device=q.device)
    keys = k.float().transpose(2, 3)[:, :, None]
    step = max(1, block // (b * heads * t))
    for start in range(0, order.shape[1], step):
        index = order[:, start : start + step]
        picked = torch.gather(q, 2, index[:, None, :, None].expand(-1, heads, -1, d)).float()
        logits = picked.view(b, hkv, heads // hkv, -1, d) @ keys * scale  # (B, Hkv, g, a, T)
        seen = at <= index[..., None]
        if window:
            seen &= at > index[..., None] - window
        if chunk:
            seen &= at // chunk == index[..., None] // chunk
        seen &= real[:, start : start + step, None]
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
        if kind == "log_probability":
            total = logits.logsumexp(dim=-1, keepdim=True)
            logits = torch.where(logits == -torch.inf, logits, logits - total)
        best = torch.maximum(best, logits.amax(dim=(2, 3)))
    return best.masked_fill(~prompt[:, None], -torch.inf)
