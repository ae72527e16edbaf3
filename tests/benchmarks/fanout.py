"""Fan-out: deliveries per server-CPU-second of ours, of the floors and of the peers, in turns.

    python -m tests.benchmarks.fanout [SCENARIO...] [--servers ours,floor] [--seconds 2] [--rounds 5]

A delivery is one event that one browser has received whole and in order. Its price is user and system time of the
server's processes, from the operating system; the load runs on another core, and what it costs is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from rich.table import Table

from orchestrator import log_setup
from orchestrator.settings import environment
from tests.benchmarks.report import Figure, Progress, show, spread, table_of
from tests.benchmarks.servers import KINDS, Browsers, Missing, Running, Stage, open_all, stage

ROUNDS = 5
SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is published to whom. `command` is for `native/browsers.c`, without its first argument, the seconds."""

    name: str
    title: str
    connections: int
    command: tuple[str, str]
    # The server that ours is compared to, and what share of it is wanted.
    wanted: tuple[tuple[str, float], ...]
    own: bool = False


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "one-at-a-time",
            "one message at a time, 1,000 browsers on one channel",
            1000,
            ("closed", "1 1"),
            (("floor", 0.80), ("nchan", 1.1)),
        ),
        Scenario(
            "bursts",
            "bursts of 16 messages, 1,000 browsers",
            1000,
            ("closed", "16 16"),
            (("joining", 0.80), ("nchan", 14)),
        ),
        Scenario(
            "in-flight",
            "16 messages in flight, 5,000 browsers",
            5000,
            ("closed", "16 1"),
            (("joining", 0.85), ("nchan", 14)),
        ),
        Scenario(
            "own-channel",
            "5,000 browsers, each on its own channel",
            5000,
            ("closed", "250 250"),
            (("floor", 0.60), ("nchan", 2)),
            own=True,
        ),
        Scenario("open-loop", "400 messages a second to 1,000 browsers", 1000, ("paced", "400"), ()),
    )
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one server. Milliseconds; `rate` in deliveries per server-CPU-second."""

    rate: float
    p50: float
    p99: float
    longest: float
    # Shares of one core.
    server_busy: float
    load_busy: float
    errors: int
    missing: int


async def measure(
    on: Stage,
    scenario: Scenario,
    servers: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    progress: Progress,
) -> dict[str, list[Sample]]:
    """Rounds of each server in turn; the first of each warms it up and is not kept. Servers that miss are told of."""
    samples: dict[str, list[Sample]] = {}
    async with AsyncExitStack() as stack:
        running: dict[str, tuple[Running, Browsers]] = {}
        for name in servers:
            progress.at(f"opening {scenario.connections:,} connections to {name}")
            try:
                server = await stack.enter_async_context(on.serve(KINDS[name]))
                browsers = await stack.enter_async_context(on.browsers(server, scenario.connections, own=scenario.own))
                await open_all(browsers, scenario.connections)
            except Missing as missing:
                progress.print(f"[yellow]{name} is left out:[/] {missing}")
                continue
            running[name] = server, browsers
            samples[name] = []
        for number in range(rounds + 1):
            for name, (server, browsers) in running.items():
                progress.at(f"round {number} of {rounds}, {name}")
                sample = await _round(server, browsers, scenario, seconds if number else min(1.0, seconds))
                if number:
                    samples[name].append(sample)
    return samples


async def _round(server: Running, browsers: Browsers, scenario: Scenario, seconds: float) -> Sample:
    before = server.cpu()
    verb, rest = scenario.command
    figures = await browsers(f"{verb} {seconds} {rest}")
    cpu = server.cpu() - before
    return Sample(
        rate=figures["deliveries"] / max(cpu, 0.01),
        p50=figures["p50"],
        p99=figures["p99"],
        longest=figures["max"],
        server_busy=cpu / figures["seconds"],
        load_busy=figures["load_cpu"] / figures["seconds"],
        errors=figures["sequence_errors"],
        missing=figures["missing"],
    )


def ratios(samples: dict[str, list[Sample]], other: str) -> list[float]:
    """Ours by the other, round by round."""
    return [ours.rate / theirs.rate for ours, theirs in zip(samples["ours"], samples[other], strict=True)]


def figures(scenario: Scenario, samples: dict[str, list[Sample]]) -> list[Figure]:
    """What the issue asks of the scenario."""
    if "ours" not in samples:
        return []
    found = []
    for other, share in scenario.wanted:
        name = f"{scenario.title}: share of {KINDS[other].title}"
        if other in samples:
            found.append(Figure(name, spread(ratios(samples, other)), f">= {share:g}", _rates(samples, "ours", other)))
        else:
            found.append(Figure(name, "-", f">= {share:g}", KINDS[other].missing() or "not measured"))
    if not scenario.wanted:
        p99 = [sample.p99 for sample in samples["ours"]]
        others = ", ".join(
            f"{name} {statistics.median(sample.p99 for sample in kept):,.0f}"
            for name, kept in samples.items()
            if name != "ours"
        )
        found.append(Figure(f"{scenario.title}: p99", f"{spread(p99, 1)} ms", "<= 10 ms", f"others: {others}"))
    return found


def _rates(samples: dict[str, list[Sample]], *names: str) -> str:
    rates = " against ".join(f"{statistics.median(s.rate for s in samples[name]) / 1000:,.0f}" for name in names)
    return f"{rates} thousand deliveries per CPU-second; {_lost(samples['ours'])} lost or out of order"


def _lost(samples: Sequence[Sample]) -> int:
    return sum(sample.missing + sample.errors for sample in samples)


def table(scenario: Scenario, samples: dict[str, list[Sample]]) -> Table:
    """All that was measured of a scenario."""
    headings = ("server", "1,000 deliveries/CPU-s", "ours/it", "p50 ms", "p99 ms", "longest", "busy", "load", "lost")
    found = table_of(scenario.title, *headings)
    for name, kept in samples.items():
        if kept:
            found.add_row(
                name,
                spread([sample.rate / 1000 for sample in kept], 0),
                spread(ratios(samples, name)) if "ours" in samples else "",
                spread([sample.p50 for sample in kept], 2),
                spread([sample.p99 for sample in kept], 2),
                f"{max(sample.longest for sample in kept):.1f}",
                f"{statistics.median(sample.server_busy for sample in kept):.0%}",
                f"{statistics.median(sample.load_busy for sample in kept):.0%}",
                str(_lost(kept)),
            )
    return found


async def run(
    names: Sequence[str] = tuple(SCENARIOS),
    servers: Sequence[str] = tuple(KINDS),
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> list[Figure]:
    """Measure these scenarios, printing a table of each, and return what is wanted of them. Raises Missing."""
    found: list[Figure] = []
    async with stage(max(SCENARIOS[name].connections for name in names)) as on:
        for name in names:
            scenario = SCENARIOS[name]
            with Progress(f"fanout, {name}") as progress:
                samples = await measure(on, scenario, servers, rounds=rounds, seconds=seconds, progress=progress)
                progress.print(table(scenario, samples))
            found += figures(scenario, samples)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.fanout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--servers", default=",".join(KINDS), help=f"of {','.join(KINDS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each round (default: {SECONDS:g})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each server (default: {ROUNDS})")
    given = parser.parse_args()
    names, servers = given.scenarios or list(SCENARIOS), given.servers.split(",")
    if unknown := set(names) - set(SCENARIOS) | set(servers) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    log_setup.configure(environment(None), at_least="error")
    try:
        show(asyncio.run(run(names, servers, given.rounds, given.seconds)))
    except Missing as missing:
        raise SystemExit(f"fanout: {missing}") from None


if __name__ == "__main__":
    main()
