"""Decodes 10,000 tokens with streaming_llm: memory and time per token stay constant."""

import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvrewrite

torch.set_num_threads(1)  # the model is tiny
torch.manual_seed(0)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
small = kvrewrite.transform(LlamaForCausalLM(config).eval(), policy="streaming_llm", budget=64)
cache = small.new_cache()
logits = small(torch.randint(0, 256, (1, 100)), cache=cache, logits_to_keep=1).logits
first = cache.memory()
times: list[float] = []
for step in range(1, steps + 1):
    start = time.perf_counter()
    logits = small(logits[:, -1:].argmax(-1), cache=cache, logits_to_keep=1).logits
    times.append(time.perf_counter() - start)
    if step % (steps // 5) == 0:
        median = statistics.median(times[-(steps // 5) :]) * 1e3
        print(f"{step:6} tokens decoded, position {cache.seen[0]}: {median:.2f} ms per token, {cache.memory()}")
    assert cache.memory() == first, "the cache grew"
