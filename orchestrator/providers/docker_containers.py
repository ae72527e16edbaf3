"""What a session becomes at a Docker engine: its names, and the config of each of its containers. Pure.

    container  session-42-preview            volume  session-42, at /workspace of each container
    network    cluster-code-<project uuid>

Another instance than the usual one has its name before all of them, so that several can share an engine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.docker import labels
from orchestrator.errors import ProviderFailure
from orchestrator.machine_fields import flatten, parse_bytes, parse_cores
from orchestrator.machine_kinds import SERVICES
from orchestrator.machine_schema import errors_for_kind
from orchestrator.providers.chart_values import overlaid
from orchestrator.providers.contract import SessionRef, SessionSpec
from orchestrator.providers.options import DockerOptions

# Labels of a container: its service, all services that belong to its session, what it was made from, and how it is
# reached and probed.
SERVICE = "cluster-code.io/service"
ALL = "cluster-code.io/services"
MADE_FROM = "cluster-code.io/made-from"
PORT, PATH, READY = (f"cluster-code.io/{name}" for name in ("port", "path", "ready"))
# Where the volume is in each container, and the clone in it: as the chart of sessions has them.
WORKSPACE = "/workspace"
CLONE = "project"

_PORTS = {"preview": 3000, "chat": 3001, "vscode": 8080}
# Of the session's totals, as the chart of sessions shares them out.
_SHARES = {"preview": 2, "chat": 1, "vscode": 2}
# The engine takes no less, in bytes and in billionths of a core.
_LEAST_MEMORY = 6 << 20
_LEAST_CPU = 10_000_000
_TMP_BYTES = 1 << 30
# `$(NAME)`, and `$$(NAME)` for what shall stay as it is, as Kubernetes has it.
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
_DEFAULT_INSTANCE = "cluster-code"


@dataclass(frozen=True, slots=True)
class Names:
    """What is ours at an engine, by name and by label."""

    instance: str

    @property
    def _prefix(self) -> str:
        return "" if self.instance == _DEFAULT_INSTANCE else f"{self.instance}-"

    def volume(self, ref: SessionRef) -> str:
        """The workspace's."""
        return self._prefix + ref.container_name

    def container(self, ref: SessionRef, service: str) -> str:
        """That of a service; "" is the one that is there only while the workspace is filled."""
        return f"{self._prefix}{ref.container_name}-{service or 'files'}"

    def network(self, ref: SessionRef) -> str:
        """The project's."""
        return f"{self._prefix}cluster-code-{ref.namespace}"

    def of_project(self, ref: SessionRef) -> dict[str, str]:
        """The labels of what belongs to its project."""
        return {labels.INSTANCE: self.instance, labels.PROJECT: ref.namespace}

    def of_session(self, ref: SessionRef) -> dict[str, str]:
        """The labels of what belongs to it alone. Enough to find all of it, whatever it is called."""
        return {labels.INSTANCE: self.instance, labels.SESSION: str(ref.session_id)}

    def of_sessions(self) -> dict[str, str]:
        """The labels of what belongs to any of our sessions."""
        return {labels.INSTANCE: self.instance, labels.SESSION: ""}


def ref_of(marks: Mapping[str, str]) -> SessionRef | None:
    """Whose a container with these labels is; None: nobody's, as far as can be seen."""
    session = marks.get(labels.SESSION, "")
    if not session.isascii() or not session.isdigit():
        return None
    return SessionRef(int(session), marks.get(labels.PROJECT, ""), f"session-{session}")


