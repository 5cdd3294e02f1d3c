"""A decoder that is not from transformers, in the style of nanoGPT: it knows nothing about caches."""

import torch
from torch import nn
from torch.nn import functional as F

import kvrewrite


class Block(nn.Module):
    """Causal self-attention and an MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.ln_1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Maps token ids (B, T) to logits (B, T, vocabulary); learned positions."""

    def __init__(self, vocabulary: int = 256, width: int = 64, heads: int = 4, layers: int = 3, longest: int = 256):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


torch.manual_seed(0)
model = GPT().eval()
small = kvrewrite.transform(model, policy="h2o", budget=32)
prompt = torch.randint(0, 256, (1, 100))

difference = (small(prompt[:, :32]).logits - model(prompt[:, :32])).abs().max()
print(f"{len(small.sites)} sites; within the budget the logits differ by at most {difference:.1e}")
assert difference < 1e-4

cache = small.new_cache()
tokens = small.generate(prompt, attention_mask=torch.ones_like(prompt), cache=cache, max_new_tokens=20, do_sample=False)
print(f"{tokens.shape[1]} tokens, {int(cache.live_slots()[0].max())} live slots per head")
assert tokens.shape[1] == 120
