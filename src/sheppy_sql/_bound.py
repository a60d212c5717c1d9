"""A backend in the caller's transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

from sheppy import BackendError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

from ._calls import Calls
from ._claims import Claims
from ._definitions import Definitions
from ._joined import AfterCommit, JoinedDatabase
from ._producer import Producer
from ._remover import Remover
from ._stores import notifications as notification_store
from ._viewer import Viewer
from ._waiting import Pace

if TYPE_CHECKING:
    from ._payloads import Payload
    from ._session import Session
    from ._waiting import Notice
    from ._wakeups import Signals, Topic


class BoundBackend(Calls):
    """Enqueues, and looks, in the transaction of one session or connection.

    Made by `SqlBackend.bind`, and as short-lived as the transactions it is for. It neither takes
    tasks nor waits: no transaction should stay open for that long.
    """

    def __init__(
        self,
        session: AsyncSession | async_scoped_session[AsyncSession] | AsyncConnection,
        *,
        connect: Callable[[], Awaitable[Session]],
        notify: bool,
    ) -> None:
        bound = session() if isinstance(session, async_scoped_session) else session
        if not isinstance(bound, (AsyncSession, AsyncConnection)):
            raise ValueError(
                f"bind() needs an AsyncSession or an AsyncConnection, not {type(bound).__name__}; "
                "synchronous code uses sheppy_sql.sync"
            )
        self._session = bound
        self._connect = connect
        self._notify = notify
        self._parts: _Parts | None = None

    async def connect(self) -> None:
        """Connect the backend that this one was made from; opens nothing on the session."""
        session = await self._connect()
        if session.database.is_in_memory:
            raise BackendError(
                "Failed to connect: ':memory:' has one connection, which cannot be in your "
                "transaction and the backend's at once; use a file"
            )
        self._parts = _Parts(self._session, session, notify=self._notify)

    async def disconnect(self) -> None:
        """Does nothing: the session is the caller's, and the other backend goes on."""

    @property
    def is_connected(self) -> bool:
        return self._parts is not None

    async def append(
        self, queue_name: str, tasks: list[Payload], unique: bool = True
    ) -> list[bool]:
        """As the backend's; with `notify` the transaction's commit wakes other processes."""
        added = await super().append(queue_name, tasks, unique)
        await self._connected.send_news()
        return added

    async def cancel(self, queue_name: str, task_id: str) -> Payload | None:
        """As the backend's, and as append."""
        cancelled = await super().cancel(queue_name, task_id)
        await self._connected.send_news()
        return cancelled

    async def store_workflow(self, queue_name: str, workflow_data: Payload) -> bool:
        """As the backend's, and as append."""
        stored = await super().store_workflow(queue_name, workflow_data)
        await self._connected.send_news()
        return stored

    async def get_results(
        self, queue_name: str, task_ids: list[str], timeout: float | None = None
    ) -> dict[str, Payload]:
        """Finished tasks by id, without waiting: `timeout` must be None."""
        if timeout is not None:
            _refuse("wait for results")
        return await self._connected.viewer.get_results(queue_name, task_ids, None)

    async def get_workflow_results(
        self, queue_name: str, workflow_ids: list[str], timeout: float | None = None
    ) -> dict[str, Payload]:
        """Workflows that have completed or failed, by id; `timeout` must be None."""
        if timeout is not None:
            _refuse("wait for workflows")
        return await self._connected.viewer.get_workflow_results(queue_name, workflow_ids, None)

    async def pop(
        self, queue_name: str, limit: int = 1, timeout: float | None = None
    ) -> list[Payload]:
        """Refused, as all that belongs to a worker."""
        _refuse("take tasks")

    async def pop_scheduled(self, queue_name: str, now: datetime | None = None) -> list[Payload]:
        _refuse("take due tasks")

    async def store_result(self, queue_name: str, task_data: Payload) -> bool:
        _refuse("store a result")

    async def acknowledge(self, queue_name: str, task_ids: list[str]) -> None:
        _refuse("acknowledge tasks")

    async def heartbeat(self, queue_name: str, task_ids: list[str]) -> None:
        _refuse("renew claims")

    async def get_stale_messages(self, queue_name: str, min_idle_ms: int) -> list[Payload]:
        _refuse("take over tasks")

    async def acquire_rate_limit(
        self,
        queue_name: str,
        key: str,
        max_rate: int,
        rate_period: float,
        task_id: str,
        strategy: str = "sliding_window",
    ) -> float | None:
        _refuse("acquire a rate limit")

    @property
    def _connected(self) -> _Parts:
        if self._parts is None:
            raise BackendError("Not connected: call connect() first")
        return self._parts


class _Parts:
    """Those of the backend's parts that need no claim, in the caller's transaction."""

    def __init__(
        self, session: AsyncSession | AsyncConnection, ours: Session, *, notify: bool
    ) -> None:
        database = JoinedDatabase(session, ours.database.tables, ours.database.dialect)
        options = ours.options
        after_commit = AfterCommit.of(session, ours.wakeups)
        wakeups: Signals = after_commit
        self._with_commit: _WithCommit | None = None
        # A file tells by itself that it has changed.
        if notify and not database.dialect.embedded:
            wakeups = self._with_commit = _WithCommit(after_commit, ours.notice_of, database)
        # Claims of its own, which are none: what the other backend holds is ended by the
        # database, if the transaction is committed.
        self.producer = Producer(database, wakeups, Claims(), options, registers=False)
        self.remover = Remover(database, wakeups, options)
        self.viewer = Viewer(database, ours.wakeups, Pace(options.max_poll_interval))
        self.definitions = Definitions(database, wakeups, options)

    async def send_news(self) -> None:
        """Have the transaction notify other processes, if it is to."""
        if self._with_commit is not None:
            await self._with_commit.send()


class _WithCommit:
    """Signals that the caller's transaction is to send with its commit."""

    def __init__(
        self,
        after_commit: AfterCommit,
        notice: Callable[[Iterable[Topic]], Notice],
        database: JoinedDatabase,
    ) -> None:
        """`notice` is what tells other processes of topics."""
        self._after_commit = after_commit
        self._notice = notice
        self._database = database
        self._topics: set[Topic] = set()

    def wake(self, topics: Iterable[Topic], *, told: bool = False) -> None:
        self._topics.update(topics)

    async def send(self) -> None:
        """Notify of what was signalled; nobody hears of it before the commit."""
        topics, self._topics = sorted(self._topics), set()
        if topics:
            await self._database.write(
                "notify others", notification_store.send, self._notice(topics)
            )
            self._after_commit.wake(topics, told=True)


def _refuse(action: str) -> NoReturn:
    raise BackendError(
        f"Failed to {action}: a backend bound to a session only enqueues and looks; "
        "use the backend itself"
    )
