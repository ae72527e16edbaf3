"""Projects without a Dockerfile, built by a real engine on an image whose npm, python and pip only do as if."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from orchestrator.deployments.building import build
from orchestrator.deployments.contract import AppSecrets, AppSettings, Image, Source, Task
from orchestrator.docker.engine import Engine
from orchestrator.settings import DeploySettings
from tests.docker import Owned

pytestmark = pytest.mark.timeout(120)

# What was asked of them, and of npm also what there was then, they tell.
PROGRAMS = {
    "npm": """#!/bin/sh
echo "asked: npm $*"
case "$*" in
  ci) ls | sed "s/^/asked: /";;
  "run build") mkdir dist && sed s/source/built/ index.html > dist/index.html;;
esac
""",
    "python": """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p $3/bin && cp /bin/python /bin/pip $3/bin/;;
  main.py) cat /venv/asked main.py; echo "as $(id -u) on $PORT";;
esac
""",
    "pip": """#!/bin/sh
echo "pip $*" >> /venv/asked
""",
}
ANSWER = "at=127.0.0.1:$PORT; until wget -qO- $at/; do sleep 0.1; done"
_numbers = itertools.count(1)


class Yard:
    """Where projects of one app are built and run."""

    def __init__(self, engine: Engine, owned: Owned, folder: Path, base: str) -> None:
        self.engine = engine
        self.base = base
        self._owned = owned
        self._folder = folder
        self.said: list[str] = []
        self.settings = DeploySettings(
            instance=owned.instance, directory=folder, static_image=base, python_image=base, node_image=base
        )

    async def build(self, files: Mapping[str, str], **app: Any) -> Image:
        number = next(_numbers)
        directory = self._folder / str(number)
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(content)
            (directory / name).chmod(0o755 if content.startswith("#!") else 0o644)
        task = Task(
            1, self._owned.instance, 1, number, number, "https://git.test/x", None, None, AppSettings(**app),
            AppSecrets(), self._folder, self.said.append,
        )  # fmt: skip
        return await build(self.engine, task, Source(directory, "c" * 40, "A commit", 1_700_000_000), self.settings)

    async def start(self, image: Image) -> str:
        config = {"Image": image.id, "Labels": self._owned.labels}
        container = await self.engine.containers.create("", config)
        await self.engine.containers.start(container)
        return container

    async def output(self, image: Image) -> list[str]:
        container = await self.start(image)
        return [line async for _, _, line in self.engine.logs(container, follow=True)]


@pytest_asyncio.fixture
async def yard(engine: Engine, owned: Owned, busybox: str, tmp_path: Path) -> Yard:
    dockerfile = f"FROM {busybox}\nCOPY npm python pip /bin/\n"
    base = await Yard(engine, owned, tmp_path, busybox).build({"Dockerfile": dockerfile, **PROGRAMS})
    return Yard(engine, owned, tmp_path, base.name)


async def test_a_static_site_is_served_by_nobody(yard: Yard) -> None:
    files = {
        "public/index.html": "<h1>hello",
        "public/x.svg": "<svg/>",
        "public/.env": "secret",
        "public/404.html": "no",
    }
    image = await yard.build(files, port=8081)
    container = await yard.start(image)
    code, said = await yard.engine.containers.exec(
        container,
        ["sh", "-c", f"{ANSWER}; wget -SqO- $at/x.svg 2>&1; echo; wget -qO- $at/.env; echo; ls -A /site; id -u"],
    )  # fmt: skip
    text = said.decode()
    assert code == 0, text
    assert "<h1>hello" in text
    assert "image/svg+xml" in text
    assert "secret" not in text
    assert text.split()[-4:] == ["404.html", "index.html", "x.svg", "65534"]
    # It ends when it is asked to.
    await yard.engine.containers.stop(container, 30)
    found = await yard.engine.containers.inspect(container)
    assert found is not None
    assert found["State"]["ExitCode"] == 0


async def test_a_node_project_is_built_and_its_site_served(yard: Yard) -> None:
    files = {"package.json": '{"scripts": {"build": "y"}}', "index.html": "source", "package-lock.json": "{}"}
    image = await yard.build(files, build_args={"SERVER_IMAGE": yard.base})
    container = await yard.start(image)
    code, said = await yard.engine.containers.exec(container, ["sh", "-c", ANSWER])
    assert (code, said.strip()) == (0, b"built")
    assert [line for line in "".join(yard.said).splitlines() if line.startswith("asked: ")] == [
        "asked: npm ci", "asked: package-lock.json", "asked: package.json", "asked: npm run build",
    ]  # fmt: skip
    await yard.engine.containers.kill(container, "SIGKILL")


async def test_a_python_project_is_installed_and_run(yard: Yard) -> None:
    files = {"requirements.txt": "flask\n", "main.py": "a program\n", "lib/x.py": "", ".env": "secret"}
    told = await yard.output(await yard.build(files))
    assert told == ["pip install -r requirements.txt", "a program", "as 1000 on 8080"]
