"""Claims that are held: kept alive, ended, handed back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sqlalchemy import literal, null, select, update

from ..schema import CLAIMED, IDLE, PENDING
from . import by_id
from ._common import UNCLAIMED, among, is_under, limited, milliseconds
from .floors import own_xid

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from .._transaction import Transaction


async def renew(
    tx: Transaction, queue: str, claims: Mapping[str, int], _lock_timeout: float
) -> None:
    """A sign of life for claims, tokens by id, that still hold; it waits for no lock."""
    tasks = tx.tables.tasks
    renewed = update(tasks).values(heartbeat_at=tx.dialect.now())
    # One that an open transaction has locked must not keep all others from being renewed.
    await by_id.change(tx, renewed, queue, [*claims], is_under(tx, claims), skip_locked=True)


async def end(tx: Transaction, queue: str, claims: Mapping[str, int], lock_timeout: float) -> None:
    """End claims, tokens by id, where they still hold; the tasks stay, in no queue.

    Fails where a row is locked for longer than `lock_timeout` seconds.
    """
    ended = update(tx.tables.tasks).values(state=IDLE, position=null(), **UNCLAIMED)
    held = [is_under(tx, claims), *limited(tx, literal(milliseconds(lock_timeout)))]
    await by_id.change(tx, ended, queue, [*claims], *held)


async def release(
    tx: Transaction,
    owner: str,
    token: int | None,
    ids: Collection[str] | None = None,
    kept: Collection[str] = (),
) -> set[str]:
    """Hand back what one claim, or (None) the owner, holds; the queues concerned.

    Of a claim only some `ids`, if given, and not those `kept`. Each task goes to its old place in
    line.
    """
    tasks = tx.tables.tasks
    held = under(tx, owner, token)
    if ids is not None:
        held.append(among(tx, tasks.c.id, sorted(ids)))
    if kept:
        held.append(~among(tx, tasks.c.id, sorted(kept)))
    released = update(tasks).values(state=PENDING, pending_xid=own_xid(tx), **UNCLAIMED)
    if tx.dialect.embedded:
        gone = await tx.rows(released.where(*held).returning(tasks.c.queue))
        return {row.queue for row in gone}
    locking = select(tasks.c.queue, tasks.c.id, tasks.c.ctid).where(*held)
    in_turn = locking.order_by(*in_order(tx)).with_for_update()
    return {queue for queue, _ in await by_id.apply(tx, released, in_turn)}


async def lock_claims(tx: Transaction, owner: str) -> Sequence[Any]:
    """The owner's claims, but those that it is ending at this moment."""
    tasks = tx.tables.tasks
    held = (
        select(tasks.c.queue, tasks.c.id, tasks.c.payload, tasks.c.claim_token, tasks.c.crashes)
        .where(*under(tx, owner, None))
        .order_by(*in_order(tx))
        .with_for_update(skip_locked=True)
    )
    return await tx.rows(held)


async def release_crashed(tx: Transaction, owner: str, claimed: Iterable[tuple[str, str]]) -> None:
    """Return a dead owner's tasks, (queue, id) in order, to their old places in line."""
    tasks = tx.tables.tasks
    for queue, of_queue in groupby(claimed, key=lambda claim: claim[0]):
        ids = [task_id for _, task_id in of_queue]
        returned = update(tasks).values(
            state=PENDING, pending_xid=own_xid(tx), crashes=tasks.c.crashes + 1, **UNCLAIMED
        )
        await by_id.change(tx, returned, queue, ids, *under(tx, owner, None))


def under(tx: Transaction, owner: str, token: int | None) -> list[ColumnElement[bool]]:
    """Under one claim of an owner, or (None) any."""
    tasks = tx.tables.tasks
    held = [tasks.c.owner == owner, tasks.c.state == CLAIMED]
    return held if token is None else [*held, tasks.c.claim_token == token]


def in_order(tx: Transaction) -> list[ColumnElement[str]]:
    """The order in which everybody locks tasks, of which few are looked for.

    Expressions, lest the primary key be searched, which holds all of them.
    """
    tasks = tx.tables.tasks
    return [tasks.c.queue.concat(""), tasks.c.id.concat("")]
