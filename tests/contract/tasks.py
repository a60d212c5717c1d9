"""Tasks as sheppy writes them, and ways to bring one into each state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend

Payload = dict[str, Any]
MakeBackend = Callable[..., Awaitable["SqlBackend"]]

QUEUE = "test"
NOW = datetime.now(timezone.utc)
FUTURE = NOW + timedelta(days=1)
PAST = NOW - timedelta(days=1)


def make_task(task_id: str = "task", **changes: Any) -> Payload:
    """What `Task.model_dump(mode="json")` of sheppy gives, with `changes`."""
    return {
        "id": task_id,
        "spec": {
            "func": "app.jobs:send",
            "args": [1, "two"],
            "kwargs": {"three": 3.0},
            "return_type": None,
            "middleware": None,
        },
        "config": {"retry": 0, "retry_delay": None},
        "status": "new",
        "result": None,
        "error": None,
        "retry_count": 0,
        "last_retry_at": None,
        "next_retry_at": None,
        "created_at": NOW.isoformat(),
        "scheduled_at": None,
        "finished_at": None,
        **changes,
    }


def make_tasks(count: int, prefix: str = "task") -> list[Payload]:
    return [make_task(f"{prefix}-{number}") for number in range(count)]


def finished(task: Payload, **changes: Any) -> Payload:
    """The task as a worker stores it when it has run."""
    done = {"status": "completed", "result": 42, "finished_at": NOW.isoformat()}
    return {**task, **done, **changes}


def retrying(task: Payload, delay: float = 60.0) -> Payload:
    """The task as a worker stores it when it is to be tried again after `delay` seconds."""
    again = datetime.now(timezone.utc)
    return {
        **task,
        "status": "retrying",
        "config": {**task["config"], "retry": 3},
        "retry_count": 1,
        "last_retry_at": again.isoformat(),
        "next_retry_at": (again + timedelta(seconds=delay)).isoformat(),
    }


def ids(tasks: list[Payload]) -> list[str]:
    return [task["id"] for task in tasks]


async def store_pending(backend: SqlBackend, task: Payload) -> None:
    assert await backend.append(QUEUE, [task]) == [True]


async def store_scheduled(backend: SqlBackend, task: Payload) -> None:
    assert await backend.schedule(QUEUE, task, FUTURE)


async def store_popped_from_schedule(backend: SqlBackend, task: Payload) -> None:
    assert await backend.schedule(QUEUE, task, PAST)
    assert await backend.pop_scheduled(QUEUE) == [task]


async def store_claimed(backend: SqlBackend, task: Payload) -> None:
    await store_pending(backend, task)
    assert await backend.pop(QUEUE) == [task]


async def store_acknowledged(backend: SqlBackend, task: Payload) -> None:
    await store_claimed(backend, task)
    await backend.acknowledge(QUEUE, [task["id"]])


async def store_retrying(backend: SqlBackend, task: Payload) -> None:
    await store_claimed(backend, task)
    assert await backend.store_result(QUEUE, retrying(task))


async def store_finished(backend: SqlBackend, task: Payload) -> None:
    await store_claimed(backend, task)
    assert await backend.store_result(QUEUE, finished(task))


STATES: dict[str, Callable[[SqlBackend, Payload], Awaitable[None]]] = {
    "pending": store_pending,
    "scheduled": store_scheduled,
    "popped from the schedule": store_popped_from_schedule,
    "claimed": store_claimed,
    "acknowledged": store_acknowledged,
    "retrying": store_retrying,
    "finished": store_finished,
}


async def everything(backend: SqlBackend) -> dict[str, Any]:
    """All that can be seen of the queue, to show that nothing has changed."""
    return {
        "tasks": sorted(await backend.get_all_tasks(QUEUE), key=lambda task: str(task["id"])),
        "pending": await backend.get_pending(QUEUE, 1000),
        "size": await backend.size(QUEUE),
        "scheduled": await backend.get_scheduled(QUEUE),
        "stats": await backend.get_stats(QUEUE),
        "crons": await backend.get_crons(QUEUE),
        "workflows": await backend.get_all_workflows(QUEUE),
        "queues": await backend.list_queues(),
    }
