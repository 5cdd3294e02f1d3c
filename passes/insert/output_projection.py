"""Finds the weight that a site's attention goes into: the projection of all heads' values to the layer's output.

Requires the site's attention in the graph. Only tensors' views may stand between the two; what they do with heads and
channels is tried out, on numbers that say where they come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import concretize, get_attr, is_size, shape_of, symbol
from kvrewrite.ir.projections import TRANSPOSES
from kvrewrite.ir.site import AttentionSite

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten._to_copy.default, aten.to.dtype)
VIEWS = (aten.transpose.int, aten.permute.default, *RESHAPES, *COPIES)
# Which argument of a product is the activation, which the weight, and whether the weight is (channels out, channels in).
PRODUCTS = {
    aten.linear.default: (0, 1, True),
    aten.addmm.default: (1, 2, False),
    aten.mm.default: (0, 1, False),
    aten.matmul.default: (0, 1, False),
}
ROWS, TOKENS = 2, 3  # of the numbers that are sent through the views


def output_projection(gm: fx.GraphModule, out: fx.Node, site: AttentionSite) -> tuple[str, bool]:
    """Returns the name of the weight in the graph, and whether it lies as (heads * channels, channels out).

    out: (B, H, T, Dv), what the site's attention gives. Raises UnsupportedModelError where it does not go straight into
    one product with a plain weight, head after head.
    """
    path, node = [], out
    while True:
        readers = [n for n in node.users if not is_size(n)]
        if len(readers) != 1:
            raise _refusal(site, f"is read by {len(readers)} operations ({_names(readers)}), expected one projection")
        node = readers[0]
        if node.target not in VIEWS:
            break
        path.append(node)
    if node.target not in PRODUCTS:
        raise _refusal(site, f"goes into {node.target} before it is projected")
    at, of, turned = PRODUCTS[node.target]
    if node.args[at] is not (path[-1] if path else out):
        raise _refusal(site, f"is no input of {node.name} ({node.target}), which is no projection of it")
    name, flips = _weight(gm, node.args[of], site)
    _check_order(path, out, site)
    return name, turned == flips


def _weight(gm: fx.GraphModule, node: Any, site: AttentionSite) -> tuple[str, bool]:
    """The attribute that a weight is, and whether an odd number of transposes is between."""
    flips = False
    while isinstance(node, fx.Node) and node.target in TRANSPOSES:
        flips ^= node.target is not aten.to.dtype
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise _refusal(site, "is multiplied by a weight that is computed, not stored as it is")
    value = get_attr(gm, str(node.target))
    if value.dim() != 2 or not value.is_floating_point() or is_traceable_wrapper_subclass(value):
        raise _refusal(
            site, f"is multiplied by {node.target}, a {type(value).__name__} of {value.dtype}, no plain matrix"
        )
    return str(node.target), flips


def _check_order(path: list[fx.Node], out: fx.Node, site: AttentionSite) -> None:
    """Channel h * Dv + d of what is projected must be channel d of head h. In numpy: a policy's code is being traced."""
    batch, heads, length, channels = shape_of(out)
    sizes = {symbol(size): count for size, count in ((batch, ROWS), (length, TOKENS)) if isinstance(size, torch.SymInt)}
    places = np.arange(heads * channels)
    value = np.broadcast_to(places.reshape(1, heads, 1, channels), concretize((batch, heads, length, channels), sizes))
    for node in path:
        args: Any = fx.node.map_arg(node.args[1:], lambda n: concretize([n.meta["val"]], sizes)[0])  # type: ignore[arg-type]
        if node.target in RESHAPES:
            value = value.reshape(args[0])
        elif node.target is aten.transpose.int:
            value = value.swapaxes(*args)
        elif node.target is aten.permute.default:
            value = value.transpose(args[0])
    if value.shape[-1] != len(places) or not (value == places).all():
        raise _refusal(site, "is projected in another order of heads and channels than attention gives them")


def _names(nodes: list[fx.Node]) -> str:
    return ", ".join(str(n.target) for n in nodes) or "none"


def _refusal(site: AttentionSite, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {site.layer} ({site.module}): this policy weighs values by the output projection of each head, but what this "
        f"layer's attention gives {reason}; merge adapters and use unquantized weights, or choose another policy (snapkv)"
    )
