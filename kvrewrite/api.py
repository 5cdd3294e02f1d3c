"""The public functions: transform a model in memory, convert a checkpoint directory, load and inspect."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvrewrite import policies
from kvrewrite.analysis.choose import Choice, MemoryGoal, choose
from kvrewrite.analysis.memory import MemoryPlan, carried_bytes, plan_memory
from kvrewrite.analysis.model_card import model_card
from kvrewrite.artifact.head_patterns import Prefill, patterns_of
from kvrewrite.cache.memory import human
from kvrewrite.capture.attention_interface import is_transformers_model
from kvrewrite.capture.fake_parameters import capture_on_devices, devices_of
from kvrewrite.capture.frontend import capture
from kvrewrite.capture.third_party import AdapterWatch, has_adapters, unwrap
from kvrewrite.compiler import Canonical, Progress, Weights, compile_captured, find_sites, quiet
from kvrewrite.errors import OptionError
from kvrewrite.ir.parallel import Peers
from kvrewrite.ir.program import Program
from kvrewrite.ir.site import AttentionSite
from kvrewrite.ir.waits import told
from kvrewrite.passes.canonical.proof import require_check
from kvrewrite.passes.insert.sparse_prefill import insert_sparse_prefill
from kvrewrite.passes.pipeline import Observer
from kvrewrite.policies import Policy
from kvrewrite.policies.default import default_policy
from kvrewrite.runtime.foreign_config import foreign_config

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel
    from kvrewrite.runtime.speculation import Speculator


def transform(
    model: nn.Module,
    policy: str | Policy | None = None,
    *,
    policy_weights: Weights = None,
    max_length: int | None = None,
    check: str = "full",
    observe: Observer | None = None,
    tp_plan: str | Peers | None = None,
    **options: Any,
) -> RewrittenModel:
    """Rewrites a decoder so that its KV cache evicts; returns a new model that shares the parameters' storage.

    Args:
        model: any causal LM of transformers (also with peft adapters, quantized by torchao, or with layers on several
            devices), or any `nn.Module` whose forward(input_ids) returns logits (B, T, vocabulary).
        policy: a name (`kvrewrite policies` lists them) or a `Policy`. Without one, `keydiff` keeps 2048 tokens in
            each head, and a warning says so.
        policy_weights: a safetensors file or tensors of the policy's trained heads.
        max_length: the length at which to fix RoPE if it depends on the length (dynamic NTK).
        check: what to prove by running the rewritten graph beside the captured one (on the CPU, in float64, with
            stand-ins for large weights): "full", "sites" (each attention alone) or "off".
        observe: called with (pass name, graph) after each pass.
        tp_plan: "auto" deals the model out over the processes of torch.distributed (tensor parallelism;
            docs/tensor_parallel.md); a `Peers` over those of another group.
        **options: the policy's options, such as budget=1024. Also prefill: sparse attention of prompts (MInference;
            docs/sparse_prefill.md), "minference", a file of patterns, or patterns by layer; by default it is dense.

    Raises:
        UnsupportedModelError: something in the model can't be rewritten exactly; names the layer and the reason.
        CaptureError: torch.export can't trace the model.
        OptionError: an option is unknown or does not fit the model.
        PolicyWeightsError: the policy's weights are missing, or of another model.
    """
    from kvrewrite.runtime.model import RewrittenModel

    config: Any = getattr(model, "config", None)
    prefill: Prefill = options.pop("prefill", None)
    chosen = _named(policy, options).tokenized(_encoder(getattr(config, "_name_or_path", "")))
    peers = _peers(tp_plan, None, next((p.device for p in model.parameters()), torch.device("cpu")))
    model = unwrap(model)
    several = len(devices_of(model)) > 1
    captured = (capture_on_devices if several else capture)(model, max_length=max_length)
    config = getattr(model, "config", None)
    program = compile_captured(captured, chosen, policy_weights, config, observe, quiet, check)
    _make_sparse(program, prefill)
    if peers is None:
        return _rewritten(program, model)
    from kvrewrite.runtime.parallel import part_of

    config, generation_config = _configs(program, model)
    _own_parameters(program.graph)
    adapters = AdapterWatch(model) if has_adapters(model) else None
    # No source: the whole model's memory is its owner's to give back.
    return RewrittenModel(part_of(program, peers, check == "full"), config, generation_config, adapters=adapters)


class Rewriter:
    """What `transform` does, for many policies on one model: the model is captured and its graph proved once.

    model, check: as for `transform`. The model must stay as it is meanwhile. Raises what `transform` raises.
    """

    def __init__(self, model: nn.Module, *, check: str = "full"):
        self.model = unwrap(model)
        several = len(devices_of(self.model)) > 1
        captured = (capture_on_devices if several else capture)(self.model)
        self._canonical = Canonical(captured, None, check=check)

    def rewrite(self, policy: str | Policy, *, policy_weights: Weights = None, **options: Any) -> RewrittenModel:
        """Returns the model with this policy; it shares the parameters' storage."""
        chosen = policies.make(policy, **options)
        config = getattr(self.model, "config", None)
        return _rewritten(self._canonical.copy().program(chosen, policy_weights, config), self.model)


