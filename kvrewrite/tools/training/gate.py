"""Trains Attention-Gates: continual pre-training of the gates alone, or fine-tuning with LoRA.

Follows arXiv 2410.12876, whose equations were not available: both modes, the straight-through estimator, one eviction
loss per layer with a target and a coefficient. Ours, not the paper's: the loss's form, the gradual decrease of its
target, all sizes and rates, the choice of gradient for closed gates, and distillation.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvrewrite.capture.frontend import capture
from kvrewrite.errors import OptionError
from kvrewrite.passes.pipeline import canonical
from kvrewrite.policies.attention_gate import AttentionGate
from kvrewrite.tools.training.gate_graph import GatedModel, calibrate, initial_weights
from kvrewrite.tools.training.labels import answer_index
from kvrewrite.tools.training.lora import ALL_LINEAR, add_lora, lora_parameters, merge_lora, save_adapter
from kvrewrite.tools.training.trainer import IGNORED, Task

MODES = ("pretrain", "finetune")
LEVELS = ("head", "layer", "model")
GRADIENTS = ("flip", "derivative")
MEASURED = 8  # batches on which eviction is measured at the end of training


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """What is trained and with which loss; the defaults are ours.

    mode: "pretrain" (frozen backbone, every token is a target) or "finetune" (with LoRA; targets are the answers, and
    tokens of answers always stay, like generated tokens in inference). keep_target: the share of gated tokens that each
    head, each layer or the model (level) should keep; the loss adds eviction * |mean(m) - target|, or eviction *
    relu(mean(m) - target) if two_sided is off, averaged over them. ramp: over this share of the steps the target
    decreases linearly from 1. distill: weight of KL(ungated || gated) at all tokens; it replaces cross-entropy in
    "pretrain" and is added in "finetune".

    gradient: "flip" or "derivative" of a gate, see `gated_attention`. initial_bias: gates open with p = sigmoid(it),
    and the logits' spread over tokens is initial_spread (`calibrate`). lora_rank 0: no LoRA. lora_targets: see
    `add_lora`, with commas between names. gates=False trains the adapters alone, as a baseline. merge: `save` also
    writes the merged model. plot: `save` draws a map of what is evicted. checkpoint: see `GatedModel`. The others are
    the policy's options.
    """

    mode: str = "pretrain"
    gate_heads: int = 4
    gate_dim: int = 16
    start: int = 4
    threshold: float = 0.5
    keep_target: float = 0.4
    eviction: float = 5.0
    level: str = "head"
    two_sided: bool = True
    ramp: float = 0.5
    distill: float = 0.0
    gradient: str = "flip"
    initial_bias: float = 6.0
    initial_spread: float = 2.0
    lora_rank: int = 8
    lora_targets: str = ALL_LINEAR
    lr: float = 3e-4
    bias_lr: float = 0.05
    lora_lr: float = 2e-4
    gates: bool = True
    merge: bool = False
    plot: bool = True
    checkpoint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OptionError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        if self.level not in LEVELS:
            raise OptionError(f"level is {self.level!r}, expected one of {', '.join(LEVELS)}")
        if self.gradient not in GRADIENTS:
            raise OptionError(f"gradient is {self.gradient!r}, expected one of {', '.join(GRADIENTS)}")
        if not 0 < self.keep_target < 1:
            raise OptionError(
                f"keep_target is {self.keep_target}, expected a share between 0 and 1 (0.4 keeps 40% of a prompt's tokens)"
            )
        for name, low in (
            ("eviction", 0.0),
            ("distill", 0.0),
            ("ramp", 0.0),
            ("lora_rank", 0),
            ("lr", 0.0),
            ("bias_lr", 0.0),
            ("lora_lr", 0.0),
            ("initial_spread", 0.0),
        ):
            if not getattr(self, name) >= low or math.isinf(getattr(self, name)):
                raise OptionError(f"{name} is {getattr(self, name)}, expected a number of {low} or more")
        if self.ramp > 1:
            raise OptionError(f"ramp is {self.ramp}, expected a share of the steps between 0 and 1")
        if 1 / (1 + math.exp(-self.initial_bias)) <= self.threshold:
            raise OptionError(
                f"initial_bias is {self.initial_bias}, so that gates start closed at threshold {self.threshold}; training "
                "starts from the model as it is, so expected a larger bias"
            )
        if self.gate_dim % 4:
            # Otherwise the GPU's attention kernels reject it, and the one that accepts it has a T x T mask in memory.
            raise OptionError(f"gate_dim is {self.gate_dim}, expected a multiple of 4")
        if self.mode == "pretrain" and self.lora_rank:
            object.__setattr__(self, "lora_rank", 0)
        if not self.gates and not self.lora_rank:
            raise OptionError(
                "gates is false and there is no LoRA, so nothing is left to train; expected mode=finetune and a rank"
            )
        self.policy()

    def policy(self) -> AttentionGate:
        """Returns the policy that uses what is trained."""
        return AttentionGate(
            gate_heads=self.gate_heads, gate_dim=self.gate_dim, start=self.start, threshold=self.threshold
        )

    def target_at(self, progress: float) -> float:
        """Returns the target when this share of the steps is done."""
        done = 1.0 if progress >= self.ramp else progress / self.ramp
        return 1 - done * (1 - self.keep_target)


# ----------------------------------------------------------------------------------------------------------------
# losses
def kept_share(gates: Sequence[Tensor], counted: Tensor) -> list[Tensor]:
    """Returns the share of counted (B, T) tokens that each head keeps, (Hkv,) per layer, with gradients."""
    total = counted.sum().clamp(min=1)
    return [(m * counted[:, None]).sum(dim=(0, 2)) / total for m in gates]


def eviction_loss(kept: Sequence[Tensor], target: float, level: str, two_sided: bool) -> Tensor:
    """Returns the mean distance of heads, layers or the model from the target (only above it, unless two_sided)."""
    shares = torch.cat(list(kept)) if level == "head" else torch.stack([k.mean() for k in kept])
    shares = shares.mean() if level == "model" else shares
    excess = shares - target
    return (excess.abs() if two_sided else torch.relu(excess)).mean()


def target_index(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the logits of targets: (index (B, K), targets (B, K), IGNORED after a row's last), K the most of any row.

    labels (B, T): the token itself at each target; the token before it predicts it.
    """
    wanted = labels[:, 1:] != IGNORED
    order, _ = answer_index(wanted)
    if not order.shape[1]:
        raise OptionError("no token of a batch is a target; expected texts with answers that fit into the length")
    return order, torch.gather(labels[:, 1:], 1, order)


