"""Gateways on one log and one database, in this process and in processes of their own, and viewers of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from auth.permissions import Identity
from auth.tokens import Tokens, TokenSettings
from gateway.app import build, listening
from gateway.context import CONTEXT, Context
from gateway.settings import GatewaySettings, RealtimeSettings
from orchestrator.database import Pool
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.process import patiently
from orchestrator.settings import AmqpSettings, DatabaseSettings
from tests.integration.faults.viewer import PATIENCE, Viewer
from tests.integration.processes.process import SECRET, Process
from tests.rabbitmq import free_ports

TOKENS = TokenSettings(secret=SECRET)
# Connections of one user: all viewers of a test are one.
CROWD = 10_000


@dataclass
class Replica:
    """A gateway in this process."""

    port: int
    log: RabbitLog
    context: Context


class Gateway(Process):
    """A gateway in a process of its own."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.environment["PORT"])

    @property
    def rss(self) -> int:
        """Bytes of memory that it has."""
        return psutil.Process(self.pid).memory_info().rss

    @property
    def sockets(self) -> int:
        """Sockets of clients that it has open."""
        connections = psutil.Process(self.pid).net_connections("tcp")
        return sum(1 for one in connections if one.laddr.port == self.port and one.status != psutil.CONN_LISTEN)


@dataclass
class Stage:
    """What a test needs. `ports` are the gateways that viewers choose from."""

    pool: Pool
    database: DatabaseSettings
    amqp: AmqpSettings
    folder: Path
    user_id: int
    stack: AsyncExitStack
    tokens: Tokens = field(default_factory=lambda: Tokens(TOKENS))
    ports: list[int] = field(default_factory=list)
    viewers: list[Viewer] = field(default_factory=list)

    def token(self, channels: Iterable[str] = ("app:*",)) -> str:
        """A new short token of the test's user."""
        return self.tokens.issue_short(Identity(self.user_id, "faults@example.org", False, channels=tuple(channels)))

    async def log(self, name: str = "publisher", **given: object) -> RabbitLog:
        """A log of one's own, closed at the end."""
        log = await RabbitLog.open(replace(self.amqp, **given), name=name)
        self.stack.push_async_callback(log.close)
        return log

    @asynccontextmanager
    async def gateway(self, *, amqp: AmqpSettings | None = None, **limits: object) -> AsyncIterator[Replica]:
        """A gateway in this process, ready, among `ports`. At its end nothing of it is left."""
        real_time = replace(RealtimeSettings(), **{"connections_per_user": CROWD, "drain_rate": 100_000, **limits})
        settings = replace(
            GatewaySettings(), host="127.0.0.1", port=0, realtime=real_time, rate_limit_address="off",
            rate_limit_user="off",
        )  # fmt: skip
        # As the process does it: RabbitMQ may be away just now.
        log = await patiently("event log", lambda: RabbitLog.open(amqp or self.amqp, name="gateway"))
        try:
            app = build(settings, TOKENS, self.pool, log, self.database)
            context = app[CONTEXT]
            async with listening(app, settings) as port:
                await until(lambda: context.feed.ready)
                self.ports.append(port)
                try:
                    yield Replica(port, log, context)
                finally:
                    self.ports.remove(port)
            assert context.hub.connections == {}
            assert context.hub.lingering == {}
            assert not context.hub.by_user
            assert not context.hub.actions
        finally:
            await log.close()

    def process(self, module: str = "gateway", **environment: str) -> Gateway:
        """A process, not started yet; ended with the test."""
        (self.folder / "logs").mkdir(exist_ok=True)
        process = Gateway(
            self.folder / "logs",
            module,
            **{
                "DATABASE_URL": self.database.url,
                "AMQP_URL": self.amqp.url,
                "DATA_DIR": str(self.folder / "data"),
                "PORT": str(free_ports(1)[0]),
                "WS_MAX_CONNECTIONS_PER_USER": str(CROWD),
                "RATE_LIMIT_ADDRESS": "off",
                "RATE_LIMIT_USER": "off",
                "RATE_LIMIT_LOGIN": "off",
                **environment,
            },
        )

        async def end() -> None:
            if process.running:
                await process.kill()

        self.stack.push_async_callback(end)
        return process

    async def gateways(self, count: int, **environment: str) -> list[Gateway]:
        """So many processes of the gateway, ready, among `ports`."""
        started = [self.process(**environment) for _ in range(count)]
        for process in started:
            await process.start()
        for process in started:
            await process.until_answer("/ready", 200)
            self.ports.append(process.port)
        return started

    async def audience(
        self, count: int, channels: Sequence[str], *, ports: list[int] | None = None, measured: bool = False,
        **options: object,
    ) -> list[Viewer]:  # fmt: skip
        """So many viewers of the channels, connected. They end with the test."""
        came = [
            Viewer(lambda: self.ports if ports is None else ports, self.token, channels, **options)
            for _ in range(count)
        ]
        self.viewers += came
        for viewer in came:
            viewer.latencies = [] if measured else None
            viewer.start()
        async with asyncio.timeout(PATIENCE):
            for viewer in came:
                await viewer.connected.wait()
        return came

    async def leave(self) -> None:
        """End all viewers."""
        await asyncio.gather(*(viewer.stop() for viewer in self.viewers))


async def caught_up(viewers: Iterable[Viewer], sent: dict[str, int], *, within: float = PATIENCE) -> None:
    """Return once each viewer has the last event of each of its channels. Fails with who has not."""
    viewers = list(viewers)

    def behind() -> list[str]:
        return [
            f"viewer {place}: {channel} at {viewer.last(channel)} of {sent[channel]}, codes {dict(viewer.codes)}, "
            f"refusals {dict(viewer.refusals)}, final {viewer.final}"
            for place, viewer in enumerate(viewers)
            for channel in viewer.channels
            if channel in sent and (viewer.last(channel) < sent[channel] or channel in viewer.replaying)
        ]

    try:
        await until(lambda: not behind(), within=within, pause=0.02)
    except TimeoutError:
        late = behind()
        raise AssertionError(f"{len(late)} not there: {late[:5]}") from None


async def until(condition, *, within: float = PATIENCE, pause: float = 0.01) -> None:
    """Return once a condition holds; polls."""
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(pause)
