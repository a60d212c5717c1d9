"""libpq's connection parameters, as arguments of asyncpg."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, unquote

import asyncpg

from . import _tls

_SESSIONS = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
_ENGINE_OPTIONS = frozenset(
    {"connect_args", "echo", "echo_pool", "execution_options", "isolation_level", "max_overflow"}
)

# asyncpg sends settings as fields of the startup message, next to these.
_STARTUP_FIELDS = frozenset({"client_encoding", "database", "options", "replication", "user"})

# The same as asyncpg's behaviour, which has no such parameter; other values are refused.
_HARMLESS: dict[str, tuple[tuple[str, ...], str]] = {
    "channel_binding": (
        ("disable", "prefer"),
        "asyncpg has no channel binding; leave it out, and let sslmode=verify-full prove the "
        "server",
    ),
    "client_encoding": (("utf8", "utf-8", "unicode", "auto"), "asyncpg speaks UTF-8 only"),
    "gssdelegation": (("0",), "asyncpg delegates no credentials"),
    "gssencmode": (
        ("disable", "prefer"),
        "asyncpg has no GSSAPI encryption; leave it out and use sslmode=require",
    ),
    "keepalives": (
        ("0",),
        "asyncpg sets no keepalives; leave it out and let the server send them, for example "
        "with options=-c%20tcp_keepalives_idle=60",
    ),
    "load_balance_hosts": (("disable",), "asyncpg tries hosts in their order"),
    "sslcertmode": (("allow",), "asyncpg sends the certificate if the server asks for it"),
    "sslcompression": (("0",), "TLS compression is unsafe"),
    "sslsni": (("1",), "asyncpg always sends the host's name"),
}

_SERVER_SIDE = "asyncpg cannot set it; leave it out and let the server do it: options=-c%20"
_REFUSED: dict[str, str] = {
    "fallback_application_name": "use application_name",
    "hostaddr": "asyncpg has no address apart from the host; use host",
    "keepalives_count": f"{_SERVER_SIDE}tcp_keepalives_count=3",
    "keepalives_idle": f"{_SERVER_SIDE}tcp_keepalives_idle=60",
    "keepalives_interval": f"{_SERVER_SIDE}tcp_keepalives_interval=10",
    "replication": "a replication connection runs no queries; leave it out",
    "require_auth": "asyncpg cannot restrict it; leave it out and use sslmode=verify-full",
    "requirepeer": "asyncpg does not check it; leave it out and guard the socket's directory",
    "schema": "PostgreSQL knows no such parameter; give SqlBackend its schema argument",
    "service": "services are not read; write host, user and database into the URL",
    "servicefile": "services are not read; write host, user and database into the URL",
    "sslcrldir": "directories are not read; use sslcrl",
    "tcp_user_timeout": f"{_SERVER_SIDE}tcp_user_timeout=30000",
}


def connect_args(query: Mapping[str, str]) -> dict[str, Any]:
    """What asyncpg takes for all of `query`, which no longer names where to connect.

    ValueError names the parameter that cannot be honoured and what to do instead. Accepted
    with no effect, since they ask for what asyncpg does anyway, are the values in `_HARMLESS`.
    connect_timeout is one limit for all hosts together, not for each as in libpq.
    """
    args = _tls.connect_args({k: v for k, v in query.items() if k in _tls.PARAMETERS})
    settings: dict[str, str] = {}
    for name, value in query.items():
        if name in _ARGUMENTS:
            argument, convert = _ARGUMENTS[name]
            if argument in args:
                raise ValueError(f"{name} repeats another parameter: keep one")
            args[argument] = convert(name, value)
        elif name == "application_name":
            settings[name] = value
        elif name == "options":
            settings.update(_server_settings(value))
        elif name not in _tls.PARAMETERS:
            _check_harmless(name, value)
    if settings:
        args["server_settings"] = settings
    return args


def address_args(netloc: str, host: str | None, port: str | None) -> dict[str, Any]:
    """`host` and `port` for asyncpg, one or a list, without what is left to its defaults.

    `netloc` is what stands in the URL before the path; the parameters override it.
    """
    hosts, ports = _hosts_and_ports(netloc)
    if host is not None:
        hosts, own_ports = _hosts_and_ports(netloc_of(host))
        if any(own_ports):
            if port is not None:
                raise ValueError("ports stand both in host and in port: keep one of them")
            ports = own_ports
    if port is not None:
        ports = [_port(entry) for entry in port.split(",")]
    if len(ports) == 1:
        ports = ports * len(hosts)
    if len(ports) != len(hosts):
        raise ValueError("host and port must have as many entries, or port only one")
    if len(hosts) == 1:
        return {k: v for k, v in (("host", hosts[0]), ("port", ports[0])) if v is not None}
    if None in hosts:
        raise ValueError("a host in the list is empty: write the name of each")
    if not any(ports):
        return {"host": hosts}
    if None in ports:
        raise ValueError("only some of the hosts have a port: write the port of each")
    return {"host": hosts, "port": ports}


def netloc_of(hosts: str) -> str:
    """A list of hosts as it would stand in a URL before the path."""
    return ",".join(map(_escaped, hosts.split(",")))


def _escaped(host: str) -> str:
    if host.startswith("/"):
        return quote(host, safe="")
    if host.count(":") > 1 and not host.startswith("["):
        return f"[{quote(host, safe=':')}]"
    return host


def _hosts_and_ports(netloc: str) -> tuple[list[str | None], list[int | None]]:
    """Hosts (names, IP addresses, directories of Unix sockets) and the port of each."""
    hosts: list[str | None] = []
    ports: list[int | None] = []
    for entry in netloc.split(","):
        match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\s:@\[\]/]*))(?::([^:]*))?", entry)
        if match is None:
            raise ValueError(
                "the host cannot be read; write [..] around IPv6 addresses, and characters such "
                "as @ : / ? % of a password as %40 and so on"
            )
        hosts.append(unquote(match[1] or match[2]) or None)
        ports.append(_port(match[3]) if match[3] else None)
    return hosts, ports


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ValueError(
            "the port is not a number from 1 to 65535; if it is part of the password, write "
            "characters such as / ? % there as %2F and so on"
        )
    return int(text)


def _server_settings(options: str) -> dict[str, str]:
    """`-c name=value --name=value` as the server reads it: a backslash keeps a space."""
    words = re.findall(r"(?:\\.|\S)+", options, re.DOTALL)
    arguments = iter(re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL) for word in words)
    settings = {}
    for word in arguments:
        setting = next(arguments, "") if word == "-c" else word[2:]
        name, equals, value = setting.partition("=")
        name = name.replace("-", "_")
        if (
            word[:2] not in {"-c", "--"}
            or not equals
            or not re.fullmatch(r"[a-zA-Z_][\w.$]*", name)
        ):
            raise ValueError("options must be written as -c name=value or --name=value")
        if name.lower() in _STARTUP_FIELDS:
            raise ValueError(f"options cannot set {name}: it is not a setting of the server")
        settings[name] = value
    return settings


def _check_harmless(name: str, value: str) -> None:
    if name in _HARMLESS:
        accepted, reason = _HARMLESS[name]
        if value.lower() not in accepted:
            raise ValueError(f"this value of {name} cannot be honoured: {reason}")
    elif name in _REFUSED:
        raise ValueError(f"{name} is not supported: {_REFUSED[name]}")
    elif name in _ENGINE_OPTIONS or name.startswith("pool"):
        raise ValueError(
            f"{name} is an engine's option, which a URL cannot carry: call create_async_engine "
            "with it and pass that engine to SqlBackend"
        )
    else:
        raise ValueError(
            f"{name!r} is not a known parameter; a server setting is written as "
            "options=-c%20name=value"
        )


def _seconds(name: str, value: str) -> float | None:
    """A time limit; None where 0 or less says that there is none."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{name} must be a number of seconds")
    return seconds if seconds > 0 else None


