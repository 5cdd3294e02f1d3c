"""Writes training data for the policies of the small model: one JSON line a text, {"prompt", "answer", "task"},
{"context", "turns", "task"} or {"text"}.

    python examples/policy_training_data.py locret.jsonl --count 8000 --tokens 2048
    python examples/policy_training_data.py few_shot.jsonl --count 20000 --tokens 512 --tasks few_shot_rare --form turns

A prompt is a task's context. An answer is one or several questions with their replies: every one of them may be asked
later, so a retaining head has to keep what any of them needs. Seeds begin where those of `kvrewrite eval` (0 to a few
thousand a task) never come. `--fillers` and `--tasks` leave kinds of text out, so that they can be held out for the
evaluation. Without a file, one short text of each task is printed.
"""

import argparse
import json
import multiprocessing
import random
from functools import cache, partial
from pathlib import Path
from typing import Any

from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation import tasks

FIRST_SEED = 10**9
KNOWN = [name for name in tasks.TASKS if name not in tasks.UNKNOWN_TO_SMALL]


@cache
def length_of() -> Any:
    """Returns a function for the lengths of pieces in the small model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model())
    known: dict[str, int] = {}

    def length(piece: str) -> int:
        if piece not in known:
            known[piece] = len(tokenizer(piece, add_special_tokens=False)["input_ids"])
        return known[piece]

    return length


def text(number: int, names: list[str], fillers: list[str], tokens: list[int], questions: int, form: str) -> str:
    """Returns one JSON line. A task that does not fit its length is drawn again."""
    rng = random.Random(FIRST_SEED + number)
    while True:
        task, size = rng.choice(names), rng.choice(tokens)
        try:
            document = tasks.draft(
                task,
                tokens=size - 1,  # <bos>
                rng=rng,
                length=length_of(),
                questions=questions,
                replies=True,
                filler=rng.choice(fillers),
            )
            break
        except ValueError:
            continue
    prompt = "".join(document.context)
    asked = ["".join(q.pieces) + "".join(q.target) for q in document.questions]
    if form == "turns":
        turns = [["".join(q.pieces), "".join(q.target)] for q in document.questions]
        return json.dumps({"context": prompt, "turns": turns, "task": task})
    if form == "text":
        return json.dumps({"text": prompt + "".join(part + "<eos>" for part in asked), "task": task})
    if questions == 1:  # the question is part of the prompt, and only the reply is learned
        question = document.questions[0]
        prompt, asked = prompt + "".join(question.pieces), ["".join(question.target)]
    return json.dumps({"prompt": prompt, "answer": "<eos>".join(asked), "task": task})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=4000, help="texts")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="lengths, drawn for each text")
    parser.add_argument("--tasks", nargs="+", default=KNOWN, choices=list(tasks.TASKS))
    parser.add_argument("--fillers", nargs="+", default=["noise", "prose", "code"], choices=["noise", "prose", "code"])
    parser.add_argument("--questions", type=int, default=16, help="at most so many a text; 1: it ends the prompt")
    parser.add_argument(
        "--form",
        default="answer",
        choices=["answer", "turns", "text"],
        help='{"prompt", "answer"}; {"context", "turns"}, where only the replies are learned; or {"text"}',
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first text; others give other texts")
    parser.add_argument("--workers", type=int, default=None)
    args = parser.parse_args()
    make = partial(
        text, names=args.tasks, fillers=args.fillers, tokens=args.tokens, questions=args.questions, form=args.form
    )
    if args.out is None:
        for task in args.tasks:
            print(text(args.first, [task], args.fillers, [256], args.questions, args.form), end="\n\n")
        return
    numbers = range(args.first, args.first + args.count)
    with multiprocessing.Pool(args.workers) as pool, args.out.open("w", encoding="utf-8") as file:
        for line in pool.imap(make, numbers, chunksize=16):
            file.write(line + "\n")
    print(f"{args.out}: {args.count} texts, {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