def gated_tokens(options: GateOptions, labels: Tensor, real: Tensor) -> Tensor:
    """Returns the tokens (B, T) that gates decide on: all but those of answers, which inference generates and keeps."""
    if not options.gates:
        return torch.zeros_like(real)
    return real & (labels == IGNORED) if options.mode == "finetune" else real


@dataclass
class GateLoss:
    """The loss of one batch and its parts. kept: (L,)."""

    total: Tensor
    task: Tensor
    distill: Tensor
    eviction: Tensor
    kept: Tensor


def gate_loss(
    model: GatedModel, options: GateOptions, input_ids: Tensor, labels: Tensor, real: Tensor, progress: float
) -> GateLoss:
    """Computes the loss of a batch: input_ids, labels (IGNORED: no target), real (bool, rows left-aligned), each (B,
    T)."""
    gated = gated_tokens(options, labels, real)
    index, targets = target_index(labels)
    zero = torch.zeros((), device=input_ids.device)
    task = distill = zero
    if options.distill and options.gates:
        logits, gates = model(input_ids, gated)
        with torch.no_grad():
            teacher, _ = model(input_ids, torch.zeros_like(gated))
        distill = _divergence(teacher[real], logits[real])
        at = index[..., None].expand(-1, -1, logits.shape[2])
        logits = torch.gather(logits, 1, at)
    else:
        logits, gates = model(input_ids, gated, index)
    if options.mode == "finetune" or not options.distill:
        task = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    kept = kept_share(gates, gated if options.gates else real)
    eviction = zero
    if options.gates:
        eviction = eviction_loss(kept, options.target_at(progress), options.level, options.two_sided)
    total = task + options.distill * distill + options.eviction * eviction
    return GateLoss(total, task, distill, eviction, torch.stack([k.mean() for k in kept]))


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Returns KL(teacher || student) of logits (N, V), the mean over N."""
    log_p, log_q = (x.float().log_softmax(dim=-1) for x in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


# ------------------------------------------------------------------------------------------------------------------
# task
class GateTraining:
    """Prepares a transformers model for training: adds adapters, captures it, inserts gates.

    model: becomes `base`, changed in place if there are adapters; all other parameters are frozen. `adapted` is peft's
    wrapper, or None. Training changes only what `parameter_groups` lists.
    """

    def __init__(self, model: nn.Module, options: GateOptions):
        self.options = options
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.adapted: Any = None
        if options.lora_rank:
            targets = options.lora_targets
            chosen = targets if targets == ALL_LINEAR else [t.strip() for t in targets.split(",")]
            with torch.random.fork_rng():
                torch.manual_seed(options.seed)
                self.adapted = add_lora(model, rank=options.lora_rank, targets=chosen)
            model = self.adapted.get_base_model()
        self.base = model
        captured = capture(model)
        sites, policy = canonical(captured), options.policy()
        weights = initial_weights(captured, sites, policy, bias=options.initial_bias, seed=options.seed)
        self.model = GatedModel(
            captured, sites, policy, weights, flip=options.gradient == "flip", checkpoint=options.checkpoint
        )

        self.merged = False

    def calibrate(self, input_ids: Tensor, real: Tensor) -> None:
        """Fits fresh gates to the model on one batch."""
        calibrate(self.model, input_ids, real, spread=self.options.initial_spread, seed=self.options.seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns gates and adapters with their rates, for an optimizer."""
        groups: list[dict[str, Any]] = []
        if self.options.gates:
            weights = self.model.gate_weights()
            for name, lr, of_bias in (("gates", self.options.lr, False), ("gate biases", self.options.bias_lr, True)):
                params = [p for n, p in weights.items() if n.endswith(".bias") is of_bias]
                groups.append({"params": params, "lr": lr, "name": name})
        if self.adapted is not None:
            groups.append({"params": lora_parameters(self.adapted), "lr": self.options.lora_lr, "name": "lora"})
        return groups

    def loss(self, input_ids: Tensor, labels: Tensor, real: Tensor, progress: float) -> GateLoss:
        """See `gate_loss`."""
        if self.merged:
            raise OptionError(
                "the adapters are merged into the model; nothing can be trained on (merge=false keeps them)"
            )
        return gate_loss(self.model, self.options, input_ids, labels, real, progress)

    def counted(self, labels: Tensor, real: Tensor) -> Tensor:
        """Returns the tokens (B, T) that gates decide on."""
        return gated_tokens(self.options, labels, real)

    def save(self, out: Path, metadata: Mapping[str, str], tokenizer: Any = None) -> list[Path]:
        """Writes the gates to the file `out` and, with LoRA, the adapters to the folder <name>-adapter beside it.

        merge=True: the merged model and the tokenizer go to <name>-model; training can't continue after that. Returns
        what was written.
        """
        said = {name: str(getattr(self.options, name)) for name in ("mode", "keep_target", "start", "threshold")}
        written: list[Path] = []
        if self.options.gates:
            save_gates(out, self.model, {**metadata, **said, "lora_rank": str(self.options.lora_rank)})
            written.append(out)
        if self.adapted is not None:
            written.append(out.with_name(f"{out.stem}-adapter"))
            save_adapter(self.adapted, written[-1])
            if self.options.merge:
                written.append(out.with_name(f"{out.stem}-model"))
                merge_lora(self.adapted, written[-1], tokenizer)
                self.merged = True
        return written


