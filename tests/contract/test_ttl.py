"""How long a finished task is kept: what it says itself, then what its backend says."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.tasks import (
    FUTURE,
    PAST,
    QUEUE,
    STATES,
    MakeBackend,
    Payload,
    finished,
    make_task,
    store_claimed,
    store_finished,
)

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend
    from tests.support.databases import TestDatabase

FAILURES = ("failed", "crashed", "cancelled")
BRIEFLY = 0.000001  # seconds
INHERIT = "inherit"
UNSAID: Any = object()

# ttl and error_ttl of the task, then of the backend; how long a completed task is kept by them,
# and how long a failed one.
RULES = [
    (UNSAID, UNSAID, None, INHERIT, None, None),
    (UNSAID, UNSAID, 1000, INHERIT, 1000, 1000),
    (UNSAID, UNSAID, 1000, 50, 1000, 50),
    (UNSAID, UNSAID, 1000, None, 1000, None),
    (UNSAID, UNSAID, None, 50, None, 50),
    (INHERIT, INHERIT, 1000, 50, 1000, 50),
    (200, UNSAID, 1000, 50, 200, 200),
    (200, INHERIT, 1000, 50, 200, 200),
    (INHERIT, 30, 1000, 50, 1000, 30),
    (200, 30, 1000, 50, 200, 30),
    (None, UNSAID, 1000, 50, None, None),
    (None, INHERIT, 1000, 50, None, None),
    (200, None, 1000, 50, 200, None),
    (None, 30, 1000, 50, None, 30),
    (UNSAID, None, 1000, 50, 1000, None),
    (0.5, 0.25, None, None, 0.5, 0.25),
    # What means nothing is as if it had not been said.
    (0, -1, 1000, 50, 1000, 50),
    ("soon", True, 1000, 50, 1000, 50),
    (float("nan"), [1], 1000, 50, 1000, 50),
]


def saying(place: str, ttl: Any, error_ttl: Any, **changes: Any) -> Payload:
    """A task that says, at that place, how long it is to be kept."""
    said = {"ttl": ttl, "error_ttl": error_ttl}
    said = {name: value for name, value in said.items() if value is not UNSAID}
    task = make_task(**changes)
    return {**task, "config": {**task["config"], **said}} if place == "config" else {**task, **said}


async def kept_for(database: TestDatabase, task_id: str = "task") -> float | None:
    """Seconds from its end to its expiry; None for ever."""
    [(ended, expires)] = await database.fetch(
        "SELECT finished_at, expires_at FROM sheppy_results WHERE id = :id", id=task_id
    )
    return seconds_between(ended, expires)


def seconds_between(ended: Any, expires: Any) -> float | None:
    return None if expires is None else (moment(expires) - moment(ended)).total_seconds()


def moment(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    return datetime.fromisoformat(value).replace(tzinfo=timezone.utc)


@pytest.mark.parametrize("place", ["config", "top level"])
async def test_finished_task_is_kept_as_long_as_it_and_its_backend_say(
    make_backend: MakeBackend, database: TestDatabase, place: str
) -> None:
    backends: dict[tuple[Any, Any], SqlBackend] = {}
    expected: dict[str, float | None] = {}
    for number, (ttl, error_ttl, general, general_error, completed, failed) in enumerate(RULES):
        if (general, general_error) not in backends:
            made = await make_backend(ttl=general, error_ttl=general_error)
            backends[general, general_error] = made
        for status in ("completed", *FAILURES):
            task = saying(place, ttl, error_ttl, task_id=f"{number}-{status}")
            expected[task["id"]] = completed if status == "completed" else failed
            backend = backends[general, general_error]
            await backend.store_result(QUEUE, finished(task, status=status))
    kept = {
        task_id: seconds_between(ended, expires)
        for task_id, ended, expires in await database.fetch(
            "SELECT id, finished_at, expires_at FROM sheppy_results"
        )
    }
    assert kept == {
        task_id: None if seconds is None else pytest.approx(seconds, abs=0.1)
        for task_id, seconds in expected.items()
    }


@pytest.mark.parametrize("place", ["config", "top level"])
async def test_task_that_asks_for_it_is_gone_at_once(
    make_backend: MakeBackend, database: TestDatabase, place: str
) -> None:
    backend = await make_backend(ttl=None)
    for failed in (False, True):
        task = saying(place, UNSAID if failed else BRIEFLY, BRIEFLY if failed else UNSAID)
        await store_claimed(backend, task)
        await backend.store_result(
            QUEUE, finished(task, status="failed" if failed else "completed")
        )
        assert await backend.get_all_tasks(QUEUE) == []
        assert await backend.get_results(QUEUE, ["task"]) == {}


@pytest.mark.parametrize("place", ["config", "top level"])
async def test_cancelled_task_is_kept_as_it_says_of_failures(
    make_backend: MakeBackend, database: TestDatabase, place: str
) -> None:
    backend = await make_backend(ttl=1000, error_ttl=500)
    await backend.append(QUEUE, [saying(place, 200, 30)])
    await backend.cancel(QUEUE, "task")
    assert await kept_for(database) == pytest.approx(30, abs=0.1)


async def test_lifetimes_as_long_as_can_be_said_are_kept(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    backend = await make_backend()
    for number, ttl in enumerate((1e300, float("inf"), 10**400)):
        task = saying("config", ttl, UNSAID, task_id=str(number))
        assert await backend.store_result(QUEUE, finished(task)) is True
        kept = await kept_for(database, str(number))
        assert kept is not None
        assert kept > 1e9
    assert len(await backend.get_all_tasks(QUEUE)) == 3


@pytest.mark.parametrize("state", [state for state in STATES if state != "finished"])
async def test_unfinished_task_never_expires(
    make_backend: MakeBackend, database: TestDatabase, state: str
) -> None:
    backend = await make_backend(ttl=BRIEFLY, error_ttl=BRIEFLY)
    task = saying("config", BRIEFLY, BRIEFLY)
    await STATES[state](backend, task)
    assert await backend.append(QUEUE, [task]) == [False]
    assert list(await backend.get_tasks(QUEUE, ["task"])) == ["task"]
    assert await database.fetch("SELECT id FROM sheppy_results") == []


@pytest.mark.parametrize("expired", [False, True])
async def test_task_that_is_stored_unfinished_again_no_longer_expires(
    make_backend: MakeBackend, database: TestDatabase, expired: bool
) -> None:
    backend = await make_backend(ttl=BRIEFLY if expired else 1000)
    await store_finished(backend, make_task())
    again = make_task(result="again")
    assert await backend.store_result(QUEUE, again) is True
    assert await backend.get_all_tasks(QUEUE) == [again]
    assert await database.fetch("SELECT id FROM sheppy_results") == []


@pytest.mark.parametrize("expired", [False, True])
@pytest.mark.parametrize("way", ["append", "schedule"])
async def test_task_that_is_put_back_no_longer_expires(
    make_backend: MakeBackend, database: TestDatabase, expired: bool, way: str
) -> None:
    backend = await make_backend(ttl=BRIEFLY if expired else 1000)
    await store_finished(backend, make_task())
    again = make_task(result="again")
    if way == "append":
        assert await backend.append(QUEUE, [again], unique=False) == [True]
    else:
        assert await backend.schedule(QUEUE, again, FUTURE, unique=False) is True
    assert await backend.get_all_tasks(QUEUE) == [again]
    assert await database.fetch("SELECT id FROM sheppy_results") == []


async def test_lifetime_counts_anew_from_the_latest_end(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    forever, shortly = await make_backend(ttl=None), await make_backend(ttl=100)
    await store_finished(forever, make_task())
    assert await kept_for(database) is None
    await shortly.store_result(QUEUE, finished(make_task(), result=2))
    assert await kept_for(database) == pytest.approx(100, abs=0.1)
    await forever.store_result(QUEUE, finished(make_task(), result=3))
    assert await kept_for(database) is None


async def test_lifetime_counts_from_the_end_by_the_databases_clock(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    """Not from what the worker's clock wrote into the task."""
    backend = await make_backend(ttl=100)
    await store_claimed(backend, make_task())
    await backend.store_result(QUEUE, finished(make_task(), finished_at=PAST.isoformat()))
    assert list(await backend.get_results(QUEUE, ["task"])) == ["task"]
