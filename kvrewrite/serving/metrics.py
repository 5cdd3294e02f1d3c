"""What a server counts, for Prometheus: `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)


class Metrics:
    """Counters, gauges and histograms of one engine, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str) -> Counter:
            return Counter(f"kvrewrite_{name}", what, registry=self.registry)

        self.finished = counter("requests_finished", "Requests that were answered completely")
        self.failed = counter("requests_failed", "Requests that ended with an error")
        self.cancelled = counter("requests_cancelled", "Requests whose client went away")
        self.preempted = counter("requests_preempted", "Answers that made room for older ones and were computed again")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were taken")
        self.tokens = counter("generation_tokens", "Tokens that were made")
        self.prefix_hits = counter("prefix_hits", "Prompts whose beginning was there already")
        self.prefix_tokens = counter("prefix_tokens", "Tokens of prompts that were not computed again")
        self.steps = counter("decode_steps", "Steps that made one token of each answer in them")
        self.first = Histogram(
            "kvrewrite_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=FIRST,
            registry=self.registry,
        )
        self.between = Histogram(
            "kvrewrite_time_between_tokens_seconds",
            "Between two tokens of an answer",
            buckets=BETWEEN,
            registry=self.registry,
        )

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Adds a number that is asked for when it is wanted."""
        Gauge(f"kvrewrite_{name}", what, registry=self.registry).set_function(value)

    def token(self, since: float, first: bool) -> None:
        """A token was made, so many seconds after what it is measured from."""
        self.tokens.inc()
        (self.first if first else self.between).observe(since)

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)
