"""Checks a rewritten model against its original, and the files of a model directory against their hashes."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvrewrite.cache.slot_plan import prompt_slots
from kvrewrite.capture.attention_interface import attention_implementation
from kvrewrite.errors import ArtifactError, InputError
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.attention.patterns import DENSE_TOKENS
from kvrewrite.passes.insert.sparse_prefill import NAME
from kvrewrite.policies import Policy
from kvrewrite.policies.full import Full

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

# Largest accepted |difference|, relative to the largest |logit| of the reference.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LONGEST = 2048  # longest text of the eviction check, in tokens
STEPS = 96  # at most this many single-token steps; for a longer text they are a sample
UNEVEN = {0: 7, 7: 5, 12: 1, 13: 1, 14: 10}  # first token of a chunk -> its size, for the first chunks
Progress = Callable[[str, int, int], None]


@dataclass
class Check:
    """One comparison. ok: None if it could not be made; `detail` says why."""

    name: str
    ok: bool | None
    detail: str
    difference: float | None = None
    tolerance: float | None = None


@dataclass
class Report:
    """What `verify` found. `ok`: nothing failed; a check that could not be made is not a failure."""

    what: str
    dtype: str = ""
    compared_in: str = ""  # the dtype of the comparison, where it is another one
    sites: int = 0
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok is not False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    directory_or_model: str | Path | RewrittenModel,
    original: nn.Module | None = None,
    *,
    tokens: int = 48,
    seed: int = 0,
    hashes: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Compares a rewritten model with its original on random token ids.

    directory_or_model: a model directory or a rewritten model. original: the unmodified model; default: the same
    directory opened with stock transformers, or the module that `transform` was given. The directory of a foreign
    module has no original: then only the checks that need none are made, and the report says so. tokens: length of the
    compared text (longer if a sliding window or chunk would otherwise hide nothing). hashes: also hashes all files of a
    directory. progress: called with (what, done, of). Raises ArtifactError if there is nothing to open; failures are in
    the report.
    """
    start = time.perf_counter()
    report = Report(str(directory_or_model) if isinstance(directory_or_model, (str, Path)) else "model in memory")
    if tokens < 2:
        raise InputError(f"tokens is {tokens}, expected at least 2")
    say: Progress = progress or (lambda what, done, total: None)
    if isinstance(directory_or_model, (str, Path)):
        _directory(report, Path(directory_or_model), original, tokens, seed, hashes, torch.device(device), say)
    else:
        _in_memory(report, directory_or_model, original, tokens, seed, say)
    report.seconds = time.perf_counter() - start
    return report


def _directory(
    report: Report,
    directory: Path,
    original: nn.Module | None,
    tokens: int,
    seed: int,
    hashes: bool,
    device: torch.device,
    say: Progress,
) -> None:
    """Checks a model directory. The original and the rewritten model are never in memory together.

    On a CPU 16-bit models are compared in float32: what their rounding hides is larger than most faults.
    """
    from kvrewrite.api import load
    from kvrewrite.artifact import directory as artifact
    from kvrewrite.runtime.widened import NARROW, widen, widen_weights

    manifest = artifact.read_manifest(directory)
    wide = original is None and device.type == "cpu" and getattr(torch, manifest["dtype"]) in NARROW
    report.dtype, report.sites = manifest["dtype"], len(manifest["sites"])
    if hashes:
        try:
            artifact.verify_hashes(directory, lambda name, done, total: say(f"hashing {name}", done, total))
        except ArtifactError as error:
            report.checks.append(Check("hashes", False, str(error)))
            report.checks.append(Check("logits", None, "not run: the files are damaged"))
            return
        report.checks.append(Check("hashes", True, f"{len(manifest['files'])} files are as they were written"))
    windows = [max(s.get("window") or 0, s.get("chunk") or 0) for s in manifest["sites"]]
    length = _length(tokens, windows, _limit([s["inserted"] for s in manifest["sites"]], manifest["max_positions"]))
    ids = _random_ids(manifest["vocab_size"], 2, length, seed).to(device)
    reference, layers = None, None
    if original is None:
        say("running the original", 0, 1)
        original = _open_original(directory, manifest["dtype"], device)
    wide = wide and original is not None
    if original is not None:
        if wide:
            widen_weights(original)
            report.compared_in = "float32"
        sites = [AttentionSite.from_dict(site) for site in manifest["sites"]]
        reference, layers = _original_logits(original, ids, sites), _layers(original)
    del original
    say("loading the rewritten model", 0, 1)
    model = load(directory, device=device)
    if wide:
        widen(model)
    _logits(report, model, reference, layers, ids, say)


