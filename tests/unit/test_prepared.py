"""Statements as a driver takes them."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, bindparam, insert, literal, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import psycopg

from sheppy_sql._dialects import dialect_named
from sheppy_sql._prepared import prepare
from sheppy_sql._urls import parse
from sheppy_sql.schema import Timestamp

given = select(bindparam("count", type_=Integer), literal("mine", Text), bindparam("x", 7, Integer))


@pytest.mark.parametrize("named", [False, True])
def test_parameters_are_given_or_have_their_defaults(named: bool) -> None:
    dialect = psycopg.dialect() if named else sqlite.dialect()  # type: ignore[no-untyped-call]  # not yet typed
    prepared = prepare(given, dialect)
    assert prepared.values({"count": 3}) == [3, "mine", 7]
    assert prepared.values({"count": 3, "x": None}) == [3, "mine", None]
    assert len({parameter.name for parameter in prepared.parameters}) == 3


def test_parameter_that_is_missing_is_an_error_and_no_null() -> None:
    with pytest.raises(KeyError, match="count"):
        prepare(given, sqlite.dialect()).values({"x": 1})


async def test_statement_that_looks_at_the_clock_is_not_taken_for_one_that_is_given_a_time() -> (
    None
):
    dialect = dialect_named("sqlite")
    times = Table("times", MetaData(), Column("at", Timestamp))
    past = datetime(2001, 1, 1, tzinfo=timezone.utc)
    engine = dialect.create_engine(parse("sqlite+aiosqlite://"), pool_size=1, connect_timeout=1)
    async with engine.connect() as connection:
        await connection.run_sync(times.create)
        for moment in (literal(past, Timestamp), dialect.now(), dialect.now(plus=60)):
            await connection.execute(insert(times).values(at=moment))
        first, second, third = (await connection.scalars(select(times.c.at))).all()
    await engine.dispose()
    assert first == past
    assert past < second < third
