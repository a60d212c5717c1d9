"""Commits that the server ends only after the client, cut off, has tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from sheppy_sql import SqlBackend
from tests.contract.tasks import finished, ids, make_task
from tests.faults.cases import CASES, OURS, Case, assert_that_no_claim_is_forgotten, stored
from tests.faults.load import until
from tests.support.databases import TestDatabase
from tests.support.proxy import Proxy

MakeBackend = Callable[..., Awaitable[SqlBackend]]

QUEUE = "struck"
PATIENCE = 30.0  # seconds, a ceiling for what takes a fraction of one


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


SLOW_COMMIT = """
    CREATE SEQUENCE commits;
    CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('commits') = 1 THEN PERFORM pg_advisory_xact_lock(42); END IF;
        RETURN NULL;
    END $$;
    DO $$ DECLARE name text; BEGIN
        FOREACH name IN ARRAY ARRAY['tasks', 'scheduled_tasks', 'results', 'crons', 'workflows',
            'workflow_tasks', 'rate_limits', 'rate_limit_entries'] LOOP
            EXECUTE format('CREATE CONSTRAINT TRIGGER take_long
                AFTER INSERT OR UPDATE OR DELETE ON sheppy_%s DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION take_long()', name);
        END LOOP;
    END $$"""
OTHERS_WAIT = """SELECT count(*) > 1 FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND datname = current_database()"""


ROLL_BACK = """SELECT pg_terminate_backend(pid) FROM pg_locks
    WHERE locktype = 'advisory' AND NOT granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


@asynccontextmanager
async def slow_commit(database: TestDatabase, *, fails: bool = False) -> AsyncIterator[None]:
    """The next commit of a change is under way until the block ends."""
    connection = await asyncpg.connect(database.url.replace("+asyncpg", ""))
    try:
        await connection.execute(SLOW_COMMIT)
        await connection.execute("SELECT pg_advisory_lock(42)")
        yield
        if fails:
            await connection.execute(ROLL_BACK)
    finally:
        await connection.close()


@pytest.mark.torture
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.changes and not case.skips], ids=str
)
async def test_next_try_may_begin_before_the_last_commit_has_ended(
    case: Case, fails: bool, database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    """The server may learn late that it has lost its client, as when it waits for a replica."""
    backend = await make_proxied()
    for queue in ("calm", QUEUE):
        await case.set_up(backend, queue)
    expected = await case.call(backend, "calm")
    async with slow_commit(database, fails=fails):
        loss = proxy.lose_contact("COMMIT", touching=OURS)
        call = asyncio.ensure_future(case.call(backend, QUEUE))
        clock = asyncio.get_running_loop().time
        over = clock() + 0.3

        async def tried_again() -> bool:
            waits = (await database.fetch(OTHERS_WAIT)) == [(True,)]
            return loss.struck == 1 and (call.done() or waits or clock() > over)

        await until(tried_again, "the connection was not lost")
    answer = await asyncio.wait_for(call, PATIENCE)
    await until(lambda: everyone_has_gone(database), "the commit did not end")
    assert answer == expected
    found = await stored(database)
    assert found.get(QUEUE) == found.get("calm")
    for queue in ("calm", QUEUE):
        await assert_that_no_claim_is_forgotten(backend, database, queue)


@pytest.mark.torture
@pytest.mark.parametrize("cancelled", [False, True], ids=["awaited", "cancelled"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
async def test_tasks_that_a_late_commit_took_are_not_stranded(
    fails: bool, cancelled: bool, database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    """Whatever the call makes of it: its instance lives, and nobody else may take them."""
    backend = await make_proxied(lease=1.0)
    tasks = [make_task(str(number)) for number in range(3)]
    await backend.append(QUEUE, tasks)
    async with slow_commit(database, fails=fails):
        loss = proxy.lose_contact("COMMIT", touching=OURS)
        taking = asyncio.ensure_future(backend.pop(QUEUE, 2))
        await asyncio.wait_for(loss.happened.wait(), PATIENCE)
        if cancelled:
            taking.cancel()
        await asyncio.wait([taking], timeout=0.5)
    taken: list[dict[str, Any]] = []
    if cancelled:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(taking, PATIENCE)
    else:
        taken += await asyncio.wait_for(taking, PATIENCE)
    ran: list[str] = []

    async def all_ran() -> bool:
        taken.extend(await backend.pop(QUEUE, 5, timeout=0.1))
        while taken:
            task = taken.pop()
            ran.append(task["id"])
            await backend.store_result(QUEUE, finished(task))
        return len(ran) >= len(tasks)

    await until(all_ran, "tasks are stranded", timeout=20)
    assert sorted(ran) == ids(tasks)


async def everyone_has_gone(database: TestDatabase) -> bool:
    """Nobody waits for the lock of `slow_commit`, or has it."""
    sql = """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    return await database.fetch(sql) == [(0,)]
