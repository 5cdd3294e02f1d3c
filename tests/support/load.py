"""Many requests on an engine at once, and what each of them is alone."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from kvrewrite import serving


@dataclass(eq=False)
class Asked:
    """One request. body: what a client sends; alone: the text that it has with nobody beside it; leaves: after how many
    pieces of text its client goes away, None: never."""

    body: dict[str, Any]
    alone: str
    leaves: int | None = None
    text: str = ""
    finish: str | None = None
    error: BaseException | None = None
    times: list[float] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def right(self) -> bool:
        """Whether the text is the lone one, or the beginning of it where the client has left."""
        if self.leaves is not None:
            return self.error is None and self.alone.startswith(self.text)
        return self.error is None and self.finish is not None and self.text == self.alone


def alone(model: Any, tokenizer: Any, body: dict[str, Any]) -> str:
    """What transformers' `generate` makes of a request."""
    prompt = body["prompt"]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if isinstance(prompt, str) else torch.tensor([prompt])
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    settings = {name: body[name] for name in names if name in body}
    if "temperature" in body:
        torch.manual_seed(body["seed"])
        settings["do_sample"] = True
    with torch.random.fork_rng():
        if "seed" in body:
            torch.manual_seed(body["seed"])
        out = model.generate(
            ids, attention_mask=ids * 0 + 1, max_new_tokens=body["max_tokens"], pad_token_id=0, **settings
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def bodies(generator: random.Random, count: int, longest: int, vocabulary: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths: half of them greedy, others with sampling of several kinds."""
    kinds: list[dict[str, Any]] = [
        {},
        {},
        {},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.3, "top_p": 0.9, "seed": 2},
        {"temperature": 1.0, "top_k": 7, "min_p": 0.02, "seed": 3},
        {"repetition_penalty": 1.3},
    ]
    found = []
    for _ in range(count):
        length = generator.choice([1, 3, generator.randint(5, 40), generator.randint(40, longest)])
        prompt = [generator.randrange(2, vocabulary) for _ in range(length)]
        found.append({"prompt": prompt, "max_tokens": generator.randint(1, 16), **generator.choice(kinds)})
    return found


def serve(engine: serving.Engine, asked: list[Asked], at_once: int, clients: int = 3) -> None:
    """Sends them, so many at once, by several clients, and waits for all."""
    free = threading.Semaphore(at_once)
    for number, request in enumerate(asked):
        assert free.acquire(timeout=120)
        _send(engine, request, f"client {number % clients}", free)
    for request in asked:
        assert request.done.wait(120), "a request has no end"


def _send(engine: serving.Engine, asked: Asked, client: str, free: threading.Semaphore) -> None:
    pieces = 0

    def emit(event: serving.Event) -> None:
        nonlocal pieces
        asked.times.append(time.monotonic())
        if not asked.done.is_set():
            asked.text += event.text
            asked.error, asked.finish = event.error, event.finish
        pieces += 1
        if event.last or (asked.leaves is not None and pieces > asked.leaves):
            end()

    def end() -> None:
        if not asked.done.is_set():
            asked.done.set()
            free.release()
            engine.cancel(job)

    job = serving.Job(serving.read_request({**asked.body, "stream": True}, chat=False), emit, client)
    engine.submit(job)
    if asked.leaves == 0:
        end()
