"""Steps compiled ahead of time: an AOTInductor package in a model directory, so that loading it compiles nothing.

`compile_ahead` takes the programs of `exported.py` through AOTInductor. The packages hold native code and no weights:
those are the model's own tensors, which it shares. Native code runs when it is loaded, so that happens only on trust;
and it fits one version of torch and of kvrewrite (whose ops it calls) and one kind of device, which the manifest says.
Nothing is taken in silence in its place: what does not fit is an error.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvrewrite import __version__
from kvrewrite.errors import ArtifactError, CaptureError, OptionError
from kvrewrite.runtime.exported import NAMES, Steps, export_steps
from kvrewrite.runtime.parts import dynamic_sizes

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

KINDS = ("aot",)
FOLDER = "compiled"


@dataclass(kw_only=True)
class CompiledSteps(Steps):
    """The steps as AOTInductor compiled them, over the tensors of the model that they were loaded for."""

    runners: dict[str, Any]
    tensors: dict[str, Tensor]

    def _module(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = self.runners[name]
        return found


def check_kind(kind: str | None, device: str | torch.device) -> None:
    """OptionError for what can't be asked for on a device; None: nothing is compiled."""
    if kind is None:
        return
    if kind not in KINDS:
        raise OptionError(f"compile is {kind!r}, expected {' or '.join(map(repr, KINDS))} or nothing")
    if reason := why_not(torch.device(device)):
        raise OptionError(f"compile={kind!r}: {reason}. Leave it out, and call compile() where the model runs")


def why_not(device: torch.device) -> str | None:
    """The reason why no steps are compiled ahead for a device with this version of torch, or None."""
    if device.type == "cuda" and torch.__version__ < "2.12":
        return f"torch {torch.__version__} crashes when it loads such packages on a GPU (seen with 2.11 on an H100)"
    return None


def compile_ahead(model: RewrittenModel, folder: Path, batch_size: int = 1) -> dict[str, Any]:
    """Compiles a model's steps for its device into `folder`/compiled/; returns what the manifest says of them.

    batch_size: 1, or at least 2 for any number of rows from 2 on. Inductor's configuration is that of the process.
    Takes minutes and a C++ compiler. Raises CaptureError where it can't be done.
    """
    steps = export_steps(model, batch_size=batch_size)
    (folder / FOLDER).mkdir()
    files = []
    # The weights stay out: they are in the directory already, and the model's own are given at loading.
    settings = {"aot_inductor.package_constants_in_so": False}
    for name in NAMES:
        path = folder / FOLDER / f"{name}.pt2"
        with torch.no_grad(), dynamic_sizes(), warnings.catch_warnings():
            # torch's own use of what it deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            try:
                torch._inductor.aoti_compile_and_package(
                    getattr(steps, name), package_path=str(path), inductor_configs=dict(settings)
                )
            except Exception as error:  # Inductor raises many types, its compilers, too
                lines = str(error).strip().splitlines()
                raise CaptureError(
                    f"AOTInductor can't compile the {name} step of {steps.policy['name']} for {model.device}: "
                    f"{type(error).__name__}: {lines[0][:300] if lines else ''}. Leave compile out; the model can be "
                    "compiled where it runs (model.compile())"
                ) from error
        files.append(f"{FOLDER}/{path.name}")
    return {
        "kind": "aot",
        "files": files,
        "batch_size": steps.batch_size,
        "inputs": steps.inputs,
        **environment(model.device),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What native code fits: versions, and the device by what decides whether it runs there."""
    where: dict[str, Any]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = {"type": "cuda", "cuda": torch.version.cuda, "capability": f"{major}.{minor}"}
    else:
        where = {
            "type": device.type,
            "machine": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    return {"torch": torch.__version__, "kvrewrite": __version__, "device": where}


def load_ahead(model: RewrittenModel, directory: Path, manifest: Mapping[str, Any]) -> CompiledSteps:
    """The steps in a model directory that `read_artifact` has checked, hashes of these files included, for its model.

    Raises ArtifactError with what differs where there are none, or where they are of another torch, kvrewrite or
    device.
    """
    compiled = manifest.get("compiled")
    if compiled is None:
        raise ArtifactError(
            f"{directory} has no compiled steps to trust (trust_compiled); convert the model with --compile aot, or leave "
            "trust_compiled out"
        )
    files = [f"{FOLDER}/{name}.pt2" for name in NAMES]
    if compiled["kind"] not in KINDS or compiled["files"] != files or not set(files) <= manifest["files"].keys():
        raise ArtifactError(
            f"{directory} has compiled steps of kind {compiled['kind']!r:.40} that this version can't load"
        )
    here = environment(model.device)
    differ = [
        f"{what} {_said(compiled[what])}, here {_said(here[what])}" for what in here if compiled[what] != here[what]
    ]
    if differ:
        raise ArtifactError(
            f"the compiled steps in {directory} do not fit: they were made with {'; '.join(differ)}. Load without "
            "trust_compiled, or compile them again here (kvrewrite convert --compile aot)"
        )
    if reason := why_not(model.device):
        raise ArtifactError(f"{directory}: {reason}. Load without trust_compiled")
    named = (model.graph_module.named_parameters, model.graph_module.named_buffers)
    tensors = {name: tensor.detach() for which in named for name, tensor in which(remove_duplicate=False)}
    index = -1
    if model.device.type == "cuda":
        index = torch.cuda.current_device() if model.device.index is None else model.device.index
    runners = {}
    for name, file in zip(NAMES, files):
        runner = torch._inductor.aoti_load_package(str(directory / file), device_index=index)
        wanted = runner.get_constant_fqns()
        if lacking := [n for n in wanted if n not in tensors]:
            raise ArtifactError(
                f"{directory / file} wants tensors that the model has not: {', '.join(lacking[:8])}. Load without "
                "trust_compiled, or convert again"
            )
        # It keeps no references to them, so the steps do.
        runner.load_constants({n: tensors[n] for n in wanted}, check_full_update=True, user_managed=True)
        runners[name] = runner
    return CompiledSteps(
        inputs=compiled["inputs"],
        batch_size=compiled["batch_size"],
        policy=model.program.policy,
        runners=runners,
        tensors=tensors,
    )


def _said(value: Any) -> str:
    return " ".join(f"{v}" for v in value.values()) if isinstance(value, dict) else str(value)
