"""Live tasks: stored, replaced, looked at."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ScalarSelect,
    Text,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    null,
    or_,
    select,
    union_all,
)

from ..schema import PENDING, POSITION_STEP, SCHEDULED, Timestamp
from . import by_id
from . import results as result_store
from ._common import UNCLAIMED, is_held, made_once, of_queue, unexpired, without_lists

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, CompoundSelect, Executable, FromClause, Select

    from .._dialects.base import Columns
    from .._payloads import TaskRow
    from .._transaction import Transaction

STATEMENT_BYTES = 32 * 1024 * 1024
"""Payload in one statement: PostgreSQL ends a message at 1 GiB, memory may end earlier."""

REPLACED = ("payload", "state", "func", "status", "created_at", "pending_xid")
"""Columns of a task that is stored anew; the others follow rules of their own.

Its crashes stay: whoever postpones or retries it knows nothing of them.
"""

STATEMENT_ROWS = POSITION_STEP // 10


class Added(NamedTuple):
    """Ids that an append stored."""

    now: set[str]
    before: set[str]
    """At an earlier try, of which nobody has heard."""


async def add(
    tx: Transaction, queue: str, rows: Sequence[TaskRow], token: int, *, pending: bool
) -> Added:
    """The ids that were new to the queue, now pending or scheduled; an id occurs once in `rows`.

    Two statements, because an id may be finishing at this moment: the INSERT
    waits for that transaction and then finds no live task, and only a later
    snapshot shows the result that has taken its place.
    """
    adding = made_once(tx, _adding, pending)
    now: set[str] = set()
    for chunk in _chunks(rows):
        given = {"of_queue": queue, **tx.dialect.lists(_columns(chunk, token))}
        now.update(row.id for row in await tx.rows(adding, given))
    before: set[str] = set()
    if tx.repeated:
        # Now, since the INSERT has waited for an earlier try that was still being committed.
        ids = [row.id for row in rows if row.id not in now]
        before = await find_appended(tx, queue, ids, token)
        # One that has finished since left room in line.
        before |= await _remove_finished(tx, queue, sorted(now), token, of_append=True)
        now -= before
    if now:
        await result_store.check_unseen(tx, queue, sorted(now))
        now -= await _remove_finished(tx, queue, sorted(now), token)
    return Added(now, before)


async def put(
    tx: Transaction,
    queue: str,
    rows: Sequence[TaskRow],
    token: int,
    state: ColumnElement[str],
    promoted: Container[str] = (),
) -> bool:
    """Store tasks whatever they were before, and end every claim on them.

    One that is pending and stays so keeps its place in line; all others go to the tail. Those
    `promoted` from the schedule stay the tasks that they were, by the token of their append.
    False where the first try has done it, though its answer was lost.
    """
    tasks = tx.tables.tasks
    if tx.repeated and await find_appended(tx, queue, [row.id for row in rows], token):
        return False
    stored = 0
    for chunk in _chunks(rows):
        item = tx.dialect.unnest(_columns(chunk, token, promoted))
        source = _source(tx, literal(queue, Text), item, state)
        insertion = tx.dialect.insert(tasks).from_select(*source)
        new = insertion.excluded
        stays = and_(tasks.c.state == PENDING, new.state == PENDING)
        statement = insertion.on_conflict_do_update(
            index_elements=[tasks.c.queue, tasks.c.id],
            set_={
                **{name: new[name] for name in REPLACED},
                **UNCLAIMED,
                "append_token": func.coalesce(new.append_token, tasks.c.append_token),
                "position": case((stays, tasks.c.position), else_=new.position),
            },
            # Not what an earlier try has stored that was still being committed.
            where=or_(
                new.append_token.is_(None),
                tasks.c.append_token.is_distinct_from(new.append_token),
            ),
        )
        stored += await tx.count(statement)
    if tx.repeated and stored < len(rows):
        return False
    ids = [row.id for row in rows]
    await result_store.check_unseen(tx, queue, sorted(ids))
    results, scheduled = tx.tables.results, tx.tables.scheduled_tasks
    await by_id.change(tx, delete(results), queue, ids)
    await by_id.change(tx, delete(scheduled), queue, ids)
    return True


async def find_appended(tx: Transaction, queue: str, ids: Sequence[str], token: int) -> set[str]:
    """Those of the ids that the append of this token stored, whatever became of them since."""
    found: set[str] = set()
    for table in (tx.tables.tasks, tx.tables.results):
        mine = by_id.find(tx, table, [table.c.id], queue, ids, table.c.append_token == token)
        found.update(row.id for row in await tx.rows(select(mine)))
    return found


async def exists(tx: Transaction, queue: str, task_id: str) -> bool:
    return bool(await get(tx, queue, [task_id]))


async def find(tx: Transaction, queue: str, ids: Sequence[str]) -> set[str]:
    """Those of the ids that are taken, by a task in whatever state."""
    tasks, results = tx.tables.tasks, tx.tables.results
    live = by_id.find(tx, tasks, [tasks.c.id], queue, ids)
    ended = by_id.find(tx, results, [results.c.id], queue, ids, unexpired(tx))
    return {row.id for row in await tx.rows(union_all(select(ended), select(live)))}


async def get(tx: Transaction, queue: str, ids: Sequence[str]) -> dict[str, str]:
    """Payloads by id, in whatever state: one snapshot, so that a moving task is seen once."""
    return {row.id: row.payload for row in await by_id.rows(tx, _in_any_state, queue, ids)}


def _in_any_state(tx: Transaction) -> CompoundSelect[tuple[str, str]]:
    tasks = tx.tables.tasks
    live = by_id.find(tx, tasks, [tasks.c.id, tasks.c.payload], of_queue(), None)
    return union_all(result_store.finished(tx), select(live))


async def lock_waiting(tx: Transaction, queue: str, task_id: str) -> str | None:
    """The payload of a task that waits in line or for its time; None where it does not."""
    tasks = tx.tables.tasks
    statement = select(tasks.c.payload).where(
        tasks.c.queue == queue,
        tasks.c.id == task_id,
        or_(tasks.c.state == PENDING, tasks.c.state == SCHEDULED),
    )
    payload: str | None = await tx.scalar(statement.with_for_update())
    return payload


async def remove(tx: Transaction, queue: str, task_id: str) -> bool:
    """Delete a task in any state, with its schedule; False where there was none to be seen."""
    tasks, results, scheduled = tx.tables.tasks, tx.tables.results, tx.tables.scheduled_tasks
    live = delete(tasks).where(tasks.c.queue == queue, tasks.c.id == task_id)
    ended = delete(results).where(results.c.queue == queue, results.c.id == task_id)
    existed = await tx.count(live) > 0
    # What the DELETE itself removes: somebody else may be doing the same.
    removed = await tx.rows(ended.returning(unexpired(tx).label("was_seen")))
    existed |= any(row.was_seen for row in removed)
    await tx.execute(
        delete(scheduled).where(scheduled.c.queue == queue, scheduled.c.task_id == task_id)
    )
    return existed


async def get_all(tx: Transaction, queue: str) -> list[str]:
    """Every stored payload, live ones last."""
    tasks, results = tx.tables.tasks, tx.tables.results
    ended = select(results.c.payload).where(results.c.queue == queue, unexpired(tx))
    live = select(tasks.c.payload).where(tasks.c.queue == queue)
    return [row.payload for row in await tx.rows(union_all(ended, live))]


async def get_pending(tx: Transaction, queue: str, count: int) -> list[str]:
    """The payloads that `claim` would take next."""
    tasks = tx.tables.tasks
    statement = (
        select(tasks.c.payload)
        .where(tasks.c.queue == queue, tasks.c.state == PENDING)
        .order_by(tasks.c.position)
        .limit(count)
    )
    return [row.payload for row in await tx.rows(statement)]


async def size(tx: Transaction, queue: str) -> int:
    """How many tasks wait to be taken."""
    tasks = tx.tables.tasks
    waiting = select(func.count()).where(tasks.c.queue == queue, tasks.c.state == PENDING)
    return int(await tx.scalar(waiting))


async def _remove_finished(
    tx: Transaction, queue: str, ids: Sequence[str], token: int, *, of_append: bool = False
) -> set[str]:
    """The ids just added that stand among the results after all; removed again.

    `of_append`: only those that this very append has stored before.
    """
    more = {"of_token": token} if of_append else {}
    finished = await by_id.rows(tx, _taken, queue, ids, of_append, **more)
    if not finished:
        return set()
    tasks, ended = tx.tables.tasks, [row.id for row in finished]
    return await by_id.change(tx, delete(tasks), queue, ended, tasks.c.append_token == token)


def _taken(tx: Transaction, of_append: bool) -> Select[tuple[str]]:
    """Ids that stand among the results and are not free: by the append `of_token`, or by any."""
    results = tx.tables.results
    taken = [or_(unexpired(tx), is_held(tx))]
    if of_append:
        taken.append(results.c.append_token == bindparam("of_token", type_=BigInteger))
    return select(by_id.find(tx, results, [results.c.id], of_queue(), None, *taken))


def _adding(tx: Transaction, pending: bool) -> Executable:
    tasks = tx.tables.tasks
    item = tx.dialect.unnest(without_lists(_columns((), 0)))
    source = _source(tx, of_queue(), item, PENDING if pending else SCHEDULED)
    insertion = tx.dialect.insert(tasks).from_select(*source)
    return insertion.on_conflict_do_nothing().returning(tasks.c.id)


def _columns(rows: Sequence[TaskRow], token: int, promoted: Container[str] = ()) -> Columns:
    """What is stored of tasks, in the order of their ids, and the places that the caller gave."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].id)
    return {
        "id": (Text(), [rows[index].id for index in order]),
        "payload": (Text(), [rows[index].payload for index in order]),
        "func": (Text(), [rows[index].func for index in order]),
        "status": (Text(), [rows[index].status for index in order]),
        "created_at": (Timestamp(), [rows[index].created_at for index in order]),
        "append_token": (
            BigInteger(),
            [None if rows[index].id in promoted else token for index in order],
        ),
        "place": (BigInteger(), order),
    }


