"""Turns that check themselves: what differs from the cache is named, or computed again from the last turn that agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvrewrite
from kvrewrite.artifact.companions import read_tokenizer
from kvrewrite.cache.eviction_cache import CHECKPOINTS, EvictionCache
from kvrewrite.errors import InputError, OptionError
from kvrewrite.runtime.chat import without_reasoning
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.support.rewritten import rewritten
from tests.support.tiny import make_checkpoint

pytestmark = pytest.mark.xdist_group("llama")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("h2o", {"budget": 40}),
    ("snapkv", {"budget": 40, "window": 8}),
    ("streaming_llm", {"budget": 40, "chunk": 16, "positions": "contiguous"}),
    ("adakv", {"budget": 40, "window": 8}),
    ("tova", {"budget": 40, "quantize": "int8", "quantize_residual": 32}),
    ("sirllm", {"budget": 40, "chunk": 16}),
]


def talk(model: Any, cache: EvictionCache, ids: Tensor, count: int = 6, **options: Any) -> Tensor:
    out: Tensor = model.generate(ids, cache=cache, max_new_tokens=count, **GREEDY, **options)
    return out


# ------------------------------------------------------------------------------------------------------------ mismatches
def test_the_first_difference_is_named() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return f"word {ids[0]}"

    model = rewritten("llama", "h2o", budget=40)
    cache = model.new_cache(1)
    text = talk(model, cache, tokens(1, 50))
    other = torch.cat([text, tokens(1, 4, seed=1)], 1)
    other[0, 31] = (other[0, 31] + 1) % 97
    with pytest.raises(InputError, match=rf"column 31 row 0 has token {int(other[0, 31])}, .* {int(text[0, 31])}\."):
        talk(model, cache, other)
    named = rf"token {int(other[0, 31])} \('word {int(other[0, 31])}'\).*given {int(text[0, 31])} \('word"
    with pytest.raises(InputError, match=named):
        talk(model, cache, other, tokenizer=Words())
    with pytest.raises(InputError, match=r"on_mismatch is 'ignore', expected"):
        talk(model, cache, other, on_mismatch="ignore")


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_recompute_goes_back_to_the_last_turn_that_agrees(policy: str, options: dict[str, Any]) -> None:
    """Three turns; the second answer is told otherwise. All is as if the cache had never seen the first telling."""
    model = rewritten("llama", policy, **options)
    first, more, new = tokens(1, 50), tokens(1, 9, seed=1), tokens(1, 7, seed=2)
    cache = model.new_cache(1)
    one = talk(model, cache, first, on_mismatch="recompute")
    two = talk(model, cache, torch.cat([one, more], 1), on_mismatch="recompute")
    ends = [c.columns for c in cache.checkpoints]
    assert ends == [50, 50 + 6 + 9]
    told = torch.cat([two, new], 1)
    told[0, 67] = (told[0, 67] + 1) % 97  # in the second answer
    three = talk(model, cache, told, on_mismatch="recompute")

    alone = model.new_cache(1)
    assert torch.equal(talk(model, alone, first), one)
    model(torch.cat([one, more], 1)[:, alone.columns :], cache=alone, logits_to_keep=1)
    alone.end_prompt()
    expected = talk(model, alone, told)
    assert torch.equal(three, expected) and cache.positions() == alone.positions() and cache.seen == alone.seen
    assert [c.columns for c in cache.checkpoints] == [50, 65, told.shape[1]]
    check_pages(cache, *cache.checkpoints)


def test_an_edited_beginning_begins_again() -> None:
    model = rewritten("llama", "h2o", budget=40)
    cache = model.new_cache(1)
    one = talk(model, cache, tokens(1, 50), on_mismatch="recompute")
    other = torch.cat([one, tokens(1, 5, seed=3)], 1)
    other[0, 2] = (other[0, 2] + 1) % 97
    found = talk(model, cache, other, on_mismatch="recompute")
    alone = model.new_cache(1)
    assert torch.equal(found, talk(model, alone, other)) and cache.positions() == alone.positions()


def test_a_shorter_text_and_new_ids_alone() -> None:
    model = rewritten("llama", "h2o", budget=40)
    cache = model.new_cache(1)
    one = talk(model, cache, tokens(1, 50), on_mismatch="recompute")
    assert cache.columns == 55
    shorter = talk(model, cache, one[:, :53], on_mismatch="recompute")  # the same answer, made again from its middle
    assert torch.equal(shorter[:, :56], one)
    new = tokens(1, 4, seed=5)
    twin = cache.fork()
    whole = talk(model, twin, torch.cat([shorter[:, : cache.columns], new], 1))
    mask = torch.ones(1, cache.columns + 4, dtype=torch.int64)
    alone = talk(model, cache, new, attention_mask=mask)
    assert torch.equal(whole[:, -6:], alone[:, -6:])


def test_padded_rows_go_back_together() -> None:
    model = rewritten("llama", "h2o", budget=40)
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.int64)
    mask[1, :13] = 0
    cache, alone = model.new_cache(2), model.new_cache(2)
    one = talk(model, cache, ids, attention_mask=mask, on_mismatch="recompute")
    told = torch.cat([one, tokens(2, 5, seed=3)], 1)
    told[1, 52] = (told[1, 52] + 1) % 97
    longer = torch.cat([mask, torch.ones(2, 11, dtype=torch.int64)], 1)
    found = talk(model, cache, told, attention_mask=longer, on_mismatch="recompute")
    model(ids, attention_mask=mask, cache=alone, logits_to_keep=1)
    alone.end_prompt()
    assert torch.equal(found, talk(model, alone, told, attention_mask=longer))
    with pytest.raises(InputError, match="changes the cache, which has 2 rows, and the text has 4"):
        talk(model, cache, found.repeat(2, 1), on_mismatch="recompute")


def test_checkpoints_are_few_and_counted() -> None:
    model = rewritten("llama", "h2o", budget=40)
    cache = model.new_cache(1)
    text = tokens(1, 50)
    for turn in range(CHECKPOINTS + 2):
        text = torch.cat([talk(model, cache, text, on_mismatch="recompute"), tokens(1, 5, seed=turn)], 1)
    assert len(cache.checkpoints) == CHECKPOINTS
    check_pages(cache, *cache.checkpoints)
    page = cache.leases[0].store.page_bytes
    held = {int(p) for c in cache.checkpoints for p in c.leases[0].held} - {int(p) for p in cache.leases[0].held}
    assert cache.memory().checkpoints == len(held) * page > 0
    cache.reset()
    assert cache.memory().checkpoints == 0 and not cache.checkpoints
    check_pages(cache)


def test_a_step_that_was_interrupted_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rewritten("llama", "h2o", budget=40)
    cache = model.new_cache(1)
    talk(model, cache, tokens(1, 50), on_mismatch="recompute")
    kept = cache.checkpoints[0].positions()

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model, "run_graph", fails)
        with pytest.raises(KeyboardInterrupt):
            model(tokens(1, 3), cache=cache)
    cache.roll_back(50)
    assert cache.positions() == kept and cache.columns == 50
    check_pages(cache, *cache.checkpoints)


# ----------------------------------------------------------------------------------------------------------------- chats
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted directory whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("turns")
    base = make_checkpoint(folder / "base")
    tokenizer = read_tokenizer(str(base))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    kvrewrite.convert(base, folder / "model", "h2o", budget=48, chunk=16)
    return folder / "model"


@pytest.mark.parametrize("think", [False, True])
def test_a_chat_is_the_text_that_its_template_writes(directory: Path, think: bool) -> None:
    """Each answer is the one to the conversation as it is written, computed turn by turn on a cache of its own; random
    tokens are hardly ever tokenized as they were generated."""
    model, tokenizer = kvrewrite.load(directory), read_tokenizer(str(directory))
    conversation = kvrewrite.chat(model, tokenizer, system="Sea shells.", template={"think": think})
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone, told = model.new_cache(1), ""
    mismatches = 0
    for turn in ("The fox", "jumps?", "She sells", "by the shore"):
        answer = conversation.ask(turn, **options)
        whole = tokenizer.apply_chat_template(
            [*conversation.messages[:-1]], add_generation_prompt=True, tokenize=False, think=think
        )
        ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]
        opened = tokenizer("<|assistant|>" + "<think>" * think, add_special_tokens=False)["input_ids"]
        end = ids.shape[1] - len(opened)
        assert ids[0, end:].tolist() == opened
        mismatches += told != "" and not whole.startswith(told)
        if not told:
            opening = tokenizer("<|system|>Sea shells.<eos><|user|>", add_special_tokens=False)["input_ids"]
            assert (
                conversation.pinned >= len(opening) - 1
                and ids[0, : conversation.pinned].tolist() == opening[: conversation.pinned]
            )
            alone.pin(0, conversation.pinned)
        model(ids[:, alone.columns : end], cache=alone, logits_to_keep=1)
        alone.end_prompt()
        before = alone.fork()
        made = talk(model, alone, ids)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == without_reasoning(text) == conversation.messages[-1]["content"]
        assert conversation.cache.checkpoints[-1].positions() == before.positions()
        again = tokenizer.apply_chat_template(conversation.messages, tokenize=False, think=think)
        agrees = tokenizer(again, return_tensors="pt", add_special_tokens=False)["input_ids"]
        seen = min(alone.columns, agrees.shape[1])
        if not torch.equal(made[:, :seen], agrees[:, :seen]) or agrees.shape[1] <= alone.columns:
            alone = before  # the answer is read again
            mismatches += 1
        told = whole
    for layer in conversation.cache.positions().values():
        assert all(set(range(conversation.pinned)) <= set(head) for head in layer[0])
    assert max(conversation.cache.seen) > 2 * 48
    assert mismatches > 0  # this is about something
    assert conversation.memory().live <= 2 * 2 * 48 * (2 * 8 * 4 + 12) + conversation.cache.history.nbytes


@pytest.mark.thorough
def test_two_hundred_turns(directory: Path) -> None:
    """Memory stays where it was after the first turns, and the system prompt is held to the end."""
    model, tokenizer = kvrewrite.load(directory), read_tokenizer(str(directory))
    talk, held = kvrewrite.chat(model, tokenizer, system="Sea shells."), []
    words = ("The fox", "jumps?", "She sells", "by the shore")
    for turn in range(200):
        talk.ask(words[turn % 4], max_new_tokens=4, do_sample=False, eos_token_id=None)
        talk.messages = [talk.messages[0], *talk.messages[-6:]]  # a model of 256 positions; older turns are left out
        memory = talk.memory()
        held.append((memory.live, memory.leased, memory.reserved, memory.checkpoints))
        for layer in talk.cache.positions().values():
            assert all(set(range(talk.pinned)) <= set(head) for head in layer[0])
    early, late = (np.array(held[part]).max(0) for part in (slice(20, 60), slice(60, 200)))
    assert talk.pinned > 5 and (late <= early).all()


def test_a_turn_that_fails_leaves_the_conversation(directory: Path) -> None:
    model, tokenizer = kvrewrite.load(directory), read_tokenizer(str(directory))
    conversation = kvrewrite.chat(model, tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False}
    conversation.ask("The fox", **options)
    before, kept = list(conversation.messages), conversation.cache.checkpoints[-1].positions()

    class Stops:
        calls = 0

        def put(self, _: Any) -> None:
            self.calls += 1
            if self.calls > 2:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("jumps", streamer=Stops(), **options)
    assert conversation.messages == before and conversation.cache.positions() == kept
    assert conversation.ask("jumps", **options) == conversation.messages[-1]["content"]
    with pytest.raises(OptionError, match="no chat template"):
        tokenizer.chat_template = None
        kvrewrite.chat(model, tokenizer)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("plain", "plain"),
        ("<think>a</think>\n\nyes", "yes"),
        ("a </think>yes", "yes"),
        ("<think>cut", ""),
        ("so <think>a</think>yes", "so yes"),
    ],
)
def test_reasoning_is_left_out(answer: str, shown: str) -> None:
    assert without_reasoning(answer) == shown


def test_the_command(directory: Path) -> None:
    from click.testing import CliRunner

    from kvrewrite.cli.app import main

    lines = "The fox\n/memory\n/nothing\njumps\n/reset\n/memory\n/quit\nnever\n"
    done = CliRunner().invoke(main, ["chat", str(directory), "--max-new-tokens", "4", "--system", "Sea"], input=lines)
    assert done.exit_code == 0, done.output
    assert "live" in done.stderr and "no command /nothing" in done.stderr and "0 tokens so far" in done.stderr
    wrong = CliRunner().invoke(main, ["chat", str(directory), "--top-p", "0.5"])
    assert wrong.exit_code == 2
