"""A local provider, repositories that a real git daemon serves, and an eye on processes that are left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from orchestrator.children.processes import INSTANCE, Selection
from orchestrator.providers.contract import Endpoint, LogLine, Machine, SessionRef, SessionSpec
from orchestrator.providers.local import LocalProvider
from tests.conftest import no_task_left

# A server that answers every GET with 200; its arguments are the port, and what it prints first.
SERVER = """
import http.server, sys
print(*sys.argv[2:], flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def python(program: str, *arguments: str, **service: Any) -> dict[str, Any]:
    """A service that is a Python program."""
    return {"command": ["{python}", "-I", "-u", "-c", program, "{port}", *arguments], **service}


def shell(script: str, **service: Any) -> dict[str, Any]:
    """A service that is a shell script."""
    return {"command": ["sh", "-c", script], **service}


def spec(
    services: Mapping[str, Any] | None = None,
    *,
    session_id: int = 7,
    repo_url: str | None = None,
    branch: str | None = None,
    env: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    **machine: Any,
) -> SessionSpec:
    """What the orchestrator would ask for. Without services: one that answers."""
    return SessionSpec(
        SessionRef(session_id, "namespace", "container"),
        UUID(int=session_id),
        repo_url,
        branch,
        env or {},
        Machine(
            "test",
            services={"preview": python(SERVER, ready="/")} if services is None else services,
            options=options or {},
            **machine,
        ),
    )


def url(endpoint: Endpoint | None) -> str:
    assert endpoint is not None
    return endpoint.url


@dataclass
class Heard:
    """What a provider reported and logged."""

    lines: list[LogLine] = field(default_factory=list)
    reports: list[tuple[str, str]] = field(default_factory=list)

    async def report(self, reason: str, message: str) -> None:
        self.reports.append((reason, message))

    def of(self, service: str, stream: str | None = None) -> list[str]:
        return [one.line for one in self.lines if one.service == service and stream in (None, one.stream)]

    def __str__(self) -> str:
        return "\n".join(one.line for one in self.lines) + "\n".join(message for _, message in self.reports)


async def until(condition: Callable[[], Any], *, timeout: float = 10.0) -> None:
    """Return when the condition holds; fail after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


def living(directory: Path) -> list[int]:
    """The processes that belong to a provider's directory."""
    holder = LocalProvider(directory, lambda line: None)._directory
    instance = holder._identity()
    return [process.pid for process in Selection({INSTANCE: instance}).find()]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


MakeProvider = Callable[..., LocalProvider]
QUICK = {"restart_delay": 0.01, "stop_grace": 2.0, "ready_deadline": 10.0, "clone_deadline": 20.0}


@pytest_asyncio.fixture
async def make(data_dir: Path, heard: Heard) -> AsyncIterator[MakeProvider]:
    """Makes providers on the test's directory; at the end nothing of them may be left."""
    made: list[LocalProvider] = []

    def make(**options: Any) -> LocalProvider:
        provider = LocalProvider(data_dir, heard.lines.append, {**QUICK, **options})
        made.append(provider)
        return provider

    async with no_task_left():
        yield make
        for provider in made:
            await provider.close()
    if (data_dir / "instance").exists():
        left = living(data_dir)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left == []


@pytest_asyncio.fixture
async def provider(make: MakeProvider) -> LocalProvider:
    return make()


def git(*arguments: str, cwd: Path) -> None:
    environment = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    subprocess.run(["git", *arguments], cwd=cwd, env=environment, check=True, capture_output=True, timeout=30)


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A folder with the repositories `project` (branches main and next, several commits) and `empty`."""
    folder = tmp_path / "repositories"
    work = folder / "project"
    work.mkdir(parents=True)
    git("init", "--quiet", "--initial-branch=main", cwd=work)
    for number in range(3):
        (work / "index.html").write_text(f"version {number}")
        git("add", ".", cwd=work)
        git("commit", "--quiet", "-m", f"version {number}", cwd=work)
    git("checkout", "--quiet", "-b", "next", cwd=work)
    (work / "next.html").write_text("next")
    (work / "link").symlink_to("/etc")
    git("add", ".", cwd=work)
    git("commit", "--quiet", "-m", "next", cwd=work)
    git("checkout", "--quiet", "main", cwd=work)
    (folder / "empty").mkdir()
    git("init", "--quiet", "--bare", "--initial-branch=main", cwd=folder / "empty")
    return folder


@pytest.fixture
def git_url(repositories: Path) -> Iterator[str]:
    """The URL of the folder, as a git daemon serves it."""
    program = Path(subprocess.check_output(["git", "--exec-path"], text=True).strip()) / "git-daemon"
    if not program.exists():
        message = "git daemon is missing: install the whole of git"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    daemon = subprocess.Popen(
        [program, "--reuseaddr", "--export-all", f"--base-path={repositories}", "--listen=127.0.0.1", f"--port={port}",
         "--informative-errors", repositories],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except ConnectionRefusedError:
                assert daemon.poll() is None
                time.sleep(0.01)
        yield f"git://127.0.0.1:{port}"
    finally:
        daemon.kill()
        daemon.wait(10)
