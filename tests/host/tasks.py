"""The tasks that the workers run, and a journal of their runs.

Not `from __future__ import annotations`: the host reads the annotations as objects.
"""

import asyncio
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel
from sheppy import CURRENT_TASK, Task, task

RETRY_DELAYS = [0.02, 0.1, 0.2]
MAX_RATE, RATE_PERIOD = 3, 0.4
SELF: Any = CURRENT_TASK


class Run(NamedTuple):
    """One execution of a task."""

    task_id: UUID
    value: Any
    started_at: datetime
    due_at: datetime | None
    """When the host had decided that it should start."""


@dataclass
class Gate:
    """Where a task waits until the test lets it pass."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)


journal: list[Run] = []
gates: defaultdict[str, Gate] = defaultdict(Gate)
mended: set[str] = set()


def write(self: Task, value: Any = None) -> None:
    due = self.next_retry_at or self.scheduled_at
    journal.append(Run(self.id, value, datetime.now(timezone.utc), due))


@task
async def nothing() -> None:
    pass


@task
async def add(x: int, y: int) -> int:
    return x + y


@task
async def record(value: int, self: Task = SELF) -> int:
    write(self, value)
    return value


@task
async def echo(value: Any) -> Any:
    return value


@task
async def describe(self: Task = SELF) -> dict[str, Any]:
    return {"id": str(self.id), "func": self.spec.func, "args": list(self.spec.args)}


@task
async def fail(message: str, self: Task = SELF) -> None:
    write(self)
    raise RuntimeError(message)


@task
async def wait_at(gate: str, self: Task = SELF) -> str:
    write(self, gate)
    gates[gate].entered.set()
    await gates[gate].open.wait()
    return gate


class Order(BaseModel):
    number: int
    items: list[str]
    at: datetime


@task
async def ship(order: Order, *, express: bool = False) -> Order:
    assert isinstance(order, Order)
    return order.model_copy(update={"items": [*order.items, "fast" if express else "slow"]})


@task
def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


meeting = threading.Barrier(2, timeout=30)


@task
def meet() -> bool:
    meeting.wait()
    return True


@task(timeout=0.05)
async def never_end() -> None:
    await asyncio.Event().wait()


@task(timeout=0.05, retry=1, retry_delay=0.01, retry_on_timeout=True)
async def end_at_second_attempt(self: Task = SELF) -> int:
    write(self)
    if self.retry_count == 0:
        await asyncio.Event().wait()
    return self.retry_count


@task(retry=3, retry_delay=RETRY_DELAYS)
async def fail_with_delays(self: Task = SELF) -> None:
    write(self)
    raise RuntimeError("still broken")


@task(retry=3, retry_delay=0)
async def succeed_after(failures: int, self: Task = SELF) -> int:
    write(self)
    if self.retry_count < failures:
        raise RuntimeError("not yet")
    return self.retry_count


@task(retry=2, retry_delay=3600)
async def fail_for_long(self: Task = SELF) -> None:
    write(self)
    raise RuntimeError("broken")


@task
async def fail_until_mended(name: str) -> str:
    if name not in mended:
        raise RuntimeError("broken")
    return name


@task
async def then_one(value: int) -> Task:
    return record(value)


@task
async def then_many(count: int) -> list[Task]:
    return [record(value) for value in range(count)]


@task
async def countdown(number: int, self: Task = SELF) -> Task | None:
    write(self, number)
    return countdown(number - 1) if number else None


@task(rate_limit={"max_rate": MAX_RATE, "rate_period": RATE_PERIOD})
async def slide(self: Task = SELF) -> None:
    write(self)


@task(rate_limit={"max_rate": MAX_RATE, "rate_period": RATE_PERIOD, "strategy": "fixed_window"})
async def keep_to_windows(self: Task = SELF) -> None:
    write(self)


@task(rate_limit={"max_rate": 1, "rate_period": 3600, "key": "shared"})
async def one_of_two(self: Task = SELF) -> None:
    write(self)


@task(rate_limit={"max_rate": 1, "rate_period": 3600, "key": "shared"})
async def other_of_two(self: Task = SELF) -> None:
    write(self)
