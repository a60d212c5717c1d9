"""Tasks that complete in transactions of their own, in processes that die of their commits.

Not `from __future__ import annotations`: the host reads the annotations as objects.
"""

import asyncio
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

from sheppy import CURRENT_TASK, Queue, Task, Worker, task, workflow

from sheppy_sql import Completion, SqlBackend
from tests.completing.tasks import Entry

QUEUE, CHILDREN = "test", "children"
LEASE = 10.0  # seconds; of a death another worker of this machine learns in a twelfth of it
DIRECTORY = "JOBS_DIRECTORY"
BEFORE, AFTER = "before", "after"
SELF: Any = CURRENT_TASK

backends: dict[str, SqlBackend] = {}


def runs() -> list[str]:
    """A task's number and the side of its death, if it had one, for each run."""
    return (Path(os.environ[DIRECTORY]) / "runs").read_text().splitlines()


def note(run: str) -> bool:
    """Whether it is the first of its kind."""
    directory = Path(os.environ[DIRECTORY])
    with (directory / "runs").open("a") as file:
        file.write(f"{run}\n")
    try:
        (directory / run).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@task
async def child(number: int) -> int:
    return number


@task
async def place(number: int, side: str = "", self: Task = SELF) -> int:
    """Makes an entry and has a child; its process dies of its first run, on that side."""
    backend, is_first = backends["app"], note(f"{number}{side}")
    async with backend.complete(self) as tx:
        tx.add(Entry(number=number))
        await Queue(backend.bind(tx), CHILDREN).add(child(number))
        tx.set_result(number)
        if side and is_first:
            await die_at_commit(tx, side)
    return -1


@workflow
def placing() -> Generator[Task, Any, int]:
    first = yield place(1, AFTER)
    second = yield place(first.result + 1, "")
    return int(second.result) * 10


async def die_at_commit(tx: Completion, side: str) -> None:
    """Have the transaction's COMMIT kill this process: just before it is sent, or once it is done.

    No hook of the session's or of ours comes between.
    """
    connection = await tx.connection()
    ours, dialect = (await connection.get_raw_connection()).driver_connection, connection.dialect
    commit = dialect.do_commit

    def deadly(dbapi_connection: Any) -> None:
        is_ours = dbapi_connection.driver_connection is ours
        if is_ours and side == BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(dbapi_connection)
        if is_ours:
            os.kill(os.getpid(), signal.SIGKILL)

    dialect.do_commit = deadly  # type: ignore[method-assign]  # it is what dies


async def work(url: str) -> None:
    """One task at a time: what a process takes along is what it is to die of."""
    backends["app"] = backend = SqlBackend(url, lease=LEASE)
    worker = Worker(
        QUEUE,
        backend,
        max_concurrent_tasks=1,
        enable_scheduler=False,
        enable_cron_manager=False,
    )
    await worker.work()


def breed(url: str, count: str) -> None:
    """Keep `count` workers alive, each forked from here, where all is imported already."""
    alive: set[int] = set()
    while True:
        while len(alive) < int(count):
            pid = os.fork()
            if pid == 0:
                asyncio.run(work(url))
                os._exit(0)
            alive.add(pid)
        pid, status = os.wait()
        alive.discard(pid)
        print("killed" if os.WIFSIGNALED(status) else f"ended {status}")
