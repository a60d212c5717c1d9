"""What is enqueued, and whether it is what it should be."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone

from sheppy import Queue, Task

from .. import _host
from ._clock import Clock

ALL = 2**31 - 1
EXACTLY = timedelta(0)
SHORTLY = timedelta(seconds=1)
LISTED = 50

Wanted = Task | Callable[..., Task]


async def enqueued(queue: Queue, wanted: Wanted | None = None) -> list[Task]:
    """Tasks that wait, first those in line, then those that are scheduled or to be retried.

    Args:
        queue: Where.
        wanted: A task, for those of the same function with the same arguments, or a task
            function, for those with whatever arguments. None: all.
    """
    tasks = [*await queue.get_pending(ALL), *await queue.get_scheduled()]
    return [task for task in tasks if wanted is None or _is(task, wanted)]


async def assert_enqueued(
    queue: Queue,
    wanted: Wanted,
    *,
    count: int | None = None,
    at: datetime | timedelta | None = None,
    within: timedelta | None = None,
) -> list[Task]:
    """The waiting tasks that are as wanted; AssertionError, which lists all that wait, if not.

        await assert_enqueued(queue, send_receipt(1))
        await assert_enqueued(queue, remind, at=timedelta(days=1))

    Args:
        queue: Where.
        wanted: As of `enqueued`.
        count: How many there must be; None for at least one.
        at: When they must be due: an aware moment, or so long from now by the clock in use.
        within: How far off that may be. None: not at all, but 1 s where no clock is in use.
    """
    __tracebackhide__ = True
    found = await _found(queue, wanted, at, within)
    if found if count is None else len(found) == count:
        return found
    expected = "no" if count is None else f"{len(found)} instead of {count} of"
    raise AssertionError(await _told(queue, expected, wanted, at))


async def assert_not_enqueued(
    queue: Queue,
    wanted: Wanted | None = None,
    *,
    at: datetime | timedelta | None = None,
    within: timedelta | None = None,
) -> None:
    """AssertionError where such a task waits, or any at all where none is given."""
    __tracebackhide__ = True
    if found := await _found(queue, wanted, at, within):
        raise AssertionError(await _told(queue, f"{len(found)} unwanted:", wanted, at))


def due_at(task: Task) -> datetime | None:
    """When a waiting task is due; None for one that is."""
    if task.status == "retrying":
        return task.next_retry_at
    return task.scheduled_at if task.status == "scheduled" else None


async def _found(
    queue: Queue,
    wanted: Wanted | None,
    at: datetime | timedelta | None,
    within: timedelta | None,
) -> list[Task]:
    found = await enqueued(queue, wanted)
    if at is None:
        return found
    moment = _now() + at if isinstance(at, timedelta) else at
    if moment.tzinfo is None:
        raise ValueError("at must be timezone-aware: use datetime(.., tzinfo=timezone.utc)")
    if within is None:
        within = EXACTLY if Clock.in_use() else SHORTLY
    return [task for task in found if (due := due_at(task)) and abs(due - moment) <= within]


def _now() -> datetime:
    clock = Clock.in_use()
    return clock.now() if clock else datetime.now(timezone.utc)


def _is(task: Task, wanted: Wanted) -> bool:
    if not isinstance(wanted, Task):
        return task.spec.func == _host.name_of(wanted)
    return task.spec.func == wanted.spec.func and _arguments(task) == _arguments(wanted)


def _arguments(task: Task) -> str:
    """The same for all calls that mean the same, whether by position, by name or by default."""
    spec = task.spec.model_dump(mode="json")
    args, kwargs = spec["args"], spec["kwargs"]
    try:
        # Partially: sheppy itself gives some of them, and not before it runs.
        bound = inspect.signature(_host.function_of(task)).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return json.dumps([args, kwargs], sort_keys=True)
    bound.apply_defaults()
    return json.dumps(bound.arguments, default=str, sort_keys=True)


async def _told(
    queue: Queue, expected: str, wanted: Wanted | None, at: datetime | timedelta | None
) -> str:
    if wanted is None:
        what = "task"
    elif isinstance(wanted, Task):
        what = _call(wanted)
    else:
        what = f"{_host.name_of(wanted)}(..)"
    due = f" at {at}" if isinstance(at, datetime) else f" in {at}" if at is not None else ""
    return f"{expected} {what} enqueued in {queue.name!r}{due}; {_listed(await enqueued(queue))}"


def _listed(tasks: Sequence[Task]) -> str:
    if not tasks:
        return "nothing waits there"
    lines = [f"  {_state(task):9} {_call(task)}{_when(task)}" for task in tasks[:LISTED]]
    more = [f"  and {len(tasks) - LISTED} more"] if len(tasks) > LISTED else []
    return "\n".join(["there wait", *lines, *more])


def _state(task: Task) -> str:
    # What is in line may still say "new".
    return task.status if due_at(task) else "pending"


def _when(task: Task) -> str:
    moment = due_at(task)
    if moment is None:
        return ""
    away = moment - _now()
    told = f"in {away}" if away >= timedelta(0) else f"{-away} ago"
    return f", due at {moment.isoformat(sep=' ', timespec='milliseconds')} ({told})"


def _call(task: Task) -> str:
    arguments = [repr(value) for value in task.spec.args]
    arguments += [f"{name}={value!r}" for name, value in task.spec.kwargs.items()]
    return f"{task.spec.func}({', '.join(arguments)})"
