from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.realtime import liveness
from gateway.realtime.connection import Connection
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode
from tests.unit.realtime.wire import SETTINGS, connection, join, wire_of

WALL = 1_700_000_000.0


async def joined(hub: Hub, now: float = 1000.0, **fields: object) -> Connection:
    one = join(hub, connection("user:7", **fields))
    hub.attach(one)
    liveness.start(hub, one, now)
    return one


def pings(one: Connection) -> int:
    return sum(first == 0x89 for first, _ in wire_of(one).frames)


async def test_pings_go_out_each_interval_while_pongs_come_back() -> None:
    hub = Hub(SETTINGS)
    one = await joined(hub)
    for second in range(1, 126):
        liveness.sweep(hub, 1000.0 + second, WALL + second)
        liveness.ponged(one)
    assert pings(one) == 5
    assert one.closed is None


async def test_the_first_pings_of_many_connections_are_spread() -> None:
    hub = Hub(SETTINGS)
    ones = [await joined(hub) for _ in range(200)]
    liveness.sweep(hub, 1012.5, WALL)
    assert 50 < sum(pings(one) for one in ones) < 150
    assert all(1000 <= one.due <= 1050 for one in ones)


async def test_no_pong_in_time_closes_4012() -> None:
    hub = Hub(SETTINGS)
    one = await joined(hub)
    liveness.sweep(hub, 1025.0, WALL)
    liveness.sweep(hub, 1034.9, WALL)
    assert one.closed is None
    liveness.sweep(hub, 1035.0, WALL)
    assert wire_of(one).close_code == 4012
    assert hub.closes == {4012: 1}


async def test_a_ping_interval_shorter_than_the_patience_does_not_move_the_deadline() -> None:
    hub = Hub(replace(SETTINGS, ping_interval=2.0, pong_timeout=5.0))
    one = await joined(hub)
    for tenth in range(100):
        liveness.sweep(hub, 1000.0 + tenth / 10, WALL)
    assert one.closed == CloseCode.NO_PONG
    assert 3 <= pings(one) <= 4


async def test_a_pong_that_waits_behind_an_action_is_not_missed() -> None:
    hub = Hub(SETTINGS)
    one = await joined(hub)
    liveness.sweep(hub, 1025.0, WALL)
    one.handling = True
    liveness.sweep(hub, 1050.0, WALL)
    assert one.closed is None
    one.handling = False
    liveness.ponged(one)
    liveness.sweep(hub, 1051.0, WALL)
    assert one.closed is None
    assert pings(one) == 2


async def test_a_replay_that_nobody_reads_is_aborted() -> None:
    hub = Hub(SETTINGS)
    one = await joined(hub)
    one.handling, one.stalled_since = True, 1000.0
    liveness.sweep(hub, 1035.0, WALL)
    assert one.closed is None
    liveness.sweep(hub, 1035.1, WALL)
    assert wire_of(one).aborted
    assert hub.closes == {4008: 1}


async def test_expiring_is_sent_once_in_time_and_then_the_connection_is_closed() -> None:
    hub = Hub(SETTINGS)
    one = await joined(hub, expires_at=WALL + 100)
    for second in range(121):
        liveness.sweep(hub, 1000.0 + second, WALL + second)
        liveness.ponged(one)
        told = [message for message in wire_of(one).messages if message["event_type"] == "expiring"]
        assert len(told) == (second >= 70)
        assert (one.closed is not None) == (second >= 100)
    assert told == [{"event_type": "expiring", "channel": "user:7", "data": {"expires_at": "2023-11-14T22:15:00Z"}}]
    assert wire_of(one).close_code == 4005


async def test_a_closed_transport_is_aborted_when_its_time_is_up() -> None:
    hub = Hub(SETTINGS)
    one = await joined(hub)
    hub.close(one, CloseCode.RECONNECT)
    (deadline,) = hub.lingering.values()
    liveness.sweep(hub, deadline - 0.1, WALL)
    assert not wire_of(one).aborted
    liveness.sweep(hub, deadline, WALL)
    assert wire_of(one).aborted
    assert hub.lingering == {}


async def test_only_the_tenth_malformed_frame_within_a_minute_is_one_too_many() -> None:
    hub = Hub(SETTINGS)
    one = await joined(hub)
    assert [liveness.malformed(hub, one, 7.0 * place) for place in range(30)] == [False] * 30
    assert [liveness.malformed(hub, one, 1000.0 + place) for place in range(10)] == [False] * 9 + [True]


async def test_the_watch_sweeps_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub(replace(SETTINGS, ping_interval=0.04, pong_timeout=0.04))
    one = await joined(hub, now=asyncio.get_running_loop().time())
    task = asyncio.create_task(liveness.watch(hub))
    async with asyncio.timeout(5):
        while one.closed is None:
            await asyncio.sleep(0.01)
    task.cancel()
    assert one.closed == CloseCode.NO_PONG
    assert caplog.records == []
