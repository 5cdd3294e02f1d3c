"""Models that several processes run together (gloo on the CPU): the tokens, sets and logits of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvrewrite
from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.ir.parallel import Peers
from kvrewrite.ops import sums
from kvrewrite.passes.lower.sum_ranks import sum_directly
from kvrewrite.passes.shard.shard import shard
from kvrewrite.runtime.batch import Batch
from kvrewrite.runtime.model import RewrittenModel
from kvrewrite.runtime.parallel import find_peers, sums_directly
from tests.support.ranks import run_ranks
from tests.support.rewritten import rewritten
from tests.support.tiny import TEXT, make_checkpoint

IDS = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(3))
POLICIES = {
    "h2o": {"budget": 16},
    "tova": {"budget": 16, "chunk": 16},
    "streaming_llm": {"budget": 16, "chunk": 16},
    "adakv": {"budget": 16, "window": 4},
}


def batched(model: Any) -> list[list[int]]:
    """Three requests side by side, of different lengths."""
    batch = Batch(model)
    prompts = [IDS[0].tolist(), IDS[1, :23].tolist(), IDS[0, 5:17].tolist()]
    requests = [batch.start(ids, max_length=len(ids) + 8) for ids in prompts]
    waiting, tokens = list(requests), {}
    while waiting:
        for request, logits in zip(list(waiting), batch.advance_together(waiting)):
            if logits is not None:
                tokens[request] = [int(logits.argmax())]
                waiting.remove(request)
    for _ in range(6):
        for request, row in zip(requests, batch.decode(requests, [tokens[r][-1] for r in requests])):
            tokens[request].append(int(row.argmax()))
    return [tokens[request] for request in requests]


def answers(model: Any) -> dict[str, Any]:
    """What a model makes of a text: plain data."""
    fixed = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
    cache = model.new_cache(2)
    greedy = model.generate(IDS, cache=cache, do_sample=False, **fixed)
    sampled = model.generate(IDS, do_sample=True, **fixed)
    logits = model(IDS).logits
    kept = {layer: [list(map(list, row)) for row in rows] for layer, rows in cache.positions().items()}
    weights = sum(p.nbytes for p in model.parameters())
    found = {"greedy": greedy.tolist(), "sampled": sampled.tolist(), "kept": kept, "weights": weights}
    return {**found, "logits": logits.tolist(), "leased": cache.memory().leased, "batched": batched(model)}


def summed_directly(model: Any) -> bool:
    """Whether a graph whose sums are one op each gives the same logits; here that op asks the process group."""
    expected = model(IDS).logits
    model.graph_module = sum_directly(model.graph_module)
    names = [str(node.target) for node in model.graph_module.graph.nodes]
    assert names.count("kvrewrite.sum_ranks_add.default") == 4  # two a layer, each with its residual
    assert not any("all_reduce" in name for name in names)
    return torch.equal(model(IDS).logits, expected)


def in_ranks(rank: int, directories: dict[str, str], ranks: int) -> dict[str, Any]:
    found = {}
    for policy, directory in directories.items():
        model = kvrewrite.load(directory, tp_plan="auto", tp_size=ranks)
        torch.manual_seed(rank)  # rank 0's counts
        found[policy] = answers(model)
    found["directly"] = summed_directly(model)
    with pytest.raises(OptionError, match=f"tp_size is 5, but there are {ranks}"):
        kvrewrite.load(directory, tp_size=5)
    with pytest.raises(ArtifactError, match="can't be saved"):
        model.save_pretrained("nowhere")
    with pytest.raises(OptionError, match="same ids"):
        model.generate(IDS[:, rank:], max_new_tokens=1, pad_token_id=0)
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("policies", [("tova",), pytest.param(tuple(POLICIES), marks=pytest.mark.thorough)])
def test_processes(ranks: int, policies: tuple[str, ...], tmp_path: Path) -> None:
    changes = (
        {}
        if ranks == 2
        else {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 72}
    )
    base = make_checkpoint(tmp_path / "base", **changes)
    directories = {policy: str(tmp_path / policy) for policy in policies}
    for policy, directory in directories.items():
        kvrewrite.convert(base, directory, policy, check="off", **POLICIES[policy])
    parts = run_ranks(ranks, in_ranks, directories, ranks)
    assert all(part["directly"] for part in parts)
    for policy, directory in directories.items():
        torch.manual_seed(0)
        whole = answers(kvrewrite.load(directory))
        for part in parts:
            own = part[policy]
            assert all(own[way] == whole[way] for way in ("greedy", "sampled", "batched"))
            torch.testing.assert_close(torch.tensor(own["logits"]), torch.tensor(whole["logits"]), atol=2e-6, rtol=1e-5)
            assert own["leased"] * ranks == whole["leased"]
            assert own["weights"] < 1.1 / ranks * whole["weights"]  # norms are on all
            assert own["logits"] == parts[0][policy]["logits"]  # bit by bit
        for layer, rows in whole["kept"].items():
            for row, heads in enumerate(rows):
                assert [head for part in parts for head in part[policy]["kept"][layer][row]] == heads


def on_gpus(rank: int, directory: str) -> list[Any]:
    torch.cuda.set_device(rank)
    model = kvrewrite.load(directory, device="cuda", tp_plan="auto")
    model.compile()
    return decoded(model)


def decoded(model: Any) -> list[Any]:
    """Tokens of two texts, so that the second replays what the first captured."""
    fixed = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    return [model.generate(ids.to(model.device), **fixed).tolist() for ids in (IDS, IDS.flip(0))]


def replayed_sums(rank: int) -> list[bool]:
    """Sums of several shapes and types, whose inputs change, in a graph that is replayed: each right on the device."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    peers = find_peers("auto", None, device)
    assert peers is not None and sums_directly(peers, device)
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in (
            (1, 1, 4096),
            (7, 8),
            (32, 1, 4096),
            (3, 1, 5),
            (1, 513, 1024),
        ):  # the last two go by NCCL
            x, spare = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(1 << 20, device=device)
            torch.ops.kvrewrite.sum_ranks(x, peers.group)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                once = torch.ops.kvrewrite.sum_ranks(x, peers.group)
                twice = torch.ops.kvrewrite.sum_ranks(once + 1, peers.group)
                added = torch.ops.kvrewrite.sum_ranks_add(twice, peers.group, once)
            for turn in range(20):
                both = [
                    torch.rand(shape, generator=torch.Generator().manual_seed(100 * turn + r)).to(dtype) for r in (0, 1)
                ]
                x.copy_(both[rank])
                if rank == turn % 2:  # one of them is late
                    for _ in range(50):
                        spare.add_(1)
                graph.replay()
                expected = both[0] + both[1]
                doubled = (expected + 1) * 2
                found += [torch.equal(once.cpu(), expected), torch.equal(twice.cpu(), doubled)]
                found.append(torch.equal(added.cpu(), expected + doubled * 2))
    assert peers.group in sums._BUFFERS
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sums_of_two_gpus() -> None:
    assert all(all(found) and len(found) == 900 for found in run_ranks(2, replayed_sums))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["h2o", "tova", "streaming_llm"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(policy: str, tmp_path: Path) -> None:
    """NCCL inside the CUDA graphs of chunks and steps."""
    base = make_checkpoint(tmp_path / "base", hidden_size=256, intermediate_size=512)
    kvrewrite.convert(base, tmp_path / "out", policy, **POLICIES[policy])
    whole = kvrewrite.load(tmp_path / "out", device="cuda:0")
    whole.compile()
    expected = decoded(whole)
    assert run_ranks(2, on_gpus, str(tmp_path / "out")) == [expected] * 2


@pytest.mark.thorough
def test_command(tmp_path: Path) -> None:
    kvrewrite.convert(make_checkpoint(tmp_path / "base"), tmp_path / "out", "h2o", budget=16, check="off")
    asked = ["-m", "kvrewrite", "generate", str(tmp_path / "out"), "--prompt", TEXT, "--max-new-tokens", "8"]
    asked += ["--sample", "--seed", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, *asked],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *asked],
    ]
    alone, together = (
        subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280) for command in commands
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout and alone.stdout


def test_alone(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    kvrewrite.convert(make_checkpoint(tmp_path / "base"), directory, "h2o", budget=16, check="off")
    with pytest.raises(OptionError, match="torchrun"):
        kvrewrite.load(directory, tp_plan="auto")
    with pytest.raises(OptionError, match='expected "auto"'):
        kvrewrite.load(directory, tp_plan="colwise")
    assert kvrewrite.load(directory, tp_size=1).program.parallel is None


def test_memory_that_processes_fill_at_different_times() -> None:
    whole = rewritten("llama", "duo_attention", budget=12, start=2, chunk=8)
    part = RewrittenModel(shard(whole.program, Peers(0, 2, "nobody")), whole.config)
    with pytest.raises(OptionError, match="no memory limit"):
        Batch(part, memory=1 << 20)
