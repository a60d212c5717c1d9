"""What a driver's error means, and the one sentence that a person gets to read."""

from __future__ import annotations

import asyncio
import enum
import ssl
from collections.abc import Iterator

from sheppy import BackendError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

UPGRADE_HINT = 'run "sheppy-sql db upgrade --url URL" (or "alembic upgrade head")'

VERSION_HINT = f"{UPGRADE_HINT}, or upgrade sheppy-sql where the tables are the newer ones"


class RejectedError(BackendError):
    """The database takes no offence at the call, but at one of the rows in it."""


class LockedError(Exception):
    """A statement that was not to wait met a lock; nothing was written."""


class TransactionConflictError(BackendError):
    """The caller's transaction met another one's: roll it back and run it again, from its start.

    Raised by what is bound to a session: it repeats nothing there.
    """


class Fault(enum.Enum):
    """What can be done about an error."""

    CONFLICT = enum.auto()
    """Rolled back because of somebody else: the same again may work at once."""
    OUTAGE = enum.auto()
    """The way to the database, or it itself, is gone for now: later, on another connection."""
    OTHER = enum.auto()


# PostgreSQL's SQLSTATE: serialization failure, deadlock, lock timeout.
_CONFLICTS = frozenset({"40001", "40P01", "55P03"})

_STARTING = frozenset({"57P03", "53300"})
"""The server is there and takes no connection yet, or no further one."""

# Class 08 (connection), the ends of a session by the server, a server that became read-only
# by a switch-over, and statements prepared on a connection that a pooler gave to others.
_OUTAGES = _STARTING | {"57P01", "57P02", "57P05", "25006", "25P03", "25P04", "26000", "42P05"}

# Of asyncpg, which gives its own errors no SQLSTATE.
_BROKEN_CONNECTIONS = ("is closed", "has been released", "operation is in progress")
# Of aiosqlite and sqlite3, in small letters.
_CLOSED_FILES = ("no active connection", "connection closed", "closed database")
_OUTAGE_TYPES = frozenset(
    {
        "InvalidCachedStatementError",
        "OutdatedSchemaCacheError",
        "TargetServerAttributeNotMatched",
        # The driver has lost its way on a connection, as where the server has said that it ends
        # the session, and its end is still to come.
        "InternalClientError",
        "ProtocolError",
    }
)

_POOLER_HINT = (
    "a pooler such as PgBouncer mixes up prepared statements: leave prepared_statements out or set "
    "it to False; for an engine of your own see docs/postgresql.md"
)

_DRIVERS = ("asyncpg", "psycopg", "sqlite3", "aiosqlite")  # psycopg2 as well

_HINTS_BY_STATE = {
    "26000": _POOLER_HINT,
    "42P05": _POOLER_HINT,
    "28P01": "check the user and the password in the URL",
    "28000": "check the user in the URL and pg_hba.conf on the server",
    "3D000": "create the database, or correct its name in the URL",
    "42P01": f"tables are missing or another schema is meant: {UPGRADE_HINT}",
    "3F000": f"the schema is missing: {UPGRADE_HINT}",
    "42703": f"the tables are of another version: {VERSION_HINT}",
    "42883": f"the tables are of another version: {VERSION_HINT}",
    "42501": 'migrate as the owner of the tables; for others it runs "sheppy-sql db grant ROLE"',
    "25P02": "roll back the transaction, which an earlier error has ended",
    "25006": "the server is read-only: connect to the primary",
    "53300": "the server has no free connections: raise max_connections or lower pool_size",
    "55P03": "another transaction holds a lock: end it (pg_stat_activity shows it), then try again",
    "53100": "the server's disk is full: make room",
}

# Python 3.10 has no sqlite_errorcode; SQLite's texts have been the same for decades.
_HINTS_BY_TEXT = {
    "readonly database": "the database file is read-only: check its permissions",
    "unable to open database file": "check that its folder exists and can be written",
    "no such table": f"tables are missing: {UPGRADE_HINT}",
    "no such column": f"the tables are of another version: {VERSION_HINT}",
    "has no column": f"the tables are of another version: {VERSION_HINT}",
    "file is not a database": "the file is something else: check the path in the URL",
    "is locked": "another program holds a long transaction on the file: end it",
    "disk is full": "make room on the disk",
}


# Of SQLAlchemy, whose own texts may quote what failed before.
_HINTS_BY_TYPE = {
    "PendingRollbackError": "roll back the session, whose transaction an earlier error has ended",
    "ResourceClosedError": "the connection is closed",
}


def fault(error: BaseException) -> Fault:
    """What can be done about `error`."""
    root = _root(error)
    if _sqlstate(root) in _CONFLICTS or _is_sqlite_busy(root):
        return Fault.CONFLICT
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return Fault.OUTAGE
    return Fault.OUTAGE if _is_outage(root) else Fault.OTHER


