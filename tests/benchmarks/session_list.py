"""The session list, as the table grows from a thousand to a million rows."""

from __future__ import annotations

import statistics
from time import perf_counter

import asyncpg

from orchestrator.sessions import store
from tests.benchmarks.report import Figure


async def measure(connection: asyncpg.Connection, user_id: int) -> dict[str, float]:
    """Median milliseconds of each kind of list."""
    workspaces = [
        row["workspace_id"]
        for row in await connection.fetch("SELECT workspace_id FROM workspace_members WHERE user_id = $1", user_id)
    ]
    kinds = {
        "own, page 1": {"workspace_ids": workspaces, "page": 1},
        "own, page 10": {"workspace_ids": workspaces, "page": 10},
        "own, stopped": {"workspace_ids": workspaces, "status": "stopped", "page": 1},
        "everybody's, page 1": {"workspace_ids": None, "page": 1},
        "everybody's, stopped": {"workspace_ids": None, "status": "stopped", "page": 1},
        "everybody's, page 100": {"workspace_ids": None, "page": 100},
    }
    return {name: await _median(connection, **arguments) for name, arguments in kinds.items()}


async def _median(connection: asyncpg.Connection, **arguments: object) -> float:
    took = []
    for _ in range(30):
        began = perf_counter()
        await store.list_page(connection, page_size=20, **arguments)  # type: ignore[arg-type]
        took.append((perf_counter() - began) * 1000)
    return statistics.median(took)


def figures(small: dict[str, float], large: dict[str, float]) -> list[Figure]:
    """One figure a kind: how much longer it takes in the large table."""
    return [
        Figure(
            f"session list, {name}",
            f"x {large[name] / small[name]:.2f}",
            "bounded: a page, not the table",
            f"{small[name]:.2f} ms of 1,000 sessions, {large[name]:.2f} ms of 1,000,000",
        )
        for name in small
    ]
