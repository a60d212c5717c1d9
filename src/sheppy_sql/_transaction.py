"""Where operations are carried out: what a store sees of a transaction, whoever's it is."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Protocol, TypeVar

from ._prepared import is_watched, prepared_once

if TYPE_CHECKING:
    from sqlalchemy import Connection, Executable
    from sqlalchemy.ext.asyncio import AsyncConnection

    from ._dialects import Dialect
    from ._prepared import Fetch
    from .schema import Tables

P = ParamSpec("P")
T = TypeVar("T")


def new_token() -> int:
    """A number that marks what one call writes, known before the call is made.

    So what was written is found again though its answer was lost or never awaited.
    """
    return secrets.randbits(63)


class Result(Protocol):
    """What a store asks of a statement's result, whoever has carried it out."""

    @property
    def rowcount(self) -> int: ...

    def all(self) -> Sequence[Any]: ...

    def scalar(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Transaction:
    """What a store needs: where to execute, on which tables, in which dialect."""

    connection: AsyncConnection
    tables: Tables
    dialect: Dialect
    repeated: bool = False
    """Whether this was tried before an outage, and may be committed though nobody heard of it."""
    fixed_snapshot: bool = False
    """Whether a later statement may not see what others have committed meanwhile."""
    is_callers: ClassVar[bool] = False
    """Whether it goes on after what is done here, so that no setting may be left in it."""

    async def rows(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        """Rows, with the selected columns as attributes.

        `parameters`: of a statement that was made once and is carried out many times.
        """
        return (await self.execute(statement, parameters)).all()

    async def scalar(self, statement: Executable) -> Any:
        return (await self.execute(statement)).scalar()

    async def count(self, statement: Executable) -> int:
        """How many rows the statement changed."""
        return (await self.execute(statement)).rowcount

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result:
        return await self.connection.execute(statement, parameters)

    async def do(self, function: Callable[[Connection], T]) -> T:
        """What a function returns that is given the connection."""
        return await self.connection.run_sync(function)


@dataclass(frozen=True, slots=True)
class OwnTransaction(Transaction):
    """One that is carried out in a single greenlet: a coroutine that waits for statements only.

    Each step of an AsyncConnection has a greenlet of its own, and its end a task, which takes
    as long as most statements.
    """

    connection: Connection  # type: ignore[assignment]  # the stores see no more than `execute`
    fetch: Fetch | None = None
    """How statements that are made once are carried out; None where SQLAlchemy is to do it."""

    async def rows(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        if parameters is None or self.fetch is None or is_watched(self.connection):
            return self.connection.execute(statement, parameters).all()
        prepared = prepared_once(statement, self.connection.dialect)
        return prepared.fetch(self.connection, parameters, self.fetch)

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result:
        return self.connection.execute(statement, parameters)

    async def do(self, function: Callable[[Connection], T]) -> T:
        return function(self.connection)


Operation = Callable[Concatenate[Transaction, P], Awaitable[T]]


class Operations(Protocol):
    """Where operations are carried out: in transactions of their own, or in the caller's."""

    @property
    def dialect(self) -> Dialect: ...

    async def write(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    async def read(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...


def run(waiting: Awaitable[T]) -> T:
    """The outcome of a coroutine that waits for nothing, as its statements block."""
    steps = waiting.__await__()
    try:
        next(steps)
    except StopIteration as end:
        outcome: T = end.value
        return outcome
    if hasattr(steps, "close"):
        steps.close()
    raise RuntimeError("Something of sheppy-sql waited where it must not; please report this")
