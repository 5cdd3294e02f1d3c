"""Tables for people: equal layers share a line, and 80 columns are enough."""

from __future__ import annotations

import io
import re

from rich.console import Console

from kvrewrite.ir.site import AttentionSite
from kvrewrite.tools.tables import sites_table


def site(layer: int, **settings: object) -> AttentionSite:
    facts = {"heads": 32, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "scale": 0.088388, "source": "interface"}
    return AttentionSite(**{"layer": layer, "module": f"model.layers.{layer}.self_attn", **facts, **settings})


def printed(sites: list[AttentionSite], width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(sites_table(sites))
    return file.getvalue()


def test_equal_layers_share_a_line() -> None:
    text = printed([site(i, rope=True, inserted=["cached_attention", "h2o"]) for i in range(32)])
    assert "0-31: the same" in text
    assert "module: model.layers.*.self_attn" in text and "inserted: cached_attention, h2o" in text
    assert text.count("cached_attention") == 1
    assert len(text.splitlines()) < 12


def test_layers_that_differ_are_apart() -> None:
    """As in models with a window in most layers, or with layers that borrow keys."""
    sites = [site(i, rope=True, window=0 if i % 6 == 5 else 4096) for i in range(12)]
    sites[11] = site(11, rope=True, shares_kv_with=5, softcap=50.0, sinks=True, latent=512, latent_rotary=64)
    text = printed(sites)
    assert max(map(len, text.splitlines())) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    layers, masks = " ".join(row[0] for row in cells), " ".join(row[4] for row in cells)
    assert re.sub(r"\s+", " ", layers).strip() == "0-4, 6-10: the same 5 11"
    assert re.sub(r"\s+", " ", masks).split() == ["sliding", "4096", "causal", "causal"]
    more = re.sub(r"\s+", " ", " ".join(row[-1] for row in cells))
    for said in ("softcap: 50", "attention sinks", "latent: 512 + 64", "keys and values of layer 5"):
        assert said in more, said


def test_nothing_is_cut_in_a_narrow_terminal() -> None:
    text = printed([site(i, alibi=True, rope=i == 1, v_head_dim=64) for i in range(2)], width=60)
    assert "…" not in text and max(map(len, text.splitlines())) <= 60
