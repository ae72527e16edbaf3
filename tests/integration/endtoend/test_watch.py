"""`cluster-code watch`: what it shows, what it goes on through, and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest_asyncio

from tests.integration.endtoend.server import DEADLINE, Client, Server, command
from tests.proxy import TcpProxy

Watch = Callable[..., Any]


@pytest_asyncio.fixture
async def watch(idle: Server) -> AsyncIterator[Watch]:
    """Starts watches beside the server."""
    started: list[asyncio.subprocess.Process] = []

    async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *command("watch", *arguments), env={**idle.environment, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(process: asyncio.subprocess.Process, words: str) -> str:
    """The next line on stderr that has these words."""
    async with asyncio.timeout(DEADLINE):
        while line := (await process.stderr.readline()).decode():
            if words in line:
                return line
    raise AssertionError(f"it ended without saying {words!r}")


async def shown(process: asyncio.subprocess.Process) -> str:
    """The next line on stdout."""
    async with asyncio.timeout(DEADLINE):
        return (await process.stdout.readline()).decode()


async def name_of_event(process: asyncio.subprocess.Process) -> str:
    """The name in the next event."""
    return json.loads(await shown(process))["data"]["name"]


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Its exit code, and the rest of stderr."""
    async with asyncio.timeout(DEADLINE):
        _, errors = await process.communicate()
    return process.returncode, errors.decode()


async def test_it_shows_each_event_once_through_a_cut_and_tells_where_to_go_on(
    server: Server, client: Client, watch: Watch, tmp_path: Path
) -> None:
    token = (await client.call("POST", "/tokens", {"name": "watch", "scopes": ["read"]}))["token"]
    file = tmp_path / "token"
    file.write_text(token + "\n")
    async with TcpProxy("127.0.0.1", int(server.url.rsplit(":", 1)[1])) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        process = await watch("broadcast", "--json", "--url", url, "--token-file", str(file))
        await said(process, "connected at ")
        await client.call("POST", "/workspaces", {"name": "one"})
        assert await name_of_event(process) == "one"
        proxy.cut()
        await client.call("POST", "/workspaces", {"name": "two"})
        await said(process, "trying again in")
        await client.call("POST", "/workspaces", {"name": "three"})
        assert [await name_of_event(process) for _ in range(2)] == ["two", "three"]
        process.send_signal(signal.SIGINT)
        code, errors = await ended(process)
        assert code == 130
        assert "Traceback" not in errors
        assert token not in errors
        position = errors.split("--since ")[1].split()[0]

        await client.call("POST", "/workspaces", {"name": "four"})
        process = await watch("--json", "--since", position, "--url", url, CLUSTER_CODE_TOKEN=token)
        assert await name_of_event(process) == "four"
        process.send_signal(signal.SIGINT)
        assert (await ended(process))[0] == 130


async def test_the_server_that_runs_here_needs_no_token_and_a_new_log_is_told(
    server: Server, client: Client, watch: Watch
) -> None:
    port = server.url.rsplit(":", 1)[1]
    process = await watch()
    await said(process, "connected at ")
    await client.call("POST", "/workspaces", {"name": "Pretty"})
    line = await shown(process)
    assert "workspace.created" in line
    assert '"Pretty"' in line
    await server.stop()
    server.environment["PORT"] = port
    await server.start()
    # The embedded mode keeps its log in memory: it begins anew.
    await said(process, "recovered: false")
    await client.call("POST", "/workspaces", {"name": "Later"})
    assert '"Later"' in await shown(process)


async def test_a_reader_who_has_enough_ends_it_quietly(server: Server, client: Client, watch: Watch) -> None:
    for arguments in ((), ("--json",)):
        process = await watch(*arguments)
        await said(process, "connected at ")
        process._transport.get_pipe_transport(1).close()
        await client.call("POST", "/workspaces", {"name": "unread"})
        async with asyncio.timeout(DEADLINE):
            errors = (await process.stderr.read()).decode()
            assert await process.wait() == 141
        assert errors.splitlines()[1:] == []
        assert errors.startswith("go on after this by --since ")


async def test_what_is_refused_for_good_ends_it_with_one_line(server: Server, watch: Watch) -> None:
    refusals = [
        (["session:99"], {}, 1, "Subscribing to 'session:99' is refused: There is no such session."),
        (["--email", "nobody@example.org"], {}, 1, "There is no user with the address 'nobody@example.org'."),
        (["--url", server.url], {"CLUSTER_CODE_TOKEN": "wrong"}, 1, "the server refuses: "),
        (["--url", server.url], {}, 2, "CLUSTER_CODE_TOKEN is not set"),
        (["--url", server.url, "--token-file", "/none"], {}, 1, "--token-file: cannot read /none"),
    ]
    for arguments, environment, code, words in refusals:
        ending, errors = await ended(await watch(*arguments, **environment))
        assert (ending, words in errors, len(errors.splitlines())) == (code, True, 1), errors


async def test_without_a_server_it_says_how_to_start_one(idle: Server, watch: Watch) -> None:
    assert await ended(await watch()) == (
        1, "cluster-code: no server runs here: start one by `make run` (or name one by --url)\n"
    )  # fmt: skip
