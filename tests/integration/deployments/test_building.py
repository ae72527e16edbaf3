"""Images built by a real Docker engine: what comes of a Dockerfile, what is told of it, and what bounds it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.deployments.building import build, prune_cache
from orchestrator.deployments.contract import AppSecrets, AppSettings, Image, Source, StepFailed, Task
from orchestrator.docker import labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import ProviderUnavailable
from orchestrator.settings import DeploySettings
from tests.conftest import no_docker
from tests.docker import Daemon, NoDocker, Owned, Registry, busybox_files, make_busybox


@dataclass
class Yard:
    """Where builds of one app happen, and what they said."""

    engine: Engine
    base: str
    settings: DeploySettings
    folder: Path
    app_id: int
    said: list[str] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    deployments: int = 0

    @property
    def log(self) -> str:
        return "".join(self.said)

    @property
    def marks(self) -> dict[str, str]:
        return {labels.INSTANCE: self.settings.instance}

    def say(self, text: str) -> None:
        self.said.append(text)
        self.heard.set()

    async def build(
        self,
        files: Mapping[str, str] | str,
        *,
        secrets: AppSecrets | None = None,
        deadline: float = 60.0,
        **settings: Any,
    ) -> Image:
        """Build a repository, or one that has only this Dockerfile; `{base}` is an image with a shell."""
        self.deployments += 1
        directory = self.folder / str(self.deployments)
        directory.mkdir()
        for name, content in ({"Dockerfile": files} if isinstance(files, str) else files).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content.replace("{base}", self.base).encode(errors="surrogateescape"))
        app = replace(AppSettings(), **settings)
        number, url = self.deployments, "https://git.test/app"
        task = Task(
            self.app_id, f"app-{self.app_id}", 1, number, number, url, None, None, app, secrets or AppSecrets(),
            self.folder, self.say,
        )  # fmt: skip
        source = Source(directory, "c" * 40, "A commit", 1_700_000_000)
        async with asyncio.timeout(deadline):
            return await build(self.engine, task, source, self.settings)

    async def failure(self, files: Mapping[str, str] | str, **options: Any) -> StepFailed:
        with pytest.raises(StepFailed) as caught:
            await self.build(files, **options)
        return caught.value

    async def hear(self, text: str) -> None:
        """Wait until it was said."""
        async with asyncio.timeout(60):
            while text not in self.log:
                self.heard.clear()
                await self.heard.wait()

    async def output(self, image: Image, *command: str) -> str:
        """What a command says in a container of the image."""
        config = {"Image": image.id, "Cmd": list(command), "Labels": self.marks}
        container = await self.engine.containers.create("", config)
        await self.engine.containers.start(container)
        said = [line async for _, _, line in self.engine.logs(container, follow=True)]
        await self.engine.containers.remove(container)
        return "\n".join(said)

    async def containers(self) -> list[dict[str, Any]]:
        return await self.engine.containers.list(self.marks)


@pytest.fixture
def yard(owned: Owned, busybox: str, tmp_path: Path) -> Yard:
    number = int(owned.instance.replace("test-", "").replace("-", ""))
    return Yard(owned.engine, busybox, DeploySettings(instance=owned.instance), tmp_path, number)


async def test_a_dockerfile_becomes_an_image_with_our_labels(yard: Yard) -> None:
    files = {
        "Dockerfile": 'FROM {base}\r\n# caf\udce9\nARG WHO=nobody\nRUN echo "hello $WHO" > /said\nCOPY . /app\n',
        "a.txt": "a",
        "b.txt": "b",
        ".dockerignore": "b.txt\n",
    }
    image = await yard.build(files, build_args={"WHO": "you"})
    assert image.name == f"cluster-code-app-{yard.app_id}:1"
    found = await yard.engine.images.inspect(image.name)
    assert found is not None
    assert found["Id"] == image.id
    assert found["Config"]["Labels"] == {
        labels.INSTANCE: yard.settings.instance,
        labels.APP: str(yard.app_id),
        labels.DEPLOYMENT: "1",
        labels.COMMIT: "c" * 40,
        labels.CACHE: "",
    }
    assert await yard.output(image, "sh", "-c", "cat /said; ls /app") == "hello you\nDockerfile\na.txt"
    assert not await yard.containers()


async def test_what_was_built_before_is_used_again(yard: Yard) -> None:
    files = {"Dockerfile": "FROM {base}\nRUN cat /proc/sys/kernel/random/uuid\nCOPY a.txt /\n", "a.txt": "1"}
    first = await yard.build(files)
    assert " ---> Using cache\n" not in yard.log
    second = await yard.build(files | {"a.txt": "2"})
    # Of our labels, and of the command.
    assert yard.log.count(" ---> Using cache\n") == 2
    assert first.id != second.id


async def test_output_comes_live_and_as_it_is(yard: Yard) -> None:
    script = (
        "RUN printf '\\033[32mgreen\\033[0m'; touch /begun; until [ -e /go ]; do sleep 0.05; done; echo; echo done\n"
    )
    building = asyncio.create_task(yard.build("FROM {base}\n" + script))
    try:
        # It waits for us: what it said before cannot have come at its end.
        await yard.hear("\x1b[32mgreen\x1b[0m")
        while not (running := [one for one in await yard.containers() if one["State"] == "running"]):
            await asyncio.sleep(0.05)
        code, _ = await yard.engine.containers.exec(running[0]["Id"], ["touch", "/go"])
        assert code == 0
    finally:
        await building
    assert "done\n" in yard.log


async def test_a_failing_step_is_told_with_its_last_lines_and_without_secrets(yard: Yard) -> None:
    dockerfile = "FROM {base}\nRUN echo one; echo; echo 'token hunter2-hunter2'; exit 3\n"
    failed = await yard.failure(dockerfile, secrets=AppSecrets(env={"TOKEN": "hunter2-hunter2"}))
    assert failed.reason == "BuildFailed"
    assert str(failed) == (
        "RUN echo one; echo; echo 'token ***'; exit 3 failed with exit code 3. It said last:\none\ntoken ***"
    )
    assert not await yard.containers()
    assert await yard.engine.images.inspect(f"cluster-code-app-{yard.app_id}:1") is None


@pytest.mark.parametrize(
    ("dockerfile", "reason", "sentence"),
    [
        ("FROM {base}\nFROM {base}\n\nRUNN make\n", "InvalidDockerfile", "line 4: unknown instruction: RUNN"),
        ("FROM team//web\n", "InvalidDockerfile", "invalid reference format"),
        ("FROM {base}\nRUN false unknown instruction, returned a non-zero code: 137\n", "BuildFailed", "exit code 1"),
        ("FROM {base}\nCOPY nothing /\n", "BuildFailed", "COPY nothing / failed: COPY failed: file not found"),
        ("FROM {base}\nCOPY --from=nobody /a /b\n", "ImageNotFound|RegistryUnreachable", "nobody"),
        ("# nothing\n", "InvalidDockerfile", "no instructions"),
    ],
)
async def test_what_cannot_be_built_is_told_in_a_sentence(
    yard: Yard, dockerfile: str, reason: str, sentence: str
) -> None:
    failed = await yard.failure(dockerfile)
    assert failed.reason in reason.split("|"), failed
    assert sentence in str(failed)


async def test_a_base_image_is_pulled_or_its_registry_is_named(yard: Yard) -> None:
    async with Registry() as registry:
        base = registry.add(f"base-{yard.app_id}", "1", busybox_files(), labels=yard.marks)
        dockerfile = f"ARG TAG=2\nFROM {registry.host}/base-{yard.app_id}:${{TAG}}\nRUN true\n"
        await yard.build(dockerfile, build_args={"TAG": "1"})
        assert f"Pulling {base}\n" in yard.log
        missing = await yard.failure(dockerfile)
        assert (missing.reason, registry.host in str(missing)) == ("ImageNotFound", True)
        registry.password = "secret"
        refused = await yard.failure(dockerfile)
        assert (refused.reason, registry.host in str(refused)) == ("RegistryUnauthorized", True)
        await yard.engine.images.remove(base, force=True)


async def test_buildkit_builds_what_only_it_can(yard: Yard) -> None:
    dockerfile = (
        "FROM {base} AS first\n"
        # What was built in another run would be found.
        f"RUN --mount=type=tmpfs,target=/scratch : {yard.app_id} {time.time()}; printf 'a\\033[31mred'; echo > /made\n"
        "FROM {base}\nARG WHO\nCOPY --from=first --chmod=755 /made /made\nRUN echo $WHO > /who\n"
    )
    image = await yard.build(dockerfile, build_args={"WHO": "you"})
    assert "Building with BuildKit, since the Dockerfile has RUN --mount.\n" in yard.log
    assert "\na\x1b[31mred\n" in yard.log
    assert await yard.output(image, "cat", "/who") == "you"
    await yard.build(dockerfile, build_args={"WHO": "you"})
    assert "CACHED\n" in yard.log
    failed = await yard.failure("FROM {base}\nRUN --mount=type=tmpfs,target=/a echo oh; exit 4\n")
    assert failed.reason == "BuildFailed"
    assert "exit 4 failed with exit code 4. It said last:\noh" in str(failed)


async def test_a_cancelled_build_ends_at_the_engine(yard: Yard) -> None:
    building = asyncio.create_task(yard.build("FROM {base}\nRUN echo begun; sleep 1000\n"))
    await yard.hear("begun\n")
    began = time.monotonic()
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert not await yard.containers()
    assert time.monotonic() < began + 5


async def test_a_build_that_never_ends_is_ended(yard: Yard) -> None:
    yard.settings = replace(yard.settings, build_deadline=2.0)
    failed = await yard.failure("FROM {base}\nRUN sleep 1000\n")
    assert (failed.reason, str(failed)) == ("BuildTimeout", "The build did not end within 2 seconds, and was ended.")
    assert not await yard.containers()


async def test_a_build_that_forks_for_ever_is_bounded(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.deployments.building.PIDS", 64)
    yard.settings = replace(yard.settings, build_memory=128 << 20, build_deadline=20.0)
    # Each would have two of its own; a shell that cannot fork says so and ends.
    bomb = "RUN echo 'sh /bomb & sh /bomb & sleep 1000' > /bomb; sh /bomb & sleep 1; ps | wc -l; exit 7\n"
    failed = await yard.failure("FROM {base}\n" + bomb)
    assert failed.reason in ("BuildFailed", "OutOfMemory", "BuildTimeout")
    assert "can't fork" in yard.log
    assert not await yard.containers()


async def test_a_build_that_talks_like_the_builder_touches_nothing_foreign(yard: Yard) -> None:
    config = {"Image": yard.base, "Cmd": ["sleep", "1000"], "Labels": yard.marks, "StopTimeout": 0}
    foreign = await yard.engine.containers.create("", config)
    await yard.engine.containers.start(foreign)
    script = f"echo ' ---> Running in {foreign}'; sleep 0.2; echo 'Step 9/9 : FROM nothing'; sleep 0.2; exit 5"
    failed = await yard.failure("FROM {base}\nRUN " + script + "\n")
    assert failed.reason in ("BuildFailed", "RegistryUnreachable", "ImageNotFound")
    found = await yard.engine.containers.inspect(foreign)
    assert found is not None
    assert found["State"]["Running"]
    assert not found["HostConfig"]["PidsLimit"]


async def test_a_full_disk_is_told_so(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        daemon = Daemon(data=disk)
    except NoDocker as error:
        no_docker(error)
    await asyncio.to_thread(subprocess.run, ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=True)
    try:
        async with daemon, Engine(daemon.host) as engine:
            yard = Yard(engine, await make_busybox(engine, "base:1"), DeploySettings(), tmp_path, 1)
            failed = await yard.failure("FROM {base}\nRUN dd if=/dev/zero of=/large bs=1M count=99\n")
            assert failed.reason == "DiskFull", failed
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "--lazy", disk], check=True)


async def test_a_build_that_takes_too_much_memory_is_told_so(yard: Yard) -> None:
    yard.settings = replace(yard.settings, build_memory=16 << 20)
    failed = await yard.failure("FROM {base}\nRUN head -c 99000000 /dev/zero | tail -c 99000000 > /dev/null\n")
    assert failed.reason == "OutOfMemory"
    assert str(failed).endswith("memory: a build may use 16 MiB.")


async def test_a_build_may_print_as_much_as_it_likes(yard: Yard) -> None:
    said = 0

    def count(text: str) -> None:
        nonlocal said
        said += len(text)

    yard.say = count  # type: ignore[method-assign]
    # In lines of 64 KiB, and in one.
    await yard.build("FROM {base}\nRUN yes $(head -c 65535 /dev/zero | tr '\\0' x) | head -n 32\n")
    await yard.build("FROM {base}\nRUN head -c 2097152 /dev/zero | tr '\\0' x\n")
    assert said > 4 << 20


async def test_what_is_kept_to_build_faster_is_ours_to_remove(yard: Yard) -> None:
    await yard.failure("FROM {base}\nRUN touch /a\nRUN false\n")
    ours = {**yard.marks, labels.CACHE: str(yard.app_id)}
    assert await yard.engine.images.list(ours)
    # Ages are in whole seconds.
    async with asyncio.timeout(10):
        while await yard.engine.images.list(ours):
            await prune_cache(yard.engine, yard.settings, app_id=yard.app_id, older=timedelta())
            await asyncio.sleep(0.2)


async def test_a_killed_engine_fails_no_build(dockerd: Daemon, tmp_path: Path) -> None:
    async with Engine(dockerd.host) as engine:
        base = await make_busybox(engine, "base:1")
        yard = Yard(engine, base, DeploySettings(), tmp_path, 1)
        building = asyncio.create_task(yard.build("FROM {base}\nRUN trap exit TERM; echo begun; sleep 1000 & wait\n"))
        await yard.hear("begun\n")
        dockerd.kill()
        with pytest.raises(ProviderUnavailable, match=r"^Docker at .* hung up"):
            await building
        await dockerd.start()
        await yard.build("FROM {base}\nRUN echo again\n")
        assert "again\n" in yard.log
        # One that is stopped kills what it builds itself, and tells of it as of a step that has failed.
        building = asyncio.create_task(yard.build("FROM {base}\nRUN trap exit TERM; echo onward; sleep 1000 & wait\n"))
        await yard.hear("onward\n")
        dockerd.terminate()
        with pytest.raises(ProviderUnavailable, match=r"^Docker at "):
            await building
