"""Explains why `torch.export` could not trace a model: what happened, where in the model's code, and what to do."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

# torch's exceptions for code that needs a tensor's values, which a trace does not have.
DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
NO_RULE = (UnsupportedOperatorException, UnsupportedFakeTensorException)
PACKAGE = Path(__file__).parents[1]
TORCH, STANDARD = (Path(f).parent for f in (torch.__file__, os.__file__))
LONGEST = 200  # characters of an error's own text that are quoted


def explain(error: BaseException) -> str:
    """Returns why tracing failed with `error`; completes the sentence "torch.export could not trace it:"."""
    chain = causes(error)
    known: BaseException | None = next((e for e in chain if isinstance(e, DATA_DEPENDENT)), None)
    if known is not None:
        if any(frame.f_code.co_name == "_detect_is_causal_mask" for frame, _ in traceback.walk_tb(known.__traceback__)):
            return (
                f"nn.TransformerEncoder looks into the mask that it is given to see whether it is causal{_place(known)}, and "
                "a graph holds for all masks. Tell it: pass is_causal=True with the mask"
            )
        return (
            "its forward decides by the values in a tensor (data-dependent control flow), and a graph holds for all values"
            f"{_place(known)} ({_said(known)})"
        )
    unruled = next((e for e in chain if isinstance(e, NO_RULE)), None)
    if unruled is not None:
        return (
            f"it uses an op that has no rule for shapes without data, so it can't be traced{_place(unruled)} ({_said(unruled)}). "
            "Register one with torch.library.register_fake, or use another implementation in the model"
        )
    absent = next((e for e in chain if isinstance(e, ImportError)), None)
    if absent is not None:
        return f"its forward needs a package that is not installed{_place(absent)} ({_said(absent)}). Install it"
    root = _raised(error)
    place = _place(root)
    if place:
        return (
            f"its forward raised {_said(root)}{place}. Where model(input_ids) fails, too, it needs more than token ids; where "
            "that runs, this line does what a trace can't"
        )
    return f"calling its forward with token ids raised {_said(root)}, outside of the model's own code"


def causes(error: BaseException) -> list[BaseException]:
    """Returns `error` and its chain of causes, outermost first."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _raised(error: BaseException) -> BaseException:
    """Returns the exception that was raised first, not one that was caught and handled on the way."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {text[0].strip()[:LONGEST]}" if text else name


def _place(error: BaseException) -> str:
    """Returns the last line of the model's own code in the traceback of `error`; empty if there is none."""
    here = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_models(frame):
            here = frame, line
    if here is None:
        return ""
    frame, line = here
    code = traceback.StackSummary.extract([(frame, line)])[0].line or ""
    where = f"{frame.f_globals['__name__']}, line {line}, in {frame.f_code.co_name}"
    return f", in {where}" + (f": `{code[:120]}`" if code else "")


def noted_place(frame: Any) -> str:
    """Returns the line of the model's own code where torch recorded an assumption; empty if it is not in that code."""
    if not isinstance(frame, traceback.FrameSummary) or not _is_own(Path(frame.filename)):
        return ""
    code = frame.line or ""
    where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    return f", in {where}" + (f": `{code[:120]}`" if code else "")


class FixedSize(TorchFunctionMode):
    """Finds, during a trace, the first function after which a size of `ids` is a constant. where: the function's name
    and the line of the model's code that called it, as the end of a sentence; "" until one is found."""

    def __init__(self, ids: Tensor):
        super().__init__()
        self.ids, self.where = ids, ""

    def _fixed(self) -> bool:
        return any(not isinstance(s, torch.SymInt) or s.node.maybe_as_int() is not None for s in self.ids.shape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.where and self._fixed():
            here: FrameType | None = sys._getframe(1)
            while here is not None and not _is_models(here):
                here = here.f_back
            self.where = f", in {getattr(func, '__name__', func)}"
            if here is not None:
                self.where += noted_place(traceback.StackSummary.extract([(here, here.f_lineno)])[0])
        return result


def _is_models(frame: FrameType) -> bool:
    """Whether a frame is the model's code: not torch, this package, Python's library or generated code."""
    return "__name__" in frame.f_globals and _is_own(Path(frame.f_code.co_filename))


def _is_own(path: Path) -> bool:
    """Whether a file belongs to the model's code."""
    installed = bool({"site-packages", "dist-packages"} & set(path.parts))
    others = [TORCH, PACKAGE] if installed else [TORCH, PACKAGE, STANDARD]
    return not any(path.is_relative_to(p) for p in others)
