"""Measures every architecture and writes docs/coverage.md: `python -m tests.coverage [NAME ...]`.

The outcomes with the installed transformers go to docs/results/coverage-VERSION.json as they come; the page is made of all
such files. With names only those are measured again; `--missing` goes on with a run that was interrupted; `--page` measures
nothing.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

from tests.coverage import configs, page
from tests.coverage.measure import Worker
from tests.coverage.modules import ALL_MODULES


def main() -> None:
    """Runs the sweep."""
    import torch
    import transformers

    version = transformers.__version__
    known = [*ALL_MODULES, *sorted([*configs.model_types(), *configs.VARIANTS], key=configs.order)]
    arguments = sys.argv[1:]
    outcomes = {n: o for n, o in page.read(version).items() if n in known} if arguments else {}
    names = arguments or known
    if arguments == ["--page"]:
        names = []
    elif arguments == ["--missing"]:
        names = [n for n in known if n not in outcomes]
    elif unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"unknown: {', '.join(unknown)}; expected names out of docs/coverage.md, --missing or --page")
    start, measure = time.perf_counter(), Worker()
    for i, name in enumerate(names, 1):
        outcome = measure(name)
        outcomes[name] = asdict(outcome)
        data = {"transformers": version, "torch": torch.__version__, "outcomes": dict(sorted(outcomes.items()))}
        page.results_file(version).write_text(json.dumps(data, indent=1) + "\n")
        print(
            f"[{i}/{len(names)}, {time.perf_counter() - start:.0f} s] {name}: {outcome.status} "
            f"{outcome.difference:.1e} {outcome.idiom} | {outcome.rope} {outcome.reason[:300]}",
            flush=True,
        )
    measure.close()
    page.write()


if __name__ == "__main__":
    main()
