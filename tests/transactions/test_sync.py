"""sheppy_sql.sync: enqueueing in the transaction of synchronous code."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
from sheppy import BackendError, Queue, Task, task
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sheppy_sql import SqlBackend, TransactionConflictError, _waiting, sync
from sheppy_sql.schema import SCHEMA_VERSION
from tests.contract.tasks import MakeBackend, make_task
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.transactions.applications import (
    KINDS,
    Application,
    application,
    connect,
    dsn,
    engine_url,
)
from tests.transactions.shop import EMAILS, send_receipt


@pytest.fixture(params=KINDS)
def app(request: Any, database: TestDatabase) -> Iterator[Application]:
    with application(database, request.param) as app:
        yield app


async def stored(database: TestDatabase) -> tuple[int, set[str]]:
    """Orders and tasks that everybody sees."""
    [(orders,)] = await database.fetch("SELECT count(*) FROM orders")
    return orders, {row[0] for row in await database.fetch("SELECT id FROM sheppy_tasks")}


@task
async def fail() -> None:
    raise ZeroDivisionError


async def test_order_and_task_are_committed_together(
    backend: SqlBackend, database: TestDatabase, app: Application
) -> None:
    receipt = send_receipt(1)
    app.place_order(1)
    assert sync.enqueue(app.connection, EMAILS, receipt) is True
    assert await stored(database) == (0, set())
    app.commit()
    assert await stored(database) == (1, {str(receipt.id)})
    await run_worker(make_worker(backend, EMAILS), 1)
    done = sync.wait_for(app.connection, EMAILS, receipt, timeout=20)
    assert done is not None
    assert done.result == "sent for 1"


async def test_one_program_enqueues_in_databases_of_both_kinds(
    sqlite_database: TestDatabase, postgres_database: TestDatabase
) -> None:
    databases = [sqlite_database, postgres_database]
    for number, database in enumerate([*databases, *databases]):
        receipt = send_receipt(number)
        with application(database, "driver") as app:
            app.place_order(number)
            assert sync.enqueue(app.connection, EMAILS, receipt) is True
            app.commit()
        assert str(receipt.id) in (await stored(database))[1]


async def test_order_and_task_are_rolled_back_together(
    database: TestDatabase, app: Application
) -> None:
    receipt = send_receipt(1)
    app.place_order(1)
    assert sync.enqueue(app.connection, EMAILS, receipt)
    assert sync.schedule(app.connection, EMAILS, send_receipt(2), timedelta(hours=1))
    app.rollback()
    assert await stored(database) == (0, set())
    # Its id is free again, and the connection is as good as before.
    app.place_order(1)
    assert sync.enqueue(app.connection, EMAILS, receipt)
    app.commit()
    assert await stored(database) == (1, {str(receipt.id)})


async def test_enqueueing_first_begins_the_transaction(
    database: TestDatabase, app: Application
) -> None:
    if app.begins_itself:
        app.execute("SELECT 1")
    sync.enqueue(app.connection, EMAILS, send_receipt(1))
    app.place_order(1)
    app.rollback()
    assert await stored(database) == (0, set())


async def test_savepoint_that_is_rolled_back_takes_its_task_along(
    database: TestDatabase, app: Application
) -> None:
    kept, dropped = send_receipt(1), send_receipt(2)
    app.place_order(1)
    sync.enqueue(app.connection, EMAILS, kept)
    app.execute("SAVEPOINT inner_one")
    app.place_order(2)
    assert sync.enqueue(app.connection, EMAILS, [kept, dropped]) == [False, True]
    app.execute("ROLLBACK TO SAVEPOINT inner_one")
    app.commit()
    assert await stored(database) == (1, {str(kept.id)})


async def test_ids_are_unique_among_tasks_in_every_state(
    backend: SqlBackend, app: Application
) -> None:
    done, waiting, new = send_receipt(1), send_receipt(2), send_receipt(3)
    queue = Queue(backend, EMAILS)
    await queue.add(done)
    await run_worker(make_worker(backend, EMAILS), 1)
    await queue.add(waiting)
    app.place_order(1)
    assert sync.enqueue(app.connection, EMAILS, [done, waiting, new, new]) == [
        False,
        False,
        True,
        False,
    ]
    assert not sync.schedule(app.connection, EMAILS, waiting, timedelta(hours=1))
    app.commit()
    assert await backend.get_stats(EMAILS) == {"pending": 2, "completed": 1, "scheduled": 0}
    assert await backend.list_queues() == {EMAILS: 2}


async def test_scheduled_task_is_that_of_sheppys_queue(
    backend: SqlBackend, app: Application
) -> None:
    at = datetime(2100, 1, 1, tzinfo=timezone.utc)
    ours, theirs = send_receipt(1), send_receipt(2)
    app.place_order(1)
    assert sync.schedule(app.connection, EMAILS, ours, at)
    app.commit()
    await Queue(backend, EMAILS).schedule(theirs, at)
    assert (ours.status, ours.scheduled_at) == ("scheduled", at)
    for one in (ours, theirs):
        assert one.model_dump() == (await Queue(backend, EMAILS).get_task(one)).model_dump()  # type: ignore[union-attr]  # a failure is one either way
    assert [each.id for each in await Queue(backend, EMAILS).get_scheduled()] == sorted(
        [ours.id, theirs.id], key=str
    )


async def test_cancelled_task_is_finished_by_the_commit(
    backend: SqlBackend, app: Application
) -> None:
    receipt = send_receipt(1)
    await Queue(backend, EMAILS).add(receipt)
    app.place_order(1)
    cancelled = sync.cancel(app.connection, EMAILS, receipt)
    assert cancelled is not None
    assert (cancelled.id, cancelled.status) == (receipt.id, "cancelled")
    assert sync.cancel(app.connection, EMAILS, receipt.id) is None
    assert await backend.size(EMAILS) == 1
    app.commit()
    assert await backend.size(EMAILS) == 0
    assert sync.wait_for(app.connection, EMAILS, str(receipt.id), timeout=20) == cancelled


async def test_cancelling_first_begins_the_transaction(
    backend: SqlBackend, app: Application
) -> None:
    receipt = send_receipt(1)
    await Queue(backend, EMAILS).add(receipt)
    if app.begins_itself:
        app.execute("SELECT 1")
    assert sync.cancel(app.connection, EMAILS, receipt) is not None
    app.rollback()
    assert await backend.size(EMAILS) == 1


async def test_payloads_come_out_as_they_went_in(backend: SqlBackend, app: Application) -> None:
    told = "100 % of 'quotes', \"more\", \\ ünïcödé \0 {} :name %(name)s ?"
    receipt = make_named(told)
    app.place_order(1)
    assert sync.enqueue(app.connection, told.replace("\0", ""), receipt)
    app.commit()
    found = await Queue(backend, told.replace("\0", "")).get_task(receipt)
    assert found is not None
    assert [*found.spec.args] == [told]


async def test_waiting_ends_with_the_result_of_a_worker_elsewhere(
    backend: SqlBackend, app: Application
) -> None:
    good, bad = send_receipt(7), fail()
    app.place_order(1)
    sync.enqueue(app.connection, EMAILS, [good, bad])
    app.commit()
    waiting = asyncio.create_task(
        asyncio.to_thread(
            lambda: sync.wait_for(app.connection, EMAILS, [good, bad.id, str(good.id)])
        )
    )
    await run_worker(make_worker(backend, EMAILS), 2)
    found = await asyncio.wait_for(waiting, 20)
    assert {one.id: one.status for one in found.values()} == {
        good.id: "completed",
        bad.id: "failed",
    }
    assert found[good.id].result == "sent for 7"


async def test_timeout_asks_for_the_commit_and_leaves_no_transaction(
    database: TestDatabase, app: Application
) -> None:
    with pytest.raises(TimeoutError, match=r"within 0\.05 seconds; is the transaction .*committed"):
        sync.wait_for(app.connection, EMAILS, uuid4(), timeout=0.05)
    with pytest.raises(TimeoutError):
        sync.wait_for(app.connection, EMAILS, [uuid4()], timeout=0.001)
    assert sync.wait_for(app.connection, EMAILS, uuid4(), timeout=-1) is None
    assert sync.wait_for(app.connection, EMAILS, [uuid4()], timeout=-1) == {}
    assert sync.wait_for(app.connection, EMAILS, []) == {}
    assert not app.in_transaction


async def test_waiting_for_ever_for_what_was_just_enqueued_is_refused(app: Application) -> None:
    app.place_order(1)
    receipt = send_receipt(1)
    sync.enqueue(app.connection, EMAILS, receipt)
    with pytest.raises(BackendError, match="commit first"):
        sync.wait_for(app.connection, EMAILS, receipt)
    app.commit()


async def test_tasks_commit_at_once_where_every_statement_does(
    database: TestDatabase, backend: SqlBackend
) -> None:
    for other in (False, True):
        connection = connect(database, other=other, **AUTOCOMMIT.get(database.dialect, {}))
        if database.dialect == "postgresql":
            connection.autocommit = True
        receipt = send_receipt(1)
        assert sync.enqueue(connection, EMAILS, receipt)
        assert not sync.enqueue(connection, EMAILS, receipt)
        assert await backend.cancel(EMAILS, str(receipt.id)) is not None
        assert sync.wait_for(connection, EMAILS, receipt, timeout=20) is not None
        # A transaction that is open nevertheless is the caller's.
        execute(connection, "BEGIN")
        assert sync.enqueue(connection, EMAILS, send_receipt(2))
        execute(connection, "ROLLBACK")
        assert await backend.size(EMAILS) == 0
        connection.close()


async def test_call_that_fails_half_way_leaves_nothing_where_every_statement_commits(
    database: TestDatabase,
) -> None:
    await database.execute("DROP TABLE sheppy_scheduled_tasks")
    for other in (False, True):
        connection = connect(database, other=other, **AUTOCOMMIT.get(database.dialect, {}))
        if database.dialect == "postgresql":
            connection.autocommit = True
        with pytest.raises(BackendError, match="tables are missing"):
            sync.schedule(connection, EMAILS, send_receipt(1), timedelta(hours=1))
        assert not Application(connection).in_transaction
        connection.close()
    assert await database.fetch("SELECT id FROM sheppy_tasks") == []


async def test_translated_schemas_of_the_application_do_not_move_our_tables(
    database: TestDatabase, backend: SqlBackend
) -> None:
    engine = create_engine(engine_url(database))
    elsewhere = engine.execution_options(schema_translate_map={None: "elsewhere"})
    with Session(elsewhere) as session:
        assert sync.enqueue(session, EMAILS, send_receipt(1))
        session.commit()
        with pytest.raises(TimeoutError):
            sync.wait_for(session, EMAILS, uuid4(), timeout=0.01)
    engine.dispose()
    assert await backend.size(EMAILS) == 1


async def test_engine_in_autocommit_commits_tasks_at_once(
    database: TestDatabase, backend: SqlBackend
) -> None:
    engine = create_engine(engine_url(database), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, Session(engine) as session:
        assert sync.enqueue(connection, EMAILS, send_receipt(1))
        assert sync.enqueue(session, EMAILS, send_receipt(2))
        assert await backend.size(EMAILS) == 2
    engine.dispose()


async def test_error_in_a_transaction_of_its_own_leaves_none_open(
    empty_database: TestDatabase,
) -> None:
    connection = connect(empty_database, **AUTOCOMMIT.get(empty_database.dialect, {}))
    if empty_database.dialect == "postgresql":
        connection.autocommit = True
    with pytest.raises(BackendError, match="sheppy-sql db upgrade"):
        sync.enqueue(connection, EMAILS, send_receipt(1))
    assert not Application(connection).in_transaction
    connection.close()


async def test_missing_tables_are_told_of_with_what_to_run(empty_database: TestDatabase) -> None:
    connection = connect(empty_database)
    with pytest.raises(BackendError, match="sheppy-sql db upgrade"):
        sync.enqueue(connection, EMAILS, send_receipt(1))
    connection.rollback()
    with pytest.raises(BackendError, match="sheppy-sql db upgrade"):
        sync.wait_for(connection, EMAILS, uuid4(), timeout=1)
    assert not Application(connection).in_transaction
    connection.close()


async def test_tables_of_another_version_are_told_of(database: TestDatabase) -> None:
    await database.execute("UPDATE sheppy_schema SET version = 1")
    connection = connect(database)
    with pytest.raises(BackendError, match="tables have version 1"):
        sync.enqueue(connection, EMAILS, send_receipt(1))
    connection.rollback()
    await database.execute(f"UPDATE sheppy_schema SET version = {SCHEMA_VERSION}")
    assert sync.enqueue(connection, EMAILS, send_receipt(1))
    connection.close()


async def test_commit_of_a_session_wakes_workers_in_this_process(
    make_backend: MakeBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After its first look it comes by itself once a minute.
    monkeypatch.setattr(_waiting, "FIRST_POLL", 60.0)
    worker = await make_backend(max_poll_interval=60)
    with application(database, "session") as app:
        popping = asyncio.create_task(worker.pop(EMAILS, timeout=60))
        sync.enqueue(app.connection, EMAILS, send_receipt(0))
        app.rollback()
        receipt = send_receipt(1)
        sync.enqueue(app.connection, EMAILS, receipt)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(popping), 1)
        await asyncio.to_thread(app.commit)
        [popped] = await asyncio.wait_for(popping, 20)
    assert popped["id"] == str(receipt.id)


async def test_names_of_tables_come_from_the_settings(
    empty_database: TestDatabase,
) -> None:
    ours = sync.Settings(table_prefix="100%_of :them ", max_payload_bytes=2_000)
    backend = SqlBackend(empty_database.url, table_prefix=ours.table_prefix, migrate=True)
    await backend.connect()
    for kind in KINDS:
        with application(empty_database, kind) as app:
            app.execute("SELECT 1")
            assert sync.enqueue(app.connection, EMAILS, send_receipt(1), settings=ours)
            with pytest.raises(ValueError, match="max_payload_bytes"):
                sync.enqueue(app.connection, EMAILS, make_named("x" * 2_000), settings=ours)
            app.commit()
    assert await backend.size(EMAILS) == len(KINDS)
    await backend.disconnect()


async def test_scoped_session_is_accepted(database: TestDatabase, backend: SqlBackend) -> None:
    engine = create_engine(engine_url(database))
    session = scoped_session(sessionmaker(engine))
    assert sync.enqueue(session, EMAILS, send_receipt(1))
    session.commit()
    session.remove()
    engine.dispose()
    assert await backend.size(EMAILS) == 1


async def test_threads_enqueue_on_their_own_connections(
    database: TestDatabase, backend: SqlBackend
) -> None:
    ready = threading.Barrier(4)
    added: list[bool] = []

    def enqueue(number: int) -> None:
        with application(database, KINDS[number]) as app:
            ready.wait()
            for _ in range(5):
                # Written first, since SQLite lets one write at a time and waits only at BEGIN.
                app.execute(f"INSERT INTO orders (id) VALUES ({number}) ON CONFLICT DO NOTHING")
                added.append(sync.enqueue(app.connection, EMAILS, send_receipt(number)))
                app.commit()

    with application(database, "driver"):
        await asyncio.gather(*(asyncio.to_thread(enqueue, number) for number in range(4)))
    assert added == [True] * 20
    assert await backend.size(EMAILS) == 20


async def test_bad_input_leaves_the_transaction_as_it_was(
    database: TestDatabase, app: Application
) -> None:
    app.place_order(1)
    connection: Any = app.connection
    naive = datetime(2100, 1, 1)  # noqa: DTZ001  # the mistake
    for call, message in (
        (lambda: sync.enqueue(connection, EMAILS, "task"), "decorates"),  # type: ignore[call-overload]  # the mistake
        (lambda: sync.enqueue(connection, EMAILS, [make_task()]), "decorates"),  # type: ignore[list-item]  # the mistake
        (lambda: sync.enqueue(connection, "a\0b", send_receipt(1)), "NUL"),
        (lambda: sync.enqueue(connection, 7, send_receipt(1)), "queue name"),  # type: ignore[call-overload]  # the mistake
        (lambda: sync.schedule(connection, EMAILS, send_receipt(1), "now"), "at must be"),  # type: ignore[arg-type]  # the mistake
        (lambda: sync.wait_for(connection, EMAILS, 7), "its id"),  # type: ignore[call-overload]  # the mistake
        (lambda: sync.wait_for(connection, EMAILS, uuid4(), timeout="1"), "timeout"),  # type: ignore[call-overload]  # the mistake
        (lambda: sync.cancel(connection, EMAILS, "\0"), "NUL"),
        (lambda: sync.enqueue(connection, EMAILS, send_receipt(1), settings=1), "Settings"),  # type: ignore[call-overload]  # the mistake
        (lambda: sync.Settings(table_prefix="x" * 60), "choose a shorter"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="offset-aware"):
        sync.schedule(connection, EMAILS, send_receipt(1), naive)
    receipt = send_receipt(1)
    sync.enqueue(connection, EMAILS, receipt)
    app.commit()
    assert await stored(database) == (1, {str(receipt.id)})


async def test_other_connections_are_refused_with_what_is_accepted(
    database: TestDatabase, tmp_path: Any
) -> None:
    for connection in (None, object(), database.url):
        with pytest.raises(ValueError, match="Session or Connection, Django's"):
            sync.enqueue(connection, EMAILS, send_receipt(1))
    engine = create_async_engine(database.url)
    async with engine.connect() as asynchronous:
        with pytest.raises(ValueError, match=r"use backend\.bind\(\)"):
            sync.enqueue(asynchronous, EMAILS, send_receipt(1))
        raw = (await asynchronous.get_raw_connection()).driver_connection
        with pytest.raises(ValueError, match=r"use backend\.bind\(\)"):
            sync.enqueue(raw, EMAILS, send_receipt(1))
    await engine.dispose()


async def test_closed_connection_is_a_backend_error(database: TestDatabase) -> None:
    for kind in ("driver", "other driver", "connection"):
        with application(database, kind) as app:
            sync.enqueue(app.connection, EMAILS, send_receipt(1))
            app.rollback()
            app.close()
            with pytest.raises(BackendError, match="closed") as caught:
                sync.enqueue(app.connection, EMAILS, send_receipt(1))
            assert caught.value.__cause__ is None
            with pytest.raises(BackendError, match="closed"):
                sync.wait_for(app.connection, EMAILS, uuid4())


async def test_locked_file_is_a_conflict_and_names_no_payload(
    sqlite_database: TestDatabase,
) -> None:
    with application(sqlite_database, "driver") as holder:
        holder.place_order(1)
        for options in ({}, {"isolation_level": None}):
            connection = sqlite3.connect(dsn(sqlite_database), timeout=0.01, **options)  # type: ignore[call-overload]  # of options
            with pytest.raises(BackendError, match="locked") as caught:
                sync.enqueue(connection, EMAILS, make_named("secret"))
            assert "secret" not in str(caught.value)
            assert isinstance(caught.value, TransactionConflictError) is not bool(options)
            # Otherwise it is the driver that has begun, as before any INSERT.
            assert connection.in_transaction is not bool(options)
            connection.close()


async def test_failed_transaction_is_told_of(postgres_database: TestDatabase) -> None:
    for kind in KINDS:
        with application(postgres_database, kind) as app:
            with pytest.raises(Exception, match="division by zero"):
                app.execute("SELECT 1 / 0")
            with pytest.raises(BackendError, match="roll back the transaction"):
                sync.enqueue(app.connection, EMAILS, send_receipt(1))
            app.rollback()
            assert sync.enqueue(app.connection, EMAILS, send_receipt(1))


def test_missing_psycopg_is_told_of_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"sheppy-sql\[sync\]"):
        sync.enqueue(object(), EMAILS, send_receipt(1))


AUTOCOMMIT: dict[str, dict[str, Any]] = {"sqlite": {"isolation_level": None}}


@task
async def named(name: str) -> str:
    return name


def make_named(name: str) -> Task:
    return named(name)


def execute(connection: Any, sql: str) -> None:
    cursor = connection.cursor()
    cursor.execute(sql)
    cursor.close()
