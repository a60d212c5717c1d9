"""SqlBackend: sheppy's storage on PostgreSQL or SQLite."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from sheppy import BackendError, Queue, Task
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session

from . import _unit, _urls
from ._bound import BoundBackend
from ._calls import Calls
from ._claims import Claims
from ._completion import Completion
from ._options import DEFAULT_MAX_PAYLOAD_BYTES, DEFAULT_TTL, INHERIT, Options
from ._payloads import Payload
from ._session import Session
from .schema import DEFAULT_PREFIX, build_tables


class SqlBackend(Calls):
    """All of sheppy on a SQL database.

    Args:
        url_or_engine: A URL (`postgresql+asyncpg://user@host/db`,
            `sqlite+aiosqlite:///dev.db`, or what a hosting provider gives), or an
            AsyncEngine on asyncpg or aiosqlite, which stays the caller's: disconnect()
            leaves it open.
        schema: PostgreSQL schema of the tables; None for the first in the search path.
        table_prefix: What every table's name begins with. Two installations in one
            database need different schemas or prefixes.
        ttl: Seconds that finished tasks are kept; None for ever. Default 30 days.
        error_ttl: The same for failed, crashed and cancelled ones; "inherit" (default)
            for the same as `ttl`.
        max_payload_bytes: Largest task, result or workflow, as JSON. Default 64 MiB.
        pool_size: Most connections for this instance's calls. Default 4. Ignored with an engine.
            One more hears of notifications, once something waits, and one renews the lease.
        connect_timeout: Seconds to wait for a connection. Default 10. Ignored with an engine.
        max_poll_interval: Longest pause, in seconds, between two looks at the database
            while waiting for a task or a result of another process. Default 0.25. Where
            notifications are known to come it is 5, or this if that is longer.
        notify: Whether processes tell each other of tasks and results, on PostgreSQL by
            LISTEN and NOTIFY. "auto" (default): yes, and where no notification comes back,
            as behind PgBouncer in transaction mode, looks go on instead. "on": whoever waits
            gets BackendError there. "off": looks only.
        outage_grace: Seconds for which every call waits for a database that is gone to
            come back, before it raises BackendError. Default 60.
        lease: Seconds after which the tasks of a worker that died are taken by others,
            at most; as long as it lives it keeps them. Default 60, at least 1.
        max_loop_stall: Seconds after which a worker whose event loop does not turn counts
            as dead; None (default) for never.
        on_crash: What becomes of a task whose worker died: "requeue" (default), so it may
            run twice, or "fail". The next sheppy decides that itself.
        max_crashes: How many workers may die of a task before it fails. Default 5.
        resume_workflows_after: Seconds after which a workflow is resumed whose tasks have all
            ended and which nobody has gone on with, as its worker or producer died between two
            steps. Only backends that take tasks of its queue do it. Default 60; None: never.
        migrate: Make or upgrade the tables on connect(). SQLite always does; on
            PostgreSQL prefer "sheppy-sql db upgrade" in the deployment.
        prepared_statements: Whether PostgreSQL keeps statements between transactions. None
            (default): unless a pooler such as PgBouncer is found. False: never. True:
            always, as on a direct connection, or with a PgBouncer that is set up for it.

    Raises:
        ValueError: An option or the URL is wrong; nothing has been opened.
    """

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        schema: str | None = None,
        table_prefix: str = DEFAULT_PREFIX,
        ttl: float | None = DEFAULT_TTL,
        error_ttl: float | str | None = INHERIT,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        pool_size: int = 4,
        connect_timeout: float = 10.0,
        max_poll_interval: float = 0.25,
        notify: str = "auto",
        outage_grace: float = 60.0,
        lease: float = 60.0,
        max_loop_stall: float | None = None,
        on_crash: str = "requeue",
        max_crashes: int = 5,
        resume_workflows_after: float | None = 60.0,
        migrate: bool = False,
        prepared_statements: bool | None = None,
    ) -> None:
        database = _database_of(url_or_engine)
        if schema is not None and database == "sqlite":
            raise ValueError("schema is PostgreSQL's; on SQLite use table_prefix or another file")
        self._url_or_engine = url_or_engine
        self._options = Options(
            schema=schema,
            table_prefix=table_prefix,
            ttl=ttl,
            error_ttl=error_ttl,
            max_payload_bytes=max_payload_bytes,
            pool_size=pool_size,
            connect_timeout=connect_timeout,
            max_poll_interval=max_poll_interval,
            notify=notify,
            outage_grace=outage_grace,
            lease=lease,
            max_loop_stall=max_loop_stall,
            on_crash=on_crash,
            max_crashes=max_crashes,
            resume_workflows_after=resume_workflows_after,
            migrate=migrate,
            prepared_statements=prepared_statements,
        )
        self._tables = build_tables(schema, table_prefix)
        self._claims = Claims()
        self._claims_pid = os.getpid()
        self._session: Session | None = None
        self._connecting: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    async def connect(self) -> None:
        """Open the connection; harmless where it is open.

        Raises BackendError where the server, its tables or its version cannot be used.
        """
        # The host calls connect() from several coroutines at once, with no lock of its own.
        async with self._connect_lock():
            if self._session is not None and self._session.database.is_usable:
                self._session.database.check_loop()
                return
            if self._session is not None:
                self._abandon(self._session)
            self._session = await Session.open(
                self._url_or_engine,
                self._tables,
                self._claims,
                self._options,
                host_decides=self._host_decides,
                resume_workflow=self._resume_workflow,
            )

    async def disconnect(self) -> None:
        """Close the connection; harmless where it is closed.

        Calls under way are finished first, and tasks that this instance has taken and not
        stored go back into their queue. asyncio.run() does the same at its end.
        """
        async with self._connect_lock():
            session = self._session
            if session is not None and session.database.is_usable:
                session.database.check_loop()
                self._session = None
                await session.close()
            elif session is not None:
                self._abandon(session)

    @property
    def is_connected(self) -> bool:
        """Also False in a forked child, and once the event loop that connected is closed."""
        return self._session is not None and self._session.database.is_usable

    def bind(
        self,
        session: AsyncSession | async_scoped_session[AsyncSession] | AsyncConnection,
        *,
        notify: bool = False,
    ) -> BoundBackend:
        """A backend that enqueues in the caller's transaction, for `Queue(backend.bind(session))`.

        What is enqueued, scheduled, cancelled or looked at through it happens on the session or
        connection: nobody sees it before that is committed, and it is gone if that is rolled
        back. Workers are woken after the commit, by this process. The session must be on this
        backend's database, by whatever engine.

        Args:
            session: An asynchronous one; else ValueError.
            notify: Whether on PostgreSQL the transaction's own commit wakes the workers of other
                processes. That is a little sooner, and also where this process dies right after
                it. But commits that notify go one at a time in all of the database.
        """
        if not isinstance(notify, bool):
            raise ValueError("notify must be True or False")
        return BoundBackend(session, connect=self._session_now, notify=notify)

    @asynccontextmanager
    async def complete(self, task: Task, queue: str | None = None) -> AsyncIterator[Completion]:
        """The transaction in which a running task completes: its rows, its result, its end.

            async with backend.complete(current) as tx:
                tx.add(Order(..))
                tx.set_result("ordered")

        `tx` is an AsyncSession. Leaving the block, or `await tx.commit()`, commits it once: what
        was written through it, the task's result and the end of its claim together. Raising
        inside rolls all of it back. What sheppy's worker says of the task afterwards, such as that
        it failed, changes nothing.

        Args:
            task: The task that is running, from its function's `current: Task = CURRENT_TASK`.
            queue: Its queue's name; only needed where tasks of several queues have one id.

        Raises:
            BackendError: The task is not running here, it was retried, cleared or taken over
                meanwhile, or it has completed before.
            ValueError: `task` is no Task, or `queue` is needed.
        """
        session = await self._session_now()
        async with session.completer.complete(task, queue) as completion:
            yield completion

    async def pop(
        self, queue_name: str, limit: int = 1, timeout: float | None = None
    ) -> list[Payload]:
        """Up to `limit` tasks, claimed, first in first out.

        Waits up to `timeout` seconds for the first one; None or 0: not at all.
        """
        return await self._connected.consumer.pop(queue_name, limit, timeout)

    async def pop_scheduled(self, queue_name: str, now: datetime | None = None) -> list[Payload]:
        """Tasks due at `now` (aware; None: by the database's clock), the earliest first.

        The caller appends them with unique=False; one that it does not is due again after 30 s.
        """
        return await self._connected.producer.pop_scheduled(queue_name, now)

    async def store_result(self, queue_name: str, task_data: Payload) -> bool:
        """Store a task that ran and end this instance's claim on it; always True.

        Nothing is changed where the claim was lost to a retry or a clear.
        """
        return await self._connected.storer.store_result(queue_name, task_data)

    async def acknowledge(self, queue_name: str, task_ids: list[str]) -> None:
        """End this instance's claims on tasks without changing what is stored."""
        await self._connected.consumer.acknowledge(queue_name, task_ids)

    async def get_results(
        self, queue_name: str, task_ids: list[str], timeout: float | None = None
    ) -> dict[str, Payload]:
        """Finished tasks by id.

        None or a negative timeout: those finished now. 0: wait for all, however long.
        Positive: wait that many seconds for all of them, else TimeoutError.
        """
        return await self._connected.viewer.get_results(queue_name, task_ids, timeout)

    async def heartbeat(self, queue_name: str, task_ids: list[str]) -> None:
        """Keep this instance's claims on tasks from counting as stale."""
        await self._connected.consumer.heartbeat(queue_name, task_ids)

    async def get_stale_messages(self, queue_name: str, min_idle_ms: int) -> list[Payload]:
        """Tasks of other instances without a sign of life for so long, now claimed by this one."""
        return await self._connected.consumer.get_stale(queue_name, min_idle_ms)

    async def get_workflow_results(
        self, queue_name: str, workflow_ids: list[str], timeout: float | None = None
    ) -> dict[str, Payload]:
        """Workflows that have completed or failed, by id; `timeout` as in get_results."""
        return await self._connected.viewer.get_workflow_results(queue_name, workflow_ids, timeout)

    async def acquire_rate_limit(
        self,
        queue_name: str,
        key: str,
        max_rate: int,
        rate_period: float,
        task_id: str,
        strategy: str = "sliding_window",
    ) -> float | None:
        """None if the task may start now, else seconds to wait.

        At most `max_rate` starts in `rate_period` seconds, which slide along, or with
        "fixed_window" begin with the first start.
        """
        return await self._connected.limiter.acquire(
            queue_name, key, max_rate, rate_period, task_id, strategy
        )

    def _begin_unit(self, queue_name: str, task_id: str) -> None:
        """Of the task that runs in this context: see children_with_result."""
        _unit.begin(self._connected.wakeups, queue_name, task_id)

    async def _resume_workflow(self, queue_name: str, workflow_id: str) -> None:
        queue: Any = Queue(self, queue_name)
        # sheppy 0.0.7 has it here, its next release among what is experimental.
        if hasattr(queue, "resume_workflow"):
            await queue.resume_workflow(workflow_id)
        else:
            await queue.experimental._resume_workflow(workflow_id)

    @property
    def _host_decides(self) -> bool:
        """Whether the host's own interface has it that the worker looks after stale tasks.

        Its version does not tell: it was not raised.
        """
        declared = (vars(base).get("get_stale_messages") for base in type(self).__mro__)
        return any(getattr(method, "__isabstractmethod__", False) for method in declared)

    def _abandon(self, session: Session) -> None:
        """Forget a session of a closed event loop, or of the parent of this process."""
        self._session = None
        session.abandon()
        if self._claims_pid != os.getpid():
            self._claims, self._claims_pid = Claims(), os.getpid()
        self._claims.lose_all()

    def _disconnect_from_outside(self) -> None:
        """Disconnect while the event loop is not running; harmless where it is closed already."""
        session = self._session
        if session is not None and session.database.is_usable:
            session.database.loop.run_until_complete(self.disconnect())

    async def _session_now(self) -> Session:
        """The session, opened where it is not."""
        if not self.is_connected:
            await self.connect()
        return self._connected

    @property
    def _connected(self) -> Session:
        if self._session is None or not self._session.database.is_usable:
            raise BackendError("Not connected: call connect() first")
        return self._session

    def _connect_lock(self) -> asyncio.Lock:
        """The lock of the running event loop; one from a closed loop must not be used again."""
        loop = asyncio.get_running_loop()
        if self._connecting is None or self._connecting[0] is not loop:
            self._connecting = (loop, asyncio.Lock())
        return self._connecting[1]

    def __repr__(self) -> str:
        shown = self._url_or_engine
        url = shown.url if isinstance(shown, AsyncEngine) else shown
        return f"SqlBackend({_urls.redact(url)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled unconnected: the host's "work --reload" sends its backend to a new process."""
        if isinstance(self._url_or_engine, AsyncEngine):
            raise TypeError("A SqlBackend on an engine cannot be pickled; make it from a URL")
        return _rebuild, (type(self), self._url_or_engine, dataclasses.asdict(self._options))


def _rebuild(kind: type[SqlBackend], url: str | URL, options: dict[str, Any]) -> SqlBackend:
    return kind(url, **options)


def _database_of(url_or_engine: str | URL | AsyncEngine) -> str:
    """SQLAlchemy's name of the database; ValueError where it is not one of ours."""
    if not isinstance(url_or_engine, AsyncEngine):
        return _urls.parse(url_or_engine).url.get_backend_name()
    if url_or_engine.driver not in {"asyncpg", "aiosqlite"}:
        raise ValueError(
            f"The engine uses {url_or_engine.dialect.name}+{url_or_engine.driver}; accepted are "
            "postgresql+asyncpg and sqlite+aiosqlite"
        )
    return url_or_engine.dialect.name
