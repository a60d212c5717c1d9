"""Workflows: stored, shown, deleted, and counted down task by task."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.tasks import QUEUE, MakeBackend

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend


def make_workflow(workflow_id: str = "wf-1", waits_for: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "id": workflow_id,
        "name": "steps",
        "completed": False,
        "error": None,
        "result": None,
        "pending_task_ids": list(waits_for),
        **changes,
    }


async def test_workflow_is_stored_and_replaced(backend: SqlBackend) -> None:
    assert await backend.store_workflow(QUEUE, make_workflow()) is True
    assert await backend.get_workflows(QUEUE, ["wf-1"]) == {"wf-1": make_workflow()}
    changed = make_workflow(completed=True, result=[1, {"b": 2, "a": 1}])
    assert await backend.store_workflow(QUEUE, changed) is True
    assert await backend.get_workflows(QUEUE, ["wf-1"]) == {"wf-1": changed}
    assert await backend.get_all_workflows(QUEUE) == [changed]


async def test_only_known_workflows_are_found(backend: SqlBackend) -> None:
    for workflow_id in ("b", "a", "c"):
        await backend.store_workflow(QUEUE, make_workflow(workflow_id))
    found = await backend.get_workflows(QUEUE, ["a", "unknown", "c", "a"])
    assert found == {"a": make_workflow("a"), "c": make_workflow("c")}
    assert await backend.get_workflows(QUEUE, []) == {}
    assert [workflow["id"] for workflow in await backend.get_all_workflows(QUEUE)] == list("bac")


async def test_unknown_queue_has_no_workflows(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(waits_for="ab"))
    assert await backend.get_workflows("unknown", ["wf-1"]) == {}
    assert await backend.get_all_workflows("unknown") == []
    assert await backend.get_pending_workflows("unknown") == []
    assert await backend.delete_workflow("unknown", "wf-1") is False
    assert await backend.mark_workflow_task_complete("unknown", "wf-1", "a") == -1
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "a") == 1


@pytest.mark.parametrize(
    ("changes", "pending"),
    [
        ({}, True),
        ({"completed": True}, False),
        ({"error": "it failed"}, False),
        ({"exception": "it failed"}, False),
        ({"error": "", "exception": None}, True),
    ],
)
async def test_pending_workflows_have_neither_completed_nor_failed(
    backend: SqlBackend, changes: dict[str, Any], pending: bool
) -> None:
    await backend.store_workflow(QUEUE, make_workflow("other", completed=not pending))
    await backend.store_workflow(QUEUE, make_workflow(**changes))
    expected = [make_workflow("other"), make_workflow(**changes)] if pending else []
    assert await backend.get_pending_workflows(QUEUE) == expected


async def test_workflow_without_the_usual_keys_is_pending(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, {"id": "wf"})
    assert await backend.get_pending_workflows(QUEUE) == [{"id": "wf"}]
    assert await backend.mark_workflow_task_complete(QUEUE, "wf", "a") == -1


async def test_finished_workflow_may_be_pending_again(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(completed=True))
    await backend.store_workflow(QUEUE, make_workflow())
    assert await backend.get_pending_workflows(QUEUE) == [make_workflow()]


async def test_deleted_workflow_is_gone_with_what_it_waited_for(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(waits_for="ab"))
    assert await backend.delete_workflow(QUEUE, "wf-1") is True
    assert await backend.delete_workflow(QUEUE, "wf-1") is False
    assert await backend.get_all_workflows(QUEUE) == []
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "a") == -1
    await backend.store_workflow(QUEUE, make_workflow(waits_for="c"))
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "c") == 0


async def test_completed_tasks_are_counted_down(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(waits_for="abc"))
    await backend.store_workflow(QUEUE, make_workflow("wf-2", waits_for="abc"))

    async def complete(task_id: str) -> int:
        return await backend.mark_workflow_task_complete(QUEUE, "wf-1", task_id)

    assert [await complete(task_id) for task_id in "abcc"] == [2, 1, 0, -1]
    assert await complete("unknown") == -1
    assert await backend.mark_workflow_task_complete(QUEUE, "unknown", "a") == -1
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-2", "a") == 2


async def test_workflow_stored_again_waits_for_what_it_says_now(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(waits_for="abc"))
    await backend.mark_workflow_task_complete(QUEUE, "wf-1", "a")
    await backend.store_workflow(QUEUE, make_workflow(waits_for="ad"))
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "b") == -1
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "a") == 1
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "d") == 0


async def test_task_that_a_workflow_names_twice_counts_once(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(waits_for="aab"))
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "a") == 1


async def test_one_of_concurrent_callers_completes_the_last_task(
    make_backend: MakeBackend,
) -> None:
    backends = [await make_backend() for _ in range(3)]
    tasks = [f"task-{number}" for number in range(12)]
    workflow = make_workflow(pending_task_ids=tasks)
    await backends[0].store_workflow(QUEUE, workflow)
    remaining = await asyncio.gather(
        *(
            backend.mark_workflow_task_complete(QUEUE, "wf-1", task_id)
            for task_id in tasks
            for backend in backends
        )
    )
    assert sorted(count for count in remaining if count >= 0) == list(range(12))


async def test_many_tasks_may_be_waited_for(backend: SqlBackend) -> None:
    tasks = [f"task-{number}" for number in range(5000)]
    await backend.store_workflow(QUEUE, make_workflow(pending_task_ids=tasks))
    assert await backend.mark_workflow_task_complete(QUEUE, "wf-1", "task-7") == 4999
