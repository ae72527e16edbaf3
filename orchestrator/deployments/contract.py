"""What an app is deployed with, and what the steps of a deployment promise each other.

    clone -> build -> run -> probe -> swap -> drain -> clean

A step is idempotent: a worker that takes over a killed one's deployment does it again. It raises StepFailed when the
deployment cannot succeed, with a sentence for the user; ProviderUnavailable when the Docker engine is away, which fails
nothing: the step is tried again. Cancelling a step ends what it started (processes, builds) within 5 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from orchestrator.errors import ClusterCodeError


class Status(StrEnum):
    """Where a deployment is. The last four are final.

    `live` becomes `retired` when a newer one is live, and `failed` when it does not stay up while the one before serves
    still: that is `live` again.
    """

    QUEUED = "queued"
    DEPLOYING = "deploying"
    LIVE = "live"
    RETIRED = "retired"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"


class Step(StrEnum):
    """The steps, in their order. A rollback begins with `run`."""

    CLONE = "clone"
    BUILD = "build"
    RUN = "run"
    PROBE = "probe"
    SWAP = "swap"
    DRAIN = "drain"
    CLEAN = "clean"


# The reason of a step after `swap`: the new one does not stay up, and those before it serve still.
UNSTEADY = "Unsteady"


class StepFailed(ClusterCodeError):
    """The deployment cannot succeed. `reason` is a CamelCase word for programs, the message a sentence for the user."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class AppSettings:
    """How an app is built and run, as its row and each deployment of it keep it (JSON, without secrets)."""

    # In the repository; None: `Dockerfile`, or what the repository is found to be.
    dockerfile: str | None = None
    build_args: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    # The port that the app listens on.
    port: int = 8080
    # Answers 200 to 399 when the app can serve; None: that the port takes a connection is enough.
    health_path: str | None = None
    # Cores, and bytes; None: no limit.
    cpu: float | None = None
    memory_bytes: int | None = None
    # Hosts beside `{name}.{BASE_DOMAIN}`.
    domains: tuple[str, ...] = ()
    # Images of the app that are kept to roll back to, that of the live deployment included.
    keep_images: int = 3


@dataclass(frozen=True, slots=True)
class AppSecrets:
    """What is encrypted at rest and never shown again. Its `repr` shows nothing."""

    # Environment variables, over `AppSettings.env`.
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    # An OpenSSH private key for repositories over ssh; a user and a token for those over http(s).
    deploy_key: str = field(default="", repr=False)
    deploy_user: str = field(default="", repr=False)
    deploy_token: str = field(default="", repr=False)

    def values(self) -> list[str]:
        """All that must not be seen in a log."""
        return [*self.env.values(), self.deploy_key, self.deploy_token]


# Takes text for the log of the step that is under way (any size, ANSI kept, with its line ends) and returns at once.
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One deployment under way, as its steps see it."""

    app_id: int
    app_name: str
    workspace_id: int
    deployment_id: int
    number: int
    repo_url: str
    branch: str | None
    # The commit to be built; None: the newest of the branch.
    commit_id: str | None
    settings: AppSettings
    secrets: AppSecrets
    # A directory of this deployment's own, which exists, is empty before the first step and is removed after the last.
    directory: Path
    say: Say
    # The image to run, of a rollback; then there is nothing to clone or build.
    image: str | None = None

    @property
    def container(self) -> str:
        """The name of its container."""
        return f"{self.app_name}-{self.deployment_id}"

    @property
    def tag(self) -> str:
        """The name of the image that it builds."""
        return f"cluster-code-{self.app_name}:{self.deployment_id}"


@dataclass(frozen=True, slots=True)
class Source:
    """A checked-out commit."""

    directory: Path
    commit_id: str
    # The first line of its message.
    subject: str
    # When it was committed, in seconds of the epoch: the time of the files in the build context.
    committed_at: int = 0


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its name and its id (`sha256:…`)."""

    name: str
    id: str
