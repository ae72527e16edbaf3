"""Random schedules of faults: whatever comes together, every event is counted at every viewer.

A run prints its seed, and each scenario what it does. The same again: `CHAOS_SEED=1234 pytest …/test_chaos.py`; one
scenario of it: `CHAOS_SEED=1234 CHAOS_ONLY=17 pytest …`. More than usual: `CHAOS_SCENARIOS=1000`.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace

import aiohttp
import pytest

from tests.integration.faults.conftest import MakeStage
from tests.integration.faults.flow import Flow
from tests.integration.faults.stage import Replica, Stage, caught_up
from tests.integration.faults.viewer import PATIENCE, Viewer, prove
from tests.proxy import TcpProxy
from tests.rabbitmq import Broker

pytestmark = [pytest.mark.timeout(400), pytest.mark.random]

SCENARIOS = int(os.environ.get("CHAOS_SCENARIOS", "50"))
STREAM = "cluster-code.events"
VHOST = "chaos"
# Replicas that take turns in being killed; the first two reach RabbitMQ through a proxy.
GATEWAYS = 2


@dataclass
class World:
    """What faults can be done to. All of it is whole between two scenarios."""

    stage: Stage
    broker: Broker
    proxy: TcpProxy
    flow: Flow
    gateways: list[tuple[AsyncExitStack, Replica]] = field(default_factory=list)
    # What was done, for who reads of a failure.
    story: deque[str] = field(default_factory=lambda: deque(maxlen=60))

    async def open_gateway(self) -> None:
        """One more replica."""
        stack = AsyncExitStack()
        through = replace(
            self.stage.amqp, url=self.broker.server.amqp_url(VHOST, port=self.proxy.port) + "?heartbeat=1"
        )
        # A small history, so that the log itself is asked, too.
        replica = await stack.enter_async_context(self.stage.gateway(amqp=through, history_bytes=1 << 20))
        self.gateways.append((stack, replica))

    async def close_gateway(self, place: int, *, killed: bool) -> None:
        """End one: with a drain, or with its connections gone all at once."""
        stack, replica = self.gateways.pop(place)
        if killed:
            for connection in tuple(replica.context.hub.connections.values()):
                connection.transport.abort()
        await stack.aclose()


@dataclass
class Scenario:
    """One draw: some viewers, some channels, some faults."""

    world: World
    draw: random.Random
    channels: list[str]
    viewers: list[Viewer] = field(default_factory=list)

    async def run(self) -> int:
        """All of it; the events that were counted."""
        world, draw, stage = self.world, self.draw, self.world.stage
        for _ in range(draw.randint(1, 4)):
            wanted = draw.sample(self.channels, draw.randint(1, len(self.channels)))
            self.viewers += await stage.audience(1, wanted, batch=draw.random() < 0.3, cap=0.2)
        async with world.flow.flowing(self.channels, draw.choice([50, 200, 500]), size=draw.choice([0, 0, 3_000])):
            for _ in range(draw.randint(2, 5)):
                # The moment is what is drawn.
                await asyncio.sleep(draw.uniform(0, 0.12))
                await self.fault()
            await asyncio.sleep(draw.uniform(0, 0.1))
        sent = await self.finished()
        counted = prove(self.viewers, sent)
        await stage.leave()
        stage.viewers.clear()
        return counted

    async def finished(self) -> dict[str, int]:
        """Return once every viewer has the last event of each of its channels: what was sent.

        The last of before may have gone with its stream, of which everybody is told; so there is always one more.
        """
        async with asyncio.timeout(PATIENCE):
            while True:
                for channel in self.channels:
                    await self.world.flow.send(channel)
                sent = {channel: self.world.flow.sent[channel] for channel in self.channels}
                try:
                    await caught_up(self.viewers, sent, within=1.0)
                except AssertionError as late:
                    self.world.story.append(f"   {late}")
                else:
                    return sent

    async def fault(self) -> None:
        """One of them, by chance."""
        faults: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self.cut_viewers),
            (6, self.change_channels),
            (3, self.slow_viewer),
            (3, self.burst),
            (2, self.cut_log),
            (2, self.freeze_log),
            (1, self.refuse_log),
            (2, self.kill_gateway),
            (1, self.drain_gateway),
            (1, self.delete_stream),
        ]
        chosen = self.draw.choices([one for _, one in faults], [weight for weight, _ in faults])[0]
        self.world.story.append(chosen.__name__)
        await chosen()

    async def cut_viewers(self) -> None:
        for viewer in self.draw.sample(self.viewers, self.draw.randint(1, len(self.viewers))):
            viewer.cut()

    async def change_channels(self) -> None:
        for viewer in self.viewers:
            for channel in self.channels:
                if self.draw.random() < 0.4:
                    if channel in viewer.channels:
                        viewer.unsubscribe(channel)
                    else:
                        viewer.subscribe(channel)

    async def slow_viewer(self) -> None:
        viewer = self.draw.choice(self.viewers)
        link = viewer._link
        if link is not None and viewer.connected.is_set():
            link.transport.pause_reading()
            await asyncio.sleep(self.draw.uniform(0, 0.2))
            if not link.transport.is_closing():
                link.transport.resume_reading()

    async def burst(self) -> None:
        await self.world.flow.send(
            self.draw.choice(self.channels), self.draw.randint(10, 300), size=self.draw.choice([0, 2_000])
        )

    async def cut_log(self) -> None:
        self.world.proxy.cut()

    async def freeze_log(self) -> None:
        self.world.proxy.freeze()
        await asyncio.sleep(self.draw.uniform(0, 0.5))
        await self.world.proxy.resume()

    async def refuse_log(self) -> None:
        await self.world.proxy.refuse()
        self.world.proxy.cut()
        await asyncio.sleep(self.draw.uniform(0, 0.3))
        await self.world.proxy.resume()

    async def kill_gateway(self) -> None:
        await self.world.close_gateway(self.draw.randrange(GATEWAYS), killed=True)
        await self.world.open_gateway()

    async def drain_gateway(self) -> None:
        await self.world.close_gateway(self.draw.randrange(GATEWAYS), killed=False)
        await self.world.open_gateway()

    async def delete_stream(self) -> None:
        # Nobody may have declared it again since the last time, or the broker is away.
        with suppress(aiohttp.ClientError):
            await self.world.broker.server.delete_queue(VHOST, STREAM)

    async def restart_broker(self) -> None:
        self.world.story.append("restart_broker")
        await self.world.broker.kill()
        await self.world.broker.start()


async def test_no_schedule_of_faults_loses_an_event(stage_on: MakeStage, broker: Broker) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 32))
    only = os.environ.get("CHAOS_ONLY")
    print(f"CHAOS_SEED={seed}")
    await broker.server.add_vhost(VHOST)
    async with (
        stage_on(broker.server.amqp_url(VHOST)) as stage,
        TcpProxy(broker.server.host, broker.server.port) as proxy,
    ):
        world = World(stage, broker, proxy, Flow(await stage.log()))
        try:
            for _ in range(GATEWAYS):
                await world.open_gateway()
            # A broker takes seconds to start: one scenario of all has to do with that.
            restarted = random.Random(seed).randrange(SCENARIOS)
            for number in [int(only)] if only else range(SCENARIOS):
                world.story.append(f"-- CHAOS_ONLY={number}")
                draw = random.Random(f"{seed}/{number}")
                scenario = Scenario(world, draw, [f"app:{number}-{n}" for n in range(draw.randint(1, 3))])
                try:
                    if number == restarted:
                        await asyncio.gather(scenario.run(), scenario.restart_broker())
                    else:
                        await scenario.run()
                except BaseException:
                    print("\n".join(world.story))
                    raise
        finally:
            while world.gateways:
                await world.close_gateway(0, killed=True)
    await broker.server.delete_vhost(VHOST)