def _configs(program: Program, model: nn.Module) -> tuple[Any, Any]:
    """The configuration and generation configuration of a rewritten model."""
    if is_transformers_model(model):
        return model.config, getattr(model, "generation_config", None)
    return foreign_config(program, type(model).__name__), None


def _rewritten(program: Program, model: nn.Module) -> RewrittenModel:
    """Wraps a program that was made of `model`."""
    from kvrewrite.runtime.model import RewrittenModel
    from kvrewrite.vision.model import VisionModel
    from kvrewrite.vision.tower import tower_of

    config, generation_config = _configs(program, model)
    _own_parameters(program.graph)
    adapters = AdapterWatch(model) if has_adapters(model) else None
    tower = tower_of(model)
    kind = RewrittenModel if tower is None else functools.partial(VisionModel, tower=tower)
    made = kind(program, config, generation_config, source=model, adapters=adapters)
    made.__dict__["rewrite_again"] = functools.partial(_rewrite_again, model)
    return made


def _rewrite_again(model: nn.Module, policy: str, **options: Any) -> RewrittenModel:
    """Another policy on the original of a rewritten model, whose capture was proved before."""
    return Rewriter(model, check="off").rewrite(policy, **options)


def speculate(
    model: nn.Module,
    draft: str = "self",
    *,
    budget: int | float | None = None,
    policy: str | None = None,
    tokens: int = 5,
    **options: Any,
) -> Speculator:
    """A model that answers as with its full cache, faster, because a draft proposes several tokens that one pass checks.

    Args:
        model: an original causal LM, which is rewritten twice from one capture (the weights are shared), or a rewritten
            one. One that evicts drafts with its own cache and is checked with a full one.
        draft: "self", the same weights with a small cache, "prompt_lookup" (what followed the text's last words before), or
            a rewritten model with the same vocabulary.
        budget: of the draft's cache.
        policy: of the draft's cache; snapkv by default.
        **options: of that policy.
        tokens: how many are drafted per round.

    Raises OptionError, and what `transform` raises.
    """
    from kvrewrite.runtime.model import RewrittenModel
    from kvrewrite.runtime.speculation import Speculator, full_cache, self_draft

    if draft != "self":
        if budget is not None or policy is not None or options:
            raise OptionError(f'budget, policy and options are those of a draft="self"; got them with {draft!r}')
        whole = full_cache(model) if isinstance(model, RewrittenModel) else transform(model, "full")
        return Speculator(whole, draft, tokens)
    if isinstance(model, RewrittenModel):
        return Speculator(*self_draft(model, budget, policy, **options), tokens)
    if budget is None:
        raise OptionError("a draft needs a budget: how many tokens its cache keeps")
    rewriter = Rewriter(model)
    small = rewriter.rewrite(policy or "snapkv", budget=budget, **options)
    return Speculator(rewriter.rewrite("full"), small, tokens)


def _encoder(directory: str | Path) -> Callable[[str], list[int]]:
    """What makes token ids of a text, without special tokens, with the tokenizer of a model directory; it is only opened
    then."""

    def encode(text: str) -> list[int]:
        from kvrewrite.artifact.companions import read_tokenizer

        if not directory or not Path(directory).is_dir():
            raise OptionError(
                f"an option is the text {text!r}, and this model comes from no directory with a tokenizer; expected token "
                'ids such as "12,7,301" (tokenizer.encode(text, add_special_tokens=False))'
            )
        ids: list[int] = read_tokenizer(directory).encode(text, add_special_tokens=False)
        return ids

    return encode


def _make_sparse(program: Program, prefill: Prefill) -> None:
    """Gives a proved program the patterns that were asked for, in place."""
    if prefill is not None:
        insert_sparse_prefill(program.graph, program.sites, patterns_of(prefill))


def _peers(tp_plan: str | Peers | None, tp_size: int | None, device: torch.device | str) -> Peers | None:
    """The processes that share a model, None for one alone."""
    if tp_plan is None and tp_size is None:
        return None
    from kvrewrite.runtime.parallel import find_peers

    return find_peers(tp_plan, tp_size, device)