def _in_memory(
    report: Report, model: RewrittenModel, original: nn.Module | None, tokens: int, seed: int, say: Progress
) -> None:
    """Checks a model in memory."""
    if original is None and isinstance(model.source, nn.Module):
        original = model.source
    if original is None and isinstance(model.source, Path):
        original = _open_original(model.source, model.program.dtype, model.device)
    report.dtype, report.sites = model.program.dtype, len(model.program.sites)
    limit = _limit([s.inserted for s in model.program.sites], model.program.max_positions)
    length = _length(tokens, [max(s.window, s.chunk) for s in model.program.sites], limit)
    ids = _random_ids(model.program.vocab_size, 2, length, seed).to(model.device)
    reference, layers = None, None
    if original is not None:
        reference, layers = _original_logits(original, ids, model.program.sites), _layers(original)
    _logits(report, model, reference, layers, ids, say)


def _limit(inserted: list[list[str]], limit: int | None) -> int | None:
    """The longest text whose logits are the original's: with sparse prefill, a chunk that is attended to densely."""
    if not any(NAME in names for names in inserted):
        return limit
    return DENSE_TOKENS if limit is None else min(limit, DENSE_TOKENS)


def _length(tokens: int, windows: list[int], limit: int | None) -> int:
    """Chooses a text length: windows of up to 1024 tokens must hide something, and the model must take it."""
    longest = max([tokens, *(w + 8 for w in windows if w <= 1024)])
    return longest if limit is None else min(longest, limit)


