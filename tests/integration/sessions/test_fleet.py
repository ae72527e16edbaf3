"""The providers that an orchestrator has open, as the table says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from orchestrator.errors import ProviderUnavailable
from orchestrator.providers.contract import Observation, SessionRef, State
from tests.integration.sessions.conftest import Stage, until
from tests.integration.sessions.staged import Gate, Staged, endpoints_of, failing


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.fleet.CHECK_INTERVAL", 0.05)


async def _is(stage: Stage, state: str, message: str = "") -> bool:
    rows = await stage.fetch("SELECT state, message, checked_at FROM providers WHERE name = 'staged'")
    return (rows[0]["state"], rows[0]["message"]) == (state, message) and rows[0]["checked_at"] is not None


async def _true(value: bool) -> bool:
    return value


async def test_the_health_of_a_provider_is_written_down(stage: Stage) -> None:
    async with stage.running():
        await until(lambda: _is(stage, "up"))
        stage.world.down = "No answer at 127.0.0.1."
        await until(lambda: _is(stage, "down", "No answer at 127.0.0.1."))
        stage.world.down = None
        await until(lambda: _is(stage, "up"))


async def test_what_does_not_change_is_written_only_now_and_then(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = 0

    async def count(ref: SessionRef) -> None:
        nonlocal checks
        checks += 1

    stage.world.hooks["check"] = count
    async with stage.running():
        await until(lambda: _is(stage, "up"))
        first = await stage.execute("SELECT checked_at FROM providers")
        await until(lambda: _true(checks > 4))
        assert await stage.execute("SELECT checked_at FROM providers") == first
        monkeypatch.setattr("orchestrator.fleet.TOUCH_INTERVAL", 0.0)
        await until(lambda: _later(stage, first))


async def _later(stage: Stage, than: object) -> bool:
    return await stage.execute("SELECT checked_at > $1 FROM providers", than)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (failing(KeyError("secret")), "The check failed unexpectedly (KeyError)."),
        (Gate(), "The provider did not answer within 0 seconds."),
    ],
)
async def test_a_check_that_breaks_or_hangs_is_an_outage(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, hook: Gate, message: str
) -> None:
    monkeypatch.setattr("orchestrator.fleet.CHECK_DEADLINE", 0.05)
    stage.world.hooks["check"] = hook
    async with stage.running():
        await until(lambda: _is(stage, "down", message))


async def test_sessions_of_a_provider_that_recovers_do_not_wait_for_their_back_off(stage: Stage) -> None:
    session = await stage.create()
    stage.world.down = "Away."
    async with stage.running():
        await stage.until(session, "starting", stale=True)
        await until(lambda: _is(stage, "down", "Away."))
        await stage.execute("UPDATE sessions SET next_attempt_at = now() + interval '1 hour'")
        stage.world.down = None
        await stage.until(session, "running")


async def test_a_provider_that_is_added_is_used_at_once(stage: Stage) -> None:
    async with stage.running():
        await until(lambda: _is(stage, "up"))
        provider_id = await stage.execute("INSERT INTO providers (name, kind) VALUES ('new', 'local') RETURNING id")
        await stage.execute(
            "INSERT INTO machine_configs (name, provider_id, is_default) VALUES ('new', $1, true)", provider_id
        )
        session = await stage.create(provider="new")
        running = await stage.until(session, "running")
    assert running.provider == "new"
    assert not [reason for _, reason in await stage.history(session) if reason == "ProviderUnavailable"]


async def test_a_provider_with_other_options_is_opened_anew_and_its_sessions_are_looked_after(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        stage.world.states.clear()
        await stage.execute("""UPDATE providers SET options = '{"a": 1}'""")
        await until(lambda: _true(stage.world.called("start") == 2))
        # The first look at all sessions may come between the two lines above, and start it before.
        await until(lambda: _true(len(stage.world.opened) == 2))
        await stage.until(session, "running")
    assert stage.world.opened == [("staged", {}), ("staged", {"a": 1})]
    assert stage.world.closed == ["staged", "staged"]


async def test_sessions_of_a_disabled_provider_wait_and_say_why(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        await stage.execute("UPDATE providers SET enabled = false")
        await until(lambda: _true(stage.world.closed == ["staged"]))
        await stage.request(session, "stopped")
        waiting = await stage.until(session, "stopping", stale=True, reason="ProviderUnavailable")
        assert waiting.message == "The provider 'staged' is disabled."
        await stage.execute("UPDATE providers SET enabled = true")
        await until(lambda: _true(len(stage.world.opened) == 2))
        await stage.execute("UPDATE sessions SET next_attempt_at = now(), generation = generation + 1")
        await stage.until(session, "stopped")


async def test_a_provider_that_is_removed_is_closed(stage: Stage) -> None:
    async with stage.running():
        await until(lambda: _is(stage, "up"))
        await stage.execute("DELETE FROM machine_configs")
        await stage.execute("DELETE FROM providers")
        await until(lambda: _true(stage.world.closed == ["staged"]))


@pytest.mark.parametrize(("option", "why"), [("broken", "The options are broken."), ("bug", "KeyError")])
async def test_a_provider_that_cannot_be_opened_says_why_and_is_tried_again(
    stage: Stage, option: str, why: str
) -> None:
    await stage.execute("UPDATE providers SET options = jsonb_build_object($1::text, 1)", option)
    session = await stage.create()
    async with stage.running(), stage.impatient():
        message = f"The provider 'staged' cannot be opened: {why}"
        await until(lambda: _is(stage, "down", message))
        assert (await stage.until(session, "pending", stale=True)).message == message
        await stage.execute("UPDATE providers SET options = '{}'")
        await stage.until(session, "running")


async def test_a_session_whose_provider_is_gone_from_the_table_says_so(stage: Stage) -> None:
    orchestrator = stage.orchestrator()
    with pytest.raises(ProviderUnavailable, match="removed"):
        await orchestrator._fleet.find(None)
    with pytest.raises(ProviderUnavailable, match="removed"):
        await orchestrator._fleet.find(987)
    await orchestrator._fleet.close()
    await orchestrator._fleet.refresh()
    assert stage.world.closed == ["staged"]


async def test_a_watch_that_breaks_or_ends_is_taken_up_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.fleet.backoff", lambda failures, cap=1.0: 0.0)
    errors = iter([KeyError("odd"), ProviderUnavailable("Away.")])
    watch, ended = Staged.watch, asyncio.Event()

    async def ending(self: Staged) -> AsyncIterator[tuple[SessionRef, Observation]]:
        if (error := next(errors, None)) is not None:
            raise error
        if not ended.is_set():
            ended.set()
            return
        async for seen in watch(self):
            yield seen

    monkeypatch.setattr(Staged, "watch", ending)
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        await until(lambda: _true(bool(stage.world._watchers)))
        stage.world.happens(session.ref, Observation(State.FAILED, "CrashLoop", "x"))
        await stage.until(session, "error")


async def test_a_report_that_the_database_cannot_take_is_not_lost(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.fleet.backoff", lambda failures, cap=1.0: 0.0)
    session = await stage.create()
    orchestrator = stage.orchestrator()
    look, refused = orchestrator._observer.look, 0

    async def refusing(session_id: int, hint: Observation | None = None) -> None:
        nonlocal refused
        if hint is not None and refused < 2:
            refused += 1
            raise ConnectionResetError
        await look(session_id, hint)

    monkeypatch.setattr(orchestrator._observer, "look", refusing)
    task = asyncio.create_task(orchestrator.run())
    await stage.until(session, "running")
    stage.world.happens(session.ref, Observation(State.FAILED, "CrashLoop", "x"))
    await stage.until(session, "error")
    stage.world.happens(session.ref, Observation(State.RUNNING, endpoints=endpoints_of(session.id)))
    await stage.until(session, "running")
    task.cancel()
    await asyncio.wait({task}, timeout=10)
    assert refused == 2


@pytest.mark.parametrize("hook", [failing(KeyError("odd")), Gate()])
async def test_a_provider_that_does_not_close_does_not_keep_the_process(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, hook: Gate
) -> None:
    monkeypatch.setattr("orchestrator.fleet.CLOSE_DEADLINE", 0.05)
    stage.world.hooks["close"] = hook
    async with stage.running():
        await until(lambda: _is(stage, "up"))
