"""Following a session's output: every line once and in order, until there is a reason to end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from gateway.realtime import following, output
from gateway.settings import RealtimeSettings
from orchestrator.eventlog import outbox
from orchestrator.events import SESSION_STATUS, Event, session_channel
from orchestrator.logs import LogWriter
from orchestrator.providers.contract import LogLine
from tests.integration.gateway.conftest import Api, Person, Serve

DEADLINE = 20.0


@dataclass
class Follower:
    """A client that reads lines."""

    answer: aiohttp.ClientResponse
    items: list[dict[str, Any]] = field(default_factory=list)
    heartbeats: int = 0

    async def read(self) -> dict[str, Any] | None:
        """The next line; None at the end of the stream."""
        async with asyncio.timeout(DEADLINE):
            while line := await self.answer.content.readline():
                if line != b"\n":
                    self.items.append(orjson.loads(line))
                    return self.items[-1]
                self.heartbeats += 1
        return None

    async def until(self, text: str) -> None:
        """Read until this line has come."""
        while (item := await self.read()) is None or item["line"] != text:
            assert item is not None, "the stream has ended"

    async def end(self) -> dict[str, Any]:
        """Read to the end, which must be a clean one; why it ended."""
        while await self.read() is not None:
            pass
        last = self.items.pop()
        assert (last["service"], last["stream"]) == ("", "system")
        return dict(last["end"])

    @property
    def lines(self) -> list[str]:
        return [item["line"] for item in self.items]


@dataclass
class Stage:
    """A session, and who writes and reads its output."""

    api: Api
    ann: Person
    id: int
    writer: LogWriter

    async def write(self, *lines: str, service: str = "preview") -> None:
        """Store and publish."""
        for line in lines:
            self.writer.sink(LogLine(self.id, service, "stdout", line))
        await self.writer.flush(DEADLINE)

    async def store(self, *lines: str, service: str = "preview") -> None:
        """Store only."""
        await self.api.fetch(
            """INSERT INTO session_logs (session_id, at, service, stream, line)
               SELECT $1, now(), $2, 'stdout', line FROM unnest($3::text[]) AS line""",
            self.id, service, list(lines),
        )  # fmt: skip

    @asynccontextmanager
    async def follow(self, query: str = "", who: Person | str | None = None, **headers: str) -> AsyncIterator[Follower]:
        person = who or self.ann
        headers["Authorization"] = f"Bearer {person.token if isinstance(person, Person) else person}"
        path = f"/api/v1/sessions/{self.id}/logs?follow=true&{query}"
        async with self.api.client.get(path, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            yield Follower(answer)

    async def change(self, **columns: Any) -> None:
        """Do what an orchestrator would, and tell it."""
        names = ", ".join(f"{name} = ${number}" for number, name in enumerate(columns, start=2))
        await self.api.fetch(f"UPDATE sessions SET {names} WHERE id = $1", self.id, *columns.values())  # noqa: S608  Ours.
        async with self.api.pool.acquire() as connection:
            await outbox.add(connection, Event(SESSION_STATUS, session_channel(self.id), {"id": self.id}))
        await self.carry()

    async def carry(self) -> None:
        """Do the work of the orchestrator's relay."""
        async with self.api.pool.acquire() as connection:
            while await outbox.relay_batch(connection, self.api.context.log):
                pass

    async def until_nobody_is_left(self) -> None:
        hub = self.api.context.hub
        async with asyncio.timeout(DEADLINE):
            while hub.connections or hub.by_user or hub.actions:
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def stage(api: Api, ann: Person) -> Stage:
    return await made(api, ann)


async def made(api: Api, ann: Person, workspace: int | None = None) -> Stage:
    session = await api.session(ann, await api.project(workspace or ann.workspace_id))
    return Stage(api, ann, session["id"], LogWriter(api.pool, api.context.log, keep=5000))


def numbers(first: int, last: int) -> list[str]:
    return [f"line {number}" for number in range(first, last + 1)]


