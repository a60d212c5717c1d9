"""A database URL as people write it, and as hosting providers hand it out, for SQLAlchemy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, unquote_plus

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.util import asbool

from . import _libpq

_POSTGRESQL = "postgresql+asyncpg"
_SQLITE = "sqlite+aiosqlite"
_DRIVERS = {
    "postgres": _POSTGRESQL,
    "postgresql": _POSTGRESQL,
    _POSTGRESQL: _POSTGRESQL,
    "sqlite": _SQLITE,
    _SQLITE: _SQLITE,
}
_ACCEPTED = (
    "accepted are postgresql://user:password@host/database (also as postgres:// or "
    "postgresql+asyncpg://) and sqlite:///file.db (also as sqlite+aiosqlite://)"
)
_SQLITE_ARGUMENTS: dict[str, Callable[[str], Any]] = {
    "cached_statements": int,
    "check_same_thread": asbool,
    "detect_types": int,
    "isolation_level": str,
    "timeout": float,
    "uri": asbool,
}
_SECRET = re.compile("auth|credential|key|pass|pwd|secret|token", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """What `create_async_engine(url, connect_args=connect_args)` takes."""

    url: URL
    connect_args: Mapping[str, Any] = field(default_factory=dict)


class _Parts(NamedTuple):
    """A URL cut into its parts, still percent-encoded; None where it has no such part."""

    scheme: str
    user: str | None
    password: str | None
    hosts: str
    database: str | None
    query: str | None


def parse(url: str | URL) -> Target:
    """The engine's arguments for `url`; ValueError, with no secret in it, if there are none.

    PostgreSQL's URLs mean what they mean to libpq: a parameter is honoured, or asks for what
    asyncpg does anyway, or is refused. A parameter that repeats a part of the address (host,
    port, user, password, dbname) overrides it. SQLite's URLs mean what they mean to SQLAlchemy.
    Spaces and line ends around a URL are ignored.
    """
    try:
        return _parse(url)
    except ValueError as error:
        raise ValueError(f"The database URL cannot be used: {error}") from None


def redact(url: str | URL) -> str:
    """`url` for a message: passwords, and whatever else may be secret, are shown as ***."""
    text = url.render_as_string(hide_password=False) if isinstance(url, URL) else url
    parts = _split(text) if isinstance(text, str) else None
    if parts is None:
        return "***"
    # Parameters may stand anywhere where the "?" before them was forgotten.
    shown = f"{parts.scheme}://"
    if parts.user is not None:
        shown += f"{_redact_parameters(parts.user)}{'' if parts.password is None else ':***'}@"
    shown += _redact_parameters(parts.hosts)
    if parts.database is not None:
        shown += f"/{_redact_parameters(parts.database)}"
    if parts.query is not None:
        shown += f"?{_redact_parameters(parts.query)}"
    return shown


def _redact_parameters(text: str) -> str:
    return re.sub("[^&;]+", _redact_parameter, text)


def _redact_parameter(match: re.Match[str]) -> str:
    name, _, _ = match[0].partition("=")
    decoded = unquote_plus(match[0])
    if "=" not in decoded or not _SECRET.search(decoded):
        return match[0]
    return f"{name}=***" if re.fullmatch(r"[\w.-]+", name) else "***"


def _parse(url: str | URL) -> Target:
    if isinstance(url, URL):
        scheme = url.drivername
    elif isinstance(url, str):
        scheme, separator, _ = url.strip().partition("://")
        if not separator or not re.fullmatch(r"[\w+.-]+", scheme):
            raise ValueError(f"it does not begin with a scheme; {_ACCEPTED}")
    else:
        raise ValueError(f"it is a {type(url).__name__}, not a str; {_ACCEPTED}")
    driver = _DRIVERS.get(scheme.lower())
    if driver is None:
        raise ValueError(f"{scheme} is not supported; {_ACCEPTED}")
    if driver == _SQLITE:
        return _sqlite(url if isinstance(url, URL) else _sqlite_url(url.strip()))
    return _from_url(url) if isinstance(url, URL) else _from_text(url)


def _split(text: str) -> _Parts | None:
    """The parts of a URL; None where an unescaped character leaves more than one reading."""
    match = re.fullmatch(r"([\w+.-]+)://([^/?]*)(?:/([^?]*))?(?:\?(.*))?", text.strip())
    if match is None or re.search(r"[\x00-\x1f\x7f]|%00", match[0]):
        return None
    scheme, authority, database, query = match.groups()
    # Otherwise half of a password with a "/" or an "@" in it would pass for an address.
    if authority and match[0].count("@") != min(authority.count("@"), 1):
        return None
    credentials, at, hosts = authority.rpartition("@")
    user, colon, password = credentials.partition(":")
    return _Parts(scheme, user if at else None, password if colon else None, hosts, database, query)


def _from_text(text: str) -> Target:
    parts = _split(text)
    if parts is None or re.search("[&=]", parts.hosts + (parts.database or "")):
        raise ValueError(
            "its parts cannot be told apart; write @ : / ? % & = in user, password, database and "
            "parameters as %40 %3A %2F %3F %25 %26 %3D, and no control characters"
        )
    user, password, database = (
        None if part is None else _decode(part)
        for part in (parts.user, parts.password, parts.database)
    )
    return _postgresql(user, password, parts.hosts, database, _parameters(parts.query or ""))


def _from_url(url: URL) -> Target:
    netloc = _libpq.netloc_of(url.host or "") + ("" if url.port is None else f":{url.port}")
    password = None if url.password is None else str(url.password)
    return _postgresql(url.username, password, netloc, url.database, _url_parameters(url))


def _postgresql(
    user: str | None,
    password: str | None,
    netloc: str,
    database: str | None,
    parameters: Iterable[tuple[str, str]],
) -> Target:
    query = _by_name(("dbname" if name == "database" else name, v) for name, v in parameters)
    address = _libpq.address_args(netloc, query.pop("host", None), query.pop("port", None))
    user = query.pop("user", user)
    password = query.pop("password", password)
    database = query.pop("dbname", database)
    connect_args = _libpq.connect_args(query)
    if isinstance(host := address.get("host"), str) and not host.startswith("/"):
        name, port = address.pop("host"), address.pop("port", None)
    else:
        # A URL of SQLAlchemy's cannot carry sockets, or several hosts with IPv6 among them.
        name, port = None, None
    # An empty user, password or database is left to the environment, as libpq does.
    url = URL.create(_POSTGRESQL, user or None, password or None, name, port, database or None)
    return Target(url, {**address, **connect_args})


def _sqlite_url(text: str) -> URL:
    _by_name(_parameters(text.partition("?")[2]))  # make_url ignores what is malformed
    try:
        return make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(f"its parts cannot be told apart; {_ACCEPTED}") from None


def _sqlite(url: URL) -> Target:
    if url.username or url.password or url.host or url.port:
        raise ValueError(
            "SQLite takes a path and no host: sqlite:///relative.db or sqlite:////absolute.db"
        )
    query = _by_name(_url_parameters(url))
    connect_args = {
        name: _sqlite_argument(name, query[name]) for name in _SQLITE_ARGUMENTS if name in query
    }
    is_uri = (url.database or "").startswith("file:")
    if is_uri != connect_args.get("uri", False):
        raise ValueError("a SQLite URI needs both: sqlite:///file:PATH?uri=true")
    if not is_uri and (unknown := sorted(query.keys() - connect_args.keys())):
        raise ValueError(
            f"{unknown[0]!r} is not a known parameter; those of SQLite itself need a URI: "
            "sqlite:///file:PATH?mode=ro&uri=true"
        )
    return Target(url.set(drivername=_SQLITE), connect_args)


def _sqlite_argument(name: str, value: str) -> Any:
    try:
        return _SQLITE_ARGUMENTS[name](value)
    except ValueError:
        raise ValueError(f"{name} must be a number or true or false") from None


def _parameters(query: str) -> list[tuple[str, str]]:
    query = query.strip("&")
    if not query:
        return []
    try:
        return parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        raise ValueError("what follows the ? must be name=value&name=value in UTF-8") from None


def _url_parameters(url: URL) -> list[tuple[str, str]]:
    return [(name, v) for name, values in url.normalized_query.items() for v in values]


def _by_name(parameters: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Parameters by name, once each; only host and port repeat, as SQLAlchemy writes them."""
    found: dict[str, str] = {}
    for name, value in parameters:
        if not value.strip():
            raise ValueError(f"{name!r} is empty: give it a value or leave it out")
        if name in found and name not in {"host", "port"}:
            raise ValueError(f"{name!r} is given twice: keep one")
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def _decode(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("its percent-encoding is not UTF-8") from None
