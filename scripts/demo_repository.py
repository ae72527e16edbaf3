"""A small Git repository, made and served on this machine for as long as a demonstration takes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
    """A repository with a commit of these files, by name, behind `git daemon` on 127.0.0.1. Raises DemoFailed."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-demo-") as folder:
        base = Path(folder)
        (base / "demo").mkdir()
        await _git(base / "demo", "init", "--quiet", "--initial-branch=main")
        port = free_port()
        repository = Repository(f"git://127.0.0.1:{port}/demo", base / "demo")
        await repository.commit(files, message)
        # Not through `git daemon`, which would start it as a child that outlives a killed parent.
        program = (await _git(base, "--exec-path")).strip() + "/git-daemon"
        with (base / "daemon.log").open("wb") as output:
            daemon = await asyncio.create_subprocess_exec(
                *dies_with_us(), program, "--reuseaddr", "--export-all", "--informative-errors",
                "--listen=127.0.0.1", f"--port={port}", f"--base-path={base}", str(base),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            await _until_it_answers(daemon, port, base / "daemon.log")
            yield repository
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


def free_port() -> int:
    """A port of 127.0.0.1 that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dies_with_us() -> list[str]:
    """What a command begins with so that it ends with us, where that can be had."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
