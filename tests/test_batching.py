"""Results that are stored at a time go together, and none is the others' business."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sheppy import BackendError
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

from sheppy_sql import SqlBackend, _acknowledger, _finisher
from sheppy_sql._payloads import encode_task
from sheppy_sql._stores.finishing import Ended, finish_all
from tests.contract.tasks import FUTURE, MakeBackend, finished, make_task
from tests.support.databases import TestDatabase

QUEUE = "test"
COUNT = 100
IDS = [f"task {number:03}" for number in range(COUNT)]

KEEP = [
    """CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
       $$ BEGIN RETURN NULL; END $$""",
    """CREATE TRIGGER keep BEFORE UPDATE OR DELETE ON sheppy_tasks FOR EACH ROW
       EXECUTE FUNCTION keep()""",
]
REFUSE = {
    "sqlite": [
        """CREATE TRIGGER refuse BEFORE INSERT ON sheppy_results WHEN NEW.id = 'task 042'
           BEGIN SELECT RAISE(ABORT, 'refused'); END"""
    ],
    "postgresql": [
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN RAISE EXCEPTION 'refused'; END $$""",
        """CREATE TRIGGER refuse BEFORE INSERT ON sheppy_results FOR EACH ROW
           WHEN (NEW.id = 'task 042') EXECUTE FUNCTION refuse()""",
    ],
}


def done(task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**task, "status": "completed", "finished_at": FUTURE.isoformat(), **changes}


async def take_all(backend: SqlBackend) -> list[dict[str, Any]]:
    await backend.append(QUEUE, [make_task(task_id) for task_id in IDS])
    return await backend.pop(QUEUE, COUNT)


async def test_results_of_a_moment_share_a_few_statements(backend: SqlBackend) -> None:
    tasks = await take_all(backend)
    statements = statements_of(backend)
    await asyncio.gather(*(backend.store_result(QUEUE, done(task, result=1)) for task in tasks))
    assert len([one for one in statements if "sheppy_results" in one]) < COUNT / 10
    stored = await backend.get_results(QUEUE, IDS)
    assert stored == {task["id"]: done(task, result=1) for task in tasks}
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": COUNT, "scheduled": 0}


def statements_of(backend: SqlBackend) -> list[str]:
    """Those that the backend executes from now on."""
    statements: list[str] = []
    engine = backend._connected.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    return statements


async def test_acknowledgements_of_a_moment_share_a_few_statements(backend: SqlBackend) -> None:
    await take_all(backend)
    statements = statements_of(backend)
    await asyncio.gather(*(backend.acknowledge(QUEUE, [task_id]) for task_id in IDS))
    assert len([one for one in statements if "UPDATE sheppy_tasks" in one]) < COUNT / 10
    # They are nobody's any more: what is stored of one now is stored as of any task.
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 0, "scheduled": 0}
    await backend.disconnect()
    await backend.connect()
    assert await backend.pop(QUEUE, COUNT) == []


