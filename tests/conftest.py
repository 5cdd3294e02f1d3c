"""Settings for all tests: one thread a worker (pytest-xdist makes as many workers as there are cores), GPU tests skipped
where there is no GPU, and no network."""

from __future__ import annotations

import os

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # kernels run in Triton's interpreter, which has to be chosen before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` on machines without one, and leaves those marked `coverage` or `slow` out unless they are asked
    for."""
    for marker in ("coverage", "slow"):
        if marker not in (config.option.markexpr or ""):
            # By marker: among an item's keywords are the names of its folders.
            long = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
