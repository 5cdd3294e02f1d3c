"""From a request to token ids: the tokenizer and its chat template, with errors that name the field."""

from __future__ import annotations

import inspect
from typing import Any

from kvrewrite.serving.requests import Request, RequestError


def check_length(tokens: int, most: int, request: Request) -> None:
    """Raises RequestError for a prompt that is longer than the server takes."""
    if tokens > most:
        raise RequestError(
            f"the prompt has {tokens} tokens, but this server takes at most {most} (--max-prompt-tokens)",
            param="messages" if request.chat else "prompt",
            code="context_length_exceeded",
        )


def encode(tokenizer: Any, request: Request, follows: bool = False) -> list[int]:
    """The ids of a prompt. follows: whether it follows a document, and begins no text."""
    if not request.chat:
        if isinstance(request.prompt, list):
            return request.prompt
        ids: list[int] = tokenizer(request.prompt, add_special_tokens=not follows)["input_ids"]
        return ids
    if follows:
        raise RequestError(
            "a chat begins a text, and the prompt follows that of the document; use /v1/completions", param="document"
        )
    if not tokenizer.chat_template:
        raise RequestError("this model's tokenizer has no chat template; use /v1/completions", code="no_chat_template")
    from jinja2 import TemplateError

    # The client sets a template's variables, but not the template or how it is applied: a template could keep the
    # only thread busy for ever.
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    if taken := sorted(n for n in request.template if n in own):
        raise RequestError(
            f"chat_template_kwargs: {', '.join(taken)} can't be set by a request; expected variables of the model's chat "
            "template, such as enable_thinking",
            param="chat_template_kwargs",
        )
    try:
        found = tokenizer.apply_chat_template(
            request.prompt, add_generation_prompt=True, return_dict=True, **request.template
        )
    # What templates raise for roles and variables that they do not expect.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
    ids = found["input_ids"]
    return ids
