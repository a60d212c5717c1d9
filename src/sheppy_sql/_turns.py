"""Taking turns: at an engine with one connection, and at a file that one transaction may lock."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from sqlalchemy import Engine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_locks: weakref.WeakKeyDictionary[Engine, tuple[asyncio.AbstractEventLoop, asyncio.Lock]] = (
    weakref.WeakKeyDictionary()
)


def _no_file() -> None:
    return None


_locked_file: ContextVar[Callable[[], str | None]] = ContextVar(
    "sheppy_sql_locked_file", default=_no_file
)


def locked_file() -> str | None:
    """The SQLite file that a transaction of this very task has locked at this moment."""
    return _locked_file.get()()


@contextlib.contextmanager
def locking(file: Callable[[], str | None]) -> Iterator[None]:
    """Have `file` tell, in this context, what `locked_file` is."""
    before = _locked_file.get()
    _locked_file.set(file)
    try:
        yield
    finally:
        # Not by its token: whoever is cancelled may end elsewhere.
        _locked_file.set(before)


def turn_of(engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> asyncio.Lock:
    """The engine's own lock: two backends on one in-memory engine share its only connection."""
    made_in, lock = _locks.get(engine.sync_engine, (None, None))
    if made_in is not loop or lock is None:
        lock = asyncio.Lock()
        _locks[engine.sync_engine] = (loop, lock)
    return lock
