"""One architecture through the compiler, against the unmodified model, in a process of its own.

Nothing evicted: batch 2, uneven chunks of 7, 5, 1, 1, 10 and 9 tokens through one cache and then token by token, and a
row with padding on its left, must give the unmodified model's logits. StreamingLLM: what is left in every layer and head
is exactly the sinks and the newest tokens (in layers with a window or chunk: what that still sees), within the budget;
where all layers see at most the budget, the logits are still the unmodified model's.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage import configs
from tests.coverage.modules import ALL_MODULES

LENGTH, IN_CHUNKS, PAD = 40, 33, 5
BUDGET, START = 12, 2
TOLERANCE = 1e-4  # of the largest logit, as in kvrewrite.verification for float32
MAX_PARAMETERS = 8_000_000
CPU_SECONDS, SECONDS = 240, 600  # an architecture may take: the first holds on a busy machine, too


@dataclass
class Outcome:
    """What became of one architecture.

    status: "exact"; "refused" with the compiler's reason; "wrong"; "crash"; "timeout"; "no model" where the unmodified
    model itself does not run on token ids alone. difference: largest |logit difference|; largest: largest |logit|.
    experts: for mixtures of experts, how their products were traced. seconds: for the conversion.
    """

    name: str
    status: str
    reason: str = ""
    family: str = ""
    sites: int = 0
    found_as: str = ""
    idiom: str = ""
    rope: str = ""
    experts: str = ""
    difference: float = 0.0
    largest: float = 0.0
    seconds: float = 0.0
    checks: dict[str, float] = field(default_factory=dict)


def _from_config(name: str) -> nn.Module:
    """The model of an architecture or variant, as transformers makes it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if name in configs.SECTIONED else AutoModelForCausalLM
    loaded = {"experts_implementation": name.split(", ")[1]} if name in configs.EXPERTS else {}
    return auto.from_config(configs.tiny(name), **loaded).eval()


