"""What a container of an app is made of: pure, so that a leftover can be compared with what is wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.deployments import gate, labels
from orchestrator.deployments.contract import Image, Task
from orchestrator.settings import DeploySettings

# What common images need to begin as root and go on as somebody else; nothing that reaches out of the container.
_CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID"]
_PIDS = 1024
_LOGGING = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}
# Of a container that serves. One that is being tried has none: that it ended must be seen. Not `unless-stopped`: an
# engine that was killed ends what still runs when it is started again, and takes that for having been asked to.
RESTART = {"RestartPolicy": {"Name": "always"}}


def config(
    task: Task, image: Image, settings: DeploySettings, siblings: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """What the API makes the container of. `siblings`: the labels of the app's other containers.

    Raises Invalid and SettingsError. Holds secrets: whoever may ask the engine about the container sees them.
    """
    app = task.settings
    environment = {**app.env, **task.secrets.env, "PORT": str(app.port)}
    host: dict[str, Any] = {
        "NetworkMode": settings.network,
        "Init": True,
        "PidsLimit": _PIDS,
        "SecurityOpt": ["no-new-privileges:true"],
        "CapDrop": ["ALL"],
        "CapAdd": _CAPABILITIES,
        "LogConfig": _LOGGING,
    }
    if app.cpu is not None:
        host["NanoCpus"] = int(app.cpu * 1_000_000_000)
    if app.memory_bytes is not None:
        # As much with swap as without: none.
        host |= {"Memory": app.memory_bytes, "MemorySwap": app.memory_bytes}
    marks = {
        **labels.ours(settings, app_id=task.app_id, deployment_id=task.deployment_id),
        **_routes(task, settings, siblings),
    }
    wanted = {
        "Image": image.name,
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "Healthcheck": gate.health_check(),
        "HostConfig": host,
    }
    spec = hashlib.sha256(json.dumps([wanted, marks, image.id], sort_keys=True).encode()).hexdigest()
    return {**wanted, "Labels": {**marks, labels.SPEC: spec}}


def is_as_wanted(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a container of this deployment (`inspect`) can be gone on with: it is what is wanted, and runs."""
    same = found["Config"]["Labels"].get(labels.SPEC) == wanted["Labels"][labels.SPEC]
    return same and bool(found["State"]["Running"]) and not found["RestartCount"]


def _routes(task: Task, settings: DeploySettings, siblings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Traefik's labels: under the app's name, unless a container that serves still says otherwise of that name."""
    app = task.settings
    routes = labels.routes(task.app_name, app.domains, app.port, settings)
    if not any(labels.clashes(routes, sibling) for sibling in siblings):
        return routes
    # No app has such a name.
    router = f"{task.app_name}_{task.deployment_id}"
    return labels.routes(task.app_name, app.domains, app.port, settings, router=router)
