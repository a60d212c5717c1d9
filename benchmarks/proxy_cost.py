"""What the delaying proxy itself costs: the same round trip direct and by way of it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg

from .drivers.raw import plain_url
from .servers import Servers
from .statistics import percentile

TIMES = 200


def proxy_cost(servers: Servers, delay: float) -> dict[str, float]:
    """Milliseconds of PostgreSQL's least round trip, p50, by the way it takes."""
    assert servers.postgres_url is not None
    url = servers.postgres_url.render_as_string(hide_password=False)
    ways = {
        "direct": url,
        "proxy without delay": servers.proxied(url, 0.0)[0],
        f"proxy with {1_000 * delay:g} ms": servers.proxied(url, delay)[0],
    }
    return {way: 1_000 * asyncio.run(_round_trip(plain_url(url))) for way, url in ways.items()}


async def _round_trip(url: str) -> float:
    connection: Any = await asyncpg.connect(url)
    try:
        statement = await connection.prepare("SELECT 1")
        took = []
        for _ in range(TIMES):
            begun = time.monotonic()
            await statement.fetchval()
            took.append(time.monotonic() - begun)
        return percentile(took[TIMES // 4 :], 50)
    finally:
        await connection.close()
