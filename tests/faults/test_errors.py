"""Errors of a server that is reachable: those that pass are waited out, the others told at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sheppy import BackendError
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from sheppy_sql import SqlBackend
from sheppy_sql._stores import taking as taking_store
from sheppy_sql._transaction import Transaction
from tests.contract.tasks import finished, ids, make_task, make_tasks
from tests.faults.cases import CRON, A, B
from tests.faults.load import Load, until
from tests.support.databases import TestDatabase

MakeBackend = Callable[..., Awaitable[SqlBackend]]

PATIENCE = 60.0  # seconds, a ceiling for what takes one or two
AT_ONCE = 5.0  # seconds, a ceiling for what must not wait for the end of an outage
QUEUE = "q"
FOR_EVER = 2**62
KILL = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


class Faults:
    """Makes the server raise an error whenever a row of a table changes, a number of times.

    Counted by a sequence, which a rollback does not turn back.
    """

    def __init__(self, database: TestDatabase) -> None:
        self._database = database

    async def make(
        self, table: str, sqlstate: str, times: int, *, at_commit: bool, after: float = 0.0
    ) -> None:
        """`after`: seconds, for each row."""
        when = "DEFERRED" if at_commit else "IMMEDIATE"
        for sql in (
            "CREATE SEQUENCE IF NOT EXISTS faults",
            "ALTER SEQUENCE faults RESTART",
            f"""CREATE OR REPLACE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN
                    IF nextval('faults') <= {times} THEN
                        PERFORM pg_sleep({after});
                        RAISE EXCEPTION 'injected' USING ERRCODE = '{sqlstate}';
                    END IF;
                    RETURN NULL;
                END $$""",
            f"DROP TRIGGER IF EXISTS fault ON {table}",
            f"""CREATE CONSTRAINT TRIGGER fault AFTER INSERT OR UPDATE OR DELETE ON {table}
                DEFERRABLE INITIALLY {when} FOR EACH ROW EXECUTE FUNCTION fault()""",
        ):
            await self._database.execute(sql)
        await self._database.let_worker_use_all()

    async def count(self) -> int:
        """How many rows were changed, faults among them."""
        [(count,)] = await self._database.fetch("SELECT last_value FROM faults WHERE is_called")
        return int(count)

    async def stop(self, table: str) -> None:
        await self._database.execute(f"DROP TRIGGER fault ON {table}")


@pytest.fixture
def faults(database: TestDatabase) -> Faults:
    return Faults(database)


# Serialization failure, deadlock, lock timeout.
@pytest.mark.parametrize("at_commit", [False, True], ids=["in a statement", "at the commit"])
@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "55P03"])
async def test_conflicts_are_tried_again(
    sqlstate: str, at_commit: bool, faults: Faults, make_backend: MakeBackend
) -> None:
    backend = await make_backend()
    steps: list[tuple[Callable[[], Awaitable[Any]], Any]] = [
        (lambda: backend.append(QUEUE, [A, B]), [True, True]),
        (lambda: backend.pop(QUEUE, 5), [A, B]),
        (lambda: backend.store_result(QUEUE, finished(A)), True),
        (lambda: backend.append(QUEUE, [B], unique=False), [True]),
        (lambda: backend.clear(QUEUE), 2),
    ]
    for call, expected in steps:
        await faults.make("sheppy_tasks", sqlstate, 3, at_commit=at_commit)
        assert await asyncio.wait_for(call(), PATIENCE) == expected
        assert await faults.count() > 3
    assert await backend.get_all_tasks(QUEUE) == []


async def test_lock_timeout_that_the_server_calls_a_request_of_the_user_is_tried_again(
    faults: Faults, make_backend: MakeBackend
) -> None:
    """As it does where the timeout strikes just as one wait has ended and the next one begins."""
    backend = await make_backend()
    calls: list[tuple[Callable[[], Awaitable[Any]], Any]] = [
        (lambda: backend.append(QUEUE, [A, B]), [True, True]),
        (lambda: backend.pop(QUEUE, 5), [A, B]),
        (lambda: backend.heartbeat(QUEUE, ["task-0"]), None),
        (lambda: backend.store_result(QUEUE, finished(A)), True),
        (lambda: backend.acknowledge(QUEUE, ["task-1"]), None),
    ]
    for call, expected in calls:
        await faults.make("sheppy_tasks", "57014", 1, at_commit=False)
        if expected == [A, B]:  # it waits for no lock, and nobody but a user can have ended it
            with pytest.raises(BackendError, match="57014"):
                await call()
        assert await asyncio.wait_for(call(), PATIENCE) == expected
        assert await faults.count() > 1
    # A user who insists is told.
    await faults.make("sheppy_tasks", "57014", FOR_EVER, at_commit=False)
    with pytest.raises(BackendError, match="57014"):
        await asyncio.wait_for(backend.append(QUEUE, [make_task("new")]), PATIENCE)
    # So is one who ends what no lock timeout can have ended so late.
    await faults.make("sheppy_tasks", "57014", FOR_EVER, at_commit=False, after=1.2)
    with pytest.raises(BackendError, match="57014"):
        await asyncio.wait_for(backend.append(QUEUE, [make_task("new")]), PATIENCE)
    assert await faults.count() == 1


@pytest.mark.parametrize("at_commit", [False, True], ids=["in a statement", "at the commit"])
async def test_full_disk_is_an_error_after_which_nothing_is_missing_or_doubled(
    at_commit: bool, faults: Faults, make_backend: MakeBackend
) -> None:
    backend = await make_backend()
    await backend.append(QUEUE, [A])
    await backend.pop(QUEUE)
    calls: list[tuple[Callable[[], Awaitable[Any]], Any]] = [
        (lambda: backend.append(QUEUE, [B]), [True]),
        (lambda: backend.store_result(QUEUE, finished(A)), True),
        (lambda: backend.pop(QUEUE, 5), [B]),
    ]
    for call, expected in calls:
        await faults.make("sheppy_tasks", "53100", FOR_EVER, at_commit=at_commit)
        with pytest.raises(BackendError, match=r"^Failed to .*disk is full"):
            await asyncio.wait_for(call(), AT_ONCE)
        await faults.stop("sheppy_tasks")
        assert await asyncio.wait_for(call(), PATIENCE) == expected
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 1, "scheduled": 0}


@asynccontextmanager
async def transaction(database: TestDatabase, *statements: str) -> AsyncIterator[AsyncConnection]:
    """Another program's open transaction."""
    engine = create_async_engine(database.url, poolclass=NullPool)
    async with engine.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))
        yield connection