def _count(name: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value):
        raise ValueError(f"{name} must be a whole number, 0 or more")
    return int(value)


def _no_statements(name: str, value: str) -> int:
    """What providers write into the URL of a pooler, for other drivers than asyncpg."""
    if value.lower() != "true":
        raise ValueError(f"{name} must be true; leave it out where there is none")
    return 0


def _session(name: str, value: str) -> str:
    return _tls.choice(name, value, _SESSIONS)


def _file(name: str, value: str) -> str:
    return str(_tls.existing_file(name, value))


def _kerberos(name: str, value: str) -> str:
    if name not in inspect.signature(asyncpg.connect).parameters:
        raise ValueError(f"{name} needs asyncpg 0.30 or newer: upgrade it")
    return value


_ARGUMENTS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "command_timeout": ("command_timeout", _seconds),
    "connect_timeout": ("timeout", _seconds),
    "gsslib": ("gsslib", _kerberos),
    "krbsrvname": ("krbsrvname", _kerberos),
    "max_cacheable_statement_size": ("max_cacheable_statement_size", _count),
    "max_cached_statement_lifetime": ("max_cached_statement_lifetime", _count),
    "passfile": ("passfile", _file),
    "pgbouncer": ("statement_cache_size", _no_statements),
    "prepared_statement_cache_size": ("prepared_statement_cache_size", _count),
    "statement_cache_size": ("statement_cache_size", _count),
    "target_session_attrs": ("target_session_attrs", _session),
    "timeout": ("timeout", _seconds),
}
