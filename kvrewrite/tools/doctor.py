"""Says what this machine can run, and what would be slow and why: `kvrewrite doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Extras of pyproject.toml, and a module of each package that they bring.
EXTRAS = {
    "serve": ("starlette", "uvicorn", "pydantic", "jinja2", "prometheus_client"),
    "train": ("accelerate", "datasets", "peft"),
    "eval": ("lm_eval",),
    "gguf": ("gguf", "accelerate"),
    "plot": ("matplotlib",),
}
PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy")
OLDEST_GPU = (8, 0)  # compute capability; kernels use bf16 and asynchronous copies


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: "ok", "slow", "missing" (something optional) or "wrong"."""

    area: str
    state: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """Returns it as plain data."""
        return asdict(self)


def examine(directory: Path | None = None) -> list[Finding]:
    """Looks at versions, devices, kernels, caches and extras; directory: also at what this converted model would run."""
    found = [*_versions(), *_devices(), *_kernels(), *_compile_caches(), *_extras()]
    return found if directory is None else [*found, *_model(directory)]


def _versions() -> Iterator[Finding]:
    from kvrewrite import __version__

    yield Finding("versions", "ok", f"kvrewrite {__version__}, Python {platform.python_version()}")
    wanted = _requirements()
    for name in PACKAGES:
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            optional = name == "triton" and platform.system() != "Linux"
            yield Finding("versions", "missing" if optional else "wrong", f"{name} is not installed")
            continue
        need = wanted.get(name)
        if need is not None and not need.contains(have, prereleases=True):
            text = f"{name} {have}: kvrewrite was made for {need}; pip install '{name}{need}'"
            yield Finding("versions", "wrong", text)
        else:
            yield Finding("versions", "ok", f"{name} {have}")


def _requirements() -> dict[str, Any]:
    """The versions that kvrewrite asks for, by package; empty where it is not installed but only on the path."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires("kvrewrite") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needed = [Requirement(text) for text in texts]
    return {r.name: r.specifier for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}


def _processor(cores: int, threads: int, load: float) -> Finding:
    """load: processes that wanted a core in the last minute. Threads of torch wait for each other after every op, so one that has
    to share its core holds up all: an answer took 73 s with two threads and 6 s with one, on two busy cores."""
    text = f"CPU: {cores} cores, {threads} threads for torch"
    if threads > 1 and load > cores:
        text += f"; but others keep the cores busy (load {load:.1f}), and threads wait for each other: set OMP_NUM_THREADS=1"
        return Finding("devices", "slow", text)
    return Finding("devices", "ok", text)


def _devices() -> Iterator[Finding]:
    import torch

    yield _processor(os.cpu_count() or 1, torch.get_num_threads(), os.getloadavg()[0])
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        text = (
            f"no GPU ({why}): every op runs as a torch reference, and a long prompt with a short answer takes two to four "
            "times as long as with transformers. Memory is saved all the same"
        )
        yield Finding("devices", "slow", text)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index} {facts.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        if (facts.major, facts.minor) < OLDEST_GPU:
            oldest = ".".join(map(str, OLDEST_GPU))
            text = f"compute capability {facts.major}.{facts.minor}, and the kernels need {oldest}"
            yield Finding("devices", "slow", f"{name}: {text}: set KVREWRITE_KERNELS=reference")
        else:
            yield Finding("devices", "ok", name)


def _kernels() -> Iterator[Finding]:
    import torch

    mode = os.environ.get("KVREWRITE_KERNELS", "auto")
    if mode == "reference":
        yield Finding("kernels", "slow", "KVREWRITE_KERNELS=reference: no kernel is used; unset it")
    elif mode == "fused" and not torch.cuda.is_available():
        text = "KVREWRITE_KERNELS=fused without a GPU: kernels would run in Triton's interpreter, or fail; unset it"
        yield Finding("kernels", "slow", text)
    elif torch.cuda.is_available():
        yield Finding("kernels", "ok", "fp32, fp16 and bf16 run in kernels; fp64 runs as a torch reference")
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        yield Finding("kernels", "wrong", "a GPU, but no Triton to compile kernels with: pip install triton")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        text = "no C++ compiler: compile() and --compile aot need one (Debian: apt install g++)"
        yield Finding("kernels", "missing", text)


def _compile_caches() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        return
    # Inductor's default lies in the temporary folder, Triton's at home.
    defaults = {"TORCHINDUCTOR_CACHE_DIR": tempfile.gettempdir(), "TRITON_CACHE_DIR": str(Path.home() / ".triton")}
    for name, default in defaults.items():
        folder = os.environ.get(name, default)
        if Path(folder).is_relative_to(tempfile.gettempdir()):
            text = f"{name}: {folder} may be emptied, and then compile() takes 20 to 60 s again; set it to a lasting folder"
            yield Finding("caches", "slow", text)


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        gone = [module for module in modules if importlib.util.find_spec(module) is None]
        if gone:
            text = f"kvrewrite {extra}: {', '.join(gone)} not installed; pip install 'kvrewrite[{extra}]'"
            yield Finding("extras", "missing", text)


def _model(directory: Path) -> Iterator[Finding]:
    """What this model would run slowly, and why: the questions that the runtime asks before it captures."""
    import torch

    from kvrewrite import policies
    from kvrewrite.artifact.directory import read_artifact
    from kvrewrite.kernels import limits
    from kvrewrite.runtime import decode_graph, prompt_graph

    program, _ = read_artifact(directory)
    policy = policies.make(program.policy["name"], **program.policy["options"])
    yield Finding("model", "ok", f"{directory}: {policy.name}, {len(program.sites)} attention layers, {program.dtype}")
    bits = getattr(torch, program.dtype).itemsize * 8
    if bits == 64:
        yield Finding("model", "slow", "float64 has no kernels: convert a checkpoint in bfloat16 or float32")
    reasons: dict[str, list[int]] = {}
    for site in program.sites:
        why = limits.why_not_latent(site.cached_v_dim)
        for tokens in (1, 2):
            group = site.heads // site.kv_heads
            why = why or limits.why_not(site.head_dim, site.v_head_dim, group, tokens, False, bits)
        if why is not None:
            reasons.setdefault(why, []).append(site.layer)
    from kvrewrite.tools.tables import ranges

    for why, layers in reasons.items():
        yield Finding("model", "slow", f"no attention kernel for layers {ranges(layers)}: {why}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for what, asked in (("single tokens", decode_graph), ("chunks of a prompt", prompt_graph)):
        if why := asked.why_not(program, policy, device):
            yield Finding("model", "slow", f"compile() captures no {what}: {why}")
