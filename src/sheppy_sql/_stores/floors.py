"""Looking from a floor on: the ranges in which rows may be, and what the next floor is made of.

PostgreSQL only, but for `own_xid`: on SQLite nothing keeps deleted rows in an index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import ARRAY, BigInteger, Text, bindparam, cast, column, func, null, select, true
from sqlalchemy.dialects.postgresql import REGCLASS
from sqlalchemy.types import UserDefinedType

from .._floors import Seen
from ..schema import ELSEWHERE

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Label, Row, ScalarSelect, Select, Subquery
    from sqlalchemy import Sequence as DatabaseSequence

    from .._floors import Floor
    from .._transaction import Transaction

    Conditions = Sequence[ColumnElement[bool]]

P = TypeVar("P")


class _Xid8(UserDefinedType[int]):
    """A transaction's id that is never used twice. Our columns keep it as a bigint."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


@dataclass(frozen=True, slots=True)
class Line:
    """The rows of a table that stand in a line, by the two indexes in which they are found."""

    queue: ColumnElement[str]
    place: ColumnElement[Any]
    condition: Conditions
    """Of the index by place."""
    xid: ColumnElement[int]
    hidden_condition: Conditions
    """Of the index by xid."""
    hide: Callable[[ColumnElement[Any]], ColumnElement[Any]]
    """Makes of a place what the index by xid has, and no other index."""


@dataclass(frozen=True, slots=True)
class Range:
    """Some of the rows that a floor leaves, no two ranges have one in common."""

    conditions: Conditions
    place: ColumnElement[Any]
    xids: Subquery | None = None
    """Of the transactions that made them takeable, as `xid`."""
    xid: ColumnElement[int] | None = None

    def select(
        self,
        *columns: ColumnElement[Any],
        where: Conditions = (),
        limit: Any = None,
        lock: bool = False,
    ) -> Select[Any]:
        """Rows in the order of the line; `columns` have its place among them."""
        found = select(*columns).where(*self.conditions, *where).order_by(self.place).limit(limit)
        if lock:
            found = found.with_for_update(skip_locked=True)
        if self.xids is None or self.xid is None:
            return found
        # A search for each of them, as the planner would not do with a list.
        each = found.where(self.xid == self.xids.c.xid).lateral("each")
        joined = select(each).select_from(self.xids.join(each, true()))
        return joined.order_by(each.c[self.place.key or ""]).limit(limit)


def ranges(line: Line, *, running: bool) -> list[Range]:
    """Where rows may be: what was made takeable since, below the floor, and all above it.

    The statement needs the `parameters` of a floor; `running`: of one that has some.
    """
    queue = bindparam("in_queue", type_=Text())
    start = bindparam("floor_start", type_=line.place.type)
    below = [
        line.queue.collate(ELSEWHERE) == queue,
        line.hide(line.place) < line.hide(start),
        *line.hidden_condition,
    ]
    above = [line.queue == queue, line.place >= start, *line.condition]
    since = line.xid >= bindparam("floor_xid", type_=BigInteger)
    found = [Range([since, *below], line.place)]
    if running:
        found.append(Range(below, line.place, _ended(), line.xid))
    return [*found, Range(above, line.place)]


def parameters(queue: str, floor: Floor[Any]) -> dict[str, Any]:
    given = {"in_queue": queue, "floor_start": floor.start, "floor_xid": floor.next_xid}
    return {**given, "floor_running": list(floor.running)} if floor.running else given


def first(found: Sequence[Range], *, where: Conditions = ()) -> ColumnElement[Any]:
    """The first place that the statement's snapshot shows, whoever has locked its row."""
    lowest: list[ScalarSelect[Any]] = [
        each.select(each.place, where=where, limit=1).scalar_subquery() for each in found
    ]
    return func.least(*lowest, type_=found[0].place.type)


def seen(start: ColumnElement[Any]) -> list[Label[Any]]:
    """What a statement has to return for `read_seen`, which any one of its rows tells."""
    return [
        start.label("seen_start"),
        cast(func.pg_current_snapshot(), Text).label("seen_snapshot"),
        _as_number(func.pg_current_xact_id_if_assigned()).label("seen_xid"),
    ]


def read_seen(row: Row[Any]) -> Seen[Any]:
    return Seen(row.seen_start, row.seen_snapshot, row.seen_xid)


def own_xid(tx: Transaction) -> ColumnElement[Any]:
    """For a row that this transaction makes takeable; null where there are no floors."""
    return null() if tx.dialect.embedded else _as_number(func.pg_current_xact_id())


def last_value(sequence: DatabaseSequence) -> ColumnElement[int]:
    """The last value that anybody got of a sequence; null where nobody has."""
    path = ".".join(
        '"' + part.replace('"', '""') + '"' for part in (sequence.schema, sequence.name) if part
    )
    return func.pg_sequence_last_value(cast(path, REGCLASS), type_=BigInteger)


def _ended() -> Subquery:
    """Those running then whose transactions have ended: of others nothing is to be seen yet."""
    given = (
        func.unnest(bindparam("floor_running", type_=ARRAY(BigInteger)))
        .table_valued(column("xid", BigInteger), name="given")
        .render_derived()
    )
    xid8 = cast(cast(given.c.xid, Text), _Xid8)
    visible = func.pg_visible_in_snapshot(xid8, func.pg_current_snapshot())
    return select(given.c.xid).where(visible).subquery("ended")


def _as_number(xid: ColumnElement[Any]) -> ColumnElement[int]:
    return cast(cast(xid, Text), BigInteger)
