"""Tests of this folder that are marked `gpu` need a CUDA device, and are skipped where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu" and item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture
def two_devices() -> torch.device:
    """A device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, and torch sees one")
    return torch.device("cuda", 1)
