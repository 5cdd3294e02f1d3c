"""Front ends: an unmodified decoder in, a flat `torch.fx` graph out.

The graph computes `logits = f(input_ids, position_ids)` without a cache, for any batch and length, and keeps the
parameters' own names and storage. Models of transformers that use its attention interface are traced with an attention
function that is one canonical op and a mask function that only says which mask it stands for; everything else is traced
as it is, and `passes/canonical/find_attention.py` finds the attention in what comes out.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

import kvrewrite.ops  # noqa: F401  (registers the ops that the trace emits)
from kvrewrite.capture.branches import alone, program_text, shorter, without_branches
from kvrewrite.capture.decompose import decompose
from kvrewrite.capture.explain_failure import FixedSize, causes, explain, noted_place
from kvrewrite.capture.side_effects import Watch, depends_on_earlier_calls, untouched
from kvrewrite.capture.third_party import check_layers, plain_4bit_layers, without_hooks
from kvrewrite.errors import CaptureError, KVRewriteError, UnsupportedModelError
from kvrewrite.ir.fx import clean_path, is_op, set_attr, symbol
from kvrewrite.ir.masks import FARTHEST, UnknownMask, classify_mask, expected_mask, spread, with_ends

TRACE_BATCH, TRACE_LENGTH = 2, 17  # at least 2 (size 1 silently becomes a constant); 17 is no model's dimension

TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")  # of transformers' `experts_implementation`
NEAR = 1024  # tokens at all pairs of which a mask function is evaluated
MAX_CHUNK = 2048  # tokens of a chunk, where layers cut the sequence into such

# What an attention function of transformers may be given besides q, k, v, mask, scaling and dropout. Anything else that
# is not None would change the result in silence.
KNOWN_ATTENTION_KWARGS = {
    "sliding_window", "softcap", "s_aux", "sinks", "is_causal", "position_ids", "position_embeddings", "use_cache",
    "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_hidden_states",
    "return_dict", "num_items_in_batch", "output_router_logits", "is_training", "layer_idx",
}  # fmt: skip


@dataclass
class RotaryTable:
    """Inverse frequencies that depend on the length (longrope, dynamic NTK): graph attribute, and how to choose.

    `short` applies up to `threshold` tokens, `long` beyond. `dynamic` types recompute theirs for every length, so they are
    fixed at `fixed_length` instead.
    """

    attribute: str
    threshold: int
    short: Tensor
    long: Tensor


@dataclass
class Captured:
    """A captured model.

    graph: flat GraphModule with placeholders `input_ids` and, where the model takes positions, `position_ids`, both
    (batch, length) int64; one output, logits (batch, length, vocabulary). aliases: parameter name -> other names of the
    same parameter (tied weights). devices: parameter -> device, where they are not all the same.
    """

    graph: fx.GraphModule
    frontend: str
    dtype: torch.dtype
    vocab_size: int
    batch_symbol: Any = None
    length_symbol: Any = None
    max_positions: int | None = None
    aliases: dict[str, list[str]] = field(default_factory=dict)
    persistent: set[str] = field(default_factory=set)
    rotary_tables: list[RotaryTable] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)
    # Tokens of the trace; what is `unrolled`, a loop over chunks, holds for sequences of as many chunks only.
    trace_length: int = TRACE_LENGTH
    unrolled: bool = False
    # Tokens up to which masks were compared at every distance, of the mask for which it is the fewest; 0 where there was no mask.
    compared: int = 0
    # What `passes/canonical/validate.py` compared the canonical graph with, and what it proved; None where that was switched off.
    before: Any = None
    stand_ins: Any = None
    proof: Any = None
    # Why the graph does not hold for all numbers of tokens and rows; "" where it does. `canonical` refuses it, after what is
    # wrong with the attention, which may be why the model goes another way.
    branch: str = ""


# ------------------------------------------------------------------------------------- transformers' attention interface
def _classify_mask_function(mask_function: Any) -> tuple[int, int, int]:
    """(window, chunk) of an index-based mask function of transformers, and the number of tokens up to which that holds.

    It is evaluated and compared with what we know: at all pairs of the first tokens, and at every distance up to FARTHEST, or as
    far as an integer that it closes over asks for.
    """
    sizes = [c for c in _integers_in(mask_function) if c <= 1 << 20]

    def seen_at(positions: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long)
        try:
            mask = mask_function(zero, zero, positions[:, None], positions[None])
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise UnsupportedModelError(f"the mask function could not be evaluated: {error}") from error
        return torch.as_tensor(mask).expand(1, len(positions), len(positions))

    with torch.utils._python_dispatch._disable_current_modes():
        length = max([FARTHEST, *(2 * s + 3 for s in sizes)])
        try:
            positions, seen = with_ends(spread(length), seen_at)
            window, chunk = classify_mask(seen[0], positions)
            first = torch.arange(NEAR)
            if torch.equal(seen_at(first)[0], expected_mask(window, chunk, first)):
                return window, chunk, length
        except UnknownMask:
            pass
    raise UnsupportedModelError(
        "the mask is neither causal nor a sliding window nor chunked (prefix, bidirectional or content-dependent masks "
        "can't be kept with an evicted cache)"
    )


def _integers_in(function: Any, depth: int = 0) -> list[int]:
    """The integers that a mask function closes over, nested functions included."""
    found: list[int] = []
    for cell in getattr(function, "__closure__", None) or ():
        value = cell.cell_contents
        values = value if isinstance(value, (list, tuple)) else [value]
        for item in values:
            if isinstance(item, int) and not isinstance(item, bool):
                found.append(item)
            elif callable(item) and depth < 8:
                found.extend(_integers_in(item, depth + 1))
    return sorted(set(found))


class _InterfaceCalls:
    """Our attention and mask function for one capture.

    modules: paths of the modules that called the attention function, in order. masks: what stands for each mask, an empty
    tensor of its shape, and the window and chunk of that mask. Models may slice a mask to its whole size, so it is known by
    its storage.
    """

    def __init__(self, model: nn.Module):
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.modules: list[str] = []
        self.masks: list[tuple[Tensor, tuple[int, int]]] = []
        self.compared = 0  # tokens up to which these masks were compared

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Any = None,
        attention_mask: Tensor | None = None,
        device: Any = None,
        **_: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedModelError("the model makes its own padding mask, which capture does not expect")
        *found, compared = _classify_mask_function(mask_function)
        self.compared = min(self.compared or compared, compared)
        stand_in = torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool, device=device)
        self.masks.append((stand_in, (found[0], found[1])))
        return stand_in

    def _window_and_chunk(self, mask: Tensor) -> tuple[int, int] | None:
        """What `mask` stands for; None where it is not ours as it was, from its first to its last row and column."""
        for ours, found in self.masks:
            if mask.untyped_storage()._cdata == ours.untyped_storage()._cdata:
                same = mask.shape == ours.shape and mask.stride() == ours.stride() and mask._version == 0
                return found if same and mask.storage_offset() == 0 else None
        return None

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        path = self.paths.get(id(module), type(module).__name__)
        where = f"layer {len(self.modules)} ({path})"
        for name, given in kwargs.items():
            if given is not None and name not in KNOWN_ATTENTION_KWARGS:
                raise UnsupportedModelError(
                    f"{where}: its attention is given {name}={type(given).__name__}, which changes what it computes in a "
                    "way that kvrewrite does not know (content-dependent or sparse attention, or a learned bias)"
                )
        window = chunk = 0
        if attention_mask is not None:
            found = self._window_and_chunk(attention_mask)
            if found is None:
                raise UnsupportedModelError(f"{where}: the model edits its attention mask on the way to the attention")
            window, chunk = found
        else:
            causal = kwargs.get("is_causal")
            if not (getattr(module, "is_causal", True) if causal is None else causal):
                raise UnsupportedModelError(f"{where}: its attention is not causal")
            window = int(kwargs.get("sliding_window") or 0)
        sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
        self.modules.append(path)
        out = torch.ops.kvrewrite.attention(
            query,
            key,
            value,
            sinks.reshape(-1) if sinks is not None else None,
            None,
            float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
            float(kwargs.get("softcap") or 0.0),
            window,
            chunk,
        )
        # Contiguous as transformers' own functions return it: models `view` it. Normalizing drops the copy.
        return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _replaced(obj: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute for a while."""
    before = getattr(obj, name)
    setattr(obj, name, value)
    try:
        yield
    finally:
        setattr(obj, name, before)


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object that a part of a transformers model looks at."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


