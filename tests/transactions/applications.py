"""Synchronous applications: what they have in their hands, and what they do with it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import psycopg2
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from tests.support.databases import TestDatabase

KINDS = ("driver", "other driver", "connection", "session")
"""sqlite3 or psycopg; sqlite3 where the application begins, or psycopg2; SQLAlchemy's two."""

ORDERS = "CREATE TABLE orders (id integer PRIMARY KEY)"


class Application:
    """One connection of an application with a table of orders."""

    def __init__(self, connection: Any, begin: str | None = None) -> None:
        self.connection = connection
        self._begin = begin

    @property
    def begins_itself(self) -> bool:
        """Whether the driver would begin nothing."""
        return self._begin is not None

    @property
    def in_transaction(self) -> bool:
        """Whether its connection is in one now, whoever has begun it."""
        raw = self.connection
        if isinstance(raw, Session):
            return raw.in_transaction()
        if isinstance(raw, Connection):
            return raw.in_transaction()
        if isinstance(raw, sqlite3.Connection):
            return raw.in_transaction
        return bool(raw.info.transaction_status)

    def execute(self, sql: str) -> None:
        if self._begin and not self.connection.in_transaction:
            self.connection.execute(self._begin)
        if isinstance(self.connection, (sqlite3.Connection, psycopg.Connection)):
            self.connection.execute(sql)
        elif isinstance(self.connection, psycopg2.extensions.connection):
            with self.connection.cursor() as cursor:
                cursor.execute(sql)
        else:
            self.connection.execute(text(sql))

    def place_order(self, number: int) -> None:
        self.execute(f"INSERT INTO orders (id) VALUES ({number})")

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()

    def close(self) -> None:
        self.connection.close()


def dsn(database: TestDatabase) -> str:
    """As psycopg takes it; the path of a file for sqlite3."""
    url = make_url(database.url)
    if database.dialect == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def engine_url(database: TestDatabase, driver: str = "psycopg") -> URL:
    """The database's URL for a synchronous engine."""
    url = make_url(database.url)
    name = "sqlite" if database.dialect == "sqlite" else f"postgresql+{driver}"
    return url.set(drivername=name)


def connect(database: TestDatabase, *, other: bool = False, **options: Any) -> Any:
    """A connection of a driver, of the other one where there are two."""
    if database.dialect == "sqlite":
        return sqlite3.connect(dsn(database), check_same_thread=False, **options)
    return (psycopg2 if other else psycopg).connect(dsn(database), **options)


@contextmanager
def application(database: TestDatabase, kind: str) -> Iterator[Application]:
    """A running application; its table is there."""
    with contextlib.closing(connect(database)) as first:
        with contextlib.suppress(sqlite3.OperationalError, psycopg.errors.DuplicateTable):
            first.execute(ORDERS)
            first.commit()
    with contextlib.ExitStack() as stack:
        if kind in {"driver", "other driver"}:
            other = kind == "other driver"
            by_itself = other and database.dialect == "sqlite"
            options = {"isolation_level": None} if by_itself else {}
            app = Application(
                connect(database, other=other, **options), "BEGIN" if by_itself else None
            )
        else:
            driver = "psycopg2" if kind == "connection" else "psycopg"
            engine = create_engine(engine_url(database, driver))
            stack.callback(engine.dispose)
            app = Application(engine.connect() if kind == "connection" else Session(engine))
        stack.callback(app.close)
        yield app
