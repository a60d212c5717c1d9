"""One of the demo's worker processes: `python -m sheppy_sql.demo.worker`."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Generator

from sheppy import Queue, Task, Worker

from .._backend import SqlBackend
from .tasks import file_queue

CONCURRENCY = 16


def main() -> None:
    """Work until standard input ends, then print how often each function ran, as JSON.

    Standard input brings the database and the queues, where no other user can read them, and
    it ends with the demo, whatever that may end of.
    """
    order = json.loads(sys.stdin.readline())
    # What the compiler thinks of other people's string escapes.
    warnings.simplefilter("ignore")
    # A syntax tree is many objects and no cycles: looking through them takes as long as parsing.
    gc.set_threshold(100_000)
    schema, prefix = order["names"]
    backend = SqlBackend(order["url"], schema=schema, table_prefix=prefix)
    print(json.dumps(asyncio.run(_work(backend, order["files"], order["timed"]))))


async def _work(backend: SqlBackend, files: str, timed: str) -> dict[str, int]:
    ran: Counter[str] = Counter()

    def count(task: Task, queue: Queue) -> Generator[None, tuple[Task, Exception | None], None]:
        ran[task.spec.func.rpartition(":")[2]] += 1
        yield

    async def own_queue() -> Queue:
        return Queue(backend, files)

    worker = Worker(
        [files, timed],
        backend,
        max_concurrent_tasks=CONCURRENCY,
        middleware=[count],
        dependency_overrides={file_queue: own_queue},
    )
    has_signals = sys.platform != "win32"
    work = asyncio.ensure_future(worker.work(register_signal_handlers=has_signals))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        # sheppy's worker stops in order by a signal, for which asyncio has no handlers on Windows.
        if has_signals:
            signal.raise_signal(signal.SIGTERM)
        else:
            work.cancel()

    threading.Thread(
        target=_wait_for_end, args=(lambda: loop.call_soon_threadsafe(stop),), daemon=True
    ).start()
    try:
        await asyncio.wait([work])
        if not work.cancelled():
            work.result()
    finally:
        await backend.disconnect()
    return ran


def _wait_for_end(then: Callable[[], object]) -> None:
    # Not sys.stdin.read(): the lock it holds would break an interpreter that ends meanwhile.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    then()


if __name__ == "__main__":
    main()
