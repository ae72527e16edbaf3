"""What a killed process, a lost database and a second signal leave behind: nothing, and all of the data."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import psutil
import pytest

from scripts.demo_repository import Repository
from tests.integration.endtoend.server import Client, Server, until


async def test_ctrl_c_leaves_nothing_running_and_the_next_start_has_it_all(
    server: Server, client: Client, repository: Repository
) -> None:
    project = await client.project(repository.url)
    session_id = await client.session(project)
    before = await client.until_served(session_id, repository.page)

    assert await server.stop() == 0
    await server.until_nothing_is_left()
    assert not (server.data_dir / "dev.json").exists()

    await server.start()
    assert await client.call("GET", f"/projects/{project['id']}") == project
    after = await client.until_served(session_id, repository.page)
    assert after["created_at"] == before["created_at"]


@pytest.mark.random
async def test_killed_at_any_point_of_a_start_or_a_delete_the_next_start_finishes_it(
    server: Server, client: Client, repository: Repository
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(3):
        session_id = await client.session(await client.project(repository.url))
        await asyncio.sleep(draw.uniform(0, 0.8))  # The moment of the kill is what is drawn.
        await server.kill()
        await server.start()
        await client.until_served(session_id, repository.page)

        await client.call("DELETE", f"/sessions/{session_id}")
        await asyncio.sleep(draw.uniform(0, 0.2))
        await server.kill()
        await server.start()
        await client.until_status(session_id, "deleted")
        await until(lambda: not services(server))
    assert list((server.data_dir / "sessions").iterdir()) == []


def services(server: Server) -> list[str]:
    """Processes that belong to sessions: all but the database's."""
    return [line for line in server.left() if "postgres" not in line]


async def test_a_kill_leaves_no_session_process_after_the_next_start(
    server: Server, client: Client, repository: Repository
) -> None:
    session_id = await client.session(await client.project(repository.url))
    await client.until_status(session_id, "running")
    await client.call("POST", f"/sessions/{session_id}/stop")
    await server.kill()
    await server.start()
    await client.until_status(session_id, "stopped")
    await until(lambda: not services(server))


async def test_a_second_signal_hurries(server: Server, client: Client, repository: Repository) -> None:
    await client.until_status(await client.session(await client.project(repository.url)), "running")
    server.signal(signal.SIGTERM)
    await until(lambda: "another signal hurries" in server.output.read_text())
    server.signal(signal.SIGTERM)
    assert await server.wait() in (0, 130)
    await server.until_nothing_is_left()


@pytest.mark.parametrize("delay", [0.3, 1.2])
async def test_interrupted_while_it_starts_it_leaves_nothing_running(idle: Server, delay: float) -> None:
    await idle.spawn()
    await asyncio.sleep(delay)  # Some point of the first start, whichever the machine has come to.
    idle.signal(signal.SIGINT)
    try:
        async with asyncio.timeout(10):
            code = await idle.wait()
    except TimeoutError:
        # Python itself loses an interrupt that comes while it sets up its imports: people press the keys again.
        idle.signal(signal.SIGINT)
        code = await idle.wait()
    # Before Python has set anything up, the signal itself ends the process.
    assert code in (0, 130, -signal.SIGINT, 1)
    await idle.until_nothing_is_left()
    await idle.start()


async def test_a_database_that_hangs_is_answered_503_and_all_goes_on_when_it_is_back(
    server: Server, client: Client, repository: Repository
) -> None:
    project = await client.project(repository.url)
    socket = await client.connect()
    stop_all(server, signal.SIGSTOP)
    try:
        await expect_unavailable(client)
    finally:
        stop_all(server, signal.SIGCONT)
    await expect_running(client, socket, project)
    await socket.close()


async def test_a_database_that_is_killed_comes_back_and_the_open_socket_stays(
    server: Server, client: Client, repository: Repository
) -> None:
    project = await client.project(repository.url)
    socket = await client.connect()
    before = server.database_pid()
    os.kill(before, signal.SIGKILL)
    statuses = set()
    async with asyncio.timeout(30):
        while (
            status := (await client.request("GET", "/api/v1/sessions"))[0]
        ) != 200 or server.database_pid() == before:
            statuses.add(status)
            await asyncio.sleep(0.02)
    assert statuses <= {200, 503}
    await expect_running(client, socket, project)
    await socket.close()


def stop_all(server: Server, number: signal.Signals) -> None:
    """To the database's server and all of its children."""
    postmaster = psutil.Process(server.database_pid())
    for process in (postmaster, *postmaster.children()):
        process.send_signal(number)


async def expect_unavailable(client: Client) -> None:
    status, problem, headers = await client.request("GET", "/api/v1/sessions")
    assert status == 503, problem
    assert problem["status"] == 503
    assert int(headers["Retry-After"]) >= 1
    assert headers["Content-Type"].startswith("application/problem+json")


async def expect_running(client: Client, socket: object, project: dict[str, object]) -> None:
    """A session is made, and the socket that was open all the time tells that it runs."""
    async with asyncio.timeout(30):
        while (made := await client.request("POST", "/api/v1/sessions", {"project_id": project["id"]}))[0] == 503:
            await asyncio.sleep(0.1)
        assert made[0] in (200, 201, 202), made
        while True:
            message = await socket.receive_json()
            if message["event_type"] == "session.status" and message["data"]["status"] == "running":
                return
