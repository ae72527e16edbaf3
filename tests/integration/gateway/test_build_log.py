"""The log of a deployment by REST: byte for byte, until there is nothing more to come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gateway.realtime import build_log, following
from gateway.realtime.protocol import CloseCode
from gateway.settings import RealtimeSettings
from orchestrator.deployments import record
from orchestrator.deployments.record import After
from orchestrator.eventlog import outbox
from orchestrator.events import DEPLOYMENT_LOG, Event, deployment_channel
from tests.integration.gateway.conftest import Api, Person, Serve

DEADLINE = 20.0


@dataclass
class Stage:
    """A deployment, and who writes and reads its log."""

    api: Api
    ann: Person
    id: int
    app_id: int
    written: bytearray = field(default_factory=bytearray)

    @property
    def path(self) -> str:
        return f"/api/v1/deployments/{self.id}/logs"

    async def store(self, *texts: str) -> None:
        """Store pieces without a word about it, as a worker that dies before its events are carried on."""
        positions = []
        for text in texts:
            positions.append(len(self.written))
            self.written += text.encode()
        await self.api.fetch(
            """INSERT INTO deployment_logs (deployment_id, position, length, step, text)
               SELECT $1, position, octet_length(text), 'build', text
                 FROM unnest($2::bigint[], $3::text[]) AS piece (position, text)""",
            self.id,
            positions,
            list(texts),
        )

    async def say(self, *texts: str) -> None:
        """Store and tell."""
        await self.store(*texts)
        await self.api.context.log.publish([Event(DEPLOYMENT_LOG, deployment_channel(self.id), {"text": "…"})])

    async def finish(self) -> None:
        """Do the end of a worker's work."""
        async with self.api.pool.acquire() as connection:
            async with connection.transaction():
                deployment = await record.lock(connection, self.id)
                await record.write(connection, deployment, status="failed", finished_at=After(0))
            while await outbox.relay_batch(connection, self.api.context.log):
                pass

    async def read(self, query: str = "", who: Person | None = None) -> bytes:
        answer = await self.api.call("GET", f"{self.path}?{query}", who or self.ann)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        return answer.body

    @asynccontextmanager
    async def follow(self, query: str = "", who: Person | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer {(who or self.ann).token}"}
        async with self.api.client.get(f"{self.path}?follow=true&{query}", headers=headers) as answer:
            assert (answer.status, answer.content_type) == (200, "text/plain")
            yield answer

    async def until_nobody_is_left(self) -> None:
        hub = self.api.context.hub
        async with asyncio.timeout(DEADLINE):
            while hub.connections or hub.by_user or hub.actions:
                await asyncio.sleep(0.01)


async def until(answer: aiohttp.ClientResponse, size: int) -> bytes:
    """So many bytes of the answer."""
    async with asyncio.timeout(DEADLINE):
        return await answer.content.readexactly(size)


async def rest(answer: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """What is left of the answer, and whether it has ended as a whole one."""
    read = bytearray()
    try:
        async with asyncio.timeout(DEADLINE):
            async for chunk in answer.content.iter_any():
                read += chunk
    except aiohttp.ClientPayloadError:
        return bytes(read), False
    return bytes(read), True


async def staged(api: Api, ann: Person, **app: Any) -> Stage:
    body = {"name": "shop", "workspace_id": ann.workspace_id, "repo_url": "https://git.test/shop", **app}
    made = (await api.call("POST", "/api/v1/apps", ann, body)).json
    (deployment,) = (await api.call("GET", f"/api/v1/apps/{made['id']}/deployments", ann)).json["items"]
    return Stage(api, ann, deployment["id"], made["id"])


@pytest_asyncio.fixture
async def stage(api: Api, ann: Person) -> Stage:
    return await staged(api, ann)


async def test_the_log_is_answered_from_any_byte_on(stage: Stage) -> None:
    assert await stage.read() == b""
    await stage.store("\x1b[32mStep 1\x1b[0m\n", "zwölf ", "Boxkämpfer…\n", "end\n")
    whole = bytes(stage.written)
    assert await stage.read() == whole
    for after in range(len(whole) + 2):
        assert await stage.read(f"after={after}") == whole[after:]
    for wrong in ("after=-1", "after=x", "after=", "follow=1", "tail=3"):
        assert (await stage.api.call("GET", f"{stage.path}?{wrong}", stage.ann)).status == 422
    assert (await stage.api.call("HEAD", f"{stage.path}?follow=true", stage.ann)).status == 200


async def test_a_follower_gets_every_byte_once_and_the_end_when_all_is_sent(stage: Stage) -> None:
    await stage.store("before\n")
    async with stage.follow() as answer, stage.follow("after=4") as late:
        assert await until(answer, 7) == b"before\n"
        assert await until(late, 3) == b"re\n"
        for number in range(50):
            await stage.say(f"line {number} ", "…\n")
        await stage.store("the last\n")
        await stage.finish()
        whole = bytes(stage.written)
        assert await rest(answer) == (whole[7:], True)
        assert await rest(late) == (whole[7:], True)
    await stage.until_nobody_is_left()
    async with stage.follow() as answer:
        assert await rest(answer) == (whole, True)
    async with stage.follow(f"after={len(whole) + 100}") as answer:
        assert await rest(answer) == (b"", True)


async def test_what_nobody_tells_of_is_found_all_the_same(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_POLL", 0.05)
    async with stage.follow() as answer:
        await stage.store("x\n")
        assert await until(answer, 2) == b"x\n"
        await stage.api.fetch("DELETE FROM apps")
        assert await rest(answer) == (b"", True)


async def test_a_long_log_is_read_in_parts(stage: Stage) -> None:
    await stage.store(*(f"{number:06} ".ljust(32 << 10, ".") for number in range(3 * build_log._BATCH)), "end")
    await stage.finish()
    async with stage.follow("after=5") as answer:
        assert await rest(answer) == (bytes(stage.written[5:]), True)
    assert await stage.read("after=5") == bytes(stage.written[5:])


async def test_who_is_cut_off_can_tell_and_goes_on_where_it_was(stage: Stage) -> None:
    await stage.store("zwölf ")
    async with stage.follow() as answer:
        got = await until(answer, 4)
        stage.api.context.hub.close_all(CloseCode.RECONNECT)
        more, whole = await rest(answer)
        got += more
        assert not whole
    await stage.say("Boxkämpfer\n")
    await stage.finish()
    async with stage.follow(f"after={len(got)}") as answer:
        more, whole = await rest(answer)
    assert (got + more, whole) == (bytes(stage.written), True)


async def test_who_may_not_read_it_any_more_is_cut_off(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    stage = await staged(api, ann, workspace_id=workspace)
    stranger = await api.person()
    for query in ("", "?follow=true"):
        assert (await api.call("GET", stage.path + query, stranger)).status == 404
        assert (await api.call("GET", stage.path + query)).status == 401
    await stage.say("secret plans\n")
    async with stage.follow(who=bob) as answer:
        await until(answer, 13)
        await api.call("DELETE", f"/api/v1/workspaces/{workspace}/members/{bob.id}", ann)
        async with api.pool.acquire() as connection:
            while await outbox.relay_batch(connection, api.context.log):
                pass
        assert await rest(answer) == (b"", False)
    await stage.until_nobody_is_left()


async def test_a_client_that_goes_away_leaves_nothing_behind(stage: Stage) -> None:
    await stage.say("line\n")
    async with stage.follow() as answer:
        await until(answer, 5)
        answer.close()
    await stage.say("more\n")
    await stage.until_nobody_is_left()


async def test_what_a_slow_client_does_not_read_is_not_read_for_it(serve: Serve) -> None:
    api = await serve(realtime=RealtimeSettings(unsent_bytes=64 << 10))
    stage = await staged(api, await api.person())
    await stage.store(*("." * (32 << 10) for _ in range(600)))
    async with stage.follow() as answer:
        await until(answer, 1)
        (follower,) = api.context.hub.connections.values()
        assert isinstance(follower, build_log.Follower)
        async with asyncio.timeout(DEADLINE):
            while not follower.paused:
                await asyncio.sleep(0.01)
        assert follower.after < len(stage.written)
        assert follower.transport.get_write_buffer_size() < (build_log._BATCH + 2) * (33 << 10) + (64 << 10)
        await stage.finish()
        assert await rest(answer) == (bytes(stage.written[1:]), True)


async def test_a_long_log_is_not_held_in_memory_for_who_reads_it_slowly(stage: Stage) -> None:
    # More than the sockets hold: what is stored after the first byte was read can only be there if the rest was not.
    await stage.store(*("." * (32 << 10) for _ in range(600)))
    async with stage.api.client.get(stage.path, headers={"Authorization": f"Bearer {stage.ann.token}"}) as answer:
        await until(answer, 1)
        await stage.store("the last\n")
        assert await rest(answer) == (bytes(stage.written[1:]), True)


async def test_a_follower_is_a_connection_of_its_user(stage: Stage, root: Person) -> None:
    async with stage.follow():
        listed = (await stage.api.call("GET", "/api/v1/admin/connections", root)).json["items"]
        assert [(one["transport"], one["channels"]) for one in listed] == [("logs", [f"deployment:{stage.id}"])]
