"""The report page of `kvrewrite eval`: escaped, whole in itself, with what the cells and caches say."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from kvrewrite.cli import app as cli
from kvrewrite.tools.evaluation import cells, kept
from kvrewrite.tools.evaluation.page import page, png
from kvrewrite.tools.subjects import Arm, PolicySpec, Source
from tests.support.tiny import TEXT, make_checkpoint

pytestmark = pytest.mark.xdist_group("eval")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    make_checkpoint(folder / "<b>base")
    data, out, html = folder / "rows.jsonl", folder / "out.json", folder / "report.html"
    data.write_text("".join(json.dumps({"text": f"<script>alert({i})</script> & {TEXT}"}) + "\n" for i in range(3)))
    arguments = (
        f"-t lm --tokens 64 --samples 3 --check off -p h2o -p streaming_llm -b 16 -b 32 --data {data} --out {out}"
    )
    done = CliRunner().invoke(cli.main, ["eval", str(folder / "<b>base"), *arguments.split(), "--html", str(html)])
    assert done.exit_code == 0, done.output
    return cells.read_results(out), html.read_text(), folder


class Checked(HTMLParser):
    """Counts tags and keeps text; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_escaped(results):
    data, text, _ = results
    found = Checked(text)
    assert not found.open
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "b", "iframe"}
    for tag, attributes in found.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    assert "<script>alert(0)</script> & The quick" in "".join(found.texts)
    assert text.count("<tr>") == 1 + len(data["cells"])
    full = next(c for c in data["cells"] if c["mode"] == "full")
    assert f"{full['nll']['mean']:.3f}" in "".join(found.texts)
    circles = [a for tag, a in found.tags if tag == "circle"]
    assert len(circles) == 4  # two policies at two budgets
    assert "h2o" in found.texts and "full cache" in found.texts


def test_heat_maps_are_what_caches_keep(results):
    data, text, folder = results
    source = Source(folder / "<b>base", check="off")
    ids = source.tokenizer(json.loads((folder / "rows.jsonl").read_text().splitlines()[0])["text"])["input_ids"][:64]
    assert "".join(data["kept"]["pieces"]) == source.tokenizer.decode(ids) and len(data["kept"]["pieces"]) == 64
    rows = {(row["label"], row["budget"]): row["heads"] for row in data["kept"]["rows"]}
    assert set(rows) == {(name, n) for name in ("h2o", "streaming_llm") for n in (16, 32)}
    model = source.rewritten(Arm(PolicySpec("streaming_llm"), 16))
    want = kept.record(model, ids)
    assert rows["streaming_llm", 16] == want
    held = [i for i, there in enumerate(kept.unpack(want["0"][0], 64)) if there]
    assert held == [*range(4), *range(52, 64)]  # the first tokens and the newest
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 4 and len(re.findall(r'<span style="background', text)) == 4 * 64
    assert "token 0: 4 of 4 heads" in text


def test_png_is_a_grey_image():
    data = png([[0, 255, 7], [9, 1, 2]])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[16:24] == bytes([0, 0, 0, 3, 0, 0, 0, 2])
    at = data.index(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    assert zlib.decompress(data[at + 4 : at + 4 + size]) == bytes([0, 0, 255, 7, 0, 9, 1, 2])
    assert base64.b64encode(data)


def test_bits():
    for positions in ([], [0], [7, 8, 12], list(range(13))):
        assert [i for i, there in enumerate(kept.unpack(kept.pack(positions, 13), 13)) if there] == positions


def test_refused_cells_say_why(results):
    data, _, _ = results
    broken = {"status": "refused", "reason": "too <small>", "label": "h2o", "budget": 8, "mode": "blind"}
    changed = {**data, "kept": None, "cells": [*data["cells"], {**broken, "task": "lm", "tokens": 64}]}
    found = Checked(page(changed))
    assert "refused: too <small>" in found.texts and not any(tag == "img" for tag, _ in found.tags)
