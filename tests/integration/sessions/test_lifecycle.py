"""Sessions on their way: every step, by a real orchestrator with a staged provider."""

from __future__ import annotations

import asyncio

import orjson

from orchestrator.errors import ProviderFailure
from orchestrator.providers.contract import Observation, RolledBack, SessionRef, State
from orchestrator.sessions import store
from tests.integration.sessions.conftest import Stage, until
from tests.integration.sessions.staged import Gate, endpoints_of, failing


async def test_a_new_session_is_started_and_each_change_is_told_once(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        running = await stage.until(session, "running")
    assert running.preview_url == f"http://127.0.0.1:{10_000 + session.id}/preview"
    assert running.preview_path == "/preview"
    assert running.ip_address == "127.0.0.1"
    assert running.chat_url is None
    assert await stage.history(session) == [
        ("pending", "Created"),
        ("starting", "Starting"),
        ("starting", "Cloning"),
        ("starting", "Launching"),
        ("running", "Ready"),
    ]


async def test_a_start_gets_the_project_as_it_is_and_the_machine_as_it_was(stage: Stage) -> None:
    project = await stage.project()
    session = await stage.create(project)
    chart_values = {"services": {"preview": {"image": "example.org/shop:2"}}}
    await stage.execute(
        "UPDATE projects SET branch = 'next', chart_values = $2 WHERE id = $1", project.id, chart_values
    )
    await stage.execute("UPDATE machine_configs SET cpu = 64")
    async with stage.running():
        await stage.until(session, "running")
    (spec,) = stage.world.specs
    assert (spec.repo_url, spec.branch, spec.env) == ("https://example.org/shop.git", "next", {"A": "1"})
    assert spec.chart_values == chart_values
    assert (spec.machine.name, spec.machine.cpu) == ("small", 1.0)
    assert spec.machine.services == {"preview": {"command": ["serve"]}}
    assert (spec.ref.namespace, spec.ref.container_name) == (str(project.uuid), f"session-{session.id}")


async def test_every_change_is_published_to_the_session_its_user_and_its_workspace(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        await until(lambda: _empty(stage))
    seen: dict[str, list[str]] = {}
    async with asyncio.timeout(5):
        async for entries in stage.log.read(0):
            for entry in entries:
                if entry.event_type == "session.status":
                    data = orjson.loads(entry.body)["data"]
                    assert data["id"] == session.id
                    seen.setdefault(entry.channel, []).append(data["status"])
            break
    statuses = ["pending", "starting", "starting", "starting", "running"]
    assert seen == {
        f"session:{session.id}": statuses,
        f"user:{stage.user_id}": statuses,
        f"workspace:{stage.workspace_id}": statuses,
    }


async def _empty(stage: Stage) -> bool:
    return await stage.execute("SELECT count(*) FROM outbox") == 0


async def test_a_session_is_stopped_started_again_and_restarted(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        assert (await stage.request(session, "stopped")).status == "stopping"
        stopped = await stage.until(session, "stopped")
        assert stopped.preview_url is None
        assert (await stage.request(session, "running")).status == "pending"
        await stage.until(session, "running")
        assert (await stage.request(session, "running", restart=True)).status == "stopping"
        await stage.until(session, "running")
    steps = [name for name, _ in stage.world.calls if name != "inspect"]
    assert steps == ["start", "stop", "start", "stop", "start"]


async def test_a_deleted_session_is_gone_at_its_provider_and_can_still_be_read(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        await stage.request(session, "deleted")
        deleted = await stage.until(session, "deleted")
        assert (await stage.request(session, "deleted")).status == "deleted"
    assert session.id not in stage.world.states
    assert deleted.preview_url is None
    assert (await stage.history(session))[-2:] == [("deleting", "DeleteRequested"), ("deleted", "Deleted")]


async def test_a_delete_cancels_a_start_that_is_under_way(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    async with stage.running(poll_interval=60.0, lease=60.0):
        await gate.reached.wait()
        await stage.request(session, "deleted")
        async with asyncio.timeout(1):
            await gate.cancelled.wait()
        await stage.until(session, "deleted")
    assert stage.world.overlaps == []


async def test_a_restart_cancels_a_start_and_stops_what_is_left_of_it(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    async with stage.running():
        await gate.reached.wait()
        await stage.request(session, "running", restart=True)
        await gate.cancelled.wait()
        gate.open()
        await stage.until(session, "running")
    assert [name for name, _ in stage.world.calls if name != "inspect"] == ["start", "stop", "start"]


async def test_a_start_asked_for_during_a_stop_comes_after_it(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        gate = stage.world.hooks["stop"] = Gate()
        await stage.request(session, "stopped")
        await gate.reached.wait()
        assert (await stage.request(session, "running")).status == "stopping"
        gate.open()
        await stage.until(session, "running")
    assert stage.world.states[session.id].state is State.RUNNING
    assert [name for name, _ in stage.world.calls if name != "inspect"] == ["start", "stop", "stop", "start"]


async def test_a_session_that_cannot_start_says_why_and_leaves_nothing_running(stage: Stage) -> None:
    stage.world.hooks["start"] = failing(ProviderFailure("CloneFailed", "There is no branch\0 'x'."))
    session = await stage.create()
    async with stage.running():
        failed = await stage.until(session, "error")
    assert (failed.reason, failed.message) == ("CloneFailed", "There is no branch� 'x'.")
    assert stage.world.called("stop") == 1
    assert not failed.outstanding


async def test_what_was_rolled_back_runs_and_goes_on_saying_why(stage: Stage) -> None:
    session = await stage.create()

    async def rolls_back(ref: SessionRef) -> None:
        stage.world.states[ref.session_id] = Observation(State.RUNNING, endpoints=endpoints_of(ref.session_id))
        raise RolledBack("The image does not exist; it runs as before.", endpoints_of(ref.session_id))

    stage.world.hooks["start"] = rolls_back
    async with stage.running(resync_interval=0.02):
        running = await stage.until(session, "running")
        seen = stage.world.called("inspect")
        await until(lambda: _returns(stage.world.called("inspect") >= seen + 3))
        assert await stage.get(session) == running
    assert (running.reason, running.message) == ("RolledBack", "The image does not exist; it runs as before.")
    assert running.preview_url == endpoints_of(session.id).preview.url  # type: ignore[union-attr]
    assert stage.world.called("start") == 1


async def test_a_session_gets_another_machine_and_goes_back_when_it_cannot_run_with_it(stage: Stage) -> None:
    session = await stage.create()
    await stage.execute(
        "INSERT INTO machine_configs (name, provider_id, cpu) VALUES ('large', $1, 8), ('broken', $1, 9)",
        stage.provider_id,
    )

    async def change(name: str) -> bool:
        async with stage.pool.acquire() as connection, connection.transaction():
            return (await store.change_machine(connection, session.id, name))[1]

    async with stage.running():
        await stage.until(session, "running")
        assert await change("large")
        running = await stage.until(session, "running", reason="Ready", observed_generation=2)
        assert (running.machine_config, stage.world.specs[-1].machine.cpu) == ("large", 8.0)

        async def cannot(ref: SessionRef) -> None:
            raise RolledBack("There is no such image.", endpoints_of(ref.session_id))

        stage.world.hooks["start"] = cannot
        assert await change("broken")
        await stage.until(session, "running", reason="RolledBack", machine_config="broken")
        del stage.world.hooks["start"]
        assert await change("broken")
        await stage.until(session, "running", reason="Ready")
        assert not await change("broken")
    assert [spec.machine.name for spec in stage.world.specs] == ["small", "large", "broken", "broken"]


async def test_a_failed_session_can_be_started_again(stage: Stage) -> None:
    stage.world.hooks["start"] = failing(ProviderFailure("CloneFailed", "No."), times=1)
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "error")
        await stage.request(session, "running")
        await stage.until(session, "running")


async def test_leftovers_that_cannot_be_stopped_do_not_hide_why_the_start_failed(stage: Stage) -> None:
    stage.world.hooks["start"] = failing(ProviderFailure("CloneFailed", "No."))
    stage.world.hooks["stop"] = failing(RuntimeError("odd"))
    session = await stage.create()
    async with stage.running():
        assert (await stage.until(session, "error")).reason == "CloneFailed"


async def test_a_start_that_never_becomes_ready_ends_in_error_with_what_it_waited_for(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    async with stage.running(start_deadline=0.2):
        failed = await stage.until(session, "error")
    assert gate.cancelled.is_set()
    assert failed.reason == "StartTimeout"
    assert "Launching it." in failed.message


async def test_a_session_is_tried_again_after_an_unexpected_error_and_given_up_after_five(stage: Stage) -> None:
    stage.world.hooks["start"] = failing(KeyError("password"))
    session = await stage.create()
    async with stage.running(), stage.impatient():
        failed = await stage.until(session, "error")
    assert stage.world.called("start") == 5
    assert failed.reason == "InternalError"
    assert "password" not in failed.message


async def test_an_unexpected_error_that_passes_ends_well(stage: Stage) -> None:
    stage.world.hooks["start"] = failing(TimeoutError(), times=2)
    session = await stage.create()
    async with stage.running(), stage.impatient():
        running = await stage.until(session, "running")
    assert running.attempts == 0
    assert ("starting", "InternalError") in await stage.history(session)


async def test_a_failing_delete_says_so_and_goes_on_until_it_works(stage: Stage) -> None:
    session = await stage.create()
    stage.world.hooks["delete"] = failing(ProviderFailure("VolumeBusy", "The volume is in use."))
    async with stage.running(), stage.impatient():
        await stage.until(session, "running")
        await stage.request(session, "deleted")
        stuck = await stage.until(session, "deleting", reason="VolumeBusy")
        assert stuck.message == "The volume is in use."
        await until(lambda: _returns(stage.world.called("delete") >= 3))
        del stage.world.hooks["delete"]
        # Asking again does not wait for the back-off.
        await stage.request(session, "deleted")
        await stage.until(session, "deleted")


async def _returns(value: bool) -> bool:
    return value


async def test_an_outage_marks_a_session_stale_and_never_fails_it(stage: Stage) -> None:
    stage.world.down = "The cluster does not answer."
    session = await stage.create()
    async with stage.running(), stage.impatient():
        stale = await stage.until(session, "starting", stale=True)
        assert (stale.reason, stale.message) == ("ProviderUnavailable", "The cluster does not answer.")
        await stage.until(session, "starting", stale=True, attempts=4)
        stage.world.down = None
        running = await stage.until(session, "running", stale=False)
    assert running.reason == "Ready"
    assert [reason for _, reason in await stage.history(session)].count("ProviderUnavailable") == 1


async def test_a_crash_and_a_recovery_that_the_provider_reports_are_told_once(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        running = await stage.until(session, "running")
        crash = Observation(State.FAILED, "CrashLoop", "panic: out of cheese")
        for _ in range(3):
            stage.world.happens(session.ref, crash)
        failed = await stage.until(session, "error")
        assert (failed.reason, failed.message, failed.preview_url) == ("CrashLoop", "panic: out of cheese", None)
        for _ in range(3):
            stage.world.happens(session.ref, Observation(State.RUNNING, endpoints=_endpoints(session)))
        recovered = await stage.until(session, "running")
        assert recovered.preview_url == running.preview_url
        await until(lambda: _returns(stage.world.called("inspect") >= 6))
    assert (await stage.history(session))[4:] == [("running", "Ready"), ("error", "CrashLoop"), ("running", "Ready")]


def _endpoints(session: store.Session):
    from tests.integration.sessions.staged import endpoints_of

    return endpoints_of(session.id)


async def test_an_outdated_report_changes_nothing(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        now = stage.world.states[session.id]
        stage.world.happens(session.ref, Observation(State.FAILED, "CrashLoop", "long ago"))
        stage.world.states[session.id] = now
        await until(lambda: _returns(stage.world.called("inspect") >= 1))
    assert (await stage.get(session)).status == "running"


async def test_a_session_that_comes_up_again_by_itself_too_slowly_ends_in_error(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running(start_deadline=0.3, resync_interval=0.1):
        await stage.until(session, "running")
        stage.world.happens(session.ref, Observation(State.STARTING, "Crashed", "restarting in 1 s"))
        starting = await stage.until(session, "starting")
        assert starting.reason == "Crashed"
        failed = await stage.until(session, "error")
    assert failed.reason == "StartTimeout"
    assert "restarting in 1 s" in failed.message


async def test_a_report_of_a_session_that_is_not_there_is_ignored(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
        await stage.request(session, "stopped")
        await stage.until(session, "stopped")
        await stage.execute("DELETE FROM sessions WHERE id = $1", session.id)
        stage.world.happens(session.ref, Observation(State.FAILED, "CrashLoop", "x"))
        other = await stage.create()
        await stage.until(other, "running")


async def test_what_should_run_and_is_gone_is_started_again_when_an_orchestrator_starts(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
    stage.world.states.clear()
    async with stage.running():
        await stage.until(session, "running", observed_generation=session.generation)
        await until(lambda: _returns(stage.world.called("start") == 2))
        await stage.until(session, "running")
    assert ("pending", "Lost") in await stage.history(session)


async def test_a_session_found_broken_or_moved_by_the_regular_inspection_is_corrected(stage: Stage) -> None:
    broken, moved = await stage.create(), await stage.create(await stage.project("other"))
    async with stage.running(resync_interval=0.05):
        await stage.until(broken, "running")
        await stage.until(moved, "running")
        stage.world.states[broken.id] = Observation(State.FAILED, "OutOfMemory", "Killed.")
        stage.world.states[moved.id] = Observation(State.RUNNING, endpoints=_endpoints(broken))
        await stage.until(broken, "error", reason="OutOfMemory")
        await stage.until(moved, "running", preview_url=f"http://127.0.0.1:{10_000 + broken.id}/preview")


async def test_an_outage_found_by_the_regular_inspection_is_told_and_passes(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running(resync_interval=0.05):
        await stage.until(session, "running")
        stage.world.down = "Away."
        await stage.until(session, "running", stale=True)
        stage.world.down = None
        await stage.until(session, "running", stale=False, reason="Ready")
    history = await stage.history(session)
    assert history[4:] == [("running", "Ready"), ("running", "ProviderUnavailable"), ("running", "Ready")]


async def test_a_session_that_an_outage_has_taken_is_started_again(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running(resync_interval=0.05):
        await stage.until(session, "running")
        stage.world.down = "Away."
        await stage.until(session, "running", stale=True)
        stage.world.states.clear()
        stage.world.down = None
        await until(lambda: _returns(stage.world.called("start") >= 2))
        await stage.until(session, "running", stale=False)


async def test_an_inspection_that_fails_unexpectedly_changes_nothing(stage: Stage) -> None:
    stage.world.hooks["inspect"] = failing(ValueError("odd"))
    session = await stage.create()
    async with stage.running(resync_interval=0.05):
        await until(lambda: _returns(stage.world.called("inspect") >= 3))
        assert (await stage.get(session)).status == "running"


async def test_nothing_is_written_while_nothing_changes(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running(resync_interval=0.02):
        before = await stage.until(session, "running")
        seen = stage.world.called("inspect")
        await until(lambda: _returns(stage.world.called("inspect") >= seen + 10))
        assert await stage.get(session) == before
    assert len(await stage.history(session)) == 5
