"""The Docker provider with real containers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from orchestrator.docker import labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Observation, SessionRef, SessionSpec, State
from orchestrator.providers.docker import DockerProvider
from tests.conftest import no_task_left
from tests.docker import Owned, Registry
from tests.integration.providers.conftest import Heard, url
from tests.integration.providers.docker_sessions import BRITTLE, SERVE, provider_of, shell, spec

DEADLINE = 50.0
MakeDocker = Callable[..., DockerProvider]


@pytest_asyncio.fixture
async def make_docker(owned: Owned, tmp_path: Path, heard: Heard) -> AsyncIterator[MakeDocker]:
    made: list[DockerProvider] = []

    def make(**options: Any) -> DockerProvider:
        made.append(provider_of(owned, tmp_path / "data", heard.lines.append, **options))
        return made[-1]

    async with no_task_left():
        yield make
        for provider in made:
            await provider.close()


@pytest_asyncio.fixture
async def docker(make_docker: MakeDocker) -> DockerProvider:
    return make_docker()


async def page(address: str) -> str:
    async with aiohttp.request("GET", address) as answer:
        assert answer.status == 200, answer.status
        return await answer.text()


async def inspected(engine: Engine, owned: Owned, name: str) -> dict[str, Any]:
    found = await engine.containers.inspect(f"{owned.instance}-{name}")
    assert found is not None
    return found


async def until(docker: DockerProvider, ref: SessionRef, condition: Callable[[Observation], object]) -> Observation:
    """The first observation that fits."""
    seen = None
    with suppress(TimeoutError):
        async with asyncio.timeout(DEADLINE):
            while True:
                seen = await docker.inspect(ref)
                if condition(seen):
                    return seen
                await asyncio.sleep(0.05)
    raise AssertionError(f"did not come about; instead {seen}")


async def failure(call: Awaitable[object], reason: str) -> str:
    with pytest.raises(ProviderFailure) as raised:
        await call
    assert raised.value.reason == reason, raised.value
    return str(raised.value)


# -- start, stop, delete


async def test_services_run_within_limits_and_answer_from_a_clone(
    docker: DockerProvider, engine: Engine, owned: Owned, busybox: str, heard: Heard, git_url: str
) -> None:
    asked = spec(
        {
            "preview": shell(busybox, SERVE.format(directory="."), ready="/index.html", path="/index.html"),
            "chat": {
                "image": busybox,
                "command": ["httpd"],
                "args": ["-f", "-p", "$(PORT)", "-h", "/etc"],
                "read_only_root": True,
            },
        },
        repo_url=f"{git_url}/project",
        branch="next",
        env={"SECRET": "hush-1234", "PORT": "1"},
        cpu=0.6,
        memory_bytes=300 << 20,
    )
    endpoints = await docker.start(asked, heard.report)
    assert await page(url(endpoints.preview)) == "version 2"
    assert url(endpoints.chat).startswith("http://127.0.0.1:")
    assert endpoints.vscode is None
    assert [reason for reason, _ in heard.reports][:3] == ["Cloning", "Copying", "StartingServices"]
    preview, chat = [await inspected(engine, owned, f"session-7-{name}") for name in ("preview", "chat")]
    # Two shares of three, and one.
    assert preview["HostConfig"]["Memory"] == preview["HostConfig"]["MemorySwap"] == 200 << 20
    assert chat["HostConfig"]["NanoCpus"] == 200_000_000
    for one in (preview, chat):
        assert one["Config"]["User"] == "1000:1000"
        assert (
            one["Config"]["Labels"] | {labels.SESSION: "7", labels.PROJECT: asked.ref.namespace} | owned.labels
            == (one["Config"]["Labels"])
        )
        host = one["HostConfig"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["PidsLimit"] == 1024
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["LogConfig"]["Config"] == {"max-size": str(10 << 20), "max-file": "3"}
        assert not host["Privileged"]
    assert chat["HostConfig"]["ReadonlyRootfs"]
    # The clone is the user's, wholly, and so is what it lies in; services know one another by their names.
    script = """touch /workspace/a b && readlink link && cat .git/HEAD && echo "$PORT $SECRET"
                wget -qO- http://chat:3001/group | head -1"""
    code, output = await docker.exec(asked.ref, ["sh", "-c", script])
    assert (code, output.decode().split()) == (0, ["/etc", "ref:", "refs/heads/next", "3000", "hush-1234", "root:x:0:"])
    assert await docker.exec(asked.ref, ["cat", "/etc/shadow-of-nothing"]) == (
        1,
        b"cat: can't open '/etc/shadow-of-nothing': No such file or directory\n",
    )
    assert "hush-1234" not in str(heard)


