"""Steps compiled ahead of time in a model directory: the same tokens, only on trust, and only where they fit."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM

import kvrewrite
from kvrewrite.artifact import directory as artifact
from kvrewrite.cli import app as cli
from kvrewrite.errors import ArtifactError, CaptureError, InputError, OptionError
from kvrewrite.ir.fx import get_attr
from kvrewrite.runtime import aot
from tests.support.tiny import make_checkpoint

pytestmark = pytest.mark.xdist_group("ahead")  # whose fixtures are made once

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
STREAMING = {"policy": "streaming_llm", "budget": 24, "chunk": 64, "positions": "original"}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(2, 200, (rows, length), generator=torch.Generator().manual_seed(length))


def generate(model: Any, prompt: Tensor) -> Tensor:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ahead") / "base", **TINY)


class StandIn:
    """What AOTInductor's runner does with tensors of others, by running the exported program: for tests of what is ours."""

    def __init__(self, path: str):
        import kvrewrite.ops  # noqa: F401  (the program calls its ops)

        self.program = torch.export.load(path)
        self.module: Any = None

    def get_constant_fqns(self) -> list[str]:
        return [*self.program.state_dict, *self.program.constants]

    def load_constants(self, tensors: dict[str, Tensor], *, check_full_update: bool, user_managed: bool) -> None:
        assert check_full_update and user_managed and tensors.keys() == set(self.get_constant_fqns())
        self.module = self.program.module()
        for name, tensor in tensors.items():
            get_attr(self.module, name).data = tensor

    def __call__(self, *values: Tensor) -> Tensor:
        return self.module(*values)


@pytest.fixture(scope="module", params=["stand-in", pytest.param("inductor", marks=pytest.mark.slow)])
def out(request: pytest.FixtureRequest, base: Path) -> Iterator[Path]:
    """What `kvrewrite convert --compile aot` writes."""
    directory = base.parent / request.param
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            patch.setattr(
                "torch._inductor.aoti_compile_and_package",
                lambda program, *, package_path, inductor_configs: torch.export.save(program, package_path),
            )
            patch.setattr("torch._inductor.aoti_load_package", lambda path, *, device_index: StandIn(path))
        with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # half of the time
            options = ["-p", "streaming_llm", "--budget", "24", "--chunk", "64", "-o", "positions=original"]
            done = CliRunner().invoke(
                cli.main, ["convert", str(base), "--out", str(directory), "--compile", "aot", *options]
            )
        assert done.exit_code == 0, done.output
        yield directory


def load_plain(directory: Path) -> Any:
    with pytest.warns(UserWarning, match=r"compiled steps, which were not loaded.*trust_compiled=True"):
        return kvrewrite.load(directory)


