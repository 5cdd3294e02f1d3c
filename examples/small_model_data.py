"""Makes the tokenizer and the training texts of the small model (see train_small_model.py) in worker processes.

Run it to read one training text per task.
"""

import multiprocessing
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvrewrite.tools.evaluation import noise, tasks
from kvrewrite.tools.evaluation.words import ADJECTIVES, NOUNS

BOS, EOS, PAD = 0, 1, 2
KINDS = ["copy", "text", *tasks.TASKS]
# Words with the space before them, one or two digits likewise, runs of punctuation, blanks up to the last one.
SPLIT = r" ?\p{L}+| ?[0-9]{1,2}| ?[^\s\p{L}0-9]+|\s+(?!\S)|\s+"
# Percentage of each kind of text in training; copies are set per stage.
MIX = {
    "text": 4,
    "needle_single": 4,
    "needle_multikey": 14,
    "needle_distractors": 15,
    "needle_multivalue": 12,
    "needle_multiquery": 7,
    "kv_retrieval": 15,
    "variable_tracking": 9,
    "common_words": 11,
    "frequent_words": 6,
    "few_shot": 3,
}


def train_tokenizer(vocabulary: int) -> Tokenizer:
    """Trains byte-level BPE on the filler's text and the tasks' words and pairs of digits, so that each becomes one
    token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    often = "".join(f" {word}" for word in ADJECTIVES + NOUNS) + "".join(f" {n:02}x{n:02}" for n in range(100))
    often += "".join(noise.NOISE)
    text = [*noise.prose(), *noise.code()]
    tokenizer.train_from_iterator([often] * 4000 + text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


class Pieces(dict[str, list[int]]):
    """Token ids of pieces of text, each tokenized once."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        for piece, encoding in zip(
            known := [*noise.prose(), *noise.code()],
            tokenizer.encode_batch(known, add_special_tokens=False),
            strict=True,
        ):
            self[piece] = encoding.ids

    def __missing__(self, piece: str) -> list[int]:
        ids = self.tokenizer.encode(piece, add_special_tokens=False).ids
        self[piece] = ids
        return ids

    def length(self, piece: str) -> int:
        return len(self[piece])


@dataclass
class Example:
    """A training text: token ids, the indices whose next token is part of a reply, and those of ordinary text."""

    kind: int
    ids: list[int]
    replies: list[int]
    text: list[int]


