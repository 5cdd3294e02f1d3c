"""Lines of rendered code, and their layout on a page."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

WIDTH = 104


@dataclass
class Line:
    """One statement. names: what it assigns; op: the op of its last node; nodes: those written in it, by their names in
    the graph; shape, dtype: of its value; parameters: the weights that it reads, with their shapes; note: a comment for
    people; new: whether the compiler added it."""

    names: list[str]
    code: str
    op: str
    nodes: list[str]
    shape: str | None = None
    dtype: str | None = None
    parameters: dict[str, str] = field(default_factory=dict)
    note: str = ""
    new: bool = False

    @property
    def comment(self) -> str:
        """Returns shape, parameters and note as one comment."""
        parts = [self.shape] if self.shape else []
        if self.shape and self.dtype:
            parts[0] = f"{self.shape} {self.dtype}"
        parts += [f"{name} {shape}" for name, shape in self.parameters.items()]
        return "; ".join([*parts, self.note] if self.note else parts)


def layout(lines: list[Line], marks: bool = False, indent: str = "", width: int = WIDTH) -> str:
    """Formats statements as text: comments in one column if they fit, long calls on several lines. marks: "+" before
    those that the compiler added."""
    short = [len(line.code) for line in lines if len(line.code) <= 72]
    column = max(short, default=0) + 2
    out: list[str] = []
    for line in lines:
        sign = ("+ " if line.new else "  ") if marks else ""
        rows = wrapped(line.code, width)
        comment = line.comment
        if comment and len(rows) == 1 and len(line.code) <= 72 and column + len(comment) <= 128:
            rows[0] = f"{line.code:<{column}}# {comment}"
        elif comment:
            out.append(f"{sign}{indent}# {comment}")
        out += [f"{sign}{indent}{row}" for row in rows]
    return "\n".join(out)


def wrapped(code: str, width: int = WIDTH) -> list[str]:
    """Splits a statement into as many lines as needed, inside the parentheses of its outermost call."""
    if len(code) <= width:
        return [code]
    at = code.find("(")
    if at < 0 or _closing(code, at) < len(code.removesuffix(":")) - 1:
        at = code.find(" = ") + 3
        code = f"{code[:at]}({code[at:]})"
    tail = "):" if code.endswith("):") else ")"
    head, body = code[: at + 1], code[at + 1 : -len(tail)]
    inner = textwrap.wrap(body, width - 4, break_long_words=False, break_on_hyphens=False)
    return [head, *(f"    {row}" for row in inner), tail]


def _closing(code: str, at: int) -> int:
    """Returns the index of the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] == "(") - (code[i] == ")")
        if depth == 0:
            return i
    return -1
