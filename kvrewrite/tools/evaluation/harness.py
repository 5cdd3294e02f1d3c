"""Runs tasks of lm-eval (EleutherAI's lm-evaluation-harness) on rewritten models.

There are two kinds of requests. generate_until goes through `generate`, like any use of the model. loglikelihood (and
with it multiple_choice) is scored as who generates from the cache would see it: the context is compressed up to its last
token, once for all its choices, and that token and each continuation run on what is left. A request without a context
(loglikelihood_rolling, perplexities of whole texts) goes in token by token, each after what was kept before it. A policy that
evicts once, from a prompt, has nothing to evict there.

The results say in how many requests anything was evicted that a later token could have seen.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvrewrite.errors import ArtifactError, KVRewriteError, OptionError
from kvrewrite.runtime.whole_prompts import evicts_in_prompt
from kvrewrite.tools.evaluation.cells import BASELINE
from kvrewrite.tools.evaluation.run import Progress
from kvrewrite.tools.evaluation.scored import Asked, Ids, Score, score, score_about
from kvrewrite.tools.evaluation.settings import Settings, describe
from kvrewrite.tools.subjects import FULL_CACHE, Arm, Source, beside_baseline, budget_text, versions, write_json

if TYPE_CHECKING:
    from rich.table import Table


def require_lm_eval() -> None:
    """Raises OptionError if lm-eval, or what its transformers models need, is not installed."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"--harness lm_eval needs {' and '.join(missing)}: pip install 'lm-eval[hf]'")


