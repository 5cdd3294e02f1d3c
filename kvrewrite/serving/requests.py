"""Defines what a client may ask: the schema of a request's JSON body, with errors that name the wrong field."""

from __future__ import annotations

import json
import reprlib
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

# Fields of a request that do not change the answer.
_HARMLESS = {
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
# Fields that would change it and are not supported: refused unless their value asks for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# The same for a message: fields that clients send back from an answer.
_NOTHING_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "refusal": (None, ""),
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
}
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # strings, and characters of each
MIN_TEMPERATURE = 1e-8  # dividing logits by less may overflow
BYTES_PER_TOKEN, BYTES_BESIDE = 16, 1 << 16  # of a body: per token of the longest prompt, and for the rest


class RequestError(Exception):
    """A client's mistake (or something the server can't do), in the form of OpenAI's API."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Returns the JSON body of the response."""
        kind = {404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Request:
    """One checked request. prompt: text, token ids, or (chat) messages; template: variables of the chat template."""

    prompt: Any
    chat: bool
    max_tokens: int | None
    sampling: dict[str, Any]
    seed: int | None
    stops: list[str]
    stream: bool
    usage: bool  # also in the stream
    n: int = 1
    stop_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None  # of so many likeliest tokens, besides the one that was chosen; None: of none
    frequency: float = 0.0
    presence: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    budget: int | None = None  # slots per head, instead of the policy's
    document: str | None = None  # the name of what the prompt follows
    schema: str | None = None  # JSON schema of the answer
    user: str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


# -------------------------------------------------------------------------------------------------------------- schema
def _temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise PydanticCustomError("temperature", "input should be 0 (the likeliest token) or at least 1e-08")
    return value


def _as_list(value: Any) -> Any:
    """Returns one stop string as a list."""
    return [value] if isinstance(value, str) else value


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _one_prompt(value: Any) -> Any:
    """Replaces a list with one prompt by that prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    several = isinstance(value, list) and any(isinstance(v, (str, list)) for v in value[:1])
    if several or value in ("", []):
        raise PydanticCustomError("prompt", "expected one text or one list of token ids; send a request for each")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_Count = Annotated[int, Field(ge=1, le=1 << 30)]
_Id = Annotated[int, Field(ge=0, lt=1 << 63)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Stops = Annotated[list[_Stop], Field(max_length=MAX_STOPS)]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is obfuscated


class _JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")  # its name, description and strictness change nothing
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class _Format(_Strict):
    type: Literal["text", "json_schema", "json_object"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> _Format:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("format", "json_schema is missing")
        return self

    def schema_text(self) -> str | None:
        """The JSON schema of the answer, if it has one."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


class _Body(_Strict):
    """Fields of both endpoints."""

    model: str | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[_Stops | None, BeforeValidator(_as_list)] = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    response_format: _Format | None = None
    user: str | None = None
    # Not OpenAI's: as in vLLM, and the slots per head that this request may keep.
    stop_token_ids: Annotated[list[_Id], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    budget: _Count | None = None
    # A text that the server has compressed (serve --documents), which the prompt follows.
    document: Annotated[str, Field(min_length=1, max_length=256)] | None = None


def _either(name: str) -> Discriminator:
    """Chooses between text and a list, so that an error is about the given one. Tags are not part of the place."""
    return Discriminator(_text_or_list, custom_error_type=name, custom_error_message=f"expected {name}")


class _Completion(_Body):
    prompt: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[_Id], Field(fail_fast=True), Tag("<list>")],
        _either("one text or one list of token ids; send a request for each"),
        BeforeValidator(_one_prompt),
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _Part(BaseModel):
    """A piece of a message. Other members, such as cache_control, change nothing."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: str
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[_Part], Field(fail_fast=True), Tag("<list>")],
        _either("content that is text (no images, audio or tool calls)"),
    ]
    name: str | None = None  # these two are for the template, which may ignore them
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            k: v
            for k, v in value.items()
            if k not in _NOTHING_IN_MESSAGES or not _is_nothing(v, _NOTHING_IN_MESSAGES[k])
        }

    def for_template(self) -> dict[str, str]:
        """Returns the message as chat templates expect it: content is one text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        others = {"name": self.name, "reasoning_content": self.reasoning_content}
        return {"role": self.role, "content": content, **{k: v for k, v in others.items() if v is not None}}


class _Chat(_Body):
    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: _Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _asked(self) -> _Chat:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs: true")
        return self


# ------------------------------------------------------------------------------------------------------------- reading
def read_json(data: bytes | bytearray) -> Any:
    """Parses a body as JSON; raises RequestError also for lone surrogates, NaN, deep nesting, which Python accepts."""
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON that this server takes: {error}") from error


def _is_nothing(value: Any, nothing: tuple[Any, ...]) -> bool:
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in nothing)


