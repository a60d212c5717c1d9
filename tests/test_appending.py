"""Tasks that are appended at a time go together, and none is the others' business."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

import pytest
from sheppy import BackendError
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sheppy_sql import SqlBackend
from tests.contract.tasks import ids, make_task
from tests.support.databases import TestDatabase

QUEUE = "test"
COUNT = 100
IDS = [f"task {number:03}" for number in range(COUNT)]
HELD = "task 042"
PATIENCE = 20.0  # seconds

REFUSE = {
    "sqlite": [
        f"""CREATE TRIGGER refuse BEFORE INSERT ON sheppy_tasks WHEN NEW.id = '{HELD}'
           BEGIN SELECT RAISE(ABORT, 'refused'); END"""
    ],
    "postgresql": [
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN RAISE EXCEPTION 'refused'; END $$""",
        f"""CREATE TRIGGER refuse BEFORE INSERT ON sheppy_tasks FOR EACH ROW
           WHEN (NEW.id = '{HELD}') EXECUTE FUNCTION refuse()""",
    ],
}
OPEN_APPEND = text(
    "INSERT INTO sheppy_tasks (queue, id, payload, state) VALUES (:queue, :id, '{}', 'idle')"
)


def start_all(backend: SqlBackend) -> dict[str, asyncio.Task[list[bool]]]:
    return {
        task_id: asyncio.create_task(backend.append(QUEUE, [make_task(task_id)])) for task_id in IDS
    }


async def answers(calls: list[asyncio.Task[list[bool]]]) -> list[bool]:
    return [answer for (answer,) in await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)]


async def test_tasks_of_a_moment_share_a_few_statements(backend: SqlBackend) -> None:
    statements: list[str] = []
    engine = backend._connected.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    assert all(await answers(list(start_all(backend).values())))
    assert len(statements) < COUNT / 10
    assert ids(await backend.pop(QUEUE, COUNT)) == IDS


async def test_whoever_begins_to_listen_to_an_engine_sees_every_statement(
    postgres_database: TestDatabase,
) -> None:
    """Those as well that are prepared by then, and carried out without SQLAlchemy."""
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    for number in range(3):
        await backend.append(QUEUE, [make_task(f"before {number}")])
    seen: list[str] = []
    engine = backend._connected.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    await backend.append(QUEUE, [make_task("seen")])
    assert any("sheppy_append" in statement for statement in seen)
    assert await backend.size(QUEUE) == 4
    await backend.disconnect()


