"""The verbs: transform a model in memory, convert a checkpoint directory, load, save and inspect."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kvrewrite import policies
from kvrewrite.analysis.memory import MemoryPlan, carried_bytes, plan_memory
from kvrewrite.analysis.model_card import model_card
from kvrewrite.capture.fake_parameters import capture_on_devices, devices_of
from kvrewrite.capture.frontend import Captured, capture, is_transformers_model
from kvrewrite.capture.third_party import AdapterWatch, has_adapters, quantized_weights, unwrap
from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.ir.program import Program
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.validate import require_check
from kvrewrite.passes.pipeline import Observer, canonical, insert
from kvrewrite.policies import Policy

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

Progress = Callable[[str], None]
Weights = str | Path | Mapping[str, Tensor] | None


def _quiet(_: str) -> None:
    """No progress."""


def _facts(config: Any) -> dict[str, Any]:
    """What policies may ask of a model's configuration."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return {"activation": value}
    return {}


def _read_weights(weights: Weights) -> tuple[Mapping[str, Tensor], Mapping[str, str]] | None:
    if weights is None:
        return None
    if isinstance(weights, (str, Path)):
        from kvrewrite.policies.weights import read_policy_weights

        return read_policy_weights(weights)
    return weights, {}


def _compile(
    captured: Captured,
    policy: Policy,
    weights: Weights,
    config: Any,
    observe: Observer | None,
    progress: Progress,
    check: str = "full",
) -> Program:
    from kvrewrite.runtime.translation import prove_whole, reference_logits

    progress("finding attention and proving it" if check != "off" else "finding attention")
    with _float32():
        sites = canonical(captured, observe, check)
        reference = reference_logits(captured) if check == "full" else None
        progress(f"inserting {policy.name}")
        program = insert(captured, sites, policy, _read_weights(weights), _facts(config), observe)
        if reference is not None:
            progress("proving the whole")
            captured.proof.whole = prove_whole(program, captured, reference)
    program.proof = captured.proof.as_dict() if captured.proof is not None else None
    captured.before = captured.stand_ins = None
    return program