class GateTask(Task):
    """Attention-Gates for the trainer: `GateTraining`, registering only its trained parameters."""

    ends_answers = True

    def __init__(self, model: nn.Module, options: GateOptions, tokenizer: Any = None):
        super().__init__()
        if options.plot:
            from kvrewrite.tools.plotting import require_matplotlib

            require_matplotlib()
        self.options, self.tokenizer = options, tokenizer
        self.needs = "answer" if options.mode == "finetune" else "text"  # type: ignore[misc]
        self.gates = GateTraining(model, options)
        graph = self.gates.model.graph
        self.hide(graph)
        trained = {id(p) for group in self.gates.parameter_groups() for p in group["params"]}
        for name, parameter in graph.named_parameters():
            if id(parameter) in trained:
                self.register_parameter(name.replace(".", "/"), parameter)
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEASURED)

    @property
    def longest(self) -> int | None:
        """Returns the longest text that the model takes, None: any."""
        return self.gates.model.longest

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns gates and adapters with their rates."""
        return self.gates.parameter_groups()

    def prepare(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> None:
        """Fits fresh gates to the model on the first batch."""
        self.gates.calibrate(input_ids, real)

    def forward(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Returns the loss of a batch and its parts; kept: the share of tokens that stay; kept_least: in the layer with
        the least."""
        found = self.gates.loss(input_ids, labels, real, self.progress)
        self._recent.append((input_ids, self.gates.counted(labels, real)))
        parts = {"loss": found.total, "task": found.task, "eviction": found.eviction}
        if self.options.distill:
            parts["distill"] = found.distill
        return parts | {"kept": found.kept.mean(), "kept_least": found.kept.min()}

    def save(self, out: Path, metadata: dict[str, str]) -> list[Path]:
        """Writes what `GateTraining.save` writes, and <name>.png: the share of the last batches' tokens that a head
        evicts."""
        drawn: list[Path] = []
        if self._recent and self.options.gates:
            ratios = eviction_ratios(self.gates.model, self._recent)
            shares = [[None if math.isnan(x) else round(x, 4) for x in row] for row in ratios.tolist()]
            metadata = {**metadata, "evicted": f"{float(ratios.nanmean()):.4f}", "evicted_per_head": json.dumps(shares)}
            if self.options.plot:
                drawn = [out.with_suffix(".png")]
                out.parent.mkdir(parents=True, exist_ok=True)
                plot_eviction(ratios, drawn[0], [s.layer for s in self.gates.model.owners])
        return self.gates.save(out, metadata, self.tokenizer) + drawn


