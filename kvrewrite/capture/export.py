"""Exports a model's forward with torch.export, for any batch and length."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from kvrewrite.capture.attention_interface import InterfaceCalls, of_transformers, replaced
from kvrewrite.capture.branches import program_text, why_not_longer, why_not_single, without_branches
from kvrewrite.capture.captured import TRACE_BATCH, TRACE_LENGTH, Captured, RotaryTable
from kvrewrite.capture.decompose import decompose
from kvrewrite.capture.explain_failure import FixedSize, causes, explain, noted_place
from kvrewrite.capture.flatten import flatten, ids_of, longest_text, unrolled_chunk, vocab_size
from kvrewrite.capture.known_shapes import known_shapes
from kvrewrite.capture.rotary_tables import fixed_rotary
from kvrewrite.capture.side_effects import Watch, depends_on_earlier_calls
from kvrewrite.errors import CaptureError, KVRewriteError, UnsupportedModelError
from kvrewrite.ir.collector import no_collection


@contextlib.contextmanager
def _scans_as_ops() -> Iterator[None]:
    """While open, traces associative_scan of a linear recurrence, (a, x), (b, y) -> (a b, b x + y), as our op."""
    # Patched in the function's own module: the package exports the function under the module's name.
    module: Any = importlib.import_module("torch._higher_order_ops.associative_scan")
    original = module.associative_scan

    def scan(combine_fn: Any, xs: Any, dim: int, reverse: bool = False, combine_mode: str = "pointwise") -> Any:
        if reverse or not isinstance(xs, (tuple, list)) or len(xs) != 2 or not _is_linear(combine_fn):
            return original(combine_fn, xs, dim, reverse, combine_mode)
        decay, x = xs
        return decay.cumprod(dim), torch.ops.kvrewrite.decayed_sum(decay, x, dim % x.dim())

    with replaced(module, "associative_scan", scan):
        yield


def _is_linear(combine_fn: Any) -> bool:
    """Whether a function of two pairs is a linear recurrence, found by evaluating it."""
    with torch.utils._python_dispatch._disable_current_modes():
        a, x, b, y = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        product, total = combine_fn((a, x), (b, y))
        return torch.allclose(product, a * b) and torch.allclose(total, b * x + y)


class _LogitsOnly(nn.Module):
    """Wraps the model as a function from token ids and positions to logits."""

    def __init__(self, model: nn.Module, takes_positions: bool, first_position: int, extra: dict[str, Any]):
        super().__init__()
        self.model_under_capture = model
        self.takes_positions = takes_positions
        self.first_position = first_position
        self.extra = extra
        self.watch = Watch()
        self.culprit: Callable[[Tensor], FixedSize] | None = None  # finds what makes a size of the ids constant

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> list[Tensor]:
        if self.first_position:
            position_ids = position_ids + self.first_position
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        culprit = self.culprit(input_ids) if self.culprit is not None else contextlib.nullcontext()
        with self.watch.call(self.model_under_capture), culprit:
            out = self.model_under_capture(input_ids, **positions, **self.extra)
        return _logits(out)


def _logits(out: Any) -> list[Tensor]:
    """Returns the possible logits in a model's output: a tensor, `.logits`, ["logits"], or any tensor of a tuple."""
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    found = [out] if isinstance(out, Tensor) else [named] if isinstance(named, Tensor) else []
    # A tuple that starts with None starts with a loss that was not asked for; what its other entries are is not
    # certain.
    if not found and isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        found = [x for x in out if isinstance(x, Tensor)]
    if not found:
        raise CaptureError(
            f"forward returned {type(out).__name__}; expected a logits tensor, an object with .logits, or a tuple of "
            "tensors with the logits among them. Wrap the model in a module whose forward(input_ids) returns its logits."
        )
    return found


