"""What a provider promises, whichever it is: a place where sessions run.

Every call is idempotent: starting what runs and deleting what is gone succeed. Every call has a deadline of its own.
An outage raises ProviderUnavailable and says nothing about any session; an answer that this session cannot run raises
ProviderFailure with a classified reason. Cancelling a call leaves a state that the next call can go on from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable
from uuid import UUID

from orchestrator.errors import ProviderFailure

# Kinds of which something is on the disk or in the process of whoever has opened the provider (sessions' processes,
# DevPod's files and the ways to its containers): one orchestrator at a time has.
IN_PROCESS = frozenset({"local", "devpod"})
# Kinds whose sessions a bridge looks after by watching all of them: no regular inspection asks about each.
WATCHED = frozenset({"kubernetes"})


@dataclass(frozen=True, slots=True)
class Machine:
    """A size, as it was when the session was made: resources, what runs on it, and the provider's own options."""

    name: str
    # Cores; None: no limit.
    cpu: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    # By service name (`preview`, `chat`, `vscode`), each as its provider defines it.
    services: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionRef:
    """Enough to find a session at its provider again, whatever is left of it."""

    session_id: int
    namespace: str
    container_name: str
    # The tenant.
    workspace_id: int = 0


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """All that a start needs."""

    ref: SessionRef
    project_uuid: UUID
    repo_url: str | None
    branch: str | None
    # The project's environment. Never logged.
    env: Mapping[str, str]
    machine: Machine
    # What the project says of its chart, over what its machine says (`machine_kinds.ChartValuesSchema`).
    chart_values: Mapping[str, Any] = field(default_factory=dict)
    # Seconds until the caller gives it up; None: never. Who can go back to what ran before needs some of them for that.
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one service is reached: the whole URL, and the path on its host."""

    url: str
    path: str


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running session is reached."""

    ip_address: str | None = None
    preview: Endpoint | None = None
    chat: Endpoint | None = None
    vscode: Endpoint | None = None


class RolledBack(ProviderFailure):
    """A start could not run what it was asked to, and what ran before runs again, at `endpoints`."""

    def __init__(self, message: str, endpoints: Endpoints) -> None:
        super().__init__("RolledBack", message)
        self.endpoints = endpoints


class State(StrEnum):
    """What a provider sees of a session."""

    ABSENT = "absent"  # Nothing is left of it.
    STOPPED = "stopped"  # Its files are there, nothing runs.
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"  # It will not come up by itself; reason and message say why.


@dataclass(frozen=True, slots=True)
class Observation:
    """What a provider sees of a session, and why. `endpoints` is set when it runs."""

    state: State
    reason: str = ""
    message: str = ""
    endpoints: Endpoints | None = None


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of output of one service of a session, without its line end."""

    session_id: int
    service: str
    # "stdout", "stderr", or "system" for what the provider itself has to say.
    stream: str
    line: str
    # When it was written, where its provider knows; None: now.
    at: datetime | None = None


# Progress of a start: `(reason, message)`, such as ("Cloning", "Cloning https://… (branch main)").
Report = Callable[[str, str], Awaitable[None]]
# Takes a line and returns at once; what cannot be kept is dropped and counted.
LogSink = Callable[[LogLine], None]


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream of a service was stored: the time of its last line, and how many lines have that time."""

    at: datetime
    same: int


class Journal(Protocol):
    """Where a provider's followed output goes, and what is there already."""

    def sink(self, line: LogLine) -> None:
        """Take a line; returns at once."""
        ...

    @property
    def full(self) -> bool:
        """Whether to wait before it is given more lines."""
        ...

    def discard(self, session_ids: Collection[int]) -> None:
        """Forget what was taken of these sessions and is not stored: somebody else reads it again."""
        ...

    async def positions(self, session_id: int, service: str) -> Mapping[str, Position]:
        """Where to go on in each of the service's streams, by its name. Raises what is in `database.UNAVAILABLE`."""
        ...


@runtime_checkable
class Follower(Protocol):
    """A provider that keeps what its sessions write, so that one orchestrator at a time reads it from there."""

    async def follow(self, journal: Journal) -> None:
        """Hand on the output of all sessions, each line once, until cancelled."""
        ...


class Provider(Protocol):
    """A place where sessions run."""

    async def check(self) -> str:
        """What answers there and in which version, in a few words, when the provider can be used.

        Raises ProviderUnavailable, saying why and what to do, when it cannot.
        """
        ...

    async def start(self, spec: SessionSpec, report: Report) -> Endpoints:
        """Make the session run and be ready; returns where it is reached.

        A session that already runs from the same spec is left alone. Raises ProviderFailure, ProviderUnavailable, and
        RolledBack where a provider can go back to what ran before.
        """
        ...

    async def stop(self, ref: SessionRef) -> None:
        """End what runs and keep the files."""
        ...

    async def delete(self, ref: SessionRef) -> None:
        """End what runs and remove everything; returns when it is gone."""
        ...

    async def inspect(self, ref: SessionRef) -> Observation:
        """What is there now."""
        ...

    async def exec(self, ref: SessionRef, argv: Sequence[str]) -> tuple[int, bytes]:
        """Run a command in the session; its exit code, and its output (at most 1 MiB)."""
        ...

    def watch(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        """Changes that happen by themselves (a crash, a recovery), as they happen, without end."""
        ...

    async def close(self) -> None:
        """Give everything back. A provider whose sessions live in this process ends them."""
        ...
