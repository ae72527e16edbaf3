"""The state machine of a session: pure decisions, no I/O.

A session's row says what is wanted (`desired`, and a `generation` that grows with each request) and what is observed
(`status`, and the generation that it speaks of). While they differ the request is outstanding and `decide` names the
step that comes next; `judge` says what an observation of the provider means, `classify` what a failed step does.
Every step is idempotent, so that whoever finds the row in any state can go on from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Observation, State

# After so many unexpected errors in a row a step is given up.
MAX_ATTEMPTS = 5


class Desired(StrEnum):
    """What is wanted of a session."""

    RUNNING = "running"
    STOPPED = "stopped"
    DELETED = "deleted"


class Status(StrEnum):
    """What is known of a session."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DELETING = "deleting"
    DELETED = "deleted"
    ERROR = "error"


class Step(StrEnum):
    """What an orchestrator does next about a session."""

    NONE = "none"  # What is wanted is there already: only the generation is noted.
    START = "start"
    STOP = "stop"
    RESTART = "restart"  # Stop, whatever is left of it, then start.
    DELETE = "delete"
    INSPECT = "inspect"


# From each status, those that may follow it. Every change that this module decides on is one of these.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.STARTING, Status.STOPPING, Status.DELETING, Status.ERROR}),
    Status.STARTING: frozenset(
        {Status.RUNNING, Status.PENDING, Status.STOPPING, Status.DELETING, Status.ERROR},
    ),
    Status.RUNNING: frozenset(
        {Status.STARTING, Status.PENDING, Status.STOPPING, Status.DELETING, Status.ERROR},
    ),
    Status.STOPPING: frozenset({Status.STOPPED, Status.STARTING, Status.DELETING, Status.ERROR}),
    Status.STOPPED: frozenset({Status.PENDING, Status.DELETING}),
    Status.ERROR: frozenset({Status.PENDING, Status.RUNNING, Status.STOPPING, Status.DELETING}),
    Status.DELETING: frozenset({Status.DELETED}),
    Status.DELETED: frozenset(),
}


def decide(desired: Desired, status: Status, *, outstanding: bool, stale: bool) -> Step:
    """The next step. `outstanding`: the status speaks of an older generation than the one that is wanted."""
    if not outstanding:
        return Step.INSPECT if stale else Step.NONE
    if status is Status.DELETED:
        return Step.NONE
    if desired is Desired.DELETED:
        return Step.DELETE
    if desired is Desired.STOPPED:
        return Step.NONE if status is Status.STOPPED else Step.STOP
    # What runs is to be started anew; what was being stopped is stopped wholly before it starts again.
    return Step.RESTART if status in (Status.RUNNING, Status.STOPPING) else Step.START


def requested(desired: Desired, status: Status, wish: Desired, *, restart: bool = False) -> Status | None:
    """The status to show as soon as `wish` is accepted; None: nothing changes, it is so already or on its way.

    Not for a session that is being deleted (nothing brings it back).
    """
    if wish is Desired.DELETED:
        return Status.DELETING
    if wish is Desired.STOPPED:
        settled = desired is Desired.STOPPED and status in (Status.STOPPING, Status.STOPPED)
        return None if settled else Status.STOPPING
    if restart:
        return Status.PENDING if status in (Status.PENDING, Status.STOPPED) else Status.STOPPING
    if status in (Status.STOPPED, Status.ERROR):
        return Status.PENDING
    # A stop that is under way is carried to its end first: see `decide`.
    return Status.STOPPING if desired is Desired.STOPPED else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an observation makes of a session. `again`: it must be started anew."""

    status: Status
    reason: str
    message: str
    again: bool = False


READY = Verdict(Status.RUNNING, "Ready", "The session is running.")


def judge(desired: Desired, status: Status, observation: Observation, *, overdue: bool = False) -> Verdict | None:
    """What an observation means for a session whose request is carried out; None: nothing.

    `overdue`: it has been coming up by itself for longer than a start may take.
    """
    if desired is not Desired.RUNNING or status not in (Status.STARTING, Status.RUNNING, Status.ERROR):
        return None
    if observation.state is State.RUNNING:
        return READY
    # Only a recovery lifts an error: what failed is not started again unasked.
    if status is Status.ERROR:
        return None
    if observation.state is State.FAILED:
        return Verdict(Status.ERROR, observation.reason or "Failed", observation.message or "The session has failed.")
    if observation.state is State.STARTING:
        if overdue:
            heard = f" The last that was heard: {observation.message}" if observation.message else ""
            return Verdict(Status.ERROR, "StartTimeout", f"The session did not come back in time.{heard}")
        return Verdict(
            Status.STARTING,
            observation.reason or "Restarting",
            observation.message or "The session is coming up again.",
        )
    return Verdict(
        Status.PENDING, "Lost", "The session was no longer there where it ran; it is being started again.", again=True
    )


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed step does to its session: to `error` (`final`), or tried again; `stale`: the provider is away."""

    final: bool
    stale: bool
    reason: str
    message: str


_DOING = {
    Step.START: "starting",
    Step.RESTART: "restarting",
    Step.STOP: "stopping",
    Step.DELETE: "deleting",
    Step.INSPECT: "looking after",
    Step.NONE: "looking after",
}


def classify(step: Step, error: Exception, attempts: int) -> Failure:
    """Terminal or not, and what the user is told. `attempts` counts the failures in a row, this one included.

    An outage never fails a session, and neither a stop nor a delete that the provider refuses is ever given up: what is
    left running costs money.
    """
    if isinstance(error, ProviderUnavailable):
        return Failure(final=False, stale=True, reason="ProviderUnavailable", message=str(error))
    if isinstance(error, ProviderFailure):
        final = step not in (Step.STOP, Step.DELETE)
        return Failure(final=final, stale=False, reason=error.reason, message=str(error))
    sentence = f"Something unexpected went wrong on our side while {_DOING[step]} the session"
    # What cannot be looked at is not known to be broken, and a delete has no way back.
    final = attempts >= MAX_ATTEMPTS and step not in (Step.DELETE, Step.INSPECT)
    if final:
        what = f"{sentence}; it was given up after {attempts} attempts. Restart the session, or tell an operator."
        return Failure(final=True, stale=False, reason="InternalError", message=what)
    return Failure(
        final=False, stale=step is Step.INSPECT, reason="InternalError", message=f"{sentence}; it is tried again."
    )
