"""`verify` passes what is right and catches what is not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import LlamaForCausalLM

import kvrewrite
from kvrewrite.errors import ArtifactError, InputError
from kvrewrite.verification import pieces, single_steps, verify
from tests.support.products import few
from tests.support.rewritten import captured, original, rewrite, rewritten
from tests.support.tiny import make_checkpoint
from tests.support.zoo import make

pytestmark = pytest.mark.xdist_group("verify")  # whose fixtures are made once


def fresh(family):
    """A model and its rewrite, which the test may change."""
    return original(family), rewrite(original(family), captured(family), "streaming_llm", None, budget=16, chunk=8)


def results(report):
    return {check.name: check.ok for check in report.checks}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    kvrewrite.convert(make_checkpoint(folder / "base"), folder / "out", "streaming_llm", budget=16, chunk=8)
    return folder / "out"


@pytest.mark.parametrize("length", [1, 7, 24, 25, 48, 96, 97, 300, 1500])
def test_pieces_cover_the_text(length):
    cuts = list(pieces(length))
    assert [a for a, _ in cuts[1:]] == [b for _, b in cuts[:-1]]
    assert cuts[0][0] == 0
    assert cuts[-1][1] == length
    assert len(cuts) <= 30


@pytest.mark.parametrize("length", [2, 96, 97, 400, 1500])
def test_single_steps_cover_the_text(length):
    """All of a short one, a sample of a long one."""
    cuts = single_steps(length)
    assert [a for a, _ in cuts[1:]] == [b for _, b in cuts[:-1]]
    assert (cuts[0][0], cuts[-1][1]) == (0, length)
    assert min(length, 96) <= sum(b == a + 1 for a, b in cuts) <= 98
    assert cuts[0] == (0, 1) and cuts[-1] == (length - 1, length)


def test_a_long_text_is_sampled_and_the_report_says_so():
    report = verify(rewritten("llama", "h2o", budget=16), original("llama"), tokens=200)
    assert report.ok, report.checks
    details = {check.name: check.detail for check in report.checks}
    assert details["token by token"].startswith(
        "sampled: 96 of 200 steps; tokens 32 to 83, 116 to 167 in one piece each"
    )
    report = verify(rewritten("llama", "h2o", budget=16), original("llama"), tokens=40)
    assert {c.name: c.detail for c in report.checks}["token by token"].startswith("40 steps")


@pytest.mark.parametrize(("family", "strict"), [("llama", True), ("gemma2", False)])
def test_a_float64_model_with_eager_attention(family, strict):
    """transformers' eager softmax is float32: sdpa is the original where it can be, and else the report says so."""
    model = make(family).double()
    model.config._attn_implementation_internal = "eager"
    report = verify(kvrewrite.transform(model, "h2o", budget=16), model, tokens=24)
    assert report.ok, report.checks
    first = next(check for check in report.checks if check.name == "original, full budget")
    assert ("eager softmax" in first.detail) is not strict
    assert (first.difference < 1e-12) is strict and first.difference < 1e-6
    assert all(c.difference < 1e-12 for c in report.checks if c.difference is not None and c is not first)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "policy", "options"),
    [
        ("llama", "full", {}),
        # Where the family's other tests are, which have its capture.
        pytest.param("gemma2", "h2o", {"budget": 32}, marks=pytest.mark.xdist_group("gemma2")),
        pytest.param("phi3", "streaming_llm", {"budget": 32, "chunk": 8}, marks=pytest.mark.xdist_group("phi3")),
        pytest.param("mistral", "full", {}, marks=[pytest.mark.xdist_group("mistral"), pytest.mark.thorough]),
        pytest.param("llama", "streaming_llm", {"budget": 16, "chunk": 8}, marks=pytest.mark.thorough),
    ],
)
def test_a_model_in_memory(family, policy, options):
    report = verify(rewritten(family, policy, **options), tokens=24)
    assert report.ok, report.checks
    found = results(report)
    assert found["original, full budget"] is True
    assert found["eviction"] is (None if policy == "full" else True)
    json.dumps(report.as_dict(), allow_nan=False)


EVERY = {
    "adakv": {"window": 4},
    "attention_gate": {},
    "expected_attention": {"n_sink": 2},
    "compactor": {"start": 2, "recent_tokens": 2},
    "finch": {"window": 4},
    "lagkv": {"n_sink": 2, "lag_size": 4},
    "keydiff": {"chunk": 6},
    "knorm": {"head_budgets": "adakv"},
    "nacl": {"interval": 4},
    "scissorhands": {"recent_tokens": 3},
    "sirllm": {"chunk": 7},
    "tova": {},
    "kvzap": {"threshold": 0.0, "window": 6},
    "fast_kvzip": {"n_sink": 1},
    "trim_kv": {"buffer_size": 3, "retention_gate": "rg"},
    "duo_attention": {"start": 4, "heads": "10,01"},
    "h2o": {"quantize": "int8", "quantize_group": 8, "quantize_residual": 8, "merge": True},
}


@pytest.mark.parametrize("policy", few(EVERY, rest=("keydiff", "knorm", "nacl", "scissorhands", "tova", "trim_kv")))
def test_every_policy(policy):
    """The probe that evicts nothing runs the graph of any policy: ragged, gated, quantized, scored behind the logits."""
    options = EVERY[policy] if policy == "attention_gate" else {"budget": 16, **EVERY[policy]}
    report = verify(rewritten("llama", policy, **options), original("llama"), tokens=32)
    assert report.ok, results(report)
    assert results(report)["original, full budget"] is True


