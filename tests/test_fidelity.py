"""What goes in comes out: equal, of the same types, in the same order, wherever it comes out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.tasks import FUTURE, PAST, QUEUE, finished, make_task

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend


def nested(depth: int) -> list[Any]:
    """Lists and dicts in one another, `depth` deep."""
    value: list[Any] = []
    for level in range(depth - 1):
        value = [{"level": value}] if level % 2 else [value]
    return value


VALUES: dict[str, Any] = {
    "not a number": [math.nan, {"deep": math.nan}],
    "infinities": [math.inf, -math.inf],
    "zeros": [0, 0.0, -0.0, False],
    "ones": [1, 1.0, True, "1"],
    "huge integers": [2**70, -(2**70), 2**63, 2**63 - 1, 10**400],
    "floats": [0.1, 1e308, 5e-324, 1e16, 123456789.123456789, sys.float_info.max],
    "nothing": [None, "", [], {}, "null"],
    "control characters": ["\u0000", "a\u0000b", "".join(map(chr, range(32))), "\u007f\u2028"],
    "lone surrogates": ["\ud800", "\udfff", "a\udc80b", "\ude00\ud83d"],
    "unicode": ["😀", "é", "e\u0301", "\ufffe\uffff", "\U0010ffff", "漢字", "\u202eabc"],
    "quotes": ["'", '"', "\\", "\\u0000", "%s", ":name", "$1", "?", "{}", "'; --", "\r\n\t"],
    "keys": {"": 1, " ": 2, "\u0000": 3, "\ud800": 4, "'": 5, "z": 6, "a": 7, "Z": 8, "id": 9},
    "key order": {"b": {"z": 1, "a": 2}, "a": [{"y": 1, "x": 2}], "10": 0, "9": 0},
    "five megabytes": "0123456789" * 500_000 + "é\u0000",
    "two hundred deep": nested(200),
}


def exactly(value: Any) -> Any:
    """Something that is equal only where types, key order and signs are the same as well."""
    if isinstance(value, dict):
        return dict, [(key, exactly(item)) for key, item in value.items()]
    if isinstance(value, list):
        return list, [exactly(item) for item in value]
    return type(value), repr(value)


def test_comparison_tells_apart_what_python_finds_equal() -> None:
    for one, other in [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([[1]], [[1.0]]),
    ]:
        assert one == other
        assert exactly(one) != exactly(other)
    assert exactly([math.nan, {"a": "b"}]) == exactly([math.nan, {"a": "b"}])


Route = Callable[["SqlBackend", dict[str, Any]], Awaitable[Any]]


async def through_line(backend: SqlBackend, task: dict[str, Any]) -> list[Any]:
    await backend.append(QUEUE, [task])
    found = [
        (await backend.get_pending(QUEUE))[0],
        (await backend.get_tasks(QUEUE, ["task"]))["task"],
        (await backend.get_all_tasks(QUEUE))[0],
    ]
    return [*found, (await backend.pop(QUEUE))[0]]


async def through_schedule(backend: SqlBackend, task: dict[str, Any]) -> list[Any]:
    await backend.schedule(QUEUE, task, PAST)
    found = [(await backend.get_scheduled(QUEUE))[0], (await backend.pop_scheduled(QUEUE))[0]]
    await backend.append(QUEUE, [task], unique=False)
    found += await backend.pop(QUEUE)
    await backend.schedule(QUEUE, task, FUTURE, unique=False)
    return [*found, (await backend.get_scheduled(QUEUE))[0]]


async def through_results(backend: SqlBackend, task: dict[str, Any]) -> list[Any]:
    await backend.append(QUEUE, [make_task()])
    await backend.pop(QUEUE)
    await backend.store_result(QUEUE, task)
    return [
        (await backend.get_results(QUEUE, ["task"]))["task"],
        (await backend.get_tasks(QUEUE, ["task"]))["task"],
        (await backend.get_all_tasks(QUEUE))[0],
    ]


async def through_crons(backend: SqlBackend, cron: dict[str, Any]) -> list[Any]:
    await backend.add_cron(QUEUE, "cron", cron)
    return await backend.get_crons(QUEUE)


async def through_workflows(backend: SqlBackend, workflow: dict[str, Any]) -> list[Any]:
    await backend.store_workflow(QUEUE, workflow)
    return [
        (await backend.get_workflows(QUEUE, ["task"]))["task"],
        (await backend.get_all_workflows(QUEUE))[0],
        (await backend.get_pending_workflows(QUEUE))[0],
    ]


ROUTES: list[tuple[Route, int]] = [
    (through_line, 4),
    (through_schedule, 4),
    (through_results, 3),
    (through_crons, 1),
    (through_workflows, 3),
]


@pytest.mark.parametrize(
    ("route", "ways_out"), ROUTES, ids=lambda value: getattr(value, "__name__", "")
)
async def test_what_goes_in_comes_out(backend: SqlBackend, route: Route, ways_out: int) -> None:
    for name, value in VALUES.items():
        payload = make_task(result=value, spec={"func": "app:job", "kwargs": {name: value}})
        if route is through_results:
            payload = finished(payload, result=value)
        expected = exactly(payload)
        found = await route(backend, payload)
        assert [exactly(out) == expected for out in found] == [True] * ways_out, name
        assert exactly(payload) == expected, f"{name}: the caller's own dict was changed"
        await backend.clear(QUEUE)
        await backend.delete_workflow(QUEUE, "task")
        await backend.delete_cron(QUEUE, "cron")


async def test_depth_that_is_taken_in_comes_out(backend: SqlBackend) -> None:
    """Of the depths up to what the interpreter can follow, from a place deeper in the stack."""

    async def deeper(levels: int) -> list[dict[str, Any]]:
        return await deeper(levels - 1) if levels else await backend.pop(QUEUE, limit=10)

    taken = 0
    for depth in (300, 500, 700, 800, 850, 900, 930, 960, 990, 1500, 5000):
        task = make_task(f"deep-{depth}", result=nested(depth))
        try:
            await backend.append(QUEUE, [task])
        except ValueError:
            continue
        taken += 1
        [popped] = await deeper(40)
        assert json.dumps(popped["result"]) == json.dumps(nested(depth))
    assert taken >= 1
