"""Policy weights: importing pickles, reading files, and the checks against a model."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import kvrewrite.artifact.files
from kvrewrite.artifact.policy_weights import import_pickle, read_policy_weights
from kvrewrite.errors import PolicyWeightsError
from kvrewrite.policies.weights import check_policy_weights

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def weights() -> dict[str, Tensor]:
    return {"heads.0.weight": torch.randn(3, 4), "heads.0.bias": torch.zeros(3, dtype=torch.bfloat16)}


def shapes() -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in weights().items()}


class Evil:
    """A pickle that would make a file, if anything ran it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_import_keeps_tensors_exactly(tmp_path: Path) -> None:
    original = weights()
    torch.save(original, tmp_path / "w.pt")
    import_pickle(tmp_path / "w.pt", tmp_path / "w.safetensors", metadata={"policy": "locret"})
    tensors, metadata = read_policy_weights(tmp_path / "w.safetensors")
    assert metadata["policy"] == "locret"
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in original.items())
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pt", "w.safetensors"]


def test_import_flattens_nested_dicts_and_shared_tensors(tmp_path: Path) -> None:
    shared = torch.randn(4)
    torch.save({"layers": {0: {"w": shared}, 1: {"w": shared}}, "part": shared[:2]}, tmp_path / "w.pt")
    import_pickle(tmp_path / "w.pt", tmp_path / "w.safetensors")
    tensors, _ = read_policy_weights(tmp_path / "w.safetensors")
    assert sorted(tensors) == ["layers.0.w", "layers.1.w", "part"]
    assert torch.equal(tensors["layers.1.w"], shared) and torch.equal(tensors["part"], shared[:2])


def test_import_never_runs_a_pickle(tmp_path: Path) -> None:
    for name, save in (("zip.pt", torch.save), ("plain.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save({"w": torch.zeros(1), "evil": Evil(tmp_path / "ran")}, tmp_path / name)
        with pytest.raises(PolicyWeightsError, match=name):
            import_pickle(tmp_path / name, tmp_path / "w.safetensors")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    "content", [{"w": torch.zeros(1), "step": 3}, [torch.zeros(1)], torch.zeros(1), {}, {"a": {"b": "text"}}]
)
def test_import_refuses_what_is_not_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(PolicyWeightsError, match="expected a dict from names to tensors"):
        import_pickle(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


def test_import_refuses_unreadable_files(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:200])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "garbage.pt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "lfs.pt").write_text(LFS)
    for name, says in {
        "cut": "damaged",
        "empty": "damaged",
        "garbage": "pickle",
        "lfs": "git lfs",
        "missing": "exist",
    }.items():
        with pytest.raises(PolicyWeightsError, match=says) as caught:
            import_pickle(tmp_path / f"{name}.pt", tmp_path / "w.safetensors")
        assert f"{name}.pt" in str(caught.value)


def test_import_does_not_overwrite_without_force(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    out = tmp_path / "w.safetensors"
    out.write_text("mine")
    with pytest.raises(PolicyWeightsError, match="force"):
        import_pickle(tmp_path / "w.pt", out)
    assert out.read_text() == "mine"
    import_pickle(tmp_path / "w.pt", out, force=True)
    assert torch.equal(read_policy_weights(out)[0]["w"], torch.ones(2))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_import_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_text("mine")

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(kvrewrite.artifact.files, "sync", fail)
    with pytest.raises((PolicyWeightsError, KeyboardInterrupt)):
        import_pickle(tmp_path / "w.pt", tmp_path / "w.safetensors", force=True)
    assert (tmp_path / "w.safetensors").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pt", "w.safetensors"]


def test_read_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    contents = {
        "cut": (whole[:-3], "cut off"), "header": (whole[:20], "cut off"), "empty": (b"", "0 bytes"),
        "garbage": (b"\xff" * 64, "not a safetensors"), "longer": (whole + b"xx", "speaks of"),
        "lfs": (LFS.encode(), "git lfs pull"), "list": (b"\x02" + b"\0" * 7 + b"[]", "damaged header"),
    }  # fmt: skip
    for name, (data, says) in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(PolicyWeightsError, match=says) as caught:
            read_policy_weights(path)
        assert path.name in str(caught.value)
    with pytest.raises(PolicyWeightsError, match="does not exist"):
        read_policy_weights(tmp_path / "missing.safetensors")
    with pytest.raises(PolicyWeightsError, match="directory"):
        read_policy_weights(tmp_path)
    torch.save(weights(), tmp_path / "w.pt")
    with pytest.raises(PolicyWeightsError, match="import-weights"):
        read_policy_weights(tmp_path / "w.pt")


def test_check_passes_and_converts() -> None:
    found = check_policy_weights(
        weights(), shapes(), {"base_model": "x", "policy": "p"}, policy="p", model="x", dtype=torch.float16
    )
    assert {t.dtype for t in found.values()} == {torch.float16}
    assert check_policy_weights(weights(), shapes())["heads.0.bias"].dtype == torch.bfloat16


def test_check_lists_everything_that_is_wrong() -> None:
    with pytest.raises(PolicyWeightsError, match=r"got no policy weights, but q needs 2 tensors.*--policy-weights"):
        check_policy_weights({}, shapes(), policy="q")
    tensors = {
        "extra": torch.zeros(1), "heads.0.weight": torch.zeros(4, 3), "n": torch.zeros(2, dtype=torch.int64),
        "flag": torch.zeros(2, dtype=torch.bool), "nan": torch.full((2,), float("nan")),
    }  # fmt: skip
    expected = {**shapes(), "n": (2,), "flag": (2,), "nan": (2,)}
    with pytest.raises(PolicyWeightsError) as caught:
        check_policy_weights(tensors, expected, {"base_model": "a", "policy": "p"}, policy="q", model="b")
    text = str(caught.value)
    for part in (
        "missing (1): heads.0.bias", "unexpected (1): extra", "heads.0.weight is [4, 3], expected [3, 4]", "n is int64",
        "flag is bool", "not a number (1): nan", "base model: a; this one is b", "'p', not 'q'",
    ):  # fmt: skip
        assert part in text


def test_check_notices_overflow_in_the_models_dtype() -> None:
    with pytest.raises(PolicyWeightsError, match="infinite"):
        check_policy_weights({"w": torch.tensor([1e6])}, {"w": (1,)}, dtype=torch.float16)
