"""Answers that follow a JSON schema, through xgrammar where it is installed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from torch import Tensor

from kvrewrite.serving.requests import RequestError


class Grammar:
    """What an answer may go on with. make one with `Grammars`."""

    def __init__(self, compiled: Any, vocabulary: int):
        import xgrammar

        self._xgrammar, self._matcher = xgrammar, xgrammar.GrammarMatcher(compiled)
        self._allowed = xgrammar.allocate_token_bitmask(1, vocabulary)

    @property
    def complete(self) -> bool:
        """Whether the answer is whole."""
        return bool(self._matcher.is_terminated())

    def take(self, token: int) -> None:
        """The answer has another token."""
        if not self._matcher.accept_token(token):
            raise RuntimeError(f"token {token} does not follow the schema, though it was allowed")

    def mask(self, scores: Tensor) -> None:
        """Takes tokens that can't come next out of scores (1, vocabulary)."""
        if not self.complete:
            self._matcher.fill_next_token_bitmask(self._allowed)
            self._xgrammar.apply_token_bitmask_inplace(scores, self._allowed.to(scores.device))


class Grammars:
    """Makes grammars for one tokenizer. vocabulary: of the model's logits; ends: ids that may end an answer."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: list[int]):
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends

    @functools.cached_property
    def _compiler(self) -> Any:
        if importlib.util.find_spec("xgrammar") is None:
            raise RequestError(
                "response_format with a schema needs xgrammar where the server runs: pip install xgrammar",
                param="response_format",
                code="unsupported",
            )
        import xgrammar

        ends = {"stop_token_ids": self._ends} if self._ends else {}
        info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocabulary, **ends)
        return xgrammar.GrammarCompiler(info)

    def make(self, schema: str) -> Grammar:
        """A grammar for one answer; raises RequestError for what is no schema, or where xgrammar is missing."""
        compiler = self._compiler
        try:
            compiled = compiler.compile_json_schema(schema)
        except (RuntimeError, ValueError) as error:
            raise RequestError(f"response_format: {error}", param="response_format") from error
        return Grammar(compiled, self._vocabulary)
