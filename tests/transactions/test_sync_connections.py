"""What sheppy_sql.sync makes of a connection: nothing but what was asked for."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import psycopg.rows
import psycopg2
import psycopg2.extras
import pytest
from sheppy import BackendError, Task
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from sheppy_sql import SqlBackend, TransactionConflictError, sync
from tests.contract.tasks import FUTURE
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner
from tests.transactions.applications import application, dsn, engine_url
from tests.transactions.shop import EMAILS, Order, send_receipt
from tests.transactions.test_isolation import LEVELS

PSYCOPG_STATE = ("autocommit", "isolation_level", "read_only", "row_factory", "cursor_factory")
PSYCOPG2_STATE = ("autocommit", "isolation_level", "readonly", "cursor_factory", "encoding")
SQLITE_STATE = ("isolation_level", "row_factory", "text_factory")


def state(connection: Any, names: tuple[str, ...]) -> list[Any]:
    return [getattr(connection, name) for name in names]


def use(connection: Any, *, commits: bool = True) -> Task:
    """Everything there is, and a commit where one is due."""
    receipt = send_receipt(1)
    # More often than psycopg executes a statement without preparing it.
    assert sync.enqueue(connection, EMAILS, receipt)
    assert not any(sync.enqueue(connection, EMAILS, receipt) for _ in range(6))
    assert sync.schedule(connection, EMAILS, send_receipt(2), FUTURE)
    cancelled = sync.cancel(connection, EMAILS, receipt)
    assert cancelled is not None
    if commits:
        connection.commit()
    assert sync.wait_for(connection, EMAILS, receipt, timeout=20) == cancelled
    return cancelled


async def test_connection_of_psycopg_stays_as_it_was(postgres_database: TestDatabase) -> None:
    for options in (
        {"row_factory": psycopg.rows.dict_row, "cursor_factory": psycopg.ClientCursor},
        {"row_factory": psycopg.rows.namedtuple_row, "autocommit": True},
        {"client_encoding": "SQL_ASCII"},
    ):
        with psycopg.connect(dsn(postgres_database), **options) as connection:
            before = state(connection, PSYCOPG_STATE)
            adapters = connection.adapters
            use(connection, commits=not connection.autocommit)
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert state(connection, PSYCOPG_STATE) == before
            assert connection.adapters is adapters
            # Nothing is prepared on it either.
            assert connection.execute("SELECT 1 FROM pg_prepared_statements").fetchall() == []


async def test_connection_of_psycopg2_stays_as_it_was(postgres_database: TestDatabase) -> None:
    for autocommit in (False, True):
        connection = psycopg2.connect(
            dsn(postgres_database), cursor_factory=psycopg2.extras.RealDictCursor
        )
        connection.autocommit = autocommit
        before = state(connection, PSYCOPG2_STATE)
        use(connection, commits=not autocommit)
        assert connection.info.transaction_status == 0
        assert connection.status == psycopg2.extensions.STATUS_READY
        assert state(connection, PSYCOPG2_STATE) == before
        connection.close()


async def test_connection_of_sqlite3_stays_as_it_was(sqlite_database: TestDatabase) -> None:
    for level in ("", "IMMEDIATE", None):
        connection = sqlite3.connect(dsn(sqlite_database), isolation_level=level)  # type: ignore[arg-type]  # str is as good
        connection.row_factory = lambda _cursor, row: {"id": row[0]}
        connection.text_factory = bytes
        before = state(connection, SQLITE_STATE)
        use(connection, commits=level is not None)
        assert not connection.in_transaction
        assert state(connection, SQLITE_STATE) == before
        connection.close()


class Modern(sqlite3.Connection):
    """Behaves as with Python 3.12's attribute, on an older one."""

    autocommit: bool

    def commit(self) -> None:
        self._end("COMMIT")

    def rollback(self) -> None:
        self._end("ROLLBACK")

    def _end(self, how: str) -> None:
        if not self.autocommit:
            self.execute(how)
            self.execute("BEGIN")


def connect_modern(database: TestDatabase, *, autocommit: bool) -> Any:
    if sys.version_info >= (3, 12):
        return sqlite3.connect(dsn(database), autocommit=autocommit)
    connection = sqlite3.connect(dsn(database), factory=Modern, isolation_level=None)
    connection.autocommit = autocommit
    if not autocommit:
        connection.execute("BEGIN")
    return connection


async def test_autocommit_attribute_of_sqlite3_is_heeded(
    sqlite_database: TestDatabase,
) -> None:
    backend = SqlBackend(sqlite_database.url)
    await backend.connect()
    by_itself = connect_modern(sqlite_database, autocommit=True)
    use(by_itself, commits=False)
    assert not by_itself.in_transaction
    by_itself.close()
    never = connect_modern(sqlite_database, autocommit=False)
    for commits in (False, True):
        assert sync.enqueue(never, EMAILS, send_receipt(1))
        never.rollback()
        assert sync.enqueue(never, EMAILS, send_receipt(1))
        assert await backend.size(EMAILS) == 0 + commits
        never.commit()
    with pytest.raises(BackendError, match="wait on another connection"):
        sync.wait_for(never, EMAILS, uuid4(), timeout=60)
    never.close()
    await backend.disconnect()


async def test_session_keeps_its_objects_while_waiting(database: TestDatabase) -> None:
    receipt = send_receipt(1)
    engine = create_engine(engine_url(database))
    with application(database, "driver"), Session(engine, expire_on_commit=False) as session:
        order = Order(id=1)
        session.add(order)
        sync.enqueue(session, EMAILS, receipt)
        session.commit()
        assert not session.in_transaction()
        with pytest.raises(TimeoutError):
            sync.wait_for(session, EMAILS, receipt, timeout=0.05)
        assert not session.in_transaction()
        # Neither expired nor expunged.
        assert order in session
        assert "id" in order.__dict__
    engine.dispose()


