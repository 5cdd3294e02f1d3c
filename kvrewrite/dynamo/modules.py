"""Wraps models compiled as a whole: `torch.compile(model, backend="kvrewrite")` and its `generate`.

torch forwards everything but calls to the original module, so `generate` would run the original and not the compiled
model. And Dynamo skips some calls silently. Nothing is changed in the user's model, whose `generate` other threads may
be running.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from kvrewrite.capture.third_party import unwrap
from kvrewrite.errors import UnsupportedModelError

# Ways in which transformers runs a model's layers without the compiled call.
PAST_THE_MODEL = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_counts = threading.local()


def ran() -> None:
    """Records that a graph of this backend ran in this thread."""
    _counts.graphs = _graphs() + 1


def _graphs() -> int:
    return getattr(_counts, "graphs", 0)


def view(module: nn.Module, **attributes: Any) -> nn.Module:
    """Returns another object that is the same module, but with its own `attributes`, which are not set on the module.
    Parameters and submodules are the module's own."""
    twin: nn.Module = object.__new__(type(module))
    for name, value in vars(module).items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            value = types.MethodType(value.__func__, twin)
        twin.__dict__[name] = value
    twin.__dict__.update(attributes)
    return twin


def plain_view(module: nn.Module, hooks: bool) -> nn.Module:
    """Returns a module without what torch.compile put on it (`module.compile()`, `module.forward =
    torch.compile(module.forward)`). hooks: whether calling it runs its own hooks; those of submodules always run."""
    twin = view(module, _compiled_call_impl=None)
    forward: Any = vars(twin).get("forward")
    if hasattr(forward, "_torchdynamo_orig_callable"):
        twin.__dict__["forward"] = forward._torchdynamo_orig_callable
    if not hooks:
        twin.__dict__["_compiled_call_impl"] = lambda *args, **kwargs: twin.forward(*args, **kwargs)
    return twin


# What a module holds that is handled elsewhere than in `state_key`, or that a capture does not depend on.
_SEEN_TO = {"_parameters", "_buffers", "_modules", "_compiled_call_impl", "training", "generation_config"}


def state_key(module: nn.Module) -> int:
    """Distinguishes states of one model that compute different things with the same parameters: numbers and flags of
    its layers (scales, disabled adapters), configurations, hooks."""
    found = []
    for name, part in module.named_modules():
        own = {
            n: v for n, v in vars(part).items() if n not in _SEEN_TO and not hasattr(v, "_torchdynamo_orig_callable")
        }
        found.append(f"{name} {type(part).__qualname__} {_shown(own, 4)}")
    return hash("\n".join(found))


def _shown(value: Any, depth: int) -> str:
    """Returns text that differs if the value does; an opaque object is identified by its address."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if depth and isinstance(value, Mapping):
        return "{" + ",".join(f"{_shown(k, depth - 1)}:{_shown(v, depth - 1)}" for k, v in value.items()) + "}"
    if depth and isinstance(value, (list, tuple)):
        return "[" + ",".join(_shown(v, depth - 1) for v in value) + "]"
    if depth and isinstance(value, (set, frozenset)):
        return "(" + ",".join(sorted(_shown(v, depth - 1) for v in value)) + ")"
    if (
        depth
        and not isinstance(value, (Tensor, nn.Module, type))
        and not callable(value)
        and hasattr(value, "__dict__")
    ):
        return f"{type(value).__qualname__}{_shown(vars(value), depth - 1)}"
    return f"{type(value).__qualname__} at {id(value)}"


def _checked(module: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a compiled call of `module`, which must run graphs of this backend."""

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = _graphs()
        out = compiled(*args, **kwargs)
        if _graphs() == before:
            raise UnsupportedModelError(
                f"torch.compile compiled nothing of {type(module).__name__}, so that it ran unmodified: it leaves out functions "
                "that break its graph in a place where it can't go on (a recurrent layer of torch, a break within try or with), "
                "what torch.compiler.disable marks, and everything while its stance is force_eager. Pass fullgraph=True to see "
                "what it is"
            )
        return out

    return call


def _generate(compiled: OptimizedModule) -> Callable[..., Any]:
    """Makes the original model's `generate` run the compiled model."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        original = compiled._orig_mod
        inner = unwrap(original)  # peft's generate calls the model inside the adapters
        run, calls = _checked(inner, compiled.dynamo_ctx(inner._call_impl)), 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return run(*args, **kwargs)

        runner: Any = _with_call(original, inner, call)
        out = runner.generate(*args, **kwargs)
        if not calls:
            raise UnsupportedModelError(
                f"generate of {type(original).__name__} ran a model inside of it that is not compiled, so nothing was evicted; "
                "compile that one: model.compile(backend='kvrewrite', options=...)"
            )
        return out

    return generate


def _with_call(outer: nn.Module, inner: nn.Module, call: Callable[..., Any]) -> nn.Module:
    """Returns a view of `outer` in which calls of `inner` (itself or a submodule) are `call`."""
    if outer is inner:
        return view(outer, _compiled_call_impl=call)
    for name, child in outer._modules.items():
        if child is not None and any(m is inner for m in child.modules()):
            return view(outer, _modules={**outer._modules, name: _with_call(child, inner, call)})
    raise UnsupportedModelError(f"{type(inner).__name__} is no part of {type(outer).__name__}")


def wrap_compiled_modules(backend: Callable[..., Any]) -> None:
    """Gives modules that torch.compile makes for `backend` a `generate` that runs the compiled model, and calls that
    detect when Dynamo skipped them. Other backends' modules stay as they are."""
    found, initialize = OptimizedModule.__getattr__, OptimizedModule._initialize

    def is_ours(module: OptimizedModule) -> bool:
        given: Any = getattr(module.dynamo_ctx, "callback", None)
        while hasattr(given, "_torchdynamo_orig_backend"):
            given = given._torchdynamo_orig_backend
        return getattr(given, "compiler_fn", given) is backend

    def __getattr__(self: OptimizedModule, name: str) -> Any:
        value = found(self, name)
        if name == "generate" and is_ours(self):
            return _generate(self)
        if name in PAST_THE_MODEL and is_ours(self):
            raise UnsupportedModelError(f"{name} runs the model with a cache of its own; use generate")
        return value

    def _initialize(self: OptimizedModule) -> None:
        initialize(self)
        if is_ours(self):
            self.forward = _checked(self._orig_mod, self.forward)

    OptimizedModule.__getattr__ = __getattr__  # type: ignore[method-assign]
    OptimizedModule._initialize = _initialize  # type: ignore[method-assign]
