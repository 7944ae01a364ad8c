"""What every test starts from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests that name no number of examples of their own take it from here.
for name, count in (("quick", 200), ("ci", 2000), ("long", 50_000)):
    settings.register_profile(
        name, max_examples=count, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "quick"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _heedful_log_level() -> Iterator[None]:
    """Commands quieten the log for the rest of their process, which here is the test run's."""
    logger = logging.getLogger("heedful")
    level = logger.level
    yield
    logger.setLevel(level)
