"""The course of the demo, from the first file to the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from sheppy import BackendError, Queue, Task

from . import source as sources
from .jobs import Jobs
from .outcome import Outcome
from .processes import WorkerDiedError, Workers
from .report import Report
from .where import Where

T = TypeVar("T")

POLL_INTERVAL = 0.1  # seconds
LAST_WORDS = 5.0  # seconds to say what is missing, and to clear up

NAMED = 3  # of the files that are missing

FAILED = 1
STOPPED = 130  # what a shell reports after Ctrl-C


class CannotRunError(Exception):
    """What the demo was given to work with cannot be used; the message says why."""


class OverrunError(Exception):
    """Something has not finished in time; the message says what."""


def run(url: str | None, *, source: Path | None, keep: bool, time_limit: float) -> int:
    """The exit status of a run, whose course is printed; see run_demo."""
    report = Report()
    try:
        demo = _prepare(url, source, report, keep=keep)
        return asyncio.run(demo.run(time_limit))
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.stopped()
        return STOPPED
    except (BackendError, CannotRunError, OverrunError, WorkerDiedError) as error:
        report.error(str(error))
        return FAILED


def _prepare(url: str | None, source: Path | None, report: Report, *, keep: bool) -> Demo:
    try:
        given = None if url is None else Where.given(url)
        jobs = Jobs(sources.read(source))
        return Demo(given or Where.new_file(), jobs, report, keep=keep or given is None)
    except ValueError as error:
        raise CannotRunError(str(error)) from None


class Demo:
    """One run."""

    def __init__(self, where: Where, jobs: Jobs, report: Report, *, keep: bool) -> None:
        self._where = where
        self._jobs = jobs
        self._report = report
        self._keep = keep
        self._backend = where.backend(migrate=True)
        self._workers = Workers(
            {**where.order(), "files": jobs.file_queue, "timed": jobs.timed_queue}
        )

    async def run(self, time_limit: float) -> int:
        """The exit status; an exception where it comes to no end."""
        _cancel_on_sigterm()
        async with self._connected():
            self._report.introduce(self._jobs.source, self._where)
            try:
                outcome = await asyncio.wait_for(self._work(), time_limit)
            except asyncio.TimeoutError:
                missing = await _in_time(self._missing())
                raise OverrunError(
                    f"not finished after {time_limit:g} s; missing: {missing or 'nothing'}"
                ) from None
            complaints = outcome.complaints()
            self._report.conclude(outcome)
        if complaints:
            self._report.complain(complaints)
            return FAILED
        self._report.lead_on(self._where, self._jobs, kept=self._keep)
        return 0

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        """At the end the demo's queues are gone, unless they are to be kept."""
        await self._backend.connect()
        try:
            yield
        finally:
            try:
                if not self._keep:
                    await _in_time(self._clear())
            finally:
                await self._backend.disconnect()

    async def _work(self) -> Outcome:
        jobs, backend = self._jobs, self._backend
        started = time.monotonic()
        await jobs.add_files(backend)
        self._report.enqueued(jobs, time.monotonic() - started)
        await jobs.add_timed(backend)
        with self._workers:
            with self._report.progress(len(jobs.files)) as show:
                await self._until(lambda: self._files_are_done(show))
            await jobs.add_chain(backend)
            await self._until(self._others_are_done)
            await jobs.remove_cron(backend)
            self._workers.stop()
        return Outcome(
            jobs,
            await self._tasks(jobs.file_queue),
            await self._tasks(jobs.timed_queue),
            self._workers.ran(),
            self._where.clock_tolerance,
        )

    async def _until(self, is_done: Callable[[], Awaitable[bool]]) -> None:
        while not await is_done():
            self._workers.check()
            await asyncio.sleep(POLL_INTERVAL)

    async def _files_are_done(self, show: Callable[[int], None]) -> bool:
        done = (await self._backend.get_stats(self._jobs.file_queue))["completed"]
        show(done)
        return done >= len(self._jobs.files)

    async def _others_are_done(self) -> bool:
        return not self._jobs.unfinished(await self._tasks(self._jobs.timed_queue))

    async def _missing(self) -> str:
        jobs = self._jobs
        files = jobs.unfinished_files(await self._tasks(jobs.file_queue))
        named = ", ".join(files[:NAMED]) + ", ..." * (len(files) > NAMED)
        missing = [f"{len(files):,} of {len(jobs.files):,} files ({named})"] if files else []
        return "; ".join([*missing, *jobs.unfinished(await self._tasks(jobs.timed_queue))])

    async def _tasks(self, queue: str) -> dict[UUID, Task]:
        return {task.id: task for task in await Queue(self._backend, queue).get_all_tasks()}

    async def _clear(self) -> None:
        for queue in self._jobs.queues:
            await self._backend.clear(queue)


async def _in_time(last_words: Awaitable[T]) -> T:
    try:
        return await asyncio.wait_for(last_words, LAST_WORDS)
    except asyncio.TimeoutError:
        raise OverrunError("the database does not answer") from None


def _cancel_on_sigterm() -> None:
    """End by SIGTERM as by Ctrl-C, where a program that called us has not other plans with it."""
    task = asyncio.current_task()
    # Windows has no such handlers, threads other than the first may not set them.
    if task is not None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
