"""A document as a file: the time to the first answer from it, in another process, beside computing the document again.

    python -m benchmarks.saved_document DIR [--tokens 7000] [--text FILE] [--device cuda] [--repeats 3]

DIR is a converted directory. Prefills a text (--text: the first tokens of a file; without it random ids), saves the cache, and
starts a process that loads the model and the file and answers a question of 16 tokens with 16 tokens; it checks that the logits
of the question and the ids of the answer are those of the first process, bit for bit. Prints one JSON line: `prefill_s`,
`save_s`, `load_s` (the file into pages, its checks included), `first_s` (the question's logits), `answer_s` (the whole answer),
`file_bytes`, `full_bytes` (a full cache of the text). Times are the least of the repeats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASK = """
import json, sys, torch, kvrewrite
from benchmarks.saved_document import answered, least, question
folder, directory, device, repeats = sys.argv[1:]
model = kvrewrite.load(directory, device=device)
ids = question(model)
load_s, cache = least(model, int(repeats), lambda: kvrewrite.load_cache(model, f"{folder}/doc.kvcache"))
first_s, logits = least(model, int(repeats), lambda: model(ids, cache=cache.fork()).logits)
answer_s, answer = least(model, int(repeats), lambda: answered(model, cache))
expected = torch.load(f"{folder}/expected.pt")
same = torch.equal(logits.cpu(), expected["logits"]) and torch.equal(answer.cpu(), expected["answer"])
print(json.dumps({"load_s": load_s, "first_s": first_s, "answer_s": answer_s, "same_bits": same}))
"""


def question(model: Any) -> Any:
    """16 ids, the same everywhere."""
    import torch

    return (torch.arange(16, device=model.device)[None] * 7 + 3) % model.program.vocab_size


def answered(model: Any, cache: Any) -> Any:
    """The ids of 16 tokens that answer the question, (1, 16)."""
    import torch

    text = torch.cat([cache.ids().to(model.device), question(model)], 1)
    out = model.generate(text, cache=cache.fork(), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    return out[:, text.shape[1] :]


def document(model: Any, directory: str, tokens: int, text: Path | None) -> Any:
    """The ids of the document, (1, tokens)."""
    import torch

    from kvrewrite.artifact.companions import read_tokenizer

    if text is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.program.vocab_size, (1, tokens), generator=generator)
    else:
        ids = read_tokenizer(directory)(text.read_text()[: 16 * tokens], return_tensors="pt")["input_ids"][:, :tokens]
        if ids.shape[1] < tokens:
            raise SystemExit(f"{text} has {ids.shape[1]} tokens, expected at least --tokens {tokens}")
    return ids.to(model.device)


def least(model: Any, repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest run, and its result; one more run warms up."""
    import torch

    found, result = [], run()
    for _ in range(repeats):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = run()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return round(min(found), 4), result


def main() -> None:
    """Parses arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    import torch

    import kvrewrite
    from kvrewrite.analysis.memory import carried_bytes, plan_memory

    model = kvrewrite.load(given.directory, device=given.device)
    ids = document(model, given.directory, given.tokens, given.text)
    carried = carried_bytes(model.program.layout)
    full = plan_memory(model.sites, model.policy, model.dtype.itemsize, given.tokens, 1, carried).full
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doc.kvcache"
        prefill_s, cache = least(model, given.repeats, lambda: model.prefill(ids))
        save_s, _ = least(model, given.repeats, lambda: cache.save(path, force=True))
        logits = model(question(model), cache=cache.fork()).logits
        expected = {"logits": logits.cpu(), "answer": answered(model, cache).cpu()}
        torch.save(expected, Path(folder) / "expected.pt")
        command = [sys.executable, "-c", ASK, folder, given.directory, given.device, str(given.repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size = path.stat().st_size
    measured = {"tokens": given.tokens, "policy": model.program.policy["name"], "device": given.device}
    measured |= {"prefill_s": prefill_s, "save_s": save_s, "file_bytes": size, "full_bytes": full}
    print(json.dumps(measured | json.loads(done.stdout.splitlines()[-1])))


if __name__ == "__main__":
    main()