@contextmanager
def _float32() -> Iterator[None]:
    """torch's own default dtype, whatever the caller's is: passes run parts of a graph on numbers that they make up."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _canonical(captured: Captured, observe: Observer | None) -> list[AttentionSite]:
    with _float32():
        return canonical(captured, observe)


def transform(
    model: nn.Module,
    policy: str | Policy = "streaming_llm",
    *,
    policy_weights: Weights = None,
    max_length: int | None = None,
    check: str = "full",
    observe: Observer | None = None,
    **options: Any,
) -> RewrittenModel:
    """Rewrites a decoder so that its KV cache evicts; returns a new model that shares the parameters' storage.

    model: any causal LM of transformers (with adapters of peft, quantized by torchao, its layers on several devices), or any
    `nn.Module` whose forward(input_ids) returns logits (B, T, vocabulary).
    policy: a name (`kvrewrite policies` lists them) or a `Policy`; options: its options, such as budget=1024.
    policy_weights: safetensors file or tensors of the policy's trained heads. max_length: where the model's RoPE depends
    on the length (dynamic NTK), the length to fix it at. observe: called with (pass name, graph) after each pass.
    check: what is proved by running the rewritten graph beside the captured one, on the CPU in float64 with stand-ins for large
    weights: "full", "sites" (each attention alone) or "off".

    Raises UnsupportedModelError, CaptureError, OptionError or PolicyWeightsError, each with the layer and the reason.
    """
    from kvrewrite.runtime.model import RewrittenModel

    chosen = policies.make(policy, **options)
    model = unwrap(model)
    several = len(devices_of(model)) > 1
    captured = (capture_on_devices if several else capture)(model, max_length=max_length)
    config: Any = getattr(model, "config", None)
    program = _compile(captured, chosen, policy_weights, config, observe, _quiet, check)
    if is_transformers_model(model):
        generation_config = getattr(model, "generation_config", None)
    else:
        config, generation_config = _foreign_config(program, type(model).__name__), None
    _own_parameters(program.graph)
    adapters = AdapterWatch(model) if has_adapters(model) else None
    return RewrittenModel(program, config, generation_config, source=model, adapters=adapters)


def _own_parameters(gm: nn.Module) -> None:
    """Gives the graph parameters of its own over the same storage, so that moving one model does not move the other."""
    own: dict[int, nn.Parameter] = {}
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                wrapped = own.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
                module._parameters[name] = wrapped


def _foreign_config(program: Program, name: str) -> Any:
    """A configuration with what `generate` asks for, for modules that are not from transformers."""
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    config.vocab_size = program.vocab_size
    config.num_hidden_layers = len(program.sites)
    config.architectures = [name]
    config.is_encoder_decoder = False
    if program.max_positions is not None:
        config.max_position_embeddings = program.max_positions
    return config


@dataclass
class Conversion:
    """What `convert` did, or would do."""

    program: Program
    out: Path | None
    weights_bytes: int
    plans: list[MemoryPlan]


def convert(
    model_dir: str | Path,
    out: str | Path | None,
    policy: str | Policy = "streaming_llm",
    *,
    policy_weights: Weights = None,
    max_length: int | None = None,
    contexts: list[int] | None = None,
    batch: int = 1,
    link: bool = False,
    force: bool = False,
    observe: Observer | None = None,
    progress: Progress = _quiet,
    compile: str | None = None,
    compile_device: str | torch.device = "cpu",
    compile_batch: int = 1,
    check: str = "full",
    **options: Any,
) -> Conversion:
    """Converts a checkpoint directory of transformers to a kvrewrite model directory, without loading its weights.

    out: where to; None does everything but writing (a dry run). contexts: context lengths for the memory estimate,
    default the model's longest. link: hard-links the base weights instead of copying them. compile: "aot" adds the steps as
    AOTInductor compiles them for `compile_device`, which loads the weights there and takes minutes; compile_batch: 1, or 2 for
    any number of rows from 2 on. check: as for `transform`; weights have no data here, so random ones stand in for all of them.
    The rest as `transform`.
    """
    from kvrewrite.artifact.checkpoint import Checkpoint, read_json
    from kvrewrite.artifact.directory import check_destination, companion_files, write_artifact
    from kvrewrite.artifact.meta_model import build_on_meta, parameter_sources
    from kvrewrite.capture.fake_parameters import capture_on_meta
    from kvrewrite.runtime.aot import check_kind, compile_ahead

    check_kind(compile, compile_device)
    require_check(check)
    chosen = policies.make(policy, **options)
    model_dir = Path(model_dir)
    checkpoint = Checkpoint.open(model_dir)
    if out is not None:
        check_destination(Path(out), checkpoint, force)
    progress("building the model without weights")
    model, config = build_on_meta(model_dir)
    # Before the capture: a checkpoint may untie weights that the configuration ties.
    sources = parameter_sources(model, config, checkpoint)
    progress("capturing")
    captured = capture_on_meta(model, max_length=max_length)
    program = _compile(captured, chosen, policy_weights, config, observe, progress, check)
    itemsize = captured.dtype.itemsize
    longest = getattr(config, "max_position_embeddings", None) or 4096
    final = policies.make(program.policy["name"], **program.policy["options"])
    carried = carried_bytes(program.layout)
    plans = [plan_memory(program.sites, final, itemsize, n, batch, carried) for n in contexts or [longest]]
    size = sum((model_dir / name).stat().st_size for name in checkpoint.files)
    if out is None:
        return Conversion(program, None, size, plans)
    progress("writing" if compile is None else "writing and compiling")

    def compile_steps(folder: Path) -> dict[str, Any]:
        return compile_ahead(_load(folder, compile_device)[0], folder, compile_batch)

    path = write_artifact(
        out,
        program,
        base=checkpoint,
        config=read_json(model_dir / "config.json"),
        recipes=sources,
        extra_files=companion_files(model_dir),
        link=link,
        force=force,
        card=model_card(program, model_dir.name, plans),
        compile_steps=None if compile is None else compile_steps,
    )
    return Conversion(program, path, size, plans)


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    verify_hashes: bool = False,
    trust_compiled: bool = False,
) -> RewrittenModel:
    """Loads a model directory that kvrewrite wrote: offline, without the original model's code.

    verify_hashes: also hashes the base weights (reads all of them). trust_compiled: also loads the steps that the directory
    has compiled (`convert(compile="aot")`), which is native code: only from whom you would run code. Without it they are left
    alone, and a warning says so. Raises ArtifactError.
    """
    from kvrewrite.artifact import directory as artifact

    directory = Path(directory)
    if verify_hashes:
        artifact.verify_hashes(directory)
    model, manifest = _load(directory, device)
    if trust_compiled:
        from kvrewrite.runtime.aot import load_ahead

        model.__dict__["_execution"] = load_ahead(model, directory, manifest)
    elif "compiled" in manifest:
        warnings.warn(
            f"{directory} has compiled steps, which were not loaded: they are native code. If you trust where they come from, "
            "load them with trust_compiled=True (--trust-compiled)",
            stacklevel=2,
        )
    return model


def _load(directory: Path, device: str | torch.device) -> tuple[RewrittenModel, dict[str, Any]]:
    """The model of a directory, and its manifest."""
    from kvrewrite.artifact import directory as artifact

    program, manifest = artifact.read_artifact(directory, device)
    # After it: these take seconds to import, which pass while weights are on their way to a GPU.
    from kvrewrite.artifact.companions import read_config, read_generation_config
    from kvrewrite.runtime.model import RewrittenModel

    config = read_config(directory)
    generation_config = read_generation_config(directory, manifest["files"])
    return RewrittenModel(program, config, generation_config, source=directory), manifest


def _is_listed(path: Path, source: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest lists a file, or one in a folder."""
    name = path.relative_to(source).as_posix()
    return any(listed == name or listed.startswith(f"{name}/") for listed in manifest["files"])


