"""What the demo's workers are given to do."""

# No `from __future__ import annotations` here: sheppy reads the annotations of a task's
# parameters to convert what comes out of the database, and needs the types, not their names.

import ast
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

from sheppy import CURRENT_TASK, Depends, Queue, Task, task

FAILURES = 2
RATE = 2
RATE_PERIOD = 1.0  # seconds
HEARTBEAT = "heartbeat"  # the cron's function

# On Python 3.11 threads that build syntax trees at once make each other fail: SystemError, "AST
# constructor recursion depth mismatch".
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Module:
    """What one .py file holds."""

    name: str
    sha256: str
    lines: int
    functions: int
    classes: int
    parses: bool


@dataclass(frozen=True)
class Totals:
    """What all files hold."""

    files: int
    lines: int
    functions: int
    classes: int
    unparsable: int


async def file_queue() -> Queue:
    """The queue of the file tasks; a worker of the demo puts its own in place of this."""
    raise RuntimeError('Only the demo\'s own workers can run this task: use "sheppy-sql demo"')


@task
def analyse(root: str, name: str) -> Module:
    """The file `name` below `root`; one that is no valid Python is a result, not a failure."""
    content = (Path(root) / name).read_bytes()
    functions = classes = 0
    try:
        with _one_at_a_time:
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        parses = False
    else:
        parses = True
        for node in _statements(tree):
            functions += isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            classes += isinstance(node, ast.ClassDef)
    return Module(
        name=name,
        sha256=hashlib.sha256(content).hexdigest(),
        lines=len(content.splitlines()),
        functions=functions,
        classes=classes,
        parses=parses,
    )


# sheppy 0.0.7 makes N attempts of retry=N, later versions N + 1.
@task(retry=FAILURES + 1, retry_delay=0.5)
async def flaky(
    current: Task = CURRENT_TASK,  # type: ignore[assignment]  # sheppy's mark for "this task"
) -> int:
    """Which attempt succeeded, after two that fail."""
    if current.retry_count < FAILURES:
        raise ConnectionError("fails on purpose, to be retried")
    return current.retry_count + 1


@task
async def scheduled() -> datetime:
    """When it ran."""
    return datetime.now(timezone.utc)


@task
async def heartbeat() -> datetime:
    """When it ran; a cron starts it."""
    return datetime.now(timezone.utc)


@task(rate_limit={"max_rate": RATE, "rate_period": RATE_PERIOD})
async def rate_limited(number: int) -> int:
    """Its number; how many start in a second is limited."""
    return number


@task
async def collect(queue: Annotated[Queue, Depends(file_queue)]) -> Task:
    """The task that comes next, with the sums of all files' results."""
    stored = await queue.get_all_tasks()
    return summarise(total([found.result for found in stored if found.status == "completed"]))


@task
async def summarise(totals: Totals) -> str:
    """The averages in a sentence."""
    files = max(totals.files, 1)
    return f"{totals.lines / files:,.0f} lines and {totals.functions / files:,.0f} functions a file"


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, without the expressions in them: ast.walk takes ten times as long."""
    found = [tree]
    for node in found:
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            inner = getattr(node, block, None)
            # Of a conditional expression and a lambda they are expressions.
            if isinstance(inner, list):
                found.extend(inner)
    yield from found


def total(modules: list[Module]) -> Totals:
    """The sums over some files."""
    return Totals(
        files=len(modules),
        lines=sum(module.lines for module in modules),
        functions=sum(module.functions for module in modules),
        classes=sum(module.classes for module in modules),
        unparsable=sum(not module.parses for module in modules),
    )
