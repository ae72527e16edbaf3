from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.realtime.connection import Connection
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode
from tests.unit.realtime.wire import SETTINGS, connection, entry, join, wire_of


class Stage:
    """A hub with a history that feeds it."""

    def __init__(self, **settings: object) -> None:
        self.hub = Hub(replace(SETTINGS, **settings))
        self.history = History("e", 600, 64 << 20)

    def join(self, *channels: str, **fields: object) -> Connection:
        one = join(self.hub, connection(*channels, **fields))
        self.hub.attach(one)
        return one

    def publish(self, offset: int, channel: str = "session:1", **data: object) -> None:
        stored = self.history.append(entry(offset, channel, **data), 0)
        assert stored is not None
        self.hub.publish(stored)


async def turn() -> None:
    await asyncio.sleep(0)


async def test_events_of_one_turn_reach_each_subscriber_in_one_write() -> None:
    stage = Stage()
    ones = [stage.join("session:1") for _ in range(3)]
    other = stage.join("session:2")
    for offset in range(1, 5):
        stage.publish(offset)
    assert wire_of(ones[0]).written == []
    await turn()
    for one in ones:
        assert len(wire_of(one).written) == 1
        assert wire_of(one).offsets == [1, 2, 3, 4]
    assert wire_of(ones[0]).written[0] is wire_of(ones[1]).written[0]
    assert wire_of(other).written == []
    assert (stage.hub.deliveries, stage.hub.frames) == (12, 12)
    assert stage.hub.bytes == 3 * len(wire_of(ones[0]).written[0])


async def test_channels_that_are_busy_in_one_turn_are_merged_by_offset() -> None:
    stage = Stage()
    both = [stage.join("session:1", "session:2") for _ in range(2)]
    three = stage.join("session:3", "session:2", "session:1")
    first, second = stage.join("session:1"), stage.join("session:2")
    for offset in range(1, 13):
        stage.publish(offset, f"session:{(offset * 7) % 3 + 1}")
    await turn()
    assert wire_of(three).offsets == list(range(1, 13))
    assert len(wire_of(three).written) == 1
    for one in both:
        assert wire_of(one).offsets == [n for n in range(1, 13) if (n * 7) % 3 + 1 != 3]
    assert wire_of(both[0]).written[0] is wire_of(both[1]).written[0]
    assert wire_of(first).offsets == [3, 6, 9, 12]
    assert wire_of(second).offsets == [1, 4, 7, 10]
    assert all(one.busy is None for one in stage.hub.connections.values())
    assert stage.hub.deliveries == 12 + 8 * 2 + 4 + 4


async def test_a_client_that_takes_batches_gets_one_array_frame_and_a_single_event_plain() -> None:
    stage = Stage()
    batch, plain = stage.join("session:1", batch=True), stage.join("session:1")
    stage.publish(1)
    stage.publish(2)
    await turn()
    stage.publish(3)
    await turn()
    assert len(wire_of(batch).frames) == 2
    assert len(wire_of(plain).frames) == 3
    assert wire_of(batch).messages == wire_of(plain).messages
    assert wire_of(batch).frames[0][1].startswith(b"[{")
    assert wire_of(batch).frames[1][1].startswith(b"{")
    assert stage.hub.frames == 5


async def test_an_event_that_nobody_listens_to_schedules_nothing() -> None:
    stage = Stage()
    stage.publish(1)
    assert stage.hub._pending == {}
    stage.hub.flush()


async def test_a_subscriber_gets_what_comes_after_it_joined_and_not_what_was_pending() -> None:
    stage = Stage()
    early = stage.join("session:1")
    stage.publish(1)
    late = stage.join("session:1")
    stage.publish(2)
    stage.hub.unsubscribe(early, "session:1")
    stage.hub.unsubscribe(early, "session:1")
    stage.publish(3)
    await turn()
    assert wire_of(early).offsets == [1, 2]
    assert wire_of(late).offsets == [2, 3]
    stage.hub.subscribe(early, "session:1")
    stage.publish(4)
    await turn()
    assert wire_of(early).offsets == [1, 2, 4]


async def test_a_detached_connection_hears_nothing_until_it_is_attached_again() -> None:
    stage = Stage()
    one = stage.join("session:1")
    stage.publish(1)
    stage.hub.detach(one)
    stage.hub.detach(one)
    stage.publish(2)
    stage.hub.subscribe(one, "session:2")
    stage.publish(3, "session:2")
    stage.hub.attach(one)
    stage.publish(4, "session:2")
    await turn()
    assert wire_of(one).offsets == [1, 4]


async def test_a_client_that_does_not_read_is_aborted_and_the_others_get_everything() -> None:
    stage = Stage(unsent_bytes=10_000)
    slow, fine = stage.join("session:1"), stage.join("session:1")
    wire_of(slow).reads = False
    for offset in range(1, 41):
        stage.publish(offset, text="x" * 1000)
        await turn()
    assert wire_of(slow).aborted
    assert wire_of(slow).unsent < 12_500
    assert wire_of(slow).close_code is None
    assert slow.closed == CloseCode.TOO_SLOW
    assert stage.hub.closes == {4008: 1}
    assert wire_of(fine).offsets == list(range(1, 41))
    assert list(stage.hub.connections.values()) == [fine]


