"""Stores labels of retaining heads in a file, computed once for later runs: `kvrewrite train --labels FILE`.

The backbone is frozen, so a text's labels are the same in every epoch and every run. A safetensors file holds one
tensor per text, named after its token ids; its metadata names the model, data and options, and a mismatch is refused.
It is written and read one text at a time, so that memory does not grow with the data: 4 bytes per prompt token, layer
and kv head.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvrewrite.artifact.checkpoint import read_header
from kvrewrite.errors import TrainingError
from kvrewrite.ir.site import AttentionSite

KIND = "labels of retaining heads"
Encoded = Mapping[str, list[int]]  # input_ids, labels


def said_of(owners: Iterable[AttentionSite], **run: Any) -> dict[str, str]:
    """Returns a label file's metadata. run: what else labels depend on."""
    sites = ";".join(f"{s.layer},{s.kv_heads},{s.scale:.9g},{s.window},{s.chunk}" for s in owners)
    return {"kind": KIND, "format": "1", **{k: str(v) for k, v in run.items()}, "layers": sites}


def key_of(ids: Iterable[int], prompt: int) -> str:
    """Returns the name of a text's labels: sha256 of its token ids and of how many of them are the prompt."""
    digest = hashlib.sha256(struct.pack("<q", prompt))
    digest.update(np.fromiter(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def _prompt(row: Encoded) -> int:
    return sum(label < 0 for label in row["labels"])


def write_labels(
    path: Path,
    said: Mapping[str, str],
    heads: int,
    texts: Callable[[], Iterable[Encoded]],
    label: Callable[[Encoded], Tensor],
) -> int:
    """Writes the labels of all texts; returns how many. heads: kv heads of all layers together. texts: yields all texts
    once per call. label: returns a text's labels (heads, prompt) in fp32."""
    lengths = {key_of(row["input_ids"], _prompt(row)): _prompt(row) for row in texts()}
    header: dict[str, Any] = {"__metadata__": dict(said)}
    at = 0
    for key, prompt in lengths.items():
        size = 4 * heads * prompt
        header[key] = {"dtype": "F32", "shape": [heads, prompt], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            left = dict(lengths)
            for row in texts():
                if left.pop(key_of(row["input_ids"], _prompt(row)), None) is None:
                    continue  # the same text again
                made = label(row)
                assert made.shape == (heads, _prompt(row)) and made.dtype == torch.float32
                file.write(made.cpu().contiguous().numpy().astype("<f4").tobytes())
        partial.replace(path)
    except OSError as error:
        raise TrainingError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(lengths)


class LabelFile:
    """A file that `write_labels` wrote, for a run that `said` describes. Raises TrainingError for any other run."""

    def __init__(self, path: Path, said: Mapping[str, str], heads: list[int]):
        _, found = read_header(path)
        if found.get("kind") != KIND:
            raise TrainingError(
                f"{path} is no file of labels (its metadata says {found.get('kind')!r:.40}, expected {KIND!r}); give another "
                "name, and it is made"
            )
        differ = [
            f"{name} is {found.get(name)!s:.200}, expected {said.get(name)!s:.200}"
            for name in said
            if found.get(name) != said[name]
        ]
        if differ:
            raise TrainingError(
                f"the labels in {path} are of another run: {'; '.join(differ)}. Train with what they were made with, or give "
                "another name, and they are made anew"
            )
        self.path, self.heads = path, heads
        try:
            self._file: Any = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path} can't be read: {error}") from error
        self._names = set(self._file.keys())

    def read(self, input_ids: Tensor, answer: Tensor, real: Tensor) -> list[Tensor]:
        """Returns the labels of a batch, (B, Hkv, T) fp32 per layer; -inf outside the prompts.

        input_ids (B, T); answer, real (B, T) bool: tokens of the answer, and tokens that are not padding.
        """
        out = torch.full((input_ids.shape[0], sum(self.heads), input_ids.shape[1]), -torch.inf)
        counts, answers = real.sum(dim=1).tolist(), answer.sum(dim=1).tolist()
        for row, (ids, count, reply) in enumerate(zip(input_ids.tolist(), counts, answers, strict=True)):
            prompt = count - reply
            out[row, :, :prompt] = self.labels_of(ids[:count], prompt)
        return list(out.to(input_ids.device).split(self.heads, dim=1))

    def labels_of(self, ids: list[int], prompt: int) -> Tensor:
        """Returns the labels (kv heads of all layers, prompt) of one text."""
        name = key_of(ids, prompt)
        if name not in self._names:
            raise TrainingError(
                f"{self.path} has no labels for a text of {prompt} + {len(ids) - prompt} tokens that begins with {ids[:8]}: it "
                "was made with another tokenizer or chat template. Give another name, and they are made anew"
            )
        found: Tensor = self._file.get_tensor(name)
        return found
