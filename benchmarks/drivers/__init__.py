"""One face for every queue: what the workloads call."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from ..tally import Tally


class Driver(Protocol):
    """A queue `queue` in the store at `url`, through one library."""

    def __init__(self, url: str, queue: str) -> None: ...

    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:
        """Disconnect."""

    def build(self, count: int, *, stamped: bool = False) -> Sequence[Any]:
        """Tasks to add, made outside the clock; stamped ones note when they began."""

    async def add(self, task: Any) -> None:
        """Enqueue one task, durably where the store is."""

    async def add_many(self, tasks: Sequence[Any]) -> None:
        """Enqueue tasks in one call, by the library's own way in bulk."""

    async def work(self, concurrency: int, tally: Tally | None = None) -> None:
        """Run the library's worker until cancelled; each task that is done is counted."""


@contextlib.asynccontextmanager
async def opened(driver: str, url: str, queue: str) -> AsyncIterator[Any]:
    """A connected driver, named "package.module:Class"."""
    module, name = driver.split(":")
    made: Driver = getattr(importlib.import_module(module), name)(url, queue)
    await made.open()
    try:
        yield made
    finally:
        await made.close()
