"""What transformers puts around a model: pipelines, streamers, chat templates."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

import kvrewrite
from kvrewrite.errors import CacheError
from tests.support.products import covering
from tests.support.tiny import make_checkpoint

pytestmark = pytest.mark.xdist_group("pipelines")  # whose fixtures are made once

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "The quick brown fox jumps over the lazy dog."},
]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The original, its rewrite with a full cache, the one of a converted directory, and a tokenizer with a template."""
    path = make_checkpoint(tmp_path_factory.mktemp("pipelines") / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    original = AutoModelForCausalLM.from_pretrained(path)
    kvrewrite.convert(path, path.parent / "out", "full")
    return original, kvrewrite.transform(original, "full"), kvrewrite.load(path.parent / "out"), tokenizer


@covering({"which": 1, "prompt": 1})
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("prompt", ["The quick brown fox", CHAT], ids=["text", "chat"])
def test_pipeline(models: Any, which: int, prompt: Any) -> None:
    tokenizer = models[3]
    expected = pipeline("text-generation", model=models[0], tokenizer=tokenizer)(prompt, **SETTINGS)
    found = pipeline("text-generation", model=models[which], tokenizer=tokenizer)
    assert found(prompt, **SETTINGS) == expected
    assert "'model': 'RewrittenModel'" in repr(found)  # what a notebook shows


def test_chat_template_comes_with_the_converted_directory(models: Any) -> None:
    original, _, loaded, tokenizer = models
    own = AutoTokenizer.from_pretrained(loaded.source)
    tokens = own.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert tokenizer.decode(ids[0]).startswith("<system>Answer")
    expected = original.generate(ids, attention_mask=mask, **SETTINGS)
    assert torch.equal(loaded.generate(ids, attention_mask=mask, **SETTINGS), expected)


def test_a_streamer_that_is_read_in_another_thread(models: Any) -> None:
    _, small, _, tokenizer = models
    tokens = tokenizer("She sells sea shells", return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=small.generate, kwargs={**tokens, **SETTINGS, "streamer": streamer})
    thread.start()
    parts = list(streamer)
    thread.join(60)
    out = small.generate(**tokens, **SETTINGS)
    assert "".join(parts) == tokenizer.decode(out[0, tokens["input_ids"].shape[1] :])


def test_continuous_batching_is_refused(models: Any) -> None:
    """It would run transformers' paged cache, in which nothing is evicted."""
    with pytest.raises(CacheError, match="generate with a padded batch"):
        models[1].generate_batch(inputs=[[1, 2, 3]])
