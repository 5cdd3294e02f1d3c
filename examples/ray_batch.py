"""Answers the prompts of a JSONL file with replicas of a converted model, by Ray Data (docs/batching.md).

    python examples/ray_batch.py --model DIR --input prompts.jsonl --output OUT --replicas 4 --gpus-per-replica 1

Each line of the input has a unique "id" and a "prompt", both texts. OUT/answers gets JSONL files with id, answer, finish
("stop", "length" or "error"), tokens (of the answer) and error. Answers are greedy; each is the one that its prompt has alone.
Ray gives the prompts to the replicas, starts those again that fail, and notes in OUT/done what was written: the same command
goes on where it was interrupted. Ray uses the cluster of RAY_ADDRESS, or this machine. All nodes need kvrewrite and the paths.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import torch

import kvrewrite
from kvrewrite.artifact.companions import read_tokenizer
from kvrewrite.artifact.directory import read_manifest
from kvrewrite.cli.options import parse_bytes
from kvrewrite.errors import KVRewriteError, PoolFull
from kvrewrite.runtime.batch import Batch, Running

INPUT = pa.schema({"id": pa.string(), "prompt": pa.string()})
FIELDS = {"answer": pa.string(), "finish": pa.string(), "tokens": pa.int64(), "error": pa.string()}
OUTPUT = pa.schema({"id": pa.string(), **FIELDS})


class Answer:
    """A prompt and its answer so far. error: why there is none."""

    def __init__(self, ids: list[int]):
        self.ids = ids
        self.tokens: list[int] = []
        self.running: Running | None = None
        self.finish: str | None = None
        self.error: str | None = None


class Replica:
    """Loads the model once; answers many prompts at once from one pool of pages."""

    def __init__(self, model: str, gpu: bool, memory: int | None, max_new_tokens: int):
        self.tokenizer = read_tokenizer(model)
        self.model = kvrewrite.load(model, device="cuda" if gpu else "cpu")
        if gpu:
            self.model.compile()  # static decoding: a step is one launch
        if gpu and memory is None:
            memory = int(0.8 * torch.cuda.mem_get_info()[0])
        self.batch = Batch(self.model, memory=memory)
        ends = self.model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or [])
        self.max_new_tokens = max_new_tokens

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Answers some rows of the input; Ray Data calls this."""
        answers = [Answer(self.tokenizer(prompt)["input_ids"]) for prompt in rows["prompt"].to_pylist()]
        self.run(answers)
        texts = [self.tokenizer.decode(a.tokens, skip_special_tokens=True) for a in answers]
        columns = {
            "id": rows["id"],
            "answer": [None if a.error else text for a, text in zip(answers, texts)],
            "finish": [a.finish for a in answers],
            "tokens": [len(a.tokens) for a in answers],
            "error": [a.error for a in answers],
        }
        return pa.table(columns, schema=OUTPUT)

    def run(self, answers: list[Answer]) -> None:
        """Computes prompts, the longest first, as long as there are pages; then one token of each at a time. Where pages run
        out, the youngest begins again once another one has ended."""
        waiting, rows = deque(sorted(answers, key=lambda a: -len(a.ids))), list[Answer]()
        most = len(answers)  # at once
        while waiting or rows:
            prompting = bool(waiting) and len(rows) < most
            if prompting:
                rows.append(waiting.popleft())
            try:
                if prompting:
                    self.prompt(rows[-1])
                else:
                    self.step(rows)
            except PoolFull:
                if len(rows) == 1:
                    raise
                youngest = rows.pop()
                self.end(youngest)
                youngest.tokens = []
                waiting.appendleft(youngest)
                most = len(rows)
            for answer in [a for a in rows if a.finish]:
                self.end(answer)
                rows.remove(answer)

    def prompt(self, answer: Answer) -> None:
        """The first token of an answer."""
        try:
            answer.running = self.batch.start(answer.ids, max_length=len(answer.ids) + self.max_new_tokens)
        except KVRewriteError as error:  # this prompt can't be taken: empty, too long, ...
            answer.finish, answer.error = "error", str(error)
            return
        logits = None
        while logits is None:
            logits = self.batch.advance(answer.running)
        self.take(answer, int(logits.argmax()))

    def step(self, rows: list[Answer]) -> None:
        """The next token of these answers."""
        for answer in rows:
            if answer.running.no_room():  # the model has no more positions
                answer.finish = "length"
        going = [a for a in rows if not a.finish]
        if not going:
            return
        logits = self.batch.decode([a.running for a in going], [a.tokens[-1] for a in going])
        for answer, token in zip(going, logits.argmax(-1).tolist()):
            self.take(answer, token)

    def take(self, answer: Answer, token: int) -> None:
        """An answer gets a token."""
        answer.tokens.append(token)
        if token in self.ends:
            answer.finish = "stop"
        elif len(answer.tokens) == self.max_new_tokens:
            answer.finish = "length"

    def end(self, answer: Answer) -> None:
        """Gives an answer's pages back."""
        if answer.running is not None:
            self.batch.end(answer.running)
            answer.running = None