def test_the_reference_has_the_softcap():
    """sdpa leaves a softcap out, in some versions of transformers without a word: that is not the model."""
    model = make("gemma2")
    with torch.no_grad():  # scores that a softcap changes
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight"):
                weight *= 40
    small = kvrewrite.transform(model, policy="full")
    ids = torch.arange(48).reshape(2, 24)
    eager = model(ids, use_cache=False).logits
    model.config._attn_implementation_internal = "sdpa"
    report = verify(small, model, tokens=24)
    assert report.ok, report.checks
    assert model.config._attn_implementation == "sdpa"
    try:
        alone = model(ids, use_cache=False).logits
    except ValueError as error:  # newer versions say it
        assert "softcap" in str(error)
    else:
        assert (alone - eager).abs().max() > 1e-3


def test_a_foreign_module():
    model, small = fresh("NanoGPT")
    assert results(verify(small, tokens=24))["original, full budget"] is True
    small.source = None
    report = verify(small, tokens=24)
    assert report.ok
    assert results(report)["original, full budget"] is None
    assert results(verify(small, model, tokens=24))["original, full budget"] is True


def test_another_original_is_caught():
    _, small = fresh("llama")
    report = verify(small, make("llama", seed=1), tokens=24)
    assert not report.ok
    assert results(report)["original, full budget"] is False


def test_a_wrong_rewrite_is_caught():
    model, small = fresh("llama")
    graph = small.graph_module
    node = next(n for n in graph.graph.nodes if n.target is torch.ops.kvrewrite.cached_attention.default)
    scale = small.sites[0].scale
    at = next(i for i, a in enumerate(node.args) if isinstance(a, float) and abs(a - scale) < 1e-9)
    node.args = (*node.args[:at], scale * 4, *node.args[at + 1 :])
    graph.recompile()
    report = verify(small, model, tokens=24)
    assert not report.ok
    assert results(report)["original, full budget"] is False


def test_a_lost_site_is_caught():
    _, small = fresh("llama")
    small.program = copy.copy(small.program)
    small.program.sites = small.program.sites[:1]
    report = verify(small, tokens=8)
    assert results(report)["sites"] is False


def test_a_directory(converted):
    seen = []
    report = verify(converted, tokens=24, progress=lambda what, done, total: seen.append((what, done, total)))
    assert report.ok, report.checks
    assert None not in results(report).values()
    assert any(what.startswith("hashing model-") for what, _, _ in seen)


def test_a_directory_of_a_foreign_module(tmp_path):
    _, small = fresh("NanoGPT")
    small.save_pretrained(tmp_path / "out")
    report = verify(tmp_path / "out", tokens=24)
    assert report.ok, report.checks
    assert results(report)["original, full budget"] is None
    assert results(report)["hashes"] is True


def test_a_corrupted_weight_is_caught(converted, tmp_path):
    import shutil

    broken = shutil.copytree(converted, tmp_path / "broken")
    shard = sorted(broken.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    report = verify(broken, tokens=24)
    assert not report.ok
    assert results(report)["hashes"] is False
    assert shard.name in report.checks[0].detail


def test_nothing_to_verify(tmp_path):
    with pytest.raises(ArtifactError, match="kvrewrite convert"):
        verify(tmp_path)
    with pytest.raises(InputError, match="at least 2"):
        verify(tmp_path, tokens=1)


def sixteen_bits(folder):
    """A checkpoint in bfloat16."""
    made = LlamaForCausalLM.from_pretrained(make_checkpoint(folder / "wide"), dtype=torch.bfloat16)
    made.save_pretrained(folder / "base")
    return folder / "base"


SIXTEEN = {
    "streaming_llm": {"positions": "contiguous"},
    "h2o": {"quantize": "int8"},
    **{name: {} for name in ("keydiff", "adakv", "sirllm", "kvzip")},
}


@pytest.mark.parametrize("policy", few(SIXTEEN, rest=("keydiff", "adakv", "sirllm", "kvzip")))
def test_16_bits_are_compared_in_float32(tmp_path, policy):
    """So a fault shows that is smaller than bfloat16's rounding."""
    base = sixteen_bits(tmp_path)
    kvrewrite.convert(base, tmp_path / "out", policy, budget=48, check="off", **SIXTEEN[policy])
    report = verify(tmp_path / "out", tokens=24)
    assert report.ok and (report.dtype, report.compared_in) == ("bfloat16", "float32"), report.checks
    largest = [check.difference for check in report.checks if check.difference is not None]
    assert len(largest) == 5 and max(largest) < 1e-5


def test_a_small_fault_of_a_16_bit_model_is_found(tmp_path, monkeypatch):
    base = sixteen_bits(tmp_path)
    kvrewrite.convert(base, tmp_path / "out", "full", check="off")
    loaded = kvrewrite.load

    def faulty(directory, **how):
        model = loaded(directory, **how)
        for name, weight in model.program.graph.named_parameters():
            if name.endswith("o_proj.weight"):
                weight.data.mul_(1.01)
        return model

    monkeypatch.setattr("kvrewrite.api.load", faulty)
    assert results(verify(tmp_path / "out", tokens=24))["original, full budget"] is False