def make(name: str, seed: int = 0) -> nn.Module:
    """The tiny model of an architecture or variant, with weights that make every part count.

    Fresh weights of most types are so small that attention is uniform, and biases, sinks and gates are zero: a wrong mask
    or scale would not show. So matrices get unit gain, and vectors some noise.
    """
    torch.manual_seed(seed)
    if name in ALL_MODULES:
        return ALL_MODULES[name]().eval()
    model = _from_config(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model


@torch.no_grad()
def _reference(model: nn.Module, ids: Tensor) -> Tensor:
    if not hasattr(model, "config"):
        return model(ids)
    out = model(ids, use_cache=False)
    return out.logits if isinstance(getattr(out, "logits", None), Tensor) else out[0]


def _check_size(name: str) -> None:
    with torch.device("meta"):
        size = sum(p.numel() for p in _from_config(name).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters, so the configuration is not tiny")


def measure(name: str) -> Outcome:
    """Converts and checks one architecture in this process."""
    outcome = Outcome(name, "no model")
    try:
        if name not in ALL_MODULES:
            _check_size(name)
        model = make(name)
        outcome.family = type(model).__name__
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, configs.VOCAB, (2, LENGTH), generator=generator)
        reference = _reference(model, ids)
        if tuple(reference.shape[:2]) != (2, LENGTH) or not bool(torch.isfinite(reference).all()):
            raise ValueError(f"its logits have shape {tuple(reference.shape)} or are not finite")
    except Exception as error:  # whatever keeps transformers from running it
        note = configs.NOT_A_TEXT.get(name)
        outcome.reason = f"{note} ({_line(error)})" if note else _line(error)
        return outcome
    return _compared(outcome, model, ids, reference)


@torch.no_grad()
def _compared(outcome: Outcome, model: nn.Module, ids: Tensor, reference: Tensor) -> Outcome:
    import kvrewrite
    from kvrewrite.errors import KVRewriteError
    from kvrewrite.verification import pieces, run_in_pieces, without_eviction

    start = time.perf_counter()
    try:
        small = kvrewrite.transform(
            model, "streaming_llm", budget=BUDGET, start=START, chunk=7, positions="original", max_length=LENGTH
        )
    except KVRewriteError as error:
        outcome.status, outcome.reason = "refused", _line(error)
        return outcome
    except Exception as error:
        outcome.status, outcome.reason = "crash", _line(error)
        return outcome
    outcome.seconds = round(time.perf_counter() - start, 2)
    sites = small.program.sites
    outcome.sites, outcome.found_as = len(sites), "/".join(sorted({s.source for s in sites}))
    outcome.idiom, outcome.rope = idiom(sites), rope(getattr(model, "config", None), sites)
    if any(s.softcap for s in sites) and hasattr(model, "set_attn_implementation"):
        # sdpa has no softcap: some versions of transformers leave it out in silence, so only "eager" is the model.
        model.set_attn_implementation("eager")
        reference = _reference(model, ids)
    if outcome.name in configs.EXPERTS:
        # Whatever it was loaded with, transformers' loop over the experts is what it must compute.
        outcome.experts = experts(small)
        model.set_experts_implementation("eager")
        reference = _reference(model, ids)
    largest = float(reference.abs().max())
    outcome.largest = largest
    try:
        whole = without_eviction(small)
        cuts = [*pieces(IN_CHUNKS), *((i, i + 1) for i in range(IN_CHUNKS, LENGTH))]
        got = run_in_pieces(whole, ids, cuts, LENGTH)
        checks = {"chunks": _distance(got, reference), "padded row": _padded(whole, ids, reference)}
        if all(0 < (s.window or s.chunk) <= BUDGET - START for s in sites):
            checks["windows under eviction"] = _distance(run_in_pieces(small, ids, cuts, LENGTH), reference)
        if all(s.latent for s in sites):
            latent = kvrewrite.transform(model, "full", mla="latent", max_length=LENGTH)
            checks["latent cache"] = _distance(run_in_pieces(latent, ids, cuts, LENGTH), reference)
        wrong = _evicted(small, ids)
    except Exception as error:
        outcome.status, outcome.reason = "crash", _line(error)
        return outcome
    outcome.checks = checks
    outcome.difference = max(checks.values())
    failed = [f"{what}: differs by {d:.1e}" for what, d in checks.items() if not d <= TOLERANCE * largest]
    # A model in which no token looks at another would pass whatever the compiler did.
    other = ids.clone()
    other[:, -4] = (other[:, -4] + 1) % configs.VOCAB
    if float((_reference(model, other)[:, -1] - reference[:, -1]).abs().max()) < 10 * TOLERANCE * largest:
        failed.append("its tokens hardly look at each other, so that nothing was checked")
    if outcome.name in configs.ROPES:
        plain = _reference(make(configs.ROPES[outcome.name][0]), ids)
        if float((plain - reference).abs().max()) < 10 * TOLERANCE * largest:
            failed.append("its logits are those of the default RoPE, so that nothing was checked")
    outcome.status = "wrong" if failed or wrong else "exact"
    outcome.reason = "; ".join([*failed, *wrong])
    return outcome


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")


def _padded(model: Any, ids: Tensor, reference: Tensor) -> float:
    """A row with padding on its left against the unmodified model on the row alone."""
    row, mask = ids.clone(), torch.ones_like(ids)
    row[1, :PAD], row[1, PAD:], mask[1, :PAD] = 0, ids[1, :-PAD], 0
    cache = model.new_cache(2, max_length=ids.shape[1])
    out = model(row, attention_mask=mask, past_key_values=cache).logits
    return _distance(torch.cat([out[0], out[1, PAD:]]), torch.cat([reference[0], reference[1, :-PAD]]))


def _evicted(model: Any, ids: Tensor) -> list[str]:
    """What StreamingLLM kept, layer by layer, against what it should have."""
    cache = model.new_cache(ids.shape[0], max_length=LENGTH)
    model(ids[:, :IN_CHUNKS], past_key_values=cache, logits_to_keep=1)
    wrong = []
    for seen in range(IN_CHUNKS + 1, LENGTH + 1):
        out = model(ids[:, seen - 1 : seen], past_key_values=cache).logits
        if not bool(torch.isfinite(out).all()):
            wrong.append(f"logits of token {seen} are not finite")
        for layer, rows in cache.positions().items():
            site = model.program.sites[layer]
            for kept in (head for heads in rows for head in heads):
                if len(kept) > BUDGET:
                    wrong.append(f"layer {layer} keeps {len(kept)} tokens of a budget of {BUDGET}")
                recent = set(range(seen - (BUDGET - START), seen))
                if not site.window and not site.chunk and set(kept) != recent | set(range(START)):
                    wrong.append(f"layer {layer} keeps {kept} of {seen} tokens")
                # The next token, at position `seen`, sees these.
                first = seen - site.window + 1 if site.window else seen // site.chunk * site.chunk if site.chunk else 0
                visible = recent & set(range(first, seen))
                if not visible <= set(kept):
                    wrong.append(f"layer {layer} lacks {sorted(visible - set(kept))} at token {seen}")
    return sorted(set(wrong))[:3]


def experts(model: Any) -> str:
    """How the graph of a mixture of experts multiplies by its experts' weights."""
    grouped = any("grouped_mm" in str(n.target) for n in model.graph_module.graph.nodes)
    return "grouped_mm" if grouped else "bmm"


def idiom(sites: list[Any]) -> str:
    """The kinds of attention among `sites`, in words."""
    found: list[str] = []
    for s in sites:
        kind = f"{s.mask} {s.window or s.chunk}" if s.window or s.chunk else s.mask
        ratio = s.heads // s.kv_heads
        extra = ["MQA" if s.kv_heads == 1 else f"GQA {ratio}"] if ratio > 1 else []
        extra += [name for name, has in (("softcap", s.softcap), ("sinks", s.sinks), ("ALiBi", s.alibi)) if has]
        if s.shares_kv_with is not None:
            extra.append("shared k, v")
        if s.head_dim != s.v_head_dim:
            extra.append(f"k {s.head_dim}, v {s.v_head_dim}")
        text = " + ".join([kind, *extra])
        if text not in found:
            found.append(text)
    return "; ".join(found)


def rope(config: Any, sites: list[Any]) -> str:
    """The rotary embedding of a model as its configuration names it, "none" where no key is rotated."""
    rotated = sum(s.rope for s in sites)
    if not rotated:
        return "none"
    if config is None:
        return "yes"
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    kinds: list[str] = []
    for p in nested:
        factor = p.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None)) or 1.0
        kind = str(p.get("rope_type", "default")) + (f", partial {factor:g}" if factor < 1 else "")
        if kind not in kinds:
            kinds.append(kind)
    return " / ".join(kinds) + (f" in {rotated} of {len(sites)}" if rotated < len(sites) else "")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


