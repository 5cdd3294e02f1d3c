"""The model class that vLLM builds: kvrewrite's program behind vLLM's interface of a model.

To vLLM a request's bounded cache is the state of one recurrent layer: one block of a fixed size. So vLLM's scheduler admits
as many requests as such blocks fit into its memory. The block's number is not used; `labels.py` says whose a token is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from kvrewrite.analysis.memory import carried_bytes
from kvrewrite.api import load
from kvrewrite.cache.memory import human
from kvrewrite.errors import KVRewriteError, OptionError
from kvrewrite.ir.parallel import Peers
from kvrewrite.runtime.batch import Batch
from kvrewrite.vllm.labels import answer_delta, prompt_positions, read
from kvrewrite.vllm.requests import Piece, Requests, bytes_at_most

LAYER = "kvrewrite.layers.0.cache"  # vLLM wants exactly one number in a layer's name
NO_LOGITS = -1.0


@dataclass
class Metadata:
    """What the model is told about a step. starts: where each request's tokens begin in it, and where the last ones end."""

    starts: list[int]


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Makes `Metadata`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        """Called once a step."""
        return Metadata(common_attn_metadata.query_start_loc_cpu[: common_attn_metadata.num_reqs + 1].tolist())


class Backend(AttentionBackend):
    """Names the metadata that the model wants."""

    @staticmethod
    def get_name() -> str:
        return "KVREWRITE"

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class Handle(nn.Module, MambaBase):
    """The one layer that vLLM sees. size: bytes of a request at most."""

    def __init__(self, size: int, vllm_config: Any):
        super().__init__()
        self.size = size
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[LAYER] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.size,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def get_attn_backend(self) -> type[AttentionBackend]:
        return Backend

    def get_kv_cache_spec(self, vllm_config: Any) -> MambaSpec:
        return MambaSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=vllm_config.model_config.max_model_len,
            mamba_type=self.mamba_type,
            mamba_cache_mode="none",
        )

    def take_blocks(self) -> int:
        """How many blocks vLLM has reserved. Their memory is free for the pools of kvrewrite then: vLLM itself neither
        reads nor writes it."""
        reserved = self.kv_cache[0].untyped_storage()
        blocks = reserved.nbytes() // self.size
        reserved.resize_(0)
        self.kv_cache = ()
        return blocks


def _peers() -> Peers | None:
    """The workers that share a model (--tensor-parallel-size)."""
    group = get_tp_group()
    if group.world_size == 1:
        return None
    return Peers(group.rank_in_group, group.world_size, str(group.device_group.group_name))


