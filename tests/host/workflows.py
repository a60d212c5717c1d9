"""Workflows of the tests; the host runs each anew, from its start, whenever its steps end."""

from collections.abc import Generator
from typing import Any

from sheppy import Task, workflow

from tests.host.tasks import add, fail, record, wait_at

Steps = Generator[Task | list[Task], Any, Any]


@workflow
def linear(x: int) -> Steps:
    first = yield add(x, 1)
    second = yield add(first.result, 10)
    third = yield add(second.result, 100)
    return third.result


@workflow
def fan_out(count: int) -> Steps:
    parts = yield [add(number, number) for number in range(count)]
    total = yield record(sum(part.result for part in parts))
    return total.result


@workflow
def nested(count: int) -> Steps:
    total = yield fan_out(count)  # type: ignore[misc]  # runs, though the host's types deny it
    more = yield add(total, 1000)
    return more.result


@workflow
def with_failing_step() -> Steps:
    failed = yield fail("no paper")
    repaired = yield add(1, 2)
    return [failed.status, failed.error, repaired.result]


@workflow
def that_gives_up() -> Steps:
    failed = yield fail("no paper")
    raise ValueError(f"cannot go on after {failed.error}")


@workflow
def behind_gates(*gates: str) -> Steps:
    waited = yield [wait_at(gate) for gate in gates]
    return [task.result for task in waited]
