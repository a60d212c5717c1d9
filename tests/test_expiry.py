"""Finished tasks whose time is over: gone for everybody at once, deleted later."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sheppy_sql import _pruner
from sheppy_sql._pruner import Pruner
from sheppy_sql._stores import results as result_store
from tests.contract.tasks import (
    FUTURE,
    PAST,
    QUEUE,
    STATES,
    MakeBackend,
    everything,
    finished,
    make_task,
    store_finished,
)
from tests.support.clock import from_now

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend
    from tests.support.databases import TestDatabase

MINUTE = 60.0
HOUR = 60 * MINUTE
DAY = 24 * HOUR
CRON_RUN = str(uuid.uuid5(uuid.NAMESPACE_OID, "a cron's run"))
ORDINARY = str(uuid.uuid4())

SCHEDULES: dict[str, Callable[[SqlBackend, str], Awaitable[Any]]] = {
    "append": lambda backend, task_id: backend.append(QUEUE, [make_task(task_id)]),
    "schedule": lambda backend, task_id: backend.schedule(QUEUE, make_task(task_id), FUTURE),
}


async def expire(database: TestDatabase, ago: float, task_id: str = "%") -> None:
    """Have results be past their time for so many seconds."""
    await database.execute(
        "UPDATE sheppy_results SET expires_at = :then WHERE id LIKE :task_id",
        then=from_now(database, -ago),
        task_id=task_id,
    )


async def store_expired(
    database: TestDatabase, count: int, ago: float, prefix: str = "task-"
) -> None:
    """Make results that are past their time, quickly."""
    await database.execute(
        "WITH RECURSIVE numbers(n) AS"
        f" (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})"
        " INSERT INTO sheppy_results (queue, id, payload, finished_at, expires_at)"
        f" SELECT '{QUEUE}', '{prefix}' || CAST(n AS TEXT), '{{}}', :then, :then FROM numbers",
        then=from_now(database, -ago),
    )


async def stored(database: TestDatabase) -> set[str]:
    return {row[0] for row in await database.fetch("SELECT id FROM sheppy_results")}


async def prune(backend: SqlBackend, database: TestDatabase) -> int:
    """Prune, though somebody may have done so a moment ago."""
    await database.execute("DELETE FROM sheppy_chores")
    return await pruner_of(backend).prune()


def pruner_of(backend: SqlBackend) -> Pruner:
    return Pruner(backend._connected.database, backend._options)


async def test_expired_result_is_nowhere_to_be_seen(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await store_finished(backend, make_task())
    await backend.append(QUEUE, [make_task("other")])
    await expire(database, 0.001)
    assert await backend.get_tasks(QUEUE, ["task", "other"]) == {"other": make_task("other")}
    assert await backend.get_results(QUEUE, ["task"]) == {}
    with pytest.raises(TimeoutError):
        await backend.get_results(QUEUE, ["task"], 0.01)
    assert await backend.cancel(QUEUE, "task") is None
    assert await everything(backend) == {
        "tasks": [make_task("other")],
        "pending": [make_task("other")],
        "size": 1,
        "scheduled": [],
        "stats": {"pending": 1, "completed": 0, "scheduled": 0},
        "crons": [],
        "workflows": [],
        "queues": {QUEUE: 1},
    }
    assert await backend.clear(QUEUE) == 1


@pytest.mark.parametrize("way", SCHEDULES)
async def test_id_of_an_expired_result_is_free_at_once(
    backend: SqlBackend, database: TestDatabase, way: str
) -> None:
    await store_finished(backend, make_task(result="old"))
    await expire(database, 0.001)
    assert await SCHEDULES[way](backend, "task") in ([True], True)
    assert await SCHEDULES[way](backend, "task") in ([False], False)
    assert await backend.get_all_tasks(QUEUE) == [make_task()]
    assert await backend.get_results(QUEUE, ["task"]) == {}
    [again] = await backend.pop_scheduled(QUEUE, FUTURE) or await backend.pop(QUEUE)
    assert again == make_task()
    # The old row, if it is still there, is in nobody's way.
    await backend.store_result(QUEUE, finished(make_task(), result="new"))
    done = finished(make_task(), result="new")
    assert await backend.get_all_tasks(QUEUE) == [done]
    assert await prune(backend, database) == 0
    assert await backend.get_results(QUEUE, ["task"]) == {"task": done}


async def test_row_outlives_its_expiry_by_ten_minutes(
    backend: SqlBackend, database: TestDatabase
) -> None:
    for task_id in ("kept", "expired", "old"):
        await store_finished(backend, make_task(task_id))
    await expire(database, 9.5 * MINUTE, "expired")
    await expire(database, 10.5 * MINUTE, "old")
    assert await prune(backend, database) == 1
    assert await stored(database) == {"kept", "expired"}
    assert list(await backend.get_results(QUEUE, ["kept", "expired"])) == ["kept"]
    await expire(database, 10.5 * MINUTE, "expired")
    assert await prune(backend, database) == 1
    assert await prune(backend, database) == 0
    assert await stored(database) == {"kept"}


async def test_result_that_is_kept_for_ever_is_never_deleted(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    backend = await make_backend(ttl=None)
    await store_finished(backend, make_task())
    assert await prune(backend, database) == 0
    assert await stored(database) == {"task"}


async def test_old_results_are_deleted_in_batches(
    backend: SqlBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store_finished(backend, make_task("kept"))
    await store_expired(database, 25, HOUR)
    batches: list[int] = []
    prune_results = result_store.prune

    async def counted(tx: Any, most: int) -> int:
        batches.append(await prune_results(tx, most))
        return batches[-1]

    monkeypatch.setattr(result_store, "prune", counted)
    monkeypatch.setattr(_pruner, "BATCH", 10)
    assert await prune(backend, database) == 25
    assert batches == [10, 10, 5]
    assert await stored(database) == {"kept"}


async def test_thousands_of_old_results_go_in_one_round(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await store_expired(database, 2100, HOUR)
    assert await prune(backend, database) == 2100


async def test_one_instance_at_a_time_deletes(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    pruners = [pruner_of(await make_backend()) for _ in range(3)]
    await store_expired(database, 20, HOUR)
    assert sorted(await asyncio.gather(*(pruner.prune() for pruner in pruners))) == [0, 0, 20]
    await store_expired(database, 20, HOUR)
    assert [await pruner.prune() for pruner in pruners] == [0, 0, 0]
    await database.execute(
        "UPDATE sheppy_chores SET due_at = :then", then=from_now(database, -0.001)
    )
    assert [await pruner.prune() for pruner in pruners] == [20, 0, 0]


async def test_row_that_is_locked_is_left_to_a_later_round(postgres_database: TestDatabase) -> None:
    """By an application's open transaction, say: nobody waits for that."""
    from sheppy_sql import SqlBackend

    database, backend = postgres_database, SqlBackend(postgres_database.url)
    await backend.connect()
    await store_expired(database, 30, HOUR)
    engine = create_async_engine(database.url)
    async with engine.connect() as connection:
        await connection.execute(
            text("SELECT 1 FROM sheppy_results WHERE id IN ('task-1', 'task-7') FOR UPDATE")
        )
        assert await asyncio.wait_for(prune(backend, database), 10) == 28
        assert await stored(database) == {"task-1", "task-7"}
    await engine.dispose()
    assert await prune(backend, database) == 2
    await backend.disconnect()


