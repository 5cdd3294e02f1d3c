"""What `inspect` shows: code that computes what the graph computes, alike sites once, text, JSON and HTML."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import fx
from torch.nn import functional

from kvrewrite import cli
from kvrewrite.capture import capture
from kvrewrite.graph import get_attr
from kvrewrite.inspection.code import SiteCode, fold, ranges, sites_code
from kvrewrite.passes.pipeline import canonical
from tests import families
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("inspection") / "base", num_hidden_layers=3)


def call(*args: object):
    return CliRunner().invoke(cli.main, [str(a) for a in args])


# ------------------------------------------------------------------------------------------------------------- the code
class Values(fx.Interpreter):
    """Runs a graph and remembers every node's value."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


class Parameters(SimpleNamespace):
    """Dotted names of a module's tensors as attributes, numbers as items."""

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(index))


def names_of(gm: fx.GraphModule, module: str) -> dict[str, Any]:
    """Tensors by the names that the code has for them."""
    found: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target).removeprefix(f"{module}.") if module else str(node.target)
        *spaces, leaf = path.split(".")
        if not spaces:
            found[leaf] = get_attr(gm, str(node.target))
            continue
        space = found.setdefault(spaces[0], Parameters())
        for part in spaces[1:]:
            space = space.__dict__.setdefault(part, Parameters())
        setattr(space, leaf, get_attr(gm, str(node.target)))
    return found


def attention(q, k, v, *, scale, sinks=None, alibi=None, softcap=0.0, window=0, chunk=0):
    """The op with what the code leaves out."""
    return torch.ops.kvrewrite.attention(q, k, v, sinks, alibi, scale, softcap, window, chunk)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "deepseek_v3", "falcon"])
def test_the_code_computes_what_the_graph_computes(name: str) -> None:
    """Each site's code before, run as Python on what its inputs are in the graph, gives what the graph has there."""
    shown: list[tuple[SiteCode, dict[str, Any]]] = []
    graphs: list[fx.GraphModule] = []

    def observe(step: str, gm: fx.GraphModule) -> None:
        if step == "lift_positions":
            graphs.append(gm)
            shown.extend((site, {}) for site in sites_code(gm))

    canonical(capture(families.make(name)), observe)
    gm = graphs[0]
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "position_ids": torch.arange(9).expand(2, 9)}
    values = Values(gm)
    values.run(*(given[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"))
    for site, _ in shown:
        space = {
            "torch": torch, "F": functional, "aten": torch.ops.aten, "kvrewrite": SimpleNamespace(attention=attention),
            "B": 2, "T": 9, **names_of(gm, site.module),
        }  # fmt: skip
        exec(site.text(), space)
        function = next(
            v for k, v in space.items() if callable(v) and getattr(v, "__code__", None) and k != "__builtins__"
        )
        inputs = [values.seen[i["node"]] for i in site.inputs]
        got = function(*inputs)
        torch.testing.assert_close(got, values.seen[site.lines[-1].nodes[-1]], rtol=0, atol=0)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([3]) == "3"


def test_alike_sites_are_folded(base) -> None:
    done = call("inspect", base, "-p", "h2o", "--budget", 16, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [g["layers"] for g in data["code"]] == [[0, 1, 2]]
    code = data["code"][0]
    assert "cache_update" not in code["before"]["text"]
    for part in ("kvrewrite.cached_attention(", "kvrewrite.cache_update(", "q_proj.weight (32, 32)", "lens=lens"):
        assert part in code["after"]["text"]
    new = {line["op"]: line["new"] for line in code["after"]["lines"]}
    assert new["kvrewrite.cache_update"]
    assert not new["linear"]
    assert not any(line["new"] for line in code["before"]["lines"])
    assert {s["layer"] for s in data["sites"]} == {0, 1, 2}
    assert [p["name"] for p in data["passes"]][-1] == "insert_cache"


def test_different_sites_are_not_folded() -> None:
    codes: list[SiteCode] = []

    def observe(step: str, gm: fx.GraphModule) -> None:
        if step == "lift_positions":
            codes.extend(sites_code(gm))

    sites = canonical(capture(families.make("gemma2")), observe)
    assert len({s.window for s in sites}) == 2
    groups = fold(codes, None)
    assert [{sites[i].window for i in g.layers} for g in groups] == [{sites[g.layers[0]].window} for g in groups]


def test_text(base) -> None:
    done = call("inspect", base, "-p", "streaming_llm", "--budget", 16)
    assert done.exit_code == 0, done.output
    assert "layer 0; layers 1-2: the same" in done.stdout
    assert done.stdout.index("# before") < done.stdout.index("kvrewrite.attention(") < done.stdout.index("# after")
    assert "+     kvrewrite.cache_update(" in done.stdout
    one = call("inspect", base, "--site", 1)
    assert "layer 0; layers 1-2: the same" in one.stdout
    assert "cached_attention" not in one.stdout
    assert "def self_attn" not in call("inspect", base, "--no-code").stdout
    wrong = call("inspect", base, "--site", 7)
    assert wrong.exit_code == 1
    assert "from 0 to 2" in wrong.stderr
    assert call("inspect", base, "--budget", 3).exit_code == 2
