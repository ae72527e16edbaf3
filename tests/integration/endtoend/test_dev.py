"""`cluster-code dev`: a first start, wrong settings, and the commands that work beside it."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.settings import DatabaseSettings
from scripts.demo_repository import Repository
from tests.integration.endtoend.server import PASSWORD, Client, Server, command
from tests.integration.eventlog.rabbit import opened


async def run(
    server: Server, *arguments: str, given: str = "", deadline: float = 50, **environment: str
) -> tuple[int, str, str]:
    """Run a command beside the server, for at most `deadline` seconds; exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *command(*arguments), env={**server.environment, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(deadline):
        output, errors = await process.communicate(given.encode())
    return process.returncode, output.decode(), errors.decode()


async def test_the_demonstration_succeeds(server: Server) -> None:
    code, output, errors = await run(server, "demo")
    assert (code, errors) == (0, "")
    for step in ("connected", "subscribed", "starting", "session.log", "running", "answers 200", "deleted"):
        assert step in output
    assert output.rstrip().endswith("All of it happened.")


async def test_the_demonstration_takes_a_repository_and_an_account(server: Server, repository: Repository) -> None:
    code, output, errors = await run(
        server, "demo", "--email", "admin@localhost", "--url", server.url, REPO=repository.url, DEMO_PASSWORD=PASSWORD
    )
    assert (code, errors) == (0, "")
    assert repository.url in output


async def test_the_demonstration_fails_for_a_repository_that_is_not_there(server: Server) -> None:
    code, _, errors = await run(server, "demo", "--repo", "git://127.0.0.1:1/none")
    assert code == 1
    assert "the demonstration failed: the session failed (" in errors
    code, _, errors = await run(server, "demo", "--repo", "file:///etc")
    assert code == 1
    assert "POST /projects answers 422" in errors


async def test_the_demonstration_says_how_to_get_a_provider_that_is_not_there(server: Server) -> None:
    code, _, errors = await run(server, "demo", "--provider", "kubernetes")
    assert code == 1
    assert "the server has no provider 'kubernetes' (it has: local)." in errors
    assert "`KUBECONFIG=~/.kube/config make run`" in errors
    assert "Traceback" not in errors


async def test_the_demonstration_takes_a_provider_and_a_size(server: Server) -> None:
    code, output, errors = await run(server, "demo", "--provider", "local", "--machine-config", "small")
    assert (code, errors) == (0, "")
    assert "answers 200" in output
    code, _, errors = await run(server, "demo", "--machine-config", "huge")
    assert code == 1
    assert "There is no machine config 'huge'" in errors


async def test_its_metrics_are_also_the_orchestrators(server: Server, client: Client) -> None:
    wanted = {
        'cluster_code_relay_leads{relay="outbox"} 1.0',
        'cluster_code_provider_up{kind="local",provider="local"} 1.0',
        "cluster_code_sessions_working_max 8.0",
        "cluster_code_connections 0.0",
    }
    async with asyncio.timeout(20):
        while wanted:
            async with client._http.get(f"{server.url}/metrics") as answer:
                wanted -= set((await answer.text()).splitlines())
            await asyncio.sleep(0.05)
        # So is the engine of the apps, which is away here, and does not count.
        while True:
            async with client._http.get(f"{server.url}/ready") as answer:
                ready = await answer.json()
            if "unix:///nowhere/docker.sock" in ready["apps"]["message"]:
                break
            await asyncio.sleep(0.05)
        assert (ready["status"], ready["apps"]["state"]) == ("ready", "down")


async def test_without_a_server_the_demonstration_says_how_to_start_one(idle: Server) -> None:
    code, output, errors = await run(idle, "demo")
    assert (code, output) == (1, "")
    assert errors == "cluster-code: no server runs here: start one by `make run` (or name one by --url)\n"


async def test_the_first_start_prints_a_password_once_and_the_next_none(idle: Server) -> None:
    idle.environment["ADMIN_PASSWORD"] = ""
    await idle.start()
    first = idle.output.read_text()
    assert first.count("Password: ") == 1
    assert "Ready: http://127.0.0.1:" in first
    await idle.stop()
    await idle.start()
    assert idle.output.read_text().count("Password: ") == 1
    assert idle.output.read_text().count("Ready: ") == 2


async def test_what_it_keeps_is_for_its_owner_only(server: Server) -> None:
    for name in ("dev.json", "jwt-secret", "lock"):
        assert stat.S_IMODE((server.data_dir / name).stat().st_mode) == 0o600
    assert len((server.data_dir / "jwt-secret").read_text().strip()) >= 32


async def test_at_rest_it_is_small(server: Server, client: Client) -> None:
    assert psutil.Process(server.pid).memory_info().rss < 150 << 20
    loaded = {Path(entry.path).name for entry in psutil.Process(server.pid).memory_maps() if entry.path}
    assert not any("kubernetes" in name for name in loaded)


async def test_a_second_start_on_the_same_directory_is_refused(server: Server) -> None:
    code, output, errors = await run(server, "dev")
    assert (code, output) == (2, "")
    assert errors == f"cluster-code: DATA_DIR: {server.data_dir} is in use by cluster-code dev (pid {server.pid})\n"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


async def test_a_port_in_use_is_one_line(idle: Server, taken_port: int) -> None:
    code, output, errors = await run(idle, "dev", PORT=str(taken_port))
    assert (code, output) == (2, "")
    where = f"127.0.0.1:{taken_port}"
    assert errors == f"cluster-code: PORT: cannot listen on {where}: Address already in use. Set another PORT or HOST\n"


async def test_a_directory_that_cannot_be_made_is_one_line(idle: Server) -> None:
    (file := idle.data_dir.with_name("file")).write_text("")
    code, output, errors = await run(idle, "dev", DATA_DIR=str(file / "data"))
    assert (code, output) == (2, "")
    assert errors == f"cluster-code: DATA_DIR: cannot use {file}/data: Not a directory\n"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("PORT", "web", "PORT: 'web' is no whole number. Port to listen on."),
        ("WS_PING_INTERVAL", "0", "WS_PING_INTERVAL must be greater than 0, not 0.0. Seconds between WebSocket pings."),
        ("RATE_LIMIT_LOGIN", "x", "RATE_LIMIT_LOGIN: 'x' is no rate such as 1200/minute"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL must be one of debug, info, warning, error, not 'loud'."),
        ("JWT_SECRET", "short", "must have 32 bytes or more, and has 5"),
        ("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none", "DATABASE_URL: no PostgreSQL answers there"),
        ("DATABASE_URL", "nonsense", "DATABASE_URL: "),
    ],
)
async def test_a_wrong_setting_is_one_line(idle: Server, name: str, value: str, line: str) -> None:
    code, output, errors = await run(idle, "dev", **{name: value})
    assert (code, output) == (2, "")
    assert errors.startswith("cluster-code: ")
    assert line in errors
    assert errors.count("\n") == 1