@contextlib.contextmanager
def attention_implementation(model: nn.Module, name: str, instead_of: str | None = None) -> Iterator[None]:
    """Runs a transformers model with another attention for a while. instead_of: only where a part has this one now."""
    with contextlib.ExitStack() as stack:
        for config in _configs(model):
            if instead_of in (None, config._attn_implementation_internal):
                stack.enter_context(_replaced(config, "_attn_implementation_internal", name))
        yield


@contextlib.contextmanager
def _transformers_tracing(model: nn.Module, attention: str) -> Iterator[None]:
    """Sets the attention implementation of a transformers model for the trace, and puts everything back afterwards.

    Experts keep the implementation that the model was loaded with where that can be traced. transformers' own loop over
    experts can't (it looks at what was routed), nor can kernels that a graph does not show; grouped_mm computes the same.
    Packed-sequence detection is switched off: while tracing, transformers can't look at the positions, so it would put
    their differences into every mask. Recurrent layers are traced in the form that torch.compile gets, whose scans are few ops;
    for other export targets they are spelled out token by token.
    """
    from transformers import masking_utils

    with contextlib.ExitStack() as stack:
        if hasattr(masking_utils, "find_packed_sequence_indices"):
            stack.enter_context(_replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        stack.enter_context(attention_implementation(model, attention))
        for source in {sys.modules[type(module).__module__] for module in model.modules()}:
            if source.__name__.startswith("transformers.models.") and hasattr(source, "is_torchdynamo_exporting"):
                stack.enter_context(_replaced(source, "is_torchdynamo_exporting", lambda: False))
        for config in _configs(model):
            if getattr(config, "_experts_implementation_internal", None) not in (None, *TRACEABLE_EXPERTS):
                stack.enter_context(_replaced(config, "_experts_implementation_internal", "grouped_mm"))
        yield


# ------------------------------------------------------------------------------------- associative scans
@contextlib.contextmanager
def _scans_as_ops() -> Iterator[None]:
    """Makes torch's associative_scan of a linear recurrence, (a, x), (b, y) -> (a b, b x + y), one op of ours for the trace."""
    # Not an attribute of its package, where the function has its name.
    module: Any = importlib.import_module("torch._higher_order_ops.associative_scan")
    original = module.associative_scan

    def scan(combine_fn: Any, xs: Any, dim: int, reverse: bool = False, combine_mode: str = "pointwise") -> Any:
        if reverse or not isinstance(xs, (tuple, list)) or len(xs) != 2 or not _is_linear(combine_fn):
            return original(combine_fn, xs, dim, reverse, combine_mode)
        decay, x = xs
        return decay.cumprod(dim), torch.ops.kvrewrite.decayed_sum(decay, x, dim % x.dim())

    with _replaced(module, "associative_scan", scan):
        yield


def _is_linear(combine_fn: Any) -> bool:
    """Whether a function of two pairs is that of a linear recurrence, by evaluating it."""
    with torch.utils._python_dispatch._disable_current_modes():
        a, x, b, y = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        product, total = combine_fn((a, x), (b, y))
        return torch.allclose(product, a * b) and torch.allclose(total, b * x + y)


# ------------------------------------------------------------------------------------- rotary embeddings by length
@contextlib.contextmanager
def _fixed_rotary(
    model: nn.Module, max_length: int | None
) -> Iterator[list[tuple[nn.Module, str, int, Tensor, Tensor]]]:
    """Takes the length-dependent choice out of rotary embeddings for the trace.

    transformers picks longrope's and dynamic NTK's frequencies by looking at the largest position of each call, which
    a graph can't do and which makes whole and chunked prefill disagree. The frequencies become data: yields
    (module, buffer name, threshold, short, long) for each such table.
    """
    tables: list[tuple[nn.Module, str, int, Tensor, Tensor]] = []
    undo: list[tuple[nn.Module, Any, str, Tensor]] = []
    try:
        for module in model.modules():
            rope_type = getattr(module, "rope_type", None)
            kinds: dict[Any, Any] = rope_type if isinstance(rope_type, dict) else {None: rope_type}
            if not any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in kinds.values()):
                continue
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            config: Any = module.config
            for layer_type, kind in kinds.items():
                if not ("dynamic" in kind or kind == "longrope"):
                    continue
                prefix = f"{layer_type}_" if layer_type else ""
                name = f"{prefix}inv_freq"
                parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
                limit = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
                kwargs = {"layer_type": layer_type} if layer_type else {}
                current: Tensor = getattr(module, name)
                device = current.device if current.device.type != "meta" else torch.device("cpu")
                init = ROPE_INIT_FUNCTIONS[kind]
                short, _ = init(config, device, seq_len=1, **kwargs)
                length = max(max_length or config.max_position_embeddings, limit + 1)
                long, _ = init(config, device, seq_len=limit + 1 if kind == "longrope" else length, **kwargs)
                tables.append((module, name, limit, short.float(), long.float()))
                undo.append((module, rope_type, name, current))
            module.rope_type = (
                dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"  # type: ignore[assignment]
            )
        yield tables
    finally:
        for module, rope_type, _name, _current in undo:
            module.rope_type = rope_type


