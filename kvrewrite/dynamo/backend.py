"""The torch.compile backend: `torch.compile(model, backend="kvrewrite", options={"policy": "streaming_llm", "budget": 1024})`.

Dynamo traces the call of an ordinary model and hands over a graph with its inputs; this module finds out whose forward that
is, which input is which, and what has to come back, and then runs the model's rewrite (the same that `kvrewrite.transform`
makes) instead of the graph. Keys and values of a `DynamicCache` come back short, so that the cache holds what the policy
keeps. A graph that is not one whole forward of a model is refused when it runs, also where torch.compile would otherwise
fall back to the unmodified model; a graph without attention goes to Inductor as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator

from kvrewrite import policies
from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.capture.frontend import capture, is_transformers_model
from kvrewrite.capture.third_party import unwrap
from kvrewrite.compiler import compile_captured, quiet
from kvrewrite.dynamo.append_tokens import AppendRunner, reason_against
from kvrewrite.dynamo.caches import USE_NEW_CACHE, BackendCache, StockState, cache_of, state_of, type_for
from kvrewrite.dynamo.graphs import has_attention, is_token_wise, source_name, source_of, weights_of
from kvrewrite.dynamo.modules import plain_view, ran, state_key, wrap_compiled_modules
from kvrewrite.errors import CacheError, CaptureError, InputError, KVRewriteError, OptionError, UnsupportedModelError
from kvrewrite.passes.canonical.validate import require_check
from kvrewrite.policies import Policy
from kvrewrite.runtime.foreign_config import foreign_config
from kvrewrite.runtime.model import RewrittenModel

NAME = "kvrewrite"
OWN_OPTIONS = ("policy", "policy_weights", "inductor", "check")
WHOLE = (
    "the backend takes whole calls of a causal language model: compile the model (or its forward), and pass fullgraph=True to "
    "see what breaks its graph"
)
CACHE_NAMES = ("cache", "past_key_values")  # transformers renamed the argument
KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHE_NAMES}
_told: set[str] = set()  # messages that were given


@dataclass(frozen=True)
class Settings:
    """The options of one compiled model."""

    policy: Policy
    weights: str | None
    inductor: bool
    mode: str | None
    check: str = "full"

    @staticmethod
    def read(options: Mapping[str, Any] | None, mode: str | None) -> Settings:
        """The options as torch.compile got them; raises OptionError."""
        given = dict(options or {})
        name, weights = given.pop("policy", "streaming_llm"), given.pop("policy_weights", None)
        inductor, check = given.pop("inductor", True), given.pop("check", "full")
        require_check(check)
        if not isinstance(name, (str, Policy)):
            raise OptionError(f"the option policy is {name!r}, expected a name (kvrewrite policies lists them)")
        if weights is not None and not isinstance(weights, (str, Path)):
            raise OptionError(f"the option policy_weights is a {type(weights).__name__}, expected a path")
        if not isinstance(inductor, bool):
            raise OptionError(f"the option inductor is {inductor!r}, expected true or false")
        try:
            policy = policies.make(name, **given)
        except OptionError as error:
            known = {f.name for f in dataclasses.fields(policies.POLICIES.get(str(name), Policy))}
            more = f". The backend itself has: {', '.join(OWN_OPTIONS)}" if set(given) - known else ""
            raise OptionError(f"{error}{more}") from None
        return Settings(policy, None if weights is None else str(weights), inductor, mode, check)

    def key(self) -> tuple[Any, ...]:
        """What tells rewrites of one model apart."""
        changed = Path(self.weights).stat().st_mtime_ns if self.weights and Path(self.weights).exists() else 0
        return type(self.policy), repr(self.policy), self.weights, changed, self.inductor, self.mode, self.check


# ------------------------------------------------------------------------------------------------ entry point
def kvrewrite_backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point of `torch_dynamo_backends`. options: policy, policy_weights (a path), inductor (False: run
    eagerly, for debugging), check (as for `kvrewrite.transform`) and the policy's own, such as budget."""
    try:
        settings = Settings.read(options, mode)
        seen = has_attention(gm.graph)
        if seen or _may_be_part_of_a_model(gm, example_inputs):
            return _Adapter(settings, gm, example_inputs, attention_seen=seen)
        return _without_attention(gm, example_inputs, settings)
    except KVRewriteError as error:
        return _refusal(error)


