"""Tasks that ran to their end: moved to the results."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Float,
    Interval,
    Text,
    bindparam,
    delete,
    literal,
    select,
    true,
    tuple_,
)

from ..schema import Timestamp
from . import by_id, setting_aside
from . import notifications as notification_store
from . import results as result_store
from . import scheduled as schedule_store
from ._common import (
    limited,
    made_once,
    milliseconds,
    of_queue,
    tries,
    without_lists,
)

if TYPE_CHECKING:
    from sqlalchemy import Executable, Select

    from .._dialects.base import Columns
    from .._payloads import TaskRow
    from .._transaction import Transaction
    from .._waiting import Notice


LARGE = 100_000
"""Characters of a payload that SQLite gets faster as it is than in a list, as JSON once more."""


class Ended(NamedTuple):
    """A task that ran to its end under a claim."""

    row: TaskRow
    token: int
    ttl: float | None
    """Seconds to keep it; None for ever."""


async def finish(
    tx: Transaction, queue: str, row: TaskRow, token: int | None, ttl: float | None
) -> bool:
    """Move a task to the results for `ttl` seconds (None: for ever).

    With a claim's token only while that claim holds, else False. Without one,
    whatever the task was before.
    """
    tasks = tx.tables.tasks
    mine = delete(tasks).where(tasks.c.queue == queue, tasks.c.id == row.id)
    if token is None:
        # Stored first, so that its row is locked: it is what keeps the id unique.
        await setting_aside.store(tx, queue, row)
        await schedule_store.remove(tx, queue, row.id)
    else:
        mine = mine.where(tasks.c.claim_token == token)
    ended = await tx.rows(mine.returning(tasks.c.append_token))
    if not ended:
        # Stored at the first try, though its answer was lost?
        return tx.repeated and await result_store.is_of_claim(tx, queue, row.id, token)
    await result_store.put(tx, queue, row, token, ended[0].append_token, ttl)
    return True


async def has_finished(tx: Transaction, queue: str, task_id: str, token: int) -> bool:
    """Whether a claim ended in a result; waits for a transaction that is about to end it."""
    tasks = tx.tables.tasks
    claimed = select(1).where(
        tasks.c.queue == queue, tasks.c.id == task_id, tasks.c.claim_token == token
    )
    if await tx.scalar(claimed.with_for_update()) is not None:
        return False
    return await result_store.is_of_claim(tx, queue, task_id, token)


async def finish_all(
    tx: Transaction,
    queue: str,
    ended: Sequence[Ended],
    *,
    lock_timeout: float | None = None,
    notice: Notice | None = None,
) -> list[bool]:
    """`finish` for many tasks, each under a claim of its own; an id occurs once.

    With a lock timeout, in seconds, it fails where a row is locked for longer. A notice is sent
    with the commit.
    """
    if tx.dialect.embedded and len(ended) == 1 and len(ended[0].row.payload) > LARGE:
        return [await finish(tx, queue, *ended[0])]
    if tx.dialect.embedded:
        stored = await _finish_in_two(tx, queue, ended)
    else:
        stored = await _finish_in_one(tx, queue, ended, lock_timeout, notice)
    if tx.repeated and len(stored) < len(ended):
        missing = {one.row.id: one.token for one in ended if one.row.id not in stored}
        stored |= await result_store.of_claims(tx, queue, missing)
    return [one.row.id in stored for one in ended]


async def _finish_in_two(tx: Transaction, queue: str, ended: Sequence[Ended]) -> set[str]:
    """The ids of the tasks that were moved to the results."""
    claims = tx.dialect.lists(_pairs([one.row.id for one in ended], [one.token for one in ended]))
    gone = await tx.rows(made_once(tx, _ending), {"of_queue": queue, **claims})
    append_tokens = {row.id: row.append_token for row in gone}
    moved = [one for one in ended if one.row.id in append_tokens]
    if moved:
        clock: Any = tx.dialect.now()
        now: datetime = clock.effective_value  # of a file's clock, which is here
        ends = [None if one.ttl is None else now + timedelta(seconds=one.ttl) for one in moved]
        tokens = [append_tokens[one.row.id] for one in moved]
        columns = {**_columns(moved), **_more(tokens, ends)}
        given = {"of_queue": queue, **tx.dialect.lists(columns)}
        await tx.rows(made_once(tx, _storing), given)
    return set(append_tokens)


def _ending(tx: Transaction) -> Executable:
    """The statement that deletes tasks under their claims, whose parameters are the _pairs."""
    tasks, pair = tx.tables.tasks, tx.dialect.unnest(without_lists(_pairs((), ())))
    mine = delete(tasks).where(
        tasks.c.queue == of_queue(),
        tasks.c.id.in_(select(pair.c.id)),  # as well, for the index
        tuple_(tasks.c.id, tasks.c.claim_token).in_(select(pair.c.id, pair.c.claim_token)),
    )
    return mine.returning(tasks.c.id, tasks.c.append_token)


def _storing(tx: Transaction) -> Executable:
    """The statement that stores results, whose parameters are lists of _columns and _more."""
    item = tx.dialect.unnest(without_lists({**_columns(()), **_more((), ())}))
    insertion = result_store.insert_all(
        tx, of_queue(), item, append_token=item.c.append_token, expires_at=item.c.expires_at
    )
    return insertion.returning(tx.tables.results.c.id)


def _pairs(ids: Sequence[str], tokens: Sequence[int]) -> Columns:
    return {"id": (Text(), ids), "claim_token": (BigInteger(), tokens)}


def _more(tokens: Sequence[int | None], ends: Sequence[datetime | None]) -> Columns:
    return {"append_token": (BigInteger(), tokens), "expires_at": (Timestamp(), ends)}


async def _finish_in_one(
    tx: Transaction,
    queue: str,
    ended: Sequence[Ended],
    lock_timeout: float | None,
    notice: Notice | None,
) -> set[str]:
    """The ids of the tasks that were moved to the results."""
    is_limited = lock_timeout is not None and not tx.is_callers
    statement = made_once(tx, _finishing, is_limited, notice is not None)
    more: dict[str, Any] = {"of_queue": queue}
    if lock_timeout is not None and is_limited:
        more["lock_timeout"] = milliseconds(lock_timeout)
    if notice is not None:
        more |= notice._asdict()
    left, stored = ended, set[str]()
    numbered = tries()
    while left:
        next(numbered)
        columns = {**_columns(left), "ttl": (Float(), [one.ttl for one in left])}
        given = {**tx.dialect.lists(columns), **more}
        rows = await tx.rows(statement, given)
        stored |= {row.id for row in rows if row.is_stored}
        # A task that was written to between the snapshot and its lock is locked in its newest
        # version, which the same snapshot does not show: a newer one does.
        missed = {row.id for row in rows if not row.is_stored}
        left = [one for one in left if one.row.id in missed]
    return stored


def _finishing(tx: Transaction, is_limited: bool, notifies: bool) -> Select[Any]:
    """The statement that moves tasks to the results; the id of each, and whether it did.

    Its parameters are of_queue, the lists of _columns and ttl, and where they are asked for,
    lock_timeout, and the channel and the text of a notice.
    """
    tasks = tx.tables.tasks
    queue = of_queue()
    item = tx.dialect.unnest(without_lists({**_columns(()), "ttl": (Float(), ())}))
    # In the order of the ids, byte by byte as in the tables: as everybody locks.
    in_order = select(item).order_by(item.c.id.collate("C"))
    given = in_order.cte("given").prefix_with("MATERIALIZED")
    # One search for each, and then by their places on disk: of a join with the tasks the planner
    # may read all of the queue, where it believes that there are few.
    mine = select(tasks.c.id, tasks.c.ctid).where(
        tasks.c.queue == queue,
        tasks.c.id == given.c.id,
        tasks.c.claim_token == given.c.claim_token,
    )
    if is_limited:
        mine = mine.where(*limited(tx, bindparam("lock_timeout", type_=Text)))
    each = mine.with_for_update().lateral("each")
    locked = (
        select(each).select_from(given.join(each, true())).cte("locked").prefix_with("MATERIALIZED")
    )
    gone = (
        delete(tasks)
        .where(by_id.is_at(tasks, locked))
        .returning(tasks.c.id, tasks.c.append_token)
        .cte("gone")
    )
    moved = given.join(gone, gone.c.id == given.c.id)
    insertion = result_store.insert_all(
        tx,
        queue,
        given,
        moved,
        append_token=gone.c.append_token,
        expires_at=tx.dialect.now() + given.c.ttl * literal(timedelta(seconds=1), Interval),
    )
    stored = insertion.returning(tx.tables.results.c.id).cte("stored")
    is_stored = stored.c.id.is_not(None).label("is_stored")
    finished = select(locked.c.id, is_stored).select_from(
        locked.outerjoin(stored, stored.c.id == locked.c.id)
    )
    return finished.add_columns(notification_store.CALL) if notifies else finished


def _columns(ended: Sequence[Ended]) -> Columns:
    rows = [one.row for one in ended]
    return {
        "id": (Text(), [row.id for row in rows]),
        "payload": (Text(), [row.payload for row in rows]),
        "status": (Text(), [row.status for row in rows]),
        "func": (Text(), [row.func for row in rows]),
        "claim_token": (BigInteger(), [one.token for one in ended]),
    }
