"""Records which positions kvpress keeps with newer presses, for tests/policies/test_kvpress.py. README.md says in which
environment. The prompts are those of tests/data/kvpress.json, so that file must be there.

Presses that draw from torch's generator get the hashed sketch of tests/support/oracle_newer.py instead.

    python -m tests.peers.record_newer [--out tests/data/kvpress_newer.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    CompactorPress,
    CriticalKVPress,
    FinchPress,
    LagKVPress,
    LeverageScorePress,
    NonCausalAttnPress,
    QFilterPress,
    SnapKVPress,
)
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import record_kvpress as record
from learned_heads import qfilters
from tiny_llama import fingerprint, prompt, tiny_llama

from tests.support.oracle_newer import sketch

DATA = Path(__file__).parents[1] / "data"


def finch(ratio: float, **options: Any) -> FinchPress:
    """FINCH with a question of four tokens, without a delimiter that marks it."""
    press = FinchPress(ratio, **options)
    press.window_size, press.delimiter_token_id = 4, -1
    return press


def qfilter(ratio: float) -> QFilterPress:
    """Q-Filters that need no network."""
    press = QFilterPress(ratio)
    press.q_filters = qfilters()
    press.post_init_from_model = lambda model: None
    return press


PRESSES: dict[str, Any] = {
    "finch rerotated": finch,
    "finch": lambda r: finch(r, rerotate_keys=False),
    "finch plain": lambda r: finch(r, rerotate_keys=False, normalize_scores=False),
    "lagkv": lambda r: LagKVPress(r, n_sink=2, lag_size=5, cross_scoring=True),
    "leverage": lambda r: LeverageScorePress(r, sketch_dimension=6),
    "non_causal_attn": lambda r: NonCausalAttnPress(r, chunk_size=4),
    "compactor": lambda r: CompactorPress(
        r, sink_size_start=3, sink_size_end=1, chunk_size=4, sketch_dimension=6, blending=0.5
    ),
    "qfilters": qfilter,
    "criticalkv": lambda r: CriticalKVPress(SnapKVPress(r, window_size=2, kernel_size=3)),
    "criticalkv late": lambda r: CriticalKVPress(
        SnapKVPress(r, window_size=1, kernel_size=1), epsilon=0.01, first_stage_ratio=0.4
    ),
}


class Recorder(record.Recorder):
    """Says which layer asks for random numbers, and answers."""

    def __init__(self, model: Any, press: Any, rotary_follows_cache: bool):
        super().__init__(model, press, rotary_follows_cache)
        self.layer, score = -1, press.score

        def telling(module: Any, *args: Any, **kwargs: Any) -> Tensor:
            self.layer = module.layer_idx
            found: Tensor = score(module, *args, **kwargs)
            return found

        press.score = telling

    def randn(self, *shape: int, **options: Any) -> Tensor:
        """In place of torch.randn: a sketch (1, kv heads, D, size)."""
        assert shape[0] == 1
        return torch.stack([torch.tensor(sketch(0, self.layer, h, *shape[2:])) for h in range(shape[1])])[None].float()


def run(model: Any, name: str, ratio: float, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The record of one press on one prompt; None where equal scores decide."""
    press, ids = PRESSES[name](ratio), torch.tensor([entry["ids"]])
    recorder = Recorder(model, press, rotary_follows_cache="rerotated" in name)
    real, torch.randn = torch.randn, recorder.randn  # type: ignore[assignment]
    try:
        with press(model):
            recorder.forward(ids[:, : entry["length"]])
    finally:
        torch.randn = real
    return {"kept": recorder.kept()} if recorder.margin() > record.MARGIN else None


def main() -> None:
    """Writes the recording."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=DATA / "kvpress_newer.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    model, prompts = tiny_llama("sdpa"), []
    for entry in json.loads((DATA / "kvpress.json").read_text())["prompts"]:
        assert prompt(entry["length"], entry["seed"])[0].tolist() == entry["ids"]
        presses = {name: {str(r): run(model, name, r, entry) for r in record.RATIOS} for name in PRESSES}
        prompts.append({"length": entry["length"], "presses": presses})
    versions = {"kvpress": version("kvpress"), "transformers": version("transformers"), "torch": torch.__version__}
    found = {"versions": versions, "model": fingerprint(model), "prompts": prompts}
    out.write_text(json.dumps(found, separators=(",", ":")).replace('{"length"', '\n{"length"') + "\n")


if __name__ == "__main__":
    main()