def _refusal(error: KVRewriteError) -> Callable[..., Any]:
    """Raises when the graph runs: what a backend raises while it compiles, torch.compile may swallow and go on without it."""

    def refuse(*_: Any) -> Any:
        raise copy.copy(error)

    return refuse


def _may_be_part_of_a_model(gm: fx.GraphModule, example_inputs: list[Any]) -> bool:
    """Whether a graph in which no attention was seen must not run as it is: it mixes tokens, or goes on after a break of the
    graph, where attention may have run that no graph shows."""
    weights = weights_of(gm.graph)
    if not weights:
        return False  # a function of tensors
    return _is_resumed(_root_frame().f_code) or not is_token_wise(gm.forward, example_inputs, weights)


def _without_attention(gm: fx.GraphModule, inputs: list[Any], settings: Settings) -> Callable[..., Any]:
    if "no attention" not in _told:
        _told.add("no attention")
        what = "goes to Inductor as it is" if settings.inductor else "runs as it is"
        warnings.warn(f"kvrewrite: a graph without attention {what} (said once)", stacklevel=2)
    run: Callable[..., Any] = gm.forward
    if settings.inductor:
        from torch._dynamo.backends.registry import lookup_backend

        compiler: Any = lookup_backend("inductor")
        run = compiler(gm, inputs)

    def plain(*inputs: Any) -> Any:
        ran()
        return run(*inputs)

    return plain


# ------------------------------------------------------------------------------------------------ whose forward it is
@dataclass
class Argument:
    """One argument of the traced call: its value then, and how Dynamo calls it."""

    value: Any
    source: str


@dataclass
class Call:
    """The traced call of a model. source: what Dynamo calls the model; hooks: whether the model's own hooks are within the
    traced function, and not around it."""

    module: nn.Module
    source: str
    hooks: bool
    arguments: dict[str, Argument] = field(default_factory=dict)


_RESUMED = "torch_dynamo_resume_in_"


def _root_frame() -> Any:
    """What Dynamo knows of the function that it is compiling."""
    root = InstructionTranslator.current_tx().output.root_tx
    assert root is not None
    return root


def _is_resumed(code: types.CodeType) -> bool:
    """Whether a function is what Dynamo made of the rest of another one, after a break of its graph."""
    return code.co_name.startswith(_RESUMED)


def _traced_call() -> Call:
    """The call that Dynamo is compiling; UnsupportedModelError where it is not one of a model's forward."""
    root = _root_frame()
    code: types.CodeType = root.f_code
    _keep_compiling(code)
    if any(isinstance(value, RewrittenModel) for value in root.f_locals.values()):
        raise UnsupportedModelError(
            "the model is rewritten already: compile it with model.compile(), without this backend"
        )
    if _is_resumed(code):
        where = code.co_name.removeprefix(_RESUMED).rpartition("_at_")[0]
        raise UnsupportedModelError(
            f"torch.compile broke the graph of {where}, so that what comes after the break is not a whole model; {WHOLE}"
        )
    positional, keywords = _frame_arguments(code, root.f_locals)
    module = positional[0].value if positional else None
    if not isinstance(module, nn.Module) or code not in _codes(module):
        raise UnsupportedModelError(
            f"the compiled function is {code.co_qualname}, not the forward of a model, or torch.compile has given up the model "
            f"around it (recompile_limit, or an earlier call that it could not trace: torch._dynamo.reset()); {WHOLE}"
        )
    around = (nn.Module._wrapped_call_impl, nn.Module._call_impl, type(module).__call__)
    call = Call(module, positional[0].source, code in [getattr(f, "__code__", None) for f in around])
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    for i, argument in enumerate(positional[1:]):
        call.arguments[names[i] if i < len(names) else f"argument {i}"] = argument
    call.arguments.update(keywords)
    return call