def _named(policy: str | Policy | None, options: dict[str, Any]) -> Policy:
    """The policy that a caller named, or the one that stands for none, with a warning that says what it does."""
    if policy is not None:
        return policies.make(policy, **options)
    chosen, text = default_policy(options)
    warnings.warn(text, stacklevel=3)
    return chosen


def _with_budget(policy: Policy, budget: int) -> Policy:
    """The same policy with another budget."""
    return dataclasses.replace(policy, budget=budget)


def _own_parameters(gm: nn.Module) -> None:
    """Gives the graph its own Parameters over the same storage, so that moving one model does not move the other."""
    own: dict[int, nn.Parameter] = {}
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                wrapped = own.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
                module._parameters[name] = wrapped


@dataclass
class Conversion:
    """What `convert` did, or would do in a dry run. choice: the policy that it chose for the memory, and why."""

    program: Program
    out: Path | None
    weights_bytes: int
    plans: list[MemoryPlan]
    choice: Choice | None = None


def convert(
    model_dir: str | Path,
    out: str | Path | None,
    policy: str | Policy | None = None,
    *,
    memory: int | None = None,
    policy_weights: Weights = None,
    max_length: int | None = None,
    contexts: list[int] | None = None,
    batch: int = 1,
    link: bool = False,
    force: bool = False,
    observe: Observer | None = None,
    progress: Progress = quiet,
    compile: str | None = None,
    compile_device: str | torch.device = "cpu",
    compile_batch: int = 1,
    check: str = "full",
    prefill: Prefill = None,
    **options: Any,
) -> Conversion:
    """Converts a transformers checkpoint directory to a kvrewrite model directory without loading its weights.

    Args:
        model_dir: config.json and safetensors, as `save_pretrained` writes them.
        out: the new directory; None does everything but write (a dry run).
        policy: as for `transform`; options: its options.
        memory: bytes that the cache may take at its peak, for `batch` prompts of the longest of `contexts`. Without a
            policy, the full cache is taken if it fits, else `keydiff`; the budget is the largest that fits.
        policy_weights: as for `transform`.
        max_length: as for `transform`.
        contexts: context lengths for the memory estimate, default the model's longest.
        batch: rows for the memory estimate.
        link: hard-links the base weights instead of copying them.
        force: replaces an existing model directory.
        observe: as for `transform`.
        prefill: as for `transform`.
        progress: called with the name of each step.
        compile: "aot" adds the steps compiled by AOTInductor for `compile_device`; this loads the weights there and
            takes minutes.
        compile_device: where the compiled steps will run.
        compile_batch: 1, or 2 for any number of rows from 2 on.
        check: as for `transform`, but with random stand-ins for all weights, which have no data here.

    Raises:
        ArtifactError: a directory can't be read or written.
        UnsupportedModelError, CaptureError, OptionError, PolicyWeightsError: as for `transform`.
    """
    from kvrewrite.artifact.checkpoint import Checkpoint, read_json
    from kvrewrite.artifact.meta_model import build_on_meta
    from kvrewrite.artifact.parameter_sources import parameter_sources
    from kvrewrite.artifact.writing import check_destination, companion_files, write_artifact
    from kvrewrite.capture.fake_parameters import capture_on_meta
    from kvrewrite.runtime.aot import check_kind, compile_ahead
    from kvrewrite.vision.tower import stored_names

    check_kind(compile, compile_device)
    require_check(check)
    if memory is not None and "budget" in options:
        raise OptionError("memory and budget were both given; memory finds the budget, so leave one of them out")
    if memory is not None and policy is None and options:
        raise OptionError(
            f"got {', '.join(options)}, which belongs to a policy, but no policy, as memory chooses one; name the policy, too"
        )
    # Wrong options fail before the model is built, also where the budget comes later.
    named = policies.make("full") if memory is not None and policy is None else _named(policy, options)
    named = named.tokenized(_encoder(model_dir))
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
    itemsize = captured.dtype.itemsize
    longest = getattr(config, "max_position_embeddings", None) or 4096
    goal = None if memory is None else MemoryGoal(memory, max(contexts or [longest]), batch)
    choices: list[Choice] = []

    def chosen(sites: list[AttentionSite]) -> Policy:
        if goal is None:
            return named
        with_budget = None if policy is None else functools.partial(_with_budget, named)
        choices.append(choose(sites, itemsize, goal, with_budget))
        return choices[0].policy

    program = compile_captured(captured, chosen, policy_weights, config, observe, progress, check)
    _make_sparse(program, prefill)
    final = policies.make(program.policy["name"], **program.policy["options"])
    carried = carried_bytes(program.layout)
    plans = [plan_memory(program.sites, final, itemsize, n, batch, carried) for n in contexts or [longest]]
    if goal is not None and (most := max(plan.peak for plan in plans)) > goal.memory:
        raise OptionError(
            f"memory is {human(goal.memory)}, but the cache takes {human(most)}, of which layers without attention carry "
            f"{human(plans[0].carried)}; give memory={most}"
        )
    size = sum((model_dir / name).stat().st_size for name in checkpoint.files)
    if out is None:
        return Conversion(program, None, size, plans, *choices)
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
        vision=stored_names(model),
    )
    return Conversion(program, path, size, plans, *choices)


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    verify_hashes: bool = False,
    trust_compiled: bool = False,
    tp_plan: str | Peers | None = None,
    tp_size: int | None = None,
    check: str = "full",
) -> RewrittenModel:
    """Loads a model directory that kvrewrite wrote: offline, without the original model's code.

    tp_plan: as for `transform`; each process reads only its part of the weights, to the GPU of its number. tp_size: how
    many processes there must be (both names are those of transformers' from_pretrained).
    check: "full" proves the parts by running them together on one process; "off" does not.

    verify_hashes: also hashes the base weights (reads all of them). trust_compiled: also loads the compiled steps in
    the directory (`convert(compile="aot")`). They are native code: trust only sources whose code you would run. Without
    it they are ignored, with a warning. Raises ArtifactError.
    """
    from kvrewrite.artifact import directory as artifact

    directory = Path(directory)
    peers = _peers(tp_plan, tp_size, device)
    if peers is not None and trust_compiled:
        raise OptionError(
            "compiled steps are those of one process; load without trust_compiled, and call model.compile()"
        )
    if verify_hashes:
        artifact.verify_hashes(directory)
    model, manifest = _load(directory, device, peers, check)
    if trust_compiled:
        from kvrewrite.runtime.aot import load_ahead
        from kvrewrite.runtime.executor import Executor

        model.executor = Executor(load_ahead(model, directory, manifest))
    elif "compiled" in manifest:
        warnings.warn(
            f"{directory} has compiled steps, which were not loaded: they are native code. If you trust where they come from, "
            "load them with trust_compiled=True (--trust-compiled)",
            stacklevel=2,
        )
    return model


