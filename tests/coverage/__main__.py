"""Measures every architecture and writes docs/coverage.md: `python -m tests.coverage [NAME ...]`.

The figures of the installed transformers go to docs/results/coverage-VERSION.json as they come; the page is made of all
such files. With names only those are measured again.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.coverage import configs
from tests.coverage.measure import measure_apart

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def results_file(version: str) -> Path:
    """Where the figures of a transformers version are."""
    return RESULTS / f"coverage-{version}.json"


def read_results(version: str) -> dict[str, dict[str, Any]]:
    """Name -> outcome, empty where a version was never measured."""
    path = results_file(version)
    return json.loads(path.read_text())["outcomes"] if path.exists() else {}


def main() -> None:
    """Runs the sweep."""
    import torch
    import transformers

    version = transformers.__version__
    known = {**dict.fromkeys(configs.model_types()), **dict.fromkeys(configs.VARIANTS)}
    names = sys.argv[1:] or list(known)
    outcomes = {n: o for n, o in read_results(version).items() if n in known} if sys.argv[1:] else {}
    start = time.perf_counter()
    for i, name in enumerate(names, 1):
        outcome = measure_apart(name)
        outcomes[name] = asdict(outcome)
        data = {"transformers": version, "torch": torch.__version__, "outcomes": dict(sorted(outcomes.items()))}
        results_file(version).write_text(json.dumps(data, indent=1) + "\n")
        print(
            f"[{i}/{len(names)}, {time.perf_counter() - start:.0f} s] {name}: {outcome.status} "
            f"{outcome.difference:.1e} {outcome.idiom} | {outcome.rope} {outcome.reason[:300]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
