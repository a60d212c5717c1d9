"""PostgreSQL and SQLite backend for the sheppy task queue."""

from ._backend import SqlBackend as SqlBackend
from ._bound import BoundBackend as BoundBackend
from ._errors import TransactionConflictError as TransactionConflictError

__version__ = "0.1.0"
__all__ = ["BoundBackend", "SqlBackend", "TransactionConflictError", "__version__"]
