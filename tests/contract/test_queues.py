"""clear, get_stats and list_queues: queues as a whole."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.contract.tasks import (
    FUTURE,
    PAST,
    QUEUE,
    STATES,
    MakeBackend,
    everything,
    finished,
    ids,
    make_task,
    make_tasks,
)

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend


async def test_queues_are_listed_with_what_waits_in_them(backend: SqlBackend) -> None:
    assert await backend.list_queues() == {}
    await backend.append(QUEUE, make_tasks(3))
    await backend.append("different-queue", make_tasks(1))
    await backend.pop(QUEUE)
    await backend.schedule(QUEUE, make_task("scheduled"), FUTURE)
    assert await backend.list_queues() == {QUEUE: 2, "different-queue": 1}


async def test_queue_with_nothing_but_scheduled_tasks_is_listed(backend: SqlBackend) -> None:
    await backend.schedule(QUEUE, make_task(), FUTURE)
    assert await backend.list_queues() == {QUEUE: 0}


async def test_emptied_queue_stays_listed_until_cleared(backend: SqlBackend) -> None:
    await backend.append(QUEUE, [make_task()])
    await backend.pop(QUEUE)
    await backend.store_result(QUEUE, finished(make_task()))
    assert await backend.list_queues() == {QUEUE: 0}
    await backend.clear(QUEUE)
    assert await backend.list_queues() == {}
    await backend.append(QUEUE, [make_task()])
    assert await backend.list_queues() == {QUEUE: 1}


async def test_looking_at_a_queue_does_not_make_it(backend: SqlBackend) -> None:
    await everything(backend)
    await backend.pop("looked", timeout=0.01)
    await backend.pop_scheduled("looked")
    await backend.get_tasks("looked", ["task"])
    await backend.get_results("looked", ["task"])
    await backend.acknowledge("looked", ["task"])
    await backend.clear("looked")
    assert await backend.list_queues() == {}


async def test_queues_are_listed_by_name_in_order(backend: SqlBackend) -> None:
    names = ["b", "a", "Z", "ä", "a b", "1"]
    for name in names:
        await backend.append(name, [make_task()])
    assert list(await backend.list_queues()) == sorted(names)


async def test_queue_cleared_by_another_backend_is_listed_when_used_again(
    make_backend: MakeBackend,
) -> None:
    one, other = await make_backend(), await make_backend()
    await one.append(QUEUE, [make_task()])
    await other.clear(QUEUE)
    assert await one.list_queues() == {}
    await one.append(QUEUE, [make_task()])
    assert await other.list_queues() == {QUEUE: 1}


async def test_stats_count_by_state(backend: SqlBackend) -> None:
    assert await backend.get_stats("unknown") == {"pending": 0, "completed": 0, "scheduled": 0}
    await backend.append(QUEUE, make_tasks(4))
    [done, _] = await backend.pop(QUEUE, limit=2)
    await backend.store_result(QUEUE, finished(done))
    await backend.schedule(QUEUE, make_task("scheduled"), FUTURE)
    assert await backend.get_stats(QUEUE) == {"pending": 2, "completed": 1, "scheduled": 1}


@pytest.mark.parametrize("state", STATES)
async def test_clear_counts_and_deletes_tasks_in_every_state(
    backend: SqlBackend, state: str
) -> None:
    empty = await everything(backend)
    await STATES[state](backend, make_task())
    assert await backend.clear(QUEUE) == 1
    assert await everything(backend) == empty
    assert await backend.pop_scheduled(QUEUE, FUTURE) == []
    assert await backend.clear(QUEUE) == 0
    assert await backend.append(QUEUE, [make_task()]) == [True]


async def test_clear_counts_tasks_and_crons_together(backend: SqlBackend) -> None:
    await backend.append(QUEUE, make_tasks(3))
    await backend.pop(QUEUE)
    await backend.schedule(QUEUE, make_task("due"), PAST)
    await backend.add_cron(QUEUE, "cron", {"expression": "* * * * *"})
    await backend.store_result(QUEUE, finished(make_task("done")))
    assert await backend.clear(QUEUE) == 6
    assert await backend.get_crons(QUEUE) == []


async def test_clear_leaves_workflows_and_other_queues(backend: SqlBackend) -> None:
    workflow = {"id": "wf", "pending_task_ids": ["task"]}
    await backend.store_workflow(QUEUE, workflow)
    await backend.append(QUEUE, [make_task()])
    await backend.append("other", [make_task()])
    await backend.add_cron("other", "cron", {"expression": "* * * * *"})
    assert await backend.clear(QUEUE) == 1
    assert await backend.get_all_workflows(QUEUE) == [workflow]
    assert await backend.mark_workflow_task_complete(QUEUE, "wf", "task") == 0
    assert await backend.pop("other") == [make_task()]
    assert await backend.get_crons("other") == [{"expression": "* * * * *"}]


async def test_unknown_queue_is_cleared_of_nothing(backend: SqlBackend) -> None:
    assert await backend.clear("unknown") == 0


async def test_clear_beside_working_backends_leaves_no_half_task(
    make_backend: MakeBackend,
) -> None:
    backends = [await make_backend() for _ in range(3)]

    async def work(backend: SqlBackend, name: str) -> None:
        for number in range(10):
            await backend.append(QUEUE, make_tasks(3, f"{name}-{number}"))
            await backend.schedule(QUEUE, make_task(f"{name}-{number}-later"), FUTURE)
            for task in await backend.pop(QUEUE, limit=2):
                await backend.store_result(QUEUE, finished(task))
            if number % 3 == 0:
                await backend.clear(QUEUE)

    await asyncio.gather(*(work(backend, str(n)) for n, backend in enumerate(backends)))
    user = backends[0]
    stored = len(await user.get_all_tasks(QUEUE))
    stats = await user.get_stats(QUEUE)
    assert stored == sum(stats.values())
    assert len(ids(await user.get_scheduled(QUEUE))) == stats["scheduled"]
    assert await user.clear(QUEUE) == stored
