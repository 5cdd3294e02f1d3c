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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` on machines without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
