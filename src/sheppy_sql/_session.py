"""What exists between connect() and disconnect()."""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine

from . import _pruner, _urls, _waiting, _wakeups
from ._appender import Appender
from ._background import Background
from ._completer import Completer
from ._consumer import Consumer
from ._database import Database
from ._definitions import Definitions
from ._dialects import dialect_named
from ._engines import abandon
from ._errors import is_missing_table
from ._heart import BEATS_PER_LEASE, Heart
from ._leases import Leases
from ._leftovers import Leftovers
from ._limiter import Limiter
from ._listener import Line, Subscription
from ._part import Part
from ._process import this_process
from ._producer import Producer
from ._pruner import Pruner
from ._reader import SharedReader
from ._remover import Remover
from ._storer import Storer
from ._stores import installation as installation_store
from ._stores import notifications as notification_store
from ._suspects import Suspects
from ._sweeper import Sweeper
from ._transaction import Transaction
from ._viewer import Viewer
from .schema import SCHEMA_VERSION, Tables

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from ._claims import Claims
    from ._dialects import Dialect
    from ._options import Options
    from ._stores.installation import Installation
    from ._sweeper import Resume
    from ._waiting import Notice
    from ._wakeups import Topic

logger = logging.getLogger("sheppy_sql")

CLOCK_TOLERANCE = 2.0  # seconds

_abandoned: list[AsyncGenerator[None, None]] = []


class Session:
    """One connected backend: its database, and the parts that work on it."""

    def __init__(
        self,
        database: Database,
        installation: Installation,
        claims: Claims,
        options: Options,
        *,
        create_engine: Callable[..., AsyncEngine] | None,
        host_decides: bool,
        resume_workflow: Resume,
        passing: bool = False,
    ) -> None:
        """`passing`: nobody else ever sees what it does, as all of it is rolled back in the end.

        So it needs neither signs of life nor chores, wakes nobody, and leaves the row of a queue,
        for which every other such session would wait, alone.
        """
        wakeups = _wakeups.Wakeups() if passing else _wakeups.hub(installation.name)
        suspects = Suspects()
        process = this_process()
        owner = f"{process.hostname}-{process.pid}-{uuid.uuid4().hex[:12]}"
        leases = Leases(
            database, wakeups, suspects, options, process, owner=owner, host_decides=host_decides
        )
        leftovers = Leftovers(database, wakeups, owner=owner)
        self.sweeper: Sweeper | None = None
        parts = [
            Part("look after claims", leases.reclaim, leases.interval),
            Part("hand back tasks", leftovers.hand_back, leases.interval),
            Part("prune", Pruner(database, options).prune, _pruner.INTERVAL),
        ]
        if options.resume_workflows_after is not None:
            self.sweeper = Sweeper(database, resume_workflow, grace=options.resume_workflows_after)
            parts.append(Part("resume workflows", self._sweep, self.sweeper.interval))
        # What ends with this process needs no signs of life.
        beats = not (host_decides or database.is_in_memory or passing)
        heart = Heart(database, process, options, owner=owner) if beats else None
        if heart is not None:
            parts.append(Part("renew leases", heart.beat_if_late, options.lease / BEATS_PER_LEASE))
        self._background = Background(heart, [] if passing else parts)
        self.options = options
        self.installation = installation
        self.database = database
        self.wakeups = wakeups
        self._subscription: Subscription | None = None
        if not (passing or database.is_in_memory or options.notify == "off"):
            self._subscription = Subscription(
                Line.joined_by(database, wakeups, installation.name),
                database,
                options.max_poll_interval,
                required=options.notify == "on",
            )
        pace = self._subscription or _waiting.Pace(options.max_poll_interval)
        self.queues: set[str] = set()
        """From which tasks are taken."""
        self.storer = Storer(
            database, wakeups, claims, leftovers, options, pace, queues=self.queues
        )
        self.consumer = Consumer(
            database,
            wakeups,
            claims,
            suspects,
            leftovers,
            self.storer,
            pace,
            queues=self.queues,
            owner=owner,
            begin=self._background.start,
            host_decides=host_decides,
        )
        self.producer = Producer(
            database,
            wakeups,
            claims,
            options,
            append_new=Appender(database, pace.carry).append,
            registers=not passing,
        )
        self.remover = Remover(database, wakeups, options)
        self.viewer = Viewer(database, wakeups, pace, SharedReader(database))
        self.definitions = Definitions(database, wakeups, options)
        self.limiter = Limiter(database, claims)
        self.completer = Completer(
            database,
            wakeups,
            claims,
            options,
            create_engine=create_engine,
            completed=self.storer.completed,
        )
        self._owns_engine = create_engine is not None
        self._end = self._until_end()
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        url_or_engine: str | URL | AsyncEngine,
        tables: Tables,
        claims: Claims,
        options: Options,
        *,
        host_decides: bool,
        resume_workflow: Resume,
    ) -> Session:
        """Connect by a URL, or through an engine that stays the application's.

        `host_decides`: the host gives signs of life of its own, and says what is stale.
        Raises BackendError where the server or its tables cannot be used.
        """
        create_engine: Callable[..., AsyncEngine] | None = None
        if isinstance(url_or_engine, AsyncEngine):
            engine = url_or_engine
            dialect = _dialect(engine.dialect.name, options)
            dialect.adopt(engine)
        else:
            target = _urls.parse(url_or_engine)
            dialect = _dialect(target.url.get_backend_name(), options)
            create_engine = functools.partial(
                dialect.create_engine,
                target,
                pool_size=options.pool_size,
                connect_timeout=options.connect_timeout,
            )
            engine = create_engine()
        database = Database(
            engine,
            tables,
            dialect,
            outage_grace=options.outage_grace,
            is_ours=create_engine is not None,
        )
        try:
            return await cls.on(
                database,
                claims,
                options,
                create_engine=create_engine,
                host_decides=host_decides,
                resume_workflow=resume_workflow,
            )
        except BaseException:
            await database.close()
            if create_engine is not None:
                await engine.dispose()
            raise

    @classmethod
    async def on(
        cls,
        database: Database,
        claims: Claims,
        options: Options,
        *,
        create_engine: Callable[..., AsyncEngine] | None,
        host_decides: bool,
        resume_workflow: Resume,
        passing: bool = False,
    ) -> Session:
        """A session on a database that is there, after a look at whether it can be used."""
        offset = await database.read("connect", _check_server)
        installation = await _installation(database, options)
        if offset is not None and abs(offset) > CLOCK_TOLERANCE:
            logger.warning(
                "This machine's clock and the database's differ by %.1f s: tasks scheduled "
                "from here start that much off; synchronise the clocks",
                abs(offset),
            )
        session = cls(
            database,
            installation,
            claims,
            options,
            create_engine=create_engine,
            host_decides=host_decides,
            resume_workflow=resume_workflow,
            passing=passing,
        )
        await anext(session._end)
        return session

    def notice_of(self, topics: Iterable[Topic]) -> Notice:
        """What tells other processes of topics; this one hears of them without."""
        marks = [_wakeups.mark(topic) for topic in topics]
        return notification_store.notice_of(self.installation.name, self.wakeups.id, marks)

    async def close(self) -> None:
        """Finish what is under way, hand back what is claimed, then leave the database.

        Goes on where its caller is cancelled.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._end.aclose())
        await asyncio.shield(self._closing)

    def abandon(self) -> None:
        """Leave without a word: the event loop is closed, or the sockets are the parent's."""
        if self._owns_engine:
            abandon(self.database.engine)
        self.completer.abandon()
        self._background.abandon()
        if self._subscription is not None:
            self._subscription.abandon()
        # Never finalised: the generator's end would signal the parent's event loop.
        _abandoned.append(self._end)

    async def _sweep(self) -> None:
        if self.sweeper is not None:
            await self.sweeper.sweep(sorted(self.queues))

    async def _until_end(self) -> AsyncGenerator[None, None]:
        """Closes the session when it is closed itself, by whomever.

        asyncio.run() closes the generators that are still open when all else has
        ended. The host's worker cancels its pop, awaits it no more and never
        disconnects: this is where what that pop took goes back.
        """
        try:
            yield
        finally:
            try:
                await self._background.stop_parts()
                self.viewer.close()
                await self.consumer.stop()
                await self._background.stop_heart()
                await self.consumer.hand_back_all()
                if self._subscription is not None:
                    await self._subscription.close()
                await self.database.close()
            finally:
                await self.completer.close()
                if self._owns_engine:
                    await self.database.engine.dispose()


