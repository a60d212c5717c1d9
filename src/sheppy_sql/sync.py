"""Enqueueing and waiting in synchronous code: Django, Flask, scripts.

Every function takes the connection that the application has: a SQLAlchemy Session or Connection,
Django's `connection`, or a connection of psycopg, psycopg2 or sqlite3. In its transaction they
neither commit nor roll back, and nothing is tried again. Where the connection commits each
statement by itself and no transaction is open, as Django's outside of `atomic()`, a call is a
transaction of its own.

Raises ValueError for what can never work (the message says what to do), BackendError for what the
database says, and of that TransactionConflictError where the transaction met another one's and
should be run again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias, overload
from uuid import UUID

from sheppy import Queue, Task

from ._errors import TransactionConflictError as TransactionConflictError
from ._options import DEFAULT_MAX_PAYLOAD_BYTES, DEFAULT_TTL, INHERIT, Options
from ._synchronous import SynchronousBackend, tables_named
from ._transaction import run
from ._validation import check_queue
from .schema import DEFAULT_PREFIX

if TYPE_CHECKING:
    from sqlalchemy import Connection as SqlalchemyConnection
    from sqlalchemy.orm import Session, scoped_session

    Connection: TypeAlias = SqlalchemyConnection | Session | scoped_session[Any] | Any
    """Any: the other drivers' and Django's need not be installed."""

__all__ = ["Settings", "TransactionConflictError", "cancel", "enqueue", "schedule", "wait_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of SqlBackend that concern these functions; those of the workers' must be the same.

    Make one where they are not the defaults, and hand it to every call.
    """

    schema: str | None = None
    table_prefix: str = DEFAULT_PREFIX
    ttl: float | None = DEFAULT_TTL
    error_ttl: float | str | None = INHERIT
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
    notify: bool = False
    """Whether on PostgreSQL a transaction's own commit wakes workers at once, in all processes.

    Such commits go one at a time in all of the database. Where a call is a transaction of its own,
    it always does.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.notify, bool):
            raise ValueError("notify must be True or False")
        self._options()
        tables_named(self.schema, self.table_prefix)

    def _options(self) -> Options:
        return Options(**{**asdict(self), "notify": "auto"})


DEFAULTS = Settings()


@overload
def enqueue(
    connection: Connection, queue: str, task: Task, *, settings: Settings = DEFAULTS
) -> bool: ...


@overload
def enqueue(
    connection: Connection, queue: str, task: list[Task], *, settings: Settings = DEFAULTS
) -> list[bool]: ...


def enqueue(
    connection: Connection,
    queue: str,
    task: Task | list[Task],
    *,
    settings: Settings = DEFAULTS,
) -> bool | list[bool]:
    """Put a task in line, or several; whether each was put there, as its id was free.

    Workers see it once the transaction is committed. A Session's commit wakes them where a
    SqlBackend of this process is connected, any connection's with `Settings(notify=True)`. Else
    those that wait for notifications come by within 5 s, others within `max_poll_interval`.
    """
    for one in task if isinstance(task, list) else [task]:
        _check_task(one)
    host, _ = _open(connection, queue, settings)
    added: bool | list[bool] = run(host.add(task))
    return added


def schedule(
    connection: Connection,
    queue: str,
    task: Task,
    at: datetime | timedelta,
    *,
    settings: Settings = DEFAULTS,
) -> bool:
    """Have a task begin at a time, or after one; False where its id is taken.

    As sheppy's `Queue.schedule` it sets the task's `status` and `scheduled_at`, and raises
    TypeError where the datetime is not aware.
    """
    _check_task(task)
    if not isinstance(at, (datetime, timedelta)):
        raise ValueError(f"at must be a datetime or a timedelta, not {type(at).__name__}")
    host, _ = _open(connection, queue, settings)
    scheduled: bool = run(host.schedule(task, at))
    return scheduled


def cancel(
    connection: Connection, queue: str, task: Task | UUID | str, *, settings: Settings = DEFAULTS
) -> Task | None:
    """The task, now finished as "cancelled"; None unless it was pending or scheduled."""
    _check_reference(task)
    _, backend = _open(connection, queue, settings)
    ended = run(backend.cancel(queue, str(task.id if isinstance(task, Task) else task)))
    return None if ended is None else Task.model_validate(ended)


@overload
def wait_for(
    connection: Connection,
    queue: str,
    task: Task | UUID | str,
    timeout: float = 0,
    *,
    settings: Settings = DEFAULTS,
) -> Task | None: ...


@overload
def wait_for(
    connection: Connection,
    queue: str,
    task: list[Task | UUID | str],
    timeout: float = 0,
    *,
    settings: Settings = DEFAULTS,
) -> dict[UUID, Task]: ...


def wait_for(
    connection: Connection,
    queue: str,
    task: Task | UUID | str | list[Task | UUID | str],
    timeout: float = 0,
    *,
    settings: Settings = DEFAULTS,
) -> Task | dict[UUID, Task] | None:
    """The task once it is finished, or several by id; a failed one is finished, too.

    `timeout` is in seconds, as of sheppy's `Queue.wait_for`: 0 waits for ever, a negative one
    looks once, and after a positive one it is a TimeoutError. Looks after 5 ms and then ever more
    rarely, up to every 0.25 s. Where no transaction was open, none is between two looks.

    Raises BackendError at once in a transaction in which it could wait for nothing but the timeout:
    commit first.
    """
    for one in task if isinstance(task, list) else [task]:
        _check_reference(one)
    host, _ = _open(connection, queue, settings)
    found: Task | dict[UUID, Task] | None = run(host.wait_for(task, timeout))
    return found


def _open(connection: object, queue: str, settings: Settings) -> tuple[Any, SynchronousBackend]:
    """Sheppy's Queue, which asks for less than a whole Backend, and what it asks."""
    if not isinstance(settings, Settings):
        raise ValueError(f"settings must be sync.Settings, not {type(settings).__name__}")
    backend: Any = SynchronousBackend(connection, settings._options(), notify=settings.notify)
    return Queue(backend, check_queue(queue)), backend


def _check_task(task: object) -> None:
    if not isinstance(task, Task):
        raise ValueError(
            f"task must be a Task, not {type(task).__name__}: call a function that @task decorates"
        )


def _check_reference(task: object) -> None:
    if not isinstance(task, (Task, UUID, str)):
        raise ValueError(f"task must be a Task or its id, not {type(task).__name__}")