async def test_with_a_database_of_the_users_it_makes_none(idle: Server, database_settings: DatabaseSettings) -> None:
    idle.environment["DATABASE_URL"] = database_settings.url
    await idle.start()
    assert not (idle.data_dir / "postgres").exists()
    assert json.loads((idle.data_dir / "dev.json").read_text())["database_url"] is None
    code, output, _ = await run(idle, "provider", "list")
    assert code == 0
    assert "local" in output
    code, _, errors = await run(idle, "provider", "list", DATABASE_URL="")
    assert code == 2
    assert "DATABASE_URL is not set" in errors
    # Here, since the database is dropped before the fixture would stop the server, which rightly ends with 1 then.
    assert await idle.stop() == 0


async def test_admin_commands_work_beside_the_running_server(server: Server, client: Client) -> None:
    code, output, errors = await run(server, "user", "create", "ada@example.org", given="a good password\n")
    assert (code, errors) == (0, "")
    assert output.endswith("(ada@example.org): added\n")
    code, token, errors = await run(server, "token", "issue", "ada@example.org", "--expires", "1h")
    assert (code, errors) == (0, "")
    client._token = token.strip()
    assert (await client.call("GET", "/users/me"))["email"] == "ada@example.org"


async def test_serve_and_worker_say_that_they_need_rabbitmq(idle: Server) -> None:
    for name in ("serve", "worker"):
        code, output, errors = await run(
            idle, name, DATABASE_URL="postgresql://x@127.0.0.1/x", JWT_SECRET="k3" * 20 + "abcdefgh"
        )
        assert (code, output) == (2, "")
        assert "AMQP_URL is not set" in errors
        assert errors.count("\n") == 1


async def test_with_a_rabbitmq_its_stream_is_the_log_and_outlives_the_server(server: Server, amqp_url: str) -> None:
    assert await server.stop() == 0
    server.environment["AMQP_URL"] = amqp_url
    await server.start()
    code, output, errors = await run(server, "demo")
    assert (code, errors) == (0, "")
    assert output.rstrip().endswith("All of it happened.")
    async with opened(amqp_url) as log:
        head, epoch = await log.head(), log.epoch
    assert head > 5
    await server.stop()
    await server.start()
    async with opened(amqp_url) as log:
        assert log.epoch == epoch
        assert await log.head() >= head