# ------------------------------------------------------------------------------------- export
class _LogitsOnly(nn.Module):
    """The model as a function of token ids and positions to logits."""

    def __init__(self, model: nn.Module, takes_positions: bool, first_position: int, extra: dict[str, Any]):
        super().__init__()
        self.model_under_capture = model
        self.takes_positions = takes_positions
        self.first_position = first_position
        self.extra = extra
        self.watch = Watch()
        self.culprit: Callable[[Tensor], FixedSize] | None = None  # looks for what makes a size of the ids a constant

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> list[Tensor]:
        if self.first_position:
            position_ids = position_ids + self.first_position
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        culprit = self.culprit(input_ids) if self.culprit is not None else contextlib.nullcontext()
        with self.watch.call(self.model_under_capture), culprit:
            out = self.model_under_capture(input_ids, **positions, **self.extra)
        return _logits(out)


def _logits(out: Any) -> list[Tensor]:
    """What may be the logits in what a model returns: a tensor, `.logits` or ["logits"], or any tensor of a tuple."""
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    found = [out] if isinstance(out, Tensor) else [named] if isinstance(named, Tensor) else []
    # A tuple that begins with nothing begins with a loss that was not asked for: what else is in it is no certain thing.
    if not found and isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        found = [x for x in out if isinstance(x, Tensor)]
    if not found:
        raise CaptureError(
            f"forward returned {type(out).__name__}; expected a logits tensor, an object with .logits, or a tuple of "
            "tensors with the logits among them. Wrap the model in a module whose forward(input_ids) returns its logits."
        )
    return found


