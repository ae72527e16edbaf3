"""`make bench`: everything that `docs/performance.md` speaks of, in one run. It reports, and never fails on a figure.

    python -m tests.benchmarks [KIND...]

    fanout        deliveries per CPU-second, against floors in C, nginx + nchan, Node ws, websockets and aiohttp
    connections   handshakes, memory of idle connections, the longest pause of the loop
    rabbitmq      from basic.publish to the browser
    watch         10,000 pods that change 2,000 times a second, against a loop that only reads and parses
    deploy        from a push to a healthy app, against git, docker build and docker run by hand
    rest          REST against a bare handler
    events        from a request's answer to its first event, and recovery
    idle          the embedded process at rest
    list          the session list of a small table and of a large one

The first four can be run in parts, with rounds of any length: see `--help` of `python -m tests.benchmarks.fanout`,
`.connections`, `.broker` and `.watch`, for example

    python -m tests.benchmarks.fanout one-at-a-time --servers ours,floor --seconds 2 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from rich.console import Console

import migrations
from orchestrator import log_setup
from orchestrator.database import connect
from orchestrator.settings import DatabaseSettings, environment
from scripts.embedded import embedded_postgres
from tests.benchmarks import broker, connections, deploy, events, fanout, rest, session_list, watch
from tests.benchmarks.report import Figure, show
from tests.benchmarks.servers import Missing
from tests.benchmarks.stage import cluster_code, fill, main_token, serve

# What is measured on the embedded process, and all of it.
EMBEDDED = ("rest", "events", "idle", "list")
KINDS = ("fanout", "connections", "rabbitmq", "watch", "deploy", *EMBEDDED)


async def run(kinds: set[str]) -> list[Figure]:
    """Measure those of the embedded process that are asked for."""
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


async def _measure(kinds: set[str]) -> list[Figure]:
    figures: list[Figure] = []
    apart = {
        "fanout": fanout.run,
        "connections": connections.run,
        "rabbitmq": broker.run,
        "watch": watch.run,
        "deploy": deploy.measure,
    }
    for kind, run_all in apart.items():
        if kind in kinds:
            try:
                figures += await run_all()
            except Missing as missing:
                figures.append(Figure(kind, "not measured", note=str(missing)))
    if kinds & set(EMBEDDED):
        figures += await run(kinds)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="which (default: all)")
    kinds = set(parser.parse_args().kinds) or set(KINDS)
    if unknown := kinds - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    log_setup.configure(environment(None), at_least="error")
    show(asyncio.run(_measure(kinds)))


if __name__ == "__main__":
    main()
