"""What every test of the host's features starts from, and what none may leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.host import middleware, tasks


@pytest.fixture(autouse=True)
def _fresh_records() -> None:
    tasks.journal.clear()
    tasks.gates.clear()
    tasks.mended.clear()
    middleware.seen.clear()


@pytest.fixture(autouse=True)
def _no_swallowed_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A worker logs what its backend raises, and goes on or ends in silence."""
    yield
    swallowed = [record for record in caplog.get_records("call") if record.exc_info]
    assert not swallowed, "\n".join(record.getMessage() for record in swallowed)
