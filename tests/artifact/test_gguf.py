"""`kvrewrite convert FILE.gguf`: the same model as from safetensors, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, LlamaForCausalLM

import kvrewrite
from kvrewrite.artifact.gguf import unpacked
from kvrewrite.cli import app
from kvrewrite.errors import ArtifactError
from tests.support.tiny import TEXT, make_checkpoint

ids = torch.arange(2, 42)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # GGUF has eps as float32: one that both can hold.
    return make_checkpoint(tmp_path_factory.mktemp("gguf") / "base", rms_norm_eps=2.0**-20)


def write(base: Path, file: Path, **how: Any) -> Path:
    pytest.importorskip("gguf", reason="needs gguf (pip install 'kvrewrite[gguf]')")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    from tests.support.gguf_files import write_gguf

    return write_gguf(base, file, **how)


def convert(source: Path, out: Path) -> Any:
    return CliRunner().invoke(app.main, ["convert", str(source), "--policy", "full", "--out", str(out)])


@pytest.mark.parametrize("how", ["file", "directory"])
def test_the_same_model_as_from_safetensors(base: Path, tmp_path: Path, how: str) -> None:
    (tmp_path / "packed").mkdir()
    file = write(base, tmp_path / "packed" / "tiny.gguf")
    done = convert(file if how == "file" else file.parent, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]  # the unpacked weights are gone
    original = LlamaForCausalLM.from_pretrained(base)
    small = kvrewrite.load(tmp_path / "out", verify_hashes=True)
    assert (small(ids).logits - original(ids).logits).abs().max() < 1e-5
    copy = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(copy[name], weight) for name, weight in original.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(base)(TEXT).input_ids
    assert tokenizer.eos_token_id == small.generation_config.eos_token_id == 1


def test_quantized_weights_become_bfloat16(base: Path, tmp_path: Path) -> None:
    file = write(base, tmp_path / "tiny.gguf", kind="Q8_0")
    import gguf

    with unpacked(file) as directory:
        model = LlamaForCausalLM.from_pretrained(directory)
    assert not directory.exists()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    (stored,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    wanted = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)).to(torch.bfloat16)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, wanted)


REFUSED = {
    "scaling": ({"add_string": ("llama.rope.scaling.type", "yarn")}, r"scales RoPE \(yarn\)"),
    "factors": ({"add_tensor": ("rope_freqs.weight", torch.ones(4).numpy())}, r"scales RoPE \(rope_freqs.weight\)"),
    "window": ({"add_sliding_window": 64}, "sliding_window=64"),
    "missing": ({"leave_out": "blk.1.ffn_up.weight"}, r"lacks weights .*layers.1.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_ignores_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    how, message = REFUSED[name]
    file = write(base, tmp_path / "tiny.gguf", **how)
    with pytest.raises(ArtifactError, match=message), unpacked(file):
        pass


def test_damaged_file(base: Path, tmp_path: Path) -> None:
    file = write(base, tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="not a whole GGUF file"), unpacked(file):
        pass
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="not a whole GGUF file"), unpacked(file):
        pass


def test_which_file(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    done = convert(tmp_path, tmp_path / "out")
    assert done.exit_code == 1 and "2 GGUF files (a.gguf, b.gguf)" in done.output
    part = tmp_path / "m-00001-of-00002.gguf"
    part.touch()
    done = convert(part, tmp_path / "out")
    assert done.exit_code == 1 and "llama-gguf-split --merge" in done.output
    done = CliRunner().invoke(app.main, ["inspect", str(tmp_path / "a.gguf")])
    assert done.exit_code == 1 and "only `kvrewrite convert` reads" in done.output


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", lambda: False)
    (tmp_path / "a.gguf").touch()
    done = convert(tmp_path / "a.gguf", tmp_path / "out")
    assert done.exit_code == 1 and "pip install 'kvrewrite[gguf]'" in done.output
