"""Backend instances that take tasks, and the signs of life of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import and_, delete, func, null, or_, select

from .._process import Process
from ..schema import CLAIMED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement

    from .._transaction import Transaction

LONGEST_ABSENCE = 600.0
"""Seconds after its death for which a consumer is still known.

A claim that it committed in the very moment of its death is found by it.
"""
LONGEST_UNKNOWN = 3600.0
"""Seconds after its last claim for which an owner that is no consumer is left alone."""


class Policy(NamedTuple):
    """What a worker's death means for the tasks that it had."""

    on_crash: str
    max_crashes: int


class Absentee(NamedTuple):
    """A consumer that is dead, or whose process may be."""

    id: str
    expired: bool
    process: Process
    policy: Policy


async def beat(
    tx: Transaction,
    owner: str,
    process: Process,
    policy: Policy,
    *,
    lease: float,
    loop_idle: float,
) -> None:
    """A sign of life: the owner's claims are good for `lease` seconds from now.

    `loop_idle`: seconds since its event loop was last seen to turn.
    """
    consumers = tx.tables.consumers
    signs = {
        "heartbeat_at": tx.dialect.now(),
        "expires_at": tx.dialect.now(plus=lease),
        "loop_turned_at": tx.dialect.now(plus=-loop_idle),
    }
    first = tx.dialect.insert(consumers).values(
        id=owner, **signs, **policy._asdict(), **process._asdict()
    )
    await tx.execute(first.on_conflict_do_update(index_elements=[consumers.c.id], set_=signs))


async def remove(tx: Transaction, owner: str) -> None:
    consumers = tx.tables.consumers
    await tx.execute(delete(consumers).where(consumers.c.id == owner))


def is_alive(tx: Transaction, owner: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether an owner is a consumer that has not expired."""
    consumers = tx.tables.consumers
    alive = select(null()).where(consumers.c.id == owner, consumers.c.expires_at > tx.dialect.now())
    return alive.exists()


async def get_absentees(tx: Transaction, owner: str, process: Process) -> list[Absentee]:
    """Other consumers that hold tasks and have expired, or could be seen to be gone from here."""
    consumers = tx.tables.consumers
    expired = consumers.c.expires_at <= tx.dialect.now()
    neighbour = and_(
        consumers.c.boot_id == process.boot_id,
        consumers.c.pid_namespace == process.pid_namespace,
    )
    statement = (
        select(consumers, expired.label("expired"))
        .where(consumers.c.id != owner, or_(expired, neighbour), _holds_tasks(tx))
        .order_by(consumers.c.id)
    )
    return [
        Absentee(
            row.id,
            bool(row.expired),
            Process(row.hostname, row.boot_id, row.pid_namespace, row.pid, row.process_started),
            Policy(row.on_crash, row.max_crashes),
        )
        for row in await tx.rows(statement)
    ]


async def lock_expired(tx: Transaction, owner: str) -> bool:
    """Whether a consumer has expired; its next beat waits for the end of this transaction."""
    consumers = tx.tables.consumers
    expired = select(consumers.c.id).where(
        consumers.c.id == owner, consumers.c.expires_at <= tx.dialect.now()
    )
    return await tx.scalar(expired.with_for_update()) is not None


async def get_unknown_owners(tx: Transaction) -> Sequence[str]:
    """Owners who are no consumers and have taken nothing for long: of a release before those."""
    tasks, consumers = tx.tables.tasks, tx.tables.consumers
    known = select(consumers.c.id).where(consumers.c.id == tasks.c.owner).exists()
    statement = (
        select(tasks.c.owner)
        .where(tasks.c.state == CLAIMED, ~known)
        .group_by(tasks.c.owner)
        .having(func.max(tasks.c.heartbeat_at) <= tx.dialect.now(plus=-LONGEST_UNKNOWN))
        .order_by(tasks.c.owner)
    )
    return [row.owner for row in await tx.rows(statement)]


async def prune(tx: Transaction) -> None:
    """Forget consumers that died long ago and hold nothing."""
    consumers = tx.tables.consumers
    long_dead = consumers.c.expires_at <= tx.dialect.now(plus=-LONGEST_ABSENCE)
    await tx.execute(delete(consumers).where(long_dead, ~_holds_tasks(tx)))


def _holds_tasks(tx: Transaction) -> Any:
    tasks, consumers = tx.tables.tasks, tx.tables.consumers
    held = select(null()).where(tasks.c.owner == consumers.c.id, tasks.c.state == CLAIMED)
    return held.exists()
