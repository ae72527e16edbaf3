"""Clients, and those who sign for them, whose clocks are wrong.

A client's own clock reaches a gateway nowhere but in tokens that were signed by it: positions hold no time, and what
ends with time is told to clients by `expiring`. Tokens are believed when their times are right within the leeway, and
refused beyond it, with a 401 that a new token mends.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from auth.permissions import Identity
from tests.integration.faults.flow import Flow
from tests.integration.faults.stage import TOKENS, Stage, caught_up
from tests.integration.faults.viewer import Link, Refused, Viewer, handshake, prove

pytestmark = pytest.mark.timeout(120)

CHANNEL = "app:one"
LEEWAY = TOKENS.leeway


def skewed(stage: Stage, seconds: float, **changed: Any) -> str:
    """A short token as one whose clock goes wrong by so many seconds signs it."""
    tokens = stage.tokens
    claims = tokens._claims(tokens._short_audience, stage.user_id, TOKENS.short_ttl)
    for name in ("iat", "nbf", "exp"):
        claims[name] += seconds
    return tokens._sign({**claims, "main_jti": "", "channels": ["app:*"], **changed})


async def attempt(port: int, token: str) -> int:
    """The status that a handshake is answered with."""
    try:
        link = await Link.open(port, handshake(port, token), lambda _: None)
    except Refused as refused:
        return refused.status
    link.abort()
    await link.ended
    return 101


async def test_tokens_of_a_clock_that_goes_wrong_are_taken_within_the_leeway_only(stage: Stage) -> None:
    async with stage.gateway() as gateway:
        answers = {
            seconds: await attempt(gateway.port, skewed(stage, seconds))
            for seconds in (
                LEEWAY / 2, -LEEWAY, 5 - TOKENS.short_ttl,
                -5 - TOKENS.short_ttl, LEEWAY + 5, 86400.0, -86400.0, 2.0**31, -(2.0**30),
            )
        }  # fmt: skip
    assert list(answers.values()) == [101] * 3 + [401] * 6


@pytest.mark.parametrize(
    "changed",
    [
        {"exp": 2**63}, {"exp": 1e300}, {"exp": -1}, {"exp": "never"}, {"exp": None}, {"iat": 2**53}, {"iat": -1e12},
        {"nbf": 1e18}, {"main_exp": 1.0}, {"main_exp": -5}, {"main_exp": 1e308}, {"main_exp": "x"},
    ],
    ids=str,
)  # fmt: skip
async def test_times_that_no_clock_shows_are_an_answer_and_no_failure(stage: Stage, changed: dict[str, Any]) -> None:
    async with stage.gateway() as gateway:
        assert await attempt(gateway.port, skewed(stage, 0, **changed)) in (101, 401)
        # The gateway serves on.
        assert await attempt(gateway.port, stage.token()) == 101


async def test_a_client_that_comes_back_with_tokens_of_a_wrong_clock_loses_nothing_once_it_has_a_good_one(
    stage: Stage,
) -> None:
    async with stage.gateway(), stage.gateway():
        offsets = [0.0]
        viewers = [Viewer(lambda: stage.ports, lambda: skewed(stage, offsets[0]), [CHANNEL]) for _ in range(10)]
        stage.viewers += viewers
        for viewer in viewers:
            viewer.start()
        await asyncio.gather(*(viewer.connected.wait() for viewer in viewers))
        flow = Flow(await stage.log())
        async with flow.flowing([CHANNEL], 200):
            await asyncio.gather(*(viewer.until(lambda v=viewer: v.last(CHANNEL) > 50) for viewer in viewers))
            for wrong in (3600.0, -3600.0):
                offsets[0] = wrong
                before = {id(viewer): viewer.refusals[401] for viewer in viewers}
                for viewer in viewers:
                    viewer.cut()
                async with asyncio.timeout(60):
                    while any(viewer.refusals[401] < before[id(viewer)] + 2 for viewer in viewers):
                        await asyncio.sleep(0.01)
                offsets[0] = 0.0
                await asyncio.gather(*(viewer.connected.wait() for viewer in viewers))
        await caught_up(viewers, flow.sent)
        assert prove(viewers, flow.sent) == 10 * flow.sent[CHANNEL]
        assert all(len(viewer.segments[CHANNEL]) == 1 for viewer in viewers)
        await stage.leave()


async def test_who_never_looks_at_a_clock_is_told_in_time_that_its_authorisation_ends(stage: Stage) -> None:
    async with stage.gateway(expiry_notice=1.5, ping_interval=0.5) as gateway:
        came: list[dict[str, Any]] = []
        told = asyncio.Event()

        def note(message: dict[str, Any]) -> None:
            came.append(message)
            if message["event_type"] in ("expiring", "pong"):
                told.set()

        def token(seconds: float) -> str:
            identity = Identity(stage.user_id, "faults@example.org", False, expires_at=time.time() + seconds)
            return stage.tokens.issue_short(identity)

        link = await Link.open(gateway.port, handshake(gateway.port, token(3.0)), note)
        async with asyncio.timeout(30):
            await told.wait()
            assert came[-1]["event_type"] == "expiring"
            told.clear()
            link.send({"action": "refresh", "token": token(4.0)})
            await told.wait()
            assert came[-1]["event_type"] == "pong"
            # Nobody refreshes this one: its end is an end.
            assert await link.ended == 4005
        assert [message["event_type"] for message in came].count("expiring") == 2
