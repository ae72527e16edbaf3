"""Workspaces from repositories: real git, real servers, and servers that are not what they should be."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import State
from orchestrator.providers.local import LocalProvider
from tests.integration.providers.conftest import Heard, MakeProvider, git, living, spec, until


async def failure(provider: LocalProvider, heard: Heard, **what: object) -> ProviderFailure:
    """Why a session does not start."""
    asked = spec({}, **what)  # type: ignore[arg-type]
    with pytest.raises(ProviderFailure) as failed:
        await provider.start(asked, heard.report)
    seen = await provider.inspect(asked.ref)
    assert (seen.state, seen.reason, seen.message) == (State.FAILED, failed.value.reason, str(failed.value))
    return failed.value


async def test_the_workspace_is_a_shallow_clone_of_the_branch(
    provider: LocalProvider, heard: Heard, git_url: str, data_dir: Path
) -> None:
    await provider.start(spec({}, repo_url=f"{git_url}/project", branch="next"), heard.report)
    workspace = data_dir / "sessions/7/workspace"
    assert (workspace / "next.html").read_text() == "next"
    assert (workspace / ".git/shallow").exists()
    assert (workspace / ".git/HEAD").read_text() == "ref: refs/heads/next\n"
    assert not (workspace / ".git/hooks").exists()
    assert heard.reports == [
        ("Cloning", f"Cloning {git_url}/project (branch next)"),
        ("StartingServices", "Starting no service."),
    ]
    assert any("Receiving objects" in line for line in heard.of("git", "system"))


async def test_without_a_branch_the_repository_says_which(
    provider: LocalProvider, heard: Heard, git_url: str, data_dir: Path
) -> None:
    await provider.start(spec({}, repo_url=f"{git_url}/project"), heard.report)
    assert (data_dir / "sessions/7/workspace/index.html").read_text() == "version 2"


async def test_an_empty_repository_is_a_workspace_too(
    provider: LocalProvider, heard: Heard, git_url: str, data_dir: Path
) -> None:
    await provider.start(spec({}, repo_url=f"{git_url}/empty"), heard.report)
    assert (data_dir / "sessions/7/workspace/.git").is_dir()


async def test_a_workspace_keeps_what_the_user_did_to_it(
    provider: LocalProvider, heard: Heard, git_url: str, data_dir: Path
) -> None:
    asked = spec({}, repo_url=f"{git_url}/project")
    await provider.start(asked, heard.report)
    changed = data_dir / "sessions/7/workspace/index.html"
    changed.write_text("mine")
    await provider.stop(asked.ref)
    assert (await provider.inspect(asked.ref)).state is State.STOPPED
    await provider.start(spec({}, repo_url=f"{git_url}/empty"), heard.report)
    assert changed.read_text() == "mine"
    assert heard.of("git")[-1] == f"the workspace is kept as it is; it was cloned from {git_url}/project"


async def test_a_workspace_that_began_empty_takes_a_repository_later(
    provider: LocalProvider, heard: Heard, git_url: str, data_dir: Path
) -> None:
    await provider.start(spec({}), heard.report)
    assert heard.of("session") == ["no repository is set: the workspace begins empty"]
    await provider.start(spec({}, repo_url=f"{git_url}/project"), heard.report)
    assert (data_dir / "sessions/7/workspace/index.html").exists()


async def test_a_branch_that_does_not_exist_is_told(provider: LocalProvider, heard: Heard, git_url: str) -> None:
    told = await failure(provider, heard, repo_url=f"{git_url}/project", branch="no;$(such)")
    assert told.reason == "BranchNotFound"
    assert str(told) == (f"The branch 'no;$(such)' does not exist in {git_url}/project: correct its name.")


async def test_a_repository_that_does_not_exist_is_told(
    provider: LocalProvider, heard: Heard, git_url: str, data_dir: Path
) -> None:
    told = await failure(provider, heard, repo_url=f"{git_url}/nothing")
    assert told.reason == "RepositoryNotFound"
    assert str(data_dir) not in str(told) + str(heard)


async def test_a_host_that_is_not_there_is_told(provider: LocalProvider, heard: Heard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for scheme in ("git", "http", "ssh"):
        told = await failure(provider, heard, repo_url=f"{scheme}://127.0.0.1:{port}/x")
        assert told.reason == "HostUnreachable", scheme


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"repo_url": "ext::sh -c touch%20/tmp/x"}, "InvalidRepository"),
        ({"repo_url": "--upload-pack=x"}, "InvalidRepository"),
        ({"repo_url": "file:///etc"}, "SchemeRefused"),
        ({"repo_url": "https://host/x", "branch": "--upload-pack=x"}, "InvalidBranch"),
    ],
)
async def test_what_git_would_take_for_something_else_never_reaches_it(
    provider: LocalProvider, heard: Heard, what: dict[str, str], reason: str
) -> None:
    assert (await failure(provider, heard, **what)).reason == reason
    assert heard.lines == []


async def test_schemes_are_an_option(
    make: MakeProvider, heard: Heard, repositories: Path, data_dir: Path, git_url: str
) -> None:
    provider = make(repo_schemes=["file"])
    await provider.start(spec({}, repo_url=f"file://{repositories}/project"), heard.report)
    assert (data_dir / "sessions/7/workspace/index.html").exists()
    assert (await failure(provider, heard, session_id=8, repo_url=f"{git_url}/project")).reason == "SchemeRefused"


async def test_a_repository_that_never_answers_is_given_up(make: MakeProvider, heard: Heard, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        provider = make(clone_deadline=0.5)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        told = await failure(provider, heard, repo_url=address)
    assert told.reason == "CloneTimeout"
    assert str(told).startswith(f"{address} could not be cloned within 0.5 s")
    assert living(data_dir) == []


async def test_cancelling_a_clone_leaves_nothing_running(provider: LocalProvider, heard: Heard, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked = spec({}, repo_url=f"git://127.0.0.1:{silent.getsockname()[1]}/x")
        start = asyncio.create_task(provider.start(asked, heard.report))
        connection, _ = await asyncio.to_thread(silent.accept)
        assert (await provider.inspect(asked.ref)).reason == "Cloning"
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        connection.close()
    assert living(data_dir) == []
    assert (await provider.inspect(asked.ref)).state is State.STOPPED


async def test_what_a_killed_clone_left_is_cleared_away(
    provider: LocalProvider, heard: Heard, git_url: str, data_dir: Path
) -> None:
    left = data_dir / "sessions/7/workspace.incoming"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    await provider.start(spec({}, repo_url=f"{git_url}/project"), heard.report)
    assert not left.exists()
    assert not (data_dir / "sessions/7/workspace/half").exists()


async def test_a_repository_larger_than_the_disk_is_told(
    provider: LocalProvider, heard: Heard, git_url: str, repositories: Path
) -> None:
    (repositories / "project/noise").write_bytes(os.urandom(1 << 20))
    git("add", ".", cwd=repositories / "project")
    git("commit", "--quiet", "-m", "large", cwd=repositories / "project")
    with pytest.raises(ProviderFailure) as failed:
        await provider.start(spec({}, repo_url=f"{git_url}/project", disk_bytes=100_000), heard.report)
    assert failed.value.reason == "DiskFull", failed.value


@pytest_asyncio.fixture
async def guarded(repositories: Path) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that hands out files to who has the password, and what credentials it was shown."""
    git("clone", "--quiet", "--bare", "project", "bare", cwd=repositories)
    git("update-server-info", cwd=repositories / "bare")
    seen: list[str] = []
    right = "Basic " + base64.b64encode(b"someone:sesame@1").decode()

    async def serve(request: web.Request) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if given:
            seen.append(given)
        if given != right:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        path = repositories / "bare" / request.match_info["path"]
        if not path.is_file():
            return web.Response(status=404)
        return web.FileResponse(path)

    app = web.Application()
    app.router.add_get("/bare/{path:.*}", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"127.0.0.1:{runner.addresses[0][1]}/bare", seen
    await runner.cleanup()


async def test_credentials_open_the_repository_and_are_kept_nowhere(
    provider: LocalProvider, heard: Heard, data_dir: Path, guarded: tuple[str, list[str]]
) -> None:
    address, _ = guarded
    await provider.start(spec({}, repo_url=f"http://someone:sesame%401@{address}", branch="main"), heard.report)
    root = data_dir / "sessions/7"
    assert (root / "workspace/index.html").read_text() == "version 2"
    assert address in (root / "workspace/.git/config").read_text()
    found = await asyncio.to_thread(
        subprocess.run, ["grep", "-rlaE", "sesame|someone", str(data_dir)], capture_output=True, text=True
    )
    assert found.stdout == ""
    assert "sesame" not in str(heard)


async def test_wrong_credentials_are_told_without_them(
    provider: LocalProvider, heard: Heard, guarded: tuple[str, list[str]]
) -> None:
    address, seen = guarded
    told = await failure(provider, heard, repo_url=f"http://someone:opensaysme@{address}")
    assert told.reason == "AuthenticationNeeded"
    assert "opensaysme" not in str(told) + str(heard)
    assert seen
    assert (await failure(provider, heard, repo_url=f"http://{address}")).reason == "AuthenticationNeeded"


async def test_a_full_disk_is_told(
    provider: LocalProvider, heard: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = await asyncio.to_thread(
        subprocess.run, ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=4", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("no small file system can be mounted: run as root")
    full = LocalProvider(small, heard.lines.append)
    try:
        starts = (full.start(spec({}, session_id=number), heard.report) for number in (1, 2, 3))
        with pytest.raises(ProviderFailure) as failed:
            await asyncio.gather(*starts)
        assert failed.value.reason == "DiskFull"
    finally:
        await full.close()
        await asyncio.to_thread(subprocess.run, ["umount", str(small)], check=True)


async def test_a_missing_git_is_told(
    provider: LocalProvider, heard: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rm").symlink_to(shutil.which("rm") or "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert (await failure(provider, heard, repo_url="https://127.0.0.1/x")).reason == "GitMissing"


async def test_files_that_cannot_be_made_are_the_machines_fault(
    provider: LocalProvider, heard: Heard, data_dir: Path
) -> None:
    await provider.check()
    (data_dir / "sessions/7").write_text("in the way")
    with pytest.raises(ProviderUnavailable, match="cannot be made: File exists"):
        await provider.start(spec({}), heard.report)
    await until(lambda: not living(data_dir))
