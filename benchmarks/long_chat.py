"""A chat of many turns whose cache stays as it is: a pinned system prompt, reasoning dropped at each turn, slips in the text.

    python -m benchmarks.long_chat DIR [--turns 200] [--device cuda] [--unpinned] [--original DIR] [--state FOLDER]
        [--seconds 240]

DIR is a converted directory of a chat model with a tokenizer. The system prompt gives the model a name. Each turn is small
talk; each answer begins with a reasoning and two words (forced, since a small model has no reasoning and repeats itself), and
the next turn leaves the reasoning out. Every tenth answer is forced letter by letter, so that the template's text has other
tokens than were generated. After each turn the ids in the cache are compared with those of the conversation as the template
writes it. In the middle, an earlier turn is told otherwise: `generate` on a fork has to refuse it, and the chat has to compute
it again. In the end the name is asked for.

--unpinned leaves the system prompt to the policy. --original: the unmodified model is asked, too, after the last twelve turns
with the system prompt and without it: whether it can answer at all, and whether only because of that prompt. --state: where
the conversation is kept, so that the command goes on where it was when --seconds were over; the cache is a saved cache.

Prints a line for turns 1, 10, 50, 100, ... and one at the end, as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

import kvrewrite
from kvrewrite.artifact.companions import read_tokenizer
from kvrewrite.errors import InputError
from kvrewrite.runtime.chat import Chat

FACT = "marigold"
SYSTEM = "You are a helpful AI assistant named Marigold, trained by the Lisbon Lighthouse Company."
QUESTION = "Hello! What is your name?"
REASONING, BEGINS = "<think>{}</think>", "I like {}"
THINGS = (
    "rivers",
    "apples",
    "trains",
    "clouds",
    "horses",
    "bread",
    "winter",
    "music",
    "boats",
    "tea",
    "stones",
    "birds",
)
SAID = ("Tell me one word about {}.", "Do you like {}?", "I saw {} today.", "Say something about {}.", "Why {}?")
SHOWN = (1, 10, 50, 100, 150, 200)


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Makes answers begin with given ids."""

    def __init__(self, ids: list[int]):
        self.ids, self.begin = ids, -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.begin < 0:
            self.begin = input_ids.shape[1]
        at = input_ids.shape[1] - self.begin
        if at < len(self.ids):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.ids[at]] = 0
        return scores


def turn(n: int) -> str:
    """What the user says at turn n."""
    return SAID[n % len(SAID)].format(thing(n))


def thing(n: int) -> str:
    """What turn n is about."""
    return THINGS[n % len(THINGS)]


def ask(talk: Chat, text: str, new: int, about: str = "", spelled: bool = False) -> str:
    """A turn whose answer begins with a reasoning about something and some words, where it is about something, and then has
    at most `new` tokens of the model's own. spelled: the words letter by letter."""
    parts = [REASONING.format(about), *(BEGINS.format(about) if spelled else [BEGINS.format(about)])] if about else []
    ids = [i for part in parts for i in talk.tokenizer(part, add_special_tokens=False)["input_ids"]]
    forced = LogitsProcessorList([Forced(ids)])
    answer = talk.ask(text, max_new_tokens=len(ids) + new, do_sample=False, logits_processor=forced)
    check_text(talk)
    return answer


def check_text(talk: Chat) -> None:
    """The cache has the conversation as the template writes it, up to the newest answer, token by token."""
    written = written_ids(talk.tokenizer, talk.messages[:-1])
    held = talk.cache.ids()[:, : written.shape[1]]
    if not torch.equal(held, written):
        raise AssertionError(f"the cache has another text than the conversation: {held.tolist()}, {written.tolist()}")


