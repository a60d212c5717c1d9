from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sheppy import Task

from sheppy_sql.demo import source, tasks
from sheppy_sql.demo.jobs import Jobs
from sheppy_sql.demo.outcome import Outcome

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
FIRST = 0  # of the file tasks

Change = Callable[[Outcome], Outcome]


def analyse(file: Path) -> tasks.Module:
    function: Callable[[str, str], tasks.Module] = tasks.analyse.__wrapped__  # type: ignore[attr-defined]
    return function(str(file.parent), file.name)


def ended(task: Task, result: object, at: float = 0.0) -> Task:
    """The task as a worker stores it."""
    changes = {"status": "completed", "result": result, "finished_at": NOW + timedelta(seconds=at)}
    return task.model_copy(update={**changes, "created_at": NOW})


@pytest.fixture
def good(tmp_path: Path) -> Outcome:
    """Two files, and everything else, as it should be."""
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("def f(): ...\n", "utf-8")
    jobs = Jobs(source.read(tmp_path))
    files = {task.id: ended(task, analyse(tmp_path / task.spec.args[1])) for task in jobs.analyses}
    totals = tasks.Totals(files=2, lines=2, functions=2, classes=0, unparsable=0)
    # What a task is given comes out of the database as JSON.
    summary = Task.model_validate(tasks.summarise(totals).model_dump(mode="json"))
    scheduled = jobs.scheduled.model_copy(update={"scheduled_at": NOW})
    timed = [
        ended(jobs.flaky, 3),
        ended(scheduled, NOW + timedelta(seconds=0.5)),
        *(ended(task, number, number / 2) for number, task in enumerate(jobs.rate_limited)),
        ended(jobs.collect, summary),
        ended(summary, "a sentence"),
        ended(tasks.heartbeat(), NOW),
        tasks.heartbeat(),  # the next run
    ]
    ran = [jobs.expected_runs, Counter(heartbeat=2)]
    return Outcome(jobs, files, {task.id: task for task in timed}, ran, clock_tolerance=0.0)


def with_file(good: Outcome, **changes: Any) -> Outcome:
    task_id = good.jobs.analyses[FIRST].id
    task = good.files[task_id].model_copy(update=changes)
    return replace(good, files={**good.files, task_id: task})


def with_timed(good: Outcome, function: str, **changes: Any) -> Outcome:
    return replace(
        good,
        timed={
            task_id: task.model_copy(update=changes)
            if task.spec.func.endswith(f":{function}")
            else task
            for task_id, task in good.timed.items()
        },
    )


def without_timed(good: Outcome, function: str) -> Outcome:
    kept = {
        i: task for i, task in good.timed.items() if not task.spec.func.endswith(f":{function}")
    }
    return replace(good, timed=kept)


def test_all_is_well_where_everything_ended_as_it_should(good: Outcome) -> None:
    assert good.complaints() == []
    assert good.jobs.unfinished_files(good.files) == []
    assert good.jobs.unfinished(good.timed) == []


