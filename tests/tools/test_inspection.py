"""What `inspect` shows: code that computes what the graph computes, alike sites once, text, JSON and HTML."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import fx
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kvrewrite import policies
from kvrewrite.analysis.flops import cost_of
from kvrewrite.analysis.memory import plan_layers, plan_memory
from kvrewrite.cli import app as cli
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.pipeline import canonical
from kvrewrite.tools.inspection.code import SiteCode, fold, sites_code
from kvrewrite.tools.tables import ranges
from tests.support.products import few
from tests.support.rewritten import traced
from tests.support.tiny import make_checkpoint


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


@pytest.mark.parametrize("name", few(["gemma2", "gpt2", "deepseek_v3", "falcon"], rest=["falcon"]))
def test_the_code_computes_what_the_graph_computes(name: str) -> None:
    """Each site's code before, run as Python on what its inputs are in the graph, gives what the graph has there."""
    shown: list[tuple[SiteCode, dict[str, Any]]] = []
    graphs: list[fx.GraphModule] = []

    def observe(step: str, gm: fx.GraphModule) -> None:
        if step == "lift_positions":
            graphs.append(gm)
            shown.extend((site, {}) for site in sites_code(gm))

    canonical(traced(name), observe)
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

    sites = canonical(traced("gemma2"), observe)
    assert len({s.window for s in sites}) == 2
    groups = fold(codes, None)
    assert [{sites[i].window for i in g.layers} for g in groups] == [{sites[g.layers[0]].window} for g in groups]


class Page(HTMLParser):
    """What a page has: tags that are closed in order, what it links to, its text."""

    EMPTY = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        """Notes a tag and what it loads or links to."""
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "srcset", "action", "data", "xlink:href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """A tag of SVG without content."""
        self.tags.append(tag)

    def handle_endtag(self, tag):
        """Closes the tag that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Notes text."""
        self.words.append(data)


def test_html(base, tmp_path) -> None:
    hostile = tmp_path / "<b onclick=x()>&amp;"
    shutil.copytree(base, hostile)
    page = tmp_path / "page.html"
    args = (
        "inspect",
        hostile,
        "-p",
        "h2o",
        "--budget",
        100,
        "--chunk",
        64,
        "-o",
        "layer_budgets=pyramid",
        "--context",
        512,
    )
    done = call(*args, "--html", page, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["html"] == str(page)
    text = page.read_text()
    read = Page(text)
    assert not read.open
    assert read.links
    assert all(link.startswith("#") for link in read.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not re.search(r"https?:|//|url\(|@import|\bon\w+\s*=", re.sub(r"<title>.*?</title>|<h1>.*?</h1>", "", text))
    assert hostile.name not in text
    assert "".join(read.words).count(hostile.name) == 2  # title and headline
    words = "".join(read.words)
    for part in (
        "a model, not a measurement",
        "kvrewrite.cached_attention(",
        "layer 0; layers 1-2: the same",
        "layer_budgets",
    ):
        assert part in words
    assert "prefers-color-scheme:dark" in text
    sites = [AttentionSite.from_dict(s) for s in json.loads(done.stdout)["sites"]]
    policy = policies.make("h2o", budget=100, chunk=64, layer_budgets="pyramid")
    for layer in plan_layers(sites, policy, 4, 512):
        assert f"layer {layer.site.layer}: {layer.slots[0]:,} slots per head, {layer.pages:,} pages" in words
    assert call(*args, "--html", page).exit_code == 1
    assert page.read_text() == text
    assert call("inspect", base, "--html", page, "--force").exit_code == 0
    assert "Memory plan" not in page.read_text()  # there is no policy to plan for
    assert call("inspect", base, "--force").exit_code == 2
    assert "is not a directory" in call("inspect", base, "--html", tmp_path / "nowhere" / "page.html").stderr


def test_layers_of_the_plan_add_up() -> None:
    sites = [AttentionSite(i, f"l{i}", 4, 2, 8, 8, 1.0, "sdpa", window=32 * (i == 1)) for i in range(3)]
    policy = policies.make("h2o", budget=100, chunk=50, layer_budgets="pyramid")
    layers = plan_layers(sites, policy, 2, 1000)
    plan = plan_memory(sites, policy, 2, 1000)
    assert plan.full == sum(p.full for p in layers) == (1000 + 32 + 1000) * 2 * 16 * 2
    assert plan.evicted == sum(p.evicted for p in layers)
    assert layers[0].slots[0] > layers[2].slots[0]
    assert layers[1].slots == [32, 32]


def test_costs() -> None:
    """FLOPs and bytes by hand for one layer and 8 tokens in chunks of 4 on a budget of 2."""
    config = LlamaConfig(
        vocab_size=11, hidden_size=6, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    sites = [AttentionSite(0, "", 2, 1, 3, 3, 1.0, "sdpa")]
    linear = 6 * 6 + 6 * 3 * 2 + 6 * 6 + 3 * 6 * 5
    full = cost_of(model, sites, None, 4, 8)
    assert full.prefill_flops == 8 * 2 * linear + 2 * 66 + 2 * 6 * 2 * 36
    assert full.prefill_bytes == 4 * (linear + 66) + 4 * 6 * 8 + 4 * 6 * 8
    assert full.decode_bytes == 4 * (linear + 66) + 4 * 6 * 9
    assert full.decode_flops == 2 * (linear + 66) + 2 * 6 * 2 * 9
    policy = policies.make("h2o", budget=2, chunk=4, recent_tokens=1)
    kept = cost_of(model, sites, policy, 4, 8)
    assert kept.prefill_flops == 8 * 2 * linear + 2 * 66 + 2 * 6 * 2 * (10 + 2 * 4 + 10)
    assert kept.prefill_bytes == 2 * 4 * (linear + 66) + 4 * 6 * (4 + 6) + 4 * 6 * 8
    assert kept.decode_bytes == 4 * (linear + 66) + 4 * 6 * 3


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
