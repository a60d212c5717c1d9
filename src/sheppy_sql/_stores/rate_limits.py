"""Rate limiters: who may start now, and how long the others wait."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, select, update

if TYPE_CHECKING:
    from .._transaction import Transaction

SHORTEST_WAIT = 0.01  # seconds, the host's


async def acquire(
    tx: Transaction,
    queue: str,
    key: str,
    task_id: str,
    *,
    max_rate: int,
    period: timedelta,
    fixed_window: bool,
) -> tuple[float, str] | None:
    """None where the task may start, its place in the window taken.

    Else seconds to wait, and until when that is by the database's clock, in ISO format.

    Sliding: at most `max_rate` starts in the last `period`. Fixed: at most that
    many since the window's first start. Those who wait are spread out, one
    every period / max_rate, by a slot that both kinds share.
    """
    limiter = await _lock(tx, queue, key)
    # After the lock: whoever waited for it must not judge by an older clock.
    now = await _now(tx)
    attempt = _fixed if fixed_window else _sliding
    opens_at = await attempt(tx, limiter, task_id, max_rate, period, now)
    if opens_at is None:
        return None
    slot = max(opens_at, now + timedelta(seconds=SHORTEST_WAIT))
    if limiter.next_slot_at is not None:
        slot = max(slot, limiter.next_slot_at + period / max_rate)
    await _save(tx, limiter, next_slot_at=slot)
    return (slot - now).total_seconds(), slot.isoformat()


async def _lock(tx: Transaction, queue: str, key: str) -> Any:
    """The limiter's row, made if need be; it is the limiter's lock."""
    limits = tx.tables.rate_limits
    made = tx.dialect.insert(limits).values(queue=queue, key=key, window_count=0)
    # One statement: between two, a clear might delete the row.
    locked = made.on_conflict_do_update(
        index_elements=[limits.c.queue, limits.c.key], set_={"key": made.excluded.key}
    )
    return (await tx.rows(locked.returning(*limits.c)))[0]


async def _now(tx: Transaction) -> datetime:
    now: datetime = await tx.scalar(select(tx.dialect.now()))
    return now


async def _sliding(
    tx: Transaction,
    limiter: Any,
    task_id: str,
    max_rate: int,
    period: timedelta,
    now: datetime,
) -> datetime | None:
    """When the window opens; None where the task has just entered it."""
    entries = tx.tables.rate_limit_entries
    window = (entries.c.queue == limiter.queue, entries.c.key == limiter.key)
    await tx.execute(delete(entries).where(*window, entries.c.acquired_at <= now - period))
    counted = select(func.count(), func.min(entries.c.acquired_at)).where(*window)
    taken, oldest = (await tx.rows(counted))[0]
    if taken < max_rate:
        # One entry a start, not a task: a retry starts as well.
        entry = tx.dialect.insert(entries).values(
            queue=limiter.queue, key=limiter.key, task_id=task_id, acquired_at=now
        )
        await tx.execute(entry.on_conflict_do_nothing())
        return None
    opens_at: datetime = oldest + period
    return opens_at


async def _fixed(
    tx: Transaction,
    limiter: Any,
    task_id: str,
    max_rate: int,
    period: timedelta,
    now: datetime,
) -> datetime | None:
    """When the window ends; None where the task has just entered it."""
    started: datetime | None = limiter.window_started_at
    if started is None or now - started >= period:
        await _save(tx, limiter, window_started_at=now, window_count=1)
        return None
    if limiter.window_count < max_rate:
        await _save(tx, limiter, window_count=limiter.window_count + 1)
        return None
    return started + period


async def _save(tx: Transaction, limiter: Any, **values: Any) -> None:
    limits = tx.tables.rate_limits
    mine = (limits.c.queue == limiter.queue, limits.c.key == limiter.key)
    await tx.execute(update(limits).where(*mine).values(**values))
