"""What README and docs/ print works: blocks marked `<!-- run -->` run in order, and every `kvrewrite` line is a command's.

A mark stands on the line before a fenced block. `<!-- run -->`: in the default tier; `<!-- run: thorough -->`: with
`-m thorough`. Blocks of a page share one folder and one namespace. There are MODEL and smollm2 (a tiny checkpoint), small and
out (the same, converted), report.txt and question.txt; `given` has the names that Python blocks may use.
"""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import kvrewrite
from kvrewrite.cli import app
from kvrewrite.policies import POLICIES
from tests.runtime.test_pipelines import TEMPLATE
from tests.support.tiny import TEXT, make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- run(?P<tier>: thorough)? -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
ENDLESS = {"serve", "chat"}  # end when they are told to; they have tests of their own
MARK = re.compile(r"<!-- run(: \w+)? -->")


@dataclass(frozen=True)
class Block:
    """A fenced block. tier: "default", "thorough", or None where it is not marked."""

    page: Path
    language: str
    text: str
    tier: str | None


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text()):
        marked = match[0].startswith("<!-- run")
        tier = ("thorough" if match["tier"] else "default") if marked else None
        found.append(Block(page, match["language"], match["text"], tier))
    return found


def commands(text: str) -> list[list[str]]:
    """The lines of a block that begin with `kvrewrite`, split into words; comments go, continued lines are joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.split(" # ")[0].strip() for line in joined.splitlines()]
    return [shlex.split(line.split(" && ")[-1])[1:] for line in lines if re.search(r"(^|&& )kvrewrite ", line)]


def marked(tier: str) -> list[Path]:
    return [page for page in PAGES if any(block.tier == tier for block in blocks(page))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------- every line is a command's
LINES = [(page, words) for page in PAGES for block in blocks(page) for words in commands(block.text)]


def test_lines_and_marks_are_found() -> None:
    assert len(LINES) > 50
    assert ROOT / "README.md" in marked("default")
    for page in PAGES:  # a mark before anything else than a block would do nothing
        assert len(MARK.findall(page.read_text())) == sum(block.tier is not None for block in blocks(page)), page


@pytest.mark.parametrize("page", sorted({page for page, _ in LINES}), ids=name)
def test_commands_have_these_options(page: Path) -> None:
    """Names of commands and options, and the values of choices; files need not be there."""
    for words in [words for of, words in LINES if of == page]:
        words = [word for word in words if word not in ("...", "[NAME]", "[DIR]")]
        if words[0].startswith("-"):
            continue
        command = app.main.get_command(click.Context(app.main), words[0])
        assert command is not None, words
        try:
            command.make_context(words[0], list(words[1:]), resilient_parsing=True)
        except click.UsageError as error:
            pytest.fail(f"{name(page)}: kvrewrite {shlex.join(words)}: {error.format_message()}")


# ---------------------------------------------------------------------------------------------- marked blocks run
@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MODEL, a tiny checkpoint, and small and out, which are converted."""
    folder = tmp_path_factory.mktemp("docs")
    make_checkpoint(folder / "MODEL", max_position_embeddings=4096)
    (folder / "MODEL" / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(folder / "MODEL", folder / "smollm2")  # the guide's
    for out in ("small", "out"):
        kvrewrite.convert(folder / "MODEL", folder / out, "keydiff", budget=0.25, chunk=64, check="off")
    (folder / "report.txt").write_text(TEXT * 2)
    (folder / "question.txt").write_text("Who jumps over the lazy dog?")
    return folder


def given(folder: Path) -> dict[str, Any]:
    """What Python blocks may use: the guide's names for things that a reader has."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    model = AutoModelForCausalLM.from_pretrained(folder / "MODEL")
    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    return {
        "__name__": "builtins",
        "torch": torch,
        "kvrewrite": kvrewrite,
        "model": model,
        "tokenizer": tokenizer,
        "TextStreamer": TextStreamer,
        "small": kvrewrite.load(folder / "small"),
        "tokens": {"input_ids": ids.expand(2, -1), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.long)},
        "document_ids": ids,
        "questions": [torch.randint(2, 200, (1, 7)), torch.randint(2, 200, (1, 5))],
        "messages": [],
        "turns": ["Who sells shells?", "And where?"],
        "prompts": [torch.randint(2, 200, (n,)) for n in (40, 25)],
        "context": ids,
        "continuation": ids[:, :20],
        "text": ids,
    }


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own with those things, as the current one."""
    shutil.copytree(models, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    registered = dict(POLICIES)
    yield tmp_path / "here"
    torch._dynamo.reset()
    for added in POLICIES.keys() - registered.keys():
        POLICIES.pop(added)


def run(page: Path, folder: Path, tiers: set[str]) -> None:
    names = given(folder)
    for block in blocks(page):
        if block.tier not in tiers:
            continue
        if block.language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(block.text, name(page), "exec", dont_inherit=True), names)
            continue
        found = commands(block.text)
        assert found, f"{name(page)}: a marked block without a kvrewrite line"
        for words in [words for words in found if words[0] not in ENDLESS]:
            if words[0] == "convert" and "--out" in words:  # what the reader makes here
                shutil.rmtree(folder / words[words.index("--out") + 1], ignore_errors=True)
            done = CliRunner().invoke(app.main, words)
            assert done.exit_code == 0, f"kvrewrite {shlex.join(words)}\n{done.output}"


@pytest.mark.parametrize("page", marked("default"), ids=name)
def test_blocks_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(page, folder, {"default"})


@pytest.mark.thorough
@pytest.mark.parametrize("page", marked("thorough"), ids=name)
def test_dear_blocks_run(page: Path, folder: Path) -> None:
    run(page, folder, {"default", "thorough"})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=name
)
def test_python_can_be_read(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, name(page), "exec", dont_inherit=True)
