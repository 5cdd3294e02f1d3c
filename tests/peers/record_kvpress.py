"""Records which positions kvpress keeps, for tests/policies/test_kvpress.py. README.md says in which environment.

The peer is left as it is. A hook on every v_proj remembers the value vectors of all tokens that went through, and what is
kept is found by looking for the rows of the cache among them (bit by bit: a press only gathers rows). Presses that mask
instead of dropping say themselves what they mask.

    python tests/peers/record_kvpress.py [--out tests/data/kvpress.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from kvpress import (
    AdaKVPress,
    BlockPress,
    DecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    ObservedAttentionPress,
    PrefillDecodingPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))
from tiny_llama import CONTINUATION, LENGTHS, fingerprint, prompt, tiny_llama

RATIOS = (0.3, 0.5, 0.75)  # of a prompt's tokens, removed
LOGITS_RATIO = 0.5  # at which logits of the next tokens are recorded
LOGITS_TOKENS, LOGITS_WIDTH = 2, 24
MARGIN = 2e-5  # between the worst score kept and the best one dropped, relative: fp32 must not decide

EXPECTED = {"n_future_positions": 16, "n_sink": 4}
SNAPKV = {"window_size": 4, "kernel_size": 5}

Make = Callable[[float], Any]
# name -> (press at a compression ratio, options for the record)
PRESSES: dict[str, tuple[Make, dict[str, Any]]] = {}


def case(name: str, make: Make, **options: Any) -> None:
    """Adds a press to the table."""
    PRESSES[name] = (make, options)


case("streaming_llm", lambda r: StreamingLLMPress(r, n_sink=4), n_sink=4)
case("streaming_llm rerotated", lambda r: KeyRerotationPress(StreamingLLMPress(r, n_sink=4)), n_sink=4)
case("snapkv", lambda r: SnapKVPress(r, **SNAPKV), **SNAPKV)
case("snapkv narrow", lambda r: SnapKVPress(r, window_size=5, kernel_size=1), window_size=5, kernel_size=1)
case("snapkv eager", lambda r: SnapKVPress(r, **SNAPKV), **SNAPKV)
case("snapkv rerotated", lambda r: KeyRerotationPress(SnapKVPress(r, **SNAPKV)), **SNAPKV)
case("tova", lambda r: TOVAPress(r))
case("knorm", lambda r: KnormPress(r))
case("keydiff", lambda r: KeyDiffPress(r))
case("keydiff in blocks", lambda r: BlockPress(KeyDiffPress(r), block_size=8), block_size=8)
case("expected_attention", lambda r: ExpectedAttentionPress(r, **EXPECTED), **EXPECTED)
case(
    "expected_attention epsilon",
    lambda r: ExpectedAttentionPress(r, **EXPECTED, epsilon=0.02),
    **EXPECTED,
    epsilon=0.02,
)
case(
    "expected_attention no covariance",
    lambda r: ExpectedAttentionPress(r, **EXPECTED, use_covariance=False),
    **EXPECTED,
    use_covariance=False,
)
case(
    "expected_attention no values",
    lambda r: ExpectedAttentionPress(r, **EXPECTED, use_vnorm=False),
    **EXPECTED,
    use_vnorm=False,
)
case("pyramidkv", lambda r: PyramidKVPress(r, **SNAPKV, beta=4), **SNAPKV, beta=4)
case("pyramidkv steep", lambda r: PyramidKVPress(r, **SNAPKV, beta=20), **SNAPKV, beta=20)
case("observed_attention eager", lambda r: ObservedAttentionPress(r))
for floor in (0.0, 0.2, 0.88):
    case(
        f"adakv snapkv {floor}",
        lambda r, floor=floor: AdaKVPress(SnapKVPress(r, **SNAPKV), alpha_safeguard=floor),
        **SNAPKV,
        alpha_safeguard=floor,
    )
case("adakv knorm 0.0", lambda r: AdaKVPress(KnormPress(r), alpha_safeguard=0.0), alpha_safeguard=0.0)
case("adakv knorm 0.88", lambda r: AdaKVPress(KnormPress(r), alpha_safeguard=0.88), alpha_safeguard=0.88)
case(
    "adakv expected_attention 0.0",
    lambda r: AdaKVPress(ExpectedAttentionPress(r, **EXPECTED), alpha_safeguard=0.0),
    **EXPECTED,
    alpha_safeguard=0.0,
)

# Presses that go on while decoding, one token at a time, at the size that the prompt was cut to.
DECODING: dict[str, Make] = {
    "streaming_llm": lambda r: StreamingLLMPress(r, n_sink=4),
    "tova": lambda r: TOVAPress(r),
    "knorm": lambda r: KnormPress(r),
    "keydiff": lambda r: KeyDiffPress(r),
}


class Recorder:
    """One request: a prompt, then single tokens. kept: (layer, kv head) -> positions."""

    def __init__(self, model: Any, press: Any, rotary_follows_cache: bool):
        self.model, self.press, self.rotary_follows_cache = model, press, rotary_follows_cache
        self.cache = DynamicCache()
        self.layers = model.model.layers
        self.values: list[list[Tensor]] = [[] for _ in self.layers]  # of every token, (kv heads, T, head dim)
        self.scores: list[list[Tensor]] = [[] for _ in self.layers]
        self.seen = 0
        inner = press
        while not hasattr(inner, "score"):
            inner = getattr(inner, "prefilling_press", None) or inner.press
        score = inner.score

        def remembering(module: Any, *args: Any, **kwargs: Any) -> Tensor:
            found = score(module, *args, **kwargs)
            self.scores[module.layer_idx].append(found[0].clone())
            return found

        inner.score = remembering

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of `ids` (1, T): (T, vocabulary)."""
        start = self.seen
        if self.rotary_follows_cache and start:
            start = self.cache.get_seq_length()
        hooks = [layer.self_attn.v_proj.register_forward_hook(self._remember(i)) for i, layer in enumerate(self.layers)]
        try:
            with torch.no_grad():
                positions = torch.arange(start, start + ids.shape[1])[None]
                logits = self.model(ids, past_key_values=self.cache, position_ids=positions).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        self.seen += ids.shape[1]
        return logits

    def _remember(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            self.values[layer].append(output[0].view(output.shape[1], -1, self.model.config.head_dim).transpose(0, 1))

        return hook

    def order(self) -> list[list[list[int]]]:
        """layer -> kv head -> positions in the order of the cache."""
        heads = range(self.model.config.num_key_value_heads)
        return [[self._head(i, h) for h in heads] for i in range(len(self.layers))]

    def kept(self) -> list[list[list[int]]]:
        """layer -> kv head -> sorted positions."""
        return [[sorted(head) for head in layer] for layer in self.order()]

    def _head(self, layer: int, head: int) -> list[int]:
        cached = self.cache.layers[layer].values[0, head]
        everything = torch.cat(self.values[layer], 1)[head]
        same = (cached[:, None] == everything[None]).all(-1)
        assert (same.sum(1) == 1).all(), "a cached row is not the value of exactly one token"
        positions = same.int().argmax(1).tolist()
        masked = getattr(self.layers[layer].self_attn, "masked_key_indices", None)
        gone: set[int] = set()
        if masked is not None:
            _, heads, places = masked
            gone = set(places[heads == head].tolist())
        return [p for i, p in enumerate(positions) if i not in gone]

    def margin(self) -> float:
        """How far apart the worst score kept and the best one dropped are, relative; least of all decisions."""
        if "StreamingLLM" in repr(self.press):
            return 1.0  # scores are 0 and 1
        least = 1.0
        for layer, kept in enumerate(self.kept()):
            for scores in self.scores[layer]:
                for head, positions in enumerate(kept):
                    ranked = scores[head].double().sort(descending=True).values
                    least = min(least, relative(ranked, len(positions)))
                if len({len(p) for p in kept}) > 1:
                    flat = scores.double().flatten().sort(descending=True).values
                    least = min(least, relative(flat, sum(len(p) for p in kept)))
        return least


def relative(ranked: Tensor, count: int) -> float:
    """Distance of ranked[count - 1] and ranked[count] over the size of the former."""
    if not 0 < count < len(ranked):
        return 1.0
    return float((ranked[count - 1] - ranked[count]) / ranked[count - 1].abs())


def run(models: dict[str, Any], name: str, make: Make, ratio: float, ids: Tensor, length: int) -> tuple[dict, float]:
    """The record of one press on one prompt, and its margin."""
    model = models["eager" if "eager" in name else "sdpa"]
    press = make(ratio)
    recorder = Recorder(model, press, rotary_follows_cache="rerotated" in name)
    with press(model):
        recorder.forward(ids[:, :length])
    record: dict[str, Any] = {"kept": recorder.kept()}
    margin = recorder.margin()
    if ratio == LOGITS_RATIO:
        following = [recorder.forward(ids[:, length + t : length + t + 1])[0] for t in range(LOGITS_TOKENS)]
        record["logits"] = [[float(f"{x:.6g}") for x in row[:LOGITS_WIDTH].tolist()] for row in following]
    return record, margin


def run_decoding(model: Any, make: Make, ratio: float, ids: Tensor, length: int) -> tuple[dict, float]:
    """The cache after the prompt and after every generated token, in its own order (which StreamingLLMPress goes by)."""
    press = make(ratio)
    target = max(1, int(length * (1 - ratio)))
    whole = PrefillDecodingPress(press, DecodingPress(press, compression_interval=1, target_size=target))
    recorder = Recorder(model, whole, rotary_follows_cache=False)
    steps, least = [], 1.0
    with whole(model):
        recorder.forward(ids[:, :length])
        steps.append(recorder.order())
        for t in range(CONTINUATION):
            recorder.forward(ids[:, length + t : length + t + 1])
            steps.append(recorder.order())
            least = min(least, recorder.margin())
    return {"order": steps}, least


def record_prompt(models: dict[str, Any], length: int, seed: int) -> tuple[dict[str, Any], float]:
    """Everything about one prompt, and the least margin in it."""
    ids, least = prompt(length, seed), 1.0
    found: dict[str, Any] = {"length": length, "seed": seed, "ids": ids[0].tolist(), "presses": {}, "decoding": {}}
    with torch.no_grad():
        logits = models["sdpa"](ids[:, :length], use_cache=False).logits[0, -1]
    found["logits"] = [float(f"{x:.6g}") for x in logits[:LOGITS_WIDTH].tolist()]
    for name, (make, _) in PRESSES.items():
        found["presses"][name] = {}
        for ratio in (*RATIOS, 0.9) if name == "knorm" else RATIOS:
            found["presses"][name][str(ratio)], margin = run(models, name, make, ratio, ids, length)
            least = min(least, margin)
    for name, make in DECODING.items():
        found["decoding"][name] = {}
        found["decoding"][name]["0.5"], margin = run_decoding(models["sdpa"], make, 0.5, ids, length)
        least = min(least, margin)
    return found, least


def main() -> None:
    """Writes the recording."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data" / "kvpress.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    models = {a: tiny_llama(a) for a in ("sdpa", "eager")}
    prompts = []
    for length in LENGTHS:
        for seed in range(length * 100, length * 100 + 100):
            found, margin = record_prompt(models, length, seed)
            print(f"{length} tokens, seed {seed}: least margin {margin:.1e}")
            if margin > MARGIN:
                break
        else:
            raise SystemExit(f"no prompt of {length} tokens whose decisions are clear")
        prompts.append({**found, "margin": margin})
    record = {
        "command": "python tests/peers/record_kvpress.py",
        "versions": {
            "python": platform.python_version(),
            "kvpress": version("kvpress"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "model": fingerprint(models["sdpa"]),
        "options": {name: options for name, (_, options) in PRESSES.items()},
        "prompts": prompts,
    }
    out.write_text(json.dumps(record, separators=(",", ":")).replace('{"length"', '\n{"length"') + "\n")
    print(f"{out}: {out.stat().st_size} bytes, kvpress {kvpress.__name__} {version('kvpress')}")


if __name__ == "__main__":
    main()