async def test_a_start_of_what_runs_changes_nothing_and_another_spec_keeps_the_files_alone(
    docker: DockerProvider, engine: Engine, owned: Owned, busybox: str, heard: Heard
) -> None:
    services = {"preview": shell(busybox), "chat": shell(busybox)}
    first = await docker.start(spec(services), heard.report)
    before = {name: await inspected(engine, owned, f"session-7-{name}") for name in services}
    await docker.exec(spec(services).ref, ["sh", "-c", "echo mine > /workspace/file; echo gone > /tmp/file"])
    assert await docker.start(spec(services), heard.report) == first
    for name, one in before.items():
        assert (await inspected(engine, owned, f"session-7-{name}"))["State"] == one["State"]
    # The project puts another command in the place of the machine config's, and a service goes.
    other = {"services": {"preview": {"env": {"NEW": "1"}}}}
    second = await docker.start(spec({"preview": shell(busybox)}, chart_values=other), heard.report)
    assert second.chat is None
    # People have it in their browsers.
    assert second.preview == first.preview
    assert (await inspected(engine, owned, "session-7-preview"))["Id"] != before["preview"]["Id"]
    assert await engine.containers.inspect(before["chat"]["Id"]) is None
    command = ["sh", "-c", "cat /workspace/file; ls /tmp; echo $NEW"]
    assert await docker.exec(spec({}).ref, command) == (0, b"mine\n1\n")


async def test_a_stop_keeps_the_files_and_a_delete_removes_what_is_ours_and_nothing_else(
    docker: DockerProvider, engine: Engine, owned: Owned, busybox: str, heard: Heard, tmp_path: Path
) -> None:
    one, two = (spec({"preview": shell(busybox)}, session_id=number, project=5) for number in (7, 8))
    others = await engine.containers.create("", {"Image": busybox, "Cmd": ["true"], "Labels": {"foreign": "1"}})
    network, volume = f"{owned.instance}-cluster-code-{one.ref.namespace}", f"{owned.instance}-session-7"
    try:
        await docker.start(one, heard.report)
        await docker.start(two, heard.report)
        await docker.exec(one.ref, ["touch", "/workspace/project/mine"])
        await docker.stop(one.ref)
        await docker.stop(one.ref)
        assert (await docker.inspect(one.ref)).state is State.STOPPED
        assert await failure(docker.exec(one.ref, ["ls"]), "NotRunning")
        await docker.start(one, heard.report)
        assert await docker.exec(one.ref, ["ls", "/workspace/project"]) == (0, b"mine\n")
        # Only what is not there is made.
        await docker.exec(one.ref, ["rm", "-r", "/workspace/project", "/workspace/.cluster-code/filling"])
        await docker.stop(one.ref)
        await docker.start(one, heard.report)
        assert await docker.exec(one.ref, ["touch", "/workspace/project/new"]) == (0, b"")
        # As a clone does that is killed.
        left = tmp_path / "data/docker-docker/7/project"
        left.mkdir(parents=True)
        await docker.delete(one.ref)
        await docker.delete(one.ref)
        assert not left.parent.exists()
        assert await docker.inspect(one.ref) == Observation(State.ABSENT, "Absent", "There is nothing of it here.")
        assert await engine.volumes.inspect(volume) is None
        # The project's other session is still there.
        assert (await docker.inspect(two.ref)).state is State.RUNNING
        assert await engine.networks.inspect(network)
        await docker.delete(two.ref)
        assert await engine.networks.inspect(network) is None
        assert not await engine.containers.list(owned.labels)
        assert await engine.containers.inspect(others)
    finally:
        await engine.containers.remove(others)


