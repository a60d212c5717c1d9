"""The shop's HTTP servers, and a client of theirs."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

import httpx
import uvicorn

from tests.support.breeding import keep_alive

ACCEPTED, REFUSED, UNDER_WAY = 201, 402, 409
TIMEOUT = 60.0  # seconds


def serve(count: str) -> None:
    """Keep `count` servers alive on one port, which they share as uvicorn's own workers do."""
    from examples.fastapi_shop.app import app

    def run() -> None:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print("port", listener.getsockname()[1])
        keep_alive(int(count), run)


def client_of(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False)


@dataclass
class Outcomes:
    """What a client was told of its orders."""

    accepted: set[UUID] = field(default_factory=set)
    refused: set[UUID] = field(default_factory=set)
    unanswered: set[UUID] = field(default_factory=set)
    repeated: int = 0  # requests, as the one before had no answer

    @property
    def answered(self) -> int:
        return len(self.accepted) + len(self.refused)


async def place(client: httpx.AsyncClient, order_id: UUID, card: str) -> int | None:
    """The answer's status; None where there was none that says what became of the order."""
    order = {"id": str(order_id), "email": "ann@example.org", "total": 1250, "card": card}
    try:
        response = await client.post("/orders", json=order)
    except httpx.TransportError:
        return None
    if response.status_code == UNDER_WAY:  # by a server that died over its commit
        return None
    assert response.status_code in {ACCEPTED, REFUSED}, response.text
    return response.status_code


async def place_all(
    client: httpx.AsyncClient, orders: Sequence[tuple[UUID, str]], outcomes: Outcomes
) -> None:
    """Place orders one after the other; every other one without an answer is placed again."""
    for order_id, card in orders:
        status = await place(client, order_id, card)
        while status is None and order_id.int % 2:
            outcomes.repeated += 1
            status = await place(client, order_id, card)
        told = {ACCEPTED: outcomes.accepted, REFUSED: outcomes.refused, None: outcomes.unanswered}
        told[status].add(order_id)
