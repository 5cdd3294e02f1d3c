"""Mutations of the two JSON files of a model directory, resigned as an attacker would, and what comes of loading them.

    python -m tests.support.fuzz_files FIRST COUNT

runs so many seeds from the first on and prints the counts; `test_fuzz_files.py` runs the same.
"""

from __future__ import annotations

import collections
import copy
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.errors import ArtifactError, InputError
from kvrewrite.ir.allow_list import ATEN, BUILTINS, KVREWRITE

SECONDS = 60.0  # of the process, far more than any should take
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("h2o", {"budget": 64}),
    ("streaming_llm", {"budget": 64, "positions": "contiguous"}),
    ("h2o", {"budget": 192, "quantize": "int8", "quantize_residual": 64}),
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 64, 65, 255, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 64, 0.5,
    -0.0, 1e308, "", "x", "d0", "d1", "bfloat16", "int64", "input_ids", "../x", "\u0000", "ä" * 300, [], {}, [[]], [0], [1, -1],
    {"node": "input_ids"}, {"tuple": []}, {"float": "nan"}, {"dtype": "float32"}, {"slice": [None, None, None]},
    {"device": "model"},
]  # fmt: skip
OPS = sorted(
    [*(f"kvrewrite.{n}.default" for n in KVREWRITE), *BUILTINS]
    + [str(getattr(getattr(torch.ops.aten, n), o)) for n in ATEN for o in getattr(torch.ops.aten, n).overloads()]
)


def make_models(folder: Path, base: Path) -> list[Path]:
    """A model with different policies."""
    made = []
    for i, (policy, options) in enumerate(POLICIES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kvrewrite.convert(base, folder / str(i), policy, **options)
        made.append(folder / str(i))
    return made


def resign(body: dict[str, Any]) -> bytes:
    """The text of a manifest with the right hash; of one that has none, as it is."""
    body = {k: v for k, v in body.items() if k != "manifest_sha256"}
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        return json.dumps({**body, "manifest_sha256": hashlib.sha256(text).hexdigest()}).encode()
    except UnicodeEncodeError:
        return json.dumps(body).encode()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of decoded JSON."""
    found, todo = [], [value]
    while todo:
        at = todo.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            found.append((at, key))
            todo.append(at[key])
    return found


def walk(data: Any, pick: random.Random) -> tuple[Any, Any]:
    """A (container, key), such that places near the root come up as well as those deep in it."""
    at, key = data, pick.choice(list(data))
    while isinstance(inner := at[key], (dict, list)) and inner and pick.random() < 0.9:
        at, key = inner, pick.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    return at, key


def mutate(data: Any, pick: random.Random) -> None:
    """One change somewhere."""
    if not data:  # an earlier change took the last key
        return
    at, key = walk(data, pick)
    value, kind = at[key], pick.randrange(10)
    if kind == 0 and isinstance(at, dict):
        del at[key]
    elif kind == 1 and isinstance(at, list):
        at.insert(pick.randrange(len(at) + 1), copy.deepcopy(value))
    elif kind == 2 and isinstance(at, list):
        other = pick.randrange(len(at))
        at[key], at[other] = at[other], at[key]
    elif kind == 3 and isinstance(at, list):
        del at[key]
    elif kind <= 6 and type(value) in (int, float):
        at[key] = pick.choice([value + 1, value - 1, value * 2, -value, value // 2, value + 64, value * 1000, 0])
    elif kind <= 7:  # another value of the same kind from the file
        alike = [(a, k) for a, k in places(data) if type(a[k]) is type(value)]
        a, k = pick.choice(alike)
        at[key] = copy.deepcopy(a[k])
    elif kind == 8 and isinstance(value, str):
        at[key] = pick.choice(OPS)
    elif kind == 9 and isinstance(at, dict):
        at[pick.choice(["x", "device", "val", "meta", "kwargs", "dtype", "shape", "node"])] = copy.deepcopy(value)
    else:
        at[key] = copy.deepcopy(pick.choice(VALUES))


def scramble(text: bytes, pick: random.Random) -> bytes:
    """One change of the text itself."""
    at, kind = pick.randrange(len(text)), pick.randrange(3)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + bytes([pick.randrange(256)]) + text[at + 1 :]
    return text[:at] + text[pick.randrange(len(text)) :]


def attack(source: Path, target: Path, seed: int) -> None:
    """Makes a directory like `source` with one or several changes in graph.json or kvrewrite.json, and hashes that fit."""
    pick = random.Random(seed)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=os.link)
    manifest = json.loads((source / "kvrewrite.json").read_text())
    (target / "kvrewrite.json").unlink()
    if pick.random() < 0.6:
        text = (source / "graph.json").read_bytes()
        if pick.random() < 0.1:
            text = scramble(text, pick)
        else:
            graph = json.loads(text)
            for _ in range(pick.choice([1, 1, 1, 2, 4])):
                mutate(graph, pick)
            text = json.dumps(graph).encode()
        (target / "graph.json").unlink()
        (target / "graph.json").write_bytes(text)
        manifest["files"]["graph.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        (target / "kvrewrite.json").write_bytes(resign(manifest))
        return
    if pick.random() < 0.1:
        (target / "kvrewrite.json").write_bytes(scramble((source / "kvrewrite.json").read_bytes(), pick))
        return
    for _ in range(pick.choice([1, 1, 1, 2, 4])):
        mutate(manifest, pick)
    (target / "kvrewrite.json").write_bytes(resign(manifest))


def outcome(directory: Path, wanted: torch.Tensor, ids: torch.Tensor) -> str:
    """What loading a directory and its first forward come to; anything but the right kinds of end is raised."""
    try:
        model = kvrewrite.load(directory)
    except ArtifactError:
        return "refused"
    try:
        with torch.no_grad():
            cache = model.new_cache(1)
            got = torch.cat([model(part, past_key_values=cache).logits for part in (ids, ids[:, :1])], 1)
    except ArtifactError:
        return "refused at the first forward"
    except InputError:  # a manifest may say that the model has fewer positions
        if (model.program.max_positions or 1 << 62) > ids.numel():
            raise
        return "refused as too long"
    return "the same logits" if torch.equal(got, wanted) else "other logits"


def expected(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of an unharmed directory."""
    model = kvrewrite.load(directory)
    cache = model.new_cache(1)
    return torch.cat([model(part, past_key_values=cache).logits for part in (ids, ids[:, :1])], 1)


def run(seeds: range, folder: Path, base: Path | None = None) -> tuple[collections.Counter[str], list[str]]:
    """Counts of outcomes, and what went wrong, with its seed. base: what is converted, if not the small model."""
    models = make_models(folder, base or small_model())
    vocabulary = json.loads((models[0] / "config.json").read_text())["vocab_size"]
    ids = torch.randint(0, vocabulary, (1, 70), generator=torch.Generator().manual_seed(0))
    wanted = [expected(model, ids) for model in models]
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    for seed in seeds:
        which = seed % len(models)
        attack(models[which], folder / "attacked", seed)
        started = time.process_time()
        try:
            counts[outcome(folder / "attacked", wanted[which], ids)] += 1
        except Exception as error:  # that is what is looked for
            failures.append(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}")
        if time.process_time() - started > SECONDS:
            failures.append(f"seed {seed}: {time.process_time() - started:.0f} s")
    return counts, failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        first, count = int(sys.argv[1]), int(sys.argv[2])
        began = time.process_time()
        found, wrong = run(range(first, first + count), Path(place))
    print(dict(found), f"{len(wrong)} wrong, {time.process_time() - began:.0f} s of the process")
    print("\n".join(wrong))