def _keep_compiling(code: types.CodeType) -> None:
    """Raises torch.compile's limits where they come near: beyond them it would run the unmodified model in silence. For all
    threads: since torch 2.13 what is set in one is not set in others, but for defaults, and they share the graphs."""
    config: Any = torch._dynamo.config
    graphs = len(_debug_get_cache_entry_list(code))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(config, limit) < graphs + 4:
            setattr(config, limit, graphs + 8)
        if config._config[limit].default < graphs + 4:
            config._config[limit].default = graphs + 8
    if graphs >= 32 and f"recompiles {code.co_qualname}" not in _told:
        _told.add(f"recompiles {code.co_qualname}")
        warnings.warn(
            f"kvrewrite: torch.compile has made {graphs} graphs of {code.co_qualname}; calls of ever new kinds (batch sizes, "
            'masks, flags) cost a trace each. TORCH_LOGS="recompiles" says why',
            stacklevel=2,
        )


def _frame_arguments(code: types.CodeType, values: Mapping[str, Any]) -> tuple[list[Argument], dict[str, Argument]]:
    """The arguments of a frame, *args and **kwargs unpacked."""
    names = list(code.co_varnames)
    count, only = code.co_argcount, code.co_kwonlyargcount
    positional = [Argument(values.get(n), f"L['{n}']") for n in names[:count]]
    keywords = {n: Argument(values.get(n), f"L['{n}']") for n in names[count : count + only]}
    at = count + only
    if code.co_flags & inspect.CO_VARARGS:
        name = names[at]
        positional += [Argument(v, f"L['{name}'][{i}]") for i, v in enumerate(values.get(name, ()))]
        at += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        name = names[at]
        keywords |= {k: Argument(v, f"L['{name}']['{k}']") for k, v in values.get(name, {}).items()}
    return positional, keywords


def _codes(module: nn.Module) -> set[types.CodeType]:
    """The code of a model's forward and of what is wrapped around it."""
    todo: list[Any] = [type(module).forward, nn.Module._wrapped_call_impl, nn.Module._call_impl, type(module).__call__]
    todo.append(module.__dict__.get("forward"))
    found = set()
    while todo:
        function = todo.pop()
        function = getattr(function, "__func__", function)
        if hasattr(function, "__code__"):
            found.add(function.__code__)
        for inner in ("__wrapped__", "func", "_torchdynamo_orig_callable"):
            if callable(getattr(function, inner, None)):
                todo.append(getattr(function, inner))
    return found


def _check_module(call: Call) -> None:
    """UnsupportedModelError where what is called is no model of token ids, but a part of one."""
    tensors = [a.value for a in call.arguments.values() if isinstance(a.value, Tensor)]
    if len(tensors) != 1 or tensors[0].is_floating_point():
        raise _not_a_whole_model(call)


def _check_logits(call: Call, width: int) -> None:
    """The same for a model of transformers, whose result has `width` channels: one that knows no output embeddings, as a base
    model or a class of the user's own, must give as many as there are tokens in its vocabulary."""
    module: Any = call.module
    sizes = module.config.get_text_config()
    if module.get_output_embeddings() is None and (
        width != getattr(sizes, "vocab_size", None) or width == getattr(sizes, "hidden_size", None)
    ):
        raise _not_a_whole_model(call)


def _not_a_whole_model(call: Call) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"torch.compile took {type(call.module).__name__}, which does not go from token ids to logits, by itself; {WHOLE}"
    )


