"""Settings for all tests: one thread a worker (pytest-xdist makes as many workers as there are cores), GPU tests skipped
where there is no GPU, and no network."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import logging
import os
from typing import Any

import pytest
import torch

from tests.support import cpu_seconds, products, shards

if (
    not torch.cuda.is_available()
):  # kernels run in Triton's interpreter, which has to be chosen before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)
# Tracing makes many objects that live; with Python's thresholds looking for cycles among them takes 4 to 7% of the time.
gc.set_threshold(200_000, 20, 100)
# torch writes down graphs and stacks of each trace if somebody listens, and pytest listens to loggers that don't propagate: a
# quarter of the time of tests that compile.
logging.getLogger("torch.__trace").propagate = True


def quick_interpreter() -> None:
    """Has Triton's interpreter do once what it does again and again: half of the time of kernels in it.

    It computes every sum, difference and product of integers again in 64 bits for an assertion that they did not overflow, and
    its assertions are made only with the option `debug`, which it does not have. And for every call of a function in a kernel
    it looks through all of triton.language for what to replace, which the kernel's launch has replaced before. For every op it
    makes a table of all dtypes anew.
    """
    from triton import language
    from triton.runtime import interpreter

    builder, replace = interpreter.interpreter_builder, interpreter._patch_lang
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    @functools.cache
    def seen_by(fn: Any) -> list[Any]:
        return [value for value in fn.__globals__.values() if value is language or value is language.core]

    def replace_once(fn: Any) -> Any:
        if any(language.core.is_builtin(module.load) for module in seen_by(fn)):
            return replace(fn)
        return interpreter._LangPatchScope()  # with nothing to restore

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = replace_once

    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)

    def np_dtype(dtype: Any) -> Any:
        dtype = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        return look_up(dtype) if isinstance(dtype, language.pointer_type) else known(dtype)  # pointers have no hash

    interpreter._get_np_dtype = np_dtype


def with_new_numpy() -> None:
    """Has Triton 3.6's interpreter take an array of one number for a number, which numpy 2.4 no longer does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    quick_interpreter()
    with_new_numpy()


def trace_once() -> None:
    """Has every capture of an equal model give a copy of the first one; tests/capture/conftest.py takes it back there."""
    from kvrewrite.capture import frontend
    from tests.support import shared_captures

    frontend._capture = shared_captures.share(shared_captures.TRACE)


trace_once()


@functools.cache
def families() -> set[str]:
    from tests.support import rewritten, zoo

    return {*zoo.FAMILIES, *zoo.WALKED, *rewritten.FOREIGN}


def family_of(item: pytest.Item) -> str | None:
    """The model family that a test takes its captured model of (tests/support/rewritten.py)."""
    from tests.support import rewritten

    shared = (rewritten.traced, rewritten.captured, rewritten.own, rewritten.rewritten)
    if not any(getattr(item.module, function.__name__, None) is function for function in shared):
        return None
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    value = parameters.get("family", parameters.get("name"))
    return value if isinstance(value, str) and value in families() else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FILE", help="write the CPU seconds of each test to FILE (JSON)")
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N shares of the tests, such as 1/4")


def pytest_configure(config: pytest.Config) -> None:
    cpu_seconds.watch(config)
    if which := config.getoption("--shard"):
        config.pluginmanager.register(shards.Shard(which))


def pytest_collection_finish() -> None:
    """Takes what was imported out of Python's search for cycles: gc.collect() takes a third of a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def small_heap() -> None:
    """For tests that call gc.collect() often: what is there before them, models above all, is not searched each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that bindings find nothing leaked


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests by the family whose capture they share, skips tests marked `gpu` on machines without one, and leaves those
    marked `coverage`, `slow` or `thorough` out unless they are asked for."""
    products.thin(items)
    for item in items:
        if not item.get_closest_marker("xdist_group") and (family := family_of(item)):
            item.add_marker(pytest.mark.xdist_group(family))
    for marker in ("coverage", "slow", "thorough"):
        if marker not in (config.option.markexpr or ""):
            # By marker: among an item's keywords are the names of its folders.
            long = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
    if "thorough" in (config.option.markexpr or ""):
        shards.split(items, {"policies", "options", *families()})
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
