"""The way to the other processes: one connection that hears of their news, while anybody waits."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
import secrets
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from sheppy import BackendError

from ._announcer import Announcer
from ._engines import abandon, twin
from ._errors import backend_error, is_driver_error
from ._stores import notifications as notification_store
from ._waiting import Notice, Pace, sleep_until
from ._wakeups import Topic, Wakeups, is_running

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from ._database import Database

logger = logging.getLogger("sheppy_sql")

LONGEST_POLL = 5.0
"""Seconds between two looks of whoever is told: what a lost notification costs, at most."""
PROOF = 5.0
"""Seconds for a notification to come back, or there is something that keeps them."""
FIRST_RETRY, LONGEST_RETRY = 0.05, 10.0  # seconds to the next connection
FIRST_DEAF_RETRY, LONGEST_DEAF_RETRY = 60.0, 600.0  # seconds, where no notification came back

_abandoned: list[object] = []


class DeafError(BackendError):
    """No notification comes back."""


class Line:
    """Shared by the sessions on one database in one event loop, as long as there are any."""

    def __init__(self, wakeups: Wakeups, database: Database, installation: str) -> None:
        self.place: Hashable = _place(database)
        self.is_told = False
        self._wakeups = wakeups
        self._loop = database.loop
        self._dialect = database.dialect
        self._installation = installation
        self._databases: list[Database] = []
        self._announcer = Announcer(self._send)
        self._listening: asyncio.Task[None] | None = None
        self._engine: AsyncEngine | None = None
        self._wanted = asyncio.Event()
        self._tried = asyncio.Event()
        self._proof: tuple[str, asyncio.Event] | None = None
        self._complaint: BackendError | None = None

    @classmethod
    def joined_by(cls, database: Database, wakeups: Wakeups, installation: str) -> Line:
        """The line of a session's database, which is open until the last one has left."""
        others = (line for line in wakeups.lines if isinstance(line, cls) and line.is_here)
        place = _place(database)
        line = next((other for other in others if other.place == place), None)
        if line is None:
            line = cls(wakeups, database, installation)
            wakeups.open(line)
        line._databases.append(database)
        return line

    @property
    def is_here(self) -> bool:
        return is_running(self._loop)

    def announce(self, topics: Iterable[Topic]) -> None:
        # A file tells by itself that it has changed.
        if self._dialect.embedded:
            return
        if self.is_here:
            self._announcer.announce(topics)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._announcer.announce, list(topics))

    def carry(self, topics: Iterable[Topic]) -> Notice | None:
        """What a statement may send with its commit, if it is to; see Announcer."""
        marks = None if self._dialect.embedded else self._announcer.carry(topics)
        return None if marks is None else self._notice(marks)

    def listen(self) -> None:
        """Have other processes' news come, from soon on; harmless where they do."""
        self._wanted.set()
        if self._listening is None:
            # In a context of its own: it outlives whoever happens to start it.
            self._listening = contextvars.Context().run(self._loop.create_task, self._listen())

    async def check(self) -> None:
        """BackendError where news has been found not to come."""
        self.listen()
        await self._tried.wait()
        if not self.is_told and isinstance(self._complaint, DeafError):
            raise DeafError(str(self._complaint))

    async def leave(self, database: Database) -> None:
        """Send what is still to be said; the last one to leave closes the connection."""
        await self._announcer.flush()
        self._databases.remove(database)
        if self._databases:
            return
        self._wakeups.shut(self)
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])

    def abandon(self) -> None:
        """Leave all as it is: the event loop is closed, or the socket is the parent's."""
        self._wakeups.shut(self)
        if self._engine is not None:
            abandon(self._engine)
        _abandoned.append(self._listening)

    async def _listen(self) -> None:
        retry, deaf_retry = FIRST_RETRY, FIRST_DEAF_RETRY
        while True:
            try:
                await self._hear()
            except DeafError as error:
                self._complain(error)
                pause, deaf_retry = deaf_retry, min(2 * deaf_retry, LONGEST_DEAF_RETRY)
            except Exception as error:  # noqa: BLE001  # whatever it is, polling goes on
                self._complain(_told(error))
                pause, retry = retry, min(2 * retry, LONGEST_RETRY)
            else:
                pause, retry = retry, min(2 * retry, LONGEST_RETRY)
            if self.is_told:
                self.is_told = False
                retry = FIRST_RETRY
                # What was said meanwhile is lost, and from now on everybody has to look.
                self._wakeups.wake_all()
            self._tried.set()
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311

    async def _hear(self) -> None:
        """Listen until the connection is lost."""
        self._engine = engine = twin(self._databases[0].engine)
        try:
            async with engine.connect() as connection:
                try:
                    await self._dialect.hear(
                        connection, notification_store.channel_of(self._installation), self
                    )
                except Exception:
                    await connection.invalidate()
                    raise
        finally:
            await engine.dispose()

    async def ready(self) -> None:
        """See a notification of ours come back, sent as all others are."""
        if not self._dialect.embedded:
            token, came = secrets.token_urlsafe(8), asyncio.Event()
            self._proof = (token, came)
            await self._send([token])
            await sleep_until(came, PROOF)
            self._proof = None
            if not came.is_set():
                raise DeafError(
                    "Failed to wait for notifications: none comes back, as behind a pooler in "
                    'transaction mode; connect directly, or leave notify at "auto" to poll'
                )
        self.is_told, self._complaint = True, None
        self._tried.set()
        # What was said before is lost.
        self._wakeups.wake_all()

    def heard(self, text: str | None) -> None:
        """Wake those here who wait for what another process has named."""
        if text is None:
            self._wakeups.wake_all()
            return
        sender, *marks = text.split(" ")
        if sender != self._wakeups.id:
            self._wakeups.wake_marked(marks)
        elif self._proof is not None and marks == [self._proof[0]]:
            self._proof[1].set()

    async def wanted(self) -> None:
        """Return as soon as anybody waits for anything."""
        if not self._wakeups.anybody:
            self._wanted.clear()
            await self._wanted.wait()

    async def _send(self, marks: list[str]) -> None:
        """Notify; what fails is lost, and costs others no more than time."""
        notice = self._notice(marks)
        try:
            if not self._databases:  # they have left since
                return
            database = self._databases[0]
            sending = database.start_statement(
                "notify others",
                lambda tx: notification_store.send(tx, notice),
            )
            # It is not worth to wait for the end of an outage.
            database.give_up(sending)
            await asyncio.shield(sending)
        except BackendError as error:
            logger.debug("%s", error)

    def _notice(self, marks: list[str]) -> Notice:
        return notification_store.notice_of(self._installation, self._wakeups.id, marks)

    def _complain(self, error: BackendError) -> None:
        # Of a connection that was lost only once no other is to be had.
        if not self.is_told and type(error) is not type(self._complaint):
            logger.info("%s; looking for news every now and then instead", error)
        self._complaint = error


class Subscription(Pace):
    """One session's share in a line, and what it means for its waiting."""

    def __init__(self, line: Line, database: Database, longest: float, *, required: bool) -> None:
        """`longest`: seconds between two looks where nothing is told.

        `required`: it is an error where no notification comes.
        """
        super().__init__(longest)
        self._line = line
        self._database = database
        self._required = required

    @property
    def is_told(self) -> bool:
        return self._line.is_told

    @property
    def longest(self) -> float:
        return max(LONGEST_POLL, self._longest) if self.is_told else self._longest

    def carry(self, topics: Iterable[Topic]) -> Notice | None:
        return self._line.carry(topics)

    def begin(self) -> None:
        self._line.listen()

    async def check(self) -> None:
        if self._required:
            await self._line.check()

    async def close(self) -> None:
        await self._line.leave(self._database)

    def abandon(self) -> None:
        self._line.abandon()


def _place(database: Database) -> Hashable:
    # A URL makes its text anew each time that it is compared.
    return database.engine.url.render_as_string(hide_password=False)


def _told(error: Exception) -> BackendError:
    if isinstance(error, BackendError) or not is_driver_error(error):
        return BackendError(f"Failed to listen for notifications: {type(error).__name__}")
    return backend_error("listen for notifications", error)
