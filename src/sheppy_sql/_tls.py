"""libpq's TLS parameters, as asyncpg's `ssl` and `direct_tls`."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_ENFORCED = MODES[3:]
_NEGOTIATIONS = ("postgres", "direct")
_VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}
_CONTEXT_PARAMETERS = (
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslcrl",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
)
PARAMETERS = frozenset({"ssl", "sslmode", "sslnegotiation", *_CONTEXT_PARAMETERS})


def connect_args(given: Mapping[str, str]) -> dict[str, Any]:
    """What asyncpg takes for the TLS parameters of a URL; ValueError says what it cannot do.

    What is not given comes from libpq's environment variables (PGSSLMODE, PGSSLROOTCERT and
    so on) and the files in ~/.postgresql. As in libpq, sslmode=require checks the chain, not
    the name, where there is a root certificate; disable ignores all other parameters; and
    sslrootcert=system is the system's trusted roots, and then the mode is verify-full.
    """
    mode = _mode(given)
    args: dict[str, Any] = {}
    negotiation = _setting(given, "sslnegotiation")
    if negotiation is not None:
        direct = choice("sslnegotiation", negotiation, _NEGOTIATIONS) == "direct"
        if direct and mode not in _ENFORCED:
            raise ValueError(f"sslnegotiation=direct needs sslmode={_any_of(_ENFORCED)}")
        args["direct_tls"] = direct
    if mode in _ENFORCED:
        args["ssl"] = _context(mode, given)
    elif mode == "disable":
        args["ssl"] = mode
    else:
        # A context of our own would end asyncpg's fallback between TLS and plain text, which
        # only its own names of the modes have; and a fallback protects nothing.
        if unused := [name for name in _CONTEXT_PARAMETERS if name in given]:
            raise ValueError(
                f"{unused[0]} has no effect without TLS: add sslmode={_any_of(_ENFORCED)}"
            )
        if mode is not None:
            args["ssl"] = mode
    return args


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of `allowed`; otherwise a ValueError that does not show it."""
    if value not in allowed:
        raise ValueError(f"{name} must be {_any_of(allowed)}")
    return value


def existing_file(name: str, value: str) -> Path:
    """The file that parameter `name` points to; ValueError with its path if there is none."""
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError(f"{name} points to {str(path)!r}, and there is no such file")
    return path


def _mode(given: Mapping[str, str]) -> str | None:
    if "ssl" in given and "sslmode" in given:
        raise ValueError("ssl and sslmode are two names of one parameter: keep sslmode")
    if "ssl" in given:
        spelled = given["ssl"].lower().replace("_", "-")
        # libpq reads the ssl=true of JDBC's URLs like this.
        mode: str | None = "require" if spelled == "true" else spelled
    else:
        mode = _setting(given, "sslmode")
    if _setting(given, "sslrootcert") == "system" and mode != "disable":
        if mode not in {None, "verify-full"}:
            raise ValueError(
                "sslrootcert=system needs sslmode=verify-full: anybody can get a certificate for "
                "some other name from a public authority"
            )
        return "verify-full"
    return mode if mode is None else choice("sslmode (or PGSSLMODE)", mode, MODES)


def _context(mode: str, given: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    context.minimum_version = _version(given, "ssl_min_protocol_version", "TLSv1.2")
    context.maximum_version = _version(given, "ssl_max_protocol_version", "TLSv1.3")
    if context.minimum_version > context.maximum_version:
        raise ValueError("ssl_min_protocol_version is above ssl_max_protocol_version")
    # Servers from PostgreSQL 17 on ask for it where TLS begins at once.
    context.set_alpn_protocols(["postgresql"])
    _trust(context, mode, given)
    _identify(context, given)
    return context


def _trust(context: ssl.SSLContext, mode: str, given: Mapping[str, str]) -> None:
    root = _setting(given, "sslrootcert") or _home_file("root.crt")
    crl = _setting(given, "sslcrl") or _home_file("root.crl")
    if root is None:
        if mode != "require":
            raise ValueError(
                f"sslmode={mode} needs a root certificate: add sslrootcert=FILE, put it in "
                "~/.postgresql/root.crt, or trust the system's with sslrootcert=system"
            )
        if "sslcrl" in given:
            raise ValueError("sslcrl checks nothing without a root certificate: add sslrootcert")
        context.verify_mode = ssl.CERT_NONE
        return
    if root == "system":
        context.load_default_certs()
    else:
        _load_verify(context, "sslrootcert", root)
    if crl is not None:
        _load_verify(context, "sslcrl", crl)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN


def _load_verify(context: ssl.SSLContext, name: str, value: str) -> None:
    path = existing_file(name, value)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:
        raise ValueError(f"{name} {str(path)!r} cannot be read as PEM: {_reason(error)}") from None


def _identify(context: ssl.SSLContext, given: Mapping[str, str]) -> None:
    """Load the client's certificate, where there is one."""
    value = _setting(given, "sslcert") or _home_file("postgresql.crt")
    key_value = _setting(given, "sslkey") or _home_file("postgresql.key")
    if value is None:
        if "sslkey" in given:
            raise ValueError("sslkey is of no use without the certificate: add sslcert")
        return
    certificate = existing_file("sslcert", value)
    key = None if key_value is None else existing_file("sslkey", key_value)
    try:
        # A password always, or OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password=given.get("sslpassword", ""))
    except OSError as error:
        raise ValueError(
            f"sslcert {str(certificate)!r} and sslkey {str(key or certificate)!r} cannot be "
            f"used: {_reason(error)}; check that both are PEM, belong together, and that "
            "sslpassword is right if the key has one"
        ) from None


def _version(given: Mapping[str, str], name: str, default: str) -> ssl.TLSVersion:
    return _VERSIONS[choice(name, _setting(given, name) or default, tuple(_VERSIONS))]


def _setting(given: Mapping[str, str], name: str) -> str | None:
    return given.get(name) or os.environ.get("PG" + name.upper().replace("_", "")) or None


def _home_file(name: str) -> str | None:
    try:
        path = Path.home() / ".postgresql" / name
    except RuntimeError:  # no home directory
        return None
    return str(path) if path.is_file() else None


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a certificate").lower().replace("_", " ")
    return error.strerror or type(error).__name__


def _any_of(values: tuple[str, ...]) -> str:
    return " or ".join((", ".join(values[:-1]), values[-1])) if len(values) > 1 else values[0]
