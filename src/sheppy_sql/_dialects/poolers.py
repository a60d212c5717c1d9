"""What asyncpg needs behind a pooler, such as PgBouncer, that changes servers between transactions.

There a statement with a name is prepared on one server and then missing on another, or another
client has its name. One without a name is sent again with every execution, in one message with it.
asyncpg does that where its own cache is off; it costs the server the parsing, and no round trip.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import column, select, table

if TYPE_CHECKING:
    from sqlalchemy import Connection

SETTINGS = 'connect_args={"statement_cache_size": 0, "prepared_statement_name_func": lambda: ""}'
"""For create_async_engine, as a message quotes them."""

BY_INDEX = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET jit = off"
"""For statements that are kept, with their plans.

Those may be made for tables that are all but empty, where it is best to read the whole and sort
it. A queue that then fills up would be read so for every claim, until autovacuum looks at it. And
what must be read whole, as nothing else is possible, would seem so expensive that it is compiled.
"""
_CACHE = "statement_cache_size"
_NAME = "prepared_statement_name_func"
_OURS_OF_ASYNCPG = "__asyncpg_stmt_"  # with a number that every process counts from 1
_OURS_OF_PGBOUNCER = "PGBOUNCER_"  # its own name for ours: since 1.21 it prepares where needed

_numbers = itertools.count(1)


class Statements:
    """Whether the connections of an engine of ours keep prepared statements, and by which names."""

    def __init__(self, prepared: bool | None, given: dict[str, Any], *, ours_alone: bool) -> None:
        """`prepared`: None to have the first connection tell what lies before the server.

        A cache size that the URL has `given` decides, as 0 does with asyncpg itself. `ours_alone`:
        nobody else's statements are executed on these connections.
        """
        self.kept = given[_CACHE] > 0 if _CACHE in given else prepared
        """None where it is not known yet."""
        self._given = given
        self._ours_alone = ours_alone

    @property
    def connect_args(self) -> dict[str, Any]:
        """What create_async_engine needs for it."""
        if self.kept:
            return self._given
        args = {**self._given, _CACHE: 0, _NAME: self.name}
        return args if self.kept is False else {**args, "async_creator_fn": self._connect}

    def name(self) -> str:
        """The name of the next prepared statement; asyncpg gives none where its cache is off."""
        return f"__sheppy_sql_{next(_numbers):x}__" if self.kept else ""

    async def _connect(self, *args: Any, **kwargs: Any) -> asyncpg.Connection:
        connection = await asyncpg.connect(*args, **kwargs)
        timeout = kwargs.get("timeout")
        try:
            if self.kept is None:
                # Without the cache, asyncpg gives this statement no name.
                pid = await connection.fetchval("SELECT pg_backend_pid()", timeout=timeout)
                self.kept = not is_pooled(connection, pid)
            if self.kept and self._ours_alone:
                await connection.execute(BY_INDEX, timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
        return connection


def is_pooled(connection: asyncpg.Connection, server_pid: int) -> bool:
    """Whether something stands between this connection and the server process it reached.

    A pooler makes up the process that a client may cancel, since it changes.
    """
    return bool(connection.get_server_pid() != server_pid)


def is_fit(connection: Connection) -> bool:
    """Whether the engine's statements work behind a pooler; asked in a transaction."""
    # What is found is this very statement, by a text that no other has.
    label = f"own_{secrets.token_hex(8)}"
    prepared = table("pg_prepared_statements", column("name"), column("statement"))
    statement = (
        select(prepared.c.name.label(label))
        .where(prepared.c.statement.contains(label))
        .order_by(prepared.c.name)
    )
    once = connection.scalars(statement).all()
    again = connection.scalars(statement).all()
    return are_fit(once, again)


def are_fit(once: Sequence[str], again: Sequence[str]) -> bool:
    """The names that one statement had when it was executed, and when it was executed again."""
    if not once or once[0].startswith(_OURS_OF_PGBOUNCER):
        return True
    # With the same name it was kept, for a transaction that may be on another server.
    return not once[0].startswith(_OURS_OF_ASYNCPG) and again != once
