"""Taking tasks: what waits in line, and what others have let lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Integer,
    Text,
    bindparam,
    func,
    literal_column,
    select,
    true,
    union_all,
    update,
)

from ..schema import CLAIMED, PENDING, POSITION_STEP
from . import by_id, claims, floors
from . import consumers as consumer_store
from ._common import made_once, of_queue, tries
from .floors import Line

if TYPE_CHECKING:
    from sqlalchemy import CTE, Column, ColumnElement, Select, Subquery, Update

    from .._floors import Look
    from .._transaction import Transaction

MOST_STALE = 1000
"""Claims that one call takes over, the host's number."""


# A literal, like the states: a partial index has it in its predicate.
NONE = literal_column("0", Integer)


async def has_pending(
    tx: Transaction, queue: str, *, suspects: bool = False, look: Look[int] | None = None
) -> bool:
    """Whether a claim could find anything; `look` as for a claim."""
    if look is not None and not tx.dialect.embedded:
        floor = look.begin(tx.connection)
        looking = made_once(tx, _looking_above, bool(floor.running))
        [row] = await tx.rows(looking, floors.parameters(queue, floor))
        look.saw(floors.read_seen(row))
        return bool(row.is_any)
    return bool(await tx.rows(made_once(tx, _looking, suspects), {"of_queue": queue}))


async def claim(
    tx: Transaction,
    queue: str,
    limit: int,
    owner: str,
    token: int,
    *,
    look: Look[int],
    suspects: bool = False,
) -> list[tuple[str, str]]:
    """(id, payload) of up to `limit` pending tasks, now the owner's, first in first out.

    Either of those whose worker has never died, or of the others, the suspects. Tasks that
    another transaction has locked are skipped, not waited for. `look` says where to begin, and is
    told of what was seen.
    """
    tasks = tx.tables.tasks
    if tx.repeated:
        # Claimed at the first try, though its answer was lost?
        mine = select(tasks.c.id, tasks.c.payload).where(*claims.under(tx, owner, token))
        if taken := await tx.rows(mine.order_by(tasks.c.position)):
            return [(row.id, row.payload) for row in taken]
    # There are few suspects, in an index of their own.
    if not (suspects or tx.dialect.embedded):
        return await _claim_above(tx, queue, limit, owner, token, look)
    given = {"of_queue": queue, "at_most": limit, "new_owner": owner, "new_token": token}
    rows = await tx.rows(made_once(tx, _claiming, suspects), given)
    # RETURNING promises no order.
    claimed = sorted(rows, key=lambda row: row.position)
    return [(row.id, row.payload) for row in claimed]


async def get_suspect_queues(tx: Transaction) -> list[str]:
    """Queues in which a task waits whose worker has died."""
    tasks = tx.tables.tasks
    waiting = select(tasks.c.queue).where(tasks.c.state == PENDING, tasks.c.crashes > NONE)
    return [row.queue for row in await tx.rows(waiting.group_by(tasks.c.queue))]


async def take_over(
    tx: Transaction,
    queue: str,
    min_idle: float,
    owner: str,
    token: int,
    *,
    spare_consumers: bool = False,
) -> list[tuple[str, str]]:
    """(id, payload) of others' claims without a sign of life for `min_idle` seconds, now ours.

    Each counts as a crash. `spare_consumers`: not those of owners who give their signs of life
    as consumers, and live.
    """
    tasks = tx.tables.tasks
    if tx.repeated:
        mine = select(tasks.c.id, tasks.c.payload).where(*claims.under(tx, owner, token))
        if taken := await tx.rows(mine.order_by(tasks.c.id)):
            return [(row.id, row.payload) for row in taken]
    stale = select(_key(tx)).where(
        tasks.c.queue == queue,
        tasks.c.state == CLAIMED,
        tasks.c.owner != owner,
        tasks.c.heartbeat_at <= tx.dialect.now(plus=-min_idle),
    )
    if spare_consumers:
        stale = stale.where(~consumer_store.is_alive(tx, tasks.c.owner))
    stale = stale.order_by(*claims.in_order(tx)).limit(MOST_STALE)
    statement = (
        _take(tx, queue, _locked(stale), owner, token)
        .values(crashes=tasks.c.crashes + 1)
        .returning(tasks.c.id, tasks.c.payload)
    )
    return sorted((row.id, row.payload) for row in await tx.rows(statement))


async def _claim_above(
    tx: Transaction, queue: str, limit: int, owner: str, token: int, look: Look[int]
) -> list[tuple[str, str]]:
    """`claim` from the floor on: one statement, which sees the next floor as well."""
    numbered = tries()
    while True:
        next(numbered)
        floor = look.begin(tx.connection)
        rows = await tx.rows(
            made_once(tx, _claiming_above, bool(floor.running)),
            {
                **floors.parameters(queue, floor),
                "at_most": limit,
                "new_owner": owner,
                "new_token": token,
            },
        )
        look.saw(floors.read_seen(rows[0]))
        claimed = [(row.id, row.payload) for row in rows if row.id is not None]
        # A task that was written to between the snapshot and its lock is picked in its newest
        # version, which the same snapshot does not show: a newer one does.
        if claimed or not rows[0].picked:
            return claimed


