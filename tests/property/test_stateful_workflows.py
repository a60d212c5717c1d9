"""Random calls about the workflows of a queue, against a model of plain dicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.property.model import Payload
from tests.property.support import Machine, needs_time, numbers, run_machine

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase

LEAST_RULES = 500

LETTERS = list("abc")

who = st.integers(0, 1)
letter = st.sampled_from(LETTERS)
some = st.lists(st.sampled_from([*LETTERS, "unknown"]), max_size=4)
rarely = st.sampled_from([False, False, True])


class WorkflowMachine(Machine):
    """Two backends that store, count down and delete workflows."""

    def __init__(self) -> None:
        super().__init__()
        self.workflows: dict[str, Payload] = {}
        self.waited_for: dict[str, set[str]] = {}

    @rule(who=who, workflow_id=letter, waits_for=some, completed=rarely, failed=rarely)
    def store(
        self, who: int, workflow_id: str, waits_for: list[str], completed: bool, failed: bool
    ) -> None:
        workflow = {
            "id": workflow_id,
            "pending_task_ids": waits_for,
            "completed": completed,
            "error": "it failed" if failed else None,
            "number": next(numbers),
        }
        assert self.run(self.backend(who).store_workflow(self.queue, workflow)) is True
        self.workflows[workflow_id] = workflow
        self.waited_for[workflow_id] = set(waits_for)

    @rule(who=who, workflow_id=letter, task_id=letter)
    def complete_task(self, who: int, workflow_id: str, task_id: str) -> None:
        backend = self.backend(who)
        answer = self.run(backend.mark_workflow_task_complete(self.queue, workflow_id, task_id))
        waited_for = self.waited_for.get(workflow_id, set())
        assert answer == (len(waited_for) - 1 if task_id in waited_for else -1)
        waited_for.discard(task_id)

    @precondition(lambda self: self.ran % 4 == 0)
    @rule(who=who, workflow_id=letter)
    def delete(self, who: int, workflow_id: str) -> None:
        answer = self.run(self.backend(who).delete_workflow(self.queue, workflow_id))
        assert answer is (self.workflows.pop(workflow_id, None) is not None)
        self.waited_for.pop(workflow_id, None)

    @precondition(lambda self: self.ran % 8 == 0)
    @rule(who=who)
    def clear(self, who: int) -> None:
        """Which leaves workflows alone."""
        assert self.run(self.backend(who).clear(self.queue)) == 0

    @rule(who=who, ids=some)
    def look_at_some(self, who: int, ids: list[str]) -> None:
        found = self.run(self.backend(who).get_workflows(self.queue, ids))
        assert found == {i: self.workflows[i] for i in ids if i in self.workflows}

    def look_at_one_thing(self) -> None:
        backend = self.backend(self.ran % 2)
        assert self.run(backend.get_all_workflows(self.queue)) == list(self.workflows.values())

    def look_at_everything(self) -> None:
        self.look_at_one_thing()
        pending = [w for w in self.workflows.values() if not w["completed"] and not w["error"]]
        backend = self.backend(self.ran % 2)
        assert self.run(backend.get_pending_workflows(self.queue)) == pending


@needs_time
def test_two_backends_do_with_workflows_what_the_model_does(database: TestDatabase) -> None:
    run_machine(WorkflowMachine, database, LEAST_RULES)
