"""A chat whose cache stays bounded, however long it goes on.

Runs offline on a CPU with the small model, which is no chat model: python examples/bounded_chat.py
With one that is: python examples/bounded_chat.py MODEL
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
TURNS = [
    f"The magic number of box {n} is {n * 111}. Remember it, and tell me a story about box {n}." for n in range(1, 9)
]


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else small_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    small = kvrewrite.transform(model, policy="streaming_llm", budget=128, chunk=32)

    talk = kvrewrite.chat(small, tokenizer)
    for turn in TURNS:
        talk.ask(turn, max_new_tokens=12, do_sample=False)
        slots = max(int(slots.max()) for slots in talk.cache.live_slots().values())
        print(f"{max(talk.cache.seen):4} tokens so far, {slots:3} slots a head, {talk.memory().live / 1024:.0f} KiB")
        assert slots <= 128


if __name__ == "__main__":
    main()