# ------------------------------------------------------------------------------------------------ in a child
def prepare() -> None:
    """Settings of a worker."""
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # Tracing makes many objects that live; looking for cycles among them takes a tenth of the time.
    gc.set_threshold(200_000, 20, 100)


def _work(pipe: Any) -> None:
    """Measures what it is told to, one after another; nothing of it is printed."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    prepare()
    while (name := pipe.recv()) is not None:
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, resource.RLIM_INFINITY))
        pipe.send(asdict(measure(name)))


class Worker:
    """Measures architectures in a process of its own, so that neither a crash nor a hang of one ends the run.

    The process is kept from one architecture to the next, since a new one costs more than most of them; one that crashed
    or hung is replaced.
    """

    def __init__(self) -> None:
        self.process: Any = None

    def __call__(self, name: str) -> Outcome:
        """The outcome of one architecture."""
        if self.process is None:
            self._start()
        self.pipe.send(name)
        try:
            if self.pipe.poll(SECONDS):
                return Outcome(**self.pipe.recv())
        except (EOFError, ConnectionResetError):
            self.process.join()
            status, self.process = self.process.exitcode, None
            if status == -signal.SIGXCPU:
                return Outcome(name, "timeout", f"not done after {CPU_SECONDS} s of processor time")
            return Outcome(name, "crash", f"its process ended with status {status}")
        self.close()
        return Outcome(name, "timeout", f"not done after {SECONDS} s")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # forked processes are several times as slow at tracing
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def close(self) -> None:
        """Ends the process, by force where it does not listen."""
        if self.process is not None:
            self.pipe.send(None)
            self.process.join(5)
            self.process.kill()
            self.process.join()
            self.process = None
