"""Operations in a transaction of synchronous code.

What enqueues and looks is written once, as coroutines. They wait for nothing but their statements,
so where a statement blocks, they run to their end in one go.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sheppy import BackendError
from sqlalchemy import func, select

from . import _waiting, _wakeups
from ._callers import caller_of, give_up
from ._claims import Claims
from ._dialects import dialect_named
from ._drivers import Link
from ._errors import backend_error, is_driver_error, joined_error
from ._joined import MOVING_SNAPSHOTS, AfterCommit
from ._payloads import Payload, decode
from ._producer import Producer
from ._remover import Remover
from ._stores import installation as installation_store
from ._stores import notifications as notification_store
from ._stores import results as result_store
from ._transaction import Transaction, run
from ._validation import check_keys, check_queue, check_timeout
from .schema import build_tables

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from sqlalchemy import Executable

    from ._callers import Caller, Look
    from ._options import Options
    from ._stores.installation import Installation
    from ._transaction import Operation, Result
    from ._wakeups import Topic

logger = logging.getLogger("sheppy_sql")

P = ParamSpec("P")
T = TypeVar("T")

# By database, schema and prefix. Threads may add to it at once: they add the same.
_known: dict[tuple[Hashable, ...], Installation] = {}


tables_named = lru_cache(maxsize=20)(build_tables)


@dataclass(frozen=True, slots=True)
class SynchronousTransaction(Transaction):
    connection: Link  # type: ignore[assignment]  # the stores see no more of it than `execute`
    is_callers = True

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result:
        return self.connection.execute(statement, parameters)


class SynchronousDatabase:
    """Carries out operations on the caller's connection, once and as they come.

    In the caller's transaction, which is neither begun nor ended here. Only on a connection that
    commits each statement by itself they get one of their own.
    """

    def __init__(self, caller: Caller, options: Options) -> None:
        self.dialect = dialect_named("sqlite" if caller.embedded else "postgresql")
        self.committed = False
        """Whether what was written last is committed already."""
        self.installation: Installation | None = None
        self._caller = caller
        self._names = (options.schema, options.table_prefix)
        self._tables = tables_named(*self._names)

    async def write(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with self._told(action):
            link = self._caller.link()
            self.committed = link.autocommit and not link.in_transaction
            if not self.committed:
                transaction = await self._transaction(link, fixed=_has_fixed_snapshot(link))
                return await operation(transaction, *args, **kwargs)
            link.command(link.begin)
            try:
                outcome = await operation(await self._transaction(link), *args, **kwargs)
                link.command("COMMIT")
            except BaseException:
                if link.in_transaction:
                    give_up(lambda: link.command("ROLLBACK"))
                raise
            return outcome

    async def read(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with self._told(action):
            transaction = await self._transaction(self._caller.link())
            return await operation(transaction, *args, **kwargs)

    async def find_results(
        self, queue: str, ids: Sequence[str], *, waits: bool, for_ever: bool
    ) -> dict[str, str]:
        """Those of the tasks that are finished; no transaction stays open for it.

        `waits`: this is the first of several looks. BackendError where they could see nothing new.
        """
        with self._told("get results"), self._caller.looking() as look:
            transaction = await self._transaction(look.link)
            if waits and look.joined:
                _check_that_news_are_seen(look, for_ever=for_ever)
            return await result_store.get(transaction, queue, ids)

    @contextmanager
    def _told(self, action: str) -> Iterator[None]:
        self.committed = False
        try:
            yield
        except Exception as error:
            if not is_driver_error(error):
                raise
            self._caller.failed()
            # From None: what SQLAlchemy and the driver say may quote payloads.
            if self.committed:
                raise backend_error(action, error) from None
            raise (joined_error(action, error) or error) from None

    async def _transaction(self, link: Link, *, fixed: bool = False) -> SynchronousTransaction:
        """For stores; BackendError where the tables are not those of this code."""
        transaction = SynchronousTransaction(link, self._tables, self.dialect, fixed_snapshot=fixed)
        if self.installation is None:
            database = link.database
            key = (database, *self._names)
            known = _known.get(key)
            if known is None:
                known = installation_store.check(await installation_store.read(transaction))
                if database is not None:
                    _known[key] = known
            self.installation = known
        return transaction


class SynchronousBackend:
    """What sheppy's Queue needs of a backend to add, to schedule and to wait, and to cancel."""

    is_connected = True

    def __init__(self, connection: object, options: Options, *, notify: bool) -> None:
        """`notify`: whether the caller's transaction is to notify other processes."""
        caller = caller_of(connection)
        self._database = SynchronousDatabase(caller, options)
        signals = _Signals(self._database, caller, notify=notify)
        self._max_poll_interval = options.max_poll_interval
        self._producer = Producer(self._database, signals, Claims(), options, registers=False)
        self._remover = Remover(self._database, signals, options)

    async def append(
        self, queue_name: str, tasks: list[Payload], unique: bool = True
    ) -> list[bool]:
        return await self._producer.append(queue_name, tasks, unique=unique)

    async def schedule(
        self, queue_name: str, task_data: Payload, at: datetime, unique: bool = True
    ) -> bool:
        return await self._producer.schedule(queue_name, task_data, at, unique=unique)

    async def cancel(self, queue_name: str, task_id: str) -> Payload | None:
        return await self._remover.cancel(queue_name, task_id)

    async def get_results(
        self, queue_name: str, task_ids: list[str], timeout: float | None = None
    ) -> dict[str, Payload]:
        """Finished tasks by id; with a timeout all of them, or TimeoutError."""
        return self._wait(check_queue(queue_name), check_keys(task_ids, "task id"), timeout)

    def _wait(self, queue: str, ids: Sequence[str], timeout: float | None) -> dict[str, Payload]:
        seconds = _waiting.wait_seconds(check_timeout(timeout), zero_means_forever=True)
        deadline = time.monotonic() + seconds
        found: dict[str, Payload] = {}
        pause = _waiting.FIRST_POLL
        waits, for_ever = seconds > 0, math.isinf(seconds)
        while missing := [one for one in ids if one not in found]:
            is_last = time.monotonic() >= deadline
            texts = run(self._database.find_results(queue, missing, waits=waits, for_ever=for_ever))
            waits = False
            found.update({one: decode(text) for one, text in texts.items()})
            if len(found) == len(ids):
                break
            if is_last:
                if timeout is None or timeout < 0:
                    break
                raise TimeoutError(
                    f"Did not complete within {timeout} seconds; is the transaction that enqueued "
                    "it committed, and does a worker serve the queue?"
                )
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(2 * pause, self._max_poll_interval)
        return found