class KVRewriteForCausalLM(nn.Module):
    """Runs a directory of kvrewrite. `forward` computes the logits of each request's last token; what it returns for each token
    is where these are, which `compute_logits` looks up."""

    has_inner_state: ClassVar[Literal[True]] = True
    is_attention_free: ClassVar[Literal[True]] = True
    supports_mrope: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config
        self.length: int = config.max_model_len
        with torch.device("cpu"), set_default_torch_dtype(torch.float32):
            self.program = load(config.model, device=vllm_config.device_config.device, tp_plan=_peers())
            if self.program.device.type == "cuda" and not config.enforce_eager:
                self.program.compile()
        policy = self.program.policy
        if policy.capacity is not None and policy.capacity < self.length:
            raise OptionError(
                f"max_model_len is {self.length}, but {policy.name} holds at most {policy.capacity} tokens; set --max-model-len "
                f"{policy.capacity}, or convert with a larger budget"
            )
        if policy.repeats_prompt:
            raise OptionError(
                f"{policy.name} reads a prompt a second time once it is through, and vLLM runs the passes of a prompt that it "
                "has scheduled; use `kvrewrite serve`, or a policy that reads it once (fast_kvzip, kvzap, snapkv)"
            )
        self.pages = bytes_at_most(Batch(self.program), self.length)
        self.handle = Handle(self.pages + carried_bytes(self.program.program.layout), vllm_config)
        self._say_size()
        self.requests: Requests | None = None
        self.warm, self.rows = False, vllm_config.scheduler_config.max_num_seqs
        self._numbers = count()
        self._gone: list[int] = []  # requests that vLLM has dropped
        self._logits = self._zeros()

    def _say_size(self) -> None:
        from vllm.logger import init_logger

        policy = self.program.policy
        unbounded = (
            ""
            if policy.evicts_ever and not policy.whole_prompt and policy.decode_eviction
            else (f"; {policy.name} keeps every token of an answer, so that is as much as --max-model-len asks for")
        )
        init_logger("vllm.kvrewrite").info(
            "%s: a request of up to %d tokens holds at most %s%s",
            policy.name,
            self.length,
            human(self.handle.size),
            unbounded,
        )

    def _zeros(self) -> Tensor:
        return torch.zeros(1, self.program.program.vocab_size, device=self.program.device, dtype=self.program.dtype)

    # -- what vLLM asks a model ------------------------------------------------------------------------------------
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """They are loaded already: vLLM's own are not even opened."""
        return {name for name, _ in self.named_parameters()}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Not used: the program takes token ids."""
        raise KVRewriteError("the program takes token ids, not embeddings")

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, np.int64]:
        """The labelled positions of a request's prompt; vLLM asks when a request arrives and drops them when it leaves."""
        number = next(self._numbers)
        positions = prompt_positions(number, len(input_tokens))
        weakref.finalize(positions, self._gone.append, number).atexit = False
        return positions, answer_delta(number)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One step: (tokens, 1) float32, where the logits are that follow each token."""
        where = torch.full((input_ids.shape[0], 1), NO_LOGITS, device=input_ids.device)
        metadata = get_forward_context().attn_metadata
        pieces = [] if metadata is None else self._pieces(metadata[LAYER].starts, input_ids, positions)
        if not pieces:  # vLLM measures memory or warms up
            self._warm_up()
            self._logits = self._zeros()
            return where.zero_()
        # vLLM calls models in inference mode, whose tensors could not be written to outside it; the cache's are.
        with torch.inference_mode(False), torch.no_grad():
            self._logits = self._running().step([piece for piece, _ in pieces])
        last = torch.tensor([end - 1 for _, end in pieces])
        where[last.to(where.device), 0] = torch.arange(len(pieces), device=where.device, dtype=where.dtype)
        return where

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (tokens, vocabulary) of what `forward` returned; NaN where none were computed, which is for all tokens of a
        prompt but the last."""
        where = hidden_states[:, 0].long()
        logits = self._logits[where.clamp(min=0)]
        return logits.masked_fill_((where < 0)[:, None], torch.nan)

    def _warm_up(self) -> None:
        """Once, before vLLM reserves memory for caches: it measures what a step takes besides, and the program is compiled."""
        if self.warm:
            return
        self.warm = True
        Requests(self.program, length=self.length).try_out(self.rows)

    # -- requests --------------------------------------------------------------------------------------------------
    def _pieces(self, starts: list[int], input_ids: Tensor, positions: Tensor) -> list[tuple[Piece, int]]:
        """What each request got, and where that ends in the step."""
        first = torch.tensor(starts[:-1])
        labels = positions[:2, first.to(positions.device)].T.tolist()
        found = []
        for (begin, end), (label, position) in zip(pairwise(starts), labels, strict=True):
            request, prompt, start = read(label, position)
            if end > begin and prompt != 0:  # vLLM's own trials have labels of zero
                found.append((Piece(request, prompt, start, input_ids[begin:end]), end))
        return found

    def _running(self) -> Requests:
        """The requests, without those that have left."""
        if self.requests is None:
            self.warm = True
            memory = self.handle.take_blocks() * self.pages
            self.requests = Requests(self.program, length=self.length, memory=memory)
        while self._gone:
            self.requests.end(self._gone.pop())
        return self.requests