def test_the_same_tokens_and_only_on_trust(out: Path) -> None:
    plain = load_plain(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = kvrewrite.load(out, trust_compiled=True)
    assert plain.executor is None
    assert isinstance(fast.executor.prompt, aot.CompiledSteps)
    prompt, token = ids(1, 90), ids(1, 2)[:, :1]
    expected, found = plain.prefill(prompt), fast.prefill(prompt)
    difference = fast(token, past_key_values=found).logits - plain(token, past_key_values=expected).logits
    assert difference.abs().max() < 1e-6
    assert found.positions() == expected.positions()
    assert torch.equal(generate(fast, prompt), generate(plain, prompt))


def test_weights_are_the_models_own(out: Path) -> None:
    """The packages hold none, and a change of the model's is seen."""
    model = kvrewrite.load(out, trust_compiled=True)
    before = model(ids(1, 20), logits_to_keep=1).logits
    with torch.no_grad():
        model.graph_module.get_parameter("lm_head.weight").mul_(2)
    after = model(ids(1, 20), logits_to_keep=1).logits
    torch.testing.assert_close(after, before * 2, rtol=0, atol=1e-6)
    model.uncompile()
    torch.testing.assert_close(model(ids(1, 20), logits_to_keep=1).logits, after, rtol=0, atol=1e-6)


def test_what_was_not_compiled_is_an_error(out: Path) -> None:
    model = kvrewrite.load(out, trust_compiled=True)
    with pytest.raises(InputError, match=r"can't take input_ids of shape \(2, 20\).*uncompile"):
        model(ids(2, 20), logits_to_keep=1)
    with pytest.raises(InputError, match=r"compiled for cpu and can't move to meta.*uncompile"):
        model.to("meta")
    model.uncompile()
    assert model(ids(2, 20)).logits.shape == (2, 20, model.program.vocab_size)


def changed(out: Path, tmp_path: Path, **compiled: Any) -> Path:
    """A copy whose manifest says something else of the compiled steps, with its hash made anew."""
    twin = tmp_path / "twin"
    shutil.copytree(out, twin)
    body = json.loads((twin / artifact.MANIFEST).read_text())
    body["compiled"].update(compiled)
    del body["manifest_sha256"]
    (twin / artifact.MANIFEST).write_text(json.dumps({**body, "manifest_sha256": artifact.manifest_digest(body)}))
    return twin


@pytest.mark.parametrize(
    ("compiled", "message"),
    [
        (
            {"torch": "2.12.0", "kvrewrite": "0.0.1"},
            r"made with torch 2\.12\.0, here 2\..*; kvrewrite 0\.0\.1, here.*Load without.*--compile aot",
        ),
        ({"device": {"type": "cuda", "cuda": "13.0", "capability": "9.0"}}, r"device cuda 13\.0 9\.0, here cpu"),
        ({"kind": "other"}, r"compiled steps of kind 'other' that this version can't load"),
        ({"files": ["graph.json", "config.json"]}, r"that this version can't load"),
    ],
)
def test_steps_of_another_place_are_refused(out: Path, tmp_path: Path, compiled: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        kvrewrite.load(changed(out, tmp_path, **compiled), trust_compiled=True)


def test_a_package_that_was_changed_is_refused(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "twin")
    with (tmp_path / "twin" / "compiled" / "decode.pt2").open("r+b") as file:
        file.seek(100)
        file.write(b"\0\1\2")
    with pytest.raises(ArtifactError, match=r"decode\.pt2 is damaged or was edited"):
        kvrewrite.load(tmp_path / "twin", trust_compiled=True)


def test_saving_again_leaves_the_package_behind(out: Path, tmp_path: Path) -> None:
    kvrewrite.load(out, trust_compiled=True).save_pretrained(tmp_path / "copy")
    assert "compiled" not in artifact.read_manifest(tmp_path / "copy")
    with pytest.raises(ArtifactError, match=r"has no compiled steps.*--compile aot"):
        kvrewrite.load(tmp_path / "copy", trust_compiled=True)


def test_command_line(out: Path) -> None:
    args = ["generate", str(out), "--prompt", "The quick brown fox", "--max-new-tokens", "3"]
    plain, trusted = (CliRunner().invoke(cli.main, a) for a in (args, [*args, "--trust-compiled"]))
    assert plain.exit_code == trusted.exit_code == 0
    assert plain.stdout == trusted.stdout


def test_what_inductor_can_not_do_leaves_nothing_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from `save_pretrained`, which compiles as `convert` does."""
    small = kvrewrite.transform(AutoModelForCausalLM.from_pretrained(base), **STREAMING)
    made: list[str] = []

    def fail(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        made.append(package_path)
        assert not inductor_configs["aot_inductor.package_constants_in_so"]
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    nothing = SimpleNamespace(prefill=None, decode=None, policy=small.program.policy)
    monkeypatch.setattr(aot, "export_steps", lambda model, *, batch_size: made.append(f"{batch_size}") or nothing)
    with pytest.raises(
        CaptureError, match=r"can't compile the prefill step of streaming_llm for cpu.*no C\+\+ compiler"
    ):
        small.save_pretrained(tmp_path / "out", compile="aot", compile_batch=2)
    assert made[0] == "2" and made[1].endswith("compiled/prefill.pt2") and list(tmp_path.iterdir()) == []


def test_usage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="compile is 'jit', expected 'aot'"):
        kvrewrite.convert(base, tmp_path / "no", compile="jit")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
        with pytest.raises(OptionError, match=r"torch 2\.11\.0\+cu130 crashes.*on a GPU.*call compile\(\)"):
            kvrewrite.convert(base, tmp_path / "no", compile="aot", compile_device="cuda")
        aot.check_kind("aot", "cpu")
    assert not (tmp_path / "no").exists()
    done = CliRunner().invoke(cli.main, ["convert", str(base), "--dry-run", "--compile", "aot"])
    assert done.exit_code == 2 and "--compile writes to --out" in done.stderr
    done = CliRunner().invoke(cli.main, ["serve", str(base), "--compile", "--trust-compiled"])
    assert done.exit_code == 2 and "give one of them" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(bool(aot.why_not(torch.device("cuda"))), reason="refused with this torch")
def test_on_a_gpu(base: Path, tmp_path: Path) -> None:
    """Compiled there, loaded there: the answers of the model op by op, with kernels in the package's steps; not on a CPU."""
    kvrewrite.convert(base, tmp_path / "out", compile="aot", compile_device="cuda", **STREAMING)
    compiled = artifact.read_manifest(tmp_path / "out")["compiled"]
    assert compiled["device"]["type"] == "cuda"
    with pytest.warns(UserWarning, match="compiled steps, which were not loaded"):
        plain = kvrewrite.load(tmp_path / "out", device="cuda")
    fast = kvrewrite.load(tmp_path / "out", device="cuda", trust_compiled=True)
    assert isinstance(fast.executor.prompt, aot.CompiledSteps)
    prompt = ids(1, 150).cuda()
    caches = [m.prefill(prompt) for m in (plain, fast)]
    for token in ids(1, 9).cuda().split(1, dim=1):
        expected, found = (m(token, past_key_values=c).logits for m, c in zip((plain, fast), caches))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert caches[0].positions() == caches[1].positions()
    assert torch.equal(generate(fast, prompt), generate(plain, prompt))
    with pytest.raises(ArtifactError, match=r"device cuda .*, here cpu"):
        kvrewrite.load(tmp_path / "out", trust_compiled=True)