def errors_of(backend: SqlBackend) -> list[str]:
    """A list that grows with each error which the driver reports to the backend."""
    assert backend._session is not None
    seen: list[str] = []

    def note(context: Any) -> None:
        cause = getattr(context.original_exception, "__cause__", None)
        seen.append(str(getattr(cause, "sqlstate", None)))

    event.listen(backend._session.database.engine.sync_engine, "handle_error", note)
    return seen


async def test_lock_timeout_that_the_operator_has_set_is_waited_out(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    await set_for_database(database, "lock_timeout", "20ms")
    backend = await make_backend()
    errors = errors_of(backend)

    async def refused() -> bool:
        return errors.count("55P03") >= 3

    async with transaction(database, "LOCK TABLE sheppy_tasks IN EXCLUSIVE MODE"):
        call = asyncio.ensure_future(backend.append(QUEUE, [A]))
        await until(refused, "there was no lock timeout")
        assert not call.done()
    assert await asyncio.wait_for(call, PATIENCE) == [True]


async def test_deadlock_with_another_program_is_tried_again(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    backend = await make_backend()
    await backend.append(QUEUE, [A, B])
    errors = errors_of(backend)

    async def waits() -> bool:
        return bool(
            await database.fetch(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
        )

    update = "UPDATE sheppy_tasks SET crashes = 0 WHERE id = '{}'"
    # The backend's deadlock timeout is a second: it has long been over before this one's.
    patient = "SET LOCAL deadlock_timeout = '60s'"
    async with transaction(database, patient, update.format("task-1")) as other:
        call = asyncio.ensure_future(backend.append(QUEUE, [A, B], unique=False))
        await until(waits, "the backend does not wait for the other program")
        # This is what the other program gets when the backend gives way.
        await asyncio.wait_for(other.execute(text(update.format("task-0"))), PATIENCE)
        await other.commit()
    assert await asyncio.wait_for(call, PATIENCE) == [True, True]
    assert "40P01" in errors
    assert await backend.pop(QUEUE, 5) == [A, B]


async def set_for_database(database: TestDatabase, name: str, value: str | None) -> None:
    """Set a parameter, for new sessions, from a session to which it does not apply."""
    connection = await asyncpg.connect(
        database.url.replace("+asyncpg", ""),
        server_settings={"default_transaction_read_only": "off"},
    )
    try:
        [own] = await connection.fetchrow("SELECT quote_ident(current_database())")
        action = f"RESET {name}" if value is None else f"SET {name} = '{value}'"
        await connection.execute(f"ALTER DATABASE {own} {action}")
    finally:
        await connection.close()


async def test_server_that_is_read_only_for_a_while_is_waited_for(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    """As after a switch-over, when connections lead to what is a standby now."""
    backend = await make_backend()
    await backend.append(QUEUE, [A])
    errors = errors_of(backend)

    await set_for_database(database, "default_transaction_read_only", "on")
    await database.execute(KILL)
    calls: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(backend.append(QUEUE, [B])),
        asyncio.ensure_future(backend.pop(QUEUE)),
    ]

    async def refused() -> bool:
        assert [call.result() for call in calls if call.done()] == []
        return errors.count("25006") >= 2

    await until(refused, "the server did not refuse to write")
    # Sessions keep what held when they began: only new connections can write again.
    await set_for_database(database, "default_transaction_read_only", None)
    added, taken = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)
    assert added == [True]
    assert taken == [A]
    assert ids(await backend.get_pending(QUEUE, 5)) == ["task-1"]


@pytest.mark.torture
@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE {} ADD COLUMN extra_{} integer",
        "ALTER TABLE {} ALTER COLUMN payload TYPE {}",
    ],
    ids=["a column is added", "a column gets another type"],
)
async def test_table_that_is_altered_under_load_is_no_callers_concern(
    change: str, database: TestDatabase, make_backend: MakeBackend
) -> None:
    """PostgreSQL then refuses statements that were prepared before."""
    backends = [await make_backend() for _ in range(2)]
    async with Load(backends, backends, QUEUE) as load:
        for number in range(4):
            await load.progress()
            for table in ("sheppy_tasks", "sheppy_results"):
                new = number if "ADD" in change else ("varchar", "text")[number % 2]
                await database.execute(change.format(table, new))
        await load.progress()