# ------------------------------------------------------------------------------------------------------------ the model
def _model_class() -> Any:
    from lm_eval.models.huggingface import HFLM

    class RewrittenLM(HFLM):  # type: ignore[misc, valid-type]
        """lm-eval's transformers model around a rewritten one; counts the requests in which something is evicted."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_length: int | None):
            self.rewritten = model
            self.layers = sum(site.shares_kv_with is None for site in model.sites)
            self.batch_size_per_gpu: int
            self.counts = {"requests": 0, "evicted": 0}
            super().__init__(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
            )

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            about: dict[Ids, list[Asked]] = {}
            for i, (_, context, continuation) in enumerate(requests):
                text = tuple((context + continuation)[-(self.max_length + 1) :])
                before = len(text) - len(continuation) - 1
                about.setdefault(text[:before], []).append((i, text[before:-1], text[before + 1 :]))
                self._count(self._evicts(before, len(continuation)))
            answers: list[Any] = [None] * len(requests)
            for i, (nats, hits, count) in self._scores(about, int(override_bs or self.batch_size_per_gpu)):
                answers[i] = (-nats, hits == count)
                if (key := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[i])
            return answers

        def _evicts(self, before: int, count: int) -> bool:
            """Whether anything goes in a request of so many tokens of context and continuation."""
            policy = self.rewritten.policy
            if before:
                return evicts_in_prompt(policy, before, self.layers)
            return not policy.whole_prompt and evicts_in_prompt(policy, count, self.layers)

        def _scores(self, about: dict[Ids, list[Asked]], size: int) -> Iterator[tuple[int, Score]]:
            with torch.no_grad():
                alone = sorted(about.pop((), ()), key=lambda one: len(one[1]))
                for at in range(0, len(alone), size):
                    part = alone[at : at + size]
                    longest = max(len(given) for _, given, _ in part)
                    cache = self.rewritten.new_cache(len(part), max_length=longest)
                    given, wanted = [one[1] for one in part], [one[2] for one in part]
                    found = score(self.rewritten, cache, given, wanted, 0, one_by_one=self._evicts(0, longest))
                    yield from zip([one[0] for one in part], found, strict=True)
                yield from score_about(self.rewritten, about, size, 0)

        def _model_generate(self, context: Any, max_length: int, stop: Any, **kwargs: Any) -> Any:
            for length in kwargs["attention_mask"].sum(1).tolist():
                self._count(evicts_in_prompt(self.rewritten.policy, length, self.layers))
            return super()._model_generate(context, max_length, stop, **kwargs)

        def _count(self, evicted: bool) -> None:
            self.counts["requests"] += 1
            self.counts["evicted"] += evicted

        def get_model_info(self) -> dict[str, Any]:
            """Returns data about the rewritten model, not a hub name, which lm-eval would look up."""
            return {"policy": self.rewritten.program.policy, "model_dtype": str(self.rewritten.dtype)}

    return RewrittenLM


# -------------------------------------------------------------------------------------------------------------- running
def run(
    settings: Settings,
    tasks: list[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    out: Path | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Runs tasks of lm-eval over policies and budgets, the full cache first; modes do not apply, prompts are whole.

    include_path: a directory of task files (YAML). limit: samples per task. out: written after every arm. Raises
    OptionError for unknown tasks before a model is loaded.
    """
    require_lm_eval()
    for name in ("lm_eval", "httpx", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for spec in settings.policies:
        spec.check()
    manager, loaded = _tasks(tasks, include_path)
    types = {name: str(task.config.output_type) for name, task in loaded.items()}
    source = Source(settings.model, device=settings.device, dtype=settings.dtype)
    planned = [FULL_CACHE, *beside_baseline(settings.policies, settings.budgets)]

    import lm_eval

    results: dict[str, Any] = {
        "kind": "kvrewrite eval --harness lm_eval",
        "format": 1,
        "versions": {**versions(), "lm_eval": lm_eval.__version__},
        "settings": {**describe(settings, source), "tasks": tasks, "limit": limit, "output_types": types},
        "cells": [],
    }
    for name in ("samples", "tokens", "modes"):
        del results["settings"][name]
    total = len(planned) * len(types)
    for done, arm in enumerate(planned):
        try:
            progress(f"{arm}: rewriting", done * len(types), total)
            model = source.rewritten(arm)
        except KVRewriteError as error:
            results["cells"] += [{**_cell(arm, n), "status": "refused", "reason": str(error)} for n in types]
            continue
        for i, name in enumerate(types):
            progress(f"{arm}: {name}", done * len(types) + i, total)
            found = _run_task(settings, source, model, loaded[name], manager, limit)
            results["cells"].append({**_cell(arm, name), **found})
        if out is not None:
            write_json(out, results)
    progress("done", total, total)
    if out is not None:
        write_json(out, results)
    return results


def _tasks(names: list[str], include_path: Path | None) -> tuple[Any, dict[str, Any]]:
    """Returns lm-eval's task manager and the tasks of these names, with groups expanded."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ArtifactError(f"--include-path {include_path}: expected a directory of task files (YAML)")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            import difflib

            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise OptionError(f"lm-eval has no task {name!r}{hint}; task files of your own need --include-path")
    try:
        loaded = manager.load(names)
    except Exception as error:  # a task's data set may raise anything
        raise ArtifactError(f"lm-eval could not load {', '.join(names)}: {type(error).__name__}: {error}") from error
    return manager, dict(loaded["tasks"])


def _cell(arm: Arm, task: str) -> dict[str, Any]:
    mode = BASELINE if arm.is_baseline else "aware"
    return {
        "policy": arm.spec.name,
        "label": arm.spec.label,
        "options": dict(arm.spec.options),
        "budget": arm.budget,
        "mode": mode,
        "task": task,
    }


def _run_task(
    settings: Settings, source: Source, model: Any, task: Any, manager: Any, limit: int | None
) -> dict[str, Any]:
    import lm_eval

    lm = _model_class()(model, source.tokenizer, settings.batch_size, None)
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except KVRewriteError as error:
        return {"status": "refused", "reason": str(error)}
    name = task.task_name
    numbers = found["results"][name]
    metrics = {}
    for key, value in numbers.items():
        metric, _, suffix = key.partition(",")
        if suffix and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            spread = numbers.get(f"{metric}_stderr,{suffix}")
            shown = f"{metric},{suffix}" if suffix != "none" else metric
            metrics[shown] = {"value": float(value), "stderr": spread if isinstance(spread, float) else None}
    samples = found["n-samples"][name]["effective"]
    return {"status": "ok", "metrics": metrics, "n": samples, **lm.counts}


def table(results: dict[str, Any]) -> tuple[Table, list[str]]:
    """Returns all metrics, one per row, and notes."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title="lm-eval", title_justify="left")
    for name in ("policy", "budget", "task", "metric", "value", "± stderr", "n", "requests that evict"):
        made.add_column(name, justify="left" if name in ("policy", "task", "metric") else "right", overflow="fold")
    notes: list[str] = []
    for cell in results["cells"]:
        head = [escape(cell["label"]), budget_text(cell["budget"]), escape(cell["task"])]
        if cell["status"] != "ok":
            if cell["reason"] not in notes:
                notes.append(cell["reason"])
            made.add_row(*head, escape(f"refused [{notes.index(cell['reason']) + 1}]"), "", "", "", "")
            continue
        for metric, found in cell["metrics"].items():
            error = "-" if found["stderr"] is None else f"{found['stderr']:.4f}"
            evicted = f"{cell['evicted']} of {cell['requests']}"
            made.add_row(*head, escape(metric), f"{found['value']:.4f}", error, str(cell["n"]), evicted)
    return made, [f"[{i + 1}] {note}" for i, note in enumerate(notes)]


__all__ = ["require_lm_eval", "run", "table"]
