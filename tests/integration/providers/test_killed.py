"""The process that holds a provider is killed with -9: the next one finds the directory free, and no process left."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from orchestrator.providers.contract import State
from tests.integration.providers.conftest import QUICK, Heard, MakeProvider, living, spec, until

ROOT = Path(__file__).parents[3]

# Starts a session whose process hides a grandchild, and waits for the end.
HOST = """
import asyncio, sys
from pathlib import Path
from tests.integration.providers.conftest import shell, spec
from orchestrator.providers.local import LocalProvider

async def report(reason, message):
    print(reason, flush=True)

async def main():
    provider = LocalProvider(Path(sys.argv[1]), lambda line: None, {"clone_deadline": 60})
    script = "setsid sh -c 'trap \\"\\" TERM; sleep 1000 & wait' & exec python3 -m http.server $PORT --bind 127.0.0.1"
    asked = spec({"preview": shell(sys.argv[5] + script, ready="/")}, repo_url=sys.argv[2] or None)
    await provider.start(asked, report)
    print("running", flush=True)
    if sys.argv[3] == "delete":
        await provider.delete(asked.ref)
    await asyncio.Event().wait()

if sys.argv[4] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@asynccontextmanager
async def host(
    data_dir: Path, *, repo_url: str = "", then: str = "wait", loop: str = "asyncio", first: str = ""
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOST, str(data_dir), repo_url, then, loop, first,
        cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        async with asyncio.timeout(10):
            await process.wait()


async def says(process: asyncio.subprocess.Process, wanted: bytes) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while (line := await process.stdout.readline()).strip() != wanted:
            assert line, "the host ended"


async def killed(process: asyncio.subprocess.Process) -> None:
    process.kill()
    async with asyncio.timeout(10):
        await process.wait()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_no_orphan_is_left_and_the_session_starts_again(
    make: MakeProvider, heard: Heard, data_dir: Path, loop: str
) -> None:
    async with host(data_dir, loop=loop) as process:
        await says(process, b"running")
        await until(lambda: any(psutil.Process(pid).name() == "sleep" for pid in living(data_dir)))
        await killed(process)
        # The process itself dies with its parent; what it started and hid does not.
        await until(lambda: all(psutil.Process(pid).name() in ("sh", "sleep") for pid in living(data_dir)))
        provider = make()
        await provider.check()
        assert living(data_dir) == []
        assert (await provider.inspect(spec().ref)).state is State.STOPPED
        await provider.start(spec(), heard.report)
        assert (await provider.inspect(spec().ref)).state is State.RUNNING


async def test_a_process_without_an_environment_is_ended_too(make: MakeProvider, data_dir: Path) -> None:
    number = f"9{os.getpid()}"

    def sleeping() -> list[psutil.Process]:
        return [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", number]]

    async with host(data_dir, first=f"env -i sleep {number} & ") as process:
        await says(process, b"running")
        await until(sleeping)
        await killed(process)
        left = sleeping()
        try:
            assert left
            await make().check()
            assert sleeping() == []
        finally:
            for one in left:
                if one.is_running():
                    one.kill()


async def test_a_clone_dies_with_its_provider_and_is_made_anew(
    make: MakeProvider, heard: Heard, data_dir: Path, git_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with host(data_dir, repo_url=f"git://127.0.0.1:{silent.getsockname()[1]}/x") as process:
            await says(process, b"Cloning")
            connection, _ = await asyncio.to_thread(silent.accept)
            with connection:
                await killed(process)
            provider = make()
            await provider.check()
            assert living(data_dir) == []
            assert not (data_dir / "sessions/7/workspace").exists()
            await provider.start(spec({}, repo_url=f"{git_url}/project"), heard.report)
            assert (data_dir / "sessions/7/workspace/index.html").exists()


async def test_a_kill_at_any_moment_of_a_start_and_a_delete_leaves_what_the_next_goes_on_from(
    make: MakeProvider, heard: Heard, data_dir: Path, git_url: str
) -> None:
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        async with host(data_dir, repo_url=f"{git_url}/project", then="delete") as process:
            await says(process, b"Cloning")
            await asyncio.sleep(delay)
            await killed(process)
            provider = make(**QUICK)
            await provider.start(spec(repo_url=f"{git_url}/project"), heard.report)
            assert (data_dir / "sessions/7/workspace/index.html").read_text() == "version 2"
            await provider.delete(spec().ref)
            assert living(data_dir) == []
            assert os.listdir(data_dir / "sessions") == []  # noqa: PTH208  Hidden ones count, too.
            await provider.close()
