"""An application under test."""

from __future__ import annotations

from collections.abc import Generator
from contextvars import ContextVar
from datetime import datetime, timedelta, timezone
from typing import Any

from sheppy import Depends, Queue, Task, task, workflow

queues: list[Queue] = []
journal: list[Any] = []
context: ContextVar[str] = ContextVar("context", default="the test's")


def currency() -> str:
    return "EUR"


@task
async def note(what: str, urgent: bool = False) -> str:
    context.set("a task's")
    journal.append(what)
    return what


@task
async def note_twice(what: str) -> None:
    journal.append(what)
    await queues[-1].add([note(f"{what}.1"), note(f"{what}.2")])


@task
async def then_note(what: str) -> Task:
    return note(what)


@task
async def fail(why: str) -> None:
    raise LookupError(why)


# The host begins with the second delay.
@task(retry=2, retry_delay=[0, 10, 60])
async def fail_twice(name: str) -> str:
    journal.append(name)
    if journal.count(name) < 3:
        raise LookupError(name)
    return name


@task(retry=5, retry_delay=0)
async def fail_at_once(name: str) -> str:
    journal.append(name)
    raise LookupError(name)


@task
async def again() -> None:
    journal.append("again")
    await queues[-1].add(again())


@task
async def every_hour() -> None:
    journal.append("hour")
    await queues[-1].schedule(every_hour(), timedelta(hours=1))


@task
async def price(amount: int, unit: str = Depends(currency)) -> str:  # type: ignore[assignment]  # as the host has it
    return f"{amount} {unit}"


@task(rate_limit={"max_rate": 1, "rate_period": 3600.0})
async def rarely(number: int) -> int:
    return number


@workflow
def add_up(first: str) -> Generator[Task | list[Task], Any, Any]:
    one = yield note(first)
    two = yield note(one.result + "!")
    return two.result


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=timezone.utc)  # type: ignore[arg-type,misc]  # year, month, ...
