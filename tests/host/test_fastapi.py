"""The host's router behind a real server, called over HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from sheppy import Queue
from sheppy.fastapi import create_router

from sheppy_sql import SqlBackend
from tests.host.support import PATIENCE, finished, running
from tests.host.tasks import add, fail, succeed_after
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase

ADD = "tests.host.tasks:add"
Json = dict[str, Any]


@asynccontextmanager
async def serving(backend: SqlBackend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the router, which runs in this loop and has not connected yet."""
    app = FastAPI()
    app.include_router(create_router(backend, prefix="/api"))
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # It listens: who connects before the server has started merely waits.
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}/api", timeout=PATIENCE, trust_env=False
            ) as client:
                yield client
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, PATIENCE)
            await backend.disconnect()


@pytest.fixture
async def client(database: TestDatabase) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(SqlBackend(database.url)) as client:
        yield client


async def call(client: httpx.AsyncClient, method: str, path: str, json: Json | None = None) -> Any:
    """What the route answers when all is well."""
    response = await client.request(method, path, json=json)
    assert response.status_code == 200, response.text
    return response.json()


async def refusal(
    client: httpx.AsyncClient, method: str, path: str, json: Json | None = None
) -> tuple[int, str]:
    """How the route refuses: the status, and what it says."""
    response = await client.request(method, path, json=json)
    assert response.status_code >= 400
    return response.status_code, str(response.json()["detail"])


async def test_requests_at_once_are_answered_though_they_are_the_first(
    client: httpx.AsyncClient,
) -> None:
    paths = [f"/test/tasks/{uuid4()}", "/test/size", "/queues", "/test/crons"] * 5
    adding = [
        client.post("/test/tasks", json={"func": ADD, "args": [number, 0]}) for number in range(20)
    ]
    responses = await asyncio.gather(*map(client.get, paths), *adding)
    assert [response.status_code for response in responses] == [404, 200, 200, 200] * 5 + [200] * 20
    assert await call(client, "GET", "/test/size") == 20


async def test_first_requests_share_a_few_connections(postgres_database: TestDatabase) -> None:
    async with serving(SqlBackend(postgres_database.url, pool_size=3)) as client:
        await asyncio.gather(*(client.get("/test/size") for _ in range(20)))
        open_connections = await postgres_database.fetch(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )
    assert open_connections[0][0] <= 3


async def test_task_is_added_run_by_a_worker_and_shown(
    client: httpx.AsyncClient, queue: Queue
) -> None:
    added = await call(
        client, "POST", "/test/tasks", {"func": ADD, "args": [1], "kwargs": {"y": 2}}
    )
    assert (added["status"], added["spec"]["args"]) == ("new", [1])
    assert await call(client, "GET", "/test/tasks/pending") == [added]
    assert await call(client, "GET", "/test/size") == 1
    assert await call(client, "GET", "/queues") == {"test": 1}
    await run_worker(make_worker(queue.backend), oneshot=True)
    shown = await call(client, "GET", f"/test/tasks/{added['id']}")
    assert (shown["status"], shown["result"]) == ("completed", 3)
    assert await call(client, "GET", "/test/tasks") == [shown]
    assert await call(client, "GET", "/test/size") == 0
    assert await call(client, "GET", "/queues") == {"test": 0}


async def test_pending_tasks_are_shown_up_to_a_limit(
    client: httpx.AsyncClient, queue: Queue
) -> None:
    tasks = [add(number, 0) for number in range(5)]
    await queue.add(tasks)
    shown = await call(client, "GET", "/test/tasks/pending?limit=2")
    assert [task["id"] for task in shown] == [str(task.id) for task in tasks[:2]]
    assert len(await call(client, "GET", "/test/tasks/pending")) == 5
    assert (await refusal(client, "GET", "/test/tasks/pending?limit=0"))[0] == 422


