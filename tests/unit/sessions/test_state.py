"""The state machine, row by row."""

from __future__ import annotations

from itertools import product

import pytest

from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Observation, State
from orchestrator.sessions.state import (
    MAX_ATTEMPTS,
    TRANSITIONS,
    Desired,
    Status,
    Step,
    classify,
    decide,
    judge,
    requested,
)

# What comes next while a request is outstanding.
STEPS = {
    Desired.RUNNING: {
        Status.PENDING: Step.START,
        Status.STARTING: Step.START,
        Status.RUNNING: Step.RESTART,
        Status.STOPPING: Step.RESTART,
        Status.STOPPED: Step.START,
        Status.ERROR: Step.START,
        Status.DELETING: Step.START,
        Status.DELETED: Step.NONE,
    },
    Desired.STOPPED: {
        Status.PENDING: Step.STOP,
        Status.STARTING: Step.STOP,
        Status.RUNNING: Step.STOP,
        Status.STOPPING: Step.STOP,
        Status.STOPPED: Step.NONE,
        Status.ERROR: Step.STOP,
        Status.DELETING: Step.STOP,
        Status.DELETED: Step.NONE,
    },
    Desired.DELETED: dict.fromkeys(Status, Step.DELETE) | {Status.DELETED: Step.NONE},
}
# Where each step may lead when it succeeds.
ENDS = {
    Step.START: [Status.STARTING, Status.RUNNING],
    Step.RESTART: [Status.STARTING, Status.RUNNING],
    Step.STOP: [Status.STOPPED],
    Step.DELETE: [Status.DELETED],
}


@pytest.mark.parametrize(("desired", "status", "stale"), list(product(Desired, Status, (False, True))))
def test_the_next_step_follows_from_what_is_wanted_and_what_is_known(
    desired: Desired, status: Status, stale: bool
) -> None:
    assert decide(desired, status, outstanding=True, stale=stale) is STEPS[desired][status]
    settled = Step.INSPECT if stale else Step.NONE
    assert decide(desired, status, outstanding=False, stale=stale) is settled


REQUESTS = {
    # wish, restart: (desired now, status now) -> the status that is shown, None where nothing changes
    (Desired.RUNNING, False): {
        Desired.RUNNING: {
            Status.PENDING: None,
            Status.STARTING: None,
            Status.RUNNING: None,
            Status.STOPPING: None,
            Status.ERROR: Status.PENDING,
        },
        Desired.STOPPED: {
            Status.STOPPING: Status.STOPPING,
            Status.STOPPED: Status.PENDING,
            Status.ERROR: Status.PENDING,
        },
    },
    (Desired.RUNNING, True): {
        Desired.RUNNING: {
            Status.PENDING: Status.PENDING,
            Status.STARTING: Status.STOPPING,
            Status.RUNNING: Status.STOPPING,
            Status.STOPPING: Status.STOPPING,
            Status.ERROR: Status.STOPPING,
        },
        Desired.STOPPED: {
            Status.STOPPING: Status.STOPPING,
            Status.STOPPED: Status.PENDING,
            Status.ERROR: Status.STOPPING,
        },
    },
    (Desired.STOPPED, False): {
        Desired.RUNNING: {
            Status.PENDING: Status.STOPPING,
            Status.STARTING: Status.STOPPING,
            Status.RUNNING: Status.STOPPING,
            Status.STOPPING: Status.STOPPING,
            Status.ERROR: Status.STOPPING,
        },
        Desired.STOPPED: {
            Status.STOPPING: None,
            Status.STOPPED: None,
            Status.ERROR: Status.STOPPING,
        },
    },
}


@pytest.mark.parametrize(("wish", "restart"), list(REQUESTS))
def test_a_request_shows_at_once_where_it_leads(wish: Desired, restart: bool) -> None:
    for desired, row in REQUESTS[wish, restart].items():
        for status, shown in row.items():
            assert requested(desired, status, wish, restart=restart) is shown, (desired, status)
            if shown is not None and shown is not status:
                assert shown in TRANSITIONS[status]
            if shown is not None:
                # What is shown is what the next step begins from: it must lead to what is wished.
                step = decide(wish, shown, outstanding=True, stale=False)
                assert step in (Step.START, Step.RESTART) if wish is Desired.RUNNING else step is Step.STOP
                if restart and status in (Status.STARTING, Status.RUNNING):
                    assert step is Step.RESTART


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.DELETED])
def test_anything_can_be_deleted(status: Status) -> None:
    assert requested(Desired.RUNNING, status, Desired.DELETED) is Status.DELETING
    if status is not Status.DELETING:
        assert Status.DELETING in TRANSITIONS[status]


