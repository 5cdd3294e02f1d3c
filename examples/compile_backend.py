"""Eviction without changing code: an ordinary model, its own DynamicCache, torch.compile with the kvrewrite backend."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvrewrite
import kvrewrite.dynamo.backend  # only needed if kvrewrite is not installed: registers the backend's name
from kvrewrite.cache.eviction_cache import CACHE_NAME

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
prompt = torch.randint(0, 256, (2, 100))
settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}

# "inductor": False runs the rewritten graph eagerly, so that this example does not wait for a C++ compiler.
compiled = torch.compile(
    model, backend="kvrewrite", options={"policy": "streaming_llm", "budget": 64, "chunk": 32, "inductor": False}
)
out = compiled.generate(prompt, return_dict_in_generate=True, **settings)
cache = out.past_key_values
print(
    f"{type(cache).__name__}: {out.sequences.shape[1]} tokens per row, {cache.layers[0].keys.shape[-2]} slots per head"
)
assert cache.layers[0].keys.shape[-2] == 64

small = kvrewrite.transform(model, policy="streaming_llm", budget=64, chunk=32)
same = torch.equal(small.generate(prompt, **settings), out.sequences)
print(f"the tokens of kvrewrite.transform: {'identical' if same else 'other ones'}")
assert same

# An EvictionCache holds what a DynamicCache can't: heads with different numbers of slots, quantized slots, windows.
compiled = torch.compile(model, backend="kvrewrite", options={"policy": "adakv", "budget": 48, "inductor": False})
cache = kvrewrite.new_cache(compiled, batch_size=2)
compiled.generate(
    prompt, **{CACHE_NAME: cache}, **settings
)  # cache=cache, or before transformers 5.24 past_key_values=cache
print(f"adakv: layer 0, row 0, slots per head: {cache.live_slots()[0][0].tolist()}; {cache.memory()}")
