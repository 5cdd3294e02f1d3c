"""Trains Locret's retaining heads (Huang et al., arXiv 2410.01805, section 4.1; code huangyuxiang03/Locret @
28995c5)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from kvrewrite.artifact.policy_weights import save_policy_weights
from kvrewrite.capture.frontend import capture
from kvrewrite.compiler import model_facts
from kvrewrite.errors import OptionError, TrainingError
from kvrewrite.ir.fx import set_attr
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.pipeline import canonical, expected_weights, model_fingerprint
from kvrewrite.policies.base import Policy
from kvrewrite.policies.locret import Locret
from kvrewrite.policies.weights import BASE_MODEL, UNLABELLED
from kvrewrite.tools.training.heads_graph import arguments, insert_heads
from kvrewrite.tools.training.label_file import LabelFile, said_of, write_labels
from kvrewrite.tools.training.labels import LABELS, RECONSTRUCTION, answer_index, causal_importance
from kvrewrite.tools.training.reconstruction import reconstruction_label, repeat
from kvrewrite.tools.training.trainer import Task, collate

TOP = 0.1  # share of positions that the monitored overlap compares


@dataclass(frozen=True, kw_only=True)
class LocretOptions:
    """What is trained; the defaults are the authors'.

    hidden_size: d_R. smoothing: the weight of the squared differences of neighbours, summed over layers as in their
    code. init: standard deviation of the initial weights (None: the model's initializer_range). label: "logit" is the
    authors'; "log_probability" is ours (`causal_importance`); "reconstruction" is the log of KVzip's score, of any text.
    n_sink: with that, the first tokens, which have no label. lr: of the heads.
    """

    least_hidden: ClassVar[int] = 1

    hidden_size: int = 1024
    smoothing: float = 0.0025
    lr: float = 5e-4
    init: float | None = None
    label: str = "logit"
    n_sink: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise OptionError(f"label is {self.label!r}, expected one of {', '.join(LABELS)}")
        if self.hidden_size < self.least_hidden:
            raise OptionError(f"hidden_size is {self.hidden_size}, expected at least {self.least_hidden}")
        if self.n_sink < 0:
            raise OptionError(f"n_sink is {self.n_sink}, expected 0 or more")
        for name in ("smoothing", "lr", "init"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise OptionError(f"{name} is {value}, expected a number of 0 or more")


@dataclass
class HeadLoss:
    """The loss of a batch: `total` = regression + smoothing (already weighted). overlap: of the best tenth of
    positions."""

    total: Tensor
    regression: Tensor
    smoothing: Tensor
    overlap: Tensor


def head_loss(scores: list[Tensor], labels: list[Tensor], smoothing: float) -> HeadLoss:
    """Computes the authors' loss: the mean of the rows' own losses.

    SmoothL1 (beta 1) between scores and labels, the mean over layers, heads and tokens, plus `smoothing` times the sum
    over layers of the mean squared difference of neighbours. scores, labels: one (B, Hkv, T) fp32 per layer; a token
    whose label is -inf is left out of regression and smoothing.
    """
    regression, smooth, overlap = [], [], []
    for s, label in zip(scores, labels, strict=True):
        counted = label > -torch.inf
        tokens = counted.sum(dim=(1, 2)).clamp(min=1)
        error = F.smooth_l1_loss(s, torch.where(counted, label, s.detach()), reduction="none")
        regression.append((error * counted).sum(dim=(1, 2)) / tokens)
        both = counted[..., 1:] & counted[..., :-1]
        steps = (s[..., 1:] - s[..., :-1]).square() * both
        smooth.append(steps.sum(dim=(1, 2)) / both.sum(dim=(1, 2)).clamp(min=1))
        overlap.append(top_overlap(s.detach(), label))
    first = torch.stack(regression).mean(dim=0).mean()
    second = smoothing * torch.stack(smooth).sum(dim=0).mean()
    return HeadLoss(first + second, first, second, torch.stack(overlap).mean())


def top_overlap(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of each head's best tenth by label that is also best by score; the mean over rows and heads."""
    counted = labels > -torch.inf
    wanted = (counted.sum(dim=-1, keepdim=True) * TOP).long().clamp(min=1)

    def best(x: Tensor) -> Tensor:
        ordered = torch.argsort(x.masked_fill(~counted, -torch.inf), dim=-1, descending=True, stable=True)
        rank = torch.empty_like(ordered).scatter_(-1, ordered, torch.arange(x.shape[-1], device=x.device).expand_as(x))
        return rank < wanted

    return ((best(scores) & best(labels)).sum(dim=-1, keepdim=True) / wanted).mean()


class LocretTask(Task):
    """A model prepared for training: captured, sites found, heads inserted. The frozen backbone is the model's own.

    The captured graph runs once per batch and gives scores, queries and keys of all layers. Labels come from the same
    run, because prompt and answer are one causal text: the same numbers as in the authors' offline pass.
    """

    max_tokens = 10240
    has_labels = True

    def __init__(self, model: nn.Module, options: LocretOptions, policy: Policy | None = None):
        super().__init__()
        self.options = options
        self.repeats = options.label == RECONSTRUCTION
        self.needs = "any" if self.repeats else "answer"
        self.labels: LabelFile | None = None  # labels are read from there instead of computed
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        captured = capture(model)
        self.sites = canonical(captured)
        config: Any = getattr(model, "config", None)
        chosen: Any = dataclasses.replace(policy or Locret(), hidden_size=options.hidden_size)  # type: ignore[call-arg]
        self.policy: Any = chosen.adapt(self.sites, model_facts(config))
        self.dtype, self.vocab_size = captured.dtype, captured.vocab_size
        # Two sets of frequencies, one for texts beyond a length (longrope), are chosen per batch. Frequencies that
        # follow the length (dynamic NTK) are not, so texts end where they would begin to change.
        self.tables = captured.rotary_tables
        rope: Any = getattr(config, "rope_parameters", None) or {}
        switches = rope.get("rope_type") == "longrope"
        thresholds = [] if switches else [t.threshold for t in self.tables]
        self.longest = min(thresholds, default=captured.max_positions)
        if self.repeats and self.longest is not None:  # the repetition stands after the text
            self.longest = (self.longest + options.n_sink) // 2
        self.owners: list[AttentionSite] = [s for s in self.sites if s.shares_kv_with is None]
        shapes = expected_weights(captured, self.sites, self.policy)
        std = options.init if options.init is not None else getattr(config, "initializer_range", None) or 0.02
        generator = torch.Generator().manual_seed(options.seed)
        device = next(captured.graph.parameters()).device
        self.names = list(shapes)
        self.heads = nn.ParameterList(
            nn.Parameter((torch.randn(shape, generator=generator) * std).to(device)) for shape in shapes.values()
        )
        self.hide(insert_heads(captured, self.sites, self.policy, dict(zip(self.names, self.heads, strict=True))))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the heads."""
        return [{"params": list(self.heads), "lr": self.options.lr, "name": "heads"}]

    def observe(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns scores and labels, one (B, Hkv, T) fp32 per owner each."""
        return self.look(input_ids, labels, real)[:2]

    def look(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Returns scores, labels, and what the heads read, one (B, T, C) per owner."""
        graph, length = self.__dict__["graph"], input_ids.shape[1]
        if self.longest is not None and length > self.longest:
            raise TrainingError(
                f"texts of {length} tokens are longer than the model takes in training ({self.longest}: its positions, or the "
                "length from which on its rotary frequencies follow the text's length); give a smaller --max-tokens"
            )
        for table in self.tables:
            chosen = table.long if length > table.threshold else table.short
            set_attr(graph, table.attribute, chosen.to(input_ids.device))
        if self.repeats:
            return self._repeat(input_ids, real)
        scores, queries, keys, *_, reads = graph(*arguments(graph, input_ids))
        answer = real & (labels >= 0)
        if self.labels is not None:
            return list(scores), self.labels.read(input_ids, answer, real), list(reads)
        answers = answer_index(answer)
        importance = [
            causal_importance(
                q.detach(),
                k.detach(),
                real & ~answer,
                answers,
                scale=site.scale,
                mask=(site.window, site.chunk),
                kind=self.options.label,
            )
            for site, q, k in zip(self.owners, queries, keys, strict=True)
        ]
        return list(scores), importance, list(reads)

    def _repeat(self, input_ids: Tensor, real: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The same where a repetition of the texts is the teacher."""
        graph, texts = self.__dict__["graph"], repeat(input_ids, real, self.options.n_sink)
        scores, queries, keys, sinks, slopes, reads = graph(*arguments(graph, texts.ids))
        length, found = input_ids.shape[1], []
        with torch.no_grad():
            for site, q, k, *own in zip(self.owners, queries, keys, sinks, slopes, strict=True):
                if self.learns(site):
                    label = reconstruction_label(site, q.detach(), k.detach(), texts, *own)[:, :, :length]
                    label[:, :, : self.options.n_sink] = -torch.inf
                else:
                    label = torch.full_like(k[:, :, :length, 0], -torch.inf, dtype=torch.float32)
                found.append(label)
        return [score[:, :, :length] for score in scores], found, [read[:, :length] for read in reads]

    @torch.no_grad()
    def label(self, row: dict[str, list[int]]) -> Tensor:
        """Returns the labels of one text {"input_ids", "labels"}: (kv heads of all layers, prompt tokens) fp32."""
        device = self.heads[0].device
        batch = {name: value.to(device) for name, value in collate([row]).items()}
        prompt = int((batch["labels"] < 0).sum())
        return torch.cat([label[0, :, :prompt] for label in self.observe(**batch)[1]])

    def use_labels(self, path: Path, texts: Any, run: dict[str, Any], quiet: bool = False) -> None:
        """Takes labels from a file; makes it first, from all texts once, if there is none. run: what labels depend on
        besides this task. Raises TrainingError if the file is of another run."""
        if self.repeats:
            raise OptionError(
                "labels of a repetition are not kept in a file: they come from the forward pass that the heads need anyway; "
                "leave --labels (labels) out"
            )
        said = said_of(self.owners, label=self.options.label, dtype=str(self.dtype).removeprefix("torch."), **run)
        heads = [site.kv_heads for site in self.owners]
        if not path.exists():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise OptionError(
                    f"{path} does not exist, and several processes can't make it together; run once without accelerate launch "
                    "(--steps 1 is enough), then train with it"
                )
            with tqdm(desc="labels", unit=" texts", disable=quiet) as bar:

                def label(row: Any) -> Tensor:
                    bar.update()
                    return self.label(row)

                write_labels(path, said, sum(heads), texts.once, label)
        self.labels = LabelFile(path, said, heads)
        first = next(iter(texts.once()))
        self.labels.labels_of(first["input_ids"], sum(label < 0 for label in first["labels"]))

    def learns(self, site: AttentionSite) -> bool:
        """Whether a layer's head is used; one that is not needs no labels of a repetition."""
        return True

    def begin(self, means: Sequence[Tensor]) -> None:
        """Receives the mean label of each kv head, (Hkv,) per owner, before the first step."""

    @staticmethod
    def error(scores: Tensor, labels: Tensor) -> Tensor:
        """What is made small for each score."""
        return F.smooth_l1_loss(scores, labels, reduction="none")

    def loss(self, scores: list[Tensor], labels: list[Tensor]) -> HeadLoss:
        """What is made small of a batch of texts."""
        return head_loss(scores, labels, self.options.smoothing)

    def forward(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Returns the loss of one batch and its parts; see `Task`."""
        found = self.loss(*self.observe(input_ids, labels, real))
        return {
            "loss": found.total,
            "regression": found.regression,
            "smoothing": found.smoothing,
            "top_overlap": found.overlap,
        }

    def save(self, out: Path, metadata: dict[str, str]) -> list[Path]:
        """Writes the heads in the authors' key layout, in the model's dtype."""
        tensors = {
            n: p.detach().to("cpu", self.dtype).contiguous() for n, p in zip(self.names, self.heads, strict=True)
        }
        said = {
            "policy": self.policy.name,
            "hidden_size": str(self.options.hidden_size),
            "activation": getattr(self.policy, "activation", "gelu"),
            "label": self.options.label,
            BASE_MODEL: model_fingerprint(self.sites),
            **({UNLABELLED: str(self.options.n_sink)} if self.repeats else {}),
        }
        save_policy_weights(out, tensors, {**metadata, **said})
        return [out]