def _choose_logits(found: list[fx.Node], ids: Tensor, table: tuple[int, int] | None) -> fx.Node:
    """The logits among the tensors that a model returns.

    table: rows and columns of the token embedding. Logits have one entry for each of its rows; a head may have others (a padded
    or a cut vocabulary), but what has the embedding's columns is hidden states.
    """

    def size(node: fx.Node) -> int | None:
        value: Tensor = node.meta["val"]
        if value.dim() != 3 or [symbol(s) for s in value.shape[:2]] != [symbol(s) for s in ids.shape]:
            return None
        return value.shape[2] if isinstance(value.shape[2], int) and value.is_floating_point() else None

    sizes = [size(node) for node in found]
    if table is not None and table[0] in sizes:
        return found[sizes.index(table[0])]
    first: Tensor = found[0].meta["val"]
    shape = tuple(map(str, first.shape))
    if sizes[0] is None:
        last = first.dim() == 3 and first.shape[1] == 1
        raise CaptureError(
            f"the logits have the shape {shape} for token ids of shape {tuple(map(str, ids.shape))}; expected (batch, length, "
            "vocabulary), the logits of every token"
            + (
                ". It returns those of one token of each row alone, as nanoGPT's forward does without targets: wrap it in a "
                "module whose forward(input_ids) gives those of all tokens"
                if last
                else ""
            )
        )
    if table is not None and sizes[0] == table[1]:
        raise CaptureError(
            f"forward returned {shape}, which are hidden states: the token embedding has {table[0]} rows of {table[1]}, so "
            f"logits have {table[0]} entries a token. Wrap the model in a module whose forward(input_ids) returns its logits."
        )
    return found[0]


