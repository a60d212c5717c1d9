"""Fixtures for pytest: `pytest_plugins = ["sheppy_sql.testing.fixtures"]` in conftest.py.

They are synchronous, so they serve pytest-asyncio, anyio and tests that call asyncio.run().
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sheppy import Queue

from .. import migrate
from .._backend import SqlBackend
from ._clock import Clock


@pytest.fixture(scope="session")
def sheppy_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with our tables, to be copied; making one takes a fifth of a second."""
    file = tmp_path_factory.mktemp("sheppy") / "template.db"
    migrate.upgrade(_url(file))
    return file


@pytest.fixture
def sheppy_url(sheppy_template: Path, tmp_path: Path) -> str:
    """The URL of a SQLite file of the test's own, with our tables and no tasks."""
    file = tmp_path / "sheppy.db"
    shutil.copyfile(sheppy_template, file)
    return _url(file)


@pytest.fixture
def sheppy_backend(sheppy_url: str) -> Iterator[SqlBackend]:
    """A backend of the test's own on a temporary SQLite file; a Queue connects it by itself."""
    backend = SqlBackend(sheppy_url)
    yield backend
    backend._disconnect_from_outside()


@pytest.fixture
def sheppy_queue(sheppy_backend: SqlBackend) -> Queue:
    """The queue "test-queue" of that backend."""
    return Queue(sheppy_backend, "test-queue")


@pytest.fixture
def sheppy_clock() -> Iterator[Clock]:
    """The time of sheppy during the test; it stands still until it is moved."""
    with Clock() as clock:
        yield clock


def _url(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file.as_posix()}"
