"""get_workflow_results: waiting for workflows to complete or fail."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest

from sheppy_sql import _waiting
from tests.contract.tasks import QUEUE, MakeBackend

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend

SOON = 5.0  # seconds; far more than an answer takes
ENDS: list[dict[str, Any]] = [
    {"completed": True},
    {"error": "it failed"},
    {"exception": "it failed"},
]


def make_workflow(workflow_id: str = "wf", **changes: Any) -> dict[str, Any]:
    return {"id": workflow_id, "completed": False, "error": None, "exception": None, **changes}


@pytest.mark.parametrize("end", ENDS)
async def test_ended_workflow_is_a_result(backend: SqlBackend, end: dict[str, Any]) -> None:
    workflow = make_workflow(**end)
    await backend.store_workflow(QUEUE, workflow)
    for timeout in (None, -1, 0, 0.001, 10):
        assert await backend.get_workflow_results(QUEUE, ["wf"], timeout) == {"wf": workflow}


@pytest.mark.parametrize("timeout", [None, -1, -0.001])
async def test_without_waiting_what_has_ended_comes(
    backend: SqlBackend, timeout: float | None
) -> None:
    done = make_workflow("done", completed=True)
    await backend.store_workflow(QUEUE, done)
    await backend.store_workflow(QUEUE, make_workflow("running"))
    await backend.store_workflow("other", make_workflow("elsewhere", completed=True))
    wanted = ["running", "done", "unknown", "elsewhere", "done"]
    answer = backend.get_workflow_results(QUEUE, wanted, timeout)
    assert await asyncio.wait_for(answer, SOON) == {"done": done}


@pytest.mark.parametrize("timeout", [None, -1, 0, 0.5])
async def test_no_ids_is_an_empty_answer(backend: SqlBackend, timeout: float | None) -> None:
    waiting = backend.get_workflow_results(QUEUE, [], timeout)
    assert await asyncio.wait_for(waiting, SOON) == {}


@pytest.mark.parametrize("timeout", [0.1, 0.001, 1])
async def test_timeout_says_how_long_it_waited(backend: SqlBackend, timeout: float) -> None:
    await backend.store_workflow(QUEUE, make_workflow("done", completed=True))
    await backend.store_workflow(QUEUE, make_workflow("running"))
    message = re.escape(f"Did not complete within {timeout} seconds")
    with pytest.raises(TimeoutError, match=f"^{message}$"):
        await asyncio.wait_for(
            backend.get_workflow_results(QUEUE, ["done", "running"], timeout), SOON
        )


async def test_timeout_zero_waits_for_all_without_end(make_backend: MakeBackend) -> None:
    user, worker = await make_backend(), await make_backend()
    waiting = asyncio.create_task(user.get_workflow_results(QUEUE, ["a", "b"], 0))
    await worker.store_workflow(QUEUE, make_workflow("a", completed=True))
    await worker.store_workflow(QUEUE, make_workflow("b"))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    await worker.store_workflow(QUEUE, make_workflow("b", completed=True))
    assert await asyncio.wait_for(waiting, SOON) == {
        workflow_id: make_workflow(workflow_id, completed=True) for workflow_id in "ab"
    }


@pytest.mark.parametrize("end", ENDS)
async def test_store_workflow_wakes_who_waits_for_its_end(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch, end: dict[str, Any]
) -> None:
    """However rarely they look by themselves; and another workflow does not count."""
    monkeypatch.setattr(_waiting, "FIRST_POLL", 60.0)
    user, worker = await make_backend(max_poll_interval=60), await make_backend()
    await worker.store_workflow(QUEUE, make_workflow())
    waiting = [
        asyncio.create_task(user.get_workflow_results(QUEUE, ["wf"], timeout))
        for timeout in (0, 60)
    ]
    done, _ = await asyncio.wait(waiting, timeout=0.3)
    await worker.store_workflow(QUEUE, make_workflow("other", **end))
    await worker.store_workflow("other", make_workflow(**end))
    await worker.store_workflow(QUEUE, make_workflow(step=2))
    assert not done
    await worker.store_workflow(QUEUE, make_workflow(**end))
    for waiter in waiting:
        assert await asyncio.wait_for(waiter, SOON) == {"wf": make_workflow(**end)}


async def test_workflow_that_is_stored_unfinished_again_has_no_result(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(completed=True))
    await backend.store_workflow(QUEUE, make_workflow())
    assert await backend.get_workflow_results(QUEUE, ["wf"]) == {}
    await backend.store_workflow(QUEUE, make_workflow(completed=True))
    await backend.delete_workflow(QUEUE, "wf")
    assert await backend.get_workflow_results(QUEUE, ["wf"]) == {}


async def test_task_of_the_same_id_is_no_workflow(backend: SqlBackend) -> None:
    await backend.store_workflow(QUEUE, make_workflow(completed=True))
    assert await backend.get_results(QUEUE, ["wf"]) == {}