async def test_missing_tables_are_told_at_once(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    backend = await make_backend()
    await database.execute("DROP TABLE sheppy_tasks, sheppy_crons")
    calls = [
        backend.append(QUEUE, [A]),
        backend.pop(QUEUE, timeout=30),
        backend.add_cron(QUEUE, "cron", CRON),
        backend.get_all_tasks(QUEUE),
    ]
    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), AT_ONCE)
    for outcome in outcomes:
        assert isinstance(outcome, BackendError)
        assert "sheppy-sql db upgrade" in str(outcome)
    await database.execute("DROP TABLE sheppy_schema")
    with pytest.raises(BackendError, match="sheppy-sql db upgrade"):
        await asyncio.wait_for(make_backend(), AT_ONCE)


async def test_data_that_the_server_refuses_is_told_at_once(
    faults: Faults, make_backend: MakeBackend
) -> None:
    """A check or trigger of the user's own: the same again would fail again."""
    backend = await make_backend()
    await faults.make("sheppy_tasks", "23514", FOR_EVER, at_commit=False)
    with pytest.raises(BackendError, match=r"^Failed to append tasks: .*23514"):
        await asyncio.wait_for(backend.append(QUEUE, [A]), AT_ONCE)
    await faults.stop("sheppy_tasks")
    assert await backend.append(QUEUE, [A]) == [True]


async def test_one_call_that_fails_spares_those_beside_it(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    """Whether or not they travel together."""
    await database.execute("ALTER TABLE sheppy_tasks ADD CHECK (id <> 'bad')")
    backend = await make_backend()
    tasks = make_tasks(20)
    tasks.insert(10, make_task("bad"))
    added = await asyncio.gather(
        *(backend.append(QUEUE, [task]) for task in tasks), return_exceptions=True
    )
    assert isinstance(added.pop(10), BackendError)
    assert added == [[True]] * 20
    assert sorted(ids(await backend.pop(QUEUE, 50))) == sorted(ids(make_tasks(20)))


async def test_conflict_leaves_no_claim_to_be_looked_for(
    postgres_database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was rolled back is not committed later."""
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await backend.append("q", [{"id": "0", "finished_at": None}])
    claim, tries = taking_store.claim, 0

    async def conflicting(tx: Transaction, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        nonlocal tries
        tries += 1
        if tries == 1:
            await tx.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
        return await claim(tx, *args, **kwargs)

    monkeypatch.setattr(taking_store, "claim", conflicting)
    assert len(await backend.pop("q")) == 1
    assert tries == 2
    left = dict(backend._connected.consumer._taker._leftovers._by_token)
    await backend.disconnect()
    assert left == {}
