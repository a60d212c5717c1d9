"""A database that goes away for a while: calls wait for it, and after the grace they say so."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sheppy import BackendError
from sqlalchemy import event

from sheppy_sql import SqlBackend
from tests.contract.tasks import finished, make_task
from tests.faults import cases
from tests.faults.cases import A, Everything
from tests.faults.load import Load, until
from tests.support.databases import TestDatabase
from tests.support.proxy import Proxy, severed

MakeBackend = Callable[..., Awaitable[SqlBackend]]

PATIENCE = 60.0  # seconds, a ceiling for what takes one or two
QUEUE = "q"
KILL = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""

OUTAGES: dict[str, Callable[[Proxy], None]] = {
    "refused": Proxy.refuse,
    "dropped": Proxy.hang_up,
    "starting up": lambda proxy: proxy.turn_away("57P03", "the database system is starting up"),
    "too many clients": lambda proxy: proxy.turn_away("53300", "sorry, too many clients already"),
}


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


async def until_turned_away(proxy: Proxy, times: int, *calls: asyncio.Future[Any]) -> None:
    """Return once that many more connections were tried in vain; no call may have ended."""
    target = proxy.turned_away + times

    async def tried() -> bool:
        assert [call.result() for call in calls if call.done()] == []
        return proxy.turned_away >= target

    await until(tried, "nobody tries to connect again")


@pytest.mark.parametrize(
    "outage",
    [
        "refused",
        "starting up",
        pytest.param("dropped", marks=pytest.mark.torture),
        pytest.param("too many clients", marks=pytest.mark.torture),
    ],
)
async def test_calls_wait_for_the_end_of_an_outage(
    outage: str, database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    everything = Everything(await make_proxied(), await make_proxied(), database)
    await everything.prepare()
    OUTAGES[outage](proxy)
    assert proxy.cut() > 0
    calls = everything.start()
    try:
        if outage != "refused":  # of which the proxy does not hear
            await until_turned_away(proxy, 10, *calls)
        done, _ = await asyncio.wait(calls, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        assert [call.result() for call in done] == []
        await proxy.accept()
        answers = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)
    finally:
        for call in calls:
            call.cancel()
    await everything.check(answers)


async def test_outage_beyond_the_grace_is_an_error_and_not_the_end(
    database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    backend = await make_proxied(outage_grace=1.0)
    everything = Everything(backend, await make_proxied(outage_grace=1.0), database)
    await everything.prepare()
    clock = asyncio.get_running_loop().time
    started = clock()
    async with severed(proxy):
        calls = everything.start()
        await asyncio.wait(calls, timeout=PATIENCE)
        took = clock() - started
        errors = [call.exception() for call in calls]
    assert [error for error in errors if not isinstance(error, BackendError)] == []
    for error in errors:
        assert str(error).startswith("Failed to ")
        assert re.search(
            "check that the server runs|the connection to the database was lost", str(error)
        )
        assert len(str(error).splitlines()) == 1
    assert 0.9 < took < 15
    # Nothing needs to be connected anew.
    assert backend.is_connected
    answers = await asyncio.wait_for(asyncio.gather(*everything.start()), PATIENCE)
    await everything.check(answers)


@pytest.mark.torture
async def test_grace_begins_anew_with_every_outage(proxy: Proxy, make_proxied: MakeBackend) -> None:
    """Several short outages are no long one, for a call that waits through them all."""
    backend, other = await make_proxied(outage_grace=3.0), await make_proxied()
    assert backend._session is not None
    reads: list[object] = []
    engine = backend._session.database.engine.sync_engine
    event.listen(engine, "after_cursor_execute", lambda *args: reads.append(args[2]))
    clock = asyncio.get_running_loop().time
    waiting = asyncio.ensure_future(backend.get_results(QUEUE, ["task-0"], 0))
    started = clock()
    while clock() - started < 4:
        proxy.hang_up()
        proxy.cut()
        await until_turned_away(proxy, 2, waiting)
        await proxy.accept()
        before = len(reads)

        async def looked(before: int = before) -> bool:
            return len(reads) > before

        await until(looked, "the call did not find its way back")
    assert not waiting.done()
    await other.store_result(QUEUE, finished(A))
    assert list(await asyncio.wait_for(waiting, PATIENCE)) == ["task-0"]


async def test_cancelled_pop_does_not_wait_for_the_end_of_an_outage(
    proxy: Proxy, make_proxied: MakeBackend
) -> None:
    """The host's worker cancels its pop when it stops."""
    backend = await make_proxied()
    proxy.hang_up()
    proxy.cut()
    pop = asyncio.ensure_future(backend.pop(QUEUE, timeout=5))
    await until_turned_away(proxy, 2, pop)
    pop.cancel()
    try:
        done, _ = await asyncio.wait([pop], timeout=10)
    finally:
        await proxy.accept()
    assert done == {pop}
    assert pop.cancelled()


async def test_disconnect_in_an_outage_ends_and_is_no_error(
    database: TestDatabase, proxy: Proxy, make_backend: MakeBackend
) -> None:
    """What the backend holds is given back by whoever misses its signs of life."""
    leaving, staying = SqlBackend(proxy.url, lease=1.0), await make_backend(lease=1.0)
    await leaving.connect()
    await leaving.append(QUEUE, [A])
    assert await leaving.pop(QUEUE) == [A]
    async with severed(proxy):
        await asyncio.wait_for(leaving.disconnect(), 15)
    assert not leaving.is_connected
    assert await asyncio.wait_for(staying.pop(QUEUE, timeout=30), PATIENCE) == [A]


