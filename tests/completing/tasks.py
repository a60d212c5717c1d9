"""Tasks that complete in transactions of their own, with rows of the application's.

Not `from __future__ import annotations`: the host reads the annotations as objects.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from sheppy import CURRENT_TASK, Depends, Task, task
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sheppy_sql import SqlBackend

SELF: Any = CURRENT_TASK


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    task: Mapped[str | None]


class Entry(Base):
    """Nothing keeps it from being there twice."""

    __tablename__ = "entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Receipt(BaseModel):
    number: int
    lines: list[str]


backends: dict[str, SqlBackend] = {}
"""The application's, as it would have it in a module."""
actions: dict[str, Callable[[Task], Awaitable[Any]]] = {}


def get_backend() -> SqlBackend:
    return backends["app"]


BACKEND: Any = Depends(get_backend)


@task
async def act(name: str, self: Task = SELF) -> Any:
    """Does what the test says."""
    return await actions[name](self)


@task(retry=3, retry_delay=0)
async def act_and_retry(name: str, self: Task = SELF) -> Any:
    return await actions[name](self)


@task
async def order(number: int, self: Task = SELF, backend: SqlBackend = BACKEND) -> int:
    async with backend.complete(self) as tx:
        tx.add(Order(id=number, task=str(self.id)))
        tx.set_result(number)
    return 0


@task
async def plain(number: int) -> Receipt:
    return receipt(number)


@task
async def completing(number: int, self: Task = SELF) -> Receipt:
    async with get_backend().complete(self) as tx:
        tx.set_result(receipt(number))
    return receipt(-1)


def receipt(number: int) -> Receipt:
    return Receipt(number=number, lines=["\0", "é"])
