"""A small Git repository, made and served on this machine for as long as a demonstration takes."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web

from orchestrator.errors import ClusterCodeError

_AUTHOR = ("-c", "user.name=Cluster Code", "-c", "user.email=demo@localhost", "-c", "commit.gpgsign=false")


class DemoFailed(ClusterCodeError):
    """The demonstration did not go as it should; the message says where."""


@dataclass(frozen=True, slots=True)
class Repository:
    """Where the repository is cloned from, and the folder that it is in; None: somebody else's."""

    url: str
    folder: Path | None = None

    @property
    def page(self) -> str:
        """What its `index.html` says; "" of somebody else's."""
        return (self.folder / "index.html").read_text() if self.folder else ""

    async def commit(self, files: Mapping[str, str], message: str) -> str:
        """Add a commit with these files, by name, to the branch `main`; its id. Raises DemoFailed."""
        if self.folder is None:
            raise DemoFailed("the repository is not ours to change")
        for name, text in files.items():
            (self.folder / name).write_text(text)
        await _git(self.folder, "add", "--", *files)
        await _git(self.folder, *_AUTHOR, "commit", "--quiet", "--message", message)
        return (await _git(self.folder, "rev-parse", "HEAD")).strip()


@asynccontextmanager
async def served(files: Mapping[str, str], message: str = "A page to look at") -> AsyncIterator[Repository]:
    """A repository with a commit of these files, by name, served over HTTP on 127.0.0.1. Raises DemoFailed."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-demo-") as folder:
        base = Path(folder)
        (base / "demo").mkdir()
        await _git(base / "demo", "init", "--quiet", "--initial-branch=main")
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", partial(_answer, base))
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            repository = Repository(f"http://127.0.0.1:{runner.addresses[0][1]}/demo", base / "demo")
            await repository.commit(files, message)
            yield repository
        finally:
            await runner.cleanup()


async def _answer(base: Path, request: web.Request) -> web.Response:
    """What git's own server says: git-http-backend(1), a CGI program."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "GIT_PROJECT_ROOT": str(base),
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "REQUEST_METHOD": request.method,
        "PATH_INFO": f"/{request.match_info['path']}",
        "QUERY_STRING": request.query_string,
        "CONTENT_TYPE": request.headers.get("Content-Type", ""),
        "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
        "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
    }
    backend = await asyncio.create_subprocess_exec(
        *dies_with_us(), "git", "http-backend",
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    output, _ = await backend.communicate(await request.read())
    head, _, body = output.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode(errors="replace").splitlines() if ": " in line)
    status = int(headers.pop("Status", "200").split()[0])
    return web.Response(status=status, headers=headers, body=body)


async def _git(folder: Path, *arguments: str) -> str:
    """What git prints. Raises DemoFailed."""
    # Nobody's configuration, templates or hooks.
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    try:
        git = await asyncio.create_subprocess_exec(
            "git", *arguments,
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DemoFailed("git is not installed: install it, or name a repository by REPO=URL") from error
    output, _ = await git.communicate()
    if git.returncode != 0:
        raise DemoFailed(f"git {arguments[0]} failed: {output.decode(errors='replace').strip()}")
    return output.decode()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dies_with_us() -> list[str]:
    """What a command begins with so that it ends with us, where that can be had."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