FAILED = {"status": "failed", "result": None, "error": "OSError: no"}
EARLY = NOW - timedelta(seconds=1)
OTHER = tasks.Module("a.py", sha256="0", lines=1, functions=1, classes=0, parses=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda good: replace(good, files={}), "a.py: is not in the database"),
        (lambda good: with_file(good, **FAILED), "a.py: failed, OSError: no"),
        (lambda good: with_file(good, result=OTHER), "a.py: the stored result is that of another"),
        (
            lambda good: replace(good, files={**good.files, good.jobs.flaky.id: good.jobs.flaky}),
            "the queue of the files holds 1 tasks that nobody put there",
        ),
        (lambda good: with_timed(good, "flaky", result=1), "the flaky task: is completed"),
        (lambda good: with_timed(good, "flaky", **FAILED), "the flaky task: failed, OSError: no"),
        (lambda good: with_timed(good, "scheduled", **FAILED), "the scheduled task: failed"),
        (
            lambda good: with_timed(good, "scheduled", result=EARLY),
            "the scheduled task: ran 1.0 s before its time",
        ),
        (lambda good: with_timed(good, "rate_limited", **FAILED), "rate-limited task 0: failed"),
        (
            lambda good: with_timed(good, "rate_limited", finished_at=NOW),
            "the rate limit: 0.0 s, which is too fast",
        ),
        (lambda good: without_timed(good, "heartbeat"), "the cron: never ran"),
        (lambda good: with_timed(good, "heartbeat", **FAILED), "a run of the cron: failed"),
        (lambda good: without_timed(good, "summarise"), "the chained summary: is not in the data"),
        (lambda good: with_timed(good, "summarise", **FAILED), "the chained summary: failed"),
        (lambda good: replace(good, files={}), "the chained summary: its sums are not those"),
        (lambda good: replace(good, ran=[good.ran[0]] * 2), "analyse ran 4 times instead of 2"),
        (lambda good: replace(good, ran=[]), "flaky ran 0 times instead of 3"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(good: Outcome, change: Change, complaint: str) -> None:
    assert any(found.startswith(complaint) for found in change(good).complaints())


def test_database_whose_clock_is_ahead_may_start_a_task_early(good: Outcome) -> None:
    early = replace(with_timed(good, "scheduled", result=EARLY), clock_tolerance=2.0)

    assert early.complaints() == []


def test_only_the_first_complaints_are_told(good: Outcome) -> None:
    nothing = replace(good, files={}, timed={}, ran=[])

    *_, last = nothing.complaints()

    assert last.startswith("... and ")


@pytest.mark.parametrize(
    ("function", "waited_for"),
    [
        ("flaky", ["the flaky task"]),
        ("scheduled", ["the scheduled task"]),
        ("rate_limited", ["the rate-limited tasks"]),
        ("heartbeat", ["the cron"]),
        ("collect", ["the chained tasks"]),
        ("summarise", ["the chained tasks"]),
    ],
)
def test_what_has_not_ended_is_waited_for(
    good: Outcome, function: str, waited_for: list[str]
) -> None:
    assert good.jobs.unfinished(without_timed(good, function).timed) == waited_for
    assert good.jobs.unfinished(with_timed(good, function, finished_at=None).timed) == waited_for


def test_chain_that_failed_is_not_waited_for(good: Outcome) -> None:
    failed = without_timed(with_timed(good, "collect", **FAILED), "summarise")

    assert good.jobs.unfinished(failed.timed) == []


@pytest.mark.parametrize(
    "content",
    [b"def", b"\0", b"# coding: nonsense\n", b"x = '\xff'\n", b"(" * 5000, b"-" * 100_000 + b"1"],
)
def test_file_that_is_no_valid_python_is_a_result(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.py"
    file.write_bytes(content)

    module = analyse(file)

    assert (module.parses, module.functions, module.classes) == (False, 0, 0)


def test_functions_and_classes_are_found_wherever_they_stand() -> None:
    library = source.read().root
    for file in [library / "typing.py", *library.glob("asyncio/*.py"), Path(__file__)]:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        classes = [n for n in nodes if isinstance(n, ast.ClassDef)]

        module = analyse(file)

        assert (module.functions, module.classes) == (len(functions), len(classes)), file


def test_functions_in_every_kind_of_block_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "blocks.py"
    file.write_text(
        """\
if 1:
    def f(): ...
else:
    class C: ...
for x in ():
    def f(): ...
else:
    def f(): ...
while 0:
    def f(): ...
try:
    def f(): ...
except ValueError:
    def f(): ...
else:
    def f(): ...
finally:
    def f(): ...
with x:
    async def f():
        def g(): ...
match x:
    case 1:
        def f(): ...
y = lambda: (1 if 2 else 3)
""",
        "utf-8",
    )

    module = analyse(file)

    assert (module.functions, module.classes) == (11, 1)
