"""docker-compose.yml, as the commands themselves read it: `docker compose`, or docker-compose of old."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.reference import entries
from tests.pins import ROOT

SECRETS = ("POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "JWT_SECRET", "SECRETS_KEY", "DOCKER_GID")
ENV = "".join(f"{name}={name.lower()}-of-env\n" for name in SECRETS)
OURS = ("migration", "gateway", "orchestrator")


@cache
def command() -> list[str]:
    """The command that reads the file."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(words[0])
            and subprocess.run([*words, "version"], capture_output=True, timeout=30).returncode == 0
        ):
            return words
    message = "neither `docker compose` nor docker-compose is there: apt install docker-compose"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def read(directory: Path, env: str) -> subprocess.CompletedProcess[str]:
    """What the command makes of the file beside such a .env."""
    shutil.copy(ROOT / "docker-compose.yml", directory)
    (directory / ".env").write_text(env)
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    return subprocess.run(
        [*command(), "config"], cwd=directory, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file with all that is left out put in."""
    run = read(tmp_path_factory.mktemp("compose"), ENV)
    assert run.returncode == 0, run.stderr
    assert "WARN" not in run.stderr.upper()
    return dict(yaml.safe_load(run.stdout))


def test_without_a_secret_nothing_starts_and_the_line_says_what_to_do(tmp_path: Path) -> None:
    run = read(tmp_path, ENV.replace("SECRETS_KEY=", "OTHER="))
    assert run.returncode != 0
    assert "is not set. Make .env first, as the README says" in run.stderr
    text = (ROOT / "docker-compose.yml").read_text()
    assert {name for name in SECRETS if f"${{{name}:?is not set. Make .env first, as the README says}}" in text} == {
        *SECRETS
    }


def test_no_secret_is_in_the_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for line in text.splitlines():
        name, _, value = line.strip().partition(": ")
        if re.search(r"PASS|SECRET|KEY|TOKEN|_URL", name) and not name.startswith("#"):
            assert "${" in value, line
            assert not re.search(r"\$\{[A-Z_]+:?-", value), f"a secret has no default: {line}"


def test_the_readme_makes_all_of_them(tmp_path: Path) -> None:
    block = next(
        block for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "POSTGRES_PASSWORD" in block
    )  # fmt: skip
    end = "> .env)\n"
    line = block[: block.index(end) + len(end)]
    (tmp_path / "socket").write_text("")
    line = line.replace("/var/run/docker.sock", str(tmp_path / "socket"))
    subprocess.run(["sh", "-euc", line], cwd=tmp_path, check=True, timeout=30)
    made = dict(one.split("=", 1) for one in (tmp_path / ".env").read_text().splitlines())
    assert set(made) == set(SECRETS)
    assert all(made.values())
    assert len(made["JWT_SECRET"]) >= 32
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert read(tmp_path, (tmp_path / ".env").read_text()).returncode == 0


def test_each_service_waits_for_what_it_needs(composed: dict[str, Any]) -> None:
    services = composed["services"]
    waits = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    healthy, done = "service_healthy", "service_completed_successfully"
    assert waits == {
        "postgres": {},
        "rabbitmq": {},
        "traefik": {},
        "migration": {"postgres": healthy},
        "gateway": {"migration": done, "postgres": healthy, "rabbitmq": healthy},
        "orchestrator": {"migration": done, "postgres": healthy, "rabbitmq": healthy, "traefik": healthy},
    }
    assert [name for name, service in services.items() if "healthcheck" not in service] == ["migration"]
    assert {name: service["restart"] for name, service in services.items() if name != "migration"} == dict.fromkeys(
        services.keys() - {"migration"}, "unless-stopped"
    )
    assert services["migration"]["restart"] == "no"


def test_only_this_machine_reaches_it(composed: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in composed["services"].items() if service.get("ports")}
    assert set(published) == {"gateway", "traefik"}
    for port in (port for ports in published.values() for port in ports):
        host = port["host_ip"] if isinstance(port, dict) else port.rsplit(":", 2)[0]
        assert host == "127.0.0.1"


def test_ours_are_one_image_that_may_do_little(composed: dict[str, Any]) -> None:
    services = composed["services"]
    for name in OURS:
        service = services[name]
        assert service["image"] == "cluster-code"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        # Whom the image names: nobody is root.
        assert "user" not in service
        assert "privileged" not in service
    with_socket = {name for name, service in services.items() if "docker.sock" in str(service.get("volumes"))}
    assert with_socket == {"orchestrator", "traefik"}
    assert [str(group) for group in services["orchestrator"]["group_add"]] == ["docker_gid-of-env"]


def test_what_is_set_exists(composed: dict[str, Any]) -> None:
    known = {entry.name for entry in entries()}
    text = (ROOT / "docker-compose.yml").read_text()
    shared = yaml.safe_load(text)["x-environment"]
    assert set(shared) - known == set()
    for name in OURS:
        environment = composed["services"][name]["environment"]
        assert {key: environment[key] for key in shared}.keys() == shared.keys()
        assert environment["DATABASE_URL"] == "postgresql://cluster:postgres_password-of-env@postgres/cluster"
        assert environment["JWT_SECRET"] == "jwt_secret-of-env"
    # And what .env may say of the file itself.
    own = {"POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "DOCKER_GID", "DOCKER_SOCKET", "TRAEFIK_PORT"}
    own |= {f"{name}_IMAGE" for name in ("POSTGRES", "RABBITMQ", "TRAEFIK")}
    assert set(re.findall(r"\$\{([A-Z_]+)", text)) - known == own


def test_traefik_serves_apps_of_this_installation_only(composed: dict[str, Any]) -> None:
    arguments = composed["services"]["traefik"]["command"]
    assert "--providers.docker.exposedbydefault=false" in arguments
    assert "--providers.docker.constraints=Label(`cluster-code.io/instance`,`cluster-code`)" in arguments
    assert "--providers.docker.network=cluster-code" in arguments
    assert "--api=false" in arguments
    assert composed["networks"]["apps"]["name"] == "cluster-code"
    assert list(composed["services"]["traefik"]["networks"]) == ["apps"]
    # What is not for apps is not in their network.
    assert "apps" not in str(composed["services"]["postgres"].get("networks"))
