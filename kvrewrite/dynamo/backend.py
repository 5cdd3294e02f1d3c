"""The torch.compile backend: `torch.compile(model, backend="kvrewrite", options={"policy": "streaming_llm", "budget":
1024})`.

Dynamo traces the call of an ordinary model and passes on a graph with its inputs. The backend finds out whose forward
that is (`traced_call.py`) and what its inputs and outputs are (`adapter.py`). It then runs the model's rewrite
(`rewrites.py`, the same as from `kvrewrite.transform`) instead of the graph. Keys and values of a `DynamicCache` are
returned short, so that the cache holds what the policy keeps. A graph that is not one whole forward of a model is
refused when it runs, even if torch.compile would otherwise fall back to the unmodified model. A graph without attention
goes to Inductor unchanged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._dynamo.eval_frame import OptimizedModule

from kvrewrite.capture.third_party import unwrap
from kvrewrite.dynamo.adapter import Adapter
from kvrewrite.dynamo.caches import BackendCache, type_for
from kvrewrite.dynamo.graphs import has_attention, is_token_wise, weights_of
from kvrewrite.dynamo.modules import ran, wrap_compiled_modules
from kvrewrite.dynamo.rewrites import Settings
from kvrewrite.dynamo.traced_call import is_resumed, root_frame, told
from kvrewrite.errors import KVRewriteError

NAME = "kvrewrite"


def kvrewrite_backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point for `torch_dynamo_backends`. options: policy, policy_weights (a path), inductor (False: run
    eagerly, for debugging), check (as for `kvrewrite.transform`) and the policy's own, such as budget."""
    try:
        settings = Settings.read(options, mode)
        seen = has_attention(gm.graph)
        if seen or _may_be_part_of_a_model(gm, example_inputs):
            return Adapter(settings, gm, example_inputs, attention_seen=seen)
        return _without_attention(gm, example_inputs, settings)
    except KVRewriteError as error:
        return _refusal(error)


def _refusal(error: KVRewriteError) -> Callable[..., Any]:
    """Raises when the graph runs: torch.compile may swallow an error that a backend raises while it compiles."""

    def refuse(*_: Any) -> Any:
        raise copy.copy(error)

    return refuse


def _may_be_part_of_a_model(gm: fx.GraphModule, example_inputs: list[Any]) -> bool:
    """Whether a graph without visible attention must not run unchanged: it mixes tokens, or continues after a graph
    break, and attention that no graph shows may have run at the break."""
    weights = weights_of(gm.graph)
    if not weights:
        return False  # a function of tensors
    return is_resumed(root_frame().f_code) or not is_token_wise(gm.forward, example_inputs, weights)


def _without_attention(gm: fx.GraphModule, inputs: list[Any], settings: Settings) -> Callable[..., Any]:
    if "no attention" not in told:
        told.add("no attention")
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


def new_cache(model: Any, batch_size: int = 1, *, max_length: int | None = None) -> BackendCache:
    """Makes an empty cache for a model that is, or will be by generate(compile_config=...), compiled with
    backend="kvrewrite".

    batch_size: rows that go through the model (all beams or sequences). max_length: tokens per row in total, for which
    memory is reserved.
    """
    inner = getattr(model, "_orig_mod", model)
    forward = getattr(inner, "forward", None)
    compiled = isinstance(model, OptimizedModule) or getattr(inner, "_compiled_call_impl", None) is not None
    compiled = compiled or hasattr(forward, "_torchdynamo_orig_callable")
    device = next(inner.parameters()).device
    return type_for(unwrap(inner))(batch_size, device, max_length=max_length, compileable=not compiled)


def _register() -> None:
    """Registers the backend's name if the package is not installed and so has no entry point."""
    if NAME not in torch._dynamo.list_backends(None):
        torch._dynamo.register_backend(kvrewrite_backend, name=NAME)


wrap_compiled_modules(kvrewrite_backend)
_register()
__all__ = ["BackendCache", "kvrewrite_backend", "new_cache"]