def test_every_step_leads_where_it_may() -> None:
    shown = {
        Desired.RUNNING: [Status.PENDING, Status.STARTING, Status.STOPPING],
        Desired.STOPPED: [Status.STOPPING],
        Desired.DELETED: [Status.DELETING],
    }
    for desired, statuses in shown.items():
        for status in statuses:
            at = status
            for after in ENDS[decide(desired, status, outstanding=True, stale=False)]:
                assert after is at or after in TRANSITIONS[at]
                at = after


def test_nothing_follows_a_delete() -> None:
    assert TRANSITIONS[Status.DELETED] == frozenset()
    assert TRANSITIONS[Status.DELETING] == {Status.DELETED}


LOOKED_AFTER = (Status.STARTING, Status.RUNNING)


@pytest.mark.parametrize(("state", "status"), list(product(State, Status)))
def test_an_observation_of_what_should_run_says_what_became_of_it(state: State, status: Status) -> None:
    verdict = judge(Desired.RUNNING, status, Observation(state))
    if status is Status.ERROR:
        assert (verdict.status if verdict else None) is (Status.RUNNING if state is State.RUNNING else None)
    elif status not in LOOKED_AFTER:
        assert verdict is None
    else:
        assert verdict is not None
        assert (
            verdict.status
            is {
                State.RUNNING: Status.RUNNING,
                State.STARTING: Status.STARTING,
                State.FAILED: Status.ERROR,
                State.STOPPED: Status.PENDING,
                State.ABSENT: Status.PENDING,
            }[state]
        )
        assert verdict.again is (state in (State.STOPPED, State.ABSENT))
        assert verdict.reason
        assert verdict.message
        assert verdict.status is status or verdict.status in TRANSITIONS[status]


@pytest.mark.parametrize(
    ("desired", "state", "status"), list(product([Desired.STOPPED, Desired.DELETED], State, Status))
)
def test_an_observation_of_what_shall_not_run_says_nothing(desired: Desired, state: State, status: Status) -> None:
    assert judge(desired, status, Observation(state)) is None


def test_what_the_provider_says_is_passed_on() -> None:
    failed = judge(Desired.RUNNING, Status.RUNNING, Observation(State.FAILED, "CrashLoop", "panic"))
    assert failed is not None
    assert (failed.reason, failed.message) == ("CrashLoop", "panic")
    starting = judge(Desired.RUNNING, Status.RUNNING, Observation(State.STARTING, "Crashed", "in 2 s"))
    assert starting is not None
    assert (starting.reason, starting.message) == ("Crashed", "in 2 s")


@pytest.mark.parametrize(("said", "told"), [("pulling", "pulling"), ("", "in time.")])
def test_what_comes_up_for_too_long_is_given_up(said: str, told: str) -> None:
    verdict = judge(Desired.RUNNING, Status.STARTING, Observation(State.STARTING, "X", said), overdue=True)
    assert verdict is not None
    assert (verdict.status, verdict.reason) == (Status.ERROR, "StartTimeout")
    assert verdict.message.endswith(told)


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("attempts", [1, MAX_ATTEMPTS, 1000])
def test_an_outage_never_fails_a_session(step: Step, attempts: int) -> None:
    failure = classify(step, ProviderUnavailable("Away."), attempts)
    assert (failure.final, failure.stale, failure.reason, failure.message) == (
        False,
        True,
        "ProviderUnavailable",
        "Away.",
    )


@pytest.mark.parametrize("step", Step)
def test_what_the_provider_refuses_is_final_but_for_stops_and_deletes(step: Step) -> None:
    failure = classify(step, ProviderFailure("Quota", "Too much."), 1)
    assert failure.final is (step not in (Step.STOP, Step.DELETE))
    assert (failure.stale, failure.reason, failure.message) == (False, "Quota", "Too much.")


@pytest.mark.parametrize("step", Step)
def test_the_unexpected_is_tried_again_a_few_times_and_tells_nothing_of_the_inside(step: Step) -> None:
    for attempts in range(1, MAX_ATTEMPTS + 2):
        failure = classify(step, KeyError("secret"), attempts)
        endless = step in (Step.DELETE, Step.INSPECT)
        assert failure.final is (attempts >= MAX_ATTEMPTS and not endless)
        assert failure.reason == "InternalError"
        assert "secret" not in failure.message
