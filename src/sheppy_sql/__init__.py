"""PostgreSQL and SQLite backend for the sheppy task queue."""

from ._backend import SqlBackend as SqlBackend
from ._bound import BoundBackend as BoundBackend
from ._completion import Completion as Completion
from ._errors import TransactionConflictError as TransactionConflictError

__version__ = "0.1.0"
__all__ = ["BoundBackend", "Completion", "SqlBackend", "TransactionConflictError", "__version__"]