# -------------------------------------------------------------------------------------------------------------
# measuring
@torch.no_grad()
def eviction_ratios(model: GatedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the share of tokens that gates drop, (L, most kv heads of a layer), NaN if a layer has fewer heads.

    batches: (input_ids (B, T), gated (B, T) bool). Counted are the tokens that a gate may drop and the first `start`.
    """
    heads = max(s.kv_heads for s in model.owners)
    dropped = torch.zeros(len(model.owners), heads, dtype=torch.float64)
    total = 0
    for input_ids, gated in batches:
        last = torch.zeros_like(input_ids[:, :1])  # no logits are needed, but at least one per row is required
        _, gates = model(input_ids, gated, last)
        for i, m in enumerate(gates):
            dropped[i, : m.shape[1]] += ((m == 0) & gated[:, None]).sum(dim=(0, 2)).cpu()
        total += int(gated.sum())
    if not total:
        raise OptionError("there is no text to measure eviction on")
    for i, site in enumerate(model.owners):
        dropped[i, site.kv_heads :] = float("nan")
    return dropped / total


def plot_eviction(ratios: Tensor, out: str | Path, layers: Sequence[int]) -> None:
    """Draws the share of tokens that each head drops (L, heads) as a PNG. layers: the layer of each row."""
    from kvrewrite.tools.evaluation.plots import draw_eviction

    draw_eviction(ratios.tolist(), layers, Path(out))


# ----------------------------------------------------------------------------------------------------------------
# saving
def save_gates(out: str | Path, model: GatedModel, metadata: Mapping[str, str]) -> None:
    """Writes the gates as inference reads them, in the model's dtype, with their sizes; metadata: more entries."""
    from kvrewrite.artifact.policy_weights import save_policy_weights
    from kvrewrite.passes.pipeline import model_fingerprint
    from kvrewrite.policies.weights import BASE_MODEL

    tensors = {n: p.detach().to("cpu", model.dtype).contiguous() for n, p in model.gate_weights().items()}
    said = {
        "policy": model.policy.name,
        "gate_heads": str(model.policy.gate_heads),
        "gate_dim": str(model.policy.gate_dim),
        BASE_MODEL: model_fingerprint(model.sites),
    }
    save_policy_weights(Path(out), tensors, {**metadata, **said})


__all__ = [
    "GateLoss",
    "GateOptions",
    "GateTask",
    "GateTraining",
    "eviction_loss",
    "eviction_ratios",
    "gate_loss",
    "kept_share",
    "plot_eviction",
    "save_gates",
]