def _first_position(model: nn.Module) -> int:
    """Returns the position that a model gives a text's first token by default.

    Models derived from fairseq number tokens from their padding index + 1, but take given positions as they are. They
    have a function that transformers knows by this name.
    """
    found = set()
    for module in model.modules():
        make = getattr(module, "create_position_ids_from_input_ids", None)
        padding = getattr(module, "padding_idx", None)
        if make is None or padding is None:
            continue
        count = 4
        with torch.no_grad():
            made = make(torch.full((1, count), int(padding) + 1), int(padding))
        first = int(made.flatten()[0])
        if made.flatten().tolist() != list(range(first, first + count)):
            raise UnsupportedModelError(f"{type(module).__name__} numbers the first tokens of a text {made.tolist()}")
        found.add(first)
    if len(found) > 1:
        raise UnsupportedModelError(f"parts of the model number the first token of a text differently: {sorted(found)}")
    return found.pop() if found else 0


def export_model(
    model: nn.Module, frontend: str, max_length: int | None, calls: InterfaceCalls | None = None
) -> Captured:
    """Traces the model on `TRACE_LENGTH` tokens.

    If the trace unrolls a loop over chunks, which few models have, the model is traced again at a length with a first,
    a middle and a last chunk. calls: what the trace must contain; raises CaptureError as soon as it is clear that it
    does not.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_positions = "position_ids" in parameters
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    first = next(iter(model.parameters()), None)
    if first is None:
        raise CaptureError(f"{type(model).__name__} has no parameters; expected a decoder with weights")
    vocab = vocab_size(model) or 2
    first_position = _first_position(model) if takes_positions else 0
    wrapper = _LogitsOnly(model, takes_positions, first_position, extra)
    trace_length, chunk = TRACE_LENGTH, 0
    why_not: str | None = None  # one graph does not hold for all texts
    with fixed_rotary(model, max_length) as tables, _scans_as_ops(), _quick_tracing():
        try:
            # no_grad: otherwise regions under no_grad, RoPE among them, become submodules of the graph. If a trace
            # fails, torch prints the whole graph to stderr; our error says what failed.
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                # torch itself uses what it deprecates.
                warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)

                def again(rows: int, tokens: int) -> Any:
                    return _trace(wrapper, tokens, vocab, first.device, rows)

                program = again(TRACE_BATCH, trace_length)
                if calls is not None and not calls.modules:
                    raise CaptureError(f"{type(model).__name__} does not use transformers' attention interface")
                _check_state(wrapper, program, vocab, first.device)
                chunk = unrolled_chunk(program)
                if chunk:
                    trace_length = 2 * chunk + 3
                    if calls is not None:
                        calls.modules.clear()
                    program = _trace(wrapper, trace_length, vocab, first.device)
                else:
                    called = list(calls.modules) if calls is not None else []

                    def once(rows: int, tokens: int) -> Any:
                        return _trace(wrapper, tokens, vocab, first.device, rows, fixed=True)

                    try:
                        program = without_branches(program, again, TRACE_BATCH, trace_length)
                    except UnsupportedModelError as error:
                        why_not = str(error)
                    if not why_not and not of_transformers(model):
                        why_not = why_not_single(program, once, TRACE_BATCH, trace_length)
                    if calls is not None:
                        calls.modules[:] = called
                longest = longest_text(program)
                program = decompose(program)
                if not why_not and not chunk:  # report only the first fault
                    why_not = why_not_longer(longest, longest_text(program), again, TRACE_BATCH)
                    if calls is not None:
                        calls.modules[:] = called
        except KVRewriteError:
            raise
        except Exception as error:  # torch.export raises many types; all mean that there is no graph
            for cause in causes(error):
                if isinstance(cause, KVRewriteError):
                    raise cause from error
            raise CaptureError(f"torch.export could not trace {type(model).__name__}: {explain(error)}") from error
        if any(not _moves(size) for size in ids_of(program).shape):
            found: list[FixedSize] = []

            def culprit(ids: Tensor) -> FixedSize:
                found.append(FixedSize(ids))
                return found[-1]

            wrapper.culprit = culprit
            with torch.no_grad():
                _trace(wrapper, trace_length, vocab, first.device)
            raise CaptureError(_why_constant(program, found[-1].where if found else ""))
    captured = flatten(program, model, frontend, takes_positions)
    captured.unrolled, captured.trace_length, captured.why_not = chunk > 0, trace_length, why_not
    names = {id(m): n for n, m in model.named_modules()}
    attributes = {n.target for n in captured.graph.graph.nodes if n.op == "get_attr"}
    for module, buffer, threshold, short, long in tables:
        attribute = f"{names[id(module)]}.{buffer}".lstrip(".")
        if attribute in attributes:
            captured.rotary_tables.append(RotaryTable(attribute, threshold, short, long))
    return captured


def _trace(
    wrapper: _LogitsOnly, length: int, vocab: int, device: torch.device, rows: int = TRACE_BATCH, fixed: bool = False
) -> Any:
    """Exports the wrapped model, traced on `rows` of `length` tokens; fixed: for these sizes only."""
    ids = torch.arange(rows * length, device=device).reshape(rows, length) % vocab
    positions = torch.arange(length, device=device).repeat(rows, 1)
    auto = torch.export.Dim.AUTO
    sizes = {0: auto, 1: auto}
    shapes = None if fixed else (sizes, sizes if wrapper.takes_positions else None)
    with replaced(torch._dynamo.config, "fake_tensor_cache_enabled", fixed):  # see _quick_tracing
        return torch.export.export(wrapper, (ids, positions), dynamic_shapes=shapes, strict=False)


def _check_state(wrapper: _LogitsOnly, program: Any, vocab: int, device: torch.device) -> None:
    """Refuses a model whose forward uses state from an earlier call; transformers' own modules keep none."""
    if of_transformers(wrapper.model_under_capture):
        return

    def again() -> str:
        return program_text(_trace(wrapper, TRACE_LENGTH, vocab, device))

    def one_token() -> Any:
        return _trace(wrapper, 1, vocab, device, fixed=True)

    attribute = depends_on_earlier_calls(wrapper.watch, program_text(program), again, one_token)
    if attribute is not None:
        raise UnsupportedModelError(
            f"the model keeps {attribute} from one call for the next: its result depends on what was called before, not on its "
            "tokens alone. Switch such a cache or counter off before transforming"
        )


