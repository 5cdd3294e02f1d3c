"""What libraries ask any model of transformers about its weights and its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvrewrite.errors import InputError, UnsupportedModelError
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.program import Program
from kvrewrite.passes.insert.embeds import embedding_graph

# What may stand between token ids and the table of their embeddings.
_RESHAPING = {getattr(torch.ops.aten, n).default for n in ("view", "reshape", "clone", "alias", "unsqueeze", "squeeze")}


class TokenEmbeddings(nn.Embedding):
    """The table of a program, which makes embeddings the way the program does."""

    def __init__(self, program: Program, weight: Tensor):
        rows, width = weight.shape
        super().__init__(rows, width, _weight=weight)
        # No submodule: its table is this one's weight already.
        self.__dict__["graph"] = embedding_graph(program) if program.embedded else None

    def forward(self, input: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D)."""
        graph = self.__dict__["graph"]
        found: Tensor = super().forward(input) if graph is None else graph(input)
        return found


class Pretrained(nn.Module):
    """The part of a `RewrittenModel` that answers them."""

    graph_module: fx.GraphModule
    config: Any
    source: Any
    program: Program

    @property
    def beside(self) -> list[str]:
        """The original's parameters that the graph does not read and the model needs all the same."""
        return []

    @property
    def name_or_path(self) -> str:
        """Where the tokenizer is: the model's directory, or where the original came from (lm-eval looks there)."""
        if isinstance(self.source, Path):
            return str(self.source)
        return str(getattr(self.config, "_name_or_path", ""))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the weights have, those of the policy included; none is trainable."""
        counted = {id(p): p for p in self.parameters() if p.requires_grad or not only_trainable}
        for node in self.graph_module.graph.nodes if exclude_embeddings else ():
            if node.target is torch.ops.aten.embedding.default and node.args[0].op == "get_attr":
                counted.pop(id(get_attr(self.graph_module, node.args[0].target)), None)
        return sum(p.numel() for p in counted.values())

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, and of the tables that the graph reads. Caches have a `memory()` of their own."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(x.numel() * x.element_size() for x in held)

    def get_input_embeddings(self) -> nn.Embedding:
        """What makes embeddings (B, T, D) of ids (B, T), as `inputs_embeds` takes them: a table, whose weight is the graph's
        own parameter, and the factor that the embedding module of some models (Gemma 3) puts on it. Raises
        UnsupportedModelError where tokens are not looked up in one table."""
        for node in self.graph_module.graph.nodes:
            if node.target is not torch.ops.aten.embedding.default:
                continue
            table, ids = node.args[:2]
            while ids.target in _RESHAPING:
                ids = ids.args[0]
            if table.op == "get_attr" and ids.op == "placeholder" and ids.target == "input_ids":
                weight = get_attr(self.graph_module, table.target)
                found = TokenEmbeddings(self.program, weight)
                found.weight = weight  # the same object, not another one over its storage
                return found
        raise UnsupportedModelError("the model's graph does not look tokens up in one table")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused: the size of the vocabulary is part of the graph."""
        raise InputError(
            "a rewritten model can't change its vocabulary, which is part of its graph; resize the original and transform that"
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        force: bool = False,
        compile: str | None = None,
        compile_batch: int = 1,
        **kwargs: Any,
    ) -> None:
        """Writes the model as a directory that `kvrewrite.load` reads; see `kvrewrite.artifact.directory`, and
        `kvrewrite.runtime.aot` for compile="aot"."""
        from kvrewrite.artifact.saving import save
        from kvrewrite.runtime.aot import check_kind, compile_ahead

        model: Any = self  # with what else it is
        check_kind(compile, model.device)
        steps = None if compile is None else lambda folder: compile_ahead(model, folder, compile_batch)
        out, source, config = save_directory, self.source, self.config
        save(self.program, out, source=source, config=config, force=force, compile_steps=steps, vision=self.beside)
