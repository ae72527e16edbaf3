"""One step about one session: the calls to its provider, and what they make of it.

No transaction is open while a provider works. What a step returns is recorded by its caller, if its claim still holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

import structlog

from orchestrator.database import UNAVAILABLE, Pool, backoff
from orchestrator.errors import HeldElsewhere, ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import (
    Endpoints,
    Machine,
    Observation,
    Provider,
    RolledBack,
    SessionRef,
    SessionSpec,
)
from orchestrator.sessions import leases
from orchestrator.sessions.record import After, Session, endpoint_columns, statuses
from orchestrator.sessions.state import MAX_ATTEMPTS, READY, Status, Step, classify, decide, judge

log = structlog.get_logger("sessions")

# Seconds. Providers have deadlines of their own; these only keep one that forgot them from holding a worker for ever.
STOP_DEADLINE = 300.0
INSPECT_DEADLINE = 60.0
# Seconds to clear away what a failed start has left, before its user is told.
CLEANUP_DEADLINE = 30.0
# Seconds between two attempts, at most.
MAX_BACKOFF = 60.0

T = TypeVar("T")
Changes: TypeAlias = dict[str, Any]
# Finds the open provider with this id, or raises ProviderUnavailable, saying why there is none, or HeldElsewhere.
FindProvider: TypeAlias = Callable[[int | None], Awaitable[Provider]]


class Interrupted(Exception):
    """The step ends without a result: the claim was lost or overtaken, is not ours, or the database is away."""


async def carry_out(session: Session, *, pool: Pool, find: FindProvider, start_deadline: float) -> Changes:
    """Do the next step about a claimed session; what it makes of the row. `start_deadline` is in seconds.

    Raises Interrupted. Cancelling leaves the provider in a state that the next step goes on from.
    """
    step = decide(*statuses(session), outstanding=session.outstanding, stale=session.stale)
    try:
        if step is Step.NONE:
            return done(session)
        provider = await _find(session, find)
        if step is Step.INSPECT:
            # After an outage: what is there?
            return done(session, **observed(session, await look(provider, session.ref), start_deadline))
        if step is Step.STOP:
            await _bounded(provider.stop(session.ref), STOP_DEADLINE, "The stop")
            return stopped(session, Status.STOPPED, "Stopped", "The session is stopped; its files are kept.")
        if step is Step.DELETE:
            await _bounded(provider.delete(session.ref), STOP_DEADLINE, "The delete")
            return stopped(session, Status.DELETED, "Deleted", "The session is deleted.")
        return await _start(session, provider, pool, start_deadline, stop_first=step is Step.RESTART)
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001  Whatever a provider raises must end in a status and a retry, not in silence.
        return await _failed(session, step, error, find)


def done(session: Session, **changes: Any) -> Changes:
    """What every success has in common."""
    return {
        "observed_generation": session.generation,
        "stale": False,
        "attempts": 0,
        "start_deadline_at": None,
        **changes,
    }


def away(why: str) -> Changes:
    """What an outage of its provider makes of a session whose request is carried out: the last status stands."""
    return {
        "stale": True,
        "reason": "ProviderUnavailable",
        "message": why,
        "attempts": 1,
        "next_attempt_at": After(0.5),
    }


def stopped(session: Session, status: Status, reason: str, message: str) -> Changes:
    """A final status without endpoints."""
    return done(session, status=status.value, reason=reason, message=message, **endpoint_columns(None))


async def _bounded(call: Awaitable[T], seconds: float, what: str) -> T:
    try:
        async with asyncio.timeout(seconds) as deadline:
            return await call
    except TimeoutError:
        if not deadline.expired():
            raise
        raise ProviderUnavailable(f"{what} did not end within {seconds:.0f} seconds.") from None


async def _find(session: Session, find: FindProvider) -> Provider:
    try:
        return await find(session.provider_id)
    except HeldElsewhere as error:
        raise Interrupted(str(error)) from error
    except UNAVAILABLE as error:
        raise Interrupted(f"database away: {error or type(error).__name__}") from error


async def look(provider: Provider, ref: SessionRef) -> Observation:
    """`inspect`, with a deadline. Raises ProviderUnavailable."""
    return await _bounded(provider.inspect(ref), INSPECT_DEADLINE, "The inspection")


def observed(session: Session, observation: Observation, start_deadline: float) -> Changes:
    """What an observation changes about a session whose request is carried out.

    A session that comes up by itself is given `start_deadline` seconds.
    """
    overdue = session.start_deadline_at is not None and session.start_deadline_at <= datetime.now(UTC)
    verdict = judge(*statuses(session), observation, overdue=overdue)
    if verdict is None:
        return {}
    changes: Changes = {"status": verdict.status.value, "reason": verdict.reason, "message": verdict.message}
    if verdict.status is Status.RUNNING:
        if session.status == Status.RUNNING and not session.stale:
            # It stays what it is, whatever it was told to be running with: `RolledBack`, for instance.
            changes = {}
        return changes | endpoint_columns(observation.endpoints) | {"start_deadline_at": None}
    if verdict.status is Status.STARTING:
        armed = session.start_deadline_at is not None
        return changes if armed else changes | {"start_deadline_at": After(start_deadline)}
    changes |= endpoint_columns(None) | {"start_deadline_at": None}
    if verdict.again:
        changes |= {"observed_generation": session.generation - 1, "next_attempt_at": After(0), "attempts": 0}
    return changes


async def _start(session: Session, provider: Provider, pool: Pool, deadline: float, *, stop_first: bool) -> Changes:
    if session.stale:
        # While the outage lasts, progress and outage would take turns in what the user is told.
        await _bounded(provider.check(), INSPECT_DEADLINE, "The check")
    if stop_first:
        await _bounded(provider.stop(session.ref), STOP_DEADLINE, "The stop")
    seconds = await _begin(session, pool, deadline)
    spec = await _spec(session, pool, seconds)
    heard = ""

    async def report(reason: str, message: str) -> None:
        nonlocal heard
        heard = message
        try:
            async with pool.acquire() as connection, connection.transaction():
                changes = {"reason": reason, "message": message}
                await leases.settle(connection, session, changes, release=False)
        except UNAVAILABLE as error:
            # The start itself goes on; its end is told when the database is back.
            log.warning("progress not recorded", session=session.id, error=str(error) or type(error).__name__)

    try:
        async with asyncio.timeout(seconds) as timer:
            endpoints = await provider.start(spec, report)
    except TimeoutError:
        if not timer.expired():
            raise
        raise _too_late(deadline, heard or session.message) from None
    except RolledBack as back:
        log.warning("start rolled back", session=session.id, error=str(back))
        return _running(session, back.reason, str(back), back.endpoints)
    return _running(session, READY.reason, READY.message, endpoints)


def _running(session: Session, reason: str, message: str, endpoints: Endpoints) -> Changes:
    return done(session, status=READY.status.value, reason=reason, message=message, **endpoint_columns(endpoints))


def _too_late(deadline: float, heard: str) -> ProviderFailure:
    return ProviderFailure(
        "StartTimeout", f"The session was not ready within {deadline:.0f} seconds. It was waiting for: {heard}"
    )


async def _begin(session: Session, pool: Pool, deadline: float) -> float:
    """Show the session as starting; the seconds that are left for it.

    A start that an orchestrator died in goes on with the time that it had left. When that is over, the time went by
    while nobody worked on it, so it gets a new deadline: but not for ever, since it may be what orchestrators die of.
    """
    changes: Changes = {"stale": False}
    left = (session.start_deadline_at - datetime.now(UTC)).total_seconds() if session.start_deadline_at else 0.0
    if left <= 0:
        left = deadline
        changes["start_deadline_at"] = After(deadline)
        if session.start_deadline_at is not None:
            changes["attempts"] = session.attempts + 1
            if session.attempts + 1 >= MAX_ATTEMPTS:
                raise _too_late(deadline, session.message)
    if session.status != Status.STARTING or session.stale:
        changes |= {"status": "starting", "reason": "Starting", "message": f"Starting at {session.provider}."}
    try:
        async with pool.acquire() as connection, connection.transaction():
            if await leases.settle(connection, session, changes, release=False) is None:
                raise Interrupted("overtaken")
    except UNAVAILABLE as error:
        raise Interrupted(f"database away: {error or type(error).__name__}") from error
    return left


async def _spec(session: Session, pool: Pool, seconds: float) -> SessionSpec:
    """What to start: the project as it is now, the machine as it was when the session was made."""
    try:
        async with pool.acquire() as connection:
            row = await connection.fetchrow(
                """SELECT p.uuid, p.repo_url, p.branch, p.env, p.chart_values, s.machine
                     FROM sessions s JOIN projects p ON p.id = s.project_id WHERE s.id = $1""",
                session.id,
            )
    except UNAVAILABLE as error:
        raise Interrupted(f"database away: {error or type(error).__name__}") from error
    if row is None:
        raise Interrupted("the session is gone")
    machine = Machine(**row["machine"])
    return SessionSpec(
        session.ref, row["uuid"], row["repo_url"], row["branch"], row["env"], machine, row["chart_values"], seconds
    )


async def _failed(session: Session, step: Step, error: Exception, find: FindProvider) -> Changes:
    attempts = session.attempts + 1
    failure = classify(step, error, attempts)
    expected = isinstance(error, (ProviderFailure, ProviderUnavailable))
    log.log(
        *((30, "step failed") if expected else (40, "step failed unexpectedly")),
        session=session.id, step=step.value, reason=failure.reason, error=str(error), attempts=attempts,
        **({} if expected else {"exc_info": error}),
    )  # fmt: skip
    if failure.final:
        if step in (Step.START, Step.RESTART):
            await _clear_away(session, find)
        return stopped(session, Status.ERROR, failure.reason, failure.message)
    changes: Changes = {
        "attempts": attempts,
        "next_attempt_at": After(backoff(attempts, base=0.5, cap=MAX_BACKOFF)),
        "stale": failure.stale,
    }
    if failure.stale:
        # An outage does not use up the time that a start may take.
        changes["start_deadline_at"] = None
    # An outage is told once: its every attempt may say something slightly different.
    if not (failure.stale and session.reason == failure.reason):
        changes |= {"reason": failure.reason, "message": failure.message}
    return changes


async def _clear_away(session: Session, find: FindProvider) -> None:
    """Stop what a failed start has left: nobody asked for half a session."""
    try:
        provider = await find(session.provider_id)
        await _bounded(provider.stop(session.ref), CLEANUP_DEADLINE, "The stop")
    except Exception as error:  # noqa: BLE001  The failure of the start is what the user must hear of, whatever comes after.
        log.warning("what a failed start left could not be stopped", session=session.id, error=str(error))
