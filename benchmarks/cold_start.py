"""Cold start: from a new process to the second token of an answer, with empty compile caches and with filled ones.

    python -m benchmarks.cold_start [--shape llama-3.1-8b] [--prompt 8192] [--folder DIR] [--policy locret] [-o K=V ...]

Writes a checkpoint of random weights into DIR (a temporary folder unless given), converts it with the command line, and starts
two processes, one after the other, that load the converted directory, compile it and answer a prompt. Both have the same,
at first empty, folders for what Inductor, Triton and Python compile (Python's bytecode, which pip makes where it installs a
package, may be missing on a machine; there every process would compile thousands of files). Prints one JSON line. On a CPU
give `--shape tiny`.

Seconds of each process: `import_s` (Python to the end of `import kvrewrite`), `load_s`, `compile_s` (the call, which only
arranges things), `prompt_s` (compiles the parts of a chunk), `token_s` (the first two tokens: compiles the decode step's parts
and captures it), `total_s` from the start of the process. `prompt_again_s` and `token_again_s`: a second request's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def prepare(folder: Path, shape: str, layers: int | None, policy: str, options: list[str]) -> dict[str, float]:
    """Writes the checkpoint and converts it; returns the seconds of both."""
    import torch
    from safetensors.torch import save_file

    from kvrewrite.cli.options import parse_options
    from kvrewrite.policies import POLICIES, make
    from kvrewrite.tools.benchmark.shapes import ShapeSource

    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ShapeSource(shape, device=device)
    source.hf_config.num_hidden_layers = layers or source.hf_config.num_hidden_layers
    source.base.save_pretrained(folder / "model")
    convert = [sys.executable, "-m", "kvrewrite.cli", "convert", str(folder / "model"), "--out", str(folder / "out")]
    convert += ["--link", "--policy", policy, *(word for option in options for word in ("-o", option))]
    if POLICIES[policy].needs_weights:
        made = source._make_weights(make(policy, **parse_options(policy, options)))
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder / "policy.safetensors")
        convert += ["--policy-weights", str(folder / "policy.safetensors")]
    saved = time.perf_counter()
    subprocess.run(convert, check=True, stdout=sys.stderr)
    return {"save_s": round(saved - began, 1), "convert_s": round(time.perf_counter() - saved, 1)}


def start(folder: str, prompt: int, began: float) -> dict[str, float]:
    """One process's start. began: the time when it was started, in seconds of `time.time`."""
    import torch

    import kvrewrite

    marks = [("import_s", time.time())]
    cuda = torch.cuda.is_available()

    def mark(name: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        marks.append((name, time.time()))

    model = kvrewrite.load(folder, device="cuda" if cuda else "cpu")
    mark("load_s")
    model.compile()
    mark("compile_s")
    ids = torch.randint(model.program.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)

    def answer(names: tuple[str, str]) -> None:
        cache = model.new_cache(1, max_length=prompt + 64)
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        mark(names[0])
        for _ in range(2):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        mark(names[1])

    with torch.no_grad():
        answer(("prompt_s", "token_s"))
        total = marks[-1][1] - began
        answer(("prompt_again_s", "token_again_s"))
    times = [began, *(at for _, at in marks)]
    found = {name: round(b - a, 3) for (name, _), a, b in zip(marks, times, times[1:])}
    return {**found, "total_s": round(total, 1)}


def measure(
    folder: Path, shape: str, layers: int | None, prompt: int, policy: str, options: list[str]
) -> dict[str, Any]:
    """The whole measurement, as data."""
    result: dict[str, Any] = {"shape": shape, "layers": layers, "prompt": prompt, "policy": policy, "options": options}
    result.update(prepare(folder, shape, layers, policy, options))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    caches |= {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    for name in ("cold", "warmed"):
        command = [sys.executable, "-m", "benchmarks.cold_start", "--start", str(folder / "out")]
        command += ["--prompt", str(prompt), "--began", str(time.time())]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **caches})
        result[name] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Parses the command line and prints one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="other than the shape's own")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--policy", default="locret")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        print(json.dumps(start(given.start, given.prompt, given.began)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        print(json.dumps(measure(Path(folder), given.shape, given.layers, given.prompt, given.policy, given.option)))


if __name__ == "__main__":
    main()