async def test_signs_of_life_of_a_moment_share_a_few_statements(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await take_all(backend)
    before = await database.fetch("SELECT max(heartbeat_at) FROM sheppy_tasks")
    statements = statements_of(backend)
    await asyncio.gather(*(backend.heartbeat(QUEUE, [task_id]) for task_id in IDS))
    assert len([one for one in statements if "UPDATE sheppy_tasks" in one]) < COUNT / 10
    assert await database.fetch("SELECT min(heartbeat_at) FROM sheppy_tasks") > before


async def test_row_that_somebody_has_locked_holds_up_no_other_acknowledgement(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await take_all(backend)
    engine = create_async_engine(postgres_database.url)
    async with engine.connect() as connection:
        await connection.execute(
            text("SELECT 1 FROM sheppy_tasks WHERE id = 'task 042' FOR UPDATE")
        )
        ending = {
            task_id: asyncio.create_task(backend.acknowledge(QUEUE, [task_id])) for task_id in IDS
        }
        held = ending.pop("task 042")
        await asyncio.wait_for(asyncio.gather(*ending.values()), 20)
        assert not held.done()
        # Signs of life wait for nobody.
        await asyncio.wait_for(backend.heartbeat(QUEUE, ["task 042"]), 20)
        await connection.rollback()
        await asyncio.wait_for(held, 20)
    await engine.dispose()
    await backend.disconnect()


async def test_acknowledgement_of_an_old_claim_ends_no_new_one(
    postgres_database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even together with that of another task, which was taken with the new one."""
    monkeypatch.setattr(_acknowledger, "LOCK_TIMEOUT", 3600.0)
    backend, other = (SqlBackend(postgres_database.url) for _ in range(2))
    await backend.connect()
    await other.connect()
    engine = create_async_engine(postgres_database.url)
    await backend.append(QUEUE, [make_task("held"), make_task("again")])
    await backend.pop(QUEUE, 2)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1 FROM sheppy_tasks WHERE id = 'held' FOR UPDATE"))
        first = asyncio.create_task(backend.acknowledge(QUEUE, ["held"]))
        await asyncio.sleep(0)
        second = asyncio.create_task(backend.acknowledge(QUEUE, ["again"]))
        await asyncio.sleep(0)
        await other.append(QUEUE, [make_task("again")], unique=False)
        await other.append(QUEUE, [make_task("new")])
        taken = await backend.pop(QUEUE, 2)
        third = asyncio.create_task(backend.acknowledge(QUEUE, ["new"]))
        await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(first, second, third), 20)
    assert [task["id"] for task in taken] == ["again", "new"]
    await backend.store_result(QUEUE, finished(taken[0]))
    assert list(await backend.get_results(QUEUE, ["again"])) == ["again"]
    await engine.dispose()
    await backend.disconnect()
    await other.disconnect()


async def test_rows_that_a_trigger_keeps_from_changing_are_an_error(
    postgres_database: TestDatabase,
) -> None:
    """And not something to be tried for ever."""
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await backend.append(QUEUE, [make_task("a"), make_task("b")])
    tasks = await backend.pop(QUEUE, 2)
    for sql in KEEP:
        await postgres_database.execute(sql)
    for call in (
        backend.store_result(QUEUE, finished(tasks[0])),
        backend.clear(QUEUE),
        backend.acknowledge(QUEUE, ["b"]),
    ):
        with pytest.raises(BackendError, match="trigger or a policy"):
            await asyncio.wait_for(call, 20)
    await postgres_database.execute("DROP TRIGGER keep ON sheppy_tasks")
    assert await backend.clear(QUEUE) == 2
    await backend.disconnect()


async def test_bad_result_fails_alone(backend: SqlBackend, database: TestDatabase) -> None:
    tasks = await take_all(backend)
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        for statement in REFUSE[database.dialect]:
            await connection.execute(text(statement))
    await engine.dispose()
    outcomes = await asyncio.gather(
        *(backend.store_result(QUEUE, done(task)) for task in tasks), return_exceptions=True
    )
    failed = {
        task["id"]: error for task, error in zip(tasks, outcomes, strict=True) if error is not True
    }
    assert list(failed) == ["task 042"]
    assert isinstance(failed["task 042"], BackendError)
    assert set(await backend.get_results(QUEUE, IDS)) == set(IDS) - {"task 042"}


async def test_row_that_somebody_has_locked_holds_up_no_other_result(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    tasks = await take_all(backend)
    engine = create_async_engine(postgres_database.url)
    async with engine.connect() as connection:
        await connection.execute(
            text("SELECT 1 FROM sheppy_tasks WHERE id = 'task 042' FOR UPDATE")
        )
        storing = {
            task["id"]: asyncio.create_task(backend.store_result(QUEUE, done(task)))
            for task in tasks
        }
        held = storing.pop("task 042")
        assert all(await asyncio.wait_for(asyncio.gather(*storing.values()), 20))
        assert not held.done()
        await connection.rollback()
        assert await asyncio.wait_for(held, 20)
    await engine.dispose()
    assert set(await backend.get_results(QUEUE, IDS)) == set(IDS)
    await backend.disconnect()


async def test_task_that_is_written_to_while_its_result_waits_for_it_is_finished_all_the_same(
    postgres_database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a sign of life: the statement's snapshot does not show the version that it locks."""
    monkeypatch.setattr(_finisher, "LOCK_TIMEOUT", 3600.0)
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    tasks = await take_all(backend)
    engine = create_async_engine(postgres_database.url)
    async with engine.connect() as connection:
        await connection.execute(
            text("UPDATE sheppy_tasks SET heartbeat_at = now() WHERE id IN (:one, :other)"),
            {"one": IDS[42], "other": IDS[43]},
        )
        storing = asyncio.gather(*(backend.store_result(QUEUE, done(task)) for task in tasks))
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        while not await postgres_database.fetch(f"{waits} AND datname = current_database()"):  # noqa: ASYNC110  # of the server
            await asyncio.sleep(0.01)
        await connection.commit()
        assert all(await asyncio.wait_for(storing, 20))
    await engine.dispose()
    assert set(await backend.get_results(QUEUE, IDS)) == set(IDS)
    assert await postgres_database.fetch("SELECT count(*) FROM sheppy_tasks") == [(0,)]
    await backend.disconnect()


async def test_several_locked_rows_hold_up_no_other_result(postgres_database: TestDatabase) -> None:
    backend = SqlBackend(postgres_database.url, pool_size=10)
    await backend.connect()
    tasks = await take_all(backend)
    locked = IDS[10:14]
    engine = create_async_engine(postgres_database.url)
    async with engine.connect() as connection:
        await connection.execute(
            text("SELECT 1 FROM sheppy_tasks WHERE id = ANY(:ids) FOR UPDATE"), {"ids": locked}
        )
        storing = {
            task["id"]: asyncio.create_task(backend.store_result(QUEUE, done(task)))
            for task in tasks
        }
        held = [storing.pop(task_id) for task_id in locked]
        assert all(await asyncio.wait_for(asyncio.gather(*storing.values()), 20))
        assert not any(one.done() for one in held)
        await connection.rollback()
        assert all(await asyncio.wait_for(asyncio.gather(*held), 20))
    await engine.dispose()
    assert set(await backend.get_results(QUEUE, IDS)) == set(IDS)
    await backend.disconnect()


async def test_server_with_a_stricter_default_takes_and_stores_at_read_committed(
    postgres_database: TestDatabase,
) -> None:
    engine = create_async_engine(postgres_database.url)
    async with engine.begin() as connection:
        for statement in (
            f'ALTER DATABASE "{engine.url.database}" '
            "SET default_transaction_isolation TO 'serializable'",
            "CREATE TABLE seen (level text)",
            """CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
               $$ BEGIN INSERT INTO seen SELECT current_setting('transaction_isolation');
               RETURN NULL; END $$""",
            """CREATE TRIGGER see AFTER UPDATE OR DELETE ON sheppy_tasks
               FOR EACH ROW EXECUTE FUNCTION see()""",
        ):
            await connection.execute(text(statement))
    await engine.dispose()
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await backend.append(QUEUE, [make_task("one")])
    (one,) = await backend.pop(QUEUE, 1)
    assert await backend.store_result(QUEUE, done(one))
    await backend.disconnect()
    async with engine.connect() as connection:
        assert set(await connection.scalars(text("SELECT level FROM seen"))) == {"read committed"}
    await engine.dispose()


async def test_row_that_somebody_has_locked_keeps_no_other_claim_from_being_renewed(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await take_all(backend)
    engine = create_async_engine(postgres_database.url)
    fresh = text("SELECT id FROM sheppy_tasks WHERE heartbeat_at > :since ORDER BY id")
    try:
        async with engine.connect() as connection:
            since = await connection.scalar(
                text("SELECT clock_timestamp() FROM sheppy_tasks WHERE id = 'task 042' FOR UPDATE")
            )
            await asyncio.wait_for(backend.heartbeat(QUEUE, IDS), 20)
            renewed = await connection.scalars(fresh, {"since": since})
            assert set(renewed) == set(IDS) - {"task 042"}
    finally:
        await engine.dispose()
        await backend.disconnect()


async def test_cancelled_caller_leaves_the_others_alone(backend: SqlBackend) -> None:
    tasks = await take_all(backend)
    storing = [asyncio.create_task(backend.store_result(QUEUE, done(task))) for task in tasks]
    await asyncio.sleep(0)
    for one in storing[::3]:
        one.cancel()
    outcomes = await asyncio.gather(*storing, return_exceptions=True)
    kept = [task["id"] for task, outcome in zip(tasks, outcomes, strict=True) if outcome is True]
    assert len(kept) >= COUNT / 2
    assert set(kept) <= set(await backend.get_results(QUEUE, IDS))


async def test_two_results_of_one_task_are_stored_in_turn(backend: SqlBackend) -> None:
    await backend.append(QUEUE, [make_task("one"), make_task("other")])
    one, other = await backend.pop(QUEUE, 2)
    await asyncio.gather(
        *(backend.store_result(QUEUE, done(task)) for task in (other, one, one, other))
    )
    assert set(await backend.get_results(QUEUE, ["one", "other"])) == {"one", "other"}
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 2, "scheduled": 0}


async def test_late_result_of_a_task_that_was_taken_anew_is_refused_beside_others(
    backend: SqlBackend,
) -> None:
    await backend.append(QUEUE, [make_task("late"), make_task("other")])
    late, other = await backend.pop(QUEUE, 2)
    database, token = backend._connected.database, backend._claims.token(QUEUE, "late")
    assert token is not None
    # As if this claim on the one had come after the claim under which its result is stored.
    ended = [
        Ended(encode_task(done(late), 10_000), token + 1, None),
        Ended(encode_task(done(other), 10_000), token, None),
    ]
    assert await database.write("store", finish_all, QUEUE, ended) == [False, True]
    assert set(await backend.get_results(QUEUE, ["late", "other"])) == {"other"}


async def test_late_results_are_refused_where_claims_were_exchanged(backend: SqlBackend) -> None:
    taken = []
    for task_id in ("one", "other"):
        await backend.append(QUEUE, [make_task(task_id)])
        taken += await backend.pop(QUEUE, 1)
    one, other = (backend._claims.token(QUEUE, task_id) for task_id in ("one", "other"))
    assert one is not None
    assert other is not None
    ended = [
        Ended(encode_task(done(task), 10_000), token, None)
        for task, token in zip(taken, [other, one], strict=True)
    ]
    database = backend._connected.database
    assert await database.write("store", finish_all, QUEUE, ended) == [False, False]
    assert await backend.get_results(QUEUE, ["one", "other"]) == {}


async def test_disconnect_stores_what_it_was_given(make_backend: MakeBackend) -> None:
    backend, other = await make_backend(), await make_backend()
    tasks = await take_all(backend)
    storing = [asyncio.create_task(backend.store_result(QUEUE, done(task))) for task in tasks]
    await asyncio.sleep(0)
    await backend.disconnect()
    outcomes = await asyncio.gather(*storing, return_exceptions=True)
    told = {task["id"] for task, outcome in zip(tasks, outcomes, strict=True) if outcome is True}
    stored = set(await other.get_results(QUEUE, IDS))
    # Nobody was told of a result that is not there, and what is not there can be taken again.
    assert told <= stored
    assert {task["id"] for task in await other.pop(QUEUE, COUNT)} == set(IDS) - stored