def _import_ahead(device: torch.device) -> None:
    """Imports what a model on a GPU needs next; the import takes seconds, which overlap with copying the weights."""
    if device.type == "cuda":
        for name in ("kvrewrite.runtime.model", "torch._inductor.compile_fx"):
            importlib.import_module(name)


def _load(
    directory: Path, device: str | torch.device, peers: Peers | None = None, check: str = "off"
) -> tuple[RewrittenModel, dict[str, Any]]:
    """Returns the model of a directory, or this process's part of it, and its manifest."""
    from kvrewrite.artifact import directory as artifact

    part: Callable[[Program], Program] | None = None
    if peers is not None:
        from kvrewrite.runtime.parallel import own_device, part_of

        device, part = own_device(device), functools.partial(part_of, peers=peers, prove=check == "full")
    with told(f"loading {directory}"):
        program, manifest = artifact.read_artifact(
            directory, device, functools.partial(_import_ahead, torch.device(device)), part
        )
    # After the weights' copy begins: these imports take seconds, which overlap with the copy to a GPU.
    from kvrewrite.artifact.companions import read_config, read_generation_config
    from kvrewrite.runtime.model import RewrittenModel

    config = read_config(directory)
    generation_config = read_generation_config(directory, manifest["files"])
    if manifest.get("vision") and peers is None:
        from kvrewrite.vision.loading import load_tower
        from kvrewrite.vision.model import VisionModel

        tower = load_tower(directory, manifest, config, device)
        return VisionModel(program, config, generation_config, source=directory, tower=tower), manifest
    return RewrittenModel(program, config, generation_config, source=directory), manifest


def inspect(
    model: nn.Module | str | Path, *, max_length: int | None = None, observe: Observer | None = None
) -> list[AttentionSite]:
    """Returns every attention site of a model or checkpoint directory as the compiler finds it; raises where it can't.

    It does not read the weights of a checkpoint directory.
    """
    if isinstance(model, nn.Module):
        model = unwrap(model)
        several = len(devices_of(model)) > 1
        return find_sites((capture_on_devices if several else capture)(model, max_length=max_length), observe)
    from kvrewrite.artifact.meta_model import build_on_meta
    from kvrewrite.capture.fake_parameters import capture_on_meta

    built, _ = build_on_meta(Path(model))
    return find_sites(capture_on_meta(built, max_length=max_length), observe)


__all__ = ["Conversion", "OptionError", "convert", "inspect", "load", "transform"]
