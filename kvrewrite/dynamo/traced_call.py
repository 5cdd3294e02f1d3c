"""Finds whose forward Dynamo is compiling, and with which arguments."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator

from kvrewrite.dynamo.graphs import source_name, source_of
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.runtime.model import RewrittenModel

WHOLE = (
    "the backend takes whole calls of a causal language model: compile the model (or its forward), and pass fullgraph=True to "
    "see what breaks its graph"
)
told: set[str] = set()  # messages that were given


@dataclass
class Argument:
    """One argument of the traced call: its value at that time, and Dynamo's name for it."""

    value: Any
    source: str


@dataclass
class Call:
    """The traced call of a model. source: Dynamo's name for the model; hooks: whether the model's own hooks run inside
    the traced function, not around it."""

    module: nn.Module
    source: str
    hooks: bool
    arguments: dict[str, Argument] = field(default_factory=dict)


_RESUMED = "torch_dynamo_resume_in_"


def root_frame() -> Any:
    """Returns what Dynamo knows about the function that it is compiling."""
    root = InstructionTranslator.current_tx().output.root_tx
    assert root is not None
    return root


def is_resumed(code: types.CodeType) -> bool:
    """Whether Dynamo made a function from the rest of another one, after a graph break."""
    return code.co_name.startswith(_RESUMED)


def traced_call() -> Call:
    """Returns the call that Dynamo is compiling; raises UnsupportedModelError if it is not a model's forward."""
    root = root_frame()
    code: types.CodeType = root.f_code
    _keep_compiling(code)
    ours = str(root.f_globals.get("__name__")).startswith(("kvrewrite.runtime", "kvrewrite.cache"))
    if ours or any(isinstance(value, RewrittenModel) for value in root.f_locals.values()):
        raise UnsupportedModelError(
            "the model is rewritten already: compile it with model.compile(), without this backend"
        )
    if is_resumed(code):
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
    """Increases torch.compile's limits before they are reached; beyond them it silently runs the unmodified model.
    Applies to all threads: since torch 2.13 a setting of one thread does not reach others, unless it is a default, and
    they share the graphs."""
    config: Any = torch._dynamo.config
    graphs = len(_debug_get_cache_entry_list(code))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(config, limit) < graphs + 4:
            setattr(config, limit, graphs + 8)
        if config._config[limit].default < graphs + 4:
            config._config[limit].default = graphs + 8
    if graphs >= 32 and f"recompiles {code.co_qualname}" not in told:
        told.add(f"recompiles {code.co_qualname}")
        warnings.warn(
            f"kvrewrite: torch.compile has made {graphs} graphs of {code.co_qualname}; calls of ever new kinds (batch sizes, "
            'masks, flags) cost a trace each. TORCH_LOGS="recompiles" says why',
            stacklevel=2,
        )


def _frame_arguments(code: types.CodeType, values: Mapping[str, Any]) -> tuple[list[Argument], dict[str, Argument]]:
    """Returns the arguments of a frame, with *args and **kwargs unpacked."""
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
    """Returns the code of a model's forward and of what is wrapped around it."""
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


def check_module(call: Call) -> None:
    """Raises UnsupportedModelError if the call is not of a model of token ids, but of a part of one."""
    tensors = [a.value for a in call.arguments.values() if isinstance(a.value, Tensor)]
    if len(tensors) != 1 or tensors[0].is_floating_point():
        raise _not_a_whole_model(call)


def check_logits(call: Call, width: int) -> None:
    """Raises that error for a transformers model whose result has `width` channels other than it must: one without
    output embeddings, such as a base model or a user's class, must give as many as its vocabulary has tokens."""
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


def guard_module(gm: fx.GraphModule, call: Call) -> int:
    """Makes Dynamo recompile for another module; it would not, because it treats parameters like other inputs. Returns
    the input that is the module's first parameter."""
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