def is_starting(error: BaseException) -> bool:
    """Whether the server is there and only takes no connection for now."""
    return _sqlstate(_root(error)) in _STARTING


def is_missing_table(error: BaseException) -> bool:
    root = _root(error)
    return _sqlstate(root) in {"42P01", "3F000"} or "no such table" in str(root)


def is_driver_error(error: BaseException) -> bool:
    """Whether `error` comes from the database or the way to it, and not from a caller."""
    return isinstance(
        error, (SQLAlchemyError, OSError, asyncio.TimeoutError, ssl.SSLError)
    ) or _module(error).startswith(_DRIVERS)


def is_lock_timeout(error: BaseException) -> bool:
    """Whether a statement gave up waiting for a lock, as it was told to."""
    return _sqlstate(_root(error)) == "55P03"


def is_cancellation(error: BaseException) -> bool:
    """Whether the server has ended a statement that somebody, or a timeout, wanted ended."""
    return _sqlstate(_root(error)) == "57014"


def backend_error(action: str, error: BaseException) -> BackendError:
    """`Failed to <action>: <what the driver said>; <what to do>`, without any payload."""
    root = _root(error)
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        # What the driver says of a broken connection speaks of its own insides.
        return BackendError(f"Failed to {action}: the connection to the database was lost")
    said = _said(root)
    hint = _hint(root)
    kind = RejectedError if _is_rejection(root) else BackendError
    return kind(f"Failed to {action}: {said}{f'; {hint}' if hint else ''}")


def _is_rejection(root: BaseException) -> bool:
    # Data, constraints, limits, and what a trigger raises.
    state = _sqlstate(root)
    return type(root).__name__ == "IntegrityError" or (state or "")[:2] in {"22", "23", "54", "P0"}


def joined_error(action: str, error: BaseException) -> BackendError | None:
    """What a caller hears in whose transaction it happened; None where no driver has raised it."""
    if not is_driver_error(error):
        return None
    told = backend_error(action, error)
    if fault(error) is not Fault.CONFLICT:
        return told
    return TransactionConflictError(f"{told}; roll back the transaction and run it again")


def _root(error: BaseException) -> BaseException:
    """The driver's own exception, below what SQLAlchemy puts around it."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def _sqlstate(root: BaseException) -> str | None:
    # psycopg2 has it under another name.
    state = getattr(root, "sqlstate", None) or getattr(root, "pgcode", None)
    return state if isinstance(state, str) else None


def _is_outage(root: BaseException) -> bool:
    state = _sqlstate(root)
    if type(root).__name__ in _OUTAGE_TYPES:
        return True
    if state is not None:
        return state.startswith("08") or state in _OUTAGES
    if _module(root).startswith("asyncpg"):
        return any(part in str(root) for part in _BROKEN_CONNECTIONS)
    if _module(root) == "sqlite3":
        return any(part in str(root).lower() for part in _CLOSED_FILES)
    if isinstance(root, ssl.SSLCertVerificationError):
        return False
    # SQLAlchemy's TimeoutError: the application's own pool has no connection to give.
    return isinstance(root, (OSError, asyncio.TimeoutError, PoolTimeoutError))


def _is_sqlite_busy(root: BaseException) -> bool:
    return _module(root) == "sqlite3" and "is locked" in str(root)


def _said(root: BaseException) -> str:
    """The error's text; of a data error only its kind, since its text quotes the data."""
    state = _sqlstate(root)
    if state is not None:
        text = str(getattr(root, "message", None) or root.args[0]) if root.args else ""
        # Classes 22 and 23 (data and constraints) and the detail lines carry values.
        said = "" if state[:2] in {"22", "23"} else text.splitlines()[0] if text else ""
        return f"{said or type(root).__name__} (SQLSTATE {state})"
    if isinstance(root, (asyncio.TimeoutError, TimeoutError)):
        return "the server did not answer in time"
    if isinstance(root, SQLAlchemyError):
        return type(root).__name__
    text = str(root).strip()
    return text.splitlines()[0] if text else type(root).__name__


def _hint(root: BaseException) -> str | None:
    if state := _sqlstate(root):
        return _HINTS_BY_STATE.get(state)
    if type(root).__name__ in _HINTS_BY_TYPE:
        return _HINTS_BY_TYPE[type(root).__name__]
    if isinstance(root, ssl.SSLError):
        return "check sslmode and sslrootcert in the URL"
    if isinstance(root, OSError) and _module(root) != "sqlite3":
        return "check that the server runs and that host and port in the URL are right"
    return next(_matching(str(root)), None)


def _matching(text: str) -> Iterator[str]:
    return (hint for part, hint in _HINTS_BY_TEXT.items() if part in text)


def _module(error: BaseException) -> str:
    return type(error).__module__
