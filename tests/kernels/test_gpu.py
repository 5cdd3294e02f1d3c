"""On a GPU: the same kept sets and logits as on the CPU, memory that is really held, models moved between devices."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import kvrewrite
import kvrewrite.dynamo.backend  # where the package is not installed, torch.compile does not know its name
from kvrewrite.artifact.checkpoint import Checkpoint
from kvrewrite.artifact.copier import STAGED, Copier
from tests.support.rewritten import captured, original, rewrite, rewritten
from tests.support.zoo import make

pytestmark = pytest.mark.gpu

CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("streaming_llm", {"budget": 16, "chunk": 8}),
    ("streaming_llm", {"budget": 16, "positions": "original"}),
    ("h2o", {"budget": 16}),
    ("locret", {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3}),
    ("tova", {"budget": 16}),
    ("snapkv", {"budget": 16, "window": 6, "kernel": 3}),
    ("pyramidkv", {"budget": 16, "window": 4, "kernel": 3, "beta": 4}),
    ("adakv", {"budget": 16, "window": 6, "kernel": 3}),
    ("h2o", {"budget": 16, "head_budgets": "adakv", "chunk": 11}),
    ("expected_attention", {"budget": 16, "n_sink": 2, "n_future": 20}),
    ("keydiff", {"budget": 16, "chunk": 9}),
    ("infllm", {"budget": 16, "block": 4, "start": 2, "chunk": 9, "blocks": 2, "block_cache": 3}),
    ("infllm", {"budget": 12, "block": 4, "chunk": 8, "start": 0, "blocks": 1, "refresh": 3, "distant": "original"}),
    ("knorm", {"budget": 16}),
    ("random", {"budget": 16, "seed": 3}),
    ("random_attention", {"budget": 14, "buffer": 3, "protect_prompt": False}),
    ("observed_attention", {"budget": 16}),
    ("r_kv", {"budget": 14, "buffer": 3, "window": 3}),
    ("lagkv", {"budget": 16, "n_sink": 2, "lag_size": 5}),
    ("finch", {"budget": 16, "window": 6}),
    ("compactor", {"budget": 16, "start": 2, "recent_tokens": 2, "sketch": 6, "block": 9}),
    ("scissorhands", {"budget": 16, "recent_tokens": 3, "history": 9}),
    ("sirllm", {"budget": 16, "chunk": 10}),
    ("nacl", {"budget": 16, "interval": 3}),
    ("nacl", {"budget": 0.4, "preset": "code"}),
    ("attention_gate", {"chunk": 20}),
    ("kvzap", {"threshold": 0.0, "window": 5, "chunk": 20}),
    ("kvzip", {"budget": 16, "n_sink": 2, "repeat_chunk": 13, "chunk": 20}),
    ("kvzip", {"budget": 16, "n_sink": 1, "repeat_chunk": 19, "scope": "layer"}),
    ("kvzip", {"budget": 16, "scope": "head", "positions": "contiguous"}),
    ("kvzap", {"threshold": None, "window": 5, "budget": 16, "scope": "model", "chunk": 20}),
    ("fast_kvzip", {"budget": 16, "n_sink": 1, "interval": 3, "decode_window": 2}),
    ("trim_kv", {"budget": 14, "buffer_size": 3, "retention_gate": "rg"}),
    ("duo_attention", {"budget": 16, "start": 4, "heads": "10,01"}),
    ("h2o", {"budget": 16, "merge": True}),
    ("snapkv", {"budget": 20, "window": 6, "quantize": "int8", "quantize_group": 8, "quantize_residual": 8}),
    ("streaming_llm", {"budget": 20, "chunk": 8, "quantize": "int4", "quantize_group": 8, "quantize_residual": 8}),
    ("h2o", {"budget": 20, "quantize": "fp8", "quantize_group": 8, "quantize_residual": 0}),
]
# Scores of these families tie under these policies (see tests/runtime/test_invariants.py), and rounding decides.
TIES = {("bloom", "keydiff"), ("gemma2", "knorm")}


def ids(rows: int, length: int) -> Tensor:
    """Random tokens; in short texts none twice, so that no two scores are equal."""
    generator = torch.Generator().manual_seed(0)
    if length < 96:
        return torch.stack([torch.randperm(96, generator=generator)[:length] + 1 for _ in range(rows)])
    return torch.randint(1, 97, (rows, length), generator=generator)


def trace(model: Any, prompt: Tensor, answer: Tensor) -> tuple[list[Any], Tensor]:
    """Kept sets and logits over a padded prompt and some given tokens."""
    cache = model.new_cache(2)
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    logits = [model(prompt, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits]
    kept = [cache.positions()]
    for t in range(answer.shape[1]):
        logits.append(model(answer[:, t : t + 1], past_key_values=cache).logits)
        kept.append(cache.positions())
    return kept, torch.cat(logits, 1).float().cpu()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "gpt2", "bloom"])
@pytest.mark.parametrize(("policy", "options"), CASES)
def test_same_as_on_the_cpu(family: str, policy: str, options: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    if (family, policy) in TIES:
        pytest.skip("its scores tie")
    try:
        cpu = rewritten(family, policy, **options)
    except kvrewrite.errors.KVRewriteError as refusal:
        pytest.skip(str(refusal))
    gpu = rewrite(original(family), captured(family), policy, None, **options)
    # Its parameters are the original's own.
    gpu.graph_module = gpu.program.graph = copy.deepcopy(gpu.graph_module)
    gpu.to("cuda")
    text = ids(2, 53)
    prompt, answer = text[:, :45], text[:, 45:]
    kept_cpu, logits_cpu = trace(cpu, prompt, answer)
    kept_gpu, logits_gpu = trace(gpu, prompt.cuda(), answer.cuda())
    assert kept_gpu == kept_cpu
    torch.testing.assert_close(logits_gpu, logits_cpu, atol=1e-4, rtol=1e-4)


def test_captured_on_the_gpu_in_bfloat16() -> None:
    model = make("llama").to("cuda", torch.bfloat16)
    small = kvrewrite.transform(model, "full")
    prompt = ids(2, 40).cuda()
    with torch.no_grad():
        expected = model(prompt, use_cache=False).logits.float()
    torch.testing.assert_close(small(prompt).logits.float(), expected, atol=2e-2, rtol=2e-2)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert small.generate(prompt, attention_mask=prompt * 0 + 1, **settings).shape == (2, 60)


def test_saved_on_one_device_loaded_on_the_other(tmp_path: Any) -> None:
    model = make("llama")
    small = kvrewrite.transform(model, "streaming_llm", budget=16)
    small.save_pretrained(tmp_path / "out")
    loaded = kvrewrite.load(tmp_path / "out", device="cuda")
    prompt = ids(1, 50)
    torch.testing.assert_close(loaded(prompt.cuda()).logits.cpu(), small(prompt).logits, atol=1e-4, rtol=1e-4)


def test_memory_is_what_is_reported() -> None:
    """The pools are all that a cache holds; eviction gives memory back to the allocator's user, not to a mask."""
    model = make("llama").to("cuda")
    small = kvrewrite.transform(model, "streaming_llm", budget=512, chunk=256, positions="original")
    full = kvrewrite.transform(model, "full")
    held: dict[str, tuple[int, int]] = {}
    prompt = ids(1, 8192).cuda()
    small(prompt[:, :64])  # what cuBLAS keeps for itself is allocated with the first product
    for name, rewritten_model in (("evicted", small), ("full", full)):
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = rewritten_model.new_cache(1)
        rewritten_model(prompt, past_key_values=cache, logits_to_keep=1)
        gc.collect()
        memory = cache.memory()
        held[name] = (torch.cuda.memory_allocated() - before - memory.text, memory.reserved)
        del cache
    for allocated, reserved in held.values():
        assert reserved <= allocated <= reserved * 1.02 + (1 << 16)  # tables and lengths, rounding of the allocator
    assert held["evicted"][0] < held["full"][0] / 10