@contextlib.contextmanager
def _quick_tracing() -> Iterator[None]:
    """Skips parts of tracing that nothing here reads, and what it would compute twice; saves two thirds of its time.

    Torch does not cache fake tensors for equal calls: with symbolic sizes its cache costs more than it saves, and ours is there;
    with numbers (`_trace`, fixed) it saves a third. Nodes do not record the stack that made them, in versions of torch that can
    leave it out, nor a second account of their tensor beside meta["val"]. Python's collector of cycles, which would look through
    the growing graph again and again, waits.
    """
    from torch._dynamo import config as dynamo_config
    from torch.fx import config as fx_config
    from torch.fx.experimental import proxy_tensor

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(dynamo_config, "fake_tensor_cache_enabled", False))
        if hasattr(fx_config, "do_not_emit_stack_traces"):
            stack.enter_context(replaced(fx_config, "do_not_emit_stack_traces", True))
        stack.enter_context(replaced(proxy_tensor, "_extract_tensor_metadata", _no_metadata))
        stack.enter_context(known_shapes())
        stack.enter_context(no_collection())
        yield


def _no_metadata(*_: Any, **__: Any) -> None:
    """In the place of torch's function that describes a node's tensor in meta["tensor_meta"]."""


def _moves(size: Any) -> bool:
    """Whether a size is still symbolic."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _why_constant(program: Any, culprit: str) -> str:
    """Returns the message for a size of the token ids that became constant; culprit: what made it so, if known."""
    ids = ids_of(program)
    label, size = next((n, s) for n, s in zip(("batch", "length"), ids.shape, strict=True) if not _moves(s))
    where = culprit or _place_of_constant(ids, int(size))
    return (
        f"the {label} size became the constant {int(size)} while tracing{where}; the model's forward must work for any {label}. "
        "(A loop over tokens in Python makes it a constant; so do ops that are such a loop, or that torch traces for one size)"
    )


def _place_of_constant(ids: Tensor, number: int) -> str:
    """Returns where the trace assumed, as torch recorded it, that a size of the token ids is `number`; else ""."""
    shape_env = getattr(getattr(ids, "fake_mode", None), "shape_env", None)
    for guard in getattr(shape_env, "guards", ()):
        assumed = guard.expr
        if isinstance(assumed, sympy.Eq) and number in assumed.args and any(a.is_Symbol for a in assumed.args):
            return noted_place(guard.sloc.framework_loc)
    return ""