@pytest.mark.parametrize("way", SCHEDULES)
async def test_id_of_a_crons_run_stays_taken_for_a_day(
    backend: SqlBackend, database: TestDatabase, way: str
) -> None:
    for task_id in (CRON_RUN, ORDINARY):
        await store_finished(backend, make_task(task_id))
    for ago in (0.001, HOUR, 23 * HOUR):
        await expire(database, ago)
        await prune(backend, database)
        assert await SCHEDULES[way](backend, CRON_RUN) in ([False], False)
        assert await backend.get_tasks(QUEUE, [CRON_RUN]) == {}
        assert await backend.get_results(QUEUE, [CRON_RUN]) == {}
        assert await stored(database) >= {CRON_RUN}
    assert await backend.size(QUEUE) == 0
    assert await backend.get_scheduled(QUEUE) == []
    assert await SCHEDULES[way](backend, ORDINARY) in ([True], True)
    await expire(database, DAY + MINUTE, CRON_RUN)
    assert await SCHEDULES[way](backend, CRON_RUN) in ([True], True)
    assert set(await backend.get_tasks(QUEUE, [CRON_RUN, ORDINARY])) == {CRON_RUN, ORDINARY}


async def test_row_of_a_crons_run_is_deleted_after_a_day(
    backend: SqlBackend, database: TestDatabase
) -> None:
    for task_id in (CRON_RUN, ORDINARY):
        await store_finished(backend, make_task(task_id))
    await expire(database, 23 * HOUR)
    assert await prune(backend, database) == 1
    assert await stored(database) == {CRON_RUN}
    await expire(database, DAY + MINUTE)
    assert await prune(backend, database) == 1


