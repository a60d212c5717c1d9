"""New tasks by one statement: a function that the revisions have made on the server.

Its own statements each see what has been committed meanwhile, which one INSERT would not: an id may
be finishing at this moment. And there is one round trip to wait for, with its COMMIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, BigInteger, Boolean, Text, literal, select
from sqlalchemy.sql.functions import Function

from ..schema import Timestamp

if TYPE_CHECKING:
    from .._database import Transaction
    from .._payloads import TaskRow


async def append(
    tx: Transaction,
    queue: str,
    rows: Sequence[TaskRow],
    token: int,
    *,
    registers: bool,
    lock_timeout: float,
) -> set[str]:
    """The ids that were new to the queue, now in line; an id occurs once in `rows`.

    Fails where a row is locked for longer than `lock_timeout` seconds. The same ids again where it
    is repeated under the same token. `registers`: the queue becomes known.
    """
    # In the order of the ids, as everybody locks; the places are the caller's order.
    order = sorted(range(len(rows)), key=lambda index: rows[index].id)
    ordered = [rows[index] for index in order]

    def array(type_: Any, values: list[Any]) -> Any:
        return literal(values, ARRAY(type_))

    # What is set is set until the transaction ends, which is not to be felt in the caller's.
    limit = None if tx.is_callers else f"{round(lock_timeout * 1000)}ms"
    appended = Function(
        tx.tables.append.name,
        literal(queue, Text),
        literal(token, BigInteger),
        literal(limit, Text),
        literal(registers, Boolean),
        array(Text(), [row.id for row in ordered]),
        array(Text(), [row.payload for row in ordered]),
        array(Text(), [row.func for row in ordered]),
        array(Text(), [row.status for row in ordered]),
        array(Timestamp(), [row.created_at for row in ordered]),
        array(BigInteger(), order),
        type_=Text(),
        packagenames=tx.tables.append.schema,
    )
    return {row.id for row in await tx.rows(select(appended.label("id")))}
