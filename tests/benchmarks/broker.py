"""From `basic.publish` to the browser, through a RabbitMQ stream: ours against the least that could do the same.

    python -m tests.benchmarks.broker [--rounds 7] [--seconds 5] [--rate 100]

The least is an aiormq reader that hands bodies to the joining floor (`peers/consumer.py`). Each has a virtual host of
its own on one broker; what is published to one is nothing to the other. The time is taken before `basic.publish`, by
the publisher, and on receipt, by the load, on the same clock.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiormq
from aiormq.abc import AbstractChannel
from rich.table import Table

from orchestrator import log_setup
from orchestrator.events import EXCHANGE
from orchestrator.settings import environment
from tests.benchmarks.report import Figure, Progress, show, spread, table_of
from tests.benchmarks.servers import KINDS, Browsers, Missing, Stage, open_all, stage
from tests.benchmarks.stage import on
from tests.rabbitmq import Broker, NoBroker

ROUNDS, SECONDS, RATE, BROWSERS = 7, 5.0, 100, 1000
_BODY = 200
_GRACE = 30.0


@asynccontextmanager
async def _ours(place: Stage, url: str) -> AsyncIterator[tuple[Browsers, AbstractChannel]]:
    async with (
        place.serve(KINDS["ours"], env={"AMQP_URL": url}) as server,
        place.browsers(server, BROWSERS, publisher=False) as browsers,
        _publisher(url) as channel,
    ):
        yield browsers, channel


@asynccontextmanager
async def _floor(place: Stage, url: str) -> AsyncIterator[tuple[Browsers, AbstractChannel]]:
    async with (
        place.serve(KINDS["joining"]) as server,
        place.browsers(server, BROWSERS, publisher=False) as browsers,
    ):
        reader = await asyncio.create_subprocess_exec(
            *on(place.cores.server, [sys.executable, "-m", "tests.benchmarks.peers.consumer", str(server.control)]),
            env=os.environ | {"AMQP_URL": url},
            stdout=subprocess.PIPE,
        )
        try:
            assert reader.stdout is not None
            if not await reader.stdout.readline():
                raise Missing("the reader has ended: see above")
            async with _publisher(url) as channel:
                yield browsers, channel
        finally:
            if reader.returncode is None:
                reader.kill()
            await reader.wait()


@asynccontextmanager
async def _publisher(url: str) -> AsyncIterator[AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel(publisher_confirms=False)
    finally:
        await connection.close()


async def _publish(channel: AbstractChannel, messages: int, rate: int) -> None:
    properties = aiormq.spec.Basic.Properties(delivery_mode=2, content_type="application/json")
    began = time.monotonic()
    for number in range(1, messages + 1):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        properties.message_id = uuid.uuid4().hex
        head = b'{"event_type":"bench.tick","channel":"bench:0","data":{"n":%d,"t":%d,"fill":"' % (
            number,
            time.monotonic_ns(),
        )
        body = head + b"x" * (_BODY - len(head) - 3) + b'"}}'
        await channel.basic_publish(body, exchange=EXCHANGE, routing_key="bench.tick", properties=properties)


async def _round(browsers: Browsers, channel: AbstractChannel, seconds: float, rate: int) -> dict[str, Any]:
    messages = max(1, int(seconds * rate))
    await browsers(f"listen {messages} {seconds + _GRACE}")
    await _publish(channel, messages, rate)
    return await browsers.figures()


async def measure(
    place: Stage, *, rounds: int, seconds: float, rate: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Rounds of each in turn; the first warms up and is not kept. Raises Missing."""
    samples: dict[str, list[dict[str, Any]]] = {"ours": [], "floor": []}
    async with AsyncExitStack() as stack:
        progress.at("starting RabbitMQ")
        try:
            broker = await stack.enter_async_context(Broker())
        except NoBroker as error:
            raise Missing(str(error)) from error
        running = {}
        for name, start in (("ours", _ours), ("floor", _floor)):
            progress.at(f"opening {BROWSERS:,} connections to {name}")
            await broker.server.add_vhost(name)
            running[name] = await stack.enter_async_context(start(place, broker.server.amqp_url(name)))
            await open_all(running[name][0], BROWSERS)
        for number in range(rounds + 1):
            for name, (browsers, channel) in running.items():
                progress.at(f"round {number} of {rounds}, {name}")
                figures = await _round(browsers, channel, seconds if number else min(seconds, 2.0), rate)
                if number:
                    samples[name].append(figures)
    return samples


def figures(samples: dict[str, list[dict[str, Any]]]) -> list[Figure]:
    """What is wanted of the whole."""
    ours, floor = samples["ours"], samples["floor"]
    if not ours:
        return []
    ratios = [one["p99"] / other["p99"] for one, other in zip(ours, floor, strict=True)]
    lost = sum(one["missing"] + one["sequence_errors"] for one in ours)
    return [
        Figure(
            "RabbitMQ publish to browser, 100 msg/s to 1,000: p99, against the floor's",
            f"{spread(ratios)}, {lost} lost",
            "<= 1.5, 0 lost",
            f"{spread([one['p99'] for one in ours], 1)} ms against {spread([one['p99'] for one in floor], 1)} ms",
        )
    ]


def table(samples: dict[str, list[dict[str, Any]]]) -> Table:
    """All that was measured."""
    headings = ("server", "p50 ms", "p99 ms", "longest ms", "deliveries", "lost or out of order")
    found = table_of("RabbitMQ to browsers", *headings)
    for name, kept in samples.items():
        if kept:
            found.add_row(
                name,
                *(spread([figures[key] for figures in kept], 1) for key in ("p50", "p99", "max")),
                f"{sum(figures['deliveries'] for figures in kept):,}",
                str(sum(figures["missing"] + figures["sequence_errors"] for figures in kept)),
            )
    return found


async def run(rounds: int = ROUNDS, seconds: float = SECONDS, rate: int = RATE) -> list[Figure]:
    """Measure, print the table, and return what is wanted. Raises Missing."""
    async with stage(BROWSERS) as place:
        with Progress("RabbitMQ") as progress:
            samples = await measure(place, rounds=rounds, seconds=seconds, rate=rate, progress=progress)
            progress.print(table(samples))
    return figures(samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.broker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each round (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=RATE, help="messages a second (default: %(default)s)")
    given = parser.parse_args()
    log_setup.configure(environment(None), at_least="error")
    try:
        show(asyncio.run(run(given.rounds, given.seconds, given.rate)))
    except Missing as missing:
        raise SystemExit(f"broker: {missing}") from None


if __name__ == "__main__":
    main()
