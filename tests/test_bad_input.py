"""Bad input: refused before anything is written, by an error that says what is wrong."""

from __future__ import annotations

import datetime as dt
import logging
import math
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from sheppy import BackendError

from sheppy_sql import SqlBackend
from tests.contract.tasks import (
    FUTURE,
    QUEUE,
    MakeBackend,
    everything,
    finished,
    make_task,
    make_tasks,
)

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase
    from tests.support.next_host import MakeNextBackend

SECRET = "s3cr3t-of-a-customer"


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def too_deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


NOT_JSON: dict[str, Callable[[], Any]] = {
    "set": lambda: {SECRET},
    "datetime": lambda: dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
    "bytes": lambda: SECRET.encode(),
    "object": object,
    "circular": circular,
    "too deep": too_deep,
    "tuple as key": lambda: {(SECRET,): 1},
    "bytes as key": lambda: {SECRET.encode(): 1},
    "complex number": lambda: 1j,
    "error": lambda: ValueError(SECRET),
}

Put = Callable[[SqlBackend, Any], Awaitable[Any]]
TASK_PUTS: dict[str, Put] = {
    "append": lambda b, task: b.append(QUEUE, [make_task("one"), task, make_task("two")]),
    "append again": lambda b, task: b.append(QUEUE, [make_task("one"), task], unique=False),
    "schedule": lambda b, task: b.schedule(QUEUE, task, FUTURE),
    "schedule again": lambda b, task: b.schedule(QUEUE, task, FUTURE, unique=False),
    "store_result": lambda b, task: b.store_result(QUEUE, task),
}
PUTS: dict[str, Put] = {
    **TASK_PUTS,
    "add_cron": lambda b, cron: b.add_cron(QUEUE, "cron", cron),
    "store_workflow": lambda b, workflow: b.store_workflow(QUEUE, workflow),
}


def everything_said(error: BaseException) -> str:
    """The error as Python prints it, with all that led to it, hidden or not."""
    shown = "".join(traceback.format_exception(error))
    hidden = [str(cause) for cause in (error.__cause__, error.__context__) if cause]
    return "\n".join([shown, repr(error), *hidden])


@pytest.mark.parametrize("what", NOT_JSON)
async def test_what_is_not_json_is_refused_and_nothing_is_written(
    backend: SqlBackend, what: str
) -> None:
    await backend.append(QUEUE, [make_task("claimed")])
    await backend.pop(QUEUE)
    before = await everything(backend)
    for name, put in PUTS.items():
        bad = make_task("claimed" if name == "store_result" else "task", result=NOT_JSON[what]())
        with pytest.raises(ValueError, match="is not JSON") as caught:
            await put(backend, bad)
        assert SECRET not in everything_said(caught.value)
    assert await everything(backend) == before


@pytest.mark.parametrize("bad", [None, 5, "task", ["id"], [("id", "task")], {("id",): 1}])
async def test_task_that_is_no_dict_is_refused(backend: SqlBackend, bad: object) -> None:
    before = await everything(backend)
    for name, put in PUTS.items():
        with pytest.raises(ValueError, match=r"must be a dict|is not JSON"):
            await put(backend, bad)
        assert await everything(backend) == before, name


@pytest.mark.parametrize("bad", [None, 5, "task", make_task(), iter([make_task()])])
async def test_tasks_that_are_no_list_are_refused(backend: SqlBackend, bad: Any) -> None:
    with pytest.raises(ValueError, match="tasks must be a list"):
        await backend.append(QUEUE, bad)
    assert await backend.list_queues() == {}


async def test_task_without_an_id_is_refused_and_nothing_is_written(backend: SqlBackend) -> None:
    before = await everything(backend)
    task = make_task()
    del task["id"]
    for name, put in {**TASK_PUTS, "store_workflow": PUTS["store_workflow"]}.items():
        with pytest.raises(ValueError, match="has no 'id'"):
            await put(backend, task)
        assert await everything(backend) == before, name


async def test_result_without_finished_at_is_refused(backend: SqlBackend) -> None:
    task = make_task()
    del task["finished_at"]
    with pytest.raises(ValueError, match="finished_at"):
        await backend.store_result(QUEUE, task)
    assert await backend.get_all_tasks(QUEUE) == []