def test_ragged_memory_is_what_is_reported() -> None:
    """Heads that keep different numbers of slots, and forks: what the allocator holds is what the cache says."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make("llama").to("cuda")
    full = kvrewrite.transform(model, "full")
    for policy, options in (
        ("adakv", {"budget": 0.1, "window": 8}),
        ("knorm", {"budget": 700, "head_budgets": "adakv", "head_floor": 0.0}),
        ("adakv", {"budget": 0.1, "quantize": "int4"}),
    ):
        small = kvrewrite.transform(model, policy, **options)  # type: ignore[arg-type]
        prompt = ids(2, 8192).cuda()
        small(prompt[:, :64])
        sizes = []
        for rewritten_model in (small, full):
            gc.collect()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            cache = rewritten_model.new_cache(2)
            rewritten_model(prompt, past_key_values=cache, logits_to_keep=1)
            gc.collect()
            report = cache.memory()
            sizes.append((torch.cuda.memory_allocated() - before - report.text, report))
            if rewritten_model is small:
                lens = torch.stack(list(cache.live_slots().values()))
                assert int(lens.min()) < int(lens.max())
                fork = cache.fork()
                assert torch.cuda.memory_allocated() - before < sizes[0][0] * 1.1 + (1 << 20)  # pages are shared
                del fork
            del cache
        for allocated, memory in sizes:
            assert memory.reserved <= allocated <= memory.reserved * 1.03 + (1 << 16)
        assert sizes[0][0] < sizes[1][0] / 2.5


def test_forks_answer_as_if_alone() -> None:
    model = make("llama").to("cuda")
    small = kvrewrite.transform(model, "h2o", budget=90)
    document, question = ids(1, 150).cuda(), ids(2, 9)[1:].cuda()
    cache, alone = small.prefill(document), small.prefill(document)
    forks = [cache.fork(), cache.fork()]
    expected = small(question, past_key_values=alone).logits
    for fork in forks:
        assert torch.equal(small(question, past_key_values=fork).logits, expected)
    assert cache.seen == [150] and forks[0].positions() == alone.positions()


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("adakv", {"budget": 16, "window": 6}),
        ("sirllm", {"budget": 16, "chunk": 20}),
        ("nacl", {"budget": 16, "interval": 3}),
        ("h2o", {"budget": 16, "merge": True}),
        ("h2o", {"budget": 16, "quantize": "int8", "quantize_group": 8, "quantize_residual": 8}),
    ],
)
def test_more_compiled_is_eager(policy: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = make("llama").to("cuda")
    prompt, answer = ids(2, 51).cuda().split((45, 6), dim=1)
    small = kvrewrite.transform(model, policy, **options)
    kept, logits = trace(small, prompt, answer)
    small.compile(fullgraph=True)
    kept_compiled, logits_compiled = trace(small, prompt, answer)
    assert kept_compiled == kept
    torch.testing.assert_close(logits_compiled, logits, atol=1e-4, rtol=1e-4)


def test_compiled_is_eager() -> None:
    model = make("llama").to("cuda")
    prompt, answer = ids(2, 51).cuda().split((45, 6), dim=1)
    small = kvrewrite.transform(model, "h2o", budget=16)
    kept, logits = trace(small, prompt, answer)
    small.compile(fullgraph=True)
    kept_compiled, logits_compiled = trace(small, prompt, answer)
    assert kept_compiled == kept
    torch.testing.assert_close(logits_compiled, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "options"), [("snapkv", {"budget": 44, "window": 5}), ("streaming_llm", {"budget": 24, "chunk": 8})]
)
def test_backend_is_transform(policy: str, options: dict[str, Any]) -> None:
    """torch.compile with an ordinary DynamicCache, through Inductor: 200 tokens. One policy only adds single tokens, in a graph
    of their own, the other one evicts at every token."""
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make("llama").to("cuda")
    prompt = ids(2, 51).to("cuda")
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 200,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = kvrewrite.transform(model, policy, **options).generate(prompt, **settings)
    user: Any = torch.compile(model, backend="kvrewrite", options={"policy": policy, **options})
    found = user.generate(prompt, return_dict_in_generate=True, **settings)
    assert torch.equal(found.sequences, expected)
    kept = 44 + 199 if policy == "snapkv" else 24
    assert {layer.keys.shape[-2] for layer in found.past_key_values.layers} == {kept}


def test_weights_arrive_through_pinned_buffers(tmp_path: Path) -> None:
    """A tensor that needs both buffers more than once, a small one behind it, and what is cast."""
    whole = torch.randn(5 * STAGED // 8 + 3)
    save_file({"a": whole, "b": whole[:7].clone(), "c": whole.double()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    wanted = {"a": torch.float32, "b": torch.float32, "c": torch.bfloat16}
    with Copier(torch.device("cuda")) as copy, checkpoint.reader() as reader:
        copied = {name: copy(reader, name, dtype) for name, dtype in wanted.items()}
    for name, target in copied.items():
        source = whole[: target.numel()]
        assert torch.equal((source.double() if name == "c" else source).to(wanted[name]), target.cpu())
