"""`make bench`: everything that `docs/performance.md` speaks of, in one run. It reports, and never fails on a figure.

python -m tests.benchmarks [rest] [events] [list] [idle]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from rich.console import Console

import migrations
from orchestrator.database import connect
from orchestrator.settings import DatabaseSettings
from scripts.embedded import embedded_postgres
from tests.benchmarks import events, rest, session_list
from tests.benchmarks.report import Figure, show
from tests.benchmarks.stage import cluster_code, fill, main_token, serve

KINDS = ("rest", "events", "idle", "list")


async def run(kinds: set[str]) -> list[Figure]:
    """Measure the kinds asked for."""
    figures: list[Figure] = []
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="cluster-code-bench-") as name:
        folder = Path(name)
        async with embedded_postgres(folder / "database") as postgres:
            url = await postgres.create_database("bench")
            await asyncio.to_thread(migrations.apply, url)
            connection = await connect(DatabaseSettings(url=url), name="bench")
            try:
                if kinds & {"rest", "events", "idle"}:
                    argv, port, env = cluster_code(url, folder / "data")
                    async with serve(argv, ready="/ready", port=port, env=env) as server:
                        if "idle" in kinds:
                            console.print("at rest …")
                            figures.append(await events.idle(server))
                        user = await fill(connection, sessions=1000)
                        token = main_token(user)
                        if "rest" in kinds:
                            console.print("REST against a bare handler …")
                            figures += await rest.measure(server, url, token, folder)
                        if "events" in kinds:
                            console.print("events …")
                            figures.append(await events.first_status(server, connection, token))
                            figures.append(await events.recovery(server, connection, token, user))
                if "list" in kinds:
                    console.print("the session list, small and large …")
                    small_url = await postgres.create_database("small")
                    await asyncio.to_thread(migrations.apply, small_url)
                    figures += await _lists(small_url)
            finally:
                await connection.close()
    return figures


async def _lists(url: str) -> list[Figure]:
    connection = await connect(DatabaseSettings(url=url), name="bench")
    try:
        user = await fill(connection, sessions=300, crowd=700)
        small = await session_list.measure(connection, user)
        await fill(connection, sessions=10, crowd=999_000)
        return session_list.figures(small, await session_list.measure(connection, user))
    finally:
        await connection.close()


def main() -> None:
    kinds = set(sys.argv[1:]) or set(KINDS)
    if unknown := kinds - set(KINDS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    show(asyncio.run(run(kinds)))


if __name__ == "__main__":
    main()