def read_request(body: Any, chat: bool) -> Request:
    """Parses a request's JSON body; raises RequestError."""
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    schema = _Chat if chat else _Completion
    fields = {}
    for name, value in body.items():
        if name in schema.model_fields:
            fields[name] = value
        elif name in _NOTHING:
            if not _is_nothing(value, _NOTHING[name]):
                raise RequestError(
                    f"{name} is not supported by this server; leave it out", param=name, code="unsupported"
                )
        elif name not in _HARMLESS:
            raise RequestError(f"{name!r:.60} is not a parameter of this endpoint", param=name[:60])
    try:
        found = schema.model_validate(fields)
    except ValidationError as error:
        raise _as_request_error(error) from error
    sampling: dict[str, Any] = {}
    if found.temperature is not None:
        sampling = {"do_sample": found.temperature > 0}
        if found.temperature > 0:
            sampling["temperature"] = found.temperature
    if found.top_p == 0:  # only the most likely token
        sampling = {"do_sample": False}
    if sampling.get("do_sample", True):
        given = {"top_p": found.top_p, "top_k": found.top_k, "min_p": found.min_p}
        sampling.update({name: value for name, value in given.items() if value is not None})
    if found.repetition_penalty is not None:
        sampling["repetition_penalty"] = found.repetition_penalty
    limit = found.max_tokens
    prompt: Any
    if isinstance(found, _Chat):
        prompt, template = [m.for_template() for m in found.messages], found.chat_template_kwargs or {}
        limit = found.max_completion_tokens or limit
        logprobs = (found.top_logprobs or 0) if found.logprobs else None
    else:
        prompt, template, logprobs = found.prompt, {}, found.logprobs
    return Request(
        prompt=prompt,
        chat=chat,
        max_tokens=limit,
        sampling=sampling,
        seed=found.seed,
        stops=found.stop or [],
        stream=bool(found.stream),
        usage=bool(found.stream_options and found.stream_options.include_usage),
        n=found.n or 1,
        stop_ids=found.stop_token_ids or [],
        ignore_eos=bool(found.ignore_eos),
        logprobs=logprobs,
        frequency=found.frequency_penalty or 0.0,
        presence=found.presence_penalty or 0.0,
        logit_bias=_bias(found.logit_bias or {}),
        budget=found.budget,
        document=found.document,
        schema=None if found.response_format is None else found.response_format.schema_text(),
        user=found.user,
        template=template,
        model=found.model,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    """logit_bias by token id, which JSON has as text."""
    try:
        return {int(token): value for token, value in given.items()}
    except ValueError as error:
        raise RequestError(
            f"logit_bias: {reprlib.repr(list(given))} are expected to be token ids", param="logit_bias"
        ) from error


def _as_request_error(error: ValidationError) -> RequestError:
    """Returns the first error, with the field's place."""
    first = error.errors(include_url=False, include_context=False)[0]
    places = [p for p in first["loc"] if not (isinstance(p, str) and p.startswith("<"))]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p:.60}" for p in places).removeprefix(".")
    what = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        message = f"{where}: it is missing"
    elif first["type"] == "extra_forbidden":
        message = f"{where} is not supported by this server; leave it out"
    else:
        message = f"{where} is {reprlib.repr(first['input'])}: {what}"
    return RequestError(message, param=where)