async def test_a_follower_gets_the_tail_and_then_each_line_once_and_in_order(stage: Stage) -> None:
    await stage.write(*numbers(1, 500))
    async with stage.follow("tail=300") as follower:
        assert follower.answer.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"
        assert follower.answer.headers["Cache-Control"] == "no-store"
        await follower.until("line 500")
        assert follower.lines == numbers(201, 500)
        for number in range(501, 520):
            await stage.write(f"line {number}")
        await stage.write(*numbers(520, 2000))
        await follower.until("line 2000")
        assert follower.lines == numbers(201, 2000)
    read = (await stage.api.call("GET", f"/api/v1/sessions/{stage.id}/logs?tail=5000", stage.ann)).json["items"]
    assert follower.items == read[200:]


async def test_nothing_is_lost_between_the_tail_and_what_is_written_meanwhile(stage: Stage) -> None:
    async def write() -> None:
        for number in range(1, 301):
            await stage.write(f"line {number}")

    writing = asyncio.create_task(write())
    try:
        for _ in range(10):
            async with stage.follow("tail=5000") as follower:
                await stage.write("now")
                await follower.until("now")
            stored = await stage.api.fetch("SELECT line FROM session_logs ORDER BY id LIMIT $1", len(follower.lines))
            assert follower.lines == [row["line"] for row in stored]
    finally:
        await writing


async def test_a_follower_of_one_container_hears_of_no_other(stage: Stage) -> None:
    await stage.store("a", "b", service="chat")
    await stage.store(*numbers(1, 450))
    async with stage.follow("container=chat&tail=1") as follower:
        await stage.write(*numbers(451, 900))
        await stage.write("c", service="chat")
        await follower.until("c")
    assert follower.lines == ["b", "c"]
    async with stage.follow("container=nobody") as follower:
        await stage.change(status="deleted", desired="deleted", observed_generation=2)
        await follower.end()
    assert follower.lines == []


async def test_only_new_lines_are_followed_when_no_tail_is_wanted(stage: Stage) -> None:
    await stage.store("old")
    for query in ("tail=0", "since=0"):
        async with stage.follow(query) as follower:
            await stage.write("new")
            await follower.until("new")
            assert follower.lines == ["new"]
    await stage.api.fetch("UPDATE session_logs SET at = at - interval '2 hours' WHERE line = 'old'")
    async with stage.follow("since=1h") as follower:
        await stage.write("newer")
        await follower.until("newer")
        assert follower.lines == ["new", "new", "newer"]


async def test_a_client_that_was_cut_off_goes_on_after_the_last_line_that_it_has(stage: Stage) -> None:
    await stage.write(*numbers(1, 10))
    async with stage.follow() as follower:
        await follower.until("line 4")
    last = follower.items[-1]["id"]
    await stage.write(*numbers(11, 300))
    async with stage.follow(f"after={last}&tail=1") as follower:
        await follower.until("line 300")
    assert follower.lines == numbers(5, 300)


async def test_a_stream_ends_with_the_session_after_its_last_line(stage: Stage) -> None:
    await stage.store(*numbers(1, 450))
    async with stage.follow("tail=5000") as follower:
        await follower.until("line 1")
        await stage.store("the last")
        await stage.change(status="deleted", desired="deleted", observed_generation=2)
        assert await follower.end() == {"code": 1000, "reason": "session deleted", "reconnect": False}
        assert follower.lines == [*numbers(1, 450), "the last"]
    # One that is gone already has its lines still.
    async with stage.follow("tail=2") as follower:
        assert (await follower.end())["code"] == 1000
        assert follower.lines == ["line 450", "the last"]
    await stage.until_nobody_is_left()