def _source(
    tx: Transaction, queue: ColumnElement[str], item: FromClause, state: ColumnElement[str]
) -> tuple[list[str], Select[Any]]:
    """Columns and SELECT for an INSERT: positions in the caller's order, locks in the ids'."""
    copied = ("id", "payload", "func", "status", "created_at", "append_token")
    values = {
        **{name: item.c[name] for name in copied},
        "queue": queue,
        "state": state,
        "position": _first_position(tx, queue) + item.c.place if state is PENDING else null(),
    }
    return list(values), select(*values.values()).order_by(item.c.ordinal)


def _first_position(tx: Transaction, queue: ColumnElement[str]) -> ScalarSelect[int]:
    """The first of at least STATEMENT_ROWS positions behind every pending task."""
    if tx.dialect.embedded:
        tasks = tx.tables.tasks
        last = func.coalesce(func.max(tasks.c.position), 0)
        return select(last + 1).where(tasks.c.queue == queue).scalar_subquery()
    return select(tx.tables.positions.next_value()).scalar_subquery()


def _chunks(rows: Sequence[TaskRow]) -> Iterator[Sequence[TaskRow]]:
    """The rows in pieces that one statement can carry."""
    start = size = 0
    for end, row in enumerate(rows):
        full = end - start == STATEMENT_ROWS or size + len(row.payload) > STATEMENT_BYTES
        if full and end > start:
            yield rows[start:end]
            start, size = end, 0
        size += len(row.payload)
    if start < len(rows):
        yield rows[start:]
