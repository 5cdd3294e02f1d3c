"""Model directories that somebody else made or changed: nothing outside the graph's own memory is touched, nothing runs, and
what is wrong is an ArtifactError with its place."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import kvrewrite
from kvrewrite.artifact import files, publishing, writing
from kvrewrite.artifact.checkpoint import Checkpoint
from kvrewrite.artifact.companions import read_tokenizer
from kvrewrite.artifact.policy_weights import import_pickle
from kvrewrite.errors import ArtifactError
from tests.support.fuzz_files import resign
from tests.support.processes import environment
from tests.support.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def honest(base: Path) -> Path:
    """It converted, h2o."""
    kvrewrite.convert(base, base.parent / "honest", "h2o", budget=16)
    return base.parent / "honest"


@pytest.fixture
def model(honest: Path, tmp_path: Path) -> Path:
    """A copy to be harmed."""
    return Path(shutil.copytree(honest, tmp_path / "model"))


def sign(directory: Path, *names: str, change: Callable[[Json], Any] = lambda _: None) -> None:
    """The hashes of these files, and that of the manifest, as they are now."""
    body = json.loads((directory / "kvrewrite.json").read_text())
    for name in names:
        path = directory / name
        body["files"][name] = {"size": path.stat().st_size, "sha256": files.sha256_of(path)}
    change(body)
    (directory / "kvrewrite.json").write_bytes(resign(body))


def edit(directory: Path, change: Callable[[list[Json]], Any]) -> None:
    """Changes the nodes of graph.json, and signs it."""
    path = directory / "graph.json"
    graph = json.loads(path.read_text())
    change(graph["nodes"])
    path.write_text(json.dumps(graph))
    sign(directory, "graph.json")


def call(name: str, target: str, *args: Any, **kwargs: Any) -> Json:
    return {"name": name, "op": "call_function", "target": target, "args": list(args), "kwargs": kwargs}


def ref(name: str) -> Json:
    return {"node": name}


def before_output(*nodes: Json) -> Callable[[list[Json]], None]:
    return lambda found: found.__setitem__(slice(-1, -1), nodes)


def named(nodes: list[Json], target: str) -> Json:
    return next(n for n in nodes if n["target"] == target)


IDS = torch.arange(20)[None]


# ------------------------------------------------------------------------------------------------- memory of the process
def test_no_graph_writes_outside_its_tensors(model: Path) -> None:
    """A view that begins behind a buffer, and an op that writes to it: it once changed other tensors of the program."""
    edit(
        model,
        before_output(
            call("b", "aten.empty.memory_format", [1 << 22]),
            call("al", "aten._reshape_alias.default", ref("b"), [1, 2, 64], [4195328, 4195328, 1]),
            call("x", "aten.full.default", [1, 2, 64], 12345.0),
            call("v", "aten.full.default", [1], 2, dtype={"dtype": "int32"}),
            call("w", "kvrewrite.cached_past.default", ref("x"), ref("al"), ref("v"), 1),
        ),
    )
    with pytest.raises(ArtifactError, match=r"node 'al'.*_reshape_alias.*not on the list"):
        kvrewrite.load(model)


@pytest.mark.parametrize(
    "op", ["as_strided", "as_strided_copy", "as_strided_scatter", "_reshape_alias", "set_", "empty_strided"]
)
def test_views_by_strides_are_off_the_list(op: str) -> None:
    for overload in getattr(torch.ops.aten, op).overloads():
        with pytest.raises(ArtifactError, match="not on the list"):
            kvrewrite.ir.allow_list.resolve_op(f"aten.{op}.{overload}")


def test_memory_that_nobody_wrote_to_is_zero(model: Path) -> None:
    """A graph that returned `empty` once gave what was freed before."""
    for _ in range(20):
        torch.full((1, 20, 300), 7.0)  # what it would find
    logits = json.loads((model / "graph.json").read_text())["nodes"][-1]["args"][0]["node"]
    edit(
        model,
        lambda nodes: (
            before_output(call("e", "aten.empty_like.default", ref(logits)))(nodes),
            nodes[-1].update(args=[ref("e")]),
        ),
    )
    out = kvrewrite.load(model)(IDS).logits
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n: named(n, "kvrewrite.cache_update.default")["args"].__setitem__(9, ref("k_new")), "k_pages"),
        (lambda n: named(n, "kvrewrite.cache_update.default")["args"].__setitem__(13, ref("wrong_table")), "table"),
        (lambda n: named(n, "kvrewrite.cache_update.default")["args"].__setitem__(14, ref("k_new")), "lens"),
        (lambda n: named(n, "kvrewrite.cache_update.default")["args"].__setitem__(7, ref("wrong_keep")), "keep"),
        (lambda n: named(n, "kvrewrite.cache_update.default")["args"].__setitem__(4, ref("wrong_ids")), "positions"),
        (lambda n: named(n, "kvrewrite.cached_attention.default")["args"].__setitem__(7, ref("other_table")), "several|layer 7"),
        (lambda n: n.insert(-1, {**named(n, "kvrewrite.cache_update.default"), "name": "again"}), "updated twice"),
        (lambda n: n.remove(named(n, "kvrewrite.cache_update.default")), "nothing updates the cache of layer 0"),
        (lambda n: named(n, "kvrewrite.cache_update.default")["args"].__setitem__(16, 9), "window and chunk are 9"),
        (lambda n: named(n, "kvrewrite.cached_attention.default")["kwargs"].update(patterns="a_shape:1"), "got 1 numbers"),
        (lambda n: named(n, "kvrewrite.cached_attention.default")["kwargs"].update(patterns="dense"), "patterns are of 1 heads"),
    ],
)  # fmt: skip
def test_ops_of_the_cache_get_the_programs_own_inputs(model: Path, change: Any, says: str) -> None:
    """Table entries, lengths and budgets that a graph computes itself would send a kernel anywhere."""

    def both(nodes: list[Json]) -> None:
        at = next(i for i, n in enumerate(nodes) if n["op"] == "call_function")
        nodes[at:at] = [
            call("own", "aten.select.int", ref("table_0"), 0, 0), call("wrong_table", "aten.add.Tensor", ref("own"), 1000),
            call("kept", "aten.select.int", ref("keep_0"), 0, 0), call("wrong_keep", "aten.add.Tensor", ref("kept"), 1000),
            call("wrong_ids", "aten.add.Tensor", ref("positions"), 1000), call("k_new", "aten.neg.default", ref("k_pages_0")),
            call("other_table", "aten.select.int", ref("table_0"), 0, 1),
        ]  # fmt: skip
        change(nodes)

    edit(model, both)
    with pytest.raises(ArtifactError, match=says):
        kvrewrite.load(model)


def test_shapes_and_dtypes_of_the_file_must_be_true(model: Path) -> None:
    def lie(nodes: list[Json]) -> None:
        node = named(nodes, "aten.linear.default")
        node["val"]["shape"][2] += 1

    edit(model, lie)
    with pytest.raises(
        ArtifactError, match=r"graph.json: node 'linear\w*' \(aten.linear.default\): the file says.*float32"
    ):
        kvrewrite.load(model)


def test_calls_that_do_not_fit_name_the_node(model: Path) -> None:
    edit(model, lambda n: named(n, "aten.linear.default").update(target="aten.mm.default"))
    with pytest.raises(ArtifactError, match=r"graph.json: node 'linear\w*' \(aten.mm.default\): it can't be computed"):
        kvrewrite.load(model)


def test_what_fails_when_it_runs_names_the_node(model: Path) -> None:
    """Values are not known before: an index that is out of range."""

    def out_of_range(nodes: list[Json]) -> None:
        node = named(nodes, "aten.embedding.default")
        at = nodes.index(node)
        nodes.insert(at, call("far", "aten.add.Tensor", node["args"][1], 1 << 40))
        node["args"][1] = ref("far")

    edit(model, out_of_range)
    loaded = kvrewrite.load(model)
    with pytest.raises(ArtifactError, match=r"graph.json: node 'embedding\w*' failed: IndexError"):
        loaded(IDS)


# ------------------------------------------------------------------------------------------------------ time and memory
@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([call("p", "operator.pow", ref("s"), 1 << 40)], "exponent"),
        ([call("p", "operator.pow", 3, ref("s"))], "exponent"),
        (
            [
                call(f"m{i}", "operator.mul", ref(f"m{i - 1}" if i else "s"), ref(f"m{i - 1}" if i else "s"))
                for i in range(60)
            ],
            "too large",
        ),
        ([call("z", "aten.zeros.default", [1 << 36])], "bytes"),
        ([call("z", "aten.arange.default", 1 << 50)], "bytes"),
        ([call("e", "operator.mul", [1, 2], 1 << 40)], "expected sizes"),
        ([call("r", "aten.reshape.default", ref("k_pages_0"), ref("k_pages_0"))], "shape is .*; expected List"),
        ([call("c", "aten.cat.default", ref("k_pages_0"))], "tensors is .*; expected List"),
        ([call("u", "aten.unbind.int", ref("k_pages_0"), 0)], "it gives .* results"),
        ([call("u", "aten.split.Tensor", ref("k_pages_0"), 1)], "it gives .* results"),
        ([call("u", "aten.chunk.default", ref("k_pages_0"), 1 << 30)], "it gives .* results"),
        ([call("w", "aten.linspace.default", 0, 1, ref("big")) for _ in "1"], "not defined"),
    ],
    ids=[
        "pow",
        "power of sizes",
        "squares",
        "zeros",
        "arange",
        "lists",
        "a tensor as a shape",
        "a tensor as tensors",
        "unbind",
        "split",
        "chunk",
        "undefined",
    ],
)
def test_sizes_and_loops_are_bounded(model: Path, nodes: list[Json], says: str) -> None:
    edit(model, before_output(call("s", "aten.sym_size.int", ref("input_ids"), 1), *nodes))
    started = time.process_time()
    with pytest.raises(ArtifactError, match=says):
        kvrewrite.load(model)
    assert time.process_time() - started < 20


BOMBS: dict[str, Callable[[], str]] = {
    "nodes": lambda: ",".join(f'{{"name":"a{i}","op":"placeholder","target":"a{i}"}}' for i in range(210_000)),
    "lists": lambda: "[]," * 8_000_000 + "1",
    "deep": lambda: '{"name":"a","op":"output","target":"output","args":' + "[" * 500_000 + "]" * 500_000 + "}",
    "tuples": lambda: (
        '{"name":"a","op":"output","target":"output","args":[' + '{"tuple":[' * 100_000 + "]}" * 100_000 + "]}"
    ),
    "long": lambda: " " * (65 << 20),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_graph_file_takes_no_more_memory_than_it_may(model: Path, kind: str) -> None:
    (model / "graph.json").write_text('{"format":2,"nodes":[' + BOMBS[kind]() + "]}")
    sign(model, "graph.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"graph\.json"):
        kvrewrite.load(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize(
    "recipe",
    [
        lambda key: {"cat": [{"key": key}] * 20_000, "dim": 0},
        lambda key: {"narrow": {"cat": [{"key": key}] * 20_000, "dim": 0}, "dim": 0, "start": 0, "length": 32},
    ],
    ids=["cat", "inside"],
)
def test_recipes_make_no_more_than_the_files_hold(model: Path, recipe: Any) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    sign(model, change=lambda body: body["recipes"].update({name: {**recipe(name), "dtype": "float32"}}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"from the [0-9]+ that the files hold"):
        kvrewrite.load(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


# --------------------------------------------------------------------------------------------------------------- manifest
@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda b: b["layout"]["classes"][0].update(layers=[0, 7]), "layout"),
        (lambda b: b["layout"]["classes"][0].update(layers="0"), r"layout\.classes\[0\]\.layers"),
        (lambda b: b["layout"]["classes"][0].update(kv_heads=3), "node"),
        (lambda b: b["layout"]["classes"][0].update(k_dim=0), r"layout\.classes\[0\]\.k_dim"),
        (lambda b: b["layout"].pop("states"), "states"),
        (lambda b: b["layout"].update(contiguous=True), "contiguous"),
        (lambda b: b["layout"].update(inputs=[]), "inputs"),
        (lambda b: b["layout"].update(length_tables=[{"input": "x", "index": 0, "threshold": 1, "in_graph": True}]), "length"),
        (lambda b: b["sites"][0].update(kv_heads=1 << 40), r"sites\[0\]\.kv_heads"),
        (lambda b: b["sites"].pop(), "layer"),
        (lambda b: b["policy"].update(name="nothing"), "policy"),
        (lambda b: b["policy"]["options"].update(budget=-1), "policy"),
        (lambda b: b["policy"]["options"].update(head_budgets="adakv"), "ragged"),
        (lambda b: b.update(vocab_size=3), "logits"),
        (lambda b: b.update(dtype="load"), "dtype"),
        (lambda b: b.update(kvrewrite="\ud800"), "kvrewrite.json"),
        (lambda b: b["recipes"].update({b["base"][0]: {"key": "none"}}), "none"),
        (lambda b: b["recipes"].update({b["base"][0]: {"stack": [], "dim": 0}}), "recipes"),
        (lambda b: b.update(parameters=["x"]), "x"),
        (lambda b: b.update(constants=["a", "a.b"]), "constants"),
        (lambda b: b["files"].update({"a/" + "x" * 5000: {"size": 1, "sha256": "0" * 64}}), "files"),
        (lambda b: b["files"].update({"\0": {"size": 1, "sha256": "0" * 64}}), "files"),
    ],
)  # fmt: skip
def test_manifests_that_do_not_fit_say_where(model: Path, change: Any, place: str) -> None:
    sign(model, change=change)
    with pytest.raises(ArtifactError, match=place):
        kvrewrite.load(model)(IDS)


# ------------------------------------------------------------------------------------------ files that nobody vouches for
def test_a_stray_weight_file_is_refused(model: Path, honest: Path) -> None:
    weights = {n: t * 1.5 for f in honest.glob("model-*.safetensors") for n, t in load_file(f).items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"manifest does not list: model\.safetensors"):
        kvrewrite.load(model)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
)
def test_unlisted_files_take_no_effect(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    sign(model, change=lambda body: body["files"].pop(name, None))
    (model / name).write_text('{"eos_token_id": 5}')
    with pytest.raises(ArtifactError, match=f"{name}, which its manifest does not list"):
        (kvrewrite.load if "generation" in name else read_tokenizer)(model)


def test_listed_files_are_hashed_before_the_tokenizer_is_opened(model: Path) -> None:
    assert read_tokenizer(model)("fox")["input_ids"]
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace("fox", "FOX") if "fox" in text else text[:-1] + " ")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        read_tokenizer(model)


@pytest.mark.parametrize("content", ["[1]", '"x"', "{"])
def test_generation_configs_that_are_wrong(model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    sign(model, "generation_config.json")
    with pytest.raises(ArtifactError, match=r"generation_config\.json"):
        kvrewrite.load(model)


EVIL = "import os; os.environ['EVIL'] = '1'; open(__file__ + '.ran', 'w')\nfrom transformers import PreTrainedConfig as Evil\n"


@pytest.mark.parametrize("answer", ["y\n", pytest.param("", marks=pytest.mark.thorough)])
def test_code_of_a_directory_never_runs_and_nobody_is_asked(model: Path, tmp_path: Path, answer: str) -> None:
    """Neither that of a config nor that of a tokenizer."""
    other = shutil.copytree(model, tmp_path / "other")
    for directory, name, changes in (
        (model, "config.json", {"model_type": "nobody_has_this", "auto_map": {"AutoConfig": "evil.Evil"}}),
        (
            other,
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        ),
    ):
        (directory / "evil.py").write_text(EVIL)
        (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()) | changes))
        sign(directory, name)
    code = f"""
