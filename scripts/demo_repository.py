"""A small Git repository, made and served on this machine for as long as a demonstration takes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ClusterCodeError


class DemoFailed(ClusterCodeError):
    """The demonstration did not go as it should; the message says where."""


@dataclass(frozen=True, slots=True)
class Repository:
    """Where the repository is cloned from, and what its `index.html` says."""

    url: str
    page: str


@asynccontextmanager
async def served(page: str) -> AsyncIterator[Repository]:
    """A repository with `page` as its index.html, behind `git daemon` on 127.0.0.1. Raises DemoFailed."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-demo-") as folder:
        base = Path(folder)
        (base / "demo").mkdir()
        (base / "demo" / "index.html").write_text(page)
        await _make(base / "demo")
        # Not through `git daemon`, which would start it as a child that outlives a killed parent.
        program = (await _git(base, "--exec-path")).strip() + "/git-daemon"
        port = _free_port()
        with (base / "daemon.log").open("wb") as output:
            daemon = await asyncio.create_subprocess_exec(
                *_dies_with_us(), program, "--reuseaddr", "--export-all", "--informative-errors",
                "--listen=127.0.0.1", f"--port={port}", f"--base-path={base}", str(base),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            await _until_it_answers(daemon, port, base / "daemon.log")
            yield Repository(f"git://127.0.0.1:{port}/demo", page)
        finally:
            await _end(daemon)


async def _end(daemon: asyncio.subprocess.Process) -> None:
    """Ask it to end; kill it, with whatever it has started, when it does not."""
    with suppress(ProcessLookupError):
        daemon.terminate()
    try:
        async with asyncio.timeout(2):
            await daemon.wait()
    except TimeoutError:
        os.killpg(daemon.pid, signal.SIGKILL)
        await daemon.wait()


async def _make(folder: Path) -> None:
    who = ["-c", "user.name=Cluster Code", "-c", "user.email=demo@localhost", "-c", "commit.gpgsign=false"]
    for arguments in (
        ["init", "--quiet", "--initial-branch=main"],
        ["add", "index.html"],
        [*who, "commit", "--quiet", "--message", "A page to look at"],
    ):
        await _git(folder, *arguments)


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


async def _until_it_answers(daemon: asyncio.subprocess.Process, port: int, output: Path) -> None:
    for _ in range(200):
        if daemon.returncode is not None:
            raise DemoFailed(f"git daemon does not start: {_said(output)}. Name a repository by REPO=URL instead")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise DemoFailed("git daemon does not answer. Name a repository by REPO=URL instead")


def _said(output: Path) -> str:
    return output.read_text(errors="replace").strip() or "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _dies_with_us() -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
