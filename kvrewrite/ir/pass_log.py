"""Logs each pass in torch's own logs: TORCH_LOGS="kvrewrite" for one line per pass, "+kvrewrite" also for its graph.

TORCH_LOGS is parsed while torch is imported, before a package outside torch can register an alias or an artifact; but
it accepts any importable module's name, so the logger is named after this module. With TORCH_TRACE the graph after
every pass is an artifact `kvrewrite_PASS`, which tlparse lists by that name. When both are off, a pass costs two
checks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch import fx
from torch._logging import trace_structured

log = logging.getLogger("kvrewrite.ir.pass_log")


class PassLog:
    """Reports passes that run one after another on a graph; the time between two reports is the later pass's."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._nodes: int | None = None

    def done(self, name: str, gm: fx.GraphModule, *, timed: bool = True) -> None:
        """Reports the pass `name`, whose result is the graph as it is now. timed: it ran since the last report."""
        if log.isEnabledFor(logging.INFO):
            milliseconds = (time.perf_counter() - self._started) * 1000
            nodes = len(gm.graph.nodes)
            before = "" if self._nodes is None else f"{self._nodes} -> "
            took = f", {milliseconds:.1f} ms" if timed else ""
            log.info("%s: %s%d nodes%s", name, before, nodes, took)
            log.debug("graph after %s:\n%s", name, gm.graph)
            self._nodes = nodes
        self._trace(name, lambda: str(gm.graph))

    def parts(self, name: str, count: int, graphs: Sequence[fx.GraphModule]) -> None:
        """Reports the pass `name`, which cut a graph into `count` parts; graphs: the distinct ones."""

        def text() -> str:
            return "\n".join(f"# {i + 1} of {len(graphs)} distinct parts\n{gm.graph}" for i, gm in enumerate(graphs))

        if log.isEnabledFor(logging.INFO):
            milliseconds = (time.perf_counter() - self._started) * 1000
            nodes = sum(len(gm.graph.nodes) for gm in graphs)
            log.info("%s: %d parts, %d distinct of %d nodes, %.1f ms", name, count, len(graphs), nodes, milliseconds)
            log.debug("graphs after %s:\n%s", name, text())
        self._trace(name, text)

    def _trace(self, name: str, text: Callable[[], str]) -> None:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"kvrewrite_{name}", "encoding": "string"},
            payload_fn=text,
            expect_trace_id=False,  # a checkpoint is converted outside any frame that Dynamo compiles
        )
        self.restart()

    def restart(self) -> None:
        """Excludes the time until now from the next pass's time."""
        self._started = time.perf_counter()