async def test_what_is_somebody_elses_is_left_alone_though_its_name_is_ours(
    docker: DockerProvider, engine: Engine, owned: Owned, busybox: str, heard: Heard
) -> None:
    asked = spec({"preview": shell(busybox)})
    config = {"Image": busybox, "Cmd": ["sleep", "1000"], "Labels": {labels.SESSION: "7"}}
    name = f"{owned.instance}-session-7-preview"
    foreign = await engine.containers.create(name, config)
    try:
        assert name in await failure(docker.start(asked, heard.report), "NameTaken")
        await docker.delete(asked.ref)
        assert (await engine.containers.inspect(foreign) or {})["Name"] == f"/{name}"
    finally:
        await engine.containers.remove(foreign)
    await engine.volumes.ensure(f"{owned.instance}-session-7", {"foreign": "1"})
    try:
        assert "volume" in await failure(docker.start(asked, heard.report), "NameTaken")
        await docker.delete(asked.ref)
        assert await engine.volumes.inspect(f"{owned.instance}-session-7")
    finally:
        await engine.volumes.remove(f"{owned.instance}-session-7")


# -- images


async def test_an_image_that_is_missing_is_pulled_and_its_progress_told(
    make_docker: MakeDocker, engine: Engine, owned: Owned, heard: Heard, busybox: str
) -> None:
    async with Registry(password="hush-1234") as registry:
        image = registry.add("team/web", "1", {"hello": "world"}, labels=owned.labels)
        asked = spec({"preview": {"image": image, "command": ["/hello"]}})
        told = await failure(make_docker().start(asked, heard.report), "RegistryUnauthorized")
        assert image in told
        assert registry.host in told
        assert "credentials" in told
        docker = make_docker(registries={registry.host: "user:hush-1234"}, crashes=1)
        # It is there now; that it holds no program is another matter.
        with pytest.raises(ProviderFailure):
            await docker.start(asked, heard.report)
        assert await engine.images.inspect(image)
        assert ("Pulling", f"Pulling the image {image}.") in heard.reports
        assert any("Pull complete" in line or "Downloaded" in line for line in heard.of("session", "system"))
        missing = spec({"preview": {"image": f"{registry.host}/team/none:1"}}, session_id=8)
        told = await failure(docker.start(missing, heard.report), "ImageNotFound")
        assert "machine config" in told
        never = spec({"preview": {"image": f"{registry.host}/team/none:1", "pull_policy": "Never"}}, session_id=8)
        assert "pull_policy" in await failure(docker.start(never, heard.report), "ImageNotFound")
        host = registry.host
    away = spec({"preview": {"image": f"{host}/team/none:1"}}, session_id=8)
    assert host in await failure(docker.start(away, heard.report), "RegistryUnreachable")
    assert "hush-1234" not in str(heard)


# -- what goes wrong


async def test_a_crash_is_got_over_and_told_by_the_watch(docker: DockerProvider, busybox: str, heard: Heard) -> None:
    asked = spec({"preview": shell(busybox, BRITTLE)})
    async with aclosing(docker.watch()) as watch, asyncio.timeout(DEADLINE):
        first = await docker.start(asked, heard.report)
        async for ref, seen in watch:
            assert ref.session_id == 7
            if seen.state is State.RUNNING:
                break
        # The init passes it on.
        await docker.exec(asked.ref, ["kill", "-USR1", "1"])
        told = []
        async for _, seen in watch:
            told.append(seen)
            if seen.state is State.RUNNING:
                break
    assert seen.endpoints == first
    assert {one.state for one in told[:-1]} == {State.STARTING}


async def test_a_crash_loop_fails_with_the_exit_code_and_the_last_line(
    make_docker: MakeDocker, busybox: str, heard: Heard
) -> None:
    docker = make_docker(crashes=1)
    asked = spec({"chat": shell(busybox, "echo no room at the inn >&2; exit 3")})
    told = await failure(docker.start(asked, heard.report), "CrashLoop")
    assert re.fullmatch(r"chat ended with exit code 3, \d times in a row; its last line: no room at the inn\.", told), (
        told
    )
    assert (await docker.inspect(asked.ref)).state is State.FAILED
    missing = spec({"preview": {"image": busybox, "command": ["no-such-program"]}}, session_id=8)
    told = await failure(docker.start(missing, heard.report), "CrashLoop")
    assert "127 (its command cannot be run)" in told
    assert "no-such-program" in told


