"""For tests of applications that enqueue tasks; needs no pytest.

With pytest, `pytest_plugins = ["sheppy_sql.testing.fixtures"]` in the outermost conftest.py gives
fixtures as well.
"""

from ._clock import Clock as Clock
from ._drain import drain as drain
from ._enqueued import assert_enqueued as assert_enqueued
from ._enqueued import assert_not_enqueued as assert_not_enqueued
from ._enqueued import enqueued as enqueued
from ._rollback import RolledBack as RolledBack
from ._rollback import rolled_back as rolled_back

__all__ = [
    "Clock",
    "RolledBack",
    "assert_enqueued",
    "assert_not_enqueued",
    "drain",
    "enqueued",
    "rolled_back",
]
