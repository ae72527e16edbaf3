"""What connections cost: their handshakes, the memory of idle ones, and how long the loop is away with 10,000 of them.

    python -m tests.benchmarks.connections [--servers ours,nchan,ws,aiohttp] [--rounds 3] [--count 10000]

One pass over a server: open all, each on a channel that all share and on one of its own; let them rest; then close and
open half as many again, a few at a time, while the loop's turns are watched.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from orchestrator import log_setup
from orchestrator.settings import environment
from tests.benchmarks.report import Figure, Progress, show, spread, table_of
from tests.benchmarks.servers import KINDS, Missing, Stage, open_all, stage

COUNT = 10_000
ROUNDS = 3
SERVERS = ("ours", "nchan", "ws", "aiohttp")
# Opened before anything is measured: what a server makes once, it has made.
_FIRST = 10
# Connections closed, then opened, at a time.
_STEP = 50
_REST = 3.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One pass. Milliseconds; without a probe in the server, None."""

    handshakes_per_cpu_second: float
    bytes_per_connection: float
    pause: float | None
    # The part of it in which the server's thread ran: what is missing was taken by somebody else on its core.
    cpu_pause: float | None
    # Full garbage collections while connections came and went, and the longest of them.
    collections: int = 0
    collection: float = 0.0


async def measure(on: Stage, name: str, count: int) -> Sample:
    """One pass over one server. Raises Missing."""
    churned = count // 2 // _STEP * _STEP
    async with (
        on.serve(KINDS[name]) as server,
        on.browsers(server, _FIRST + count + churned, two=True, publisher=False) as browsers,
    ):
        await open_all(browsers, _FIRST)
        await server.ask()
        memory, cpu = server.memory(), server.cpu()
        await open_all(browsers, count)
        cpu = server.cpu() - cpu
        await asyncio.sleep(_REST)
        await server.ask()
        memory = server.memory() - memory
        await server.ask()
        for _ in range(churned // _STEP):
            await browsers(f"close {_STEP}")
            await browsers(f"open {_STEP} {_STEP}")
        seen = await server.ask()
        return Sample(
            handshakes_per_cpu_second=count / cpu,
            bytes_per_connection=memory / count,
            pause=seen["pause"] * 1000 if seen else None,
            cpu_pause=seen["cpu_pause"] * 1000 if seen else None,
            collections=int(seen.get("collections", 0)),
            collection=seen.get("collection", 0.0) * 1000,
        )


async def rounds(
    on: Stage, servers: Sequence[str], number: int, count: int, progress: Progress
) -> dict[str, list[Sample]]:
    """Passes over each server in turn. Servers that miss are told of."""
    samples: dict[str, list[Sample]] = {name: [] for name in servers}
    for place in range(number):
        for name in tuple(samples):
            progress.at(f"round {place + 1} of {number}, {name}")
            try:
                samples[name].append(await measure(on, name, count))
            except Missing as missing:
                progress.print(f"[yellow]{name} is left out:[/] {missing}")
                del samples[name]
    return samples


def figures(samples: dict[str, list[Sample]]) -> list[Figure]:
    """What is wanted of the whole."""
    found = []
    ours = samples.get("ours", [])
    if ours:
        found.append(
            Figure(
                "handshakes with token checks and single use",
                f"{spread([sample.handshakes_per_cpu_second for sample in ours], 0)} per CPU-second",
                ">= 2,500",
                "tokens made beforehand; the database's time is not counted",
            )
        )
        found.append(
            Figure(
                "resident memory of an idle connection",
                f"{spread([sample.bytes_per_connection / 1024 for sample in ours], 1)} KiB",
                "<= 4 KiB",
                _others(samples, lambda sample: sample.bytes_per_connection / 1024),
            )
        )
        found.append(
            Figure(
                "longest pause of the loop",
                f"{spread([sample.pause or 0 for sample in ours], 0)} ms",
                "<= 50 ms",
                f"CPU: {spread([sample.cpu_pause or 0 for sample in ours], 0)} ms; "
                + _others(samples, lambda sample: sample.pause),
            )
        )
    return found


def _others(samples: dict[str, list[Sample]], value: Callable[[Sample], float | None]) -> str:
    parts = []
    for name, kept in samples.items():
        values = [found for sample in kept if (found := value(sample)) is not None]
        if name != "ours" and values:
            parts.append(f"{name} {spread(values, 1)}")
    return ", ".join(parts)


def table(samples: dict[str, list[Sample]]) -> Table:
    """All that was measured."""
    headings = ("server", "handshakes/CPU-s", "KiB idle", "pause ms", "CPU ms of it", "full gc", "longest gc ms")
    found = table_of("connections", *headings)
    for name, kept in samples.items():
        if kept:
            probed = [sample for sample in kept if sample.pause is not None]
            found.add_row(
                name,
                spread([sample.handshakes_per_cpu_second for sample in kept], 0),
                spread([sample.bytes_per_connection / 1024 for sample in kept], 1),
                spread([sample.pause or 0 for sample in probed], 0) if probed else "",
                spread([sample.cpu_pause or 0 for sample in probed], 0) if probed else "",
                spread([sample.collections for sample in probed], 0) if probed else "",
                spread([sample.collection for sample in probed], 0) if probed else "",
            )
    return found


async def run(servers: Sequence[str] = SERVERS, number: int = ROUNDS, count: int = COUNT) -> list[Figure]:
    """Measure, print the table, and return what is wanted. Raises Missing."""
    async with stage(count) as on:
        with Progress("connections") as progress:
            samples = await rounds(on, servers, number, count, progress)
            progress.print(table(samples))
    return figures(samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.connections",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--servers", default=",".join(SERVERS), help=f"of {','.join(KINDS)} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each server (default: %(default)s)")
    parser.add_argument("--count", type=int, default=COUNT, help="connections (default: %(default)s)")
    given = parser.parse_args()
    servers = given.servers.split(",")
    if unknown := set(servers) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    log_setup.configure(environment(None), at_least="error")
    try:
        show(asyncio.run(run(servers, given.rounds, given.count)))
    except Missing as missing:
        raise SystemExit(f"connections: {missing}") from None


if __name__ == "__main__":
    main()
