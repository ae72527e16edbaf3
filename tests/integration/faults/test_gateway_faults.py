"""Gateways that are killed, and crowds that come at once, on real processes."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from tests.integration.faults.flow import Flow
from tests.integration.faults.stage import Stage, caught_up, until
from tests.integration.faults.viewer import Viewer, p99, prove

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]

CHANNEL = "app:one"
# Seconds under which a latency is never held against anybody.
FLOOR = 1.0


async def test_a_gateway_that_is_killed_during_fan_out_loses_nobody_an_event(stage: Stage) -> None:
    killed, other = await stage.gateways(2)
    observers = await stage.audience(20, [CHANNEL], ports=[other.port], measured=True)
    ports = [killed.port]
    crowd = await stage.audience(1_000, [CHANNEL], ports=ports)
    flow = Flow(await stage.log())
    async with flow.flowing([CHANNEL], 20):
        await all_have(stage.viewers, 30)
        undisturbed = p99(settled(observers))
        memory = other.rss
        ports.append(other.port)
        began = monotonic()
        await killed.kill()
        await asyncio.gather(*(viewer.until(lambda v=viewer: v.connections == 2) for viewer in crowd))
        rush = monotonic() - began
        ports.remove(killed.port)
        await all_have(stage.viewers, flow.sent[CHANNEL] + 20)
    await caught_up(stage.viewers, flow.sent)
    assert prove(stage.viewers, flow.sent) == 1_020 * flow.sent[CHANNEL]
    assert all(len(viewer.segments[CHANNEL]) == 1 for viewer in stage.viewers), "somebody was told of a loss"
    assert all(viewer.connections == 1 for viewer in observers)
    assert other.sockets == 1_020
    assert other.rss - memory < 64 << 20
    require_fair(observers, undisturbed, since=began, rush=rush)
    await stage.leave()
    await until(lambda: other.sockets == 0)
    assert await other.stop() == 0


async def test_two_thousand_clients_that_come_back_at_once_lose_nothing(stage: Stage) -> None:
    (gateway,) = await stage.gateways(1)
    observers = await stage.audience(20, [CHANNEL], measured=True)
    crowd = await stage.audience(2_000, [CHANNEL])
    flow = Flow(await stage.log())
    async with flow.flowing([CHANNEL], 10):
        await all_have(stage.viewers, 15)
        undisturbed = p99(settled(observers))
        # What so many connections take at most is known by now.
        memory = gateway.rss
        began = monotonic()
        for times in (1, 2):
            for viewer in crowd:
                viewer.cut()
            await asyncio.gather(*(viewer.until(lambda v=viewer, n=times: v.connections > n) for viewer in crowd))
        rush = (monotonic() - began) / 2
        await all_have(stage.viewers, flow.sent[CHANNEL] + 10)
    await caught_up(stage.viewers, flow.sent)
    assert prove(stage.viewers, flow.sent) == 2_020 * flow.sent[CHANNEL]
    assert all(len(viewer.segments[CHANNEL]) == 1 for viewer in stage.viewers), "somebody was told of a loss"
    assert all(viewer.connections == 1 for viewer in observers)
    await until(lambda: gateway.sockets == 2_020)
    assert gateway.rss - memory < 64 << 20
    require_fair(observers, undisturbed, since=began, rush=rush)
    await stage.leave()
    await until(lambda: gateway.sockets == 0)
    assert await gateway.stop() == 0


def require_fair(observers: list[Viewer], undisturbed: float, *, since: float, rush: float) -> None:
    """Fail when the others waited for a crowd that took `rush` seconds to come back.

    Crowd, gateways and whatever else runs share the machine's cores, so that on a busy one all of that takes longer:
    what is held against a gateway is that its events came behind the crowd, and not between.
    """
    disturbed = p99((pair for viewer in observers for pair in viewer.latencies), since=since)
    print(f"p99 {undisturbed:.3f} s undisturbed, {disturbed:.3f} s while a crowd came back within {rush:.1f} s")
    assert disturbed < max(2 * undisturbed, FLOOR, rush)


async def all_have(viewers: list[Viewer], number: int) -> None:
    """Return once each viewer has the event of that number."""
    await asyncio.gather(*(viewer.until(lambda v=viewer: v.last(CHANNEL) >= number) for viewer in viewers))


def settled(observers: list[Viewer]) -> list[tuple[float, float]]:
    """What was measured after the first events, which come while a crowd's connections are new."""
    return [pair for viewer in observers for pair in viewer.latencies[5:]]