def _dialect(name: str, options: Options) -> Dialect:
    return dialect_named(name, prepared_statements=options.prepared_statements)


async def _check_server(tx: Transaction) -> float | None:
    """Seconds by which the server's clock is ahead of this machine's, if it has its own."""
    before = datetime.now(timezone.utc)
    server_time = await tx.do(tx.dialect.check_server)
    after = datetime.now(timezone.utc)
    if server_time is None:
        return None
    return (server_time - (before + (after - before) / 2)).total_seconds()


async def _installation(database: Database, options: Options) -> Installation:
    """The tables' version, after bringing it up where that is ours to do."""
    found = await database.read("connect", _read_installation)
    outdated = found is None or found.version < SCHEMA_VERSION
    if outdated and (database.dialect.embedded or options.migrate):
        await database.converse("migrate the tables", _migrate, options)
        found = await database.read("connect", _read_installation)
    found = installation_store.check(found)
    if found.version > SCHEMA_VERSION:
        logger.info(
            "The tables have version %d, newer than this sheppy-sql's %d, and still accept it",
            found.version,
            SCHEMA_VERSION,
        )
    return found


async def _read_installation(tx: Transaction) -> Installation | None:
    try:
        return await installation_store.read(tx)
    except Exception as error:
        if is_missing_table(error):
            return None
        raise


async def _migrate(tx: Transaction, options: Options) -> None:
    # Here, since Alembic takes a fifth of a second that a worker has no use for.
    from . import migrate

    names = migrate.Names(options.schema, options.table_prefix)
    await migrate.upgrade_in(tx.connection, names)
