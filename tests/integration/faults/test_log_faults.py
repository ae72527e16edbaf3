"""The log is taken away under gateways that serve: every event is counted at every viewer."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.integration.faults.conftest import MakeStage
from tests.integration.faults.flow import Flow
from tests.integration.faults.stage import Stage, caught_up, until
from tests.integration.faults.viewer import Viewer, p99, prove
from tests.proxy import TcpProxy
from tests.rabbitmq import Broker, Server

CHANNELS = ["app:one", "app:two"]
STREAM = "cluster-code.events"


async def test_a_broker_that_is_killed_and_started_again_loses_nothing(stage_on: MakeStage, broker: Broker) -> None:
    await broker.server.add_vhost("killed")
    async with stage_on(broker.server.amqp_url("killed")) as stage, stage.gateway(), stage.gateway():
        viewers = await stage.audience(20, CHANNELS)
        flow = Flow(await stage.log())
        async with flow.flowing(CHANNELS, 200):
            await seen(viewers, flow, 50)
            await broker.kill()
            # Clients that come while it is away are served from what the gateways have.
            for viewer in viewers[:10]:
                viewer.cut()
            await asyncio.gather(*(viewer.until(lambda v=viewer: v.connections == 2) for viewer in viewers[:10]))
            await broker.start()
            await seen(viewers, flow, 100)
        await caught_up(viewers, flow.sent)
        assert prove(viewers, flow.sent) == 20 * flow.sent.total()
        # Nobody was told that something is missing, and nobody was sent away.
        assert all(len(segments) == 1 for viewer in viewers for segments in viewer.segments.values())
        assert sum(viewer.connections for viewer in viewers) == 30
        await stage.leave()
    await broker.server.delete_vhost("killed")


async def test_a_connection_that_dies_without_a_fin_is_noticed_and_loses_nothing(
    stage: Stage, rabbitmq_server: Server, vhost: str
) -> None:
    async with TcpProxy(rabbitmq_server.host, rabbitmq_server.port) as proxy:
        url = rabbitmq_server.amqp_url(vhost, port=proxy.port) + "?heartbeat=1"
        frozen = replace(stage.amqp, url=url, timeout=1.0)
        async with stage.gateway(amqp=frozen), stage.gateway():
            through = await stage.audience(10, CHANNELS, ports=[stage.ports[0]])
            direct = await stage.audience(10, CHANNELS, ports=[stage.ports[1]], measured=True)
            flow = Flow(await stage.log())
            async with flow.flowing(CHANNELS, 200):
                await seen(through + direct, flow, 100)
                undisturbed = p99(latency for viewer in direct for latency in viewer.latencies)
                frozen_at = asyncio.get_running_loop().time()
                before = proxy.accepted
                proxy.freeze()
                # It has given the dead connections up, and tries new ones.
                await until(lambda: proxy.accepted >= before + 3)
                await seen(direct, flow, 20)
                await proxy.resume()
                await seen(through + direct, flow, 100)
            await caught_up(stage.viewers, flow.sent)
            assert prove(stage.viewers, flow.sent) == 20 * flow.sent.total()
            assert all(viewer.connections == 1 for viewer in stage.viewers)
            assert asyncio.get_running_loop().time() - frozen_at > 0
            disturbed = p99(latency for viewer in direct for latency in viewer.latencies)
            assert disturbed < max(2 * undisturbed, 1.0)
            await stage.leave()


async def test_a_stream_that_is_deleted_under_load_is_a_new_epoch_for_everybody(
    stage: Stage, rabbitmq_server: Server, vhost: str
) -> None:
    async with stage.gateway() as one, stage.gateway() as other:
        viewers = await stage.audience(20, CHANNELS)
        flow = Flow(await stage.log())
        async with flow.flowing(CHANNELS, 200):
            for round_ in (1, 2):
                await seen(viewers, flow, 50)
                epoch = one.log.epoch
                await rabbitmq_server.delete_queue(vhost, STREAM)
                await until(lambda epoch=epoch: one.log.epoch != epoch and other.log.epoch != epoch)
                await asyncio.gather(
                    *(viewer.until(lambda v=viewer, n=round_: v.codes[4010] >= n) for viewer in viewers)
                )
                await asyncio.gather(*(viewer.connected.wait() for viewer in viewers))
                await seen(viewers, flow, 50)
                assert one.log.epoch == other.log.epoch
        await caught_up(viewers, flow.sent)
        prove(viewers, flow.sent)
        for viewer in viewers:
            for segments in viewer.segments.values():
                # Each was told, each time, and all were told the same.
                assert len({segment.epoch for segment in segments}) == len(segments) == 3
        assert len({tuple(s.epoch for s in viewer.segments["app:one"]) for viewer in viewers}) == 1
        await stage.leave()


async def seen(viewers: list[Viewer], flow: Flow, count: int) -> None:
    """Return once each viewer has so many more of the events, on each channel together."""
    goal = {id(viewer): got(viewer) + count for viewer in viewers}
    await asyncio.gather(
        *(viewer.until(lambda v=viewer: got(v) >= goal[id(v)] or v.final is not None) for viewer in viewers)
    )


def got(viewer: Viewer) -> int:
    return sum(len(segment.events) for segments in viewer.segments.values() for segment in segments)


pytestmark = [pytest.mark.alone, pytest.mark.timeout(200)]
