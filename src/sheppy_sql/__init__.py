"""PostgreSQL and SQLite backend for the sheppy task queue."""

from ._backend import SqlBackend as SqlBackend

__version__ = "0.1.0"
__all__ = ["SqlBackend", "__version__"]