class _Signals:
    """Tells whoever waits of what is committed, where its commit can be heard of or tells it."""

    def __init__(self, database: SynchronousDatabase, caller: Caller, *, notify: bool) -> None:
        self._database = database
        self._caller = caller
        self._notify = notify

    def wake(self, topics: Iterable[Topic], *, told: bool = False) -> None:
        installation = self._database.installation
        if installation is None:
            return
        wakeups = _wakeups.hub(installation.name)
        topics, is_committed = list(topics), self._database.committed
        # A file tells by itself that it has changed.
        notifies = (self._notify or is_committed) and not self._database.dialect.embedded
        heard_here = is_committed or self._caller.session is not None
        if notifies:
            sender = wakeups.id if heard_here else notification_store.TO_ALL
            notice = notification_store.notice_of(
                installation.name, sender, [_wakeups.mark(topic) for topic in topics]
            )
            try:
                run(self._database.write("notify others", notification_store.send, notice))
            except BackendError as error:
                if not is_committed:
                    raise
                # What was called for is done, and others find it a little later.
                logger.debug("%s", error)
        if is_committed:
            wakeups.wake(topics, told=notifies)
        elif self._caller.session is not None:
            AfterCommit.on(self._caller.session, wakeups).wake(topics, told=notifies)


def _has_fixed_snapshot(link: Link) -> bool:
    if link.embedded:
        return False
    level = link.execute(select(func.current_setting("transaction_isolation"))).scalar()
    return str(level).upper() not in MOVING_SNAPSHOTS


def _check_that_news_are_seen(look: Look, *, for_ever: bool) -> None:
    link = look.link
    if link.always_in_transaction:
        raise BackendError(
            "Failed to wait for a result: the connection is always in a transaction, which sees "
            "nothing new (autocommit=False); wait on another connection"
        )
    if link.embedded or _has_fixed_snapshot(link):
        raise BackendError(
            "Failed to wait for a result: the transaction that is open sees nothing that ends "
            "after it began; commit first"
        )
    if (
        for_ever
        and link.execute(select(func.pg_current_xact_id_if_assigned())).scalar() is not None
    ):
        raise BackendError(
            "Failed to wait for a result: the transaction that is open has written, and what it "
            "has enqueued does not begin before it ends; commit first, or give a timeout"
        )
