"""Tasks that come, run and end all the time, while a test disturbs them; and what must hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from tests.contract.tasks import finished, make_task

if TYPE_CHECKING:
    from typing_extensions import Self

    from sheppy_sql import SqlBackend

PATIENCE = 60.0  # seconds, a ceiling for what takes a few
UNFINISHED = 20  # tasks that may be under way at once
PRODUCERS = CONSUMERS = 3  # coroutines for each backend


async def until(
    condition: Callable[[], Awaitable[object]], complaint: str, timeout: float = PATIENCE
) -> None:
    """Return once the condition holds; TimeoutError says what did not happen."""
    deadline = asyncio.get_running_loop().time() + timeout
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError(complaint)
        await asyncio.sleep(0.02)


class Load:
    """Appends, takes and finishes tasks; leaving it checks that each has run exactly once.

    No call of a backend may fail: the first that does ends the test.
    """

    def __init__(
        self, producing: Sequence[SqlBackend], consuming: Sequence[SqlBackend], queue: str
    ) -> None:
        self.added: list[str] = []
        self.ran: list[str] = []
        self._producing = producing
        self._consuming = consuming
        self._queue = queue
        self._stopping = asyncio.Event()
        self._started = 0
        self._moved = asyncio.Condition()
        self._finished = 0
        self._work: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        producers = [
            self._produce(backend, f"{number}-{copy}")
            for number, backend in enumerate(self._producing)
            for copy in range(PRODUCERS)
        ]
        consumers = [
            self._consume(backend) for backend in self._consuming for _ in range(CONSUMERS)
        ]
        self._work = [asyncio.ensure_future(each) for each in (*producers, *consumers)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        async with self._moved:
            self._stopping.set()
            self._moved.notify_all()
        try:
            if kind is None:
                await asyncio.wait_for(asyncio.gather(*self._work), PATIENCE)
                self._check()
        finally:
            for work in self._work:
                work.cancel()
            await asyncio.gather(*self._work, return_exceptions=True)

    async def progress(self, tasks: int = 10) -> None:
        """Return once that many more tasks have ended."""
        target = self._finished + tasks

        async def wait() -> None:
            async with self._moved:
                await self._moved.wait_for(lambda: self._finished >= target)

        await self._unless_failed(wait())

    def check_that_nothing_failed(self) -> None:
        """Raise what a call has raised, if one has."""
        for work in self._work:
            if work.done():
                work.result()

    async def _unless_failed(self, wait: Awaitable[None]) -> None:
        waiting = asyncio.ensure_future(wait)
        await asyncio.wait(
            [waiting, *self._work], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED
        )
        try:
            self.check_that_nothing_failed()
        except BaseException:
            waiting.cancel()
            raise
        if not waiting.done():
            waiting.cancel()
            raise TimeoutError(f"{self._finished} tasks ended, and then no more")
        await waiting

    async def _produce(self, backend: SqlBackend, name: str) -> None:
        def may_go_on() -> bool:
            return self._stopping.is_set() or self._started - self._finished < UNFINISHED

        number = 0
        while True:
            async with self._moved:
                await self._moved.wait_for(may_go_on)
                self._started += 1
            if self._stopping.is_set():
                return
            task_id = f"{name}-{number}"
            number += 1
            assert await backend.append(self._queue, [make_task(task_id)]) == [True]
            self.added.append(task_id)

    async def _consume(self, backend: SqlBackend) -> None:
        while not (self._stopping.is_set() and await self._is_over(backend)):
            for task in await backend.pop(self._queue, 3, timeout=0.1):
                self.ran.append(task["id"])
                assert await backend.store_result(self._queue, finished(task)) is True
                assert list(await backend.get_results(self._queue, [task["id"]])) == [task["id"]]
                async with self._moved:
                    self._finished += 1
                    self._moved.notify_all()

    async def _is_over(self, backend: SqlBackend) -> bool:
        producers = self._work[: len(self._producing) * PRODUCERS]
        if not all(work.done() for work in producers):
            return False
        stats = await backend.get_stats(self._queue)
        return stats["completed"] >= len(self.added)

    def _check(self) -> None:
        assert self.added
        twice = [task_id for task_id, times in Counter(self.ran).items() if times > 1]
        assert (twice, sorted(self.ran)) == ([], sorted(self.added))
