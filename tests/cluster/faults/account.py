"""What was told of sessions, read from the event log, and held against what the database says of them."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from contextlib import aclosing
from typing import Any

import orjson

from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.events import CLUSTER, SESSION_EVENT, SESSION_POD, SESSION_STATUS, session_channel, workspace_channel
from orchestrator.sessions.state import TRANSITIONS, Status
from orchestrator.settings import AmqpSettings
from tests.cluster.faults.ground import DEADLINE, Ground

Json = dict[str, Any]
# By channel, type and data in the order of the log, each event once.
Told = dict[str, list[tuple[str, Json]]]


async def read(ground: Ground) -> Told:
    """Everything that was told, as a gateway passes it on: of repeats of an event id the first."""

    async def relayed() -> bool:
        async with ground.pool.acquire() as connection:
            return not await connection.fetchval("SELECT count(*) FROM outbox")

    await ground.until(relayed, "the outbox is empty")
    log = await RabbitLog.open(AmqpSettings(ground.environment["AMQP_URL"], timeout=15.0), name="account")
    told: Told = defaultdict(list)
    seen: set[str] = set()
    try:
        head = await log.head()
        async with asyncio.timeout(DEADLINE), aclosing(log.read(0)) as batches:
            async for batch in batches:
                for entry in batch:
                    if entry.channel and entry.event_id not in seen:
                        seen.add(entry.event_id)
                        told[entry.channel].append((entry.event_type, orjson.loads(entry.body)["data"]))
                if batch[-1].offset >= head:
                    return told
    finally:
        await log.close()
    raise AssertionError("the log ended")


async def prove(ground: Ground) -> int:
    """Fail unless each change was told exactly once, and in order; returns how many events were looked at."""
    told = await read(ground)
    counted = 0
    for session_id in ground.sessions:
        mine = told[session_channel(session_id)]
        statuses = [data for event_type, data in mine if event_type == SESSION_STATUS]
        _prove_statuses(statuses, await ground.history(session_id))
        everywhere = [
            data
            for event_type, data in told[workspace_channel(ground.workspace_id)]
            if event_type == SESSION_STATUS and data["id"] == session_id
        ]
        assert everywhere == statuses
        for event_type in (SESSION_POD, SESSION_EVENT):
            here = [data for other, data in mine if other == event_type]
            assert here == [
                data for other, data in told[CLUSTER] if other == event_type and data["session_id"] == session_id
            ]
            counted += len(here)
        counted += len(statuses)
    objects: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for event_type, data in told[CLUSTER]:
        objects[event_type, data["uid"]].append(data)
    for (event_type, _), changes in objects.items():
        _prove_object(changes, ends=event_type != SESSION_EVENT)
    return counted


def _prove_statuses(told: list[Json], history: list[tuple[str, str, str]]) -> None:
    """Each line of the history is told once, in its order; nothing is told that did not change."""
    lines = [(one["status"], one["reason"], one["message"]) for one in told]
    assert [line for line, _ in itertools.groupby(lines)] == history, "\n".join(map(str, [*lines, "", *history]))
    for before, after in itertools.pairwise(told):
        assert before | {"updated_at": ""} != after | {"updated_at": ""}, after
        assert before["updated_at"] < after["updated_at"]
    for (before, *_), (after, *_) in itertools.pairwise(history):
        assert before == after or Status(after) in TRANSITIONS[Status(before)], (before, after, history)


def _prove_object(told: list[Json], *, ends: bool) -> None:
    """It is added, modified, and, where that `ends`, deleted: each that can be seen, with versions that only grow."""
    changes = [one["change"] for one in told]
    last = ["deleted"] if ends else []
    assert changes == ["added", *["modified"] * (len(changes) - 1 - len(last)), *last], told
    for before, after in itertools.pairwise(told):
        if after["change"] != "deleted":
            assert int(before["resource_version"]) < int(after["resource_version"]), (before, after)
            assert _visible(before) != _visible(after), after
        else:
            assert int(before["resource_version"]) <= int(after["resource_version"]), (before, after)


def _visible(data: Json) -> Json:
    return data | {"resource_version": "", "change": ""}
