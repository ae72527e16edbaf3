"""What tests of the Docker provider share: specs of sessions, services that are shell scripts, and a provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from orchestrator.docker.engine import Engine
from orchestrator.providers.contract import LogSink, Machine, SessionRef, SessionSpec
from orchestrator.providers.docker import DockerProvider
from orchestrator.providers.options import DockerOptions
from tests.docker import Owned

# Answers every GET of a file that is there; says hello first, and ends at once when it is asked to.
SERVE = "trap 'exit 0' TERM; echo hello from $PORT; httpd -f -p $PORT -h {directory} & wait"
# Ends with 3 at SIGUSR1, and takes a while to come back.
BRITTLE = """
    trap 'exit 0' TERM
    trap 'echo oh no; exit 3' USR1
    [ ! -e /workspace/begun ] || sleep 1
    touch /workspace/begun
    echo hello
    httpd -f -p $PORT &
    while :; do sleep 0.05; done
"""


def shell(image: str, script: str = SERVE.format(directory="/"), **service: Any) -> dict[str, Any]:
    """A service that is a shell script."""
    return {"image": image, "command": ["sh", "-c", script], **service}


def spec(
    services: Mapping[str, Any],
    *,
    session_id: int = 7,
    project: int | None = None,
    repo_url: str | None = None,
    branch: str | None = None,
    env: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    chart_values: Mapping[str, Any] | None = None,
    **machine: Any,
) -> SessionSpec:
    """What the orchestrator would ask for."""
    uuid = UUID(int=project or session_id)
    return SessionSpec(
        SessionRef(session_id, str(uuid), f"session-{session_id}"),
        uuid,
        repo_url,
        branch,
        env or {},
        Machine("test", services=services, options=options or {}, **machine),
        chart_values or {},
    )


def provider_of(
    owned: Owned, directory: Path, sink: LogSink, *, engine: Engine | None = None, **options: Any
) -> DockerProvider:
    """One whose instance is the test's, at the shared engine or another."""
    registries = options.pop("registries", None)
    quick = {"instance": owned.instance, "stop_grace": 5.0, "ready_deadline": 30.0, **options}
    return DockerProvider(
        "docker",
        DockerOptions.load(quick),
        engine or Engine(owned.engine.host, timeout=30.0),
        directory=directory,
        sink=sink,
        registries=registries,
    )
