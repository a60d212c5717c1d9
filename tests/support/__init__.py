"""What tests share: databases, servers and processes of their own, and quick workers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sheppy import Backend, Worker

POLL_INTERVAL = 0.01  # seconds, instead of the host's 1 to 10


def make_worker(backend: Backend, queue_names: str | list[str] = "test", **options: Any) -> Worker:
    """A sheppy worker that polls as often as those in the host's own tests."""
    from sheppy import Worker

    worker = Worker(queue_names, backend, **options)
    worker._blocking_timeout = POLL_INTERVAL  # type: ignore[assignment]  # the host's default is a whole number
    worker._scheduler_polling_interval = POLL_INTERVAL
    worker._cron_polling_interval = POLL_INTERVAL
    return worker


async def run_worker(
    worker: Worker, max_tasks: int | None = None, *, oneshot: bool = False, timeout: float = 60
) -> None:
    """Run it until it has processed `max_tasks`, or (oneshot) found the queues empty.

    TimeoutError after `timeout` seconds. Signal handlers stay as they are.
    """
    work = worker.work(max_tasks, oneshot, register_signal_handlers=False)
    await asyncio.wait_for(work, timeout)
