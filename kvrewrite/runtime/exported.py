"""The steps of a rewritten model as `torch.export` programs: for runtimes that take graphs and bring their own loop.

A rewritten model is one graph, called once for each segment of a prompt and once for each token. All state is among its
inputs (pages, page tables, lengths), which it changes in place; planning and leasing pages stay with `EvictionCache`.
`export_steps` exports that graph twice, for several tokens and for one, and `ExportedSteps.attach` runs a model through
them, which is also how they are tested.

A saved .pt2 file is executable content: torch.export.load falls back to unpickling what it does not know. So
`load_steps` reads one only when it is told to trust it and its hash is that of the list beside it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvrewrite.artifact.checkpoint import read_json
from kvrewrite.artifact.files import sha256_of
from kvrewrite.errors import ArtifactError, CaptureError, InputError
from kvrewrite.runtime.executor import Executor, run_by
from kvrewrite.runtime.parts import dynamic_sizes

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

LENGTH = 150  # tokens of the example prompt, more than two pages of slots; sizes that may differ are dynamic
NAMES = ("prefill", "decode")
LISTING = "steps.json"


@dataclass(kw_only=True)
class Steps(ABC):
    """A model's graph in two programs: `prefill` (B, T > 1) and `decode` (B, 1).

    inputs: what they take, in this order; "moving": the dimensions that may have other sizes than the example. Both
    return the logits (B, 1, vocabulary) of the column that `logit_index` names, and write to the cache's tensors.
    """

    inputs: dict[str, list[dict[str, Any]]]
    batch_size: int  # 1, or the smallest of several
    policy: dict[str, Any]

    def __call__(self, inputs: dict[str, Tensor], logits: bool) -> Tensor:
        """Runs one step, see `run`. logits: whether they are wanted; they come in any case."""
        return self.run(inputs)

    def run(self, values: dict[str, Tensor]) -> Tensor:
        """Runs one step; values: the program's inputs by name."""
        name = "decode" if values["input_ids"].shape[1] == 1 else "prefill"
        values = self._wider(name, values)
        self._check(name, values)
        result: Tensor = self._module(name)(*(values[i["name"]] for i in self.inputs[name]))
        return result

    @abstractmethod
    def _module(self, name: str) -> Callable[..., Any]:
        """What runs a step, "prefill" or "decode"."""

    def _wider(self, name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Page tables of one column, which would be a case of their own, get another that no length reaches."""
        out = dict(values)
        for expected in self.inputs[name]:
            key, last = expected["name"], len(expected["shape"]) - 1
            if key.startswith("table_") and last in expected["moving"] and out[key].shape[-1] == 1:
                out[key] = torch.nn.functional.pad(out[key], (0, 1))
        return out

    def _check(self, name: str, values: dict[str, Tensor]) -> None:
        for expected in self.inputs[name]:
            shape = tuple(values[expected["name"]].shape)
            fits = len(shape) == len(expected["shape"]) and all(
                (got >= 2 or want == got) if dim in expected["moving"] else got == want
                for dim, (got, want) in enumerate(zip(shape, expected["shape"]))
            )
            if not fits:
                raise InputError(
                    f"the exported {name} step can't take {expected['name']} of shape {shape}; it was exported for "
                    f"{tuple(expected['shape'])}, of which the dimensions {expected['moving']} may have other sizes from 2 on "
                    "(logits of the last column only, and one row or several, as the example). The model itself, without "
                    "the steps, takes all: model.uncompile()"
                )


@dataclass(kw_only=True)
class ExportedSteps(Steps):
    """The steps as two programs of torch.export."""

    prefill: Any
    decode: Any

    def _module(self, name: str) -> Callable[..., Any]:
        made: dict[str, Callable[..., Any]] = self.__dict__.setdefault("_modules", {})
        if name not in made:
            made[name] = getattr(self, name).module()
        return made[name]

    @contextmanager
    def attach(self, model: RewrittenModel) -> Iterator[RewrittenModel]:
        """Inside, `model` runs these programs instead of its own graph: `with steps.attach(model):
        model.generate(...)`."""
        if model.program.policy != self.policy:
            raise InputError(
                f"the steps are of {self.policy}, the model of {model.program.policy}; export the steps of this model"
            )
        if model.executor is not None and model.executor.options is not None:
            raise InputError("the model is compiled; call model.uncompile() first")
        with run_by(model, Executor(self)):
            yield model

    def save(self, directory: str | Path) -> Path:
        """Writes prefill.pt2, decode.pt2 (weights included, in each) and steps.json, which lists inputs and hashes."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {}
        for name in NAMES:
            path = directory / f"{name}.pt2"
            torch.export.save(getattr(self, name), path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        data = {
            "torch": torch.__version__,
            "policy": self.policy,
            "batch_size": self.batch_size,
            "inputs": self.inputs,
            "files": files,
        }
        (directory / LISTING).write_text(json.dumps(data, indent=1) + "\n")
        return directory


def load_steps(directory: str | Path, *, trust_compiled: bool = False) -> ExportedSteps:
    """Reads what `ExportedSteps.save` wrote. trust_compiled: the files come from someone whose code you would run."""
    directory = Path(directory)
    if not (directory / LISTING).is_file():
        raise ArtifactError(f"{directory} has no {LISTING}; expected a directory that export_steps(...).save wrote")
    data = read_json(directory / LISTING)
    if not trust_compiled:
        raise ArtifactError(
            f"{directory} holds .pt2 files, and reading one can run code that is in it; load them with trust_compiled=True if "
            "you trust where they come from, or export them again from the model directory"
        )
    programs = {}
    for name in NAMES:
        path = directory / f"{name}.pt2"
        entry = data["files"][path.name]
        if not path.is_file() or path.stat().st_size != entry["size"] or sha256_of(path) != entry["sha256"]:
            raise ArtifactError(
                f"{path} is missing, damaged or was edited (its sha256 differs from the one in {LISTING}); "
                "copy it or export it again"
            )
        import kvrewrite.ops  # noqa: F401  (the programs call its ops)

        programs[name] = torch.export.load(path)
    return ExportedSteps(**programs, inputs=data["inputs"], batch_size=data["batch_size"], policy=data["policy"])


def export_steps(model: RewrittenModel, *, batch_size: int = 1) -> ExportedSteps:
    """Exports the steps of a rewritten model.

    batch_size: 1, or at least 2 for any number of rows from 2 on (one row is a case of its own to torch.export).
    Prompts of any length, caches of any size. Raises CaptureError where torch.export can't.
    """
    if not hasattr(model, "program"):
        raise InputError(
            f"model is a {type(model).__name__}, expected a rewritten model (kvrewrite.transform or kvrewrite.load)"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}, expected a whole number from 1 on")
    if not model.on_one_device:
        raise InputError("a model on several devices can't be exported; load it on one")
    examples = _record(model, batch_size)
    programs: dict[str, Any] = {}
    inputs: dict[str, list[dict[str, Any]]] = {}
    for name in NAMES:
        programs[name], inputs[name] = _export(model, name, examples[name])
    return ExportedSteps(**programs, inputs=inputs, batch_size=batch_size, policy=model.program.policy)


def _record(model: RewrittenModel, rows: int) -> dict[str, dict[str, Tensor]]:
    """The inputs of the segment of a prompt with the largest page table, and of the token after it, as before the
    step."""
    limit = (model.program.max_positions or 2 * LENGTH) - 1
    length = LENGTH if limit > LENGTH else limit - limit // 3
    if model.policy.capacity is not None:
        length = min(length, model.policy.capacity - 1)
    names = model.program.layout.input_names
    found: list[dict[str, Tensor]] = []

    def record(inputs: dict[str, Tensor], logits: bool) -> Tensor:
        found.append({name: inputs[name].clone() for name in names})
        out: Tensor = model.graph_module(*(inputs[name] for name in names))
        return out

    with run_by(model, Executor(record)):
        ids = torch.arange(rows * (length + 1), device=model.device).reshape(rows, -1) % model.program.vocab_size
        cache = model.new_cache(rows)
        model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
        tables = [spec.name for spec in model.program.layout.inputs if spec.part == "table"]
        prompt = [values for values in found if values["input_ids"].shape[1] > 1]
        widest = max(prompt, key=lambda values: max(values[name].shape[-1] for name in tables))
        model(ids[:, length:], past_key_values=cache, logits_to_keep=1)
    return {"prefill": widest, "decode": found[-1]}


def _export(model: RewrittenModel, what: str, example: dict[str, Tensor]) -> tuple[Any, list[dict[str, Any]]]:
    listed = [
        {
            "name": name,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "moving": [d for d in spec.moving if value.shape[d] > 1],
        }
        for spec, (name, value) in zip(model.program.layout.inputs, example.items(), strict=True)
    ]
    auto = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(entry["moving"], auto) for entry in listed)  # type: ignore[attr-defined]
    with torch.no_grad(), dynamic_sizes():
        try:
            program = torch.export.export(
                model.graph_module, tuple(example.values()), dynamic_shapes=shapes, strict=False
            )
        except Exception as error:  # torch.export raises many types
            summary = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
            raise CaptureError(
                f"torch.export can't export the {what} step of {model.program.policy['name']}: {type(error).__name__}: "
                f"{summary}"
            ) from error
    return program, listed
