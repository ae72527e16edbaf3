"""`python -m gateway` and `python -m orchestrator` as operators run them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

ROOT = Path(__file__).parents[3]
SECRET = "6f1e0f1c5d3b4a29b8a7c6d5e4f30211"
# Seconds. Generous: the machine may be busy with other tests.
DEADLINE = 50.0
# What would lead a process to what is not its test's.
_OWN = ("DATABASE_URL", "AMQP_URL", "KUBECONFIG", "DOCKER_HOST")


class Process:
    """A process that may be started again after it has ended. Its output goes to a file."""

    def __init__(self, folder: Path, module: str, *arguments: str, **environment: str) -> None:
        self.output = folder / f"{module}-{len(list(folder.iterdir()))}.log"
        self.output.touch()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in _OWN},
            "HOST": "127.0.0.1", "JWT_SECRET": SECRET, "LOG_FORMAT": "json", "DATABASE_TIMEOUT": "5",
            "ORCHESTRATOR_PORT": "off", "DEPLOY_CONCURRENCY": "0", **environment,
        }  # fmt: skip
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environment['PORT']}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of the log with that text, as they are."""
        lines = [json.loads(line) for line in self.output.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def workers(self) -> dict[int, int]:
        """The ids of the workers' processes that were started last, by their numbers."""
        return {line["worker"]: line["pid"] for line in self.logged("worker started")}

    def descendants(self) -> list[int]:
        """The ids of the processes that it has started, and so on."""
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]

    async def start(self) -> None:
        """Start it, and do not wait."""
        with self.output.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, env=self.environment, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait until it has ended; its exit code."""
        async with asyncio.timeout(DEADLINE):
            return await self._process.wait()

    async def stop(self) -> int:
        """End it with SIGTERM; its exit code."""
        if self.running:
            self.signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        """End it as a crash does."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def until_logged(self, event: str, count: int = 1) -> None:
        """Return once that was logged so often."""
        await self.until(lambda: len(self.logged(event)) >= count)

    async def until(self, condition: Callable[[], Any]) -> None:
        """Return once the condition holds; fails with the process's output."""

        async def holds() -> Any:
            return condition()

        await self.until_so(holds)

    async def until_so(self, condition: Callable[[], Awaitable[Any]]) -> None:
        """The same with something to await."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not await condition():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(self.output.read_text()[-4000:]) from None

    async def get(self, path: str) -> tuple[int, str]:
        """The status and the body; 0 when nobody listens. Over a new connection each time."""
        try:
            async with aiohttp.ClientSession() as http, http.get(self.url + path) as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientError:
            return 0, ""

    async def until_answer(self, path: str, status: int) -> None:
        """Return once a request gets that status."""

        async def answered() -> bool:
            return (await self.get(path))[0] == status

        await self.until_so(answered)


def living(pid: int) -> bool:
    """Whether there is such a process, which has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