def _guard_module(gm: fx.GraphModule, call: Call) -> int:
    """Makes Dynamo compile anew for another module, which it would not: to it parameters are inputs like others. Returns the
    input that is the module's first parameter."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for i, node in enumerate(nodes):
        source: Any = getattr(node, "_dynamo_source", None) or node.meta["grapharg"].source
        if not source_of(node).endswith("]") or "_parameters['" not in source_of(node):
            continue
        while source is not None and source_name(source) != call.source:
            source = getattr(source, "base", None)
        if source is not None:
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))
            return i
    raise UnsupportedModelError(f"the graph has no parameters of {type(call.module).__name__}; {WHOLE}")


# ------------------------------------------------------------------------------------------------ the rewritten call
class _Adapter:
    """Stands for one graph of Dynamo: takes its inputs, runs the rewritten model, gives its outputs."""

    def __init__(
        self, settings: Settings, gm: fx.GraphModule, example_inputs: list[Any], *, attention_seen: bool = True
    ):
        self.settings, self.attention_seen = settings, attention_seen
        # The settings' key with numbers of the model, a parameter, and its model's rewrite; written at once, for other threads.
        self.served: tuple[Any, weakref.ref[Tensor], weakref.ref[_Rewrite]] | None = None
        self.checked = False
        call = _traced_call()
        self.module, self.hooks = weakref.ref(call.module), call.hooks
        self.transformers = is_transformers_model(call.module)
        if not self.transformers:
            _check_module(call)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
            raise InputError(
                "gradients are enabled, and training through an evicted cache is not supported; call the model under "
                "torch.no_grad() or torch.inference_mode(), as generate does"
            )
        self._read_inputs(gm, call)
        width = self._read_outputs(gm)
        if self.transformers:
            _check_logits(call, width)

    # -- inputs --------------------------------------------------------------------------------------------------
    def _read_inputs(self, gm: fx.GraphModule, call: Call) -> None:
        self.parameter = _guard_module(gm, call)
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
        index = {source_of(n): i for i, n in enumerate(nodes)}
        self.mask: int | list[int] | None = None
        self.positions: int | None = None
        self.handle: int | None = None
        self.cached: list[int] = []
        self.keep, self.keep_input = 0, None
        used: set[int] = set()

        def take(source: str) -> int | None:
            at = index.get(source)
            if at is not None:
                used.add(at)
            return at

        ids = None
        given = {n: a for n, a in call.arguments.items() if a.value is not None and a.value is not False}
        if not self.transformers:  # one tensor, whatever its name
            given = {"input_ids" if isinstance(a.value, Tensor) else n: a for n, a in given.items()}
        for name, argument in given.items():
            value = argument.value
            if name not in KNOWN:
                raise InputError(f"{name} is not supported by the kvrewrite backend; leave it out")
            if name == "input_ids":
                ids = take(argument.source)
            elif name == "attention_mask":
                self._read_mask(argument, take)
            elif name == "position_ids":
                self.positions = take(argument.source)
            elif name == "logits_to_keep":
                if not isinstance(value, int):
                    raise InputError(f"logits_to_keep is a {type(value).__name__}, expected an int")
                self.keep, self.keep_input = value, take(argument.source)
            elif name in CACHE_NAMES:
                self._read_cache(argument, take)
        if ids is None:
            raise InputError("the model was not given token ids (input_ids); the kvrewrite backend takes nothing else")
        self.ids = ids
        # Numbers that the model holds and that have changed before, which Dynamo then takes for inputs.
        self.numbers = [
            i
            for i, node in enumerate(nodes)
            if source_of(node).startswith((f"{call.source}.", f"{call.source}["))
            and (not isinstance(node.meta.get("example_value"), Tensor) or node.meta["grapharg"].pass_arg_as_tensor)
        ]
        for i, node in enumerate(nodes):
            value, source = node.meta.get("example_value"), source_of(node)
            if i not in used and isinstance(value, Tensor) and source.startswith("L["):
                if source.startswith((call.source, f"{call.source}.")):
                    continue
                raise UnsupportedModelError(
                    f"the graph reads {source}, which the kvrewrite backend does not know; {WHOLE}"
                )

    def _read_mask(self, argument: Argument, take: Callable[[str], int | None]) -> None:
        if isinstance(argument.value, dict):
            found = [take(f"{argument.source}['{k}']") for k in argument.value]
            self.mask = [i for i in found if i is not None]
        else:
            self.mask = take(argument.source)
            if self.mask is None:
                raise UnsupportedModelError(
                    "the model does not look at its attention_mask, so that padding can't be kept out"
                )

    def _read_cache(self, argument: Argument, take: Callable[[str], int | None]) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache, source = argument.value, argument.source
        if isinstance(cache, BackendCache):
            self.handle = take(f"{source}.handle")
            return
        kinds = {type(cache).__name__ if type(cache) is not DynamicCache else ""}
        kinds |= {type(layer).__name__ for layer in getattr(cache, "layers", []) if type(layer) is not DynamicLayer}
        kinds.discard("")
        if kinds:
            raise CacheError(
                f"past_key_values is made of {', '.join(sorted(kinds))}, expected a DynamicCache with layers that grow as "
                f"they need; {USE_NEW_CACHE}"
            )
        for i, layer in enumerate(cache.layers):
            if layer.is_initialized and layer.keys.numel():
                found = [take(f"{source}.layers[{i}].{x}") for x in ("keys", "values")]
                self.cached += [at for at in found if at is not None]

    # -- outputs -------------------------------------------------------------------------------------------------
    def _read_outputs(self, gm: fx.GraphModule) -> int:
        """Which output is what: the logits, and what goes to the cache in the order in which it was computed. Returns the width
        of the logits."""
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        outputs: list[Any] = list(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])
        to_cache = [n for n in outputs if isinstance(n, fx.Node) and n.target is torch.cat and _dims(n) == 4]
        logits = [n for n in outputs if isinstance(n, fx.Node) and n not in to_cache and _dims(n) == 3]
        rest = [n for n in outputs if n not in to_cache and n not in logits]
        if any(isinstance(n, fx.Node) and _dims(n) == 4 for n in rest):
            raise CacheError(
                "a layer's cache keeps something else than all keys and values (a sliding window, or a static cache); "
                f"{USE_NEW_CACHE}"
            )
        if rest or len(logits) != 1 or (self.handle is not None and to_cache):
            what = ", ".join(str(n) for n in (rest or logits)) or "nothing else"
            raise UnsupportedModelError(
                "the graph's results are not the logits and a cache alone (hidden states, attentions, a loss, or a graph that "
                f"breaks on the way): {what}; {WHOLE}"
            )
        self.logits = outputs.index(logits[0])
        to_cache.sort(key=lambda n: order[n])
        self.to_cache = [outputs.index(n) for n in to_cache]
        self.shapes = [(n.meta["example_value"].shape[1], n.meta["example_value"].shape[3]) for n in to_cache]
        self.count = len(outputs)
        return int(logits[0].meta["example_value"].shape[-1])

    # -- a call --------------------------------------------------------------------------------------------------
    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        ran()
        rewrite = self._rewrite_of(inputs[self.parameter], tuple(float(inputs[i]) for i in self.numbers))
        model = rewrite.model
        ids: Tensor = inputs[self.ids]
        cache: Any = None
        if self.handle is not None:
            cache = cache_of(inputs[self.handle])
            cache.bind(model)
        elif self.cached:
            cache = state_of([inputs[i] for i in self.cached])
        elif self.to_cache:
            cache = StockState(model, ids.shape[0])
        elif "no cache" not in _told and self.settings.policy.name != "full":
            _told.add("no cache")
            warnings.warn(
                "kvrewrite: the model was called without a cache (use_cache=False, or it has none), so every call begins anew "
                "and evicts within its own text (said once)",
                stacklevel=2,
            )
        if self.to_cache and not self.checked:
            self._check_shapes(model)
            self.checked = True
        mask = self._real_columns(inputs, ids)
        if rewrite.appends is not None and self.cached and _is_one_token(ids, mask, cache):
            model._check_cache(cache, ids.shape[0])
            model._check_ids(ids, True)
            logits = rewrite.appends.step(ids, cache)
        else:
            logits = model(
                ids,
                attention_mask=mask,
                position_ids=None if self.positions is None else inputs[self.positions],
                past_key_values=cache,
                logits_to_keep=int(self.keep if self.keep_input is None else inputs[self.keep_input]),
            ).logits
        outputs: list[Any] = [None] * self.count
        outputs[self.logits] = logits
        if self.to_cache:
            for at, tensor in zip(self.to_cache, cache.tensors(), strict=True):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
                outputs[at] = tensor
        return tuple(outputs)

    def _rewrite_of(self, parameter: Tensor, numbers: tuple[float, ...]) -> _Rewrite:
        """The rewrite of the model whose parameter came in. Looked for once for each parameter: Dynamo's guards see whatever
        else changes the model's structure, dtype or device, and then there is another adapter."""
        served = self.served
        if served is not None:
            key, known, rewrite = served[0], served[1](), served[2]()
            if (
                known is parameter
                and rewrite is not None
                and self.module() is not None
                and (self.settings.key(), numbers) == key
                and not rewrite.replaced()
            ):
                rewrite.follow()
                return rewrite
        module = self.module()
        if module is None or not any(parameter is p for p in module.parameters()):
            raise UnsupportedModelError("the graph was compiled for another model (torch._dynamo.reset() forgets it)")
        key = self.settings.key(), numbers
        try:
            rewrite = rewritten(module, self.settings, self.hooks)
        except (CaptureError, UnsupportedModelError) as error:
            if self.attention_seen:
                raise
            raise UnsupportedModelError(
                f"{type(module).__name__} mixes tokens, so it is not run as it is, and it can't be rewritten: {error}. What can "
                "be evicted from is attention with a softmax over the keys; compile this model with another backend"
            ) from error
        self.served = key, weakref.ref(parameter), weakref.ref(rewrite)
        return rewrite

    def _check_shapes(self, model: RewrittenModel) -> None:
        """What the layers of the DynamicCache hold must be what we cache, layer by layer."""
        owners = [s for s in model.sites if s.shares_kv_with is None]
        expected = [shape for s in owners for shape in ((s.kv_heads, s.head_dim), (s.kv_heads, s.v_head_dim))]
        if [tuple(int(n) for n in s) for s in self.shapes] != expected:
            raise CacheError(
                f"the model's DynamicCache has (heads, dims) {self.shapes} for keys and values of each layer, expected "
                f"{expected}; {USE_NEW_CACHE}"
            )

    def _real_columns(self, inputs: tuple[Any, ...], ids: Tensor) -> Tensor | None:
        """The attention mask as (B, columns). Masks that generate has spread out (B, 1, T, past + T) are folded again."""
        if self.mask is None:
            return None
        masks: list[Tensor] = [inputs[i] for i in ([self.mask] if isinstance(self.mask, int) else self.mask)]
        if len(masks) == 1 and masks[0].dim() == 2:
            return masks[0]
        folded = None
        for mask in masks:
            width = ids.shape[1]
            if mask.dim() != 4 or mask.shape[2] != width:
                raise InputError(f"attention_mask has shape {tuple(mask.shape)}, expected (batch, tokens)")
            seen = mask if mask.dtype == torch.bool else mask == 0
            new = seen[:, 0, :, -width:]
            real = new.diagonal(dim1=-2, dim2=-1)
            causal = torch.ones_like(new[0]).tril()
            if bool((new & ~(causal & real[:, None])).any()) or (folded is not None and not torch.equal(folded, real)):
                raise InputError("attention_mask has four dimensions and is not a causal mask with padding")
            folded = real
        return None if folded is None else folded.expand(ids.shape[0], -1).long()


