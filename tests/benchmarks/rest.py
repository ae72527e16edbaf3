"""REST, as a share of what a bare aiohttp handler does with the same queries: requests per CPU-second of the server."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from auth.tokens import TokenSettings
from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from orchestrator.database import open_pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.settings import DatabaseSettings
from tests.benchmarks.load import load
from tests.benchmarks.report import Figure, spread
from tests.benchmarks.stage import SECRET, Server, free_port, serve

ROUNDS = 5
SECONDS = 3.0
ROUTES = (("POST", "/api/v1/auth", "POST /api/v1/auth"), ("GET", "/api/v1/sessions", "GET /api/v1/sessions"))


async def queries(database_url: str, token: str) -> dict[str, list[tuple[str, tuple[Any, ...]]]]:
    """The statements that each route sends to the database, with their arguments, in order."""
    settings = DatabaseSettings(url=database_url)
    pool = await open_pool(settings, name="bench")
    # One connection, so that one logger sees everything.
    seen: list[tuple[str, tuple[Any, ...]]] = []
    found = {}
    try:
        for holder in pool._holders:
            if holder._con is not None:
                holder._con.add_query_logger(lambda query: seen.append((query.query, tuple(query.args or ()))))
        app = gateway_app.build(GatewaySettings(), TokenSettings(secret=SECRET), pool, MemoryLog(), settings)
        async with TestClient(TestServer(app)) as client:
            for method, path, _ in ROUTES:
                # The first request may warm something up.
                for _ in range(2):
                    seen.clear()
                    async with client.request(method, path, headers={"Authorization": f"Bearer {token}"}) as answer:
                        assert answer.status == 200, await answer.text()
                found[path] = list(seen)
    finally:
        pool.terminate()
    return found


async def measure(server: Server, database_url: str, token: str, folder: Path) -> list[Figure]:
    """Alternate between the two servers, round by round, and compare what a CPU-second of each answers."""
    plan = folder / "queries.pickle"
    routes = await queries(database_url, token)
    plan.write_bytes(pickle.dumps({"url": database_url, "routes": routes}))
    port = free_port()
    bare_argv = [sys.executable, "-m", "tests.benchmarks.bare", str(port), str(plan)]
    figures = []
    async with serve(bare_argv, ready="/api/v1/sessions", port=port) as bare:
        for method, path, name in ROUTES:
            ratios, ours_rate, bare_rate = [], [], []
            for round_number in range(ROUNDS + 1):
                ours = await _per_cpu_second(server, method, path, token)
                theirs = await _per_cpu_second(bare, method, path, token)
                if round_number:  # The first warms both up.
                    ratios.append(ours / theirs)
                    ours_rate.append(ours)
                    bare_rate.append(theirs)
            figures.append(
                Figure(
                    f"{name}, share of a bare handler",
                    spread(ratios),
                    ">= 0.6",
                    f"{spread(ours_rate, 0)} against {spread(bare_rate, 0)} requests per CPU-second; "
                    f"{len(routes[path])} statements each",
                )
            )
    return figures


async def _per_cpu_second(server: Server, method: str, path: str, token: str) -> float:
    before = server.cpu()
    tally = await load(server.port, method, path, token=token, seconds=SECONDS)
    if tally.failures:
        raise SystemExit(f"{method} {path}: {tally.failures} of {tally.answers} answers failed: {tally.first[:500]!r}")
    return tally.answers / (server.cpu() - before)
