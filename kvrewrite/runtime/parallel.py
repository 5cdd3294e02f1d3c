"""The processes that run one model together: torch.distributed's group, and what they must agree on.

Every rank runs the same calls with the same ids. What one process would draw or decide by chance comes from rank 0.
"""

from __future__ import annotations

import gc
import os
import socket
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from kvrewrite.errors import KVRewriteError, OptionError, UnsupportedModelError
from kvrewrite.ir.parallel import Peers
from kvrewrite.ir.program import Program
from kvrewrite.ops import sums
from kvrewrite.passes.insert.sparse_prefill import is_sparse
from kvrewrite.passes.shard.shard import Sharder
from kvrewrite.runtime.sharding_proof import prove_shards


def find_peers(tp_plan: str | Peers | None, tp_size: int | None, device: torch.device | str) -> Peers | None:
    """The group that runs a model, None for one process alone; starts torch.distributed under torchrun where nobody has.

    tp_plan: None, "auto", or the group where it is not that of all processes (an engine's); tp_size: how many processes
    there must be, None: as many as there are. device: where the model will be, which chooses NCCL or gloo. Raises
    OptionError.
    """
    if tp_plan is None and tp_size is None:
        return None
    if isinstance(tp_plan, Peers):
        return tp_plan if tp_plan.ranks > 1 else None
    if tp_plan not in (None, "auto"):
        raise OptionError(f'tp_plan is {tp_plan!r}, expected "auto" (products are found in the graph) or None')
    if tp_size is not None and (type(tp_size) is not int or tp_size < 1):
        raise OptionError(f"tp_size is {tp_size!r}, expected a number of processes")
    if tp_size == 1 and not (dist.is_available() and dist.is_initialized()):
        return None
    if not dist.is_available():
        raise OptionError("tensor parallelism needs torch.distributed, which this build of torch does not have")
    kind = torch.device(device).type
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise OptionError(
                "tensor parallelism needs several processes, and this one is alone: start them with torchrun --nproc-per-node N, "
                "or call torch.distributed.init_process_group first"
            )
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(own_device(device))  # where what is sent comes from
    ranks = dist.get_world_size()
    if tp_size is not None and tp_size != ranks:
        raise OptionError(f"tp_size is {tp_size}, but there are {ranks} processes; expected as many")
    if kind == "cuda" and "nccl" not in str(dist.get_backend_config()):
        raise OptionError(
            f"the process group has {dist.get_backend_config()}, which does not reach {device}; expected "
            'init_process_group("nccl")'
        )
    world: Any = dist.group.WORLD
    return Peers(dist.get_rank(), ranks, str(world.group_name)) if ranks > 1 else None


def leave() -> None:
    """Leaves the group; every rank calls this, once its models are gone. Steps that were captured hold NCCL, which waits for
    them to go: torch.distributed.destroy_process_group alone would wait for ever where garbage still has one."""
    gc.collect()
    dist.barrier()
    sums.forget()
    dist.destroy_process_group()


def own_device(device: torch.device | str) -> torch.device:
    """The device of this process: of several GPUs, under torchrun, the one with its number."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return device


def part_of(program: Program, peers: Peers, prove: bool = True) -> Program:
    """This rank's part of a program, proved by rank 0. Raises on every rank alike."""
    if is_sparse(program.graph):
        raise OptionError(
            "prefill: patterns are of all heads of a layer, and with tensor parallelism no process has them all; leave "
            "prefill out, or use one process"
        )
    sharder = Sharder(program, peers.ranks)
    own = sharder.part(peers)
    if prove:
        _agree(peers, lambda: prove_shards(program, peers.ranks, sharder))
    return own


def _agree(peers: Peers, action: Any) -> None:
    """Rank 0 does something; where it fails, all fail."""
    told: list[Any] = [None]
    if peers.rank == 0:
        try:
            action()
        except KVRewriteError as error:
            told = [str(error)]
        except Exception as error:  # the others would wait for ever
            told = [f"tensor parallelism: the proof failed: {type(error).__name__}: {error}"]
    dist.broadcast_object_list(told, group=_group(peers), group_src=0)
    if told[0] is not None:
        raise UnsupportedModelError(told[0])


def _group(peers: Peers) -> Any:
    """The process group of this name; torch's functional collectives find it in the same way."""
    name: Any = peers.group
    return torch._C._distributed_c10d._resolve_process_group(name)


def sums_directly(peers: Peers, device: torch.device) -> bool:
    """Whether decode steps may sum by `ops.sums`, whose buffers are made then: two GPUs of one host that read each other's
    memory. (Of more ranks it was not shown that each sums in the same order.) Every rank calls this."""
    if peers.ranks != 2 or device.type != "cuda":
        return False
    places: list[Any] = [None, None]
    group = _group(peers)
    dist.all_gather_object(places, (socket.gethostname(), device.index), group=group)
    (host, _), (other_host, other) = places[peers.rank], places[1 - peers.rank]
    seen = host == other_host and device.index != other and torch.cuda.can_device_access_peer(device.index, other)
    answers: list[Any] = [None, None]
    dist.all_gather_object(answers, seen, group=group)
    if not all(answers):
        return False
    sums.reserve(peers.group, device)
    return True


def share_chance(peers: Peers, device: torch.device) -> None:
    """All ranks go on with rank 0's random numbers, so that they draw the same tokens."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    for i, state in enumerate(states):
        sent = state.to(device)
        dist.broadcast(sent, group=_group(peers), group_src=0)
        states[i] = sent.cpu()
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def check_same(ids: Tensor, peers: Peers) -> None:
    """Raises OptionError where ranks were given different ids: their collectives would not fit together."""
    facts = torch.tensor([ids.shape[0], ids.shape[1], int(_digest(ids))], dtype=torch.int64, device=ids.device)
    low, high = facts.clone(), facts.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=_group(peers))
    dist.all_reduce(high, dist.ReduceOp.MAX, group=_group(peers))
    if not torch.equal(low, high):
        raise OptionError(
            f"process {peers.rank} was given ids {tuple(ids.shape)}, others have other ones; every process of a tensor-parallel "
            "model is called with the same ids"
        )


def _digest(ids: Tensor) -> Tensor:
    place = torch.arange(1, ids.numel() + 1, device=ids.device)
    return ((ids.flatten().long() + 1) * place * 1_000_003 % 2_147_483_647).sum()