def _first_position(model: nn.Module) -> int:
    """What a model calls the position of a text's first token when it is not told.

    Models after fairseq number tokens from their padding index + 1, and take what they are given as it is. They say so in a
    function that transformers knows by this name.
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


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a `transformers.PreTrainedModel`, without importing transformers."""
    return any(
        c.__module__.startswith("transformers.") and c.__name__ == "PreTrainedModel" for c in type(model).__mro__
    )


def capture(model: nn.Module, *, max_length: int | None = None) -> Captured:
    """Captures a decoder as a flat graph.

    model: in eval mode or not (dropout is switched off for the trace), on any device, `meta` included. max_length: the
    length at which dynamic NTK frequencies are fixed; default: the model's `max_position_embeddings`.

    Raises CaptureError when torch.export can't trace it, UnsupportedModelError when its attention can't be rewritten.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; kvrewrite rewrites decoders (causal language models)"
        )
    with untouched(model), without_hooks(model), plain_4bit_layers(model):
        check_layers(model)
        return _capture(model, max_length)


def _capture(model: nn.Module, max_length: int | None) -> Captured:
    if not is_transformers_model(model):
        return _export(model, "trace", max_length)
    captured = _capture_interface(model, max_length)
    if captured is not None:
        return captured
    # Traced with the attention that the user's model has; kernels that a graph can't show become sdpa.
    own = getattr(model.config, "_attn_implementation", None)
    with _transformers_tracing(model, own if own in ("eager", "sdpa") else "sdpa"):
        return _export(model, "trace", max_length)


def _capture_interface(model: nn.Module, max_length: int | None) -> Captured | None:
    """Capture through transformers' attention interface; None when the model does not use it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    calls = _InterfaceCalls(model)
    name = "kvrewrite"
    AttentionInterface.register(name, calls.attention)
    AttentionMaskInterface.register(name, calls.mask)
    try:
        with _transformers_tracing(model, name):
            captured = _export(model, "interface", max_length, calls)
    except (CaptureError, UnsupportedModelError):
        if calls.modules:
            raise
        return None
    finally:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
    captured.compared = calls.compared
    nodes = [n for n in captured.graph.graph.nodes if n.target is torch.ops.kvrewrite.attention.default]
    if len(nodes) != len(calls.modules):
        raise CaptureError(f"{len(calls.modules)} attention calls were traced, but {len(nodes)} are in the graph")
    for node, path in zip(nodes, calls.modules, strict=True):
        node.meta["kvrewrite_module"] = path
    return captured


