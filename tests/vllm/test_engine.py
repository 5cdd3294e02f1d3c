"""Directories of kvrewrite under vLLM itself, on the CPU: the tokens of `generate` alone, whatever vLLM schedules.

They skip themselves where vLLM is not installed; docs/vllm.md says how they are run.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kvrewrite
from kvrewrite.errors import OptionError
from kvrewrite.runtime.batch import Batch
from kvrewrite.vllm.requests import bytes_at_most
from tests.vllm.conftest import POLICIES

pytestmark = pytest.mark.xdist_group("vllm")
PROMPTS = (170, 10, 130, 64, 33, 200, 1, 97)
NEW = 16


@contextmanager
def engine(vllm: Any, directory: Path, **options: Any) -> Iterator[Any]:
    """An LLM of vLLM in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_memory_bytes": 40_000_000, **options}
    llm = vllm.LLM(str(directory), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def requests_of(llm: Any) -> Any:
    """What the plug-in has of the engine's requests."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.model.requests


def prompts() -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(3, 2048) for _ in range(n)] for n in PROMPTS]


def greedy(vllm: Any, **options: Any) -> Any:
    return vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **options)


@pytest.fixture(scope="module")
def expected(directory: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    """The tokens of `generate` alone, by policy."""
    known: dict[str, list[list[int]]] = {}

    def find(policy: str) -> list[list[int]]:
        if policy not in known:
            model = kvrewrite.load(directory(policy))
            known[policy] = [
                model.generate(torch.tensor([p]), max_new_tokens=NEW, eos_token_id=-1, do_sample=False)[
                    0, len(p) :
                ].tolist()
                for p in prompts()
            ]
        return known[policy]

    return find


def run(vllm: Any, llm: Any, which: list[list[int]]) -> list[list[int]]:
    given = [{"prompt_token_ids": p} for p in which]
    return [list(o.outputs[0].token_ids) for o in llm.generate(given, greedy(vllm), use_tqdm=False)]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tokens_of_a_lone_run(vllm: Any, directory: Any, expected: Any, policy: str) -> None:
    """Prompts of mixed lengths, twice as many as run at once, cut where vLLM's budget of tokens ends."""
    with engine(vllm, directory(policy), max_num_batched_tokens=100) as llm:
        assert run(vllm, llm, prompts()) == expected(policy)
        assert run(vllm, llm, prompts()[:1]) == expected(policy)[:1]  # which drops what went before
        assert len(requests_of(llm)) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 64},
        {"max_num_batched_tokens": 512},
        {"max_num_batched_tokens": 77, "long_prefill_token_threshold": 23},
        {"max_num_batched_tokens": 100, "blocks": 3},
        {"max_num_batched_tokens": 256, "enable_chunked_prefill": False},
        {"max_num_batched_tokens": 64, "async_scheduling": False},
    ],
    ids=str,
)
def test_the_schedule_changes_nothing(vllm: Any, directory: Any, expected: Any, options: dict[str, Any]) -> None:
    """Other cuts, and memory for two requests only (a third block is vLLM's own)."""
    if blocks := options.pop("blocks", None):
        options["num_gpu_blocks_override"] = blocks
    with engine(vllm, directory("h2o"), **options) as llm:
        assert run(vllm, llm, prompts()) == expected("h2o")


def test_requests_that_are_preempted_or_aborted(vllm: Any, directory: Any, expected: Any) -> None:
    with engine(vllm, directory("h2o"), max_num_batched_tokens=64) as llm:
        core, found = llm.llm_engine, {}
        for i, prompt in enumerate(prompts()):
            core.add_request(str(i), {"prompt_token_ids": prompt}, greedy(vllm))
        steps = 0
        while core.has_unfinished_requests():
            steps += 1
            for out in core.step():
                if out.finished:
                    found[out.request_id] = list(out.outputs[0].token_ids)
            if steps in (3, 9, 14):
                core.reset_prefix_cache(reset_running_requests=True)  # preempts all
            if steps == 5:
                core.abort_request(["1", "2"])
        assert steps > 14
        wanted = {str(i): tokens for i, tokens in enumerate(expected("h2o")) if i not in (1, 2)}
        assert {i: found[i] for i in wanted} == wanted
        assert run(vllm, llm, prompts()[4:5]) == expected("h2o")[4:5]
        assert len(requests_of(llm)) <= 1


def test_memory_is_what_vllm_gave(vllm: Any, directory: Any) -> None:
    """As many requests at once as blocks: vLLM's memory became that of the pools, once."""
    with engine(vllm, directory("streaming_llm"), num_gpu_blocks_override=5, max_num_seqs=16) as llm:
        run(vllm, llm, prompts())
        requests = requests_of(llm)
        assert 0 < requests.batch.used <= 1 and len(requests) <= 4
        pools = sum(store.page_bytes * store.total for store in requests.batch.stores)
        blocks = 5 * bytes_at_most(Batch(requests.model), 256)
        assert 0.9 * blocks < pools < 1.1 * blocks


def test_a_trial_before_the_first_request(vllm: Any, directory: Any, expected: Any) -> None:
    """vLLM measures memory by a trial (on a GPU; here the test asks for it), and may make others later."""
    with engine(vllm, directory("h2o")) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert not runner.model.warm
        hidden, _ = runner._dummy_run(8)
        assert runner.model.warm and runner.model.requests is None
        assert runner.model.compute_logits(hidden).shape == (8, 2048)
        assert run(vllm, llm, prompts()) == expected("h2o")
        runner._dummy_run(8)
        assert run(vllm, llm, prompts()[:2]) == expected("h2o")[:2]


def test_sampling(vllm: Any, directory: Any) -> None:
    """Several answers of one prompt, seeds, logprobs, and stop conditions are vLLM's."""
    with engine(vllm, directory("h2o"), max_num_batched_tokens=512) as llm:
        some = vllm.SamplingParams(temperature=1.0, n=3, seed=5, max_tokens=8, logprobs=2)
        first, again = (llm.generate([{"prompt_token_ids": prompts()[0]}], some, use_tqdm=False)[0] for _ in range(2))
        assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
        assert len({tuple(o.token_ids) for o in first.outputs}) > 1
        assert all(len(step) >= 2 for step in first.outputs[0].logprobs)
        with pytest.raises(Exception, match="prompt_logprobs: logits are computed for the last token"):
            llm.generate([{"prompt_token_ids": [5, 6]}], greedy(vllm, prompt_logprobs=1), use_tqdm=False)
        assert len(run(vllm, llm, prompts()[:2])[1]) == NEW  # and the engine goes on


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tensor_parallel_size": 3}, "a layer has 4 kv heads"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"enable_lora": True}, "merge them before"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"quantization": "fp8"}, "quantization=fp8"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ],
    ids=str,
)
def test_what_is_refused(vllm: Any, directory: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        vllm.EngineArgs(str(directory("h2o")), **options).create_engine_config()
    assert isinstance(caught.value, OptionError) or message in str(caught.value)


def test_another_version_is_refused(vllm: Any, directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvrewrite.vllm import plugin

    monkeypatch.setattr(plugin, "version", lambda name: "0.33.0")
    with pytest.raises(Exception, match=r"this is vLLM 0\.33\.0, but"):
        vllm.EngineArgs(str(directory("h2o"))).create_engine_config()


def test_other_models_are_read_as_before(vllm: Any, directory: Any) -> None:
    base = directory("h2o").parent / "base"
    config = vllm.EngineArgs(str(base)).create_engine_config()
    assert config.model_config.architectures == ["LlamaForCausalLM"]
    assert not config.model_config.uses_mrope and config.cache_config.enable_prefix_caching
