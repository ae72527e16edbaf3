"""Helm as a child: what it is given, what it is not, and that it ends with whoever called it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.children import launch
from orchestrator.cluster.helm import Helm
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from tests.integration.providers.conftest import until

LAUNCHER = (sys.executable, "-I", "-S", launch.__file__, f"parent={os.getpid()}", "--")
Install = Callable[[str], str]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Puts a script in the place of helm; it answers `helm version` by itself."""

    def install(script: str, version: str = "v3.17.3") -> str:
        program = tmp_path / "helm"
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = version ]; then echo {version}; exit; fi\ncd {tmp_path}\n{script}\n'
        )
        program.chmod(0o755)
        return str(program)

    return install


async def upgrade(helm: Helm, *, deadline: float = 20.0) -> int:
    return await helm.upgrade("session-1", "project", "/chart", "1.2", b'{"a": 1}', deadline=deadline)


async def test_values_go_in_by_the_pipe_and_the_revision_comes_out(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELM_NAMESPACE", "other")
    monkeypatch.setenv("HELM_KUBETOKEN", "secret")
    monkeypatch.setenv("HELM_REGISTRY_CONFIG", "/registry.json")
    answer = json.dumps({"name": "session-1", "version": 7, "config": {"a": 1}})
    script = f"""echo "$@" > arguments; env > environment; cat > values; echo 'W1: a warning'; echo '{answer}'"""
    helm = Helm(program=install(script), launcher=LAUNCHER, kubeconfig="/config", context="east")
    assert await upgrade(helm) == 7
    assert (tmp_path / "values").read_bytes() == b'{"a": 1}'
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:4] == ["upgrade", "session-1", "/chart", "--install"]
    assert {"--namespace=project", "--values=-", "--version=1.2", "--kube-context=east"} <= set(arguments)
    assert "--force-conflicts" not in arguments
    environment = (tmp_path / "environment").read_text()
    assert "HELM_NAMESPACE" not in environment
    assert "secret" not in environment
    assert {"HELM_REGISTRY_CONFIG=/registry.json", "KUBECONFIG=/config"} <= set(environment.splitlines())


async def test_helm_4_is_told_to_take_back_what_was_scaled_by_hand(install: Install, tmp_path: Path) -> None:
    script = """echo "$@" >> arguments; echo '{"version": 1}'"""
    helm = Helm(program=install(script, "v4.0.1+g99"), launcher=LAUNCHER, in_cluster=True)
    await upgrade(helm)
    await helm.rollback("session-1", "project", 3, deadline=20)
    lines = (tmp_path / "arguments").read_text().splitlines()
    assert [("--force-conflicts" in line) for line in lines] == [True, True]
    assert lines[1].startswith("rollback session-1 3 --namespace=project")


async def test_in_a_pod_helm_uses_the_service_account(install: Install, tmp_path: Path) -> None:
    helm = Helm(program=install("""echo "$KUBECONFIG" > kubeconfig"""), launcher=LAUNCHER, in_cluster=True)
    await helm.uninstall("session-1", "project", deadline=20)
    assert (tmp_path / "kubeconfig").read_text() == "/dev/null\n"


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("v3.7.2", "Helm 3.7 is too old: install Helm 3.8 or newer."),
        ("Hello", "What is installed as `helm` is not Helm"),
    ],
)
async def test_a_helm_that_cannot_be_used_is_told(install: Install, version: str, why: str) -> None:
    with pytest.raises(ProviderUnavailable, match=why):
        await Helm(program=install("", version), launcher=LAUNCHER).check()


async def test_a_missing_helm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProviderUnavailable, match="There is no helm at '/nowhere/helm': install it, or set the"):
        await Helm(program="/nowhere/helm").check()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ProviderUnavailable, match="There is no helm here: install it"):
        await Helm().check()


async def test_a_failure_is_told_and_what_was_printed_before_is_not(install: Install) -> None:
    script = """echo 'values: hunter2'; echo 'level=WARN msg=hunter2' >&2; echo 'Error: no such chart' >&2; exit 1"""
    with pytest.raises(ProviderFailure) as failed:
        await upgrade(Helm(program=install(script), launcher=LAUNCHER))
    assert str(failed.value) == "helm upgrade failed: no such chart"


async def test_an_answer_that_is_no_release_is_told(install: Install) -> None:
    with pytest.raises(ProviderFailure, match="answered something that is no release"):
        await upgrade(Helm(program=install("echo {}"), launcher=LAUNCHER))


HANGS = "sleep 1000 & echo $! > plugin; echo $$ > pid; wait"


async def test_cancelling_kills_helm_and_its_plugins(install: Install, tmp_path: Path) -> None:
    task = asyncio.create_task(upgrade(Helm(program=install(HANGS), launcher=LAUNCHER)))
    pids = await _pids(tmp_path)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not any(_lives(pid) for pid in pids))


async def test_a_helm_that_hangs_is_killed_at_its_deadline(install: Install, tmp_path: Path) -> None:
    with pytest.raises(ProviderUnavailable, match="helm upgrade did not end within 2 seconds"):
        await upgrade(Helm(program=install(HANGS), launcher=LAUNCHER), deadline=2.0)
    pids = await _pids(tmp_path)
    await until(lambda: not any(_lives(pid) for pid in pids))


async def test_helm_dies_with_whoever_called_it(install: Install, tmp_path: Path) -> None:
    program = f"""
import asyncio, os, sys
from orchestrator.cluster.helm import Helm
launcher = (sys.executable, "-I", "-S", {launch.__file__!r}, f"parent={{os.getpid()}}", "--")
helm = Helm(program={install("echo $$ > pid; echo 0 > plugin; exec sleep 1000")!r}, launcher=launcher)
asyncio.run(helm.upgrade("session-1", "project", "/chart", None, b"", deadline=60))
"""
    caller = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    pid, _ = await _pids(tmp_path)
    caller.send_signal(signal.SIGKILL)
    await caller.wait()
    await until(lambda: not _lives(pid))


async def _pids(tmp_path: Path) -> list[int]:
    def written() -> bool:
        return all((tmp_path / name).exists() and (tmp_path / name).read_text().strip() for name in ("pid", "plugin"))

    await until(written, timeout=30)
    return [int((tmp_path / name).read_text()) for name in ("pid", "plugin")]


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and pid != 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
