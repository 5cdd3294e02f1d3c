# %% [markdown]
# # One long document, many questions
# The document is read and compressed once. Each question works on a fork of that cache, so no question sees
# another one, and none reads the document again. This runs offline on a CPU, with the small model that ships with
# kvrewrite.

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation import tasks

MODEL = small_model()  # or a directory of yours: hf download NAME --local-dir MODEL
tokenizer = AutoTokenizer.from_pretrained(MODEL)

# %% [markdown]
# A text of 1,500 tokens with facts in it. With a document of yours: `document = open("report.txt").read()`.

# %%
sample = tasks.make("needle_multikey", tokens=1500, seed=3, tokenizer=tokenizer)
document = sample.context
keys = [part.split(" is ")[0] for part in document.split("The magic number of ")[1:]]
questions = [f"\nQ: The magic number of {key} is" for key in keys[:4]]

# %% [markdown]
# A quarter of the cache is kept. `keydiff` judges tokens by their keys alone: it needs no question to choose.

# %%
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
small = kvrewrite.transform(model, policy="keydiff", budget=0.25)
ids = tokenizer(document, return_tensors="pt").input_ids
cache = small.prefill(ids)
print(f"{ids.shape[1]} tokens read; {cache.memory()}")

# %% [markdown]
# Each question follows the document. What the cache has seen is skipped.

# %%
for question in questions:
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
    text = torch.cat([ids, asked], dim=1)
    out = small.generate(text, cache=cache.fork(), max_new_tokens=8, do_sample=False)
    print(question.strip(), "->", tokenizer.decode(out[0, text.shape[1] :], skip_special_tokens=True).strip())