def written_ids(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """The ids (1, T) of a conversation, with the beginning of an answer."""
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids: torch.Tensor = made["input_ids"]
    return ids


def slip(talk: Chat) -> dict[str, Any]:
    """An earlier turn of the user is told otherwise. What the cache says of it, and to where the chat went back."""
    told = [dict(m) for m in talk.messages]
    told[-4]["content"] = told[-4]["content"].rstrip(".?") + " now."
    ids = talk.tokenizer.apply_chat_template(told, return_tensors="pt", return_dict=True)["input_ids"]
    try:
        talk.model.generate(
            ids.to(talk.model.device), cache=talk.cache.fork(), max_new_tokens=1, tokenizer=talk.tokenizer
        )
        refused = ""
    except InputError as error:
        refused = str(error).split(". Pass")[0]
    talk.messages = told
    columns, marked = talk.cache.columns, list(talk.cache.checkpoints)
    ask(talk, "And then?", 4, "tea")
    kept = [c.columns for c in talk.cache.checkpoints if any(c is m for m in marked)]
    return {"refused": refused, "columns": columns, "went_back_to": max(kept, default=0)}


def ask_original(directory: str, talk: Chat) -> dict[str, Any]:
    """What the unmodified model answers after the last twelve turns, with the system prompt and without it."""
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=talk.model.dtype, device_map=talk.model.device)
    system, *said = talk.messages[:-2]
    question = {"role": "user", "content": QUESTION}
    found = {}
    for name, begin in (("with_prompt", [system]), ("without", [{"role": "system", "content": "You are brief."}])):
        ids = written_ids(talk.tokenizer, [*begin, *said[-24:], question]).to(original.device)
        out = original.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        found[name] = talk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found


def report(talk: Chat, n: int) -> dict[str, Any]:
    """What the cache holds after turn n."""
    memory = talk.memory()
    slots = max(int(lens.max()) for lens in talk.cache.live_slots().values())
    held = {"slots": slots, "live": memory.live, "leased": memory.leased, "checkpoints": memory.checkpoints}
    return {"turn": n, "tokens": talk.cache.seen[0], **held, "ids": memory.text}


def keep(talk: Chat, folder: Path, n: int, found: dict[str, Any]) -> None:
    """Writes the conversation."""
    folder.mkdir(parents=True, exist_ok=True)
    talk.cache.save(folder / "chat.kvcache", force=True)
    said = {"turn": n, "messages": talk.messages, "pinned": talk.pinned, "found": found}
    (folder / "chat.json").write_text(json.dumps(said))


def go_on(talk: Chat, folder: Path | None) -> tuple[int, dict[str, Any]]:
    """Takes a conversation up again; the turns that it had."""
    if folder is None or not (folder / "chat.json").exists():
        return 0, {}
    said = json.loads((folder / "chat.json").read_text())
    talk.cache = kvrewrite.load_cache(talk.model, folder / "chat.kvcache")
    talk.messages, talk.pinned = said["messages"], said["pinned"]
    return said["turn"], said["found"]


def main() -> None:
    """Parses arguments, talks, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=3, help="of an answer, after what is forced")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--unpinned", action="store_true")
    parser.add_argument("--original")
    parser.add_argument("--compile", action="store_true", dest="compiled")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    began = time.perf_counter()
    model, tokenizer = kvrewrite.load(given.directory, device=given.device), read_tokenizer(given.directory)
    if given.compiled:
        model.compile()
    talk = kvrewrite.chat(model, tokenizer, system=SYSTEM, pin_system=not given.unpinned)
    done, found = go_on(talk, given.state)
    for n in range(done + 1, given.turns + 1):
        ask(talk, turn(n), given.new_tokens, thing(n), spelled=n % 10 == 0)
        if any("think>" in said["content"] for said in talk.messages):
            raise AssertionError(f"a reasoning has stayed in the conversation: {talk.messages}")
        if n == max(4, given.turns // 2):
            found["slip"] = slip(talk)
            print(json.dumps(found["slip"]), flush=True)
        if n in SHOWN or n == given.turns:
            found[str(n)] = report(talk, n)
            print(json.dumps(found[str(n)]), flush=True)
            if given.state is not None:
                keep(talk, given.state, n, found)
        if given.state is not None and time.perf_counter() - began > given.seconds:
            keep(talk, given.state, n, found)
            print(f"stopped after turn {n}; the same command goes on", flush=True)
            return
    answer = ask(talk, QUESTION, 16)
    told = {"policy": model.program.policy, "pinned": talk.pinned, "answer": answer, "knows": FACT in answer.lower()}
    if given.original:
        told["original"] = ask_original(given.original, talk)
    print(json.dumps(told | {"seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