async def test_a_stream_ends_when_its_session_is_purged(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_POLL", 0.05)
    await stage.store("a")
    async with stage.follow() as follower:
        await follower.until("a")
        await stage.api.fetch("DELETE FROM sessions WHERE id = $1", stage.id)
        assert (await follower.end())["code"] == 1000


async def test_lines_whose_writer_died_before_it_told_of_them_come_all_the_same(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_POLL", 0.05)
    async with stage.follow() as follower:
        await stage.store("untold")
        await follower.until("untold")


async def test_lines_that_were_pruned_before_they_could_be_read_are_told_as_missing(stage: Stage) -> None:
    await stage.store(*numbers(1, 10))
    async with stage.follow() as follower:
        await follower.until("line 10")
        await stage.api.fetch("DELETE FROM session_logs")
        await stage.write("line 99")
        await follower.until("line 99")
        assert follower.lines == [*numbers(1, 10), output._MISSING, "line 99"]
        assert follower.items[-2]["id"] == follower.items[-3]["id"]
        last = follower.items[-1]["id"]
    await stage.api.fetch("DELETE FROM session_logs")
    await stage.write("line 100")
    async with stage.follow(f"after={last}") as follower:
        await follower.until("line 100")
        assert follower.lines == [output._MISSING, "line 100"]
    # Who asks for what is there misses nothing.
    async with stage.follow() as follower:
        await follower.until("line 100")
        assert follower.lines == ["line 100"]


async def test_who_accepts_text_gets_text_to_read(stage: Stage) -> None:
    await stage.store("hello")
    async with stage.follow(Accept="text/plain") as follower:
        assert follower.answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert (await follower.answer.content.readline()).endswith(b"Z preview | hello\n")
        await stage.change(status="deleted", desired="deleted", observed_generation=2)
        assert (await follower.answer.read()).endswith(b"Z system | The stream ends: session deleted.\n")


async def test_a_client_of_http_1_0_gets_the_bare_lines(stage: Stage) -> None:
    await stage.store("hello")
    await stage.change(status="deleted", desired="deleted", observed_generation=2)
    server = stage.api.client.server
    reader, writer = await asyncio.open_connection(server.host, server.port)
    request = f"GET /api/v1/sessions/{stage.id}/logs?follow=true HTTP/1.0\r\nAuthorization: Bearer {stage.ann.token}"
    writer.write(f"{request}\r\n\r\n".encode())
    async with asyncio.timeout(DEADLINE):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert [orjson.loads(line)["line"] for line in body.splitlines()] == [
        "hello", "The stream ends: session deleted.",
    ]  # fmt: skip
    writer.close()
    await writer.wait_closed()


async def test_a_member_who_is_removed_hears_no_more_within_a_second(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    stage = await made(api, ann, workspace)
    await stage.store("hello")
    async with stage.follow(who=bob) as follower:
        await follower.until("hello")
        path = f"/api/v1/workspaces/{workspace}/members/{bob.id}"
        assert (await api.call("DELETE", path, ann)).status == 204
        await stage.carry()
        assert await follower.end() == {"code": 4507, "reason": "permission withdrawn", "reconnect": False}
    await stage.write("secret")
    assert follower.lines == ["hello"]
    refused = await api.call("GET", f"/api/v1/sessions/{stage.id}/logs?follow=true", bob)
    assert refused.status == 404


async def test_a_token_that_is_revoked_or_expires_ends_the_stream(stage: Stage) -> None:
    made = (await stage.api.call("POST", "/api/v1/tokens", stage.ann, {"name": "x", "scopes": ["read"]})).json
    async with stage.follow(who=made["token"]) as follower:
        await stage.api.call("DELETE", f"/api/v1/tokens/{made['id']}", stage.ann)
        await stage.carry()
        assert (await follower.end())["code"] == 4500
    async with stage.follow() as follower:
        (connection,) = stage.api.context.hub.connections.values()
        assert connection.expires_at is not None
        connection.expires_at, connection.due = time.time(), 0.0
        assert await follower.end() == {
            "code": 4005, "reason": "connection's authorisation expired", "reconnect": True,
        }  # fmt: skip


async def test_a_server_that_drains_lets_its_followers_go(stage: Stage) -> None:
    hub = stage.api.context.hub
    async with stage.follow() as follower:
        await hub.drain()
        assert await follower.end() == {
            "code": 4001, "reason": "server is shutting down or draining", "reconnect": True,
        }  # fmt: skip
    assert not hub.actions
    again = await stage.api.call("GET", f"/api/v1/sessions/{stage.id}/logs?follow=true", stage.ann)
    assert (again.status, again.headers["Retry-After"]) == (503, "1")


async def test_an_administrator_sees_and_ends_a_stream(stage: Stage, root: Person) -> None:
    async with stage.follow() as follower:
        listed = (await stage.api.call("GET", "/api/v1/admin/connections", root)).json["items"]
        assert [(one["transport"], one["channels"]) for one in listed] == [("logs", [f"session:{stage.id}"])]
        body = {"connection_id": listed[0]["id"]}
        assert (await stage.api.call("POST", "/api/v1/admin/disconnect", root, body)).json["disconnected"] == 1
        assert (await follower.end())["code"] == 4503


async def test_a_log_that_begins_anew_has_its_followers_come_back(stage: Stage) -> None:
    async with stage.follow() as follower:
        stage.api.context.hub.close_all(4010)
        assert await follower.end() == {"code": 4011, "reason": "asked to reconnect", "reconnect": True}


async def test_followers_count_as_connections_of_their_user(serve: Serve, api: Api, ann: Person) -> None:
    narrow = await serve(realtime=RealtimeSettings(connections_per_user=2))
    stage = Stage(narrow, ann, (await made(api, ann)).id, LogWriter(api.pool, narrow.context.log, keep=10))
    path = f"/api/v1/sessions/{stage.id}/logs?follow=true"
    async with stage.follow(), stage.follow():
        refused = await narrow.call("GET", path, ann)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "10")
        # Reading is no following.
        assert (await narrow.call("GET", f"/api/v1/sessions/{stage.id}/logs", ann)).status == 200
        assert (await narrow.call("HEAD", path, ann)).status == 200
    await stage.until_nobody_is_left()
    async with stage.follow():
        pass
    await stage.until_nobody_is_left()


async def test_a_follower_holds_no_database_connection_while_nothing_is_written(stage: Stage) -> None:
    await stage.store("a")
    async with AsyncExitStack() as stack:
        followers = [await stack.enter_async_context(stage.follow()) for _ in range(20)]
        for follower in followers:
            await follower.until("a")
        pool = stage.api.pool
        async with asyncio.timeout(DEADLINE):
            while pool.get_idle_size() < pool.get_size():
                await asyncio.sleep(0.01)
        await stage.write("b")
        for follower in followers:
            await follower.until("b")
    await stage.until_nobody_is_left()


async def test_heartbeats_come_while_nothing_is_written(serve: Serve, api: Api, ann: Person) -> None:
    quick = await serve(realtime=RealtimeSettings(ping_interval=0.1, pong_timeout=0.1))
    stage = Stage(quick, ann, (await made(api, ann)).id, LogWriter(api.pool, quick.context.log, keep=10))
    async with stage.follow() as follower:
        async with asyncio.timeout(DEADLINE):
            for _ in range(3):
                assert await follower.answer.content.readline() == b"\n"
        await stage.write("a")
        await follower.until("a")


async def test_a_client_that_reads_nothing_fills_no_memory_and_misses_nothing(stage: Stage) -> None:
    lines = [f"{number:04} " + "x" * 8000 for number in range(4000)]
    await stage.store(*lines)
    context = stage.api.context
    async with stage.follow("tail=5000") as follower:
        (connection,) = context.hub.connections.values()
        most = 0
        async with asyncio.timeout(DEADLINE):
            while not connection.paused:
                await asyncio.sleep(0.01)
        for _ in range(20):
            await stage.write("more")
            most = max(most, connection.transport.get_write_buffer_size())
        # The limit, and the lines that were read at once.
        assert most < context.settings.realtime.unsent_bytes + output._BATCH * 9000
        read = b""
        async with asyncio.timeout(DEADLINE):
            # Blank lines are heartbeats.
            while read.count(b'"line":') < len(lines) + 20 or not read.endswith(b"\n"):
                read += await follower.answer.content.readany()
    assert [orjson.loads(line)["line"] for line in read.splitlines() if line] == [*lines, *["more"] * 20]


async def test_a_client_that_goes_leaves_nothing_behind(stage: Stage) -> None:
    await stage.store(*["x" * 8000] * 1000)
    for query in ("tail=5000", "tail=0"):
        async with stage.follow(query) as follower:
            follower.answer.close()
        await stage.until_nobody_is_left()


async def test_a_stream_outlives_an_outage_of_the_database(stage: Stage) -> None:
    await stage.store("a")
    async with stage.follow() as follower:
        await follower.until("a")
        await cut(stage.api)
        await stage.write("b")
        await follower.until("b")
    assert follower.lines == ["a", "b"]


async def cut(api: Api) -> None:
    """End all of the pool's connections behind its back."""
    pids: Iterable[Any] = await api.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    for row in pids:
        await api.fetch("SELECT pg_terminate_backend($1)", row["pid"])
