"""`cluster-code dev` where there is Docker, as a newcomer tries it: sessions as containers, by DevPod, and an app."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from orchestrator.docker import labels
from orchestrator.docker.engine import Engine
from tests.integration.endtoend.server import Server
from tests.integration.endtoend.test_dev import run
from tests.programs import program


@pytest.fixture
def idle(idle: Server, engine: Engine, busybox: str) -> Server:
    """A server that is led to the engine, and to an image that no registry is asked for."""
    idle.environment |= {"DOCKER_HOST": engine.host, "DOCKER_DEMO_IMAGE": busybox}
    return idle


async def test_a_session_comes_and_goes_as_containers(server: Server, engine: Engine) -> None:
    code, output, errors = await run(server, "demo", "--provider", "docker")
    assert (code, errors) == (0, "")
    for step in ("Cloning", "serving /workspace/project on port 3000", "running", "answers 200", "deleted"):
        assert step in output
    assert output.rstrip().endswith("All of it happened.")
    project = re.search(r"project \d+ \(([0-9a-f-]{36})\)", output)[1]
    for things in (engine.containers, engine.networks, engine.volumes):
        assert await things.list({labels.PROJECT: project}) == []


@pytest.mark.late
@pytest.mark.timeout(1500)
async def test_a_session_comes_and_goes_by_devpod(idle: Server, tmp_path: Path) -> None:
    (tmp_path / "devpod").symlink_to(program("devpod"))
    idle.environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    await idle.start()
    code, output, errors = await run(idle, "demo", "--provider", "devpod", "--deadline", "240", deadline=250)
    assert (code, errors) == (0, "")
    for step in ("session.log", "running", "answers 200", "deleted"):
        assert step in output
    assert output.rstrip().endswith("All of it happened.")


@pytest.mark.late
@pytest.mark.timeout(1500)
async def test_an_app_is_deployed_broken_mended_rolled_back_and_removed(server: Server) -> None:
    code, output, errors = await run(server, "demo-deploy", deadline=310, TRAEFIK_BIN=program("traefik"))
    assert (code, errors) == (0, "")
    for step in (
        "deployment.log",
        "failed",
        "The database cannot be found.",
        "Version 2 of",
        "retired",
        "app.deleted",
    ):
        assert step in output
    assert re.search(r"[1-9]\d+ requests meanwhile, 0 failed \([1-9]\d* by version 1, [1-9]\d* by version 2\)", output)
    assert output.rstrip().endswith("All of it happened.")


async def test_the_demonstration_of_apps_says_what_it_takes(server: Server) -> None:
    code, _, errors = await run(server, "demo-deploy", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert code == 1
    assert "apps need Docker: " in errors