def _export(model: nn.Module, frontend: str, max_length: int | None, calls: _InterfaceCalls | None = None) -> Captured:
    """Traces the model on `TRACE_LENGTH` tokens.

    Where that unrolls a loop over chunks, of which there are few, the model is traced once more at a length at which there is a
    first, a middle and a last one. calls: what the trace has to come to; CaptureError as soon as it is seen that it did not.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_positions = "position_ids" in parameters
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    first = next(iter(model.parameters()), None)
    if first is None:
        raise CaptureError(f"{type(model).__name__} has no parameters; expected a decoder with weights")
    vocab = _vocab_size(model) or 2
    first_position = _first_position(model) if takes_positions else 0
    wrapper = _LogitsOnly(model, takes_positions, first_position, extra)
    trace_length, chunk, branch = TRACE_LENGTH, 0, ""
    with _fixed_rotary(model, max_length) as tables, _scans_as_ops(), _quick_tracing():
        try:
            # no_grad: otherwise regions under no_grad, RoPE among them, hide in submodules of the graph. When a trace
            # fails torch prints the whole graph to stderr; our error says what failed.
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                # torch's own use of what it deprecates.
                warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)

                def again(rows: int, tokens: int) -> Any:
                    return _trace(wrapper, tokens, vocab, first.device, rows)

                program = again(TRACE_BATCH, trace_length)
                if calls is not None and not calls.modules:
                    raise CaptureError(f"{type(model).__name__} does not use transformers' attention interface")
                _check_state(wrapper, program, vocab, first.device)
                chunk = _unrolled_chunk(program)
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
                        branch = str(error)
                    if not branch and not _of_transformers(model):
                        branch = alone(program, once, TRACE_BATCH, trace_length)
                    if calls is not None:
                        calls.modules[:] = called
                longest = _longest(program)
                program = decompose(program)
                if not branch and not chunk:  # of several, the first to be found is said
                    branch = shorter(longest, _longest(program), again, TRACE_BATCH)
                    if calls is not None:
                        calls.modules[:] = called
        except KVRewriteError:
            raise
        except Exception as error:  # torch.export raises many types; all mean that there is no graph
            for cause in causes(error):
                if isinstance(cause, KVRewriteError):
                    raise cause from error
            raise CaptureError(f"torch.export could not trace {type(model).__name__}: {explain(error)}") from error
        if any(not _moves(size) for size in _ids_of(program).shape):
            found: list[FixedSize] = []

            def culprit(ids: Tensor) -> FixedSize:
                found.append(FixedSize(ids))
                return found[-1]

            wrapper.culprit = culprit
            with torch.no_grad():
                _trace(wrapper, trace_length, vocab, first.device)
            raise CaptureError(_why_constant(program, found[-1].where if found else ""))
    captured = _flatten(program, model, frontend, takes_positions)
    captured.unrolled, captured.trace_length, captured.branch = chunk > 0, trace_length, branch
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
    """The wrapped model as torch.export.export gives it, traced on `rows` of `length` tokens; fixed: for these numbers alone."""
    ids = torch.arange(rows * length, device=device).reshape(rows, length) % vocab
    positions = torch.arange(length, device=device).repeat(rows, 1)
    auto = torch.export.Dim.AUTO
    sizes = {0: auto, 1: auto}
    shapes = None if fixed else (sizes, sizes if wrapper.takes_positions else None)
    return torch.export.export(wrapper, (ids, positions), dynamic_shapes=shapes, strict=False)


def _of_transformers(model: nn.Module) -> bool:
    """Whether a model's class is one of transformers' own."""
    return is_transformers_model(model) and type(model).__module__.startswith("transformers.")


def _check_state(wrapper: _LogitsOnly, program: Any, vocab: int, device: torch.device) -> None:
    """Refuses a model whose forward uses what an earlier call has left in its modules; transformers' modules leave nothing."""
    if _of_transformers(wrapper.model_under_capture):
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
    """Spares the trace what nothing here reads: a third of its time.

    Fake tensors are computed instead of kept for equal calls: with symbolic sizes what is kept costs more than it saves. And
    nodes do not note the stack that they were made on, in versions of torch that can leave that out.
    """
    from torch._dynamo import config as dynamo_config
    from torch.fx import config as fx_config

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(dynamo_config, "fake_tensor_cache_enabled", False))
        if hasattr(fx_config, "do_not_emit_stack_traces"):
            stack.enter_context(_replaced(fx_config, "do_not_emit_stack_traces", True))
        yield