async def test_too_little_memory_is_told_as_that(make_docker: MakeDocker, busybox: str, heard: Heard) -> None:
    docker = make_docker(crashes=1)
    greedy = shell(busybox, "tail /dev/zero")
    told = await failure(docker.start(spec({"preview": greedy}, memory_bytes=16 << 20), heard.report), "OOMKilled")
    assert "more memory than it may" in told


async def test_a_service_that_never_answers_is_told_with_its_last_line(
    make_docker: MakeDocker, busybox: str, heard: Heard
) -> None:
    docker = make_docker(ready_deadline=1.0)
    asked = spec({"preview": shell(busybox, "echo still thinking; sleep 1000")})
    told = await failure(docker.start(asked, heard.report), "NotReady")
    assert re.fullmatch(
        r"The session was not ready within 1 seconds\. preview is not ready yet: nothing answers at http://\S+;"
        r" its last line: still thinking\.",
        told,
    ), told
    unwell = {"preview": shell(busybox, healthcheck=["false"])}
    told = await failure(make_docker(ready_deadline=0.1).start(spec(unwell), heard.report), "NotReady")
    assert "health check of preview" in told


async def test_what_cannot_be_run_is_told_before_anything_is_made(
    docker: DockerProvider, engine: Engine, owned: Owned, busybox: str, heard: Heard
) -> None:
    wrong: list[tuple[SessionSpec, str, str]] = [
        (spec({}), "InvalidMachineConfig", "names no service"),
        (spec({"preview": {"image": busybox, "memory": "4Mi"}}), "InvalidMachineConfig", "too little for preview"),
        (
            spec({"preview": {"image": busybox, "cpu": 2}, "chat": {"image": busybox}}, cpu=2.0),
            "InvalidMachineConfig",
            "its cpu leaves too little for chat",
        ),
        (spec({"preview": {}}), "InvalidMachineConfig", r"services\.preview\.image"),
        (spec({"preview": shell(busybox)}, env={"A=B": "x"}), "InvalidEnvironment", "'A=B'"),
        (spec({"preview": shell(busybox)}, repo_url="file:///etc"), "SchemeRefused", "https"),
        (
            spec({"preview": shell(busybox)}, repo_url="https://h/r", branch="--upload-pack=x"),
            "InvalidBranch",
            "branch",
        ),
    ]
    for asked, reason, words in wrong:
        assert re.search(words, await failure(docker.start(asked, heard.report), reason))
    assert not await engine.containers.list(owned.labels)
    assert not await engine.networks.list(owned.labels)


async def test_an_engine_that_is_away_says_nothing_about_sessions(owned: Owned, tmp_path: Path, heard: Heard) -> None:
    gone = Engine(f"unix://{tmp_path}/none")
    docker = provider_of(owned, tmp_path, heard.lines.append, engine=gone)
    asked = spec({"preview": {"image": "any"}})
    calls: list[Awaitable[object]] = [
        docker.check(),
        docker.start(asked, heard.report),
        docker.stop(asked.ref),
        docker.delete(asked.ref),
        docker.inspect(asked.ref),
        docker.exec(asked.ref, ["ls"]),
    ]
    for call in calls:
        with pytest.raises(ProviderUnavailable, match="start it"):
            await call
    await docker.close()


async def test_what_others_stop_or_remove_is_lost_and_what_they_pause_waits(
    docker: DockerProvider, engine: Engine, owned: Owned, busybox: str, heard: Heard
) -> None:
    asked = spec({"preview": shell(busybox), "chat": shell(busybox)})
    await docker.start(asked, heard.report)
    chat = f"{owned.instance}-session-7-chat"
    await engine.json("POST", f"/containers/{chat}/pause")
    assert (await docker.inspect(asked.ref)).reason == "Paused"
    await engine.containers.remove(chat)
    seen = await docker.inspect(asked.ref)
    assert (seen.state, seen.message) == (State.ABSENT, "chat was stopped or removed by hand.")
    await docker.start(asked, heard.report)
    assert (await docker.inspect(asked.ref)).state is State.RUNNING
