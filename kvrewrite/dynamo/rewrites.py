"""Makes the rewrites of a compiled model, one per setting, when they are first needed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.convert_frame import compile_lock

from kvrewrite import policies
from kvrewrite.capture.attention_interface import is_transformers_model
from kvrewrite.capture.frontend import capture
from kvrewrite.compiler import compile_captured, quiet
from kvrewrite.dynamo import append_tokens
from kvrewrite.dynamo.modules import plain_view, state_key
from kvrewrite.errors import OptionError
from kvrewrite.passes.canonical.proof import require_check
from kvrewrite.policies import Policy
from kvrewrite.runtime.foreign_config import foreign_config
from kvrewrite.runtime.model import RewrittenModel

OWN_OPTIONS = ("policy", "policy_weights", "inductor", "check")


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
        """Parses the options that torch.compile got; raises OptionError."""
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
        """Returns the key that distinguishes rewrites of one model."""
        changed = Path(self.weights).stat().st_mtime_ns if self.weights and Path(self.weights).exists() else 0
        return type(self.policy), repr(self.policy), self.weights, changed, self.inductor, self.mode, self.check


class Rewrite:
    """A rewritten model that follows the parameters of the original. It does not hold the original itself."""

    def __init__(self, module: nn.Module, settings: Settings, hooks: bool):
        captured = capture(plain_view(module, hooks))
        config = getattr(module, "config", None)
        program = compile_captured(captured, settings.policy, settings.weights, config, None, quiet, settings.check)
        if not is_transformers_model(module):
            config = foreign_config(program, type(module).__name__)
        self.pairs = list(_shared(module, program.graph))
        # Each submodule's path, and its parameters' dict, which identifies it without holding it.
        self.places = [(m._modules, n, c._parameters) for m in module.modules() for n, c in m.named_children()]
        self.hooks = [d for m in module.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.hook_counts = list(map(len, self.hooks))
        self.model = RewrittenModel(program, config)  # type: ignore[arg-type]
        self.settings = settings
        self.appends: append_tokens.AppendRunner | None = None
        self._compile()

    def _compile(self) -> None:
        """Compiles with Inductor. A stock cache has its own pools, so single tokens don't run from the model's."""
        more: dict[str, Any] = {} if self.settings.mode is None else {"mode": self.settings.mode}
        if self.settings.inductor:
            self.model.compile(static_decode=False, backend="inductor", **more)
        if append_tokens.why_not(self.model.program, self.model.policy) is None:

            def compiler(graph: fx.GraphModule) -> Callable[..., Any]:
                return (
                    torch.compile(graph, backend="inductor", fullgraph=True, **more)
                    if self.settings.inductor
                    else graph
                )

            self.appends = append_tokens.AppendRunner(self.model, self.model.graph_module, compiler)

    def replaced(self) -> bool:
        """Whether a submodule of the original was replaced since the capture, or has other hooks. Dynamo makes another
        graph for another type, but not for another module of the same type, nor for hooks."""
        if list(map(len, self.hooks)) != self.hook_counts:
            return True
        return any(getattr(modules.get(name), "_parameters", None) is not own for modules, name, own in self.places)

    def follow(self) -> None:
        """Takes over parameters that were replaced in the original."""
        if not self._behind():
            return
        with compile_lock:
            for source, own, name, own_name in self._behind():
                own[own_name] = source[name]
            self._compile()  # compiled parts hold the parameters that they were made with

    def _behind(self) -> list[tuple[dict[str, Any], dict[str, Any], str, str]]:
        return [pair for pair in self.pairs if pair[1][pair[3]] is not pair[0][pair[2]]]


def _shared(module: nn.Module, graph: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, Any], str, str]]:
    """Yields (dict of the original, dict of the graph, name in each) of tensors that both have."""
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


_rewrites: weakref.WeakKeyDictionary[nn.Module, dict[Any, Rewrite]] = weakref.WeakKeyDictionary()


def rewritten(module: nn.Module, settings: Settings, hooks: bool) -> Rewrite:
    """Returns the rewrite of a model as it is now; makes it when first needed. Requests leave nothing in it. hooks:
    whether it includes the model's own hooks.

    Only one thread at a time, and none while Dynamo traces: a capture changes the model's configuration temporarily.
    """
    with compile_lock:
        return _rewritten(module, settings, hooks)


def _rewritten(module: nn.Module, settings: Settings, hooks: bool) -> Rewrite:
    first = next(module.parameters(), None)
    where = (None, None) if first is None else (first.device, first.dtype)
    key = (settings.key(), where, state_key(module), hooks)
    made = _rewrites.setdefault(module, {})
    if key not in made or made[key].replaced():
        made[key] = Rewrite(module, settings, hooks)
    made[key].follow()
    return made[key]
