# %% [markdown]
# # A policy of your own
# A policy is a frozen dataclass. Its fields are its options, and `score` says what a token is worth: those with the
# lowest scores go first. This one keeps the tokens with the largest keys, and a recent window.

# %%
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvrewrite
from kvrewrite.policies import Policy, register


@register
@dataclass(frozen=True, kw_only=True)
class LargestKeys(Policy):
    """Scores a token by the norm of its key; never evicts the window's tokens."""

    name = "largest_keys"
    summary = "largest keys + recent window"
    source = "an example"
    budget: int | None = 64
    chunk: int | None = 32
    window: int = 8

    @property
    def recent(self) -> int:
        """Returns the number of newest slots that are never evicted."""
        return self.window

    def score(self, site):
        """site.k: the new tokens' keys (rows, kv heads, tokens, channels); returns (rows, kv heads, tokens) in fp32."""
        return site.k.norm(dim=-1).float()


# %% [markdown]
# A model with random weights is enough to see what stays. `from_pretrained("DIRECTORY")` gives a real one.

# %%
torch.manual_seed(0)
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
small = kvrewrite.transform(LlamaForCausalLM(config).eval(), policy="largest_keys", budget=48, window=16)

# %%
cache = small.new_cache()
small(torch.randint(0, 256, (1, 150)), cache=cache)
kept = cache.positions()[0][0][0]
print(f"layer 0, head 0 keeps {len(kept)} of 150 tokens: {kept}")
assert len(kept) == 48
assert kept[-16:] == list(range(134, 150))
