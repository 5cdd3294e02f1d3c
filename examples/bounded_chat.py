# %% [markdown]
# # A chat whose cache stays bounded
# However long the conversation is, each head keeps at most 128 tokens: the first ones, and the newest. This runs offline
# on a CPU with the small model, which is no chat model: the answers mean nothing, the memory does.
# On the command line: `kvrewrite chat DIR`.

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model

MODEL = small_model()  # or the directory of a chat model
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
small = kvrewrite.transform(model, policy="streaming_llm", budget=128, chunk=32)

# %% [markdown]
# A chat model's tokenizer has a template of its own; the small model's has none.

# %%
turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
tokenizer.chat_template = tokenizer.chat_template or turn + "{% if add_generation_prompt %}assistant:{% endif %}"
talk = kvrewrite.chat(small, tokenizer)

# %%
for n in range(1, 7):
    talk.ask(f"The magic number of box {n} is {n * 111}. Tell me a story about it.", max_new_tokens=8, do_sample=False)
    slots = max(int(slots.max()) for slots in talk.cache.live_slots().values())
    print(f"{max(talk.cache.seen):4} tokens so far, {slots:3} kept per head: {talk.memory()}")
    assert slots <= 128