@contextmanager
def _temporary_next_to(out: Path) -> Any:
    """A folder on the file system of `out`, removed afterwards."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.base-", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ArtifactError(f"{out} could not be written, and nothing was left there: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(
    model: RewrittenModel, out: str | Path, *, force: bool = False, compile: str | None = None, compile_batch: int = 1
) -> Path:
    """Writes a rewritten model as a directory that `load` reads and that stock transformers reads as the original.

    compile, compile_batch: as for `convert`, for the device that the model is on.
    """
    from kvrewrite.artifact.checkpoint import Checkpoint, read_json
    from kvrewrite.artifact.directory import check_destination, companion_files, read_manifest, write_artifact
    from kvrewrite.artifact.meta_model import parameter_sources
    from kvrewrite.runtime.aot import check_kind, compile_ahead

    out, program, source = Path(out).resolve(), model.program, model.source
    check_kind(compile, model.device)
    compile_steps = None if compile is None else lambda folder: compile_ahead(model, folder, compile_batch)
    card = model_card(program, "", [])
    if isinstance(source, Path):
        manifest = read_manifest(source)
        checkpoint = Checkpoint.open(source, manifest["files"])
        return write_artifact(
            out,
            program,
            base=checkpoint,
            config={k: v for k, v in read_json(source / "config.json").items() if k != "kvrewrite"},
            recipes=manifest["recipes"],
            extra_files=[p for p in companion_files(source) if _is_listed(p, source, manifest)],
            force=force,
            card=(source / "README.md").read_text() if (source / "README.md").exists() else card,
            compile_steps=compile_steps,
        )
    if not model.on_one_device:
        raise ArtifactError(
            "the model lies on several devices, and transfers between them are part of its graph. Convert the original's "
            "directory instead (kvrewrite convert), for which no weights are loaded"
        )
    if not isinstance(source, nn.Module):
        raise ArtifactError("this model was made from a program alone; there is no original to save with it")
    if has_adapters(source):
        raise ArtifactError(
            "the model has adapters of peft in its layers, and stock transformers could not open such a directory as the "
            "original. Merge them first: kvrewrite.transform(model.merge_and_unload(), ...)"
        )
    if (what := quantized_weights(source)) is not None:
        raise ArtifactError(
            f"the model's weights are quantized ({what}), which a model directory can't hold. Convert the checkpoint "
            "as it was before it was quantized, or transform the quantized model where it is used"
        )
    if is_transformers_model(source):
        check_destination(out, {}, force)
        with _temporary_next_to(out) as folder:
            try:
                source.save_pretrained(folder)  # type: ignore[operator]
            except (OSError, SafetensorError) as error:  # a full disk is the latter
                raise ArtifactError(
                    f"{out} could not be written, and nothing was left there: {error}; free some space"
                ) from error
            checkpoint = Checkpoint.open(folder)
            sources = parameter_sources(source, source.config, checkpoint)
            return write_artifact(
                out,
                program,
                base=checkpoint,
                config=read_json(folder / "config.json"),
                recipes=sources,
                extra_files=companion_files(folder),
                link=True,
                force=force,
                card=card,
                compile_steps=compile_steps,
            )
    tensors: dict[str, Tensor] = dict(source.named_parameters(remove_duplicate=False))
    tensors.update(source.named_buffers(remove_duplicate=False))
    return write_artifact(
        out, program, base=tensors, config=json.loads(model.config.to_json_string()), force=force, card=card,
        compile_steps=compile_steps,
    )  # fmt: skip


def inspect(
    model: nn.Module | str | Path, *, max_length: int | None = None, observe: Observer | None = None
) -> list[AttentionSite]:
    """Every attention site of a model or checkpoint directory, as the compiler finds it; raises where it can't.

    A checkpoint directory is read without its weights.
    """
    if isinstance(model, nn.Module):
        model = unwrap(model)
        several = len(devices_of(model)) > 1
        return _canonical((capture_on_devices if several else capture)(model, max_length=max_length), observe)
    from kvrewrite.artifact.meta_model import build_on_meta
    from kvrewrite.capture.fake_parameters import capture_on_meta

    built, _ = build_on_meta(Path(model))
    return _canonical(capture_on_meta(built, max_length=max_length), observe)


__all__ = ["Conversion", "OptionError", "convert", "inspect", "load", "save", "transform"]
