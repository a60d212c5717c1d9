"""A backend instance's signs of life, from a thread of its own.

The event loop may be busy for minutes with a task that computes, and its tasks must stay its own
all the while. Only what stops the whole process, or holds the interpreter's lock, stops this too.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

from sheppy import BackendError

from ._database import Database
from ._engines import twin
from ._process import Process
from ._stores import consumers as consumer_store
from ._stores.consumers import Policy
from ._waiting import sleep_until

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from ._options import Options

logger = logging.getLogger("sheppy_sql")

BEATS_PER_LEASE = 6
"""So that several may fail before anybody believes in a death."""
SHARE_OF_LEASE = 5 / 6
"""For how long a beat counts; the rest of the lease is for others to notice."""
SHORTEST_PATIENCE = 2.0
"""Seconds, or one pause between beats if that is longer, after which a beat counts as stuck."""
RECOVERY = 1.0  # seconds from a beat that failed to the next
TURN = 1.0  # seconds between two signs of the event loop
LONGEST_STOP = 5.0  # seconds

_beating: weakref.WeakSet[Heart] = weakref.WeakSet()


class Heart:
    """Keeps the row of one consumer fresh, through a connection of its own."""

    def __init__(
        self,
        database: Database,
        process: Process,
        options: Options,
        *,
        owner: str,
    ) -> None:
        self._database = database
        self._process = process
        self._policy = Policy(options.on_crash, options.max_crashes)
        self._owner = owner
        self._lease = options.lease
        self._max_loop_stall = options.max_loop_stall
        self._loop = asyncio.get_running_loop()
        self._turned = self._beaten = time.monotonic()
        self._tick: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        # Of the thread's own loop, once it runs.
        self._stopping: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Be known, and beat from now on."""
        await self._beat(self._database, "take tasks")
        if self._stopped:
            return
        self._turn()
        self._thread = threading.Thread(target=self._run, name="sheppy-sql-heart", daemon=True)
        self._thread.start()
        _beating.add(self)

    async def beat_if_late(self) -> None:
        """A beat from the event loop, where those of the thread do not come.

        An application's engine may connect only in the application's own loop, for one.
        """
        if self._is_late:
            await self._beat(self._database)

    @property
    def _is_late(self) -> bool:
        return time.monotonic() - self._beaten > self._lease / 2

    async def check(self) -> None:
        """Return if what is taken now is safe; else only after a beat. BackendError: there is none.

        Where nobody knows that this instance lives, it must take nothing.
        """
        if time.monotonic() - self._beaten > self._lease * SHARE_OF_LEASE:
            await self._beat(self._database, "take tasks")

    async def close(self) -> None:
        """Beat no more. What is held is to be handed back before."""
        self.stop()
        if self._thread is None:
            return
        # A beat may be waiting for a server that does not answer; the process need not.
        await sleep_until(self._ended, LONGEST_STOP)
        if self._ended.is_set():
            self.join()  # it is at its last instruction

    def stop(self) -> None:
        """End the thread soon, from whatever thread; does nothing in a forked child."""
        self._stopped = True
        if self._tick is not None:
            self._tick.cancel()
        if self._stopping is not None and self._process.pid == os.getpid():
            loop, event = self._stopping
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(event.set)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(LONGEST_STOP)

    def _turn(self) -> None:
        self._turned = time.monotonic()
        self._tick = self._loop.call_later(min(TURN, self._lease / 20), self._turn)

    def _run(self) -> None:
        try:
            asyncio.run(self._keep_beating())
        finally:
            _beating.discard(self)
            with contextlib.suppress(RuntimeError):  # nobody waits for it any longer
                self._loop.call_soon_threadsafe(self._ended.set)

    async def _keep_beating(self) -> None:
        stopping = asyncio.Event()
        self._stopping = asyncio.get_running_loop(), stopping
        if self._stopped:  # before there was anything to tell it to
            stopping.set()
        complaint: str | None = None
        await sleep_until(stopping, self._lease / BEATS_PER_LEASE)
        while not stopping.is_set() and not self._loop.is_closed():
            # Anew where a beat got stuck, on a connection that is dead and does not show it.
            failed = await self._beat_until_it_fails(stopping)
            # Not of every moment's outage: others believe in a death much later.
            if failed is not None and self._is_late and failed != complaint:
                logger.warning("%s; tasks that take long may be run again", failed)
                complaint = failed
            await sleep_until(stopping, min(RECOVERY, self._lease / BEATS_PER_LEASE))

    async def _beat_until_it_fails(self, stopping: asyncio.Event) -> str | None:
        """Of what it failed, if it did not get stuck."""
        try:
            await self._beat_on(twin(self._database.engine), stopping)
        except Exception as error:  # noqa: BLE001  # whatever it is, the next beat must come
            return str(error)
        return None

    async def _beat_on(self, engine: AsyncEngine, stopping: asyncio.Event) -> None:
        """Beat through an engine until told to stop, or until a beat fails or gets stuck."""
        pause = self._lease / BEATS_PER_LEASE
        # A file does not get lost; whoever has locked it is waited for.
        embedded = self._database.dialect.embedded
        patience = None if embedded else max(pause, SHORTEST_PATIENCE)
        # No grace: after an outage a new beat tells more than a late one.
        database = Database(
            engine,
            self._database.tables,
            self._database.dialect,
            outage_grace=0.0,
            reached=True,
        )
        beat: asyncio.Task[None] | None = None
        try:
            while not stopping.is_set() and not self._loop.is_closed():
                beat = asyncio.create_task(self._beat(database))
                await asyncio.wait([beat], timeout=patience)
                if not beat.done():
                    beat.cancel()
                    return
                beat.result()
                await sleep_until(stopping, pause)
        finally:
            if beat is None or beat.done():
                await database.close()
            await engine.dispose()

    async def _beat(self, database: Database, action: str = "renew leases") -> None:
        began = time.monotonic()
        idle = began - self._turned
        if self._max_loop_stall is not None and idle > self._max_loop_stall:
            raise BackendError(
                f"The event loop has not turned for {self._max_loop_stall:g} s, which is "
                f"max_loop_stall: the leases of {self._owner} are not renewed"
            )
        await database.write_one(
            action,
            consumer_store.beat,
            self._owner,
            self._process,
            self._policy,
            lease=self._lease * SHARE_OF_LEASE,
            loop_idle=idle,
        )
        self._beaten = max(self._beaten, began)


def _stop_all() -> None:
    """A daemon's thread must not run into the end of the interpreter."""
    hearts = list(_beating)
    for heart in hearts:
        heart.stop()
    for heart in hearts:
        heart.join()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    # They beat in the parent.
    os.register_at_fork(after_in_child=_beating.clear)