def _is_one_token(ids: Tensor, mask: Tensor | None, cache: EvictionCache) -> bool:
    """Whether every row has tokens and gets one more. Raises InputError where the mask hides what is in the cache."""
    if ids.shape[1] != 1 or not all(cache.seen):
        return False
    if mask is None:
        return True
    if mask.shape != (ids.shape[0], cache.columns + 1):
        return False
    real = mask.to(torch.bool).cpu().numpy()
    return bool(real[:, -1].all()) and cache.history.late(real[:, :-1], cache.columns) == cache.columns


def _dims(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) and value.is_floating_point() else -1


# ------------------------------------------------------------------------------------------------ rewrites
class _Rewrite:
    """A rewritten model that follows the parameters of the original. It does not hold the original itself."""

    def __init__(self, module: nn.Module, settings: Settings, hooks: bool):
        captured = capture(plain_view(module, hooks))
        config = getattr(module, "config", None)
        program = compile_captured(captured, settings.policy, settings.weights, config, None, quiet, settings.check)
        if not is_transformers_model(module):
            config = foreign_config(program, type(module).__name__)
        self.pairs = list(_shared(module, program.graph))
        # Where each submodule hangs, and its parameters' dict, which tells it from another one without holding it.
        self.places = [(m._modules, n, c._parameters) for m in module.modules() for n, c in m.named_children()]
        self.hooks = [d for m in module.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.hook_counts = list(map(len, self.hooks))
        self.model = RewrittenModel(program, config)  # type: ignore[arg-type]
        self.settings = settings
        self.appends: AppendRunner | None = None
        self._compile()

    def _compile(self) -> None:
        """Through Inductor. A stock cache has pools of its own, so single tokens don't run from the model's buffers."""
        more: dict[str, Any] = {} if self.settings.mode is None else {"mode": self.settings.mode}
        if self.settings.inductor:
            self.model.compile(static_decode=False, backend="inductor", **more)
        if not reason_against(self.model.program, self.model.policy):

            def compiler(graph: fx.GraphModule) -> Callable[..., Any]:
                return (
                    torch.compile(graph, backend="inductor", fullgraph=True, **more)
                    if self.settings.inductor
                    else graph
                )

            self.appends = AppendRunner(self.model, self.model.graph_module, compiler)

    def replaced(self) -> bool:
        """Whether a submodule of the original is no longer the one that was captured, or has other hooks. Dynamo makes a graph of
        its own for another type, but not for another module of the same type, nor for hooks."""
        if list(map(len, self.hooks)) != self.hook_counts:
            return True
        return any(getattr(modules.get(name), "_parameters", None) is not own for modules, name, own in self.places)

    def follow(self) -> None:
        """Parameters that were put in the place of others in the original."""
        if not self._behind():
            return
        with compile_lock:
            for source, own, name, own_name in self._behind():
                own[own_name] = source[name]
            self._compile()  # compiled parts hold the parameters that they were made with

    def _behind(self) -> list[tuple[dict[str, Any], dict[str, Any], str, str]]:
        return [pair for pair in self.pairs if pair[1][pair[3]] is not pair[0][pair[2]]]


def _shared(module: nn.Module, graph: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, Any], str, str]]:
    """Pairs of (dict of the original, dict of the graph, name in each) of tensors that both have."""
    for kind in ("_parameters", "_buffers"):
        for path, holder in module.named_modules(remove_duplicate=False):
            for name, tensor in getattr(holder, kind).items():
                if tensor is None:
                    continue
                try:
                    twin = graph.get_submodule(path)
                except AttributeError:
                    continue
                own = getattr(twin, kind).get(name)
                if own is not None and own.shape == tensor.shape and own.data_ptr() == tensor.data_ptr():
                    yield getattr(holder, kind), getattr(twin, kind), name, name


