"""The client against servers that fail: overloaded, half-open, cut, or no Kubernetes at all."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
import yaml
from aiohttp import web

from orchestrator.cluster.access import Kubeconfig
from orchestrator.cluster.client import LOG_LINE, Cluster
from orchestrator.cluster.objects import Partial, Pod
from orchestrator.errors import ApiRefused, ProviderUnavailable
from tests.conftest import no_task_left

TOKEN = "s3cr3t-t0k3n"
PODS = "/api/v1/pods"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def status(code: int, reason: str, message: str, **headers: str) -> web.Response:
    """What the API says when it refuses."""
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "code": code,
        "reason": reason,
        "message": message,
        "details": {"a": 1},
    }
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(status=code, body=orjson.dumps(body), content_type="application/json", headers=named)


def thing(name: str = "one") -> web.Response:
    return web.json_response({"metadata": {"name": name}})


class Server:
    """Answers by `handler`, or by `answers` one after the other; counts what was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, bytes, str]] = []
        self.answers: list[web.Response] = []
        self.handler: Handler | None = None
        self.url = ""
        # Connections that are open.
        self.open = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.method, request.path_qs, body, request.headers.get("Authorization", "")))
        if self.handler is not None:
            return await self.handler(request)
        return self.answers.pop(0)

    def configure(self, folder: Path, token: str = TOKEN, **cluster: Any) -> Kubeconfig:
        """The way to the server."""
        config = {
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": self.url} | cluster}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        path = folder / "kubeconfig"
        # At once: it may be read just now.
        path.with_suffix(".new").write_text(yaml.safe_dump(config))
        path.with_suffix(".new").rename(path)
        return Kubeconfig(str(path))


@asynccontextmanager
async def serving(answer: Handler) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    async with serving(server.answer) as server.url:
        yield server


@pytest.fixture
async def cluster(server: Server, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A client that has left nothing behind in the end."""
    async with no_task_left(), Cluster(server.configure(tmp_path), name="north", timeout=20.0) as cluster:
        yield cluster


async def unavailable(asked: Awaitable[Any]) -> ProviderUnavailable:
    """The error that a request ends with. No token is in it, nor in where it comes from."""
    with pytest.raises(ProviderUnavailable) as error:
        await asked
    assert TOKEN not in "".join(traceback.format_exception(error.value))
    shown, cause = repr(error.value), error.value.__cause__
    while cause is not None:
        shown, cause = shown + repr(cause), cause.__cause__
    assert TOKEN not in shown
    return error.value


async def read(cluster: Cluster, **options: Any) -> list[list[bytes]]:
    async with cluster.stream(PODS, {"watch": "1"}, **options) as arriving:
        return [lines async for lines in arriving]


def streaming(*parts: bytes, end: str = "whole") -> Handler:
    """A handler that sends these, one by one, and then ends: `whole`, `cut`, or not at all (`open`)."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0)
        if end == "cut":
            assert request.transport is not None
            while request.transport.get_write_buffer_size():
                await asyncio.sleep(0.001)
            request.transport.abort()
        if end == "open":
            await asyncio.Event().wait()
        return response

    return answer


# Busy. ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_what_is_to_be_asked_again_is_asked_again(server: Server, cluster: Cluster, code: int) -> None:
    server.answers = [*(status(code, "Busy", "later", Retry_After="0.01") for _ in range(3)), thing()]
    body = {"metadata": {"name": "one"}}
    assert (await cluster.create(PODS, body, Partial)).metadata.name == "one"
    assert server.requests == [("POST", PODS, orjson.dumps(body), f"Bearer {TOKEN}")] * 4


async def test_it_is_not_asked_for_ever(server: Server, cluster: Cluster) -> None:
    server.answers = [status(429, "TooManyRequests", "later", Retry_After="0") for _ in range(4)]
    error = await unavailable(cluster.get(PODS, Partial))
    assert str(error) == f"The cluster north at {server.url[7:]} has no time for us (429: later)."
    assert len(server.requests) == 4


async def test_who_asks_for_a_long_rest_is_left_alone(server: Server, cluster: Cluster) -> None:
    server.answers = [status(503, "ServiceUnavailable", "later", Retry_After="3600")]
    assert (await unavailable(read(cluster))).retry_after == 3600
    assert len(server.requests) == 1


async def test_an_outage_is_told_at_once(server: Server, cluster: Cluster) -> None:
    server.answers = [status(503, "ServiceUnavailable", "no etcd")]
    assert "failed (503: no etcd)" in str(await unavailable(cluster.get(PODS, Partial)))
    server.answers = [status(500, "InternalError", "oh", Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")]
    assert "failed (500: oh)" in str(await unavailable(cluster.get(PODS, Partial)))
    assert len(server.requests) == 2


# What is no Kubernetes. ----------------------------------------------------------------------------------------------

HTML = "<html><head><title>502 Bad Gateway</title></head></html>"


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (502, HTML, "failed (502)."),
        (404, HTML, "answered 404, and not as Kubernetes does: is it one, or a proxy?"),
        (403, HTML, "answered 403, and not as Kubernetes does"),
        (302, "", "answered 302, and not as Kubernetes does"),
        (200, HTML, "answered something that cannot be read"),
        (200, "", "answered something that cannot be read"),
        (200, '{"metadata": {"name": 5}}', "Expected `str`, got `int` - at `$.metadata.name`"),
        (200, b'{"metadata": {"name": "\xff"}}', "answered something that cannot be read"),
    ],
)
async def test_what_is_no_answer_of_kubernetes_is_no_answer(
    server: Server, cluster: Cluster, code: int, body: str | bytes, said: str
) -> None:
    content = body.encode() if isinstance(body, str) else body
    server.answers = [web.Response(status=code, body=content, headers={"Location": "/elsewhere"})]
    assert said in str(await unavailable(cluster.get(PODS, Partial)))
    assert len(server.requests) == 1
    if code != 200:
        server.answers = [web.Response(status=code, body=content, headers={"Location": "/elsewhere"})]
        assert said in str(await unavailable(read(cluster)))


async def test_what_the_api_refuses_is_told_with_all_that_it_says(server: Server, cluster: Cluster) -> None:
    for asked in (cluster.get, lambda path, _: cluster.exec("a", "b", "c", ["d"])):
        server.answers = [status(409, "AlreadyExists", "is there", Retry_After="2")]
        with pytest.raises(ApiRefused) as refused:
            await asked(PODS, Partial)
        error = refused.value
        assert (error.status, error.reason, str(error)) == (409, "AlreadyExists", "is there")
        assert (error.retry_after, error.details) == (2.0, {"a": 1})


async def test_an_empty_list_may_be_null_and_objects_may_stay_as_they_are(server: Server, cluster: Cluster) -> None:
    server.answers = [web.json_response({"metadata": {"resourceVersion": "7"}, "items": None})]
    assert [(page.items, page.metadata.resource_version) async for page in cluster.list(PODS, Pod)] == [([], "7")]
    server.answers = [
        web.Response(body=b'{"metadata": {"continue": "a&b"}, "items": [{"a": 1}]}'),
        web.Response(body=b'{"items": [{"b": 2}]}'),
    ]
    found = [page async for page in cluster.list(PODS, msgspec.Raw, limit=1, resourceVersion="5")]
    assert [bytes(item) for page in found for item in page.items] == [b'{"a": 1}', b'{"b": 2}']
    asked = [path for _, path, _, _ in server.requests]
    assert asked[1:] == [f"{PODS}?resourceVersion=5&limit=1", f"{PODS}?limit=1&continue=a%26b"]


# Credentials. --------------------------------------------------------------------------------------------------------


async def test_refused_credentials_are_read_again_once_for_all_that_ask(
    server: Server, cluster: Cluster, tmp_path: Path
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] == "Bearer new":
            return thing()
        server.configure(tmp_path, "new")
        return status(401, "Unauthorized", "Unauthorized")

    server.handler = answer
    found = await asyncio.gather(*(cluster.get(PODS, Partial) for _ in range(20)))
    assert {one.metadata.name for one in found} == {"one"}
    assert [given for *_, given in server.requests].count("Bearer new") == 20
    assert len(server.requests) <= 40


async def test_credentials_that_stay_refused_are_told(server: Server, cluster: Cluster) -> None:
    server.answers = [status(401, "Unauthorized", "Unauthorized") for _ in range(4)]
    said = (
        f"The cluster north at {server.url[7:]} does not let us in (401): the credentials are wrong, or have expired."
    )
    assert str(await unavailable(cluster.get(PODS, Partial))) == said
    assert str(await unavailable(cluster.exec("a", "b", "c", ["d"]))) == said
    assert len(server.requests) == 4


async def test_a_proxy_is_gone_through_and_its_password_not_told(server: Server, tmp_path: Path) -> None:
    proxy = server.url.replace("//", f"//user:{TOKEN}@")
    server.url = "http://cluster.example"
    seen = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append((str(request.url), request.headers.get("Proxy-Authorization", "")[:6]))
        return thing()

    server.handler = answer
    async with Cluster(server.configure(tmp_path, **{"proxy-url": proxy})) as cluster:
        assert (await cluster.get("/version", Partial)).metadata.name == "one"
        assert seen == [("http://cluster.example/version", "Basic ")]
    nowhere = f"http://user:{TOKEN}@127.0.0.1:1"
    async with Cluster(server.configure(tmp_path, **{"proxy-url": nowhere})) as cluster:
        await unavailable(cluster.get("/version", Partial))


# Connections. --------------------------------------------------------------------------------------------------------


async def test_who_is_not_there_is_told_with_the_reason(tmp_path: Path) -> None:
    server = Server()
    async with serving(server.answer) as server.url:
        pass
    async with Cluster(server.configure(tmp_path), name="north") as cluster:
        for asked in (cluster.version(), read(cluster), cluster.exec("a", "b", "c", ["d"])):
            said = f"The cluster north at {server.url[7:]} cannot be reached (Connect call failed"
            assert str(await unavailable(asked)).startswith(said)


async def test_who_does_not_answer_is_given_up_in_time(server: Server, tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    server.handler = answer
    async with no_task_left(), Cluster(server.configure(tmp_path), timeout=0.3) as cluster:
        for asked in (cluster.version(), read(cluster), cluster.exec("a", "b", "c", ["d"])):
            assert "did not answer within 0.3 seconds" in str(await unavailable(asked))
        server.handler = streaming(b'{"metadata"', end="open")
        assert "did not answer within 0.3 seconds" in str(await unavailable(cluster.version()))


async def test_an_answer_that_is_cut_is_none(server: Server, cluster: Cluster) -> None:
    server.handler = streaming(b'{"metadata": {}}', end="cut")
    assert "cannot be reached" in str(await unavailable(cluster.get(PODS, Partial)))


async def test_cancelling_gives_the_connection_up(server: Server, cluster: Cluster) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        raise AssertionError

    server.handler = answer
    for request in (cluster.version(), read(cluster), cluster.exec("a", "b", "c", ["d"])):
        asked.clear()
        gone.clear()
        task = asyncio.create_task(request)
        async with asyncio.timeout(20):
            await asked.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone.wait()


async def test_what_is_closed_stays_closed(server: Server, cluster: Cluster) -> None:
    server.answers = [thing()]
    await cluster.get(PODS, Partial)
    await cluster.close()
    await cluster.close()
    assert "are closed" in str(await unavailable(cluster.get(PODS, Partial)))


# Streams. ------------------------------------------------------------------------------------------------------------


async def test_lines_are_put_together_however_they_come(server: Server, cluster: Cluster) -> None:
    server.handler = streaming(b"one\ntw", b"o", b"\n", b"\nthr", b"ee\nfour\nfi", b"ve", end="whole")
    assert [line for lines in await read(cluster) for line in lines] == [b"one", b"two", b"", b"three", b"four"]
    async with cluster.logs("a", "b", "c") as arriving:
        logged = [line async for lines in arriving for line in lines]
    assert logged == [b"one", b"two", b"", b"three", b"four", b"five"]


async def test_no_line_is_too_long(server: Server, cluster: Cluster) -> None:
    part = b"x" * 65_536
    server.handler = streaming(*[part] * 400, b"\nshort\n")
    long, short = [line for lines in await read(cluster) for line in lines]
    assert (len(long), short) == (400 * 65_536, b"short")


@pytest.mark.parametrize("end", [b"", b"\n", b"\nnext\n"])
async def test_a_line_of_a_log_that_does_not_end_is_cut(server: Server, cluster: Cluster, end: bytes) -> None:
    server.handler = streaming(b"first\nx", *[b"x" * 65_536] * 400, end)
    async with cluster.logs("a", "b", "c") as arriving:
        first, long, *others = [line async for lines in arriving for line in lines]
    assert (first, len(long), others) == (b"first", LOG_LINE, [b"next"] if b"next" in end else [])


async def test_lines_that_come_together_are_given_together(server: Server, cluster: Cluster) -> None:
    server.handler = streaming(b"a line\n" * 20_000)
    batches = await read(cluster)
    assert sum(map(len, batches)) == 20_000
    assert len(batches) < 200


async def test_a_stream_that_is_cut_fails_after_what_came_whole(server: Server, cluster: Cluster) -> None:
    server.handler = streaming(b"one\ntwo\nthr", end="cut")
    seen: list[bytes] = []

    async def follow() -> None:
        async with cluster.stream(PODS) as arriving:
            async for lines in arriving:
                seen.extend(lines)

    assert f"The cluster north at {server.url[7:]} hung up" in str(await unavailable(follow()))
    assert seen == [b"one", b"two"]


async def test_a_stream_without_a_byte_is_given_up(server: Server, cluster: Cluster) -> None:
    server.handler = streaming(b"one\n", end="open")
    seen: list[bytes] = []

    async def follow() -> None:
        async with cluster.stream(PODS, idle=0.3) as arriving:
            async for lines in arriving:
                seen.extend(lines)

    assert "has sent nothing for 0.3 seconds" in str(await unavailable(follow()))
    assert seen == [b"one"]


async def test_a_stream_that_is_left_is_closed(server: Server, cluster: Cluster) -> None:
    gone = asyncio.Event()
    send = streaming(b"one\n", end="open")

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await send(request)
        finally:
            gone.set()

    server.handler = answer
    async with cluster.stream(PODS) as arriving:
        assert await anext(arriving) == [b"one"]
    async with asyncio.timeout(20):
        await gone.wait()


# Commands. -----------------------------------------------------------------------------------------------------------


def command(*messages: bytes, answer: bool = True) -> Handler:
    """A handler that speaks the channel protocol; without an answer it hangs up in the end, or says nothing more."""

    async def handle(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await websocket.prepare(request)
        for message in messages:
            await websocket.send_bytes(message)
        if not answer:
            await websocket.receive()
        await websocket.close()
        return websocket

    return handle


async def test_the_channels_of_a_command_are_told_apart(server: Server, cluster: Cluster) -> None:
    failure = b'{"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": ['
    cause = b'{"reason": "ExitCode", "message": "3"}]}}'
    server.handler = command(b"\1", b"\1out", b"\2err", b"", b"\7?", b"\1put", b"\3" + failure, b"\3" + cause)
    assert await cluster.exec("a", "b", "c", ["ls", "-l", "a&b"]) == (3, b"outerrput")
    path = "/api/v1/namespaces/a/pods/b/exec"
    query = "container=c&stdout=1&stderr=1&command=ls&command=-l&command=a%26b"
    assert server.requests == [("GET", f"{path}?{query}", b"", f"Bearer {TOKEN}")]


async def test_a_command_that_says_no_exit_code_is_none_that_went_well(server: Server, cluster: Cluster) -> None:
    server.handler = command(b"\1out")
    assert "hung up before the command in b had ended" in str(await unavailable(cluster.exec("a", "b", "c", ["ls"])))
    server.handler = command(b"\3what")
    assert "cannot be read" in str(await unavailable(cluster.exec("a", "b", "c", ["ls"])))


async def test_a_command_that_hangs_is_given_up(server: Server, cluster: Cluster) -> None:
    server.handler = command(b"\1out", answer=False)
    error = await unavailable(cluster.exec("a", "b", "c", ["ls"], deadline=0.3))
    assert str(error) == "The command in b did not end within 0.3 seconds."
