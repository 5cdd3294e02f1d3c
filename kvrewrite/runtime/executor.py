"""What runs a model's steps in the place of its graph: compiled parts, captured steps, or programs from a file.

`RewrittenModel.executor` is the one place where that is kept; None: the graph runs op by op.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx

from kvrewrite.errors import InputError
from kvrewrite.ir.fx import names_of_attributes
from kvrewrite.passes.lower.prompt import fold, lower_prefill
from kvrewrite.passes.lower.sum_ranks import sum_directly
from kvrewrite.runtime import decode_graph, few_graph, prompt_graph
from kvrewrite.runtime.decode_graph import DecodeRunner
from kvrewrite.runtime.parallel import sums_directly
from kvrewrite.runtime.parts import Execution
from kvrewrite.runtime.prompt_graph import PrefillRunner

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel


class Pass(Protocol):
    """One pass of all rows through the program."""

    def __call__(self, inputs: dict[str, Tensor], logits: bool) -> Tensor | None:
        """inputs: what the layout of the program names. logits: whether they are wanted; else the result may be
        None."""


@dataclass
class Executor:
    """prompt: passes with any number of tokens; token: single tokens of all rows, from static buffers (None: `prompt` takes
    them, too); options: those of `RewrittenModel.compile` that made it, which makes another when the model has moved
    (None: it belongs to the device where the model is)."""

    prompt: Pass
    token: DecodeRunner | None = None
    options: dict[str, Any] | None = None


def compiled(model: RewrittenModel, static_decode: bool | None, options: dict[str, Any]) -> Executor:
    """What `RewrittenModel.compile` makes. options: of torch.compile."""
    if not model.on_one_device:
        raise InputError(
            "a model on several devices can't be compiled: parts that repeat are compiled once, for one device, and a CUDA "
            "graph belongs to one. It runs op by op; load it on one device to compile it"
        )

    def compiler(part: fx.GraphModule) -> Callable[..., Any]:
        return torch.compile(part, **{"fullgraph": True, **options})

    folded, on_cuda = fold(model.graph_module), model.device.type == "cuda"
    execution = Execution(lower_prefill(folded), compiler)
    found = Executor(execution, options={"static_decode": static_decode, **options})
    if static_decode is False or (static_decode is None and not on_cuda):
        return found
    subject = model.program, model.policy, model.device
    if reason := decode_graph.why_not(*subject):
        # To whom called `compile`, which has a decorator.
        warnings.warn(f"decoding is compiled, but not captured as a whole: {reason}", stacklevel=4)
        return found
    parallel, of_tokens = model.program.parallel, folded
    if parallel is not None and sums_directly(parallel.peers, model.device):
        of_tokens = sum_directly(folded)
    found.token = DecodeRunner(model, of_tokens, compiler, capture=on_cuda)
    if prompt_graph.why_not(*subject) is None:
        found.prompt = PrefillRunner(execution, capture=on_cuda)
        if few_graph.why_not(model.program, model.policy, folded) is None:
            found.token.few = few_graph.FewTokens(folded, compiler, capture=on_cuda)
    return found


def fewer_launches(gm: fx.GraphModule) -> Callable[..., Any]:
    """A program as it runs op by op on a GPU, which waits for the host: lowered, without compiling anything. It reads the
    parameters of `gm` at each call, whatever takes their place there. A program whose lowered form has tables of its own is
    returned as it is."""
    low = lower_prefill(gm)
    if names_of_attributes(low) - names_of_attributes(gm):
        return gm
    made = fx.GraphModule(low, low.graph)  # whose code is generated now
    run: Callable[..., Any] = types.MethodType(type(made).forward, gm)
    return run


@contextmanager
def run_by(model: RewrittenModel, executor: Executor) -> Iterator[None]:
    """Inside, another executor runs the model's steps."""
    before, model.executor = model.executor, executor
    try:
        yield
    finally:
        model.executor = before
