"""Notebooks from examples: a script of cells (`# %%`) is the source, and examples/notebooks/ has it as .ipynb.

python -m tests.support.notebooks writes them again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = EXAMPLES / "notebooks"
MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """The examples that are made of cells."""
    return sorted(path for path in EXAMPLES.glob("*.py") if path.read_text().startswith("# %%"))


def target(source: Path) -> Path:
    """Where an example's notebook is."""
    return NOTEBOOKS / f"{source.stem}.ipynb"


def cells(source: Path) -> list[dict[str, Any]]:
    """The cells of an example, in notebook format 4.5, without outputs."""
    made: list[dict[str, Any]] = []
    parts = MARK.split(source.read_text())[1:]  # kind, text, kind, text, ...
    for kind, part in zip(parts[::2], parts[1::2]):
        text, common = part.strip(), {"id": f"cell-{len(made)}", "metadata": {}}
        if kind:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines())
            made.append({"cell_type": "markdown", **common, "source": text.splitlines(keepends=True)})
        else:
            lines = text.splitlines(keepends=True)
            made.append({"cell_type": "code", **common, "execution_count": None, "outputs": [], "source": lines})
    return made


def notebook(source: Path) -> str:
    """An example as the text of a notebook."""
    data = {"cells": cells(source), "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOKS.mkdir(exist_ok=True)
    for path in sources():
        target(path).write_text(notebook(path))
