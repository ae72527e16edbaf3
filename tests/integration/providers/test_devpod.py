"""Sessions at a DevPod that lies, hangs, talks nonsense and dies: a program of ours that speaks the same contract."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
import pytest_asyncio

from orchestrator.children.processes import INSTANCE, Selection
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Machine, Observation, SessionRef, SessionSpec, State
from orchestrator.providers.devpod import DevPodProvider
from orchestrator.providers.options import DevPodOptions
from orchestrator.providers.workspace import Directory
from tests.conftest import no_task_left
from tests.integration.providers.conftest import Heard, until, url

STAND_IN = Path(__file__).with_name("stand_in_devpod.py")
DOWN = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
REF = SessionRef(42, "project", "session-42", 7)
NAME = "cluster-code-session-42"


def server(port: int, begin: str = "echo begun") -> dict[str, Any]:
    """A service that answers GET requests for files of the workspace."""
    command = f"{begin}; exec {sys.executable} -m http.server --bind 127.0.0.1 {port}"
    return {"command": ["sh", "-c", command], "port": port, "ready": "/README"}


def spec(
    services: Mapping[str, Any] | None = None,
    *,
    ref: SessionRef = REF,
    repo_url: str | None = "https://git.example.com/site",
    branch: str | None = "main",
    env: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> SessionSpec:
    machine = Machine("small", services=services or {}, options=options or {})
    return SessionSpec(ref, UUID(int=1), repo_url, branch, env or {}, machine)


@dataclass
class Stage:
    """The program, what it does wrong, how it was called, and the provider that calls it."""

    folder: Path
    heard: Heard
    providers: list[DevPodProvider] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.binary = self.folder / "devpod"
        self.binary.write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
        self.binary.chmod(0o755)
        self.play()

    def play(self, **commands: Any) -> None:
        """From now on do these wrong, and the others right."""
        new = self.folder / "play.new"
        new.write_text(json.dumps(commands))
        new.replace(self.folder / "play.json")

    def calls(self, command: str) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["command"] == command]

    def provider(self, credentials: Mapping[str, str] | None = None, **options: Any) -> DevPodProvider:
        quick = {"restart_delay": 0.05, "reconcile_interval": 0.2, "ready_deadline": 40.0}
        loaded = DevPodOptions.load({"binary": str(self.binary), **quick, **options})
        provider = DevPodProvider("dev", self.folder / "data", self.heard.lines.append, loaded, credentials=credentials)
        self.providers.append(provider)
        return provider

    @property
    def data(self) -> Path:
        return self.folder / "data/devpod/dev"

    @property
    def home(self) -> Path:
        return self.data / "tenants/7"

    @property
    def workspace(self) -> Path:
        return self.home / "contexts/default/workspaces" / NAME

    def living(self) -> list[int]:
        """The processes of the provider."""
        instance = Directory(self.data)._identity()
        return [process.pid for process in Selection({INSTANCE: instance}).find()]

    async def start(self, provider: DevPodProvider, wanted: SessionSpec) -> Any:
        return await provider.start(wanted, self.heard.report)

    async def fails(self, provider: DevPodProvider, wanted: SessionSpec) -> str:
        """The reason and the message of a start that fails."""
        with pytest.raises(ProviderFailure) as failure:
            await self.start(provider, wanted)
        return f"{failure.value.reason}: {failure.value}"


@pytest_asyncio.fixture
async def stage(tmp_path: Path, heard: Heard) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path / "stage", heard)
    async with no_task_left():
        yield stage
        for provider in stage.providers:
            await provider.close()
    try:
        assert not stage.living()
    finally:
        for file in stage.folder.rglob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.killpg(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def port(unused_tcp_port_factory: Callable[[], int]) -> int:
    return unused_tcp_port_factory()


async def seen(provider: DevPodProvider, count: int) -> list[Observation]:
    """What the provider tells by itself."""
    found: list[Observation] = []
    async with asyncio.timeout(40):
        async for _, observation in provider.watch():
            found.append(observation)
            if len(found) == count:
                break
    return found


async def get(address: str) -> str:
    async with aiohttp.request("GET", f"{address}README") as answer:
        return await answer.text()


# The program. ---------------------------------------------------------------------------------------------------------


async def test_a_program_that_is_missing_is_said_so_with_what_to_do(stage: Stage) -> None:
    provider = stage.provider(binary="devpod-that-is-not-there")
    with pytest.raises(
        ProviderUnavailable, match=r"no program 'devpod-that-is-not-there' on the .* install DevPod 0.6.0"
    ):
        await provider.check()
    with pytest.raises(ProviderUnavailable, match="no program"):
        await stage.start(provider, spec())


async def test_a_program_that_is_too_old_is_refused_until_it_is_replaced(stage: Stage) -> None:
    provider = stage.provider()
    stage.play(**{"is": "v0.5.21"})
    for _ in range(2):
        with pytest.raises(ProviderUnavailable, match=r"is DevPod 0.5.21, and sessions need 0.6.0 or newer"):
            await provider.check()
    # Its file tells that it is another one now, and it is asked once more.
    stage.play(**{"is": "v0.8.0-beta.1\n"})
    os.utime(stage.binary, ns=(1, 1))
    assert await provider.check() == "DevPod 0.8.0 with its provider 'docker'"
    assert len(stage.calls("version")) == 2


@pytest.mark.parametrize("play", [{"is": "Usage: something else"}, {"version": {"exit": 3}}])
async def test_a_program_that_is_something_else_is_refused(stage: Stage, play: dict[str, Any]) -> None:
    stage.play(**play)
    with pytest.raises(ProviderUnavailable, match="is no DevPod"):
        await stage.provider().check()


async def test_a_directory_is_held_by_one_provider_at_a_time(stage: Stage) -> None:
    first, second = stage.provider(), stage.provider()
    await first.check()
    with pytest.raises(ProviderUnavailable, match="Another process"):
        await second.check()


# What it is told. -----------------------------------------------------------------------------------------------------


async def test_secrets_are_handed_over_by_files_for_the_time_of_the_start_only(stage: Stage) -> None:
    provider = stage.provider({"CLOUD_TOKEN": "cl0ud-t0ken"}, options={"REGION": "here"})
    repo_url = "https://ada:pa%20ss-w0rd@git.example.com:8443/site"
    stage.play(up={"say": [["stdout", "the url is https://ada:pa ss-w0rd@git.example.com and cl0ud-t0ken"]]})
    await stage.start(provider, spec(repo_url=repo_url, env={"TOKEN": "pr0ject t0ken", "EMPTY": ""}))

    (up,) = stage.calls("up")
    assert up["credentials"] == "username=ada\npassword=pa ss-w0rd\n"
    assert up["file"] == {"text": "TOKEN=pr0ject t0ken\n", "mode": 0o600}
    assert up["argv"][:8] == [
        "up", "https://git.example.com:8443/site@main", "--id", NAME, "--provider", "docker", "--ide", "none"
    ]  # fmt: skip
    assert "--open-ide=false" in up["argv"]
    assert up["argv"][-2:] == ["--log-output", "json"]
    assert not list((stage.data / "sessions").iterdir())
    calls = (stage.folder / "calls.jsonl").read_text()
    for call in map(json.loads, calls.splitlines()):
        told = json.dumps([call["argv"], call["env"]])
        assert not any(secret in told for secret in ("ss-w0rd", "pr0ject", "cl0ud-t0ken"))
        assert call["command"] == "version" or call["env"]["DEVPOD_HOME"] == call["env"]["HOME"] == str(stage.home)
    kept = {path: path.read_text() for path in stage.home.rglob("*") if path.is_file()}
    assert [path.name for path, text in kept.items() if "cl0ud-t0ken" in text] == ["config.yaml"]
    assert not any("ss-w0rd" in text or "pr0ject" in text for text in kept.values())
    assert "ss-w0rd" not in str(stage.heard)
    assert "cl0ud-t0ken" not in str(stage.heard)


async def test_devpods_provider_is_set_up_once_for_a_tenant_and_again_when_its_options_change(stage: Stage) -> None:
    def settings(workspace: int = 7) -> Any:
        return [call["argv"][1:-2] for call in stage.calls("provider") if call["env"]["HOME"].endswith(f"/{workspace}")]

    first = stage.provider(options={"REGION": "here"})
    for number in (42, 43):
        await stage.start(first, spec(ref=SessionRef(number, "project", f"session-{number}", 7)))
    once = [["add", "docker", "--name", "docker", "--use=false"], ["set-options", "docker"]]
    assert settings() == once
    await stage.start(first, spec(ref=SessionRef(44, "project", "session-44", 8)))
    assert settings(8) == once
    await first.close()

    second = stage.provider(options={"REGION": "there"}, source="./provider.yaml")
    await stage.start(second, spec())
    assert settings()[2:] == [["update", "docker", "./provider.yaml", "--use=false"], ["set-options", "docker"]]
    config = (stage.home / "config.yaml").read_text()
    assert "there" in config
    assert "here\n" not in config.replace("there", "")


async def test_what_a_machine_config_says_is_said_and_a_change_of_it_makes_the_container_anew(stage: Stage) -> None:
    provider = stage.provider()
    options = {
        "provider_options": {"SIZE": "large"}, "devcontainer_path": "dev/devcontainer.json",
        "fallback_image": "debian:12", "clone": "shallow", "submodules": True,
    }  # fmt: skip
    await stage.start(provider, spec(options=options))
    await provider.stop(REF)
    await stage.start(provider, spec(options=options))
    await provider.stop(REF)
    await stage.start(provider, spec(options={**options, "provider_options": {"SIZE": "small"}}))
    ups = [call["argv"] for call in stage.calls("up")]
    assert ["--recreate" in up for up in ups] == [False, False, True]
    said = " ".join(ups[0])
    for words in (
        "--provider-option SIZE=large", "--devcontainer-path dev/devcontainer.json", "--fallback-image debian:12",
        "--git-clone-strategy shallow", "--git-clone-recursive-submodules",
    ):  # fmt: skip
        assert words in said


REFUSED = {
    "NoRepository": [spec(repo_url=None)],
    "SchemeRefused": [spec(repo_url="ssh://git@git.example.com/site")],
    "InvalidRepository": [
        spec(repo_url="https://git.example.com/site?token=abc"),
        spec(repo_url="https://git.example.com/a@b"),
    ],
    "InvalidBranch": [spec(branch="--upload-pack=x"), spec(branch="umlaut-ü")],
    "InvalidEnvironment": [spec(env={"A": "one\ntwo"}), spec(env={"A": "x" * 70_000})],
    "InvalidMachineConfig": [spec({"preview": {"command": ["x"]}})],
    "InvalidName": [spec(ref=SessionRef(1, "n", "x" * 60, 7))],
}


async def test_what_devpod_would_misunderstand_is_refused_before_it_is_asked(stage: Stage) -> None:
    provider = stage.provider()
    for reason, specs in REFUSED.items():
        for wanted in specs:
            assert (await stage.fails(provider, wanted)).partition(":")[0] == reason
    assert not stage.calls("up")


# Failures of a start. -------------------------------------------------------------------------------------------------


def logged(level: str, message: str) -> list[str]:
    """A line of its log, where it goes to."""
    return ["stdout" if level == "info" else "stderr", json.dumps({"level": level, "message": message})]


FAILURES = {
    "BranchNotFound: The branch 'main' does not exist in https://git.example.com/site: correct": [
        logged("error", "fatal: Remote branch main not found in upstream origin"),
        logged("info", "clone repository: exit status 128"),
        logged("fatal", "run agent command: Process exited with status 1"),
    ],
    "InvalidDevContainer: The repository's devcontainer.json cannot be used: parsing devcontainer.json: unexpected": [
        logged("info", "devcontainer up: parsing devcontainer.json: unexpected end of JSON input"),
        logged("fatal", "run agent command: Process exited with status 1"),
    ],
    "ImagePull: The image of the devcontainer.json cannot be pulled: build image: get image build info": [
        logged("info", "devcontainer up: build image: get image build info: retrieve image x:1: no such host")
    ],
    "CommandFailed: A command of the devcontainer.json failed: failed to run postCreateCommand": [
        logged("error", "failed to run postCreateCommand: exit status 3")
    ],
    "DevPodFailed: DevPod could not start the session: more nonsense": [
        ["stdout", "\0{{{ nonsense"],
        ["stderr", "\x1b[31mmore nonsense\x1b[0m"],
    ],
    "DevPodFailed: DevPod could not start the session: it does not say why.": [],
}


async def test_a_failure_is_told_by_its_cause(stage: Stage) -> None:
    provider = stage.provider()
    for told, said in FAILURES.items():
        stage.play(up={"say": said, "exit": 1})
        assert (await stage.fails(provider, spec()))[: len(told)] == told


async def test_an_engine_that_is_down_is_an_outage_whatever_was_asked(stage: Stage) -> None:
    provider = stage.provider()
    await stage.start(provider, spec())
    calls = {
        "up": lambda: stage.start(provider, spec(env={"A": "b"})),
        "status": lambda: provider.inspect(REF),
        "stop": lambda: provider.stop(REF),
        "delete": lambda: provider.delete(REF),
    }
    for command, call in calls.items():
        stage.play(**{command: {"say": [["stderr", DOWN]], "exit": 1}})
        with pytest.raises(ProviderUnavailable, match="cannot reach its Docker engine"):
            await call()
    stage.play()
    await provider.delete(REF)


async def test_an_up_that_claims_success_is_not_believed(stage: Stage) -> None:
    stage.play(status={"state": "Stopped"})
    assert "says that it is Stopped" in await stage.fails(stage.provider(), spec())


async def test_an_up_whose_connection_breaks_behind_the_clone_is_tried_once_more(stage: Stage) -> None:
    said = [logged("info", "Setup container..."), logged("info", "devcontainer up: run agent command: EOF")]
    provider = stage.provider()
    stage.play(up={"say": said, "exit": 1, "times": 1})
    await stage.start(provider, spec())
    assert len(stage.calls("up")) == 2
    await provider.delete(REF)
    stage.play(up={"say": said, "exit": 1})
    told = await stage.fails(provider, spec())
    assert told == "DevPodFailed: DevPod could not start the session: run agent command: EOF"
    assert len(stage.calls("up")) == 4
    # Amid the clone, nobody knows what is there.
    stage.play(up={"say": said[1:], "exit": 1})
    await stage.fails(provider, spec())
    assert len(stage.calls("up")) == 5


async def test_an_up_that_was_killed_amid_its_clone_is_begun_anew(stage: Stage) -> None:
    provider = stage.provider()
    stage.play(up={"die": True})
    await stage.fails(provider, spec())
    assert not (stage.home / f"agent/contexts/default/workspaces/{NAME}/content/README").exists()
    stage.play()
    await stage.start(provider, spec())
    assert [call["argv"][1:3] for call in stage.calls("delete")] == [[NAME, "--force"]]
    assert (stage.home / f"agent/contexts/default/workspaces/{NAME}/content/README").exists()
    assert "the session's first start was not finished: it is begun again" in stage.heard.of("devpod")


async def test_a_start_that_is_cancelled_leaves_no_process(stage: Stage) -> None:
    provider = stage.provider()
    stage.play(up={"hang": True})
    start = asyncio.create_task(stage.start(provider, spec(env={"A": "b"})))
    await until(lambda: stage.calls("up") and len(stage.living()) >= 2, timeout=40)
    assert (await provider.inspect(REF)).state is State.STARTING
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not stage.living()
    assert not list((stage.data / "sessions").iterdir())


async def test_an_up_that_never_ends_is_given_up(stage: Stage) -> None:
    stage.play(up={"hang": True})
    assert "StartTimeout: DevPod did not bring up" in await stage.fails(stage.provider(up_deadline=1.0), spec())
    assert not stage.living()


async def test_what_a_killed_orchestrator_left_is_cleared_away(stage: Stage) -> None:
    first = stage.provider()
    await first.check()
    secrets = stage.data / "sessions/42"
    secrets.mkdir()
    (secrets / "credentials").write_text("username=ada\npassword=s3cret\n")
    await first.close()
    instance = Directory(stage.data)._identity()
    left = await asyncio.create_subprocess_exec("sleep", "600", env={**os.environ, INSTANCE: instance})
    await stage.provider().check()
    assert await left.wait() == -signal.SIGKILL
    assert not secrets.exists()


async def test_a_log_without_end_is_cut_and_taken_all_the_same(stage: Stage) -> None:
    stage.play(up={"say": [["stdout", json.dumps({"level": "info", "message": f"line {n}"})] for n in range(20_000)]})
    await stage.start(stage.provider(), spec())
    lines = stage.heard.of("devpod")
    assert lines[0] == "line 0"
    assert 5000 <= len(lines) < 20_000
    assert any("lines were left out: it prints too much" in line for line in lines)


# Looking, stopping, deleting. -----------------------------------------------------------------------------------------


async def test_a_status_that_is_nonsense_says_nothing_of_the_session(stage: Stage) -> None:
    provider = stage.provider()
    await stage.start(provider, spec())
    for say in ("", "nonsense", '{"state": "Perhaps"}', '{"state": 7}', '["Running"]'):
        stage.play(status={"say": [["stdout", say]], "exit": 0})
        with pytest.raises(ProviderUnavailable, match="DevPod could not tell the session's status"):
            await provider.inspect(REF)


async def test_a_status_that_never_comes_is_an_outage(stage: Stage) -> None:
    patient = stage.provider()
    await stage.start(patient, spec())
    await patient.close()
    stage.play(status={"hang": True})
    with pytest.raises(ProviderUnavailable, match=r"`devpod status` did not end within 0.5 s"):
        await stage.provider(status_deadline=0.5).inspect(REF)


async def test_a_stop_is_believed_when_the_status_says_so(stage: Stage) -> None:
    provider = stage.provider()
    await provider.stop(REF)
    await stage.start(provider, spec())
    stage.play(stop={"nothing": True})
    with pytest.raises(ProviderFailure, match="DevPod could not stop the session"):
        await provider.stop(REF)
    stage.play()
    await provider.stop(REF)
    assert (await provider.inspect(REF)).state is State.STOPPED
    await provider.stop(REF)
    assert len(stage.calls("stop")) == 2


async def test_a_delete_that_lies_is_tried_again_and_told(stage: Stage) -> None:
    provider = stage.provider()
    await stage.start(provider, spec())
    stage.play(delete={"nothing": True})
    with pytest.raises(ProviderFailure, match=r"could not delete the session, which is Running still.*in the way"):
        await provider.delete(REF)
    # Not by force: DevPod would forget what goes on running.
    assert [call["argv"][1:-2] for call in stage.calls("delete")] == [[NAME]] * 3
    assert stage.workspace.exists()
    stage.play()
    await provider.delete(REF)
    assert (await provider.inspect(REF)).state is State.ABSENT
    assert not [path for path in stage.home.rglob("*") if "42" in path.name]
    await provider.delete(REF)
    assert len(stage.calls("delete")) == 4


async def test_what_is_gone_behind_devpods_back_is_deleted_by_force(stage: Stage) -> None:
    provider = stage.provider()
    await stage.start(provider, spec())
    (stage.workspace / "state").unlink()
    assert (await provider.inspect(REF)).state is State.ABSENT
    await provider.delete(REF)
    assert [call["argv"][1:-2] for call in stage.calls("delete")] == [[NAME, "--force"]]
    assert not stage.workspace.exists()


async def test_nothing_is_asked_of_a_tenant_that_has_nothing(stage: Stage) -> None:
    provider = stage.provider()
    await provider.delete(REF)
    assert (await provider.inspect(REF)).state is State.ABSENT
    assert not stage.calls("status")


# Services. ------------------------------------------------------------------------------------------------------------


async def test_services_are_reached_through_ports_of_this_machine_and_what_they_write_is_told(
    stage: Stage, port: int
) -> None:
    provider = stage.provider()
    wanted = spec({"preview": {**server(port, "echo hello; echo; echo '==> x'"), "path": "/"}})
    endpoints = await stage.start(provider, wanted)
    assert await get(url(endpoints.preview)) == "read me\n"
    await until(lambda: len(stage.heard.of("preview", "stdout")) >= 3, timeout=40)
    assert stage.heard.of("preview", "stdout")[:3] == ["hello", "", "==> x"]
    assert await provider.inspect(REF) == Observation(State.RUNNING, "Ready", "All services answer.", endpoints)
    # Started once more from the same, it is left alone.
    assert await stage.start(provider, wanted) == endpoints
    assert len(stage.calls("up")) == 1
    assert ("StartingServices", "Starting preview.") in stage.heard.reports


async def test_another_orchestrator_finds_the_services_running_at_the_same_ports(stage: Stage, port: int) -> None:
    first = stage.provider()
    endpoints = await stage.start(first, spec({"preview": server(port)}))
    await first.close()
    assert not stage.living()
    second = stage.provider()
    observation = await second.inspect(REF)
    assert observation == Observation(State.RUNNING, "Ready", "All services answer.", endpoints)
    assert await get(url(endpoints.preview)) == "read me\n"
    # Neither started nor told anew.
    assert stage.heard.of("preview", "stdout").count("begun") == 1


async def test_a_connection_that_is_lost_is_made_again(stage: Stage, port: int) -> None:
    provider = stage.provider()
    endpoints = await stage.start(provider, spec({"preview": server(port)}))
    watch = asyncio.create_task(seen(provider, 2))
    before = len(stage.calls("ssh"))
    (forward,) = [call for call in stage.calls("ssh") if "-L" in call["argv"]]
    os.kill(forward["pid"], signal.SIGKILL)
    lost, back = await watch
    assert (lost.state, lost.reason) == (State.STARTING, "Restarting")
    assert (back.state, back.endpoints) == (State.RUNNING, endpoints)
    assert len(stage.calls("ssh")) == before + 1


async def test_a_container_that_was_stopped_by_somebody_is_told_and_left_stopped(stage: Stage, port: int) -> None:
    provider = stage.provider()
    await stage.start(provider, spec({"preview": server(port)}))
    connections = len(stage.calls("ssh"))
    (stage.workspace / "state").write_text("Stopped")
    for call in stage.calls("ssh"):
        os.kill(call["pid"], signal.SIGKILL)
    async with asyncio.timeout(40):
        async for _, observation in provider.watch():
            if observation.state is State.STOPPED:
                break
    assert (await provider.inspect(REF)).state is State.STOPPED
    assert len(stage.calls("ssh")) == connections
    assert (await stage.start(provider, spec({"preview": server(port)}))).preview is not None


async def test_an_engine_that_is_away_for_a_while_takes_no_session_with_it(stage: Stage, port: int) -> None:
    provider = stage.provider()
    endpoints = await stage.start(provider, spec({"preview": server(port)}))
    asked = len(stage.calls("status"))
    stage.play(status={"say": [["stderr", DOWN]], "exit": 1})
    await until(lambda: len(stage.calls("status")) > asked + 2, timeout=40)
    stage.play()
    assert (await provider.inspect(REF)).endpoints == endpoints


async def test_a_service_that_crashes_is_started_again(stage: Stage, port: int) -> None:
    provider = stage.provider()
    flag = stage.folder / "crash"
    script = f"while ! rm {flag} 2>/dev/null; do sleep 0.05; done; kill $!"
    command = f"{sys.executable} -m http.server --bind 127.0.0.1 {port} & {script}; echo falling; exit 3"
    await stage.start(provider, spec({"preview": {"command": ["sh", "-c", command], "port": port, "ready": "/README"}}))
    watch = asyncio.create_task(seen(provider, 2))
    flag.touch()
    lost, back = await watch
    assert (lost.state, lost.reason, lost.message) == (State.STARTING, "Restarting", "preview: it exited with code 3.")
    assert back.state is State.RUNNING
    assert stage.heard.of("preview", "system") == ["preview exited with code 3; it is started again in 1 s"]


async def test_a_service_that_goes_on_crashing_fails_the_session_with_its_last_words(stage: Stage, port: int) -> None:
    provider = stage.provider(crashes=2)
    wanted = spec({"preview": {"command": ["sh", "-c", "echo no luck; exit 3"], "port": port}})
    told = await stage.fails(provider, wanted)
    assert told == "CrashLoop: preview exited with code 3, 2 times in a row. Its last lines:\nno luck\nno luck"


async def test_a_service_that_does_not_answer_in_time_fails_the_start(stage: Stage, port: int) -> None:
    provider = stage.provider(ready_deadline=2.0)
    wanted = spec({"preview": {"command": ["sh", "-c", "echo waiting; exec sleep 600"], "port": port}})
    told = await stage.fails(provider, wanted)
    assert told.startswith("NotReady: preview was not ready within 2 s: ")
    # A look at what became of it may be under way.
    await until(lambda: not stage.living())


async def test_a_service_that_changes_is_started_anew(stage: Stage, port: int) -> None:
    provider = stage.provider()
    await stage.start(provider, spec({"preview": server(port)}))
    await stage.start(provider, spec({"preview": server(port, "echo changed")}))
    await until(lambda: "changed" in stage.heard.of("preview", "stdout"), timeout=40)
    assert stage.heard.of("preview", "stdout").count("begun") == 1


async def test_a_command_is_run_where_the_repository_is(stage: Stage) -> None:
    provider = stage.provider()
    with pytest.raises(ProviderFailure, match="does not run"):
        await provider.exec(REF, ["true"])
    await stage.start(provider, spec())
    assert await provider.exec(REF, ["sh", "-c", "cat README; echo wrong >&2; exit 7"]) == (7, b"read me\nwrong\n")
    assert await provider.exec(REF, ["printf", "%s", "a 'quoted' \"word\""]) == (0, b"a 'quoted' \"word\"")
    code, output = await provider.exec(REF, ["sh", "-c", "yes | head -c 3000000"])
    assert (code, len(output)) == (0, 1 << 20)


async def test_a_command_that_does_not_end_is_given_up(stage: Stage) -> None:
    provider = stage.provider(exec_deadline=0.5)
    await stage.start(provider, spec())
    with pytest.raises(ProviderFailure, match=r"did not end within 0.5 s"):
        await provider.exec(REF, ["sleep", "600"])
