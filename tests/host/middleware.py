"""Middleware and dependencies of the tests, and tasks that use them.

Not `from __future__ import annotations`: the host reads the annotations as objects.
"""

from collections.abc import AsyncGenerator, Generator
from typing import Annotated, Any

from fastapi import Depends
from sheppy import Queue, Task, task

from tests.host.tasks import record

Ended = tuple[Task, Exception | None]

seen: list[str] = []


def outer(_task: Task, queue: Queue) -> Generator[None, Ended, None]:
    seen.append(f"outer, before, in {queue.name}")
    ended, error = yield
    seen.append(f"outer, after, {ended.status}, {error!r}")


async def inner(_task: Task, queue: Queue) -> AsyncGenerator[None, Ended]:
    seen.append(f"inner, before, in {queue.name}")
    ended, error = yield
    seen.append(f"inner, after, {ended.status}, {error!r}")


def double(_task: Task, _queue: Queue) -> Generator[None, Ended, Task]:
    ended, _ = yield
    ended.__dict__["result"] *= 2
    return ended


async def audit(_task: Task, queue: Queue) -> AsyncGenerator[None, Ended]:
    ended, _ = yield
    await Queue(queue.backend, "audit").add(record(ended.result))


def broken_afterwards(_task: Task, _queue: Queue) -> Generator[None, Ended, None]:
    yield
    raise RuntimeError("middleware is broken")


@task(middleware=[outer, inner])
async def add_in_between(x: int, y: int) -> int:
    return x + y


@task(middleware=[outer, inner])
async def fail_in_between() -> None:
    raise RuntimeError("broken")


@task(middleware=[audit, double])
async def add_and_double(x: int, y: int) -> int:
    return x + y


@task(middleware=[broken_afterwards])
async def add_under_broken(x: int, y: int) -> int:
    return x + y


def base() -> int:
    return 40


async def from_base(number: Annotated[int, Depends(base)]) -> int:
    return number + 1


def from_generator() -> Generator[str, None, None]:
    yield "generated"


async def from_async_generator() -> AsyncGenerator[str, None]:
    yield "later"


NUMBER = Depends(from_base)


@task
async def depend(
    x: int,
    word: Annotated[str, Depends(from_generator)],
    other: Annotated[str, Depends(from_async_generator)],
    number: int = NUMBER,
) -> list[Any]:
    return [x, number, word, other]
