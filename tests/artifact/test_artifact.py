"""Model directories: what is written, what a failure leaves behind, and what damage gets."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from kvrewrite.artifact import files, publishing, writing
from kvrewrite.artifact.checkpoint import Checkpoint
from kvrewrite.artifact.directory import read_artifact, read_manifest, verify_hashes
from kvrewrite.artifact.meta_model import build_on_meta
from kvrewrite.artifact.parameter_sources import parameter_sources
from kvrewrite.artifact.writing import companion_files, write_artifact
from kvrewrite.capture.fake_parameters import capture_on_meta
from kvrewrite.errors import ArtifactError
from kvrewrite.ir.layout import CacheLayout, call_inputs
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import graph_to_dict
from kvrewrite.ir.site import AttentionSite
from tests.support.zoo import VOCAB, make

aten = torch.ops.aten


def layout(*inputs: str) -> CacheLayout:
    """That of a program without caches."""
    return CacheLayout(inputs=[spec for spec in call_inputs(False, []) if spec.name in inputs])


def program() -> Program:
    """x -> embedding @ head * gate + table: tied base parameters, one policy weight, one constant."""
    root = nn.Module()
    for name in ("embed", "head", "gate"):
        root.add_module(name, nn.Module())
    tied = nn.Parameter(torch.arange(12.0).reshape(4, 3) / 7)
    root.embed.register_parameter("weight", tied)
    root.head.register_parameter("weight", tied)
    root.gate.register_parameter("weight", nn.Parameter(torch.linspace(0, 1, 4)))
    root.register_buffer("table", torch.tensor(0.125))
    graph = fx.Graph()
    x = graph.placeholder("input_ids")
    hidden = graph.call_function(aten.embedding.default, (graph.get_attr("embed.weight"), x))
    logits = graph.call_function(aten.linear.default, (hidden, graph.get_attr("head.weight")))
    gated = graph.call_function(aten.mul.Tensor, (logits, graph.get_attr("gate.weight")))
    graph.output(graph.call_function(aten.add.Tensor, (gated, graph.get_attr("table"))))
    gm = fx.GraphModule(root, graph)
    gm.register_buffer("spare", torch.arange(5))
    names = ["embed.weight", "head.weight"]
    return Program(
        graph=gm,
        sites=[AttentionSite(0, "layers.0.attn", 4, 2, 16, 16, 0.25, "interface", window=8)],
        layout=layout("input_ids"),
        policy={"name": "full", "options": {"budget": 64}},
        dtype="float32",
        vocab_size=4,
        max_positions=128,
        frontend="trace",
        base=names,
        policy_weights=["gate.weight"],
        constants=["table", "spare"],
        aliases=dict.fromkeys(names, names),
    )


RECIPES = {n: {"key": "embed.weight", "shape": [4, 3], "dtype": "float32"} for n in ("embed.weight", "head.weight")}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    """A checkpoint of two shards with a tensor that nothing uses, and the files that come with a model."""
    path = tmp_path / "base"
    (path / "additional_chat_templates").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 3}))
    save_file({"embed.weight": torch.arange(12.0).reshape(4, 3) / 7}, path / "model-1.safetensors", {"format": "pt"})
    save_file({"unused": torch.randn(1000)}, path / "model-2.safetensors", {"format": "pt"})
    weight_map = {"embed.weight": "model-1.safetensors", "unused": "model-2.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "tokenizer.json").write_text('{"a": "ä"}')
    (path / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (path / "README.md").write_text("the base's own card")
    (path / "training_args.bin").write_bytes(b"pickle")
    return Checkpoint.open(path)


def write(out: Path, base: Checkpoint, **options: Any) -> Path:
    extra = companion_files(base.directory)
    return write_artifact(
        out, program(), base=base, config=base.config, recipes=RECIPES, extra_files=extra, card="# card", **options
    )


def run(loaded: Program) -> Tensor:
    return loaded.graph(torch.tensor([[0, 3, 1]]))


def entries(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_round_trip(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    assert entries(out) == sorted([
        "README.md", "additional_chat_templates/tool.jinja", "config.json", "constants.safetensors", "graph.json",
        "kvrewrite.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json",
        "policy.safetensors", "tokenizer.json",
    ])  # fmt: skip
    original = program()
    loaded, manifest = read_artifact(out)
    assert torch.equal(run(loaded), run(original))
    assert graph_to_dict(loaded.graph) == graph_to_dict(original.graph)
    for field in ("sites", "layout", "policy", "dtype", "vocab_size", "max_positions", "frontend", "base", "aliases"):
        assert getattr(loaded, field) == getattr(original, field), field
    assert loaded.graph.embed.weight is loaded.graph.head.weight
    assert isinstance(loaded.graph.gate.weight, nn.Parameter) and not isinstance(loaded.graph.table, nn.Parameter)
    assert torch.equal(loaded.graph.spare, torch.arange(5))  # read by the runtime, by no node
    assert manifest["files"].keys() == set(entries(out)) - {"README.md", "kvrewrite.json"}
    for name in base.files:
        assert (out / name).read_bytes() == (base.directory / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["kvrewrite"]["policy"] == original.policy
    assert config["kvrewrite"]["budget"] == 64
    assert load_file(out / "policy.safetensors").keys() == {"gate.weight"}
    assert (out / "README.md").read_text() == "# card"


def test_permissions_follow_the_umask(tmp_path: Path, base: Checkpoint) -> None:
    umask = os.umask(0o027)
    try:
        out = write(tmp_path / "out", base)
    finally:
        os.umask(umask)
    assert {(out / n).stat().st_mode & 0o777 for n in entries(out)} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750


def test_hard_links(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base, link=True)
    assert (out / "model-2.safetensors").samefile(base.directory / "model-2.safetensors")
    assert not (out / "tokenizer.json").samefile(base.directory / "tokenizer.json")
    verify_hashes(out)


def test_a_link_that_can_not_be_made_is_an_error(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(ArtifactError, match=r"hard-linked.*cross-device"):
        write(tmp_path / "out", base, link=True)
    assert os.listdir(tmp_path) == ["base"]


def test_modules_from_no_checkpoint(tmp_path: Path) -> None:
    original = program()
    tensors = dict(original.graph.named_parameters(remove_duplicate=False))
    out = write_artifact(tmp_path / "out", original, base=tensors, config={"vocab_size": 4})
    assert load_file(out / "model.safetensors").keys() == {"embed.weight"}  # tied: once
    loaded, _ = read_artifact(out)
    assert torch.equal(run(loaded), run(original))
    assert loaded.graph.embed.weight is loaded.graph.head.weight
    with pytest.raises(ArtifactError, match=r"head\.weight has no values"):
        write_artifact(tmp_path / "b", original, base={"embed.weight": tensors["embed.weight"]}, config={})
    assert os.listdir(tmp_path) == ["out"]


def test_a_real_model_from_meta(tmp_path: Path) -> None:
    """Conversion without weights, saved, loaded: the logits of the original."""
    real = make("mixtral")
    real.save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base")
    model, config = build_on_meta(tmp_path / "base")
    captured = capture_on_meta(model)
    read = {str(n.target) for n in captured.graph.graph.nodes if n.op == "get_attr"}
    names = sorted(read & captured.persistent)
    inputs = [str(n.target) for n in captured.graph.graph.nodes if n.op == "placeholder"]
    made = Program(
        captured.graph, [], layout(*inputs), {"name": "full", "options": {}}, "float32", VOCAB, None, captured.frontend,
        names, [], sorted(read - set(names)), captured.aliases,
    )  # fmt: skip
    recipes = parameter_sources(model, config, checkpoint)
    write_artifact(tmp_path / "out", made, base=checkpoint, config=checkpoint.config, recipes=recipes)
    shutil.rmtree(tmp_path / "base")
    code = (
        "import sys; from kvrewrite.artifact.directory import read_artifact; read_artifact(sys.argv[1]);"
        "print([m for m in sys.modules if m.startswith('transformers.models.') and 'modeling_' in m])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "[]", ran.stderr  # loading needs no modeling code
    loaded, _ = read_artifact(tmp_path / "out")
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        got = loaded.graph(ids, torch.arange(9).expand(2, 9))
        torch.testing.assert_close(got, real(ids).logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ destinations
def test_existing_directories(tmp_path: Path, base: Checkpoint) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out, base)  # empty: fine
    (out / "mine.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"not empty.*--force"):
        write(out, base)
    assert (out / "mine.txt").exists()
    write(out, base, force=True)
    assert not (out / "mine.txt").exists()
    verify_hashes(out)
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="not a model directory"):
        write(other, base, force=True)
    with pytest.raises(ArtifactError, match="not a directory"):
        write(other / "thesis.txt", base, force=True)
    assert (other / "thesis.txt").read_text() == "x"


def test_the_base_model_is_never_overwritten(tmp_path: Path, base: Checkpoint) -> None:
    before = {n: (base.directory / n).read_bytes() for n in entries(base.directory)}
    (tmp_path / "link").symlink_to(base.directory)
    for out in (base.directory, base.directory / "inside", tmp_path, tmp_path / "link", base.directory / ".." / "base"):
        with pytest.raises(ArtifactError, match="overlap"):
            write(out, base, force=True)
    assert {n: (base.directory / n).read_bytes() for n in entries(base.directory)} == before


def test_code_and_pickles_are_not_taken_along(tmp_path: Path, base: Checkpoint) -> None:
    for name in ("evil.py", "evil.pkl"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ArtifactError, match=name):
            write_artifact(
                tmp_path / "out", program(), base=base, config={}, recipes=RECIPES, extra_files=[tmp_path / name]
            )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- failures
STEPS = ["text", "tensors", "copy", "seal"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", [*STEPS, "middle of a copy", "manifest", "rename", "second rename"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(1)], ids=type
)
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException, existing: bool
) -> None:
    out = tmp_path / "out"
    if existing:
        write(out, base)
        (out / "README.md").write_text("old")
    before = {n: (out / n).read_bytes() for n in entries(out)} if existing else {}

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    if step in STEPS:
        monkeypatch.setattr(files.Writer, step, fail)
    elif step == "middle of a copy":
        monkeypatch.setattr(files, "_CHUNK", 100)
        real_open, written = Path.open, []

        class Full:
            """A file on a disk that is full after 300 bytes."""

            def __init__(self, file: Any):
                self.file = file

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: Any) -> None:
                self.file.close()

            def write(self, data: bytes) -> int:
                written.append(len(data))
                if sum(written) > 300:
                    raise failure
                return self.file.write(data)

        def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real_open(self, mode, *args, **kwargs)
            return Full(file) if mode == "xb" and self.name == "model-2.safetensors" else file

        monkeypatch.setattr(Path, "open", open_full)
    elif step == "manifest":
        monkeypatch.setattr(writing, "_manifest", fail)
    else:
        monkeypatch.setattr(publishing, "exchange", lambda *_: False)  # as on file systems that can't
        real_rename, real_replace, calls = os.rename, os.replace, []

        def counted(real: Any) -> Any:
            def move(source: Any, target: Any) -> None:
                calls.append(source)
                if len(calls) == (2 if step == "second rename" and existing else 1):
                    raise failure
                real(source, target)

            return move

        monkeypatch.setattr(os, "rename", counted(real_rename))
        monkeypatch.setattr(os, "replace", counted(real_replace))
    with pytest.raises((ArtifactError, KeyboardInterrupt, SystemExit)) as caught:
        write(out, base, force=existing)
    monkeypatch.undo()
    if isinstance(failure, OSError):
        assert caught.type is ArtifactError and "No space left" in str(caught.value)
    else:
        assert caught.value is failure
    assert sorted(os.listdir(tmp_path)) == (["base", "out"] if existing else ["base"])
    assert {n: (out / n).read_bytes() for n in (entries(out) if existing else [])} == before


def test_too_little_space_is_noticed_before_writing(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ArtifactError, match=r"10 B are free.*--link"):
        write(tmp_path / "out", base)
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.aliases.update(x=math.inf), "JSON"), (lambda p: p.aliases.update({3: 1}), "key 3"),
        (lambda p: p.aliases.update(x=torch.zeros(1)), "JSON"), (lambda p: p.constants.remove("table"), "table"),
        (lambda p: p.base.append("table"), "table"), (lambda p: p.graph.to("meta"), "without values"),
        (lambda p: p.base.append("other"), "no recipe.*other"),
    ],
)  # fmt: skip
def test_programs_that_can_not_be_saved(tmp_path: Path, base: Checkpoint, change: Any, says: str) -> None:
    broken = program()
    change(broken)
    with pytest.raises(ArtifactError, match=says):
        write_artifact(tmp_path / "out", broken, base=base, config={}, recipes=RECIPES)
    assert os.listdir(tmp_path) == ["base"]


# ------------------------------------------------------------------------------------------------------------ damage
def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    for name in set(entries(out)) - {"README.md"}:
        whole = (out / name).read_bytes()
        shard = name.startswith("model-")
        step = max(1, len(whole) // 25)
        for position in range(0, len(whole), step):
            flip(out / name, position)
            with pytest.raises(ArtifactError) as caught:
                (verify_hashes if shard else read_artifact)(out)
            assert name in str(caught.value)
            (out / name).write_bytes(whole)
    read_artifact(out)
    verify_hashes(out)


def test_the_manifest_is_guarded_by_its_own_hash(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    whole = (out / "kvrewrite.json").read_bytes()
    for position in range(0, len(whole), 7):  # an odd step, so that every bit of a byte has its turn
        flip(out / "kvrewrite.json", position)
        with pytest.raises(ArtifactError):
            read_manifest(out)
        (out / "kvrewrite.json").write_bytes(whole)
    read_manifest(out)


def test_the_card_may_be_edited(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    (out / "README.md").write_text("my own words")
    read_artifact(out)
    verify_hashes(out)


def test_missing_and_truncated_files_are_named(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    for name in set(entries(out)) - {"README.md"}:
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-2])  # two: JSON may do without its last newline
        with pytest.raises(ArtifactError) as caught:
            read_artifact(out)
        assert name in str(caught.value)
        (out / name).unlink()
        with pytest.raises(ArtifactError) as caught:
            read_artifact(out)
        assert name in str(caught.value)
        (out / name).write_bytes(whole)
    read_artifact(out)


def test_verify_lists_all_damage_and_reports_progress(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    seen: list[tuple[str, int, int]] = []
    verify_hashes(out, lambda *args: seen.append(args))
    assert {name for name, *_ in seen} == read_manifest(out)["files"].keys()
    assert seen[-1][1] == seen[-1][2] and [d for _, d, _ in seen] == sorted(d for _, d, _ in seen)
    flip(out / "model-2.safetensors", 2000)
    flip(out / "policy.safetensors", 100)
    (out / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        verify_hashes(out)
    for name in ("model-2.safetensors", "policy.safetensors", "tokenizer.json"):
        assert name in str(caught.value)


def resign(out: Path, **changes: Any) -> None:
    """A manifest with other content and the right hash, as a newer or a hostile writer would make."""
    body = json.loads((out / "kvrewrite.json").read_text())
    del body["manifest_sha256"]
    body = {**body, **changes}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (out / "kvrewrite.json").write_text(json.dumps({**body, "manifest_sha256": digest}))


def test_newer_formats_say_what_to_upgrade(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    resign(out, format_version=99, kvrewrite="9.9")
    with pytest.raises(ArtifactError, match=r"format 99.*9\.9.*pip install --upgrade kvrewrite"):
        read_artifact(out)
    resign(out, format_version=1, kvrewrite="0.0")
    with pytest.raises(ArtifactError, match=r"has format 1, written by kvrewrite 0\.0.*Convert the model again"):
        read_artifact(out)
    resign(out, format_version="1")
    with pytest.raises(ArtifactError, match="format_version"):
        read_artifact(out)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}}, {"files": {"../../etc/passwd": {"size": 1, "sha256": ""}}}, {"files": {"/etc/passwd": None}},
        {"sites": None}, {"sites": [{"nothing": 1}]}, {"recipes": {}}, {"recipes": {"embed.weight": {"key": "none"}}},
        {"constants": ["other"]}, {"parameters": ["other"]}, {"base": ["other"]}, {"base": 3}, {"policy_weights": None},
        {"recipes": {"embed.weight": None, "head.weight": 3}},
    ],
)  # fmt: skip
def test_manifests_with_nonsense_are_refused(tmp_path: Path, base: Checkpoint, changes: dict[str, Any]) -> None:
    out = write(tmp_path / "out", base)
    resign(out, **changes)
    with pytest.raises(ArtifactError):
        read_artifact(out)


def test_a_graph_with_an_op_outside_the_list_is_refused(tmp_path: Path, base: Checkpoint) -> None:
    out = write(tmp_path / "out", base)
    text = (out / "graph.json").read_text().replace("aten.linear.default", "aten.from_file.default")
    (out / "graph.json").write_text(text)
    files = read_manifest(out)["files"]
    files["graph.json"] = {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    resign(out, files=files)
    with pytest.raises(ArtifactError, match=r"aten\.from_file\.default"):
        read_artifact(out)


def test_directories_that_are_no_artifacts(tmp_path: Path, base: Checkpoint) -> None:
    with pytest.raises(ArtifactError, match="not a directory"):
        read_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="kvrewrite convert"):
        read_artifact(base.directory)
