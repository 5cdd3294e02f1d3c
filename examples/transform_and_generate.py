"""Rewrites a transformers model in memory, generates beyond its budget, saves it and loads it again."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvrewrite

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
model = LlamaForCausalLM(config).eval()  # random weights; from_pretrained("DIRECTORY") gives a real model

small = kvrewrite.transform(model, policy="streaming_llm", budget=64, chunk=32)
for site in small.sites:
    print(f"layer {site.layer}: {site.heads} heads, {site.kv_heads} kv heads, inserted {', '.join(site.inserted)}")

prompt = torch.randint(0, 256, (2, 200))
cache = small.new_cache(batch_size=2)
tokens = small.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    cache=cache,
    max_new_tokens=16,
    do_sample=False,
    pad_token_id=0,
)
print(f"{tokens.shape[1]} tokens per row; live slots per head: {int(cache.live_slots()[0].max())}; {cache.memory()}")

with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder + "/out")
    again = kvrewrite.load(folder + "/out")
    same = torch.equal(again(prompt[:, :50]).logits, small(prompt[:, :50]).logits)
    print(f"saved and loaded: logits {'identical' if same else 'differ'}")
    assert same