@dataclass(frozen=True, slots=True)
class Container:
    """One service as it shall run."""

    service: str
    name: str
    image: str
    pull_policy: str
    port: int
    # The API's, without a port of the machine's and without the label MADE_FROM. It holds the environment.
    config: Mapping[str, Any] = field(repr=False)

    def made_from(self, image_id: str) -> str:
        """What two containers that do the same have in common."""
        text = json.dumps([self.config, image_id], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_create(self, image_id: str, *, publish: str | None, port: int) -> dict[str, Any]:
        """What the engine is told, with the machine's address and port that it is published at."""
        config = overlaid(self.config, {"Labels": {MADE_FROM: self.made_from(image_id)}})
        if publish is None:
            return config
        published = {f"{self.port}/tcp": [{"HostIp": publish, "HostPort": str(port)}]}
        return overlaid(config, {"HostConfig": {"PortBindings": published}})

    def without_init(self) -> Container:
        """The same, for an engine that has none."""
        return replace(self, config=overlaid(self.config, {"HostConfig": {"Init": False}}))


def containers_of(spec: SessionSpec, options: DockerOptions, *, cores: float) -> list[Container]:
    """The containers of a session on a machine with so many cores; it has at least one. Raises ProviderFailure."""
    machine = spec.machine
    services = overlaid(machine.services, spec.chart_values.get("services", {}))
    if wrong := flatten(errors_for_kind("docker", {"services": services, "options": machine.options})):
        raise _invalid(spec, "; ".join(wrong))
    if not services:
        raise _invalid(spec, "it names no service, so that there is nothing to run: give `preview` an image")
    for name, value in spec.env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ProviderFailure(
                "InvalidEnvironment",
                f"The project's environment variable {name!r} cannot be set: change its name or value.",
            )
    services = {name: services[name] for name in SERVICES if name in services}
    names = Names(options.instance)
    memory = _shared(spec, services, "memory", machine.memory_bytes, parse_bytes, _LEAST_MEMORY)
    cpu = _shared(spec, services, "cpu", machine.cpu, lambda said: round(parse_cores(said) * 1e9), _LEAST_CPU)
    made = []
    for name, service in services.items():
        config = _config(spec, options, name, service, services)
        if name in memory:
            # No swap: a session that has too little memory is to be told so, and not to slow down its neighbours.
            config["HostConfig"] |= {"Memory": memory[name], "MemorySwap": memory[name]}
        if name in cpu:
            config["HostConfig"]["NanoCpus"] = min(cpu[name], round(cores * 1e9))
        made.append(
            Container(
                name,
                names.container(spec.ref, name),
                service["image"],
                service.get("pull_policy", "IfNotPresent"),
                _port(name, service),
                config,
            )
        )
    return made


def _invalid(spec: SessionSpec, what: str) -> ProviderFailure:
    return ProviderFailure("InvalidMachineConfig", f"The machine config {spec.machine.name!r}: {what}.")


def _port(name: str, service: Mapping[str, Any]) -> int:
    return int(service.get("port", _PORTS[name]))


def _shared(
    spec: SessionSpec, services: Mapping[str, Any], what: str, total: float | None, parse: Any, least: int
) -> dict[str, int]:
    """The limit of each service: its own, or its share of what these leave of the session's total."""
    own = {name: parse(service[what]) for name, service in services.items() if what in service}
    others = [name for name in services if name not in own]
    if total is None or not others:
        limits = own
    else:
        whole = total if what == "memory" else round(total * 1e9)
        free, shares = whole - sum(own.values()), sum(_SHARES[name] for name in others)
        limits = own | {name: int(free * _SHARES[name] / shares) for name in others}
    for name, limit in limits.items():
        if limit < least:
            enough = "6Mi" if what == "memory" else "10m"
            raise _invalid(
                spec, f"its {what} leaves too little for {name}, which takes {enough}: raise it, or lower the others'"
            )
    return limits


def _config(
    spec: SessionSpec, options: DockerOptions, name: str, service: Mapping[str, Any], services: Mapping[str, Any]
) -> dict[str, Any]:
    ref, names, chosen = spec.ref, Names(options.instance), spec.machine.options
    port = _port(name, service)
    env = _environment(spec, options, service, port)
    marks = {
        **names.of_project(ref),
        **names.of_session(ref),
        SERVICE: name,
        ALL: ",".join(services),
        PORT: str(port),
        PATH: service.get("path", "/"),
    }
    if ready := service.get("ready"):
        marks[READY] = ready
    config: dict[str, Any] = {
        "Image": service["image"],
        "Hostname": f"{ref.container_name}-{name}"[:63],
        "Env": [f"{key}={value}" for key, value in env.items()],
        "Labels": marks,
        "User": service.get("user", chosen.get("user", options.user)),
        "ExposedPorts": {f"{port}/tcp": {}},
        "WorkingDir": f"{WORKSPACE}/{CLONE}",
        "StopTimeout": round(options.stop_grace),
        "HostConfig": _host_config(ref, names, options, chosen, service),
        # Services of a session find one another by their plain names.
        "NetworkingConfig": {"EndpointsConfig": {names.network(ref): {"Aliases": [name]}}},
    }
    if "command" in service:
        config["Entrypoint"] = [_filled(word, env) for word in service["command"]]
    if "args" in service:
        config["Cmd"] = [_filled(word, env) for word in service["args"]]
    if check := service.get("healthcheck"):
        seconds = 1_000_000_000
        config["Healthcheck"] = {
            "Test": ["CMD", *(_filled(word, env) for word in check)],
            "Interval": 5 * seconds,
            "Timeout": 5 * seconds,
            "Retries": 3,
        }
    return config


def _host_config(
    ref: SessionRef, names: Names, options: DockerOptions, chosen: Mapping[str, Any], service: Mapping[str, Any]
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "NetworkMode": names.network(ref),
        "Mounts": [mount(ref, names)],
        "RestartPolicy": {"Name": "unless-stopped"},
        "CapDrop": ["ALL"],
        "CapAdd": list(chosen.get("cap_add", options.cap_add)),
        "SecurityOpt": ["no-new-privileges"],
        "PidsLimit": chosen.get("pids_limit", options.pids_limit),
        "Init": options.init,
        "LogConfig": {
            "Type": "json-file",
            "Config": {"max-size": str(options.log_size), "max-file": str(options.log_files)},
        },
    }
    if runtime := chosen.get("runtime", options.runtime):
        config["Runtime"] = runtime
    if service.get("read_only_root", False):
        config["ReadonlyRootfs"] = True
        config["Tmpfs"] = {"/tmp": f"rw,nosuid,nodev,exec,mode=1777,size={_TMP_BYTES}"}  # noqa: S108 - the container's
    return config


def mount(ref: SessionRef, names: Names) -> dict[str, Any]:
    """The volume, at its place. Should somebody have removed it, the one that the engine makes instead is ours, too."""
    marks = names.of_project(ref) | names.of_session(ref)
    volume = names.volume(ref)
    return {"Type": "volume", "Source": volume, "Target": WORKSPACE, "VolumeOptions": {"Labels": marks}}


def _environment(spec: SessionSpec, options: DockerOptions, service: Mapping[str, Any], port: int) -> Mapping[str, str]:
    """The provider's, the project's over it, ours over both, and over all the service's own. Credentials of the clone
    are not among it."""
    return {
        **options.env,
        **spec.env,
        "PORT": str(port),
        "HOST": "0.0.0.0",  # noqa: S104 - inside the container
        "WORKSPACE": WORKSPACE,
        **service.get("env", {}),
    }


def _filled(word: str, env: Mapping[str, str]) -> str:
    """A word of a command, the variables in it replaced."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else env.get(found[1], found[0])

    return _REFERENCE.sub(value, word)


def services_of(marks: Mapping[str, str]) -> Iterator[str]:
    """The services of the session that a container with these labels belongs to."""
    return (name for name in marks.get(ALL, "").split(",") if name)
