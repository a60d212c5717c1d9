"""connect, disconnect and is_connected."""

from __future__ import annotations

import asyncio
import gc
import pickle
import warnings
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from sheppy import Backend, BackendError

from sheppy_sql import SqlBackend
from tests.contract.tasks import FUTURE, QUEUE, MakeBackend, finished, make_task
from tests.support.next_host import NextBackend

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase

CALLS: dict[str, Callable[[SqlBackend], Awaitable[Any]]] = {
    "append": lambda backend: backend.append(QUEUE, [make_task()]),
    "append nothing": lambda backend: backend.append(QUEUE, []),
    "pop": lambda backend: backend.pop(QUEUE),
    "get_pending": lambda backend: backend.get_pending(QUEUE),
    "size": lambda backend: backend.size(QUEUE),
    "get_tasks": lambda backend: backend.get_tasks(QUEUE, ["task"]),
    "get_all_tasks": lambda backend: backend.get_all_tasks(QUEUE),
    "schedule": lambda backend: backend.schedule(QUEUE, make_task(), FUTURE),
    "get_scheduled": lambda backend: backend.get_scheduled(QUEUE),
    "pop_scheduled": lambda backend: backend.pop_scheduled(QUEUE),
    "store_result": lambda backend: backend.store_result(QUEUE, finished(make_task())),
    "acknowledge": lambda backend: backend.acknowledge(QUEUE, ["task"]),
    "get_results": lambda backend: backend.get_results(QUEUE, ["task"]),
    "get_stats": lambda backend: backend.get_stats(QUEUE),
    "list_queues": lambda backend: backend.list_queues(),
    "clear": lambda backend: backend.clear(QUEUE),
    "add_cron": lambda backend: backend.add_cron(QUEUE, "cron", {}),
    "delete_cron": lambda backend: backend.delete_cron(QUEUE, "cron"),
    "get_crons": lambda backend: backend.get_crons(QUEUE),
    "store_workflow": lambda backend: backend.store_workflow(QUEUE, {"id": "wf"}),
    "get_workflows": lambda backend: backend.get_workflows(QUEUE, ["wf"]),
    "get_all_workflows": lambda backend: backend.get_all_workflows(QUEUE),
    "get_pending_workflows": lambda backend: backend.get_pending_workflows(QUEUE),
    "delete_workflow": lambda backend: backend.delete_workflow(QUEUE, "wf"),
    "mark_workflow_task_complete": lambda backend: backend.mark_workflow_task_complete(
        QUEUE, "wf", "task"
    ),
    "acquire_rate_limit": lambda backend: backend.acquire_rate_limit(QUEUE, "key", 1, 1.0, "task"),
    "cancel": lambda backend: backend.cancel(QUEUE, "task"),
    "delete_task": lambda backend: backend.delete_task(QUEUE, "task"),
    "heartbeat": lambda backend: backend.heartbeat(QUEUE, ["task"]),
    "heartbeat of nothing": lambda backend: backend.heartbeat(QUEUE, []),
    "get_stale_messages": lambda backend: backend.get_stale_messages(QUEUE, 200),
    "get_workflow_results": lambda backend: backend.get_workflow_results(QUEUE, ["wf"]),
}


def test_every_method_of_the_host_is_called_here() -> None:
    own_rules = {"connect", "disconnect", "is_connected"}
    called = {name.partition(" ")[0] for name in CALLS}
    assert set(Backend.__abstractmethods__) <= called | own_rules
    assert set(NextBackend.__abstractmethods__) <= called | own_rules


async def test_every_call_needs_a_connection(database: TestDatabase) -> None:
    backend = SqlBackend(database.url)
    for call in CALLS.values():
        with pytest.raises(BackendError, match=r"[Nn]ot connected"):
            await call(backend)
    await backend.connect()
    await backend.disconnect()
    for call in CALLS.values():
        with pytest.raises(BackendError, match=r"[Nn]ot connected"):
            await call(backend)


async def test_constructor_opens_nothing(empty_database: TestDatabase) -> None:
    backend = SqlBackend(empty_database.url)
    assert backend.is_connected is False
    await backend.disconnect()
    assert backend.is_connected is False


async def test_connect_and_disconnect_may_be_repeated(database: TestDatabase) -> None:
    backend = SqlBackend(database.url)
    for _ in range(2):
        await backend.connect()
        await backend.connect()
        assert backend.is_connected is True
        assert await backend.size(QUEUE) == 0
        await backend.disconnect()
        await backend.disconnect()
        assert backend.is_connected is False


async def test_connect_may_be_entered_by_many_at_once(database: TestDatabase) -> None:
    backend = SqlBackend(database.url)
    await asyncio.gather(*(backend.connect() for _ in range(20)))
    assert await backend.append(QUEUE, [make_task()]) == [True]
    await asyncio.gather(*(backend.disconnect() for _ in range(3)))
    assert backend.is_connected is False


async def test_what_was_stored_is_there_after_a_reconnect(make_backend: MakeBackend) -> None:
    backend = await make_backend()
    await backend.append(QUEUE, [make_task()])
    await backend.disconnect()
    await backend.connect()
    assert await backend.pop(QUEUE) == [make_task()]


async def test_disconnect_ends_what_waits(make_backend: MakeBackend) -> None:
    backend = await make_backend()
    waiting = asyncio.create_task(backend.get_results(QUEUE, ["unknown"], 0))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    await backend.disconnect()
    with pytest.raises(BackendError, match="disconnected"):
        await asyncio.wait_for(waiting, 10)


def test_backend_of_a_closed_event_loop_connects_again(database: TestDatabase) -> None:
    backend = SqlBackend(database.url)

    async def use() -> list[bool]:
        assert not backend.is_connected
        await backend.connect()
        return await backend.append(QUEUE, [make_task()])

    async def leave() -> None:
        await backend.connect()
        await backend.disconnect()

    with warnings.catch_warnings():
        # About the sockets and threads of loops that were closed under them.
        warnings.simplefilter("ignore", ResourceWarning)
        assert asyncio.run(use()) == [True]
        assert not backend.is_connected
        assert asyncio.run(use()) == [False]
        asyncio.run(leave())
        gc.collect()


async def test_another_running_event_loop_is_refused(make_backend: MakeBackend) -> None:
    backend = await make_backend()

    def elsewhere(call: Callable[[SqlBackend], Awaitable[Any]]) -> None:
        async def run() -> None:
            await call(backend)

        asyncio.run(run())

    for call in (CALLS["size"], lambda backend: backend.connect()):
        with pytest.raises(BackendError, match="another running event loop"):
            await asyncio.to_thread(elsewhere, call)
    assert await backend.size(QUEUE) == 0


async def test_pickled_backend_is_unconnected_and_works(make_backend: MakeBackend) -> None:
    backend = await make_backend(ttl=None, table_prefix="sheppy_")
    await backend.append(QUEUE, [make_task()])
    copy = pickle.loads(pickle.dumps(backend))
    assert copy.is_connected is False
    await copy.connect()
    assert await copy.pop(QUEUE) == [make_task()]
    await copy.disconnect()
