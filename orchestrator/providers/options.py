"""The options of providers, with their units and reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from marshmallow import Schema, ValidationError

from orchestrator.errors import SettingsError
from orchestrator.machine_fields import flatten
from orchestrator.machine_kinds import (
    DevPodOptionsSchema,
    DockerOptionsSchema,
    KubernetesOptionsSchema,
    LocalOptionsSchema,
)


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """All times are in seconds."""

    # Where the sessions' files are kept, in place of the data directory.
    directory: str | None = None
    # Of repositories; what is not named here is refused, whoever asks. Lower-case, without `://`.
    repo_schemes: tuple[str, ...] = ("https", "http", "ssh", "git")
    # The key that repositories are cloned with over ssh. None: the server's own keys are not lent to its users.
    ssh_key: str | None = None
    # For all processes of all sessions, a proxy for instance.
    env: Mapping[str, str] = field(default_factory=dict)
    # A clone that takes longer is given up: a repository that never answers is as bad as none.
    clone_deadline: float = 120.0
    # From the start of the processes until all of them answer.
    ready_deadline: float = 60.0
    exec_deadline: float = 60.0
    # Between SIGTERM and SIGKILL.
    stop_grace: float = 5.0
    # The wait after the first crash; it doubles with each.
    restart_delay: float = 0.5
    # A process that was up so long has recovered: its crashes are counted anew.
    stable_after: float = 60.0
    # Crashes in a row that fail the session.
    crashes: int = 5

    @classmethod
    def load(cls, options: Mapping[str, Any], *, provider: str = "local") -> LocalOptions:
        """Raises SettingsError, one line that names what is wrong."""
        loaded = _checked(LocalOptionsSchema(), options, provider)
        if "repo_schemes" in loaded:
            loaded["repo_schemes"] = tuple(loaded["repo_schemes"])
        return cls(**loaded)


@dataclass(frozen=True, slots=True)
class KubernetesOptions:
    """One cluster, and how sessions run there. All times are in seconds."""

    # The way in: a file (or several, with `:` between them), and which of its contexts (None: its current one). Without
    # any of the three: KUBECONFIG, else the service account of the pod that we run in, else ~/.kube/config.
    kubeconfig: str | None = None
    context: str | None = None
    in_cluster: bool | None = None
    # Which objects are ours: two installations of Cluster Code that share a cluster must differ here.
    instance: str = "cluster-code"
    # The program; None: the one beside our own Python, or in PATH.
    helm: str | None = None
    # Of sessions: a directory, `oci://…` or `repository/name`; None: charts/dev-session-template. A machine config may
    # name another.
    chart: str | None = None
    # Of a chart that is no directory; None: the newest.
    chart_version: str | None = None
    # Over the chart's own, and under what machine configs and projects say.
    values: Mapping[str, Any] = field(default_factory=dict)
    # Sessions get an Ingress at `<project's UUID>.<base_domain>`; None: none, unless `values` turn it on.
    base_domain: str | None = None
    # What namespaces enforce, where the cluster knows pod security admission.
    pod_security: str = "baseline"
    # Reasons of events and of waiting containers that a cluster gets over by itself, given time: that of an autoscaler
    # to bring a node, for instance. They fail a session only after the grace.
    transient_reasons: tuple[str, ...] = ("FailedScheduling",)
    transient_grace: float = 120.0
    # A rollout that makes no progress for so long has failed.
    progress_deadline: float = 300.0
    # When a stop or a delete still hangs after so long, what holds it is told, and it is tried again.
    stop_deadline: float = 120.0
    delete_deadline: float = 120.0
    exec_deadline: float = 60.0
    # For one answer of the API; watches have deadlines of their own.
    request_timeout: float = 15.0
    # Containers whose output is followed at once, at most.
    log_streams: int = 200

    @classmethod
    def load(cls, options: Mapping[str, Any], *, provider: str = "kubernetes") -> KubernetesOptions:
        """Raises SettingsError, one line that names what is wrong."""
        loaded = _checked(KubernetesOptionsSchema(), options, provider)
        if "transient_reasons" in loaded:
            loaded["transient_reasons"] = tuple(loaded["transient_reasons"])
        return cls(**loaded)


@dataclass(frozen=True, slots=True)
class DockerOptions:
    """One Docker engine, and how sessions run there. All times are in seconds."""

    # Which objects are ours: two installations of Cluster Code that share an engine must differ here.
    instance: str = "cluster-code"
    # The address of the engine's machine that ports of sessions are published at; None: none are, and sessions are
    # reached at their containers' addresses, from that machine only.
    publish: str | None = "127.0.0.1"
    # The host in the URLs of sessions; None: the address that they are published at, or the engine's.
    url_host: str | None = None
    # Published are ports from the first to the last of these: below those that Linux gives to outgoing connections.
    ports: tuple[int, int] = (20000, 32767)
    # Whom containers run as, and who owns the workspace. Empty: the image's own user, and root.
    user: str = "1000:1000"
    # All others are dropped. With `no-new-privileges` they are of use to images that run as root only, and let these
    # do what they do with their own files and users.
    cap_add: tuple[str, ...] = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID")
    # Processes and threads of each container.
    pids_limit: int = 1024
    # Such as gVisor's; None: the engine's default.
    runtime: str | None = None
    # Whether a small init reaps what the services leave behind.
    init: bool = True
    # For all containers, a proxy for instance.
    env: Mapping[str, str] = field(default_factory=dict)
    # Of repositories; what is not named here is refused, whoever asks. Lower-case, without `://`.
    repo_schemes: tuple[str, ...] = ("https", "http", "ssh", "git")
    # The key that repositories are cloned with over ssh. None: the server's own keys are not lent to its users.
    ssh_key: str | None = None
    # The engine keeps the output of each container in so many files of this size (bytes).
    log_size: int = 10 << 20
    log_files: int = 3
    clone_deadline: float = 120.0
    # From the start of the containers until all of them answer.
    ready_deadline: float = 120.0
    exec_deadline: float = 60.0
    # Between SIGTERM and SIGKILL.
    stop_grace: float = 10.0
    # A container that was up so long has recovered: its crashes are counted anew.
    stable_after: float = 60.0
    # Crashes in a row that fail the session.
    crashes: int = 5
    # For one answer of the engine; what takes long by its nature has deadlines of its own.
    request_timeout: float = 15.0

    @classmethod
    def load(cls, options: Mapping[str, Any], *, provider: str = "docker") -> DockerOptions:
        """Raises SettingsError, one line that names what is wrong."""
        loaded = _checked(DockerOptionsSchema(), options, provider)
        for name in ("ports", "cap_add", "repo_schemes"):
            if name in loaded:
                loaded[name] = tuple(loaded[name])
        return cls(**loaded)


@dataclass(frozen=True, slots=True)
class DevPodOptions:
    """The `devpod` program, and which of its providers sessions run at. All times are in seconds."""

    # The program, looked up on the PATH unless it is a path.
    binary: str = "devpod"
    # The name of DevPod's own provider (`docker`, `kubernetes`, `aws`, …).
    provider: str = "docker"
    # Where DevPod gets it from: a name that it knows, a URL, or the path of a provider.yaml. None: by its name.
    source: str | None = None
    # Of DevPod's own provider: what it would be given by `devpod provider set-options -o NAME=VALUE`.
    options: Mapping[str, str] = field(default_factory=dict)
    # For all that DevPod runs, a proxy for instance. Whoever writes a devcontainer.json may read it: nothing secret.
    env: Mapping[str, str] = field(default_factory=dict)
    # Where DevPod's files are kept, in place of the data directory.
    directory: str | None = None
    # What DevPod's names of our sessions begin with.
    instance: str = "cluster-code"
    # Of repositories. `ssh` is cloned with the keys of the user who runs the orchestrator: name it only where all
    # users may read what these keys open.
    repo_schemes: tuple[str, ...] = ("https", "http")
    # For `devpod up`, whatever it builds and pulls. The time that a session gets to start may end before.
    up_deadline: float = 1800.0
    # From then on, until all services answer.
    ready_deadline: float = 60.0
    status_deadline: float = 30.0
    stop_deadline: float = 90.0
    # For one attempt.
    delete_deadline: float = 90.0
    exec_deadline: float = 60.0
    # Between two looks at what became of the sessions by itself.
    reconcile_interval: float = 10.0
    # The wait until a connection that was lost is made again; it doubles with each.
    restart_delay: float = 1.0
    # Crashes of a service in a row that fail the session.
    crashes: int = 5

    @classmethod
    def load(cls, options: Mapping[str, Any], *, provider: str = "devpod") -> DevPodOptions:
        """Raises SettingsError, one line that names what is wrong."""
        loaded = _checked(DevPodOptionsSchema(), options, provider)
        if "repo_schemes" in loaded:
            loaded["repo_schemes"] = tuple(loaded["repo_schemes"])
        return cls(**loaded)


def _checked(schema: Schema, options: Mapping[str, Any], provider: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = schema.load(dict(options))
    except ValidationError as error:
        wrong = "; ".join(flatten(error.messages, "options"))
        raise SettingsError(f"The provider {provider!r}: {wrong}.") from error
    return loaded
