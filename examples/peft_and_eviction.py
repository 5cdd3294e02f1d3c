# %% [markdown]
# # A LoRA adapter of peft, and an evicting cache
# The adapter comes first, `transform` last. This runs offline on a CPU; it needs `pip install peft`.

# %%
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation import tasks

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(small_model())
model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)

# %% [markdown]
# A fresh adapter changes nothing, so this one gets small random weights, as a trained one would have.
# With an adapter of yours: `PeftModel.from_pretrained(model, "ADAPTER")`.

# %%
adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
for name, weight in adapted.named_parameters():
    if "lora_B" in name:
        weight.data.mul_(0.01)
small = kvrewrite.transform(adapted, policy="snapkv", budget=128)

# %%
sample = tasks.make("needle_single", tokens=800, seed=5, tokenizer=tokenizer)
ids = tokenizer(sample.context + sample.question, return_tensors="pt").input_ids
for title, runs in (("full cache", adapted), ("128 tokens per head", small)):
    out = runs.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    print(f"{title}: {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()!r}")
print(f"right: {sample.answers[0]}")

# %% [markdown]
# A switched adapter is noticed, not ignored.

# %%
adapted.disable_adapter_layers()
try:
    small.generate(input_ids=ids, max_new_tokens=1)
except kvrewrite.errors.KVRewriteError as error:
    print(f"after the adapter was switched off: {str(error).splitlines()[0]}")
