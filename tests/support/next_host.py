"""sheppy's next release, as far as it concerns a backend: it declares more methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

from sheppy import Backend

from sheppy_sql import SqlBackend

MakeNextBackend = Callable[..., Awaitable["NextSqlBackend"]]


class NextBackend(Backend):
    """Its worker gives the signs of life for what it runs, and asks for what is stale."""

    @abstractmethod
    async def cancel(self, queue_name: str, task_id: str) -> dict[str, Any] | None: ...

    @abstractmethod
    async def delete_task(self, queue_name: str, task_id: str) -> bool: ...

    @abstractmethod
    async def get_workflow_results(
        self, queue_name: str, workflow_ids: list[str], timeout: float | None = None
    ) -> dict[str, dict[str, Any]]: ...

    @abstractmethod
    async def heartbeat(self, queue_name: str, task_ids: list[str]) -> None: ...

    @abstractmethod
    async def get_stale_messages(
        self, queue_name: str, min_idle_ms: int
    ) -> list[dict[str, Any]]: ...


class NextSqlBackend(SqlBackend, NextBackend):
    """SqlBackend as it is where that release is installed."""