import kvrewrite
from kvrewrite.artifact.companions import read_tokenizer
from kvrewrite.errors import ArtifactError

try:
    read_tokenizer({str(other)!r})
except ArtifactError:
    pass
kvrewrite.load({str(model)!r})
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], input=answer, capture_output=True, text=True, cwd=ROOT,
        env=environment(), timeout=240,
    )  # fmt: skip
    assert not [*model.glob("*.ran"), *other.glob("*.ran")] and "[y/N]" not in ran.stdout + ran.stderr
    assert ran.stderr.strip().splitlines()[-1].startswith("kvrewrite.errors.ArtifactError"), ran.stderr[-2000:]
    assert "in load" in ran.stderr, ran.stderr[-2000:]  # not before it: the tokenizer was read or refused


# ------------------------------------------------------------------------------------------------------------- publishing
def write(base: Path, out: Path, **options: Any) -> None:
    kvrewrite.convert(base, out, "streaming_llm", budget=16, **options)


def test_what_appears_while_a_model_is_written_is_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seal = files.Writer.seal

    def thesis(self: Any) -> None:
        seal(self)
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    monkeypatch.setattr(files.Writer, "seal", thesis)
    with pytest.raises(ArtifactError, match="something appeared"):
        write(base, out)
    assert (out / "thesis.txt").read_text() == "years of work" and os.listdir(tmp_path) == ["out"]
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="even with force"):
        write(base, out, force=True)
    assert os.listdir(out) == ["thesis.txt"]