def _unrolled_chunk(program: Any) -> int:
    """The size of the chunks that a loop of the trace was unrolled over, 0 where there is none.

    While it traces, torch notes what it assumed of sizes; that a number made of the length by dividing it is a constant is such
    a loop. (That a length is within a table's reads alike, but for the division.)
    """
    ids = _ids_of(program)
    length = symbol(ids.shape[1])
    if not hasattr(length, "free_symbols"):
        return 0
    found = 0
    size: Any = ids.shape[1]
    for guard in size.node.shape_env.guards:
        assumed = guard.expr
        if not isinstance(assumed, sympy.Eq) or assumed.free_symbols != {length}:
            continue
        if not assumed.has(sympy.Function):  # torch's quotients and remainders are functions; Max and Min are not
            continue
        chunk = max((int(n) for n in assumed.atoms(sympy.Integer)), default=0)
        if 1 < chunk <= MAX_CHUNK and not all(assumed.subs({length: n * chunk + 3}) for n in range(1, 5)):
            found = max(found, chunk)
    return found


def _vocab_size(model: nn.Module) -> int | None:
    """Rows of the token embedding, from the config or else the first embedding of the model; None where it has none."""
    config = getattr(model, "config", None)
    get_embeddings = getattr(model, "get_input_embeddings", None)
    if get_embeddings is not None and config is not None:
        embedding = get_embeddings()
        if hasattr(embedding, "weight"):
            return int(embedding.weight.shape[0])
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return int(module.num_embeddings)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _token_table(graph: fx.Graph) -> tuple[int, int] | None:
    """Rows and columns of the table that the token ids are looked up in as they are; None where there is none."""
    aten = torch.ops.aten
    unchanged = {aten._to_copy.default, aten.clone.default, aten.view.default, aten.reshape.default, aten.contiguous.default,
                 aten.unsqueeze.default, aten.transpose.int, aten.t.default, aten.permute.default, aten.alias.default,
                 aten.to.dtype, aten._unsafe_view.default, aten.detach.default}  # fmt: skip
    ids = {n for n in graph.nodes if n.op == "placeholder" and n.target == "input_ids"}
    for node in graph.nodes:
        if is_op(node, *unchanged) and node.args[0] in ids:
            ids.add(node)
        index = None
        if is_op(node, aten.embedding.default):
            index = node.args[1]
        elif is_op(node, aten.index.Tensor) and len(node.args[1]) == 1:
            index = node.args[1][0]
        elif is_op(node, aten.index_select.default) and node.args[1] == 0:
            index = node.args[2]
        if index in ids:
            shape = node.args[0].meta["val"].shape
            if len(shape) == 2 and all(isinstance(s, int) for s in shape):
                return int(shape[0]), int(shape[1])
    return None