def check_input(path: Path) -> int:
    """How many rows a file has. Exits where one is wrong, before any work."""
    seen: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SystemExit(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in INPUT.names):
                raise SystemExit(f'{path}:{number}: expected an object with "id" and "prompt", both texts')
            if row["id"] in seen:
                raise SystemExit(f"{path}:{number}: the id {row['id']!r:.80} was there before; ids have to be unique")
            seen.add(row["id"])
    return len(seen)


def main() -> None:
    """Runs the job."""
    try:
        import ray.data
        from ray.data.checkpoint import CheckpointConfig
    except ImportError as error:
        raise SystemExit(f"this example needs Ray ({error}): pip install 'ray[data]'") from error
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory that kvrewrite convert wrote")
    parser.add_argument("--input", type=Path, required=True, help="a JSONL file")
    parser.add_argument("--output", type=Path, required=True, help="a directory, which every node can write to")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0, help="0 (CPU) to 1; a part: replicas share a GPU")
    parser.add_argument("--cpus-per-replica", type=float, default=1, help="beside these Ray needs two")
    parser.add_argument(
        "--memory", help="for the pages of a replica, such as 8GiB; default: 80%% of what is free on its GPU"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--rows", type=int, default=64, help="prompts that a replica is given at a time, and runs at once"
    )
    args = parser.parse_args()
    for name in ("replicas", "max_new_tokens", "rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if not 0 <= args.gpus_per_replica <= 1:
        parser.error(
            f"--gpus-per-replica is {args.gpus_per_replica:g}, expected 0 to 1: a batch needs a model on one device"
        )
    if 0 < args.gpus_per_replica < 1 and args.memory is None:
        parser.error("replicas that share a GPU need --memory")
    try:
        memory = None if args.memory is None else parse_bytes(args.memory, "--memory")
        read_manifest(args.model)
        count = check_input(args.input)
    except (KVRewriteError, OSError) as error:
        raise SystemExit(str(error)) from error
    if not count:
        raise SystemExit(f"{args.input} has no rows")

    if not ray.is_initialized():
        ray.init()
    has = ray.cluster_resources()
    need = {"CPU": args.replicas * args.cpus_per_replica + 2, "GPU": args.replicas * args.gpus_per_replica}
    for kind, number in need.items():
        if number > has.get(kind, 0):
            print(f"waits until Ray has {number:g} {kind}s: now it has {has.get(kind, 0):g}", file=sys.stderr)
    output = args.output.resolve()
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        "id", str(output / "done"), delete_checkpoint_on_success=False
    )
    options = pyarrow.json.ParseOptions(explicit_schema=INPUT, unexpected_field_behavior="ignore")
    prompts = ray.data.read_json(str(args.input.resolve()), parse_options=options, file_extensions=None)
    answers = prompts.repartition(target_num_rows_per_block=args.rows).map_batches(
        Replica,
        fn_constructor_args=(str(args.model.resolve()), args.gpus_per_replica > 0, memory, args.max_new_tokens),
        batch_size=args.rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=args.replicas),
        num_cpus=args.cpus_per_replica,
        num_gpus=args.gpus_per_replica or None,
    )
    answers.write_json(str(output / "answers"))
    print(f"{count} answers in {output / 'answers'}")


if __name__ == "__main__":
    main()
