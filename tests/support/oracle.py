"""A slow and obvious model of eviction: the unmodified Llama of transformers with caches that are Python lists.

One row at a time. Keys are kept without their rotation; this file has its own RoPE and its own attention (fp64). What a
policy keeps is in tests/support/oracle_rules.py, read from the papers' texts and not from kvrewrite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "kvrewrite_tests_oracle"


@dataclass
class Entry:
    """One token in the cache of one kv head."""

    key: Tensor  # (d,), not rotated
    value: Tensor
    position: int  # in the text
    place: int  # what its key is rotated by
    flagged: bool = False  # only the token itself sees it
    score: float = 0.0  # for rules that give a token its score once
    surprisal: float = 0.0  # -log p(token | all before), by the model that evicts; infinite for a row's first token


@dataclass(frozen=True)
class Moment:
    """Where a row stands at the end of a part."""

    part: str  # what `Rule.cut` called it; "decode" for a generated token
    seen: int  # tokens of the row so far, this part's too
    total: int  # the same at the end of the current prompt; while decoding as `seen`
    prompt: int  # tokens of the last prompt
    first: bool  # that was the row's first prompt
    generated: int  # tokens since that prompt
    layers: int
    first_prompt: int = 0  # tokens of the row's first prompt


@dataclass
class Layer:
    """What a rule sees of one layer."""

    index: int
    heads: list[list[Entry]]  # kv head -> entries with the new ones, oldest first
    theta: float
    # query head -> position of the query -> position of the key -> softmax weight; of all queries so far
    attention: list[dict[int, dict[int, float]]]
    inputs: list[Tensor] = field(default_factory=list)  # token -> what the projections read; all tokens so far
    queries: list[Tensor] = field(default_factory=list)  # query head -> (T, d), not rotated; tokens of this part
    rotated_queries: dict[int, list[Tensor]] = field(default_factory=dict)  # query head -> of all tokens; rules keep it
    projected: Tensor = field(default_factory=lambda: torch.zeros(0))  # [q | k | v] (T, ...) of this part
    output: Tensor = field(default_factory=lambda: torch.zeros(0))  # the output projection's weight (hidden, heads * d)
    head_slots: list[int] | None = None  # budgets of the heads as the last prompt left them
    counted_from: int = 0  # queries before this position don't count any more
    longest: int = 0  # slots of the longest head of any layer, with this part's tokens
    row_place: int = 0  # what this part's first key is rotated by where heads are as long as that one
    away: list[list[Entry]] = field(default_factory=list)  # kv head -> what left the cache for a memory; rules keep it
    marks: list[list[Tensor]] = field(
        default_factory=list
    )  # block of it -> kv head -> what it is found by; rules keep it
    found: list[int] = field(default_factory=list)  # the blocks that were found last; rules keep it

    def group(self, head: int) -> range:
        """The query heads of a kv head."""
        size = len(self.attention) // len(self.heads)
        return range(head * size, (head + 1) * size)

    def received(self, head: int, j: int, queries: range) -> float:
        """Attention that the token at j got from the queries at these positions, summed over the group."""
        return sum(self.attention[g][i].get(j, 0.0) for g in self.group(head) for i in queries)

    def rotated(self, entry: Entry) -> Tensor:
        """The key as attention uses it."""
        return rotate(entry.key[None], [entry.place], self.theta)[0]


class Rule:
    """How a policy cuts a prompt and what it keeps. This one keeps everything, at original positions."""

    contiguous = False

    def cut(self, length: int) -> list[tuple[int, str]]:
        """Lengths of the parts of a prompt, each with a word that `keep` understands."""
        return [(length, "prompt")]

    def turn(self, layer: Layer) -> None:
        """What happens to a filled cache before a further prompt."""

    def flags(self, layer: Layer, moment: Moment) -> list[list[bool]] | None:
        """kv head -> new token -> whether only itself may see it; before attention."""
        return None

    def beside(self, layer: Layer, head: int) -> tuple[list[Entry], int | None]:
        """What queries see beside the cache, all of it before them: entries, and at what distance, None: where they were."""
        return [], None

    def arrive(self, layer: Layer, count: int) -> None:
        """After attention, `count` new entries at the end of each head."""

    def keep(self, layer: Layer, moment: Moment) -> list[list[Entry]]:
        """kv head -> what stays after a part, in order."""
        return layer.heads

    def keep_all(self, layers: list[Layer], moment: Moment) -> list[list[list[Entry]]]:
        """layer -> what `keep` says; for rules under which layers compete."""
        return [self.keep(layer, moment) for layer in layers]

    def repetition(self, ids: list[int]) -> list[tuple[list[int], range]]:
        """What is read again once the first prompt `ids` is through, and which places of it that repeats; nothing of it
        stays. `keep_all` is asked with the part "again" afterwards."""
        return []

    def look(self, layer: Layer, places: range, queries: range) -> None:
        """After such a part, whose queries stand at these positions and are still in `layer`."""

    def renews(self, part: str, after: str) -> bool:
        """Contiguous: whether the cache is re-ranked 0..n-1 before this part; `after` is the part before."""
        return True


def pieces(length: int, size: int | None) -> list[int]:
    """length = size + size + ... + rest."""
    size = size or length
    return [min(size, length - at) for at in range(0, length, size)]


def rotate(x: Tensor, places: list[int], theta: float) -> Tensor:
    """RoPE of vectors (N, d), channel i paired with channel i + d / 2."""
    half = x.shape[1] // 2
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.tensor(places, dtype=torch.float64)[:, None] * frequency
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)


class Oracle:
    """One request of one row. `prompt` and `decode` return the logits of the tokens given, (T, vocabulary)."""

    def __init__(self, model: nn.Module, rule: Rule):
        self.model, self.rule = model, rule
        self.config: Any = model.config
        assert self.config.rope_parameters["rope_type"] == "default"
        self.theta = float(self.config.rope_parameters["rope_theta"])
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.layers = [
            Layer(i, [[] for _ in range(kv_heads)], self.theta, [{} for _ in range(heads)])
            for i in range(self.config.num_hidden_layers)
        ]
        for layer, module in zip(self.layers, model.model.layers, strict=True):  # type: ignore[arg-type, union-attr]
            layer.output = module.self_attn.o_proj.weight.detach().double()  # type: ignore[union-attr]
        self.seen = self.total = self.last_prompt = self.generated = 0
        self.first, self.first_prompt = True, 0
        self.part = self.after = ""
        self.raw: dict[tuple[int, str], Tensor] = {}
        self.places: dict[tuple[int, int], int] = {}  # of the next token, by layer and head
        self.row_place = 0  # of the next token, where heads are as long as the longest
        self.last_logits: Tensor | None = None

    def prompt(self, ids: list[int]) -> Tensor:
        """One call with several tokens, cut as the policy does."""
        self.first = self.seen == 0
        if not self.first:
            for layer in self.layers:
                self.rule.turn(layer)
        else:
            self.first_prompt = len(ids)
        self.total, self.last_prompt, self.generated = self.seen + len(ids), len(ids), 0
        out, at = [], 0
        for length, part in self.rule.cut(len(ids)):
            out.append(self._part(ids[at : at + length], part))
            at += length
        assert at == len(ids)
        if self.first and (parts := self.rule.repetition(ids)):
            self._repeat(parts)
        return torch.cat(out)

    def _repeat(self, parts: list[tuple[list[int], range]]) -> None:
        self.part = "again"
        for ids, places in parts:
            kept = [len(layer.inputs) for layer in self.layers], dict(self.places)
            self._forward(ids)
            queries = range(self.seen, self.seen + len(ids))
            for layer, inputs in zip(self.layers, kept[0]):
                self.rule.look(layer, places, queries)
                del layer.inputs[inputs:]
                for head in layer.heads:
                    del head[-len(ids) :]
                for weights in layer.attention:
                    for i in queries:
                        del weights[i]
            self.places = kept[1]
        for layer, heads in zip(self.layers, self.rule.keep_all(self.layers, self._moment(0)), strict=True):
            layer.heads = heads

    def decode(self, token: int) -> Tensor:
        """One generated token."""
        self.total += 1
        self.generated += 1
        return self._part([token], "decode")

    def kept(self) -> dict[int, list[list[int]]]:
        """layer -> kv head -> positions that are kept."""
        return {layer.index: [[e.position for e in head] for head in layer.heads] for layer in self.layers}

    # -- inside
    def _moment(self, count: int) -> Moment:
        return Moment(
            part=self.part,
            seen=self.seen + count,
            total=self.total,
            prompt=self.last_prompt,
            first=self.first,
            generated=self.generated,
            layers=len(self.layers),
            first_prompt=self.first_prompt,
        )

    def _part(self, ids: list[int], part: str) -> Tensor:
        self.part = part
        logits = self._forward(ids)
        before = self.last_logits
        for t, token in enumerate(ids):
            surprisal = float("inf")
            if before is not None:
                surprisal = -float(torch.log_softmax(before.double(), dim=0)[token])
            before = logits[t]
            for layer in self.layers:
                for head in layer.heads:
                    head[len(head) - len(ids) + t].surprisal = surprisal
        self.last_logits = before
        moment = self._moment(len(ids))
        for layer, heads in zip(self.layers, self.rule.keep_all(self.layers, moment), strict=True):
            layer.heads = heads
        self.seen += len(ids)
        self.after = part
        return logits

    def _forward(self, ids: list[int]) -> Tensor:
        """The model with this file's attention; new entries are appended to the caches."""
        attention, hooks = self.config._attn_implementation, []
        longest = max(len(head) for layer in self.layers for head in layer.heads)
        if self.rule.contiguous and self.rule.renews(self.part, self.after):
            self.row_place = longest
        for layer in self.layers:
            layer.longest = longest + len(ids)
            layer.row_place = self.row_place if self.rule.contiguous else self.seen
        self.row_place += len(ids)
        for i, layer in enumerate(self.model.model.layers):  # type: ignore[union-attr, arg-type]
            for name in ("q_proj", "k_proj", "v_proj"):
                hooks.append(getattr(layer.self_attn, name).register_forward_hook(self._remember(i, name)))
        AttentionInterface.register(ATTENTION, self._attention)
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
        self.config._attn_implementation = ATTENTION
        try:
            with torch.no_grad():
                # At position 0 the model's own rotation is the identity.
                zeros = torch.zeros(1, len(ids), dtype=torch.long)
                return self.model(torch.tensor([ids]), position_ids=zeros, use_cache=False).logits[0]
        finally:
            self.config._attn_implementation = attention
            AttentionInterface._global_mapping.pop(ATTENTION)
            AttentionMaskInterface._global_mapping.pop(ATTENTION)
            for hook in hooks:
                hook.remove()

    def _remember(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.raw[layer, name] = output[0].double()
            self.raw[layer, "input"] = args[0][0].double()

        return hook

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = self.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        _, heads, count, _ = query.shape
        layer.queries = [query[0, g].double() for g in range(heads)]
        layer.projected = torch.cat([self.raw[layer.index, f"{n}_proj"] for n in "qkv"], dim=-1)
        layer.inputs.extend(self.raw[layer.index, "input"])
        flags = self.rule.flags(layer, self._moment(count))
        out = torch.zeros(count, heads, value.shape[-1], dtype=torch.float64)
        for h, entries in enumerate(layer.heads):
            if self.rule.contiguous and self.rule.renews(self.part, self.after):
                for rank, entry in enumerate(entries):
                    entry.place = rank
            following = self._following(layer, h)
            for t in range(count):
                k, v = key[0, h, t].double(), value[0, h, t].double()
                entries.append(Entry(k, v, self.seen + t, following + t, flags is not None and flags[h][t]))
            self.places[layer.index, h] = following + count
            keys = rotate(torch.stack([e.key for e in entries]), [e.place for e in entries], self.theta)
            values = torch.stack([e.value for e in entries])
            visible = [
                [n for n, e in enumerate(entries) if e.position <= i and (not e.flagged or e.position == i)]
                for i in range(self.seen, self.seen + count)
            ]
            seen = torch.zeros(count, len(entries), dtype=torch.bool)
            for t, mine in enumerate(visible):
                seen[t, mine] = True
            far, distance = self.rule.beside(layer, h)
            for g in layer.group(h):
                queries = rotate(layer.queries[g], [following + t for t in range(count)], self.theta)
                logits = (queries @ keys.T * scaling).masked_fill(~seen, -math.inf)
                if far:
                    places = [e.position if distance is None else 0 for e in far]
                    far_keys = rotate(torch.stack([e.key for e in far]), places, self.theta)
                    asking = queries if distance is None else rotate(layer.queries[g], [distance] * count, self.theta)
                    logits = torch.cat([logits, asking @ far_keys.T * scaling], 1)
                weights = torch.softmax(logits, dim=1)
                out[:, g] = weights @ torch.cat([values, *([torch.stack([e.value for e in far])] if far else [])])
                for t, row in enumerate(weights.tolist()):
                    layer.attention[g][self.seen + t] = {entries[n].position: row[n] for n in visible[t]}
        self.rule.arrive(layer, count)
        return out.to(query.dtype)[None], None

    def _following(self, layer: Layer, head: int) -> int:
        """What the next token is rotated by. With frozen ranks it follows the last one, even where that is gone."""
        if not self.rule.contiguous:
            return self.seen
        if self.rule.renews(self.part, self.after):
            return len(layer.heads[head])
        return self.places[layer.index, head]