async def test_crons_run_may_be_repeated_by_its_user(
    backend: SqlBackend, database: TestDatabase
) -> None:
    """A retry says that it may be there already."""
    await store_finished(backend, make_task(CRON_RUN))
    await expire(database, HOUR)
    assert await backend.append(QUEUE, [make_task(CRON_RUN)], unique=False) == [True]
    assert await backend.pop(QUEUE) == [make_task(CRON_RUN)]


@pytest.mark.parametrize("state", ["pending", "scheduled", "claimed", "retrying"])
async def test_unfinished_task_is_never_pruned(
    backend: SqlBackend, database: TestDatabase, state: str
) -> None:
    await STATES[state](backend, make_task(created_at=PAST.isoformat()))
    await database.execute(
        "UPDATE sheppy_tasks SET created_at = :then", then=from_now(database, -400 * DAY)
    )
    assert await prune(backend, database) == 0
    assert len(await backend.get_all_tasks(QUEUE)) == 1


async def test_receipts_are_kept_for_longer_than_any_call_goes_on(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await backend.add_cron(QUEUE, "cron", {})
    await backend.delete_cron(QUEUE, "cron")
    await database.execute(
        "INSERT INTO sheppy_receipts (token, answer, created_at) VALUES (1, 'true', :then)",
        then=from_now(database, -HOUR),
    )
    await prune(backend, database)
    assert len(await database.fetch("SELECT token FROM sheppy_receipts WHERE token <> 1")) == 2
    assert await database.fetch("SELECT token FROM sheppy_receipts WHERE token = 1") == []


async def test_long_dead_consumers_are_forgotten_unless_they_hold_tasks(
    backend: SqlBackend, database: TestDatabase
) -> None:
    for consumer, ago in (("long dead", 700.0), ("holding", 700.0), ("just dead", 500.0)):
        await database.execute(
            "INSERT INTO sheppy_consumers (id, heartbeat_at, expires_at, on_crash, max_crashes)"
            " VALUES (:consumer, :then, :then, 'requeue', 5)",
            consumer=consumer,
            then=from_now(database, -ago),
        )
    await database.execute(
        "INSERT INTO sheppy_tasks (queue, id, payload, state, owner, claim_token, heartbeat_at)"
        " VALUES ('elsewhere', 'a', '{}', 'claimed', 'holding', 1, :now)",
        now=from_now(database, 0),
    )
    await prune(backend, database)
    left = await database.fetch("SELECT id FROM sheppy_consumers ORDER BY id")
    assert left == [("holding",), ("just dead",)]


async def test_backend_that_works_prunes_by_itself(
    make_backend: MakeBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pruner, "INTERVAL", 0.05)
    backend = await make_backend()
    await store_expired(database, 3, HOUR)
    deadline = asyncio.get_running_loop().time() + 30
    await backend.pop(QUEUE)
    while await stored(database):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
