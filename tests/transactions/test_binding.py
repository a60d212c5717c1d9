"""Enqueueing in the caller's transaction: together with its rows, or not at all."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sheppy import BackendError, Queue, Workflow
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session as SyncSession

from sheppy_sql import SqlBackend
from tests.contract.tasks import MakeBackend, make_task
from tests.host.workflows import linear
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.transactions.shop import EMAILS, Order, Session, count_orders, place_order, send_receipt

FUTURE = datetime.now(timezone.utc) + timedelta(days=1)


def queue_of(backend: Any) -> Queue:
    return Queue(backend, EMAILS)


async def stored(backend: SqlBackend) -> set[str]:
    """What everybody sees."""
    return {task["id"] for task in await backend.get_all_tasks(EMAILS)}


async def test_order_and_task_are_committed_together(
    backend: SqlBackend, engine: AsyncEngine, session: Session
) -> None:
    receipt = send_receipt(1)
    await place_order(session, 1)
    assert await queue_of(backend.bind(session)).add(receipt)
    assert (await count_orders(engine), await stored(backend)) == (0, set())
    await session.commit()
    assert (await count_orders(engine), await stored(backend)) == (1, {str(receipt.id)})
    await run_worker(make_worker(backend, EMAILS), 1)
    done = await queue_of(backend).get_task(receipt)
    assert done is not None
    assert done.result == "sent for 1"


async def test_order_and_task_are_rolled_back_together(
    backend: SqlBackend, engine: AsyncEngine, session: Session
) -> None:
    receipt = send_receipt(1)
    await place_order(session, 1)
    bound = queue_of(backend.bind(session))
    assert await bound.add(receipt)
    assert await bound.schedule(send_receipt(2), timedelta(hours=1))
    assert await bound.size() == 1
    await session.rollback()
    assert (await count_orders(engine), await stored(backend)) == (0, set())
    assert await queue_of(backend).add(receipt)


async def test_savepoint_that_is_rolled_back_takes_its_tasks_along(
    backend: SqlBackend, session: Session
) -> None:
    kept, dropped, later = send_receipt(1), send_receipt(2), send_receipt(3)
    bound = queue_of(backend.bind(session))
    await bound.add(kept)
    savepoint = await session.begin_nested()
    assert await bound.add([kept, dropped]) == [False, True]
    await savepoint.rollback()
    async with session.begin_nested():
        await bound.add(later)
    await session.commit()
    assert await stored(backend) == {str(kept.id), str(later.id)}
    assert await queue_of(backend).size() == 2


async def test_an_error_of_the_caller_between_leaves_nothing(
    backend: SqlBackend, engine: AsyncEngine
) -> None:
    async def check_out() -> None:
        async with AsyncSession(engine) as session, session.begin():
            await place_order(session, 1)
            await queue_of(backend.bind(session)).add(send_receipt(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await check_out()
    assert (await count_orders(engine), await stored(backend)) == (0, set())


async def test_all_that_enqueues_or_removes_takes_part(
    backend: SqlBackend, session: Session
) -> None:
    pending, scheduled, done = (make_task(name) for name in ("pending", "scheduled", "done"))
    await backend.append(EMAILS, [pending])
    await backend.schedule(EMAILS, scheduled, FUTURE)
    await backend.store_result(EMAILS, {**done, "finished_at": FUTURE.isoformat()})
    cron = {"id": "c", "expression": "* * * * *"}
    bound = backend.bind(session)
    await bound.connect()
    for commits in (False, True):
        assert await bound.cancel(EMAILS, "pending")
        assert await bound.cancel(EMAILS, "done") is None
        assert await bound.delete_task(EMAILS, "scheduled")
        assert await bound.schedule(EMAILS, make_task("later"), FUTURE)
        assert await bound.append(EMAILS, [make_task("done")], unique=False) == [True]
        assert await bound.add_cron(EMAILS, "c", cron)
        assert not await bound.add_cron(EMAILS, "c", cron)
        assert await bound.get_stats(EMAILS) == {"pending": 1, "completed": 1, "scheduled": 1}
        assert set(await bound.get_results(EMAILS, ["pending", "done"])) == {"pending"}
        seen = await backend.get_stats(EMAILS)
        assert seen == {"pending": 1, "completed": 1, "scheduled": 1}
        assert [task["id"] for task in await backend.get_pending(EMAILS, 9)] == ["pending"]
        assert await backend.get_crons(EMAILS) == []
        await (session.commit if commits else session.rollback)()
    assert [task["id"] for task in await backend.get_pending(EMAILS, 9)] == ["done"]
    assert [task["id"] for task in await backend.get_scheduled(EMAILS)] == ["later"]
    assert (await backend.get_results(EMAILS, ["pending"]))["pending"]["status"] == "cancelled"
    assert await backend.get_crons(EMAILS) == [cron]
    assert await backend.list_queues() == {EMAILS: 1}


async def test_first_task_of_a_queue_makes_it_known(backend: SqlBackend, session: Session) -> None:
    await Queue(backend.bind(session), "new").schedule(send_receipt(1), FUTURE)
    assert await backend.list_queues() == {}
    await session.commit()
    assert await backend.list_queues() == {"new": 0}


async def test_workflow_is_started_by_the_commit(backend: SqlBackend, session: Session) -> None:
    added = await queue_of(backend.bind(session)).add_workflow(linear(1))
    assert added.workflow.id is not None
    assert await backend.get_all_workflows(EMAILS) == []
    await session.commit()
    await run_worker(make_worker(backend, EMAILS), 3)
    [ended] = await backend.get_all_workflows(EMAILS)
    assert Workflow.model_validate(ended).final_result == 112


async def test_workers_are_woken_by_the_commit_and_not_before(
    make_backend: MakeBackend, session: Session
) -> None:
    worker, producer = await make_backend(max_poll_interval=60), await make_backend()
    await worker.pop(EMAILS)
    popping = asyncio.create_task(worker.pop(EMAILS, timeout=60))
    bound = queue_of(producer.bind(session))
    receipt = send_receipt(1)
    await bound.add(receipt)
    await session.rollback()
    await place_order(session, 1)
    async with session.begin_nested():
        await bound.add(receipt)
    # Long after its first looks, it comes by itself only once a minute.
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(popping), 1)
    await session.commit()
    [popped] = await asyncio.wait_for(popping, 20)
    assert popped["id"] == str(receipt.id)


async def test_one_session_serves_many_transactions(
    make_backend: MakeBackend, session: Session
) -> None:
    backend = await make_backend(max_poll_interval=60)
    for number in range(3):
        popping = asyncio.create_task(backend.pop(EMAILS, timeout=60))
        await queue_of(backend.bind(session)).add(send_receipt(number))
        await session.commit()
        assert len(await asyncio.wait_for(popping, 20)) == 1


async def test_nothing_of_the_callers_is_flushed(
    backend: SqlBackend, engine: AsyncEngine, orm: AsyncSession
) -> None:
    order = Order(id=1)
    orm.add(order)
    bound = queue_of(backend.bind(orm))
    await bound.add(send_receipt(1))
    await bound.size()
    assert order in orm.new
    await orm.commit()
    assert (await count_orders(engine), await queue_of(backend).size()) == (1, 1)


async def test_scoped_session_is_accepted(backend: SqlBackend, engine: AsyncEngine) -> None:
    scoped = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
    await queue_of(backend.bind(scoped)).add(send_receipt(1))
    assert await queue_of(backend).size() == 0
    await scoped.commit()
    await scoped.remove()
    assert await queue_of(backend).size() == 1


async def test_translated_schemas_of_the_application_do_not_move_our_tables(
    backend: SqlBackend, engine: AsyncEngine
) -> None:
    elsewhere = engine.execution_options(schema_translate_map={None: "elsewhere"})
    async with elsewhere.begin() as connection:
        await queue_of(backend.bind(connection)).add(send_receipt(1))
    assert await queue_of(backend).size() == 1


async def test_bad_task_leaves_the_transaction_usable(
    backend: SqlBackend, engine: AsyncEngine, session: Session
) -> None:
    bound = backend.bind(session)
    await bound.connect()
    await place_order(session, 1)
    with pytest.raises(ValueError, match="id"):
        await bound.append(EMAILS, [make_task("good"), make_task("\0")])
    assert await bound.append(EMAILS, [make_task("good")]) == [True]
    await session.commit()
    assert (await count_orders(engine), await stored(backend)) == (1, {"good"})


async def test_what_belongs_to_a_worker_is_refused(backend: SqlBackend, session: Session) -> None:
    bound = backend.bind(session)
    await bound.connect()
    for call in (
        bound.pop(EMAILS),
        bound.pop_scheduled(EMAILS),
        bound.store_result(EMAILS, make_task()),
        bound.acknowledge(EMAILS, ["task"]),
        bound.heartbeat(EMAILS, ["task"]),
        bound.get_stale_messages(EMAILS, 1),
        bound.acquire_rate_limit(EMAILS, "key", 1, 1.0, "task"),
        bound.get_results(EMAILS, ["task"], timeout=1),
        bound.get_workflow_results(EMAILS, ["workflow"], timeout=0),
    ):
        with pytest.raises(BackendError, match="use the backend itself"):
            await call


async def test_unsuitable_sessions_are_refused_with_what_to_do(
    backend: SqlBackend, engine: AsyncEngine, database: TestDatabase, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match=r"sheppy_sql\.sync"):
        backend.bind(SyncSession(create_engine("sqlite://")))  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match="not open"):
        await queue_of(backend.bind(engine.connect())).add(send_receipt(1))
    other = "sqlite+aiosqlite:///" if database.dialect == "postgresql" else None
    elsewhere = create_async_engine(
        f"{other}{tmp_path / 'other.db'}" if other else "postgresql+asyncpg://nobody@localhost/no",
    )
    if other:
        async with elsewhere.connect() as connection:
            with pytest.raises(ValueError, match="the database that the backend uses"):
                await queue_of(backend.bind(connection)).add(send_receipt(1))
    await elsewhere.dispose()
    autocommit = create_async_engine(database.url, isolation_level="AUTOCOMMIT")
    async with autocommit.connect() as connection:
        with pytest.raises(BackendError, match="commits each statement by itself"):
            await queue_of(backend.bind(connection)).add(send_receipt(1))
    await autocommit.dispose()
    assert await stored(backend) == set()


async def test_memory_database_cannot_be_shared_with_a_session(memory_url: str) -> None:
    engine = create_async_engine(memory_url)
    backend = SqlBackend(engine)
    async with engine.connect() as connection:
        with pytest.raises(BackendError, match="use a file"):
            await queue_of(backend.bind(connection)).add(send_receipt(1))
    await backend.disconnect()
    await engine.dispose()