async def test_too_large_payload_is_refused_and_nothing_is_written(
    make_backend: MakeBackend,
) -> None:
    backend = await make_backend(max_payload_bytes=2000)
    await backend.append(QUEUE, [make_task("fits", result="x" * 1000)])
    await backend.pop(QUEUE)
    before = await everything(backend)
    for name, put in PUTS.items():
        bad = make_task("fits" if name == "store_result" else "task", result=SECRET * 200)
        with pytest.raises(ValueError, match="max_payload_bytes allows 2000") as caught:
            await put(backend, bad)
        assert SECRET not in everything_said(caught.value)
    assert await everything(backend) == before


async def test_size_that_is_just_allowed_is_stored(make_backend: MakeBackend) -> None:
    backend = await make_backend(max_payload_bytes=100)
    just = {"id": "just", "result": ""}
    just["result"] = "x" * (100 - len('{"id": "just", "result": ""}'))
    assert await backend.append(QUEUE, [just]) == [True]
    with pytest.raises(ValueError, match="101 bytes"):
        await backend.append(QUEUE, [{**just, "result": just["result"] + "x"}])
    assert await backend.pop(QUEUE, limit=2) == [just]


@pytest.mark.parametrize("bad", ["1", None, 1.0, True, [1]])
async def test_count_that_is_no_int_is_refused(backend: SqlBackend, bad: Any) -> None:
    await backend.append(QUEUE, [make_task()])
    with pytest.raises(ValueError, match="limit must be an int"):
        await backend.pop(QUEUE, bad)
    with pytest.raises(ValueError, match="count must be an int"):
        await backend.get_pending(QUEUE, bad)
    assert await backend.size(QUEUE) == 1


@pytest.mark.parametrize("limit", [2**31, 2**63 - 1, 2**63, 2**100])
async def test_count_may_be_as_large_as_one_likes(backend: SqlBackend, limit: int) -> None:
    tasks = make_tasks(2)
    await backend.append(QUEUE, tasks)
    assert await backend.get_pending(QUEUE, limit) == tasks
    assert await backend.pop(QUEUE, limit) == tasks


@pytest.mark.parametrize("bad", ["1", math.nan, True, [1]])
async def test_timeout_that_is_no_number_is_refused(backend: SqlBackend, bad: Any) -> None:
    await backend.append(QUEUE, [make_task()])
    with pytest.raises(ValueError, match="timeout must be"):
        await backend.pop(QUEUE, 1, bad)
    with pytest.raises(ValueError, match="timeout must be"):
        await backend.get_results(QUEUE, ["task"], bad)
    with pytest.raises(ValueError, match="timeout must be"):
        await backend.get_workflow_results(QUEUE, ["wf"], bad)
    assert await backend.size(QUEUE) == 1


@pytest.mark.parametrize("bad", ["1", None, math.nan, math.inf, -1, True, [1]])
async def test_idle_time_that_is_no_number_is_refused(
    make_next_backend: MakeNextBackend, bad: Any
) -> None:
    holder, other = await make_next_backend(), await make_next_backend()
    await holder.append(QUEUE, [make_task()])
    await holder.pop(QUEUE)
    with pytest.raises(ValueError, match="min_idle_ms must"):
        await other.get_stale_messages(QUEUE, bad)
    assert await other.get_stale_messages(QUEUE, 0) == [make_task()]


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 10**300, -math.inf])
async def test_timeout_may_be_as_long_as_one_likes(backend: SqlBackend, timeout: float) -> None:
    await backend.append(QUEUE, [make_task()])
    assert await backend.pop(QUEUE, 1, timeout) == [make_task()]
    await backend.store_result(QUEUE, finished(make_task()))
    assert len(await backend.get_results(QUEUE, ["task"], timeout)) == 1


@pytest.mark.parametrize("bad", [None, 5, "2030-01-01", dt.date(2030, 1, 1)])
async def test_time_that_is_no_datetime_is_refused(backend: SqlBackend, bad: Any) -> None:
    with pytest.raises(ValueError, match="at must be a datetime"):
        await backend.schedule(QUEUE, make_task(), bad)
    assert await backend.get_all_tasks(QUEUE) == []


