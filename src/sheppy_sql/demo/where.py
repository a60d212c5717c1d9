"""Which database the demo uses, and how a person looks into it."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ClauseElement, String, column, func, select
from sqlalchemy.engine import URL

from .. import _urls
from .._backend import SqlBackend
from .._dialects import dialect_named
from .._dialects.sqlite import is_memory
from .._session import CLOCK_TOLERANCE
from ..migrate import Names, names_from_environment
from ..schema import DEFAULT_PREFIX, build_tables


@dataclass(frozen=True)
class Where:
    """A database, and where its tables are; `file` is the demo's own, if it made one."""

    url: str
    names: Names
    file: Path | None

    @classmethod
    def new_file(cls) -> Where:
        """A SQLite file in a new directory, so that it replaces nothing and can stay."""
        file = Path(tempfile.mkdtemp(prefix="sheppy-sql-demo-")) / "demo.db"
        url = URL.create("sqlite+aiosqlite", database=file.as_posix())
        return cls(url.render_as_string(), Names(None, DEFAULT_PREFIX), file)

    @classmethod
    def given(cls, url: str) -> Where:
        """The database of a URL; ValueError where that cannot be used."""
        target = _urls.parse(url)
        if _is_embedded(url) and is_memory(target):
            raise ValueError(
                "The workers are processes of their own and cannot see :memory:; name a file"
            )
        return cls(url, names_from_environment(), None)

    @property
    def shown(self) -> str:
        """The file, or the URL without its password."""
        return str(self.file) if self.file else _urls.redact(self.url)

    @property
    def clock_tolerance(self) -> float:
        """Seconds by which the database's clock may be ahead of this machine's."""
        return 0.0 if _is_embedded(self.url) else CLOCK_TOLERANCE

    def backend(self, **options: Any) -> SqlBackend:
        schema, prefix = self.names
        return SqlBackend(self.url, schema=schema, table_prefix=prefix, **options)

    def order(self) -> dict[str, Any]:
        """What a worker needs to make the same backend."""
        return {"url": self.url, "names": list(self.names)}

    def look(self, queues: Sequence[str]) -> str:
        """A command, or on a server a statement, that shows the results in these queues."""
        results = build_tables(*self.names).results
        # Bare names: it is a person who reads it.
        columns = [column("func", String), column("status", String)]
        counted = select(*columns, func.count().label("tasks")).select_from(results)
        counted = counted.group_by(*columns).order_by(*columns)
        if self.file is None:
            return _text(counted.where(column("queue", String).in_(queues)))
        return f'{_sqlite_shell()} {shlex.quote(str(self.file))} "{_text(counted)}"'


def _is_embedded(url: str) -> bool:
    return dialect_named(_urls.parse(url).url.get_backend_name()).embedded


def _sqlite_shell() -> str:
    """Python brings a shell of its own since 3.12."""
    if shutil.which("sqlite3") is None and sys.version_info >= (3, 12):
        return f"{shlex.quote(sys.executable)} -m sqlite3"
    return "sqlite3"


def _text(statement: ClauseElement) -> str:
    written = statement.compile(compile_kwargs={"literal_binds": True})
    return " ".join(str(written).split())