def copy_example(rng: random.Random, tokens: int, vocabulary: int) -> Example:
    """Returns random tokens, repeated until the text is full; part of the repetition counts as the reply."""
    size = rng.randint(8, max(8, tokens // 2 - 1))
    part = [rng.randrange(3, vocabulary) for _ in range(size)]
    ids = ([BOS] + part * (tokens // size + 1))[:tokens]
    return Example(0, ids, [rng.randrange(size + 1, tokens - 1) for _ in range(16)], [])


def text_example(rng: random.Random, tokens: int, pieces: Pieces) -> Example:
    """Returns consecutive lines of prose or code."""
    lines = rng.choice([lines for lines in (noise.prose(), noise.code()) if lines])
    at = rng.randrange(len(lines))
    ids = [BOS]
    while len(ids) < tokens:
        ids += pieces[lines[at % len(lines)]]
        at += 1
    return Example(1, ids[:tokens], [], list(range(tokens - 1)))


def task_example(rng: random.Random, task: str, tokens: int, pieces: Pieces) -> Example:
    """Returns a task's context, then questions with replies that end with <eos>; one text in ten starts with a
    question."""
    first = rng.random() < 0.1
    document = tasks.draft(
        task,
        tokens=tokens - 1 - (40 if first else 0),
        rng=rng,
        length=pieces.length,
        questions=4 + tokens // 90,
        replies=True,
    )
    ids = [BOS]
    text: list[int] = []
    replies: list[int] = []
    if first:
        for piece in document.questions[0].pieces:
            ids += pieces[piece]
    for piece in document.context:
        new = pieces[piece]
        if len(new) > 2:
            text += range(len(ids), len(ids) + len(new) - 1)
        ids += new
    for question in document.questions:
        for piece in question.pieces:
            ids += pieces[piece]
        start = len(ids)
        for piece in question.target:
            ids += pieces[piece]
        ids.append(EOS)
        replies += range(start - 1, len(ids) - 1)
    return Example(KINDS.index(task), ids, replies, text)


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum: (tokens, share of batches), and the percentage of copies."""

    lengths: tuple[tuple[int, float], ...]
    copies: float


@dataclass
class Batch:
    """A batch of texts: `at` and `text` are indices into the flattened ids; the next tokens there are replies or
    ordinary text.

    ids (B, T) uint16; at (R,) int32 with weight (R,) float32 and kind (R,) uint8, padded with weight 0; text (X,)
    int32.
    """

    ids: np.ndarray
    at: np.ndarray
    weight: np.ndarray
    kind: np.ndarray
    text: np.ndarray


def make_batch(rng: random.Random, stage: Stage, size: int, vocabulary: int, pieces: Pieces) -> Batch:
    """Makes about `size` tokens of one length; R = size / 8 and X = size / 16 are fixed, so that nothing is
    recompiled."""
    tokens = rng.choices([t for t, _ in stage.lengths], [s for _, s in stage.lengths])[0]
    rows, most = size // tokens, size // 8
    ids = np.full((rows, tokens), PAD, np.uint16)
    at, weight, kinds, text = [], [], [], []
    names, shares = list(MIX), list(MIX.values())
    for row in range(rows):
        long = tokens if rng.random() < 0.7 else rng.randint(tokens // 2, tokens)
        if rng.random() * 100 < stage.copies:
            example = copy_example(rng, long, vocabulary)
        else:
            task = rng.choices(names, shares)[0]
            if task == "text":
                example = text_example(rng, long, pieces)
            else:
                try:
                    example = task_example(rng, task, long, pieces)
                except ValueError:  # too short for this task
                    example = task_example(rng, "needle_multikey", tokens, pieces)
        ids[row, : len(example.ids)] = example.ids
        base = row * tokens
        count = len(example.replies)
        at += [base + place for place in example.replies]
        weight += [max(count, 1) ** -0.75] * count  # a text's weight grows with its replies, but slowly
        kinds += [example.kind] * count
        text += [base + place for place in rng.sample(example.text, min(len(example.text), 2 * size // 16 // rows))]
    order = np.array(rng.sample(range(len(at)), min(len(at), most)), np.int64)
    pad = most - len(order)
    text = rng.choices(text, k=size // 16) if text else [0] * (size // 16)
    return Batch(
        ids,
        np.pad(np.array(at, np.int32)[order], (0, pad)),
        np.pad(np.array(weight, np.float32)[order], (0, pad)),
        np.pad(np.array(kinds, np.uint8)[order], (0, pad)),
        np.array(text, np.int32),
    )


def _work(seed, stages, stage, size, vocabulary, queue, pieces):
    rng = random.Random(f"train:{seed}")
    while True:
        queue.put(make_batch(rng, stages[stage.value], size, vocabulary, pieces))


class Feeder:
    """Worker processes that keep a queue of batches full. Start it before using the GPU (it forks)."""

    def __init__(self, tokenizer_file: Path, stages: list[Stage], size: int, vocabulary: int, workers: int, seed: int):
        context = multiprocessing.get_context("fork")
        self.stage = context.Value("i", 0)
        self.queue = context.Queue(maxsize=2 * workers)
        pieces = Pieces(Tokenizer.from_file(str(tokenizer_file)))  # filled once, shared by all workers
        self.workers = [
            context.Process(
                target=_work,
                args=(f"{seed}:{i}", stages, self.stage, size, vocabulary, self.queue, pieces),
                daemon=True,
            )
            for i in range(workers)
        ]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for worker in self.workers:
            worker.start()

    def next(self) -> Batch:
        return self.queue.get()

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()


class ExamTokenizer:
    """What `tasks.make` needs from a transformers tokenizer, without transformers."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}


def exam_paper(tokenizer: Tokenizer, task: str, tokens: int, seeds: range) -> list[tuple[tasks.Sample, list[int], int]]:
    """Returns samples of `tasks.make` with the ids of prompt, reply and <eos>, and the index where the reply starts."""
    wrapped = ExamTokenizer(tokenizer)
    paper = []
    for seed in seeds:
        sample = tasks.make(task, tokens=tokens, seed=seed, tokenizer=wrapped)
        prompt = wrapped(sample.context + sample.question)["input_ids"]
        paper.append(
            (sample, [*prompt, *wrapped(sample.target, add_special_tokens=False)["input_ids"], EOS], len(prompt))
        )
    return paper


if __name__ == "__main__":  # prints what the model reads: one short training text per task
    pieces = Pieces(train_tokenizer(2048))
    for name in tasks.TASKS:
        ids = task_example(random.Random(0), name, 256, pieces).ids
        print(f"--- {name}, {len(ids)} tokens", pieces.tokenizer.decode(ids, skip_special_tokens=False), sep="\n")
