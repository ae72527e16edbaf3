"""Our gateway, whole, for the fan-out benchmarks: a real `gateway.app.build` whose log is fed from the control port.

    python -m tests.benchmarks.serve PORT CONTROL_PORT

`DATABASE_URL` names the database. With `AMQP_URL` the log is the real one, in RabbitMQ.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence

import uvloop

from auth.tokens import TokenSettings
from gateway import app as gateway
from gateway.settings import GatewaySettings, RealtimeSettings
from orchestrator import log_setup
from orchestrator.database import open_pool
from orchestrator.eventlog.contract import Entry, EventLog
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.events import Event
from orchestrator.settings import AmqpSettings, DatabaseSettings, environment, load
from tests.benchmarks import control
from tests.benchmarks.stage import SECRET


class FedLog:
    """An `EventLog` of ready bodies for one reader: what the log costs belongs to the log, not to the fan-out."""

    epoch = "bench"

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._head = 0
        self._grown = asyncio.Event()

    async def head(self) -> int:
        return self._head

    async def offset_before(self, seconds: float) -> int:
        return self._head

    def feed(self, channel: str, body: bytes) -> None:
        """Append an envelope."""
        self._head += 1
        self._entries.append(Entry(self._head, str(self._head), "bench.tick", channel, body))
        self._grown.set()

    async def publish(self, events: Sequence[Event]) -> None:
        for event in events:
            self.feed(event.channel, event.body())

    async def read(self, after: int) -> AsyncGenerator[Sequence[Entry], None]:
        while True:
            await self._grown.wait()
            self._grown.clear()
            batch, self._entries = self._entries, []
            yield batch

    async def check(self) -> None:
        return

    async def close(self) -> None:
        return


async def _main() -> None:
    port, control_port = control.ports()
    log_setup.configure(environment(None), at_least="warning")
    settings = GatewaySettings(
        port=port,
        rate_limit_address="off",
        rate_limit_user="off",
        realtime=RealtimeSettings(connections_per_user=1 << 20),
    )
    database = DatabaseSettings(url=os.environ["DATABASE_URL"])
    pool = await open_pool(database, name="bench")
    log, feed = await _open_log()
    try:
        app = gateway.build(settings, TokenSettings(secret=SECRET), pool, log, database)
        async with gateway.listening(app, settings):
            await control.listen(control_port, feed)
            await gateway.until_failure(app)
    finally:
        await log.close()
        pool.terminate()


async def _open_log() -> tuple[EventLog, control.Publish]:
    if os.environ.get("AMQP_URL"):
        return await RabbitLog.open(load(AmqpSettings, environment(None)), name="bench"), _nothing
    fed = FedLog()
    return fed, fed.feed


def _nothing(channel: str, body: bytes) -> None:
    """RabbitMQ is published to, not this process."""


if __name__ == "__main__":
    uvloop.run(_main())
