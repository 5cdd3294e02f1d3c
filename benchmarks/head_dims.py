"""The sweep of tests/support/head_dims.py over all head dims and dtypes on a GPU, as a table for docs/head_dims.md.

    python -m benchmarks.head_dims --json OUT.json --table OUT.md [--workers 16] [--seconds 300] [--dims 40,136:72]

Kernels are compiled for each head dim, so many processes share the GPU. A head dim that ends its process is a row that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton

from tests.support.head_dims import DIMS, FACTOR, UNEQUAL, sweep

DTYPES = ("float32", "float16", "bfloat16")
SHAPES = ("prompt", "chunk", "token")
Cell = tuple[int, int, str]


def work(cells: list[Cell], out: Path) -> None:
    """A process's cells, one line of JSON each, after a line that says that it was begun."""
    with out.open("a") as file:
        for d, dv, dtype in cells:
            row: dict[str, Any] = {"d": d, "dv": dv, "dtype": dtype}
            file.write(json.dumps({**row, "begun": True}) + "\n")
            file.flush()
            start = time.monotonic()
            try:
                row["ops"] = [dataclasses.asdict(x) for x in sweep(d, dv, getattr(torch, dtype), "cuda", seed=d)]
            except Exception as error:  # a row of the table; the next process goes on behind it
                file.write(json.dumps({**row, "failed": f"{type(error).__name__}: {error}"[:300]}) + "\n")
                file.flush()
                raise
            row["seconds"] = round(time.monotonic() - start, 1)
            file.write(json.dumps(row) + "\n")
            file.flush()


def run(cells: list[Cell], workers: int, seconds: float) -> list[dict[str, Any]]:
    """All cells that can be done in that time, in `workers` processes; what one that ended early left is given to new ones."""
    rows: dict[Cell, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while (left := [cell for cell in cells if cell not in rows]) and time.monotonic() < end:
        with TemporaryDirectory() as folder:
            running = []
            for i in range(min(workers, len(left))):
                out = Path(folder) / f"{i}.jsonl"
                command = [sys.executable, "-m", "benchmarks.head_dims", "--work", str(out)]
                running.append((subprocess.Popen([*command, json.dumps(left[i::workers])]), out))
            for process, out in running:
                late = False
                try:
                    process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    late = True
                    process.kill()
                    process.wait()
                for line in out.read_text().splitlines() if out.exists() else ():
                    row = json.loads(line)
                    if row.pop("begun", False):
                        row["failed"] = "no time was left" if late else f"its process ended with {process.returncode}"
                    rows[row["d"], row["dv"], row["dtype"]] = row
    for d, dv, dtype in left:
        rows.setdefault((d, dv, dtype), {"d": d, "dv": dv, "dtype": dtype, "failed": "no time was left"})
    return [rows[cell] for cell in cells]


def number(x: float) -> str:
    return "0" if x == 0 else f"{x:.0e}".replace("e-0", "e-")


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each pair of head dims: errors of attention ("reference": it has no kernel), and the error of the worst op as a
    share of what is allowed."""
    by_cell = {(r["d"], r["dv"], r["dtype"]): r for r in rows}
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    heads = [f"{shape} {short[dtype]}" for shape in SHAPES for dtype in DTYPES] + [
        f"worst op {short[x]}" for x in DTYPES
    ]
    lines = ["| D | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for d, dv in dict.fromkeys((r["d"], r["dv"]) for r in rows):
        found = [str(d) if d == dv else f"{d}, values {dv}"]
        cells = [by_cell.get((d, dv, dtype), {}) for dtype in DTYPES]
        for shape in SHAPES:
            for cell in cells:
                ops = [x for x in cell.get("ops", ()) if (x["op"], x["shape"]) == ("attention", shape)]
                given = ["reference" if x["missing"] else number(x["error"]) for x in ops]
                found.append(given[0] if given else cell.get("failed", ""))
        for cell in cells:
            shares = [share(x) for x in cell.get("ops", ()) if not x["missing"]]
            found.append(f"{max(shares):.2f}" if shares else cell.get("failed", ""))
        lines.append("| " + " | ".join(found) + " |")
    return "\n".join(lines)


def share(x: dict[str, Any]) -> float:
    """An op's error as a share of what is allowed; where bits must be equal, 0 or infinity."""
    if not x["bar"]:
        return 0.0 if x["error"] == 0 else float("inf")
    return float(x["error"] / x["bar"])


def parsed(dims: str) -> list[tuple[int, int]]:
    pairs = [part.split(":") for part in dims.split(",")]
    return [(int(pair[0]), int(pair[-1])) for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop then, with what has been done")
    parser.add_argument("--dims", type=parsed, default=[*((d, d) for d in DIMS), *UNEQUAL])
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work([tuple(cell) for cell in json.loads(args.work[1])], Path(args.work[0]))
        return
    rows = run([(d, dv, dtype) for d, dv in args.dims for dtype in DTYPES], args.workers, args.seconds)
    where = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "factor": FACTOR,
    }
    if args.json:
        args.json.write_text(json.dumps({**where, "rows": rows}, indent=None, separators=(",", ":")) + "\n")
    if args.table:
        args.table.write_text(table(rows) + "\n")
    wrong = [r for r in rows if "ops" not in r or any(not x["missing"] and not share(x) <= 1 for x in r["ops"])]
    for r in wrong:
        bad = [
            (x["op"], x["shape"], x["error"], x["bar"])
            for x in r.get("ops", ())
            if not x["missing"] and not share(x) <= 1
        ]
        print("WRONG", r["d"], r["dv"], r["dtype"], r.get("failed", bad))
    print(
        f"{len(rows)} head dims and dtypes, {len(wrong)} wrong, {sum(r.get('seconds', 0) for r in rows):.0f} s of work"
    )


if __name__ == "__main__":
    main()