async def test_task_is_scheduled_after_a_delay_or_for_a_time(
    client: httpx.AsyncClient, queue: Queue
) -> None:
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    job = {"func": ADD, "args": [1, 2]}
    path = "/test/tasks/schedule"
    for_a_time = await call(client, "POST", path, {**job, "at": tomorrow.isoformat()})
    assert datetime.fromisoformat(for_a_time["scheduled_at"].replace("Z", "+00:00")) == tomorrow
    after_a_delay = await call(client, "POST", path, {**job, "delay_seconds": 0.1})
    assert await call(client, "GET", "/test/tasks/scheduled") == [after_a_delay, for_a_time]
    assert (await refusal(client, "POST", path, job))[0] == 400
    async with running(make_worker(queue.backend)):
        done = await queue.wait_for(after_a_delay["id"], timeout=PATIENCE)
    assert done is not None
    assert done.result == 3
    assert await call(client, "GET", "/test/tasks/scheduled") == [for_a_time]


async def test_retry_runs_a_failed_task_again_and_a_completed_one_by_force(
    client: httpx.AsyncClient, queue: Queue
) -> None:
    failed, completed = fail("no paper"), succeed_after(0)
    await queue.add([failed, completed])
    await run_worker(make_worker(queue.backend), oneshot=True)
    path = "/test/tasks/{}/retry"
    answer = await call(client, "POST", path.format(failed.id))
    assert answer == f"Task {failed.id} queued for retry"
    status, reason = await refusal(client, "POST", path.format(completed.id))
    assert status == 400
    assert "already completed" in reason
    assert (await refusal(client, "POST", path.format(uuid4())))[0] == 400
    later = {"force": True, "delay_seconds": 3600}
    await call(client, "POST", path.format(completed.id), later)
    [scheduled] = await call(client, "GET", "/test/tasks/scheduled")
    assert (scheduled["id"], scheduled["finished_at"]) == (str(completed.id), None)
    assert await call(client, "GET", "/test/size") == 1
    async with running(make_worker(queue.backend)):
        assert (await finished(queue, failed)).status == "failed"


async def test_what_cannot_be_a_task_is_refused(client: httpx.AsyncClient) -> None:
    unknown: Json = {"func": "tests.host.nothing:here"}
    wrong: Json = {"func": ADD, "args": ["not a number", 2]}
    no_task: Json = {"func": "tests.host.tasks:Gate"}
    more: dict[str, Json] = {
        "/test/tasks": {},
        "/test/tasks/schedule": {"delay_seconds": 1},
        "/test/crons": {"expression": "* * * * *"},
    }
    for job in (unknown, wrong, no_task):
        for path, extra in more.items():
            assert (await refusal(client, "POST", path, {**job, **extra}))[0] == 400
    assert (await refusal(client, "GET", "/test/tasks/no-uuid"))[0] == 422
    assert (await refusal(client, "GET", f"/test/tasks/{uuid4()}"))[0] == 404
    assert await call(client, "GET", "/test/tasks") == []


async def test_crons_are_added_listed_and_deleted(client: httpx.AsyncClient) -> None:
    cron = {"func": ADD, "args": [1, 2], "expression": "0 6 * * *"}
    assert await call(client, "POST", "/test/crons", cron) is True
    assert (await refusal(client, "POST", "/test/crons", cron))[0] == 500
    [shown] = await call(client, "GET", "/test/crons")
    assert (shown["expression"], shown["spec"]["args"]) == ("0 6 * * *", [1, 2])
    assert await call(client, "DELETE", "/test/crons", cron) == "Cron job deleted"
    assert (await refusal(client, "DELETE", "/test/crons", cron))[0] == 404
    assert await call(client, "GET", "/test/crons") == []


async def test_clear_empties_the_queue_that_is_named(client: httpx.AsyncClient) -> None:
    for queue in ("test", "test", "other"):
        await call(client, "POST", f"/{queue}/tasks", {"func": ADD, "args": [1, 2]})
    assert await call(client, "POST", "/test/tasks/clear") == 2
    assert await call(client, "POST", "/test/tasks/clear") == 0
    assert await call(client, "GET", "/test/tasks") == []
    assert await call(client, "GET", "/queues") == {"other": 1}


async def test_results_are_shown_while_many_requests_wait_for_connections(
    client: httpx.AsyncClient, queue: Queue
) -> None:
    tasks = [add(number, 1) for number in range(30)]
    await queue.add(tasks)
    async with running(make_worker(queue.backend)):
        await asyncio.gather(*(finished(queue, task) for task in tasks))
    shown = await asyncio.gather(*(call(client, "GET", f"/test/tasks/{t.id}") for t in tasks))
    assert [task["result"] for task in shown] == list(range(1, 31))
