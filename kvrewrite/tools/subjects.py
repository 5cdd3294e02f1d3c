"""What the tools measure: a model, its policies and their budgets; and the files for results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kvrewrite
from kvrewrite import policies
from kvrewrite.errors import ArtifactError, OptionError

CONVERTED = "converted"  # as a policy: the one that a converted directory already has


@dataclass(frozen=True)
class PolicySpec:
    """A policy and its options, as the user asked for it. weights: safetensors file of trained heads."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None

    @property
    def label(self) -> str:
        """Returns the policy as on the command line."""
        given = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}:{given}" if given else self.name

    @property
    def evicts(self) -> bool:
        """Whether it evicts, as far as its name says: not the baseline, and not a converted directory's own policy."""
        return self.name in policies.POLICIES and policies.POLICIES[self.name].evicts_ever

    def check(self) -> None:
        """Raises OptionError for unknown names of policies and options."""
        if self.name == CONVERTED:
            if self.options:
                raise OptionError(f"the policy of a converted model has its options already; leave {self.label} bare")
            return
        if self.name not in policies.POLICIES:
            policies.make(self.name)  # raises, with the likely spelling
        known = {f.name for f in dataclasses.fields(policies.POLICIES[self.name])}
        if not set(self.options) <= known:
            policies.make(self.name, **self.options)


@dataclass(frozen=True)
class Arm:
    """One transformed model: a policy at a budget. budget: None is the policy's own."""

    spec: PolicySpec
    budget: int | float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Returns all given options."""
        return {**self.spec.options, **({} if self.budget is None else {"budget": self.budget})}

    @property
    def is_baseline(self) -> bool:
        """Whether it is the model as it is: nothing goes, and no option changes what is stored."""
        return not self.options and self.spec.name != CONVERTED and not self.spec.evicts

    def __str__(self) -> str:
        return self.spec.label if self.budget is None else f"{self.spec.label} at {budget_text(self.budget)}"


def budget_text(budget: int | float | None) -> str:
    """Formats a budget for people: 0.25 -> "25%", 1024 -> "1,024"."""
    if budget is None:
        return "-"
    return f"{budget * 100:g}%" if isinstance(budget, float) else f"{budget:,}"


FULL_CACHE = Arm(PolicySpec(policies.Full.name))


def arms(specs: Iterable[PolicySpec], budgets: Sequence[int | float]) -> list[Arm]:
    """Returns every policy at every budget; one that names its own budget, or evicts nothing, runs once."""
    found: dict[str, Arm] = {}
    for spec in specs:
        once = not spec.evicts or "budget" in spec.options or not budgets
        for budget in [None] if once else budgets:
            found.setdefault(str(Arm(spec, budget)), Arm(spec, budget))
    return list(found.values())


def beside_baseline(specs: Iterable[PolicySpec], budgets: Sequence[int | float]) -> list[Arm]:
    """Returns `arms` but for the baseline, for tools that run it in any case."""
    return [arm for arm in arms(specs, budgets) if not arm.is_baseline]


class Source:
    """A checkpoint or converted directory: its tokenizer, the original model (loaded once), and rewritten models."""

    def __init__(
        self, directory: str | Path, *, device: str | torch.device = "cpu", dtype: str = "auto", check: str = "full"
    ):
        """check: what is proved of each rewrite, as for `kvrewrite.transform`."""
        from kvrewrite.artifact import directory as artifact

        self.check = check
        self.directory, self.device = Path(directory), torch.device(device)
        self.manifest = artifact.read_manifest(self.directory) if artifact.is_artifact(self.directory) else None
        if dtype == "auto" and self.manifest is not None:
            dtype = artifact.read_artifact(self.directory)[0].dtype
        self.dtype = "float32" if dtype == "auto" and self.device.type == "cpu" else dtype
        self._tokenizer: Any = None
        self._base: Any = None
        self._rewriter: Any = None

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return json.loads((self.directory / "config.json").read_text(encoding="utf-8"))

    @property
    def tokenizer(self) -> Any:
        """Returns the tokenizer in the directory."""
        if self._tokenizer is None:
            from kvrewrite.artifact.companions import read_tokenizer

            self._tokenizer = read_tokenizer(self.directory)
        return self._tokenizer

    @property
    def base(self) -> Any:
        """Returns the unmodified model."""
        if self._base is None:
            if not self.config.get("model_type"):
                raise ArtifactError(
                    f"{self.directory} was made from a module that is not from transformers, and its code is not here: only "
                    f"its own policy can be run (--policy {CONVERTED}), not the full cache and no other policy"
                )
            from transformers import AutoModelForCausalLM

            try:
                model: Any = AutoModelForCausalLM.from_pretrained(
                    self.directory, dtype=self.dtype, local_files_only=True, trust_remote_code=False
                )
            except ValueError as error:
                raise ArtifactError(f"{self.directory}: {str(error).splitlines()[0]}") from error
            self._base = model.eval().to(self.device)
        return self._base

    def rewritten(self, arm: Arm) -> Any:
        """Returns the model with an arm's policy; it shares the base's weights. Raises KVRewriteError if it can't be
        made."""
        if arm.spec.name == CONVERTED:
            if self.manifest is None:
                raise OptionError(f"{self.directory} is no converted model; name the policies to run with --policy")
            return kvrewrite.load(self.directory, device=self.device)
        name = arm.spec.name
        if policies.POLICIES[name].needs_weights and arm.spec.weights is None:
            raise OptionError(f"{name} needs trained weights: --policy-weights {name}=FILE")
        policy = policies.make(name, **arm.options)
        from kvrewrite.api import Rewriter

        if self._rewriter is None:
            self._rewriter = Rewriter(self.base, check=self.check)
        return self._rewriter.rewrite(policy, policy_weights=arm.spec.weights)

    def fingerprint(self) -> str:
        """Identifies a model: sha256 of the small files, and of both ends of the large ones."""
        edge = 1 << 20
        digest = hashlib.sha256()
        for path in sorted(self.directory.iterdir()):
            if path.suffix not in (".json", ".safetensors", ".model") or not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(edge))
                file.seek(max(0, size - edge))
                digest.update(file.read(edge))
        return digest.hexdigest()


def file_hash(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise OptionError(f"--policy-weights {path}: {error.strerror or error}") from error


def versions() -> dict[str, str]:
    """Returns the versions that the numbers were made with."""
    import transformers

    return {
        "kvrewrite": kvrewrite.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def read_json(path: Path, kind: str, form: int) -> dict[str, Any]:
    """Reads a file of results that a command of this kind wrote in this format; raises ArtifactError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}); expected a file that --out wrote") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise ArtifactError(f"{path} has no results of `{kind}`; expected a file that its --out wrote")
    if data.get("format") != form:
        raise ArtifactError(f"{path} has results of format {data.get('format')}, expected {form}")
    return data


def write_json(path: Path, data: Any) -> None:
    """Writes a file completely or not at all."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
