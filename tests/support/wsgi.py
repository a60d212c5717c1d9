"""A web application for a server that loads it once and then forks (gunicorn --preload)."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from sheppy import Queue, task

from sheppy_sql import SqlBackend

backend = SqlBackend(os.environ["APPLICATION_DATABASE"], lease=1.0)
queue = Queue(backend, "web")
loop = asyncio.new_event_loop()


@task
async def greet(name: str) -> str:
    return f"Hello, {name}"


async def start() -> None:
    """Connects in the master, takes a task there, and leaves all as it is for the fork."""
    await backend.connect()
    await backend.append("master", [{"id": "of the master"}])
    await backend.pop("master")


async def add(name: str) -> bool:
    return await queue.add(greet(name))


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    added = asyncio.run(add(environ["PATH_INFO"].strip("/")))
    body = json.dumps({"added": added, "pid": os.getpid(), "parent": os.getppid()})
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body.encode()]


loop.run_until_complete(start())