def test_force_checks_again_what_it_replaces(
    base: Path, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(honest, tmp_path / "out"))
    seal = files.Writer.seal

    def swapped(self: Any) -> None:
        seal(self)
        shutil.rmtree(out)
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    monkeypatch.setattr(files.Writer, "seal", swapped)
    with pytest.raises(ArtifactError, match="not a model directory"):
        write(base, out, force=True)
    assert os.listdir(out) == ["thesis.txt"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_killed_replacement_leaves_a_whole_directory(tmp_path: Path, exchanges: bool) -> None:
    """Killed before or after any move that publishing makes: `out` is one of the two, at once or after the next run began."""
    for name in "ab":
        (tmp_path / name).mkdir()
    can_exchange = exchanges and publishing.exchange(tmp_path / "a", tmp_path / "b")
    killed: list[bool] = []
    for point in range(8):
        folder, out = tmp_path / f"{point}" / ".out.0.partial", tmp_path / f"{point}" / "out"
        for path, text in ((folder, "new"), (out, "old")):
            path.mkdir(parents=True)
            (path / "config.json").write_text(text)
        code = f"""
import os, shutil, signal
from pathlib import Path
from kvrewrite.artifact import publishing
if not {exchanges}: publishing.exchange = lambda *_: False
count = 0
def killing(real):
    def run(*args, **kwargs):
        global count
        for when in (0, 1):
            if count == {point}: os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            if not when: result = real(*args, **kwargs)
        return result
    return run
os.replace, os.rename, shutil.rmtree = killing(os.replace), killing(os.rename), killing(shutil.rmtree)
if {exchanges}: publishing.exchange = killing(publishing.exchange)
publishing.publish(Path({str(folder)!r}), Path({str(out)!r}), lambda: None)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed.append(done.returncode != 0)
        assert out.exists() or not can_exchange, point
        left = [p for p in os.listdir(out.parent) if p != "out"]
        if left:
            with pytest.warns(UserWarning, match=r"killed.*(\.partial|\.old|in its place again)"):
                publishing.recover(out)
        assert (out / "config.json").read_text() in ("old", "new"), point
    assert killed == sorted(killed, reverse=True) and killed[0] and not killed[-1]


def test_a_missing_directory_that_was_moved_aside_is_named(model: Path) -> None:
    model.rename(model.parent / ".model.1234.old")
    with pytest.raises(ArtifactError, match=r"\.model\.1234\.old is the former one"):
        kvrewrite.load(model)


def test_a_source_that_changes_while_it_is_copied(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    shard = sorted(source.glob("*.safetensors"))[-1]
    open_checkpoint = Checkpoint.open.__func__  # type: ignore[attr-defined]

    def cut(cls: Any, *args: Any) -> Checkpoint:
        found = open_checkpoint(cls, *args)
        if found.directory == source and shard.stat().st_size == found.stamps[shard.name][2]:
            monkeypatch.setattr(writing, "_check_space", lambda *_: os.truncate(shard, 5000))
        return found

    monkeypatch.setattr(Checkpoint, "open", classmethod(cut))
    with pytest.raises(ArtifactError, match=f"{shard.name} changed while it was read"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "failure",
    [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(errno.ENOSPC, "No space left")],
)
def test_a_full_disk_in_save_pretrained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(base)
    small = kvrewrite.transform(original, "streaming_llm", budget=16)

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(type(original), "save_pretrained", fail)
    with pytest.raises(ArtifactError, match=r"No space left"):
        small.save_pretrained(tmp_path / "out")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ the smaller
def test_an_index_with_a_long_name(base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "x" * 5000 + ".safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"index\.json names the file"):
        Checkpoint.open(source)


def test_pickles_that_hold_themselves_or_no_numbers(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {"a": torch.zeros(1)}
    cyclic["self"] = cyclic
    torch.save(cyclic, tmp_path / "cyclic.pt")
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pt")
    for name, says in (("cyclic", "deep"), ("nan", "not finite")):
        with pytest.raises(kvrewrite.errors.PolicyWeightsError, match=says):
            import_pickle(tmp_path / f"{name}.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
