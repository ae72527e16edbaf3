"""Providers and machine configs by command: brought in, listed, tried, removed."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from orchestrator import holds
from orchestrator.docker.engine import Engine
from scripts import machines
from tests.integration.scripts.conftest import Fetch, Run
from tests.rabbitmq import certify

PROVIDERS = """
providers:
  - {name: here, kind: local, default: true}
machine_configs:
  - name: small
    provider: here
    default: true
    services: {preview: {command: ["{python}", -m, http.server, "{port}"]}}
"""


def test_an_import_says_what_it_would_do_does_it_and_then_changes_nothing(
    run: Run, fetch: Fetch, tmp_path: Path
) -> None:
    (file := tmp_path / "machines.yaml").write_text(PROVIDERS)
    told = "provider here: added\nmachine config small: added\n"
    dry = "This was a dry run: nothing was changed.\n"
    assert run("import-machine-configs", str(file), "--dry-run") == (0, told + dry, "")
    assert fetch("SELECT * FROM providers") == []
    assert run("import-machine-configs", str(file)) == (0, told, "")
    assert fetch("SELECT name FROM machine_configs") == [("small",)]
    again = "provider here: unchanged\nmachine config small: unchanged\nNothing to change.\n"
    assert run("import-machine-configs", str(file)) == (0, again, "")
    assert fetch("SELECT action, object FROM audit_log") == [("machines.import", "machines.yaml")] * 2


def test_a_wrong_file_changes_nothing_and_names_every_wrong_place(run: Run, fetch: Fetch, tmp_path: Path) -> None:
    (file := tmp_path / "machines.yaml").write_text(PROVIDERS + "  - {name: BAD NAME, provider: nowhere}\n")
    code, output, errors = run("import-machine-configs", str(file))
    assert (code, output) == (1, "")
    assert "machine_configs[1].name" in errors
    assert fetch("SELECT * FROM providers") == []
    assert run("import-machine-configs", str(tmp_path / "none.yaml"))[0] == 2


def test_a_provider_is_added_listed_and_removed(run: Run) -> None:
    assert run("provider", "add", "here", "--kind", "local", "--option", "crashes=3", "--default")[:2] == (
        0, "provider here: added\n"
    )  # fmt: skip
    code, _, errors = run("provider", "add", "here", "--kind", "local")
    assert code == 1
    assert "already" in errors
    code, output, _ = run("provider", "list")
    assert code == 0
    assert [word for word in ("here", "local", "unknown") if word not in output] == []
    assert run("provider", "remove", "here")[:2] == (0, "provider here: removed\n")
    code, _, errors = run("provider", "remove", "here")
    assert (code, errors) == (1, "cluster-code: There is no provider 'here'; there are: none.\n")


def test_a_wrong_option_of_a_provider_is_a_usage_error(run: Run) -> None:
    for option in ("crashes", "=3", "crashes=[", "crashes: {"):
        code, _, errors = run("provider", "add", "here", "--kind", "local", "--option", option)
        assert code == 2
        assert "--option" in errors
    code, _, errors = run("provider", "add", "here", "--kind", "local", "--option", "unheard_of=1")
    assert code == 1
    assert "unheard_of" in errors


def test_a_provider_is_added_with_where_it_is_and_where_its_credentials_lie(run: Run, fetch: Fetch) -> None:
    added = run(
        "provider", "add", "east", "--kind", "kubernetes", "--endpoint", "https://203.0.113.7:6443", "--disabled",
        "--credential", "token=env:EAST_TOKEN", "--credential", "certificate_authority=file:/etc/ca.pem",
        "--option", "instance=ours",
    )  # fmt: skip
    assert added == (0, "provider east: added\n", "")
    assert fetch("SELECT endpoint, credentials, enabled FROM providers") == [
        (
            "https://203.0.113.7:6443",
            {"token": {"env": "EAST_TOKEN"}, "certificate_authority": {"file": "/etc/ca.pem"}},
            False,
        )
    ]
    assert "https://203.0" in run("provider", "list")[1]
    for wrong in ("token", "token=secret", "token=value:secret", "=env:X", "token=env:"):
        code, _, errors = run("provider", "add", "west", "--kind", "kubernetes", "--credential", wrong)
        assert (code, "secret" in errors) == (2, False), errors
    code, _, errors = run("provider", "add", "west", "--kind", "local", "--endpoint", "https://203.0.113.7")
    assert (code, errors.startswith("cluster-code: The provider is not valid: endpoint: is for other kinds")) == (
        1,
        True,
    )


def test_what_is_in_use_is_not_removed_and_its_users_are_named(run: Run, fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "machines.yaml").write_text(PROVIDERS)
    run("import-machine-configs", str(tmp_path / "machines.yaml"))
    fetch(
        """WITH w AS (INSERT INTO workspaces (name) VALUES ('w') RETURNING id),
                p AS (INSERT INTO projects (workspace_id, name) SELECT id, 'site' FROM w
                      RETURNING id, uuid, workspace_id)
           INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider, machine_config, machine,
                                 namespace, container_name, expires_at)
           SELECT p.id, p.uuid, p.workspace_id, v.id, v.name, 'small', '{}', 'n', 'c', now() FROM p, providers v
           RETURNING id"""
    )
    code, output, errors = run("provider", "remove", "here")
    assert (code, output) == (1, "")
    assert errors == (
        "cluster-code: The provider 'here' is in use by the machine config small and by the session 1 (project site, "
        "pending): remove or delete these first.\n"
    )
    code, output, errors = run("machine-config", "remove", "small")
    assert (code, output) == (1, "")
    assert errors == (
        "cluster-code: The machine config 'small' is in use by the session 1 (project site, pending): remove or delete "
        "these first.\n"
    )
    fetch("UPDATE sessions SET status = 'deleted' RETURNING id")
    assert "small" in run("machine-config", "list")[1]
    assert run("machine-config", "remove", "small")[:2] == (0, "machine config small: removed\n")
    code, _, errors = run("machine-config", "remove", "small")
    assert (code, errors) == (1, "cluster-code: There is no machine config 'small'; there are: none.\n")
    assert fetch("SELECT action FROM audit_log ORDER BY id DESC LIMIT 1") == [("machine-config.remove",)]


def test_a_local_provider_is_tried(run: Run, tmp_path: Path) -> None:
    run("provider", "add", "here", "--kind", "local")
    where = tmp_path / "data"
    assert run("provider", "test", "here") == (0, f"provider here: this machine, with sessions in {where}\n", "")
    assert run("provider", "test", "there") == (1, "", "cluster-code: There is no provider 'there'; there are: here.\n")


def test_a_provider_that_an_orchestrator_has_for_itself_is_as_that_found_it(
    run: Run, fetch: Fetch, database_url: str
) -> None:
    run("provider", "add", "here", "--kind", "local")

    async def tried() -> list[tuple[int, str, str]]:
        connection = await asyncpg.connect(database_url)
        try:
            assert await holds.take(connection, await connection.fetchval("SELECT id FROM providers"))
            results = [await asyncio.to_thread(run, "provider", "test", "here")]
            await connection.execute("UPDATE providers SET state = 'up', checked_at = now()")
            results.append(await asyncio.to_thread(run, "provider", "test", "here"))
            await connection.execute("UPDATE providers SET state = 'down', message = 'The disk is full.'")
            results.append(await asyncio.to_thread(run, "provider", "test", "here"))
            return results
        finally:
            await connection.close()

    silent, up, down = asyncio.run(tried())
    assert silent == (
        1, "", "cluster-code: An orchestrator runs the provider 'here', but has not said how it is.\n"
    )  # fmt: skip
    assert (up[0], re.sub(r"\d+", "N", up[1])) == (
        0, "provider here: as the orchestrator that runs it found N seconds ago\n"
    )  # fmt: skip
    assert down == (1, "", "cluster-code: The disk is full.\n")


def test_a_docker_engine_is_tried_where_the_provider_says(run: Run, engine: Engine, tmp_path: Path) -> None:
    run("provider", "add", "boxes", "--kind", "docker", "--endpoint", engine.host)
    code, output, errors = run("provider", "test", "boxes")
    assert (code, errors) == (0, "")
    assert re.match(rf"provider boxes: Docker \d+\.\d+.* at {re.escape(engine.host)} ", output)
    absent = f"unix://{tmp_path}/absent.sock"
    run("provider", "add", "gone", "--kind", "docker", "--endpoint", absent)
    code, output, errors = run("provider", "test", "gone")
    assert (code, output, absent in errors, errors.count("\n")) == (1, "", True, 1)


def test_a_docker_engine_is_reached_by_certificates(
    run: Run, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not engine.host.startswith("unix://"):
        pytest.skip("the engine of this machine is not at a socket")
    certify(tmp_path)
    monkeypatch.setenv("BOXES_KEY", (tmp_path / "server.key").read_text())
    with tls_in_front_of(engine.host.removeprefix("unix://"), tmp_path) as port:
        where = ["--kind", "docker", "--endpoint", f"tcp://localhost:{port}"]
        known = ["--credential", f"ca=file:{tmp_path}/ca.pem"]
        own = ["--credential", f"cert=file:{tmp_path}/server.pem", "--credential", "key=env:BOXES_KEY"]
        run("provider", "add", "boxes", *where, *known, *own)
        assert run("provider", "test", "boxes")[::2] == (0, "")
        run("provider", "add", "nobody", *where, *known, "--option", "instance=other")
        assert run("provider", "test", "nobody")[0] == 1


@contextmanager
def tls_in_front_of(path: str, folder: Path) -> Iterator[int]:
    """A port where clients must show a certificate, and then speak to the socket."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.pem"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    loop = asyncio.new_event_loop()
    ports: list[int] = []
    ready, end = threading.Event(), asyncio.Event()

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, before = await asyncio.open_unix_connection(path)
        await asyncio.gather(passed_on(reader, before), passed_on(behind, writer))

    async def serve() -> None:
        async with await asyncio.start_server(taken, "localhost", 0, ssl=context, family=socket.AF_INET) as server:
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_a_missing_credential_is_named_and_one_that_is_there_is_not_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EAST_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as refusing:
        port = refusing.getsockname()[1]
    run(
        "provider", "add", "east", "--kind", "kubernetes", "--endpoint", f"https://127.0.0.1:{port}",
        "--credential", "token=env:EAST_TOKEN",
    )  # fmt: skip
    code, output, errors = run("provider", "test", "east")
    assert (code, output) == (1, "")
    assert errors == (
        "cluster-code: The provider 'east' cannot be opened: its credential 'token' is missing: "
        "the environment variable EAST_TOKEN of this process is not set.\n"
    )
    monkeypatch.setenv("EAST_TOKEN", "correct-horse")
    code, output, errors = run("provider", "test", "east")
    assert (code, output, "correct-horse" in errors, f"127.0.0.1:{port}" in errors) == (1, "", False, True)


def test_one_that_does_not_answer_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "TEST_DEADLINE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        run("provider", "add", "mute", "--kind", "docker", "--endpoint", f"tcp://127.0.0.1:{port}")
        assert run("provider", "test", "mute") == (1, "", "cluster-code: It did not answer within 0 seconds.\n")