def _flatten(program: Any, model: nn.Module, frontend: str, takes_positions: bool) -> Captured:
    """An exported program as a plain GraphModule whose parameters and buffers are attributes under their own names."""
    from torch.export.graph_signature import InputKind, OutputKind

    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise UnsupportedModelError(
                f"the model writes to its own state ({spec.target}) in forward: recurrent state or counters can't be "
                "carried by an evicted cache"
            )
    targets: dict[str, str] = {}
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            targets[spec.arg.name] = clean_path(spec.target)
    root = nn.Module()
    state = {**program.state_dict, **program.constants}
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    order = iter(["input_ids", "position_ids"])
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            target = targets[node.name]
            # A parameter of the model itself must not have the name of an input: generated code would read one for the other.
            env[node] = new.create_node("get_attr", target, name=target if "." in target else f"model_{target}")
        elif node.op == "placeholder":
            env[node] = new.placeholder(next(order))
        elif node.op == "output":
            found = [env[n] for n in node.args[0] if isinstance(n, fx.Node)]
            continue
        elif node.op == "get_attr":
            # Subgraphs of higher-order ops.
            if isinstance(getattr(program.graph_module, node.target, None), fx.GraphModule):
                root.add_module(node.target, getattr(program.graph_module, node.target))
            env[node] = new.node_copy(node, lambda n: env[n])
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    for spec in signature.input_specs:
        if targets.get(spec.arg.name):
            value = state[spec.target]
            set_attr(root, targets[spec.arg.name], value)
    inputs = {n.target: n for n in new.nodes if n.op == "placeholder"}
    ids = inputs["input_ids"].meta["val"]
    table = _token_table(new)
    new.output(_choose_logits(found, ids, table))
    new.eliminate_dead_code(is_impure_node=lambda n: n.op == "placeholder" or n.is_impure())
    gm = fx.GraphModule(root, new, class_name=type(model).__name__)
    vocab = table[0] if table is not None else _vocab_size(model)
    if vocab is None:
        raise CaptureError(
            "no token embedding was found; expected a table that the ids are looked up in, or a config with vocab_size"
        )
    if not takes_positions:
        unused = inputs["position_ids"]
        if unused.users:
            raise CaptureError("position_ids is used by a model that does not take it")
        gm.graph.erase_node(unused)
    gm.graph.lint()
    gm.recompile()
    first = next(p for p in model.parameters() if p.is_floating_point())
    return Captured(
        graph=gm,
        frontend=frontend,
        dtype=first.dtype,
        vocab_size=vocab,
        batch_symbol=ids.shape[0].node.expr,
        length_symbol=ids.shape[1].node.expr,
        max_positions=_upper_bound(ids.shape[1]),
        aliases=_aliases(model),
        persistent=set(model.state_dict().keys()),
    )


def _ids_of(program: Any) -> Tensor:
    """The value of the token ids in an exported program."""
    name = program.graph_signature.user_inputs[0]
    return next(n for n in program.graph.nodes if n.name == name).meta["val"]


def _moves(size: Any) -> bool:
    """Whether a size is still a symbol."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _why_constant(program: Any, culprit: str) -> str:
    """The message for a size of the token ids that became a constant; culprit: what made it one, where that was found."""
    ids = _ids_of(program)
    label, size = next((n, s) for n, s in zip(("batch", "length"), ids.shape, strict=True) if not _moves(s))
    where = culprit or _place_of_constant(ids, int(size))
    return (
        f"the {label} size became the constant {int(size)} while tracing{where}; the model's forward must work for any {label}. "
        "(A loop over tokens in Python makes it a constant; so do ops that are such a loop, or that torch traces for one size)"
    )


def _place_of_constant(ids: Tensor, number: int) -> str:
    """Where the trace assumed that a size of the token ids is `number`, as it noted that; empty where it did not."""
    shape_env = getattr(getattr(ids, "fake_mode", None), "shape_env", None)
    for guard in getattr(shape_env, "guards", ()):
        assumed = guard.expr
        if isinstance(assumed, sympy.Eq) and number in assumed.args and any(a.is_Symbol for a in assumed.args):
            return noted_place(guard.sloc.framework_loc)
    return ""


def _longest(program: Any) -> int | None:
    """The longest text that an exported program holds for, None where there is no bound."""
    name = program.graph_signature.user_inputs[0]
    length = next(n for n in program.graph.nodes if n.name == name).meta["val"].shape[1]
    return _upper_bound(length) if isinstance(length, torch.SymInt) and length.node.maybe_as_int() is None else None


def _upper_bound(size: torch.SymInt) -> int | None:
    """The largest length that the traced graph allows (a table of learned positions, a causal buffer), if any."""
    ranges = size.node.shape_env.var_to_range.get(size.node.expr)
    if ranges is None:
        return None
    return int(ranges.upper) if isinstance(ranges.upper, sympy.Integer) and ranges.upper < 1 << 30 else None


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Names of each parameter that has several (tied weights)."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}
