"""A fixture for pytest. The manager is imported only if a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from panguard_manager import ManualClock, Server


@pytest.fixture
def guard_manager() -> Iterator[Server[ManualClock]]:
    """A manager in a temporary folder, on a free port, whose clock the test moves."""
    from panguard_manager import ManualClock, Server

    with Server(port=0, clock=ManualClock()) as server:
        yield server