async def test_session_on_a_connection_waits_there(database: TestDatabase) -> None:
    engine = create_engine(engine_url(database))
    with engine.connect() as connection, Session(connection) as session:
        with pytest.raises(TimeoutError):
            sync.wait_for(session, EMAILS, uuid4(), timeout=0.01)
        assert not session.in_transaction()
        assert not connection.in_transaction()
        sync.enqueue(session, EMAILS, receipt := send_receipt(1))
        with pytest.raises(BackendError, match="commit first"):
            sync.wait_for(session, EMAILS, receipt, timeout=float("inf"))
    engine.dispose()


async def test_nothing_of_a_session_is_flushed(database: TestDatabase) -> None:
    engine = create_engine(engine_url(database))
    with application(database, "driver"), Session(engine) as session:
        order = Order(id=1)
        session.add(order)
        sync.enqueue(session, EMAILS, send_receipt(1))
        assert order in session.new
        session.commit()
        assert session.scalars(select(Order.id)).all() == [1]
    engine.dispose()


async def test_open_transaction_of_sqlite_can_wait_for_nothing(
    sqlite_database: TestDatabase,
) -> None:
    for kind in ("driver", "other driver", "connection", "session"):
        with application(sqlite_database, kind) as app:
            app.place_order(1)
            with pytest.raises(BackendError, match="commit first"):
                sync.wait_for(app.connection, EMAILS, uuid4(), timeout=60)
            # A single look waits for nothing.
            assert sync.wait_for(app.connection, EMAILS, uuid4(), timeout=-1) is None
            app.rollback()


@pytest.fixture
def connection(postgres_database: TestDatabase) -> Iterator[psycopg.Connection]:
    with psycopg.connect(dsn(postgres_database)) as connection:
        yield connection


@pytest.fixture
async def elsewhere(postgres_database: TestDatabase) -> Any:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    yield backend
    await backend.disconnect()


def begin(connection: Any, level: str) -> None:
    """With a snapshot that is taken."""
    connection.isolation_level = psycopg.IsolationLevel[level.replace(" ", "_")]
    connection.execute("SELECT 1 FROM sheppy_tasks")


@pytest.mark.parametrize("level", LEVELS)
async def test_id_that_ended_since_the_snapshot_is_refused_or_seen(
    connection: psycopg.Connection, elsewhere: SqlBackend, level: str
) -> None:
    receipt = send_receipt(1)
    begin(connection, level)
    await elsewhere.append(EMAILS, [receipt.model_dump(mode="json")])
    [taken] = await elsewhere.pop(EMAILS)
    await elsewhere.store_result(
        EMAILS, {**taken, "status": "completed", "finished_at": FUTURE.isoformat()}
    )
    if level == "READ COMMITTED":
        assert not sync.enqueue(connection, EMAILS, receipt)
        assert sync.wait_for(connection, EMAILS, receipt, timeout=20) is not None
        return
    with pytest.raises(BackendError, match="commit first"):
        sync.wait_for(connection, EMAILS, receipt, timeout=60)
    with pytest.raises(TransactionConflictError, match="run it again"):
        sync.enqueue(connection, EMAILS, receipt)
    connection.rollback()
    assert not sync.enqueue(connection, EMAILS, receipt)
    connection.rollback()
    # Where no transaction is open, every look has one of its own.
    assert sync.wait_for(connection, EMAILS, receipt, timeout=20) is not None


async def test_waiting_in_a_transaction_of_sqlalchemy_that_begins_a_fixed_one_is_refused(
    postgres_database: TestDatabase,
) -> None:
    engine = create_engine(engine_url(postgres_database), isolation_level="REPEATABLE READ")
    with Session(engine) as session, engine.connect() as connection:
        session.begin()
        connection.begin()
        for one in (session, connection):
            with pytest.raises(BackendError, match="commit first"):
                sync.wait_for(one, EMAILS, uuid4(), timeout=60)
            one.rollback()
            with pytest.raises(TimeoutError):
                sync.wait_for(one, EMAILS, uuid4(), timeout=0.01)
    engine.dispose()


NOTE_LEVEL = """
CREATE TABLE levels (level text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO levels VALUES (current_setting('transaction_isolation')); RETURN NEW; END $$;
CREATE TRIGGER note BEFORE INSERT ON sheppy_tasks FOR EACH ROW EXECUTE FUNCTION note();
"""


def test_default_isolation_of_the_server_does_not_matter_in_autocommit(
    postgres_database: TestDatabase,
) -> None:
    options = "-c default_transaction_isolation=serializable"
    with psycopg.connect(dsn(postgres_database), autocommit=True, options=options) as connection:
        connection.execute(NOTE_LEVEL)
        assert sync.enqueue(connection, EMAILS, send_receipt(1))
        assert connection.execute("SELECT level FROM levels").fetchall() == [("read committed",)]


def test_sqlite_needs_no_psycopg(sqlite_database: TestDatabase, spawn: Spawner) -> None:
    child = spawn.script(WITHOUT_PSYCOPG, dsn(sqlite_database))
    assert child.wait() == 0, child.report()


WITHOUT_PSYCOPG = """
import sys
sys.modules["psycopg"] = sys.modules["psycopg2"] = None
import sqlite3
from sheppy import task
from sheppy_sql import sync

@task
async def nothing() -> None: ...

connection = sqlite3.connect(sys.argv[1])
assert sync.enqueue(connection, "emails", nothing())
connection.commit()
"""