def _looking(tx: Transaction, suspects: bool) -> Select[Any]:
    tasks = tx.tables.tasks
    found = select(tasks.c.position).where(*_pending(tx, of_queue(), suspects=suspects))
    # Ordered, or SQLite may prefer the table to the index where one queue holds most tasks.
    return found.order_by(tasks.c.position).limit(1)


def _claiming(tx: Transaction, suspects: bool) -> Update:
    tasks = tx.tables.tasks
    picked = (
        select(_key(tx))
        .where(*_pending(tx, of_queue(), suspects=suspects))
        .order_by(tasks.c.position)
        .limit(bindparam("at_most", type_=BigInteger))
    )
    owner, token = bindparam("new_owner", type_=Text), bindparam("new_token", type_=BigInteger)
    taken = _take(tx, of_queue(), _locked(picked), owner, token)
    return taken.returning(tasks.c.id, tasks.c.payload, tasks.c.position)


def _looking_above(tx: Transaction, running: bool) -> Select[Any]:
    first = floors.first(floors.ranges(_line(tx), running=running))
    return select(first.is_not(None).label("is_any"), *floors.seen(_start(tx, first)))


def _start(tx: Transaction, visible: ColumnElement[Any]) -> ColumnElement[Any]:
    """Where the next look may begin: at the first visible task that stays."""
    # Where there is nothing any start would do: the next task gets a place behind all others.
    behind = floors.last_value(tx.tables.positions) + POSITION_STEP
    return func.coalesce(visible, behind, bindparam("floor_start", type_=BigInteger))


def _claiming_above(tx: Transaction, running: bool) -> Select[Any]:
    tasks = tx.tables.tasks
    found = floors.ranges(_line(tx), running=running)
    picked: list[CTE] = []
    for number, each in enumerate(found):
        left: Any = bindparam("at_most", type_=BigInteger)
        for cte in picked:
            left = left - select(func.count()).select_from(cte).scalar_subquery()
        rows = each.select(tasks.c.ctid, tasks.c.position, limit=left, lock=True)
        picked.append(rows.cte(f"picked_{number}").prefix_with("MATERIALIZED"))
    chosen = union_all(*(select(cte.c.ctid) for cte in picked)).cte("picked")
    any_picked = select(chosen.c.ctid).exists()
    owner, token = bindparam("new_owner", type_=Text), bindparam("new_token", type_=BigInteger)
    taken = (
        _take(tx, bindparam("in_queue", type_=Text), chosen, owner, token)
        .returning(tasks.c.id, tasks.c.payload, tasks.c.position)
        .cte("taken")
    )
    visible = floors.first(found, where=[tasks.c.id.not_in(select(taken.c.id).correlate(None))])
    start = _start(tx, visible)
    always = select(literal_column("1").label("row")).subquery("always")
    return (
        select(taken, any_picked.label("picked"), *floors.seen(start))
        .select_from(always.outerjoin(taken, true()))
        .order_by(taken.c.position)
    )


def _take(tx: Transaction, queue: Any, picked: CTE | Subquery, owner: Any, token: Any) -> Update:
    """Make picked tasks of a queue, which are locked, the owner's."""
    tasks = tx.tables.tasks
    key = _key(tx)
    chosen = select(picked.c[key.name])
    # By its place on disk. By its id the planner may prefer to read all rows of the queue: where
    # it believes that there are few, as there were when it made the plan or counted last.
    mine = (
        [tasks.c.queue == queue, key.in_(chosen)]
        if tx.dialect.embedded
        else [by_id.is_at(tasks, picked)]
    )
    return (
        update(tasks)
        .where(*mine)
        .values(state=CLAIMED, owner=owner, claim_token=token, heartbeat_at=tx.dialect.now())
    )


def _key(tx: Transaction) -> Column[Any]:
    """What a task that is picked is then known by."""
    tasks = tx.tables.tasks
    return tasks.c.id if tx.dialect.embedded else tasks.c.ctid


def _locked(picked: Select[Any]) -> CTE:
    """The rows but those that others have locked."""
    # MATERIALIZED: inlined, the planner may run the LIMIT again per row and claim too many.
    return picked.with_for_update(skip_locked=True).cte("picked").prefix_with("MATERIALIZED")


def _line(tx: Transaction) -> Line:
    """The tasks that can be taken by whoever comes."""
    tasks = tx.tables.tasks
    return Line(
        queue=tasks.c.queue,
        place=tasks.c.position,
        condition=[tasks.c.state == PENDING, tasks.c.crashes == NONE],
        xid=tasks.c.pending_xid,
        hidden_condition=[tasks.c.state.like(PENDING), tasks.c.crashes == NONE],
        hide=lambda position: position,
    )


def _pending(
    tx: Transaction, queue: ColumnElement[str], *, suspects: bool
) -> list[ColumnElement[bool]]:
    tasks = tx.tables.tasks
    crashed = tasks.c.crashes > NONE if suspects else tasks.c.crashes == NONE
    return [tasks.c.queue == queue, tasks.c.state == PENDING, crashed]
