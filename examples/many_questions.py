"""One long document, many questions: the document is read and compressed once, and each question works on a fork of its cache.

Runs offline on a CPU with the small model that ships with kvrewrite: python examples/many_questions.py
With a model of yours: python examples/many_questions.py MODEL report.txt "Who signed it?" "When?"
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation import tasks


def document_and_questions(tokenizer) -> tuple[str, list[str]]:
    """What the command line names, or a text of 1,500 tokens with facts in it, and a question about each of some."""
    if len(sys.argv) > 3:
        return Path(sys.argv[2]).read_text(), [f"\n\nQuestion: {q}\nAnswer:" for q in sys.argv[3:]]
    sample = tasks.make("needle_multikey", tokens=1500, seed=3, tokenizer=tokenizer)
    keys = [part.split(" is ")[0] for part in sample.context.split("The magic number of ")[1:]]
    return sample.context, [f"\nQ: The magic number of {key} is" for key in keys[:4]]


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else small_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    small = kvrewrite.transform(model, policy="keydiff", budget=0.25)  # judges keys, not what the text's end asks for

    document, questions = document_and_questions(tokenizer)
    ids = tokenizer(document, return_tensors="pt").input_ids
    cache = small.prefill(ids)
    print(f"{ids.shape[1]} tokens read; {cache.memory().live / 2**20:.2f} MiB are kept")
    for question in questions:
        asked = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
        text = torch.cat([ids, asked], dim=1)  # what the cache has seen is skipped
        out = small.generate(text, cache=cache.fork(), max_new_tokens=8, do_sample=False)
        print(question.strip(), "->", tokenizer.decode(out[0, text.shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
