"""Records which positions kvpress keeps with trained heads, for tests/policies/test_kvpress.py. README.md names the environment.

All three presses only mask: what is kept is what they do not mask. They load their heads from the network by the model's
name; here they get those of learned_heads.py.

    python tests/peers/record_learned.py [--out tests/data/kvpress_learned.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from kvpress import DMSPress, DuoAttentionPress, FastKVzipPress, KVzapPress
from kvpress.presses.fastkvzip_press import FastKVzipGate
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))
import learned_heads as heads
from tiny_llama import CONTINUATION, LENGTHS, fingerprint, prompt, tiny_llama

RATIOS = (0.25, 0.5, 0.75)  # of the slots, removed
MARGIN = 2e-5  # of scores to what decides about them: fp32 must not decide
LOGITS_WIDTH = 8


def kvzap(kind: str, decoding: bool) -> DMSPress:
    """KVzap under DMS."""
    press = KVzapPress(model_type=kind)
    config = KVzapConfig(
        input_dim=heads.HIDDEN, output_dim=heads.KV_HEADS, n_modules=heads.LAYERS,
        hidden_dim=heads.WIDTH if kind == "mlp" else None,
    )  # fmt: skip
    press.kvzap_model = KVzapModel(config)
    press.kvzap_model.load_state_dict(heads.kvzap(kind))
    press.kvzap_model_name = f"nvidia/KVzap-{kind}-"  # so that it is not fetched
    return DMSPress(press, threshold=heads.THRESHOLD, sliding_window_size=heads.WINDOW, decoding=decoding)


def fast_kvzip(ratio: float, layerwise: bool) -> FastKVzipPress:
    """Fast KVzip with given gates."""
    press = FastKVzipPress(compression_ratio=ratio, layerwise=layerwise, **heads.FAST)
    press.gates = []
    for i, weights in enumerate(heads.fast_kvzip()):
        gate = FastKVzipGate(
            i, heads.HIDDEN, heads.KV_HEADS, heads.HEADS // heads.KV_HEADS, torch.float32, heads.RANK, heads.SINKS
        )
        gate.load_state_dict(weights)
        press.gates.append(gate)
    return press


def duo(ratio: float) -> DuoAttentionPress:
    """DuoAttention with a given pattern."""
    press = DuoAttentionPress(head_compression_ratio=ratio)
    alpha = np.clip(np.array(heads.ALPHA), 0, 1)
    press.load_attention_pattern = lambda model: (heads.DUO_SINK, heads.DUO_RECENT, alpha)
    return press


def kept(model: Any, length: int) -> list[list[list[int]]]:
    """layer -> kv head -> positions that are not masked."""
    found = []
    for layer in model.model.layers:
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        gone: list[set[int]] = [set() for _ in range(heads.KV_HEADS)]
        if masked is not None:
            for h, p in zip(masked[1].tolist(), masked[2].tolist()):
                gone[h].add(p)
        found.append([[p for p in range(length) if p not in gone[h]] for h in range(heads.KV_HEADS)])
    return found


def run(model: Any, press: Any, ids: Tensor, length: int) -> list[dict[str, Any]]:
    """After the prompt and after each following token: what is kept; logits of the last token."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    cache, steps = DynamicCache(), []
    decodes = getattr(press, "decoding", False)

    def forward(begin: int, end: int) -> None:
        logits = model(ids[:, begin:end], past_key_values=cache).logits[0, -1]
        steps.append({"logits": [float(f"{x:.6g}") for x in logits[:LOGITS_WIDTH].tolist()]})
        steps[-1]["kept"] = kept(model, end)

    with torch.no_grad():
        with press(model):
            forward(0, length)
            for t in range(CONTINUATION if decodes else 0):
                forward(length + t, length + t + 1)
        if not decodes:  # Fast KVzip's press compresses when its context ends
            steps[-1]["kept"] = kept(model, length)
            forward(length, length + 1)
    return steps


class Margins:
    """The least distance of any score to what decides, over a recording."""

    def __init__(self) -> None:
        self.least = 1.0

    def see_kvzap(self, press: DMSPress) -> DMSPress:
        score = press.press.score

        def remembering(*args: Any, **kwargs: Any) -> Tensor:
            found = score(*args, **kwargs)
            self.least = min(self.least, float((found - press.threshold).abs().min()))
            return found

        press.press.score = remembering
        return press

    def see_fast(self, press: FastKVzipPress) -> None:
        scores, layers = press.score_val, len(press.score_val)
        groups = scores.reshape(layers, -1) if press.layerwise else scores.reshape(1, -1)
        for group in groups.double():
            ranked = group.sort().values
            count = int(len(ranked) * press.compression_ratio)
            self.least = min(self.least, float(ranked[count] - ranked[count - 1]))


def record(model: Any, length: int, seed: int) -> tuple[dict[str, Any], float]:
    """Everything about one prompt, and the least margin in it."""
    ids, margins = prompt(length, seed), Margins()
    presses: dict[str, Any] = {}
    for kind in ("mlp", "linear"):
        for decoding in (True, False):
            press = margins.see_kvzap(kvzap(kind, decoding))
            presses[f"kvzap {kind}" + ("" if decoding else ", prompt only")] = run(model, press, ids, length)
    for ratio in RATIOS:
        if (length * ratio) % 1 == 0:  # so that both sides keep as many
            for layerwise in (False, True):
                press = fast_kvzip(ratio, layerwise)
                presses[f"fast_kvzip {ratio}" + (", layerwise" if layerwise else "")] = run(model, press, ids, length)
                margins.see_fast(press)
    for ratio in (1 / 3, 0.5, 1.0):
        presses[f"duo_attention {ratio:.2f}"] = run(model, duo(ratio), ids, length)
    return {"length": length, "seed": seed, "ids": ids[0].tolist(), "presses": presses}, margins.least


def main() -> None:
    """Writes the recording."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data" / "kvpress_learned.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    model, prompts = tiny_llama("sdpa"), []
    for length in LENGTHS:
        for seed in range(length * 100, length * 100 + 100):
            found, margin = record(model, length, seed)
            print(f"{length} tokens, seed {seed}: least margin {margin:.1e}")
            if margin > MARGIN:
                break
        else:
            raise SystemExit(f"no prompt of {length} tokens whose decisions are clear")
        prompts.append({**found, "margin": margin})
    result = {
        "command": "python tests/peers/record_learned.py",
        "versions": {
            "python": platform.python_version(), "kvpress": version("kvpress"), "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "model": fingerprint(model),
        "prompts": prompts,
    }  # fmt: skip
    out.write_text(json.dumps(result, separators=(",", ":")).replace('{"length"', '\n{"length"') + "\n")
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