@pytest.mark.parametrize("bad", [None, 5, "task", b"task", {"task": 1}])
async def test_ids_that_are_no_list_are_refused(backend: SqlBackend, bad: Any) -> None:
    calls: list[Callable[[str, Any], Awaitable[Any]]] = [
        *(backend.get_tasks, backend.get_results, backend.acknowledge, backend.heartbeat),
        *(backend.get_workflows, backend.get_workflow_results),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="ids must be a list"):
            await call(QUEUE, bad)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("ttl", [0, -1, math.nan, math.inf, 1e300, "60", "inherit", True]),
        ("error_ttl", [0, -1, math.nan, math.inf, 1e300, "60", True]),
        ("max_payload_bytes", [0, -1, 1.5, "1", None, True, 2**40]),
        ("pool_size", [0, -1, 1.5, "1", None, True, 10**6]),
        ("connect_timeout", [0, -1, math.nan, math.inf, "1", None, True]),
        ("max_poll_interval", [0, -1, math.nan, math.inf, "1", None, True]),
        ("notify", ["yes", "", "ON", None, True, 1]),
        ("resume_workflows_after", [0, -1, math.nan, math.inf, 1e300, "60", True]),
        ("outage_grace", [-1, math.nan, math.inf, "1", None, True]),
        ("lease", [0, 0.9, -1, math.nan, math.inf, 86_401, "1", None, True]),
        ("max_loop_stall", [0, -1, math.nan, math.inf, "1", True]),
        ("on_crash", ["ignore", "", None, 1]),
        ("max_crashes", [0, -1, 1.5, "1", None, True, 10**6]),
        ("migrate", ["yes", 1, None]),
        ("schema", ["app"]),
    ],
)
def test_wrong_option_is_named(option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=option):
            SqlBackend("sqlite+aiosqlite:///never-made.db", **{option: value})


@pytest.mark.parametrize("url", [None, 5, "", "nonsense", "mysql://localhost/app", b"sqlite://"])
def test_wrong_url_is_refused(url: Any) -> None:
    with pytest.raises(ValueError, match=r"URL|url"):
        SqlBackend(url)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="timeout"):
        SqlBackend("sqlite+aiosqlite:///never-made.db", timeout=5)  # type: ignore[call-arg]  # the mistake


async def test_no_log_record_holds_a_payload(
    make_backend: MakeBackend, database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    """With every logger at DEBUG, through success, refusal and errors of the database."""
    caplog.set_level(logging.DEBUG)
    for name in list(logging.Logger.manager.loggerDict):
        caplog.set_level(logging.DEBUG, logger=name)
    worker, user = await make_backend(), await make_backend()
    task = make_task(result=SECRET, spec={"func": "app:job", "args": [SECRET]})
    await user.append(QUEUE, [task, {**task, "id": "other"}])
    await user.append(QUEUE, [task], unique=False)
    await worker.pop(QUEUE)
    await user.append(QUEUE, [task], unique=False)
    await worker.store_result(QUEUE, finished(task, result=SECRET))  # lost by now, and logged
    await user.schedule(QUEUE, {**task, "id": "later"}, FUTURE)
    await user.pop_scheduled(QUEUE, FUTURE)
    await user.get_all_tasks(QUEUE)
    await user.add_cron(QUEUE, "cron", {"of": SECRET})
    await user.store_workflow(QUEUE, {"id": "wf", "of": SECRET, "pending_task_ids": ["a"]})
    await user.cancel(QUEUE, "other")
    await user.delete_task(QUEUE, "later")
    await worker.pop(QUEUE)
    await user.get_stale_messages(QUEUE, 0)
    errors = []
    for table in ("tasks", "results", "crons", "workflows"):
        await database.execute(f"DROP TABLE sheppy_{table}")
    for name, put in PUTS.items():
        with pytest.raises(BackendError, match=r"^Failed to ") as caught:
            await put(user, finished(task))
        errors.append((name, everything_said(caught.value)))
    assert any("dropped" in message for message in caplog.messages)
    assert [name for name, said in errors if SECRET in said] == []
    told = [record for record in caplog.records if SECRET in f"{record.getMessage()}{record.args}"]
    assert sorted({record.name for record in told}) == []
