# %% [markdown]
# # Training retaining heads
# Locret's heads learn from a model which tokens later text looks at. This trains them for a few steps, offline on a
# CPU with the small model, to see how it goes; what a real training takes and buys is in docs/training.md.
# It needs `pip install 'kvrewrite[train]'`. On the command line: `kvrewrite train`.

# %%
import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation import tasks
from kvrewrite.tools.training import FitOptions, train

MODEL = small_model()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
folder = tempfile.TemporaryDirectory()
texts, heads = Path(folder.name) / "texts.jsonl", Path(folder.name) / "heads.safetensors"

# %% [markdown]
# Heads learn from rows of a context, a question and its answer. One JSON object per line.

# %%
with texts.open("w") as file:
    for seed in range(8):
        sample = tasks.make("needle_single", tokens=200, seed=seed, tokenizer=tokenizer)
        row = {"context": sample.context, "question": sample.question, "answer": " " + sample.answers[0]}
        file.write(json.dumps(row) + "\n")

# %%
fitting = FitOptions(steps=4, warmup=1, batch_size=2, log_every=1, quiet=True)
options = {"hidden_size": 16, "label": "log_probability"}
trained = train(MODEL, "locret", [texts], heads, options=options, fitting=fitting)
print(f"{trained.trained_parameters:,} parameters trained in {trained.fitted.seconds:.1f} s")

# %% [markdown]
# The heads go into the model directory beside the model's own weights.

# %%
out = Path(folder.name) / "small"
done = kvrewrite.convert(MODEL, out, "locret", policy_weights=heads, budget=0.25, chunk=64)
print(f"converted with them: {done.program.policy['name']}, {len(done.program.sites)} layers")
folder.cleanup()
