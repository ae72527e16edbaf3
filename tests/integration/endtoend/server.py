"""A real `cluster-code dev` in a process of its own, and a client of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

PASSWORD = "correct horse battery staple"
# Seconds. Generous: the machine may be busy with other tests.
DEADLINE = 40.0


def command(*arguments: str) -> list[str]:
    """The command line, as a list for `subprocess`."""
    return [sys.executable, "-m", "scripts.main", *arguments]


class Server:
    """`cluster-code dev` on a data directory. May be started again after it has ended."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.data_dir = data_dir
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "KUBECONFIG"},
            "DATA_DIR": str(data_dir),
            "PORT": "0",
            "ADMIN_PASSWORD": PASSWORD,
            "DATABASE_TIMEOUT": "1",
            # Not this machine's, unless a test says so.
            "DOCKER_HOST": "unix:///nowhere/docker.sock",
            "LOG_FORMAT": "json",
            **environment,
        }
        self.url = ""
        self.output = data_dir.with_name(f"{data_dir.name}.log")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        await self.spawn()
        async with asyncio.timeout(DEADLINE):
            while not (self.data_dir / "dev.json").exists() or self._announced()["pid"] != self.pid:
                assert self._process.returncode is None, self.output.read_text()
                await asyncio.sleep(0.02)
        self.url = self._announced()["url"]

    async def spawn(self) -> None:
        """Start it, and do not wait."""
        with self.output.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command("dev"), env=self.environment, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait until it has ended; its exit code."""
        async with asyncio.timeout(DEADLINE):
            return await self._process.wait()

    async def stop(self) -> int:
        """End it as Ctrl-C does, unless it has ended; its exit code."""
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGINT)
        return await self.wait()

    async def kill(self) -> None:
        """End it as a power cut does."""
        self.signal(signal.SIGKILL)
        await self.wait()

    def left(self) -> list[str]:
        """The command lines of all processes that belong to this data directory, but for the server's own."""
        return [" ".join(_command_line(one)) for one in psutil.process_iter() if self._is_ours(one)]

    async def until_nothing_is_left(self) -> None:
        """Wait until the last process is gone; fails with what is left."""
        try:
            await until(lambda: not self.left())
        except TimeoutError:
            raise AssertionError(f"left behind: {self.left()}") from None

    def database_pid(self) -> int:
        """The embedded PostgreSQL's process."""
        return int((self.data_dir / "postgres" / "postmaster.pid").read_text().split("\n")[0])

    def _announced(self) -> Any:
        return json.loads((self.data_dir / "dev.json").read_text())

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.pid == os.getpid() or (self._process is not None and process.pid == self._process.pid):
            return False
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            folder = str(self.data_dir)
            instance = self.data_dir / "instance"
            if instance.exists() and instance.read_text().strip() in process.environ().values():
                return True
            return process.cwd().startswith(folder) or any(folder in word for word in process.cmdline())
        except (psutil.Error, OSError):
            return False


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def until(condition: Callable[[], bool], *, deadline: float = DEADLINE) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(deadline):
        while not condition():
            await asyncio.sleep(0.02)


class Client:
    """The administrator, over HTTP."""

    def __init__(self, http: aiohttp.ClientSession, server: Server) -> None:
        self._http = http
        self._server = server
        self._token = ""

    async def sign_in(self) -> None:
        """Sign in; tokens outlive a restart."""
        body = {"email": "admin@localhost", "password": PASSWORD}
        status, answer, _ = await self.request("POST", "/api/v1/auth/login", body)
        assert status == 200, answer
        self._token = answer["access_token"]

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any, Any]:
        """The status, the JSON answered, and the headers."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        async with self._http.request(method, self._server.url + path, json=body, headers=headers) as answer:
            text = await answer.read()
            return answer.status, json.loads(text) if text else None, answer.headers

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON answered; fails when it is an error."""
        status, answer, _ = await self.request(method, f"/api/v1{path}", body)
        assert status < 400, (status, answer)
        return answer

    async def connect(self) -> aiohttp.ClientWebSocketResponse:
        """An open socket, past its `connected`."""
        short = await self.call("POST", "/auth")
        socket = await self._http.ws_connect(f"{self._server.url}/ws", params={"token": short["short_token"]})
        assert (await socket.receive_json())["event_type"] == "connected"
        return socket

    async def project(self, repo_url: str) -> dict[str, Any]:
        """A new project of that repository."""
        workspaces = await self.call("GET", "/workspaces")
        body = {"workspace_id": workspaces["items"][0]["id"], "name": "Test", "repo_url": repo_url}
        return await self.call("POST", "/projects", body)

    async def session(self, project: dict[str, Any]) -> int:
        """A new session; its id."""
        return (await self.call("POST", "/sessions", {"project_id": project["id"]}))["id"]

    async def until_status(self, session_id: int, status: str) -> dict[str, Any]:
        """The session, once it has that status."""
        seen = {}
        try:
            async with asyncio.timeout(DEADLINE):
                while seen.get("status") != status:
                    await asyncio.sleep(0.05)
                    seen = await self.call("GET", f"/sessions/{session_id}")
        except TimeoutError:
            raise AssertionError(f"the session did not become {status}: {seen}") from None
        return seen

    async def until_served(self, session_id: int, page: str) -> dict[str, Any]:
        """The session, once it runs and its preview shows the page.

        After a kill it may be told to run, as it last was, until the next start has looked.
        """
        shown = ""
        try:
            async with asyncio.timeout(DEADLINE):
                while page not in shown:
                    session = await self.until_status(session_id, "running")
                    shown = await self._shown(session["preview_url"])
        except TimeoutError:
            raise AssertionError(f"the preview does not show the page, but {shown!r}") from None
        return session

    async def _shown(self, url: str) -> str:
        try:
            async with self._http.get(url) as answer:
                return await answer.text()
        except aiohttp.ClientConnectionError as error:
            return str(error)
