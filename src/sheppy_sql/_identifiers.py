"""Names that survive in PostgreSQL, which cuts off what is too long without a word."""

from __future__ import annotations

MAX_IDENTIFIER_BYTES = 63
"""PostgreSQL cuts longer names (NAMEDATALEN - 1), so two of them could become one."""


def check_identifier(option: str, name: str | None) -> None:
    """ValueError where the name of a schema, or one that a prefix makes, would not survive."""
    if name is None and option == "schema":
        return
    if not isinstance(name, str):
        raise ValueError(f"{option} must be a str, not {type(name).__name__}")
    if option == "schema" and not name:
        raise ValueError("schema must not be empty; leave it out for the default schema")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{option} {name!r} cannot be written as UTF-8") from None
    if "\0" in name:
        raise ValueError(f"{option} must not contain a NUL character")
    if size > MAX_IDENTIFIER_BYTES:
        raise ValueError(
            f"{option}: the name {name!r} would have {size} bytes, PostgreSQL keeps "
            f"{MAX_IDENTIFIER_BYTES}; choose a shorter {option}"
        )