def _random_ids(vocabulary: int, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


def _open_original(directory: Path, dtype: str, device: torch.device) -> nn.Module | None:
    """Opens the directory with stock transformers; None for a foreign module, which transformers can't open."""
    from transformers import AutoConfig

    from kvrewrite.artifact.checkpoint import read_json
    from kvrewrite.artifact.companions import auto_model

    if not read_json(directory / "config.json").get("model_type"):
        return None
    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    opener = auto_model(AutoConfig.from_pretrained(directory, **own))
    model: nn.Module = opener.from_pretrained(directory, dtype=getattr(torch, dtype), **own)
    return model.to(device).eval()


@torch.no_grad()
def _original_logits(original: nn.Module, ids: Tensor, sites: list[AttentionSite]) -> Tensor:
    """Returns the logits of the whole text from one call without a cache, with the model in eval mode.

    If transformers' attention interface is given a softcap, the reference is the "eager" implementation: sdpa has no
    softcap, and some versions of transformers (5.17) silently drop it, so that they run a different model. In float64
    the reference is sdpa where possible, because transformers' eager softmax is float32.
    """
    training = original.training
    original.eval()
    capped = any(s.softcap and s.source == "interface" for s in sites)
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if hasattr(original, "config") and capped:
        context = attention_implementation(original, "eager", instead_of="sdpa")
    elif getattr(original, "_supports_sdpa", False) and original.dtype == torch.float64:
        context = attention_implementation(original, "sdpa", instead_of="eager")
    try:
        cacheless = {"use_cache": False} if hasattr(original, "config") else {}
        with context:
            out = original(ids, **cacheless)
    finally:
        original.train(training)
    if isinstance(out, Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out[0]


def _layers(original: nn.Module) -> int | None:
    """Returns how many decoder layers the original says it has."""
    config = getattr(original, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None)


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """Yields uneven chunks: 7, 5, 1, 1, 10, then 9 tokens each; after token 96 at most 16 chunks, longer if needed."""
    at = 0
    while at < length:
        size = UNEVEN[at] if at in UNEVEN else 9 if at < 96 else max(9, -(-(length - 96) // 16))
        yield at, min(at + size, length)
        at += size


def single_steps(length: int) -> list[tuple[int, int]]:
    """Splits the text into single tokens, up to STEPS of them. A longer text has single tokens at its beginning, middle
    and end, and one chunk for each stretch between them. Each step reads all weights, so a thousand steps would take
    minutes."""
    if length <= STEPS:
        return [(at, at + 1) for at in range(length)]
    part, middle = STEPS // 3, (length - STEPS // 3) // 2
    stretches = [(0, part), (middle, middle + part), (length - (STEPS - 2 * part), length)]
    cuts: list[tuple[int, int]] = []
    for begin, end in stretches:
        if cuts and cuts[-1][1] < begin:
            cuts.append((cuts[-1][1], begin))
        cuts += [(at, at + 1) for at in range(cuts[-1][1] if cuts else begin, end)]
    return cuts


def _steps_in_words(cuts: list[tuple[int, int]]) -> str:
    """Describes which tokens were fed one by one."""
    single = [a for a, b in cuts if b == a + 1]
    if len(single) == len(cuts):
        return f"{len(single)} steps"
    between = ", ".join(f"{a} to {b - 1}" for a, b in cuts if b > a + 1)
    return f"sampled: {len(single)} of {cuts[-1][1]} steps; tokens {between} in one piece each"


def without_eviction(model: RewrittenModel) -> RewrittenModel:
    """Returns the same program and weights with a policy that never evicts and a prompt that is one chunk."""
    probe = copy.copy(model)
    probe.policy = Full(chunk=None, positions=model.policy.positions)
    return probe


def run_in_pieces(model: RewrittenModel, ids: Tensor, cuts: list[tuple[int, int]], max_length: int) -> Tensor:
    """Returns the logits of a text that goes through one cache piece by piece."""
    cache = model.new_cache(ids.shape[0], max_length=max_length)
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in cuts], 1)


def _logits(
    report: Report, model: RewrittenModel, reference: Tensor | None, layers: int | None, ids: Tensor, say: Progress
) -> None:
    """Compares logits; a check comes after those that it depends on."""
    length, add, steps = ids.shape[1], report.checks.append, 6
    add(_sites(model, layers))
    open_model = without_eviction(model)
    say("whole prompt", 0, steps)
    whole = run_in_pieces(open_model, ids, [(0, length)], length)
    if reference is None:
        reason = "there is no original to compare with: the directory holds a module that is not from transformers"
        add(Check("original, full budget", None, reason))
        reference = whole
    else:
        detail = f"{length} tokens, batch {ids.shape[0]}"
        first = _compare("original, full budget", reference, whole, detail)
        # If sdpa can't be the original: it does not support these scores, or the model's own code has the softmax.
        eager = any(s.softcap or s.sinks or s.source == "softmax" for s in model.program.sites)
        if first.ok is False and reference.dtype == torch.float64 and eager:
            detail += "; in float32's tolerance: an eager softmax of transformers is float32 in any model"
            narrow = _compare("original, full budget", reference, whole, detail, torch.float32)
            if narrow.ok:  # the next checks compare with the rewritten model's own logits of the whole text
                first, reference = narrow, whole
        add(first)
    # In a quantized cache the newest slots are exact, and the first call never reads what it stores.
    exact = length if model.policy.quantize == "none" else min(length, model.policy.quantize_residual)
    pairs = {"chunked": list(pieces(exact)), "token by token": single_steps(exact)}
    for step, (name, cuts) in enumerate(pairs.items(), 1):
        say(name, step, steps)
        if exact < 2:
            add(Check(name, None, f"not run: with quantize_residual={exact} all that is cached is rounded"))
            continue
        got = run_in_pieces(open_model, ids[:, :exact], cuts, length)
        longest = max(b - a for a, b in cuts)
        chunks = f"chunks of 7, 5, 1, 1, 10, 9, ... tokens{f', then {longest}' if longest > 10 else ''}"
        detail = chunks if name == "chunked" else _steps_in_words(cuts)
        add(_compare(name, reference[:, :exact], got, detail))
    say("padded", 3, steps)
    add(_padded(open_model, ids, reference))
    say("within the budget", 4, steps)
    add(_within_budget(model, ids, reference, length if model.policy.chunk is None else max(exact, 1)))
    say("eviction", 5, steps)
    add(_eviction(model))
    say("done", steps, steps)


def _sites(model: RewrittenModel, layers: int | None) -> Check:
    """Checks that every site reads a cache and that there is one site per layer of the original."""
    ops = torch.ops.kvrewrite
    readers = (ops.cached_attention.default, ops.latent_attention.default)
    reading = sum(n.target in readers for n in model.graph_module.graph.nodes)
    sites = len(model.program.sites)
    ok = sites > 0 and reading == sites and (layers is None or sites % layers == 0)
    known = "" if layers is None else f", the original has {layers} layers"
    return Check("sites", ok, f"{sites} attention sites, {reading} read a cache{known}")


def _compare(name: str, reference: Tensor, got: Tensor, detail: str, dtype: torch.dtype | None = None) -> Check:
    """Compares two tensors. dtype: whose tolerance applies; default: the reference's."""
    tolerance = TOLERANCES.get(dtype or reference.dtype, TOLERANCES[torch.float32])
    if got.shape != reference.shape:
        return Check(name, False, f"logits of shape {tuple(got.shape)}, expected {tuple(reference.shape)}")
    want = reference.double().to(got.device)
    difference = float((got.double() - want).abs().max())
    limit = tolerance * float(want.abs().max())
    same = float((got.argmax(-1) == want.argmax(-1)).double().mean())
    return Check(name, difference <= limit, f"{detail}; {same:.1%} same argmax", difference, limit)


def _padded(model: RewrittenModel, ids: Tensor, reference: Tensor) -> Check:
    """Compares a left-padded row with the same row alone."""
    pad = min(5, ids.shape[1] - 1)
    row, mask = ids.clone(), torch.ones_like(ids)
    row[1, :pad], row[1, pad:], mask[1, :pad] = 0, ids[1, :-pad], 0
    cache = model.new_cache(2, max_length=ids.shape[1])
    out = model(row, attention_mask=mask, past_key_values=cache).logits
    want = torch.cat([reference[0], reference[1, :-pad]])
    return _compare("padded row", want, torch.cat([out[0], out[1, pad:]]), f"{pad} columns of padding on the left")


def _within_budget(model: RewrittenModel, ids: Tensor, reference: Tensor, length: int) -> Check:
    """Runs the artifact's own policy on a prompt that fits its budget: nothing may change."""
    if model.policy.gates:
        return Check("own policy, within its budget", None, "its gates drop tokens of any text")
    if model.policy.data_dependent and not model.policy.shares_layers:
        return Check("own policy, within its budget", None, "its threshold drops tokens of any text")
    size = _held(model.policy, length)
    if size < 1:
        return Check("own policy, within its budget", None, "the policy evicts from any prompt")
    cache = model.new_cache(ids.shape[0], max_length=length)
    got = model(ids[:, :size], past_key_values=cache).logits
    detail = f"{model.policy.name}, {size} tokens, budget {model.policy.budget}"
    return _compare("own policy, within its budget", reference[:, :size], got, detail)


def _held(policy: Policy, length: int) -> int:
    """Returns the longest prompt of up to `length` tokens from which the policy evicts nothing."""
    for size in range(length, 0, -1):
        live = 0
        for segment in policy.plan(size):
            live += segment.length
            if live > segment.keep:
                break
        else:
            return size
    return 0


@torch.no_grad()
def _eviction(model: RewrittenModel) -> Check:
    """Runs a prompt beyond the budget: the cache must stay within it and the logits must be finite."""
    name, policy = "eviction", model.policy
    if policy.budget is None and (policy.gates or policy.data_dependent):
        return Check(name, None, "the text decides how much goes, and there is no budget")
    if policy.budget is None or not policy.evicts_ever:
        return Check(name, None, "this policy evicts nothing")
    length = policy.budget + 24 if isinstance(policy.budget, int) else LONGEST
    limit = min(LONGEST, model.program.max_positions or LONGEST)
    if length > limit:
        return Check(name, None, f"not run: a prompt beyond the budget {policy.budget} has more than {limit} tokens")
    cache = model.new_cache(1)
    ids = _random_ids(model.program.vocab_size, 1, length, 1).to(model.device)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    owners = [site for site in model.sites if site.shares_kv_with is None]
    heads = [site.kv_heads for site in owners]
    bound = max(int(held[-1].max()) for held in prompt_slots(policy, policy.plan(length), heads, [0] * len(heads)))
    if policy.head_budgets != "equal":  # heads share one budget, so one may hold more than another
        bound *= max(heads)
    if policy.shares_layers:
        bound *= sum(heads)
    most = max(int(lens.max()) for lens in cache.live_slots().values())
    finite = bool(torch.isfinite(logits).all())
    detail = f"{length} tokens, at most {most} live slots per head, {bound} allowed"
    return Check(name, most <= bound and finite, detail if finite else f"{detail}; logits are not finite")