_rewrites: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Rewrite]] = weakref.WeakKeyDictionary()


def rewritten(module: nn.Module, settings: Settings, hooks: bool) -> _Rewrite:
    """The rewrite of a model as it is now, made when it is needed first. Requests leave nothing in it. hooks: whether it has the
    model's own hooks in it.

    One thread at a time, and none while Dynamo traces: a capture changes the model's configuration for a while.
    """
    with compile_lock:
        return _rewritten(module, settings, hooks)


def _rewritten(module: nn.Module, settings: Settings, hooks: bool) -> _Rewrite:
    first = next(module.parameters(), None)
    where = (None, None) if first is None else (first.device, first.dtype)
    key = (settings.key(), where, state_key(module), hooks)
    made = _rewrites.setdefault(module, {})
    if key not in made or made[key].replaced():
        made[key] = _Rewrite(module, settings, hooks)
    made[key].follow()
    return made[key]


# ------------------------------------------------------------------------------------------------ for callers
def new_cache(model: Any, batch_size: int = 1, *, max_length: int | None = None) -> BackendCache:
    """An empty cache for a model that is compiled with backend="kvrewrite", or will be by generate(compile_config=...).

    batch_size: rows that go through the model (with beams or several sequences, all of them). max_length: tokens that a row
    will have in all, for which memory is then reserved.
    """
    inner = getattr(model, "_orig_mod", model)
    forward = getattr(inner, "forward", None)
    compiled = isinstance(model, OptimizedModule) or getattr(inner, "_compiled_call_impl", None) is not None
    compiled = compiled or hasattr(forward, "_torchdynamo_orig_callable")
    device = next(inner.parameters()).device
    return type_for(unwrap(inner))(batch_size, device, max_length=max_length, compileable=not compiled)


def _register() -> None:
    """Makes the name known where the package is not installed, and so has no entry point."""
    if NAME not in torch._dynamo.list_backends(None):
        torch._dynamo.register_backend(kvrewrite_backend, name=NAME)


wrap_compiled_modules(kvrewrite_backend)
_register()
__all__ = ["BackendCache", "kvrewrite_backend", "new_cache"]