async def test_every_statement_is_logged_where_sqlalchemy_is_to_log_them(
    postgres_database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"):
        backend = SqlBackend(postgres_database.url)
        await backend.connect()
        await backend.append(QUEUE, [make_task("one")])
        await backend.disconnect()
    assert "sheppy_append" in caplog.text


async def test_one_statement_appends_one_task(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await backend.append(QUEUE, [make_task("first")])
    said: list[str] = []
    engine = backend._connected.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: said.append(args[2]))
    assert await backend.append(QUEUE, [make_task("second")]) == [True]
    assert len(said) == 1
    await backend.disconnect()


async def test_the_callers_order_is_kept_however_many_tasks_each_brings(
    backend: SqlBackend,
) -> None:
    calls = [[f"{number}-{place}" for place in range(number % 5 + 1)] for number in range(60)]
    await asyncio.gather(
        *(backend.append(QUEUE, [make_task(task_id) for task_id in call]) for call in calls)
    )
    expected = [task_id for call in calls for task_id in call]
    assert ids(await backend.pop(QUEUE, len(expected))) == expected


async def test_of_calls_with_one_id_one_is_told_that_it_was_new(backend: SqlBackend) -> None:
    calls = [
        asyncio.create_task(backend.append(QUEUE, [make_task(task_id)]))
        for task_id in IDS[:20]
        for _ in range(5)
    ]
    assert Counter(await answers(calls)) == {True: 20, False: 80}
    assert ids(await backend.pop(QUEUE, COUNT)) == IDS[:20]


async def test_bad_task_fails_alone(backend: SqlBackend, database: TestDatabase) -> None:
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        for statement in REFUSE[database.dialect]:
            await connection.execute(text(statement))
    await engine.dispose()
    calls = start_all(backend)
    outcomes = await asyncio.gather(*calls.values(), return_exceptions=True)
    failed = {
        task_id: error for task_id, error in zip(calls, outcomes, strict=True) if error != [True]
    }
    assert list(failed) == [HELD]
    assert isinstance(failed[HELD], BackendError)
    assert sorted(ids(await backend.pop(QUEUE, COUNT))) == sorted(set(IDS) - {HELD})


async def test_id_in_an_open_transaction_holds_up_no_other(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    engine = create_async_engine(postgres_database.url)
    async with engine.connect() as connection:
        await connection.execute(OPEN_APPEND, {"queue": QUEUE, "id": HELD})
        calls = start_all(backend)
        held = calls.pop(HELD)
        assert all(await answers(list(calls.values())))
        for number in range(20):  # also those that come while it waits
            assert await backend.append(QUEUE, [make_task(f"later {number}")]) == [True]
        assert not held.done()
        await connection.rollback()
        assert await asyncio.wait_for(held, PATIENCE) == [True]
    await engine.dispose()
    assert await backend.size(QUEUE) == COUNT + 20
    await backend.disconnect()


@pytest.mark.torture
async def test_a_thousand_callers_beside_an_open_transaction(
    postgres_database: TestDatabase,
) -> None:
    """As of a user whose transaction stays open for half a minute."""
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    engine = create_async_engine(postgres_database.url)
    async with engine.connect() as connection:
        await connection.execute(OPEN_APPEND, {"queue": QUEUE, "id": HELD})
        held = asyncio.create_task(backend.append(QUEUE, [make_task(HELD)]))
        ends = time.monotonic() + 30
        took: list[float] = []

        async def append(task_id: str) -> None:
            began = time.monotonic()
            await backend.append(QUEUE, [make_task(task_id)])
            took.append(time.monotonic() - began)

        for number in range(1000):
            await asyncio.wait_for(append(f"other {number}"), PATIENCE)
        assert not held.done()
        await asyncio.sleep(max(0.0, ends - time.monotonic()))
        await connection.rollback()
        assert await asyncio.wait_for(held, PATIENCE) == [True]
    await engine.dispose()
    await backend.disconnect()
    print(f"slowest of 1,000: {max(took) * 1000:.0f} ms")
    # 0.2 s where the machine has nothing else to do; 30 s is what it must not be.
    assert max(took) < 5


async def test_caller_who_is_cancelled_leaves_the_others_alone(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    calls = start_all(backend)
    await asyncio.sleep(0)
    for task_id in IDS[1::2]:
        calls[task_id].cancel()
    assert all(await answers([calls[task_id] for task_id in IDS[::2]]))
    await asyncio.wait(list(calls.values()), timeout=PATIENCE)
    # A cancelled call may have happened.
    assert set(IDS[::2]) <= set(ids(await backend.pop(QUEUE, COUNT)))
    await backend.disconnect()


async def test_id_that_is_finishing_is_not_taken_for_new(postgres_database: TestDatabase) -> None:
    """The append waits for the transaction in which the task ends, and then sees its result."""
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    engine: AsyncEngine = create_async_engine(postgres_database.url)
    await backend.append(QUEUE, [make_task("task")])
    assert ids(await backend.pop(QUEUE)) == ["task"]
    async with engine.connect() as connection:
        await connection.execute(text("DELETE FROM sheppy_tasks WHERE id = 'task'"))
        await connection.execute(
            text(
                "INSERT INTO sheppy_results (queue, id, payload, finished_at) "
                "VALUES (:queue, 'task', '{}', now())"
            ),
            {"queue": QUEUE},
        )
        again = asyncio.create_task(backend.append(QUEUE, [make_task("task"), make_task("new")]))
        await asyncio.sleep(0.3)  # long enough for it to be at the server, where it waits
        assert not again.done()
        await connection.commit()
        assert await asyncio.wait_for(again, PATIENCE) == [False, True]
    await engine.dispose()
    assert ids(await backend.pop(QUEUE, 5)) == ["new"]
    await backend.disconnect()