async def test_waiters_get_what_came_while_they_were_cut_off(
    proxy: Proxy, make_backend: MakeBackend, make_proxied: MakeBackend
) -> None:
    """A waiter hears of a result though its backend was cut off as it came."""
    waiting_backend, other = await make_proxied(), await make_backend()
    waiting = asyncio.ensure_future(waiting_backend.get_results(QUEUE, ["task-0"], 30))
    taking = asyncio.ensure_future(waiting_backend.pop(QUEUE, timeout=30))
    proxy.hang_up()
    proxy.cut()
    await until_turned_away(proxy, 3, waiting, taking)
    await other.store_result(QUEUE, finished(A))
    await other.append(QUEUE, [make_task("b")])
    await proxy.accept()
    assert list(await asyncio.wait_for(waiting, 20)) == ["task-0"]
    assert await asyncio.wait_for(taking, 20) == [make_task("b")]


@pytest.mark.parametrize("way", ["cut", pytest.param("resumed", marks=pytest.mark.torture)])
async def test_calls_wait_for_bytes_to_flow_again(
    way: str, database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    everything = Everything(await make_proxied(), await make_proxied(), database)
    await everything.prepare()
    proxy.stall()
    calls = everything.start()
    done, _ = await asyncio.wait(calls, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
    assert not done
    if way == "cut":
        assert proxy.cut() > 0
    proxy.resume()
    answers = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)
    await everything.check(answers)


async def test_many_connections_that_are_gone_without_a_word_hold_up_no_call_for_long(
    proxy: Proxy, make_proxied: MakeBackend
) -> None:
    """As after a failover, where one of them has noticed and the others have not."""
    backend = await make_proxied(pool_size=10, notify="off")
    for _ in range(2):
        await asyncio.gather(*(backend.append(str(n), [make_task("a")]) for n in range(10)))
        await asyncio.gather(*(backend.clear(str(n)) for n in range(10)))
        await asyncio.gather(*(backend.append(str(n), [make_task("b")]) for n in range(10)))
    proxy.stall_open()
    kept = backend._connected.database._connections._kept
    assert len(kept) > 5
    driver: Any = kept[-1].connection.driver_connection
    driver._transport.abort()
    # Each of them would take two seconds.
    assert await asyncio.wait_for(backend.append(QUEUE, [A]), 8) == [True]
    proxy.cut()


async def test_killed_connections_are_no_callers_concern(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    backends = [await make_backend() for _ in range(3)]
    async with Load(backends[:1], backends[1:], QUEUE) as load:
        for _ in range(6):
            await load.progress()
            await database.execute(KILL)
    assert await database.fetch("SELECT id FROM sheppy_tasks") == []


async def test_idle_connections_that_were_killed_are_no_callers_concern(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    backend = await make_backend()
    # Fill the pool: the first call then meets one dead connection after another.
    await asyncio.gather(*(backend.size(QUEUE) for _ in range(10)))
    steps = [
        (cases.append(A), [True]),
        (cases.pop(), [A]),
        (cases.store_result(finished(A)), True),
        (
            lambda backend, queue: backend.get_results(queue, ["task-0"]),
            {"task-0": finished(A)},
        ),
    ]
    for step, expected in steps:
        await database.execute(KILL)
        assert await asyncio.wait_for(step(backend, QUEUE), PATIENCE) == expected


async def test_server_that_ends_idle_sessions_is_no_callers_concern(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    await database.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET "
        "idle_session_timeout = 100', current_database()); END $$"
    )
    backend = await make_backend()

    async def alone() -> bool:
        sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        return await database.fetch(sql) == [(1,)]

    for number in range(3):
        await until(alone, "the server did not end the session")
        assert await backend.append(QUEUE, [make_task(str(number))]) == [True]
    assert await backend.size(QUEUE) == 3


@pytest.mark.torture
async def test_cut_connections_are_no_callers_concern(
    database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    backends = [await make_proxied() for _ in range(2)]
    async with Load(backends, backends, QUEUE) as load:
        for _ in range(8):
            await load.progress(7)
            proxy.cut()
        assert proxy.cuts >= 8
    assert await database.fetch("SELECT id FROM sheppy_tasks") == []


@pytest.mark.torture
async def test_lost_messages_and_outages_under_load_are_no_callers_concern(
    database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    backends = [await make_proxied() for _ in range(2)]
    async with Load(backends, backends, QUEUE) as load:
        for _ in range(2):
            answers = proxy.lose_answer(times=4, touching=cases.OURS)
            requests = proxy.lose_request(times=4, touching=cases.OURS)
            await load.progress(20)
            proxy.hang_up()
            proxy.cut()
            await until_turned_away(proxy, 4)
            await proxy.accept()
            await load.progress(20)
            assert (answers.struck, requests.struck) == (4, 4)
    assert await database.fetch("SELECT id FROM sheppy_tasks") == []


def ending(message: str) -> bytes:
    """What a server says before it closes a connection, as its protocol has it."""
    fields = {"S": "FATAL", "V": "FATAL", "C": "57P01", "M": message}
    said = b"".join(f"{field}{text}\0".encode() for field, text in fields.items()) + b"\0"
    return b"E" + struct.pack("!i", len(said) + 4) + said


async def test_session_that_the_server_is_about_to_end_is_no_error(
    postgres_database: TestDatabase,
) -> None:
    """Its last words have come, its end has not: the driver takes no statement any more."""
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await backend.append(QUEUE, [A])
    [kept] = backend._connected.database._connections._kept
    driver: Any = kept.connection.driver_connection
    driver._protocol.data_received(ending("terminating connection due to administrator command"))
    assert await backend.append(QUEUE, [make_task("b")]) == [True]
    assert [task["id"] for task in await backend.pop(QUEUE, 10)] == [A["id"], "b"]
    await backend.disconnect()