async def test_one_event_larger_than_the_limit_drops_nobody_who_reads() -> None:
    stage = Stage(unsent_bytes=1_000)
    one = stage.join("session:1")
    wire_of(one).reads = False
    stage.publish(1, text="x" * 5_000)
    await turn()
    stage.join("session:2")
    stage.publish(2, "session:2")
    await turn()
    assert not wire_of(one).aborted
    wire_of(one).read_all()
    stage.publish(3, text="x" * 5_000)
    await turn()
    assert not wire_of(one).aborted
    stage.hub.send(one, b"x")
    assert wire_of(one).aborted


async def test_many_slow_clients_are_dropped_and_one_that_closes_meanwhile_is_left_alone() -> None:
    stage = Stage(unsent_bytes=1_000)
    ones = [stage.join("session:1") for _ in range(5)]
    for one in ones[:4]:
        wire_of(one).reads = False
    stage.publish(1, text="x" * 600)
    await turn()
    stage.hub.close(ones[0], CloseCode.RECONNECT)
    stage.publish(2, text="x" * 600)
    await turn()
    assert [wire_of(one).aborted for one in ones] == [False, True, True, True, False]
    assert stage.hub.closes == {4011: 1, 4008: 3}
    assert stage.hub._slow == {}


async def test_much_at_once_is_written_before_the_turn_ends() -> None:
    stage = Stage()
    one = stage.join("session:1")
    for offset in range(1, 11):
        stage.publish(offset, text="x" * 100_000)
    assert [len(written) < 400_000 for written in wire_of(one).written] == [True] * 3
    await turn()
    assert wire_of(one).offsets == list(range(1, 11))


async def test_nothing_is_said_to_a_lost_transport() -> None:
    stage = Stage()
    one = stage.join("session:1")
    wire_of(one).closing = True
    stage.hub.send(one, b"x")
    stage.hub.replay(one, [])
    stage.hub.close(one, CloseCode.RECONNECT)
    assert wire_of(one).written == []
    assert stage.hub.lingering == {}


async def test_the_first_end_of_a_connection_counts_and_nothing_is_written_after_it() -> None:
    stage = Stage()
    one = stage.join("session:1")
    stage.hub.close(one, CloseCode.EXPIRED)
    stage.hub.close(one, CloseCode.RECONNECT)
    stage.hub.abort(one)
    stage.hub.drop(one, CloseCode.LOST)
    stage.hub.send(one, b"never")
    stage.publish(1)
    await turn()
    assert wire_of(one).close_code == 4005
    assert not wire_of(one).aborted
    assert stage.hub.closes == {4005: 1}
    assert list(stage.hub.lingering) == [one.transport]
    stage.hub.end(one)
    assert stage.hub.lingering == {}


async def test_a_replay_that_fills_the_transport_is_no_slow_client_and_a_live_one_is() -> None:
    stage = Stage(unsent_bytes=200_000)
    one = join(stage.hub, connection("session:1"))
    wire_of(one).reads = False
    replayed = stage.history.append(entry(1, text="x" * 150_000), 0)
    stage.hub.replay(one, [replayed])
    assert one.paused
    wire_of(one).read_all()
    assert not one.paused
    stage.hub.attach(one)
    stage.publish(2, text="x" * 150_000)
    await turn()
    assert not one.paused
    stage.publish(3, text="x" * 150_000)
    await turn()
    assert wire_of(one).aborted


async def test_answers_that_pile_up_unread_end_the_connection_too() -> None:
    stage = Stage(unsent_bytes=100)
    one = stage.join("session:1")
    wire_of(one).reads = False
    for _ in range(100):
        stage.hub.send(one, b"x" * 30)
    assert wire_of(one).aborted
    assert wire_of(one).unsent == 120


def test_connections_of_a_user_are_counted_and_given_back() -> None:
    hub = Hub(replace(SETTINGS, connections_per_user=2))
    assert hub.admit(7)
    assert hub.admit(7)
    assert not hub.admit(7)
    assert hub.admit(8)
    hub.leave(7)
    assert hub.admit(7)
    for user in (7, 7, 8):
        hub.leave(user)
    assert dict(hub.by_user) == {}


async def test_a_change_of_permissions_names_users_that_are_here_only() -> None:
    hub = Hub(SETTINGS)
    hub.admit(7)
    hub.permissions_changed(7)
    hub.permissions_changed(8)
    assert hub.changed_users == {7}
    assert hub.generation == 2
    assert hub.of_user(7) == []


@pytest.mark.parametrize(("number", "rate", "least"), [(0, 500, 0.0), (30, 100, 0.25), (3, 20, 0.1)])
async def test_a_drain_closes_all_evenly(number: int, rate: int, least: float) -> None:
    stage = Stage(drain_rate=rate)
    ones = [stage.join("session:1") for _ in range(number)]
    for one in ones:
        # A client that answers at once.
        wire_of(one).on_write = lambda one=one: asyncio.get_running_loop().call_soon(stage.hub.end, one)
    began = asyncio.get_running_loop().time()
    await stage.hub.drain()
    took = asyncio.get_running_loop().time() - began
    assert took >= least
    assert stage.hub.draining
    assert [wire_of(one).close_code for one in ones] == [4001] * number
    assert stage.hub.connections == {}
    assert not any(wire_of(one).aborted for one in ones)


async def test_a_drain_aborts_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.realtime.hub.CLOSE_TIMEOUT", 0.05)
    stage = Stage()
    one = stage.join("session:1")
    await stage.hub.drain()
    assert wire_of(one).aborted
    assert stage.hub.lingering == {}
