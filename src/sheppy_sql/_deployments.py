"""How a migration gets its connection, and its turn."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sheppy import BackendError
from sqlalchemy import func, select, text

from . import _urls
from ._dialects import dialect_named
from ._errors import Fault, backend_error, fault, is_driver_error

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from ._dialects import Dialect

T = TypeVar("T")

logger = logging.getLogger("sheppy_sql")

CONNECT_TIMEOUT = 10.0  # seconds
LONGEST_TURN = 120.0  # seconds
LOCKED_GRACE = 60.0  # seconds
"""For which a migration is tried again where others hold the locks that it needs."""
LOCKED_PAUSE = 2.0  # seconds
"""Between two tries, at least: the workers get what had queued up."""
LOCK_KEY = 0x7368_6570_7079  # "sheppy", for pg_try_advisory_xact_lock

_turn = threading.Lock()


async def connected(url: str | URL, operation: Callable[[Connection], T], *, action: str) -> T:
    """What `operation` returns, once committed."""
    async with opened(url, action) as (engine, dialect), engine.connect() as connection:
        await connection.run_sync(partial(dialect.begin, write=not dialect.embedded))
        async with alone():
            outcome = await connection.run_sync(operation)
        await connection.commit()
        return outcome


async def migrated(
    url: str | URL,
    operation: Callable[[Connection], None],
    check: Callable[[Connection], None] = lambda _: None,
) -> None:
    """Run a migration after what it depends on was checked; again where it meets locks."""
    deadline = time.monotonic() + LOCKED_GRACE
    async with opened(url, "migrate the tables") as (engine, dialect):
        while True:
            try:
                return await _migrated_once(engine, dialect, operation, check)
            except Exception as error:
                conflict = is_driver_error(error) and fault(error) is Fault.CONFLICT
                # SQLite has waited itself.
                if dialect.embedded or not conflict or time.monotonic() > deadline:
                    raise
            logger.info("The tables are in use; the migration is tried again")
            await asyncio.sleep(LOCKED_PAUSE * random.uniform(1, 2))  # noqa: S311  # no secret


async def _migrated_once(
    engine: AsyncEngine,
    dialect: Dialect,
    operation: Callable[[Connection], None],
    check: Callable[[Connection], None],
) -> None:
    async with _turn_of(engine, dialect), engine.connect() as connection:
        await connection.run_sync(partial(dialect.begin, write=True))
        await connection.run_sync(check)
        if not dialect.embedded:
            # Alembic begins and commits by itself: it has to, around an index that is built
            # CONCURRENTLY.
            await connection.rollback()
        async with alone():
            await connection.run_sync(operation)
        await connection.commit()


@asynccontextmanager
async def _turn_of(engine: AsyncEngine, dialect: Dialect) -> AsyncIterator[None]:
    """Two deployments at once: the second waits, then finds nothing to do."""
    if dialect.embedded:  # where one transaction writes at a time
        yield
        return
    # On a connection of its own, since the migration commits on the way. Not a lock of the
    # session, which a pooler would give to others.
    async with engine.connect() as guard:
        await guard.run_sync(partial(dialect.begin, write=True))
        await take_turn(guard)
        await guard.execute(text("SET LOCAL idle_in_transaction_session_timeout TO 0"))
        yield


async def take_turn(connection: AsyncConnection) -> None:
    """Take the lock of a deployment, until the end of the transaction, which must be a new one."""
    # Not by a statement that waits, and not in one transaction: an index that another one builds
    # CONCURRENTLY waits for the end of each that has a snapshot, and so for us who wait for it. The
    # driver's last statement keeps its snapshot until the next.
    attempt = select(func.pg_try_advisory_xact_lock(LOCK_KEY))
    while not await connection.scalar(attempt):
        await connection.rollback()
        await asyncio.sleep(random.uniform(0.05, 0.2))  # noqa: S311  # no secret


@asynccontextmanager
async def opened(url: str | URL, action: str) -> AsyncIterator[tuple[AsyncEngine, Dialect]]:
    """An engine for a moment; BackendError says that `action` failed."""
    target = _urls.parse(url)
    dialect = dialect_named(target.url.get_backend_name())
    engine = dialect.create_engine(
        target, pool_size=1 if dialect.embedded else 2, connect_timeout=CONNECT_TIMEOUT
    )
    try:
        yield engine, dialect
    except Exception as error:
        if not is_driver_error(error):
            raise
        raise backend_error(action, error) from None
    finally:
        await engine.dispose()


@asynccontextmanager
async def alone() -> AsyncIterator[None]:
    """Alembic keeps what it is doing in module globals: one migration at a time in a process."""
    deadline = time.monotonic() + LONGEST_TURN
    # Not a blocking acquire: whoever holds it may need this event loop to go on.
    while not _turn.acquire(blocking=False):
        if time.monotonic() > deadline:
            raise BackendError("Failed to migrate: another migration in this process does not end")
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        _turn.release()


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from synchronous code, be a loop running around it or not."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()
