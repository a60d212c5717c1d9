"""Names and payloads made to break SQL: kept apart and kept exactly, or refused with no change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from sheppy_sql import SqlBackend
from tests.contract.tasks import FUTURE, QUEUE, everything, finished, make_task

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase
    from tests.support.next_host import MakeNextBackend

NAMES = [
    "",
    " ",
    "a b",
    "'",
    "''",
    '"',
    "`",
    "\\",
    "\\'",
    ";",
    "--",
    "/*",
    "%",
    "%%",
    "%s",
    "%(id)s",
    ":id",
    "$1",
    "?",
    "{}",
    "{0}",
    "\n",
    "\r\n",
    "\t",
    "".join(map(chr, range(1, 32))),
    "'; DROP TABLE sheppy_tasks; --",
    "' OR '1'='1",
    "$$; SELECT 1; $$",
    "[1]",
    '{"a": 1}',
    "null",
    "None",
    "NULL",
    "0",
    "1",
    "true",
    "é",
    "e\u0301",
    "É",
    "ß",
    "SS",
    "\uff49",
    "İ",
    "\u0131",
    "😀",
    "\u200b",
    "\u202e",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "\u007f",
    "a",
    "A",
    "a ",
    "a\n",
    "x" * 300,
    "x" * 512,
    "é" * 256,
    "😀" * 128,
]
REFUSED: dict[str, Any] = {
    "NUL": "a\u0000b",
    "only NUL": "\u0000",
    "lone surrogate": "\ud800",
    "surrogates in the wrong order": "\ude00\ud83d",
    "513 bytes": "x" * 513,
    "513 bytes in UTF-8": "é" * 256 + "x",
    "bytes": b"a",
    "number": 7,
    "none": None,
    "list": ["a"],
    "true": True,
}


async def test_every_name_of_a_queue_is_its_own(backend: SqlBackend) -> None:
    for name in NAMES:
        assert await backend.append(name, [make_task(result=name)]) == [True]
        assert await backend.schedule(name, make_task("later", result=name), FUTURE)
        assert await backend.add_cron(name, "cron", {"of": name})
        await backend.store_workflow(name, {"id": "wf", "of": name, "pending_task_ids": [name]})
        assert await backend.acquire_rate_limit(name, "key", 1, 60, "a") is None
    assert await backend.list_queues() == dict.fromkeys(NAMES, 1)
    for name in NAMES:
        assert await backend.get_pending(name) == [make_task(result=name)]
        assert await backend.pop(name, limit=9) == [make_task(result=name)]
        assert await backend.get_scheduled(name) == [make_task("later", result=name)]
        assert await backend.get_crons(name) == [{"of": name}]
        assert (await backend.get_workflows(name, ["wf"]))["wf"]["of"] == name
        assert await backend.mark_workflow_task_complete(name, "wf", name) == 0
        assert await backend.acquire_rate_limit(name, "key", 1, 60, "b") is not None
        await backend.store_result(name, finished(make_task()))
        assert await backend.get_results(name, ["task"]) == {"task": finished(make_task())}
        assert await backend.get_stats(name) == {"pending": 0, "completed": 1, "scheduled": 1}
        assert await backend.clear(name) == 3
    assert await backend.list_queues() == {}


async def test_every_task_id_is_its_own(backend: SqlBackend) -> None:
    tasks = {name: make_task(name, result=name) for name in NAMES}
    assert await backend.append(QUEUE, list(tasks.values())) == [True] * len(NAMES)
    assert await backend.append(QUEUE, list(tasks.values())) == [False] * len(NAMES)
    assert await backend.get_tasks(QUEUE, NAMES) == tasks
    for name in NAMES:
        assert await backend.get_tasks(QUEUE, [name]) == {name: tasks[name]}
        assert await backend.append(QUEUE, [tasks[name]], unique=False) == [True]
    assert await backend.pop(QUEUE, limit=1000) == list(tasks.values())
    await backend.acknowledge(QUEUE, NAMES[::3])
    for name in NAMES:
        assert await backend.schedule(QUEUE, tasks[name], FUTURE, unique=name in NAMES[1::3]) is (
            name not in NAMES[1::3]
        )
    assert len(await backend.get_scheduled(QUEUE)) == len(NAMES) - len(NAMES[1::3])
    due = await backend.pop_scheduled(QUEUE, FUTURE)
    assert {task["id"] for task in due} == set(NAMES) - set(NAMES[1::3])
    for name in NAMES:
        assert await backend.store_result(QUEUE, finished(tasks[name])) is True
    results = await backend.get_results(QUEUE, NAMES, 10)
    assert results == {name: finished(task) for name, task in tasks.items()}
    assert await backend.get_all_workflows(QUEUE) == []
    assert await backend.clear(QUEUE) == len(NAMES)


async def test_every_cron_id_is_its_own(backend: SqlBackend) -> None:
    for name in NAMES:
        assert await backend.add_cron(QUEUE, name, {"of": name}) is True
        assert await backend.add_cron(QUEUE, name, {"of": "other"}) is False
    assert await backend.get_crons(QUEUE) == [{"of": name} for name in NAMES]
    for name in NAMES:
        assert await backend.delete_cron(QUEUE, name) is True
        assert await backend.delete_cron(QUEUE, name) is False


async def test_every_workflow_id_is_its_own(backend: SqlBackend) -> None:
    for name in NAMES:
        workflow = {"id": name, "of": name, "pending_task_ids": NAMES}
        assert await backend.store_workflow(QUEUE, workflow) is True
    found = await backend.get_workflows(QUEUE, NAMES)
    assert {name: workflow["of"] for name, workflow in found.items()} == {n: n for n in NAMES}
    for number, name in enumerate(NAMES):
        left = await backend.mark_workflow_task_complete(QUEUE, "'", name)
        assert left == len(NAMES) - number - 1
    for name in NAMES:
        assert await backend.delete_workflow(QUEUE, name) is True
    assert await backend.get_all_workflows(QUEUE) == []


async def test_every_rate_limit_key_task_and_strategy_is_its_own(backend: SqlBackend) -> None:
    for name in NAMES:
        assert await backend.acquire_rate_limit(QUEUE, name, 1, 60, name, name) is None
        assert await backend.acquire_rate_limit(QUEUE, name, 1, 60, "b", name) is not None
    for name in NAMES:
        assert await backend.acquire_rate_limit(QUEUE, "shared", len(NAMES), 60, name) is None
    assert await backend.acquire_rate_limit(QUEUE, "shared", len(NAMES), 60, "z") is not None


async def test_every_id_is_its_own_to_who_takes_tasks_out(
    make_next_backend: MakeNextBackend,
) -> None:
    holder, other = await make_next_backend(), await make_next_backend()
    tasks = {name: make_task(name, result=name) for name in NAMES}
    await holder.append(QUEUE, list(tasks.values()))
    await holder.pop(QUEUE, limit=1000)
    await holder.heartbeat(QUEUE, NAMES)
    stale = await other.get_stale_messages(QUEUE, 0)
    assert {task["id"]: task for task in stale} == tasks
    for name in NAMES:
        assert await other.delete_task(QUEUE, name) is True
        assert await other.append(QUEUE, [tasks[name]]) == [True]
        cancelled = await other.cancel(QUEUE, name)
        assert cancelled is not None
        assert cancelled["result"] == name
        workflow = {"id": name, "of": name, "completed": True}
        await other.store_workflow(QUEUE, workflow)
        ended = await other.get_workflow_results(QUEUE, [name], 10)
        assert ended == {name: workflow}
    assert await other.get_stats(QUEUE) == {"pending": 0, "completed": len(NAMES), "scheduled": 0}


Call = Callable[[SqlBackend, Any], Awaitable[Any]]
ARGUMENTS: dict[str, Call] = {
    "queue of append": lambda b, bad: b.append(bad, [make_task("new")]),
    "queue of an empty append": lambda b, bad: b.append(bad, []),
    "queue of pop": lambda b, bad: b.pop(bad),
    "queue of get_pending": lambda b, bad: b.get_pending(bad, 0),
    "queue of size": lambda b, bad: b.size(bad),
    "queue of get_tasks": lambda b, bad: b.get_tasks(bad, []),
    "queue of get_all_tasks": lambda b, bad: b.get_all_tasks(bad),
    "queue of schedule": lambda b, bad: b.schedule(bad, make_task("new"), FUTURE),
    "queue of get_scheduled": lambda b, bad: b.get_scheduled(bad),
    "queue of pop_scheduled": lambda b, bad: b.pop_scheduled(bad),
    "queue of store_result": lambda b, bad: b.store_result(bad, finished(make_task())),
    "queue of acknowledge": lambda b, bad: b.acknowledge(bad, []),
    "queue of get_results": lambda b, bad: b.get_results(bad, []),
    "queue of get_stats": lambda b, bad: b.get_stats(bad),
    "queue of clear": lambda b, bad: b.clear(bad),
    "queue of add_cron": lambda b, bad: b.add_cron(bad, "new", {}),
    "queue of delete_cron": lambda b, bad: b.delete_cron(bad, "cron"),
    "queue of get_crons": lambda b, bad: b.get_crons(bad),
    "queue of store_workflow": lambda b, bad: b.store_workflow(bad, {"id": "new"}),
    "queue of get_workflows": lambda b, bad: b.get_workflows(bad, []),
    "queue of get_all_workflows": lambda b, bad: b.get_all_workflows(bad),
    "queue of get_pending_workflows": lambda b, bad: b.get_pending_workflows(bad),
    "queue of delete_workflow": lambda b, bad: b.delete_workflow(bad, "wf"),
    "queue of mark_complete": lambda b, bad: b.mark_workflow_task_complete(bad, "wf", "task"),
    "queue of acquire_rate_limit": lambda b, bad: b.acquire_rate_limit(bad, "k", 1, 1.0, "t"),
    "queue of cancel": lambda b, bad: b.cancel(bad, "task"),
    "queue of delete_task": lambda b, bad: b.delete_task(bad, "task"),
    "queue of heartbeat": lambda b, bad: b.heartbeat(bad, []),
    "queue of get_stale_messages": lambda b, bad: b.get_stale_messages(bad, 0),
    "queue of get_workflow_results": lambda b, bad: b.get_workflow_results(bad, []),
    "id in cancel": lambda b, bad: b.cancel(QUEUE, bad),
    "id in delete_task": lambda b, bad: b.delete_task(QUEUE, bad),
    "id in heartbeat": lambda b, bad: b.heartbeat(QUEUE, ["task", bad]),
    "id in get_workflow_results": lambda b, bad: b.get_workflow_results(QUEUE, ["wf", bad]),
    "id in append": lambda b, bad: b.append(QUEUE, [make_task("new"), make_task(bad)]),
    "id in append again": lambda b, bad: b.append(QUEUE, [make_task(), make_task(bad)], False),
    "id in get_tasks": lambda b, bad: b.get_tasks(QUEUE, ["task", bad]),
    "id in schedule": lambda b, bad: b.schedule(QUEUE, make_task(bad), FUTURE, False),
    "id in store_result": lambda b, bad: b.store_result(QUEUE, finished(make_task(bad))),
    "id in acknowledge": lambda b, bad: b.acknowledge(QUEUE, ["task", bad]),
    "id in get_results": lambda b, bad: b.get_results(QUEUE, ["task", bad]),
    "id in add_cron": lambda b, bad: b.add_cron(QUEUE, bad, {}),
    "id in delete_cron": lambda b, bad: b.delete_cron(QUEUE, bad),
    "id in store_workflow": lambda b, bad: b.store_workflow(QUEUE, {"id": bad}),
    "task id in store_workflow": lambda b, bad: b.store_workflow(
        QUEUE, {"id": "wf", "pending_task_ids": [bad]}
    ),
    "id in get_workflows": lambda b, bad: b.get_workflows(QUEUE, ["wf", bad]),
    "id in delete_workflow": lambda b, bad: b.delete_workflow(QUEUE, bad),
    "workflow in mark_complete": lambda b, bad: b.mark_workflow_task_complete(QUEUE, bad, "task"),
    "task in mark_complete": lambda b, bad: b.mark_workflow_task_complete(QUEUE, "wf", bad),
    "key in acquire_rate_limit": lambda b, bad: b.acquire_rate_limit(QUEUE, bad, 1, 1.0, "t"),
    "task in acquire_rate_limit": lambda b, bad: b.acquire_rate_limit(QUEUE, "k", 1, 1.0, bad),
}


async def test_names_that_cannot_be_kept_are_refused_and_change_nothing(
    backend: SqlBackend,
) -> None:
    await backend.append(QUEUE, [make_task(), make_task("claimed")])
    await backend.add_cron(QUEUE, "cron", {})
    await backend.store_workflow(QUEUE, {"id": "wf", "pending_task_ids": ["task"]})
    before = await everything(backend)
    for where, call in ARGUMENTS.items():
        for what, bad in REFUSED.items():
            with pytest.raises(ValueError, match=r"NUL|UTF-8|must be a str|not JSON") as caught:
                await call(backend, bad)
            assert len(str(caught.value)) < 200, (where, what)
    assert await everything(backend) == before
    assert await backend.mark_workflow_task_complete(QUEUE, "wf", "task") == 0


GARBAGE: list[Any] = [
    None,
    0,
    2**70,
    -1.5,
    True,
    "",
    "x" * 100_000,
    "\u0000",
    "\ud800",
    "'; DROP TABLE sheppy_tasks; --",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59.999999-12:00",
    "2026-13-45T99:99:99Z",
    "2026-01-01",
    "2026-01-01T00:00:00.123456789Z",
    "infinity",
    [],
    ["a", {"b": 1}],
    {},
    {"func": {"func": "a"}},
]


async def test_garbage_in_the_fields_that_have_columns_fails_no_write(backend: SqlBackend) -> None:
    for number, garbage in enumerate(GARBAGE):
        for field in ("spec", "status", "created_at", "config", "retry_count", "error"):
            task = make_task(f"{number}-{field}", **{field: garbage})
            assert await backend.append(QUEUE, [task]) == [True]
            assert await backend.pop(QUEUE) == [task]
            assert await backend.store_result(QUEUE, task) is True
            assert await backend.store_result(QUEUE, finished(task, **{field: garbage})) is True
        task = make_task(f"{number}-func", spec={"func": garbage})
        assert await backend.schedule(QUEUE, task, FUTURE) is True
        assert await backend.get_tasks(QUEUE, [task["id"]]) == {task["id"]: task}


async def test_garbage_about_a_retry_fails_no_write(backend: SqlBackend) -> None:
    for number, garbage in enumerate(GARBAGE):
        for field in ("next_retry_at", "last_retry_at", "retry_count", "config"):
            fields = {"next_retry_at": "2026-01-01T00:00:00Z", "last_retry_at": "2026-01-01"}
            changes = {**fields, "status": "retrying", field: garbage}
            task = make_task(f"{number}-{field}", **changes)
            await backend.append(QUEUE, [task])
            assert await backend.pop(QUEUE) == [task]
            assert await backend.store_result(QUEUE, task) is True
            assert await backend.get_tasks(QUEUE, [task["id"]]) == {task["id"]: task}


async def test_retry_however_far_ahead_fails_no_write(backend: SqlBackend) -> None:
    first, last = "0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"
    for number, (decided, due) in enumerate([(first, last), (last, first), (last, last)]):
        times = {"last_retry_at": decided, "next_retry_at": due}
        task = make_task(str(number), status="retrying", **times)
        await backend.append(QUEUE, [task])
        await backend.pop(QUEUE)
        assert await backend.store_result(QUEUE, task) is True


PREFIXES = [
    "",
    "Upper_",
    "select ",
    "'",
    '"',
    '"; DROP TABLE x; --',
    "%",
    "%s%(a)s",
    ":a",
    "$1",
    "ä😀",
    "a.b.",
    "a b\n",
    "{}",
    "[x]",
    "x" * 30,
]


@pytest.mark.torture
@pytest.mark.parametrize("prefix", PREFIXES)
async def test_tables_may_have_any_prefix(empty_database: TestDatabase, prefix: str) -> None:
    schemas: list[str | None] = [None]
    if empty_database.dialect == "postgresql" and prefix:
        schemas.append(f"Schema {prefix}")
    for schema in schemas:
        backend = SqlBackend(empty_database.url, schema=schema, table_prefix=prefix, migrate=True)
        await backend.connect()
        await backend.disconnect()
        await backend.connect()
        await _use(backend)
        await backend.disconnect()


async def test_installations_with_other_prefixes_share_nothing(
    empty_database: TestDatabase,
) -> None:
    backends = [
        SqlBackend(empty_database.url, table_prefix=prefix, migrate=True)
        for prefix in ("a_", "a%", 'a"', "ä_", "a__")
    ]
    for backend in backends:
        await backend.connect()
        assert await backend.append(QUEUE, [make_task()]) == [True]
    for backend in backends:
        assert await backend.list_queues() == {QUEUE: 1}
        assert await backend.pop(QUEUE) == [make_task()]
        await backend.disconnect()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"table_prefix": "x" * 64}, "table_prefix"),
        ({"table_prefix": "é" * 25}, "table_prefix"),
        ({"table_prefix": "a\u0000"}, "table_prefix"),
        ({"table_prefix": "\ud800"}, "table_prefix"),
        ({"table_prefix": None}, "table_prefix"),
        ({"table_prefix": 5}, "table_prefix"),
        ({"schema": ""}, "schema"),
        ({"schema": "x" * 64}, "schema"),
        ({"schema": "é" * 32}, "schema"),
        ({"schema": "a\u0000"}, "schema"),
        ({"schema": "\ud800"}, "schema"),
        ({"schema": 5}, "schema"),
    ],
)
def test_name_that_no_table_can_have_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        SqlBackend("postgresql+asyncpg://localhost/app", **options)
    str(caught.value).encode()


async def _use(backend: SqlBackend) -> None:
    """Every table at least once."""
    assert await backend.append(QUEUE, [make_task()]) == [True]
    assert await backend.append(QUEUE, [make_task()], unique=False) == [True]
    assert await backend.pop(QUEUE) == [make_task()]
    assert await backend.store_result(QUEUE, finished(make_task())) is True
    assert await backend.schedule(QUEUE, make_task("later"), FUTURE) is True
    assert await backend.pop_scheduled(QUEUE, FUTURE) == [make_task("later")]
    assert await backend.add_cron(QUEUE, "cron", {"a": 1}) is True
    await backend.store_workflow(QUEUE, {"id": "wf", "pending_task_ids": ["task"]})
    assert await backend.mark_workflow_task_complete(QUEUE, "wf", "task") == 0
    assert await backend.acquire_rate_limit(QUEUE, "key", 1, 60, "a") is None
    assert await backend.acquire_rate_limit(QUEUE, "key", 1, 60, "b", "fixed_window") is None
    assert await backend.list_queues() == {QUEUE: 0}
    assert await backend.clear(QUEUE) == 3
