"""A LoRA adapter of peft and an evicting cache: the adapter comes first, `transform` last.

Runs offline on a CPU: python examples/peft_and_eviction.py (needs peft: pip install 'kvrewrite[train]').
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation import tasks


def main() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    # Weights that a real adapter would have learned; those of a fresh one change nothing.
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.01)

    small = kvrewrite.transform(adapted, policy="snapkv", budget=128)
    sample = tasks.make("needle_single", tokens=800, seed=5, tokenizer=tokenizer)
    ids = tokenizer(sample.context + sample.question, return_tensors="pt").input_ids
    for title, runs in (("full cache", adapted), ("128 slots a head", small)):
        out = runs.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        print(f"{title}: {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()!r}")
    print(f"right: {sample.answers[0]}")

    adapted.disable_adapter_layers()  # a switched adapter is noticed, not ignored
    try:
        small.generate(input_ids=ids, max_new_tokens=1)
    except kvrewrite.errors.KVRewriteError as error:
        print(f"after the adapter was switched off: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
