"""The order of deployments and of their steps, and what becomes of those whose worker, engine or database goes away."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.database import Pool
from orchestrator.deployments import directories, leases, pipeline
from orchestrator.deployments.contract import AppSecrets, StepFailed, Task
from orchestrator.errors import EngineRefused, ProviderUnavailable
from tests.integration.deployments.conftest import Place
from tests.integration.deployments.staged import STEPS, Engine, Stage, fail, history, say, until, wait_for


async def test_a_deployment_goes_from_clone_to_live_and_each_step_is_told_as_it_begins_and_ends(stage: Stage) -> None:
    deployment = await stage.place.enqueue(await stage.place.app())
    async with stage.running():
        live = await stage.ended(deployment, "live")
    assert stage.engine.done == [(1, step) for step in STEPS]
    told = await stage.place.told()
    assert history(told, deployment) == [
        "queued", "deploying",
        *(f"deploying {step}:{status}" for step in STEPS[:4] for status in ("running", "done")),
        "deploying swap:running", "live swap:done",
        "live drain:running", "live drain:done", "live clean:running", "live clean:done", "live clean:done",
    ]  # fmt: skip
    assert [(step["name"], step["status"]) for step in live.steps] == [(step, "done") for step in STEPS]
    assert all(0 <= step["seconds"] < 30 for step in live.steps)
    assert (live.commit_id, live.commit_message) == ("c" * 40, "Commit of 1")
    assert (live.image, live.image_id) == (f"cluster-code-shop:{live.id}", f"sha256:{live.id}")
    assert (live.container, live.url) == (f"id-of-shop-{live.id}", "http://shop.localhost")
    assert (live.reason, live.message, live.lease_owner, live.attempts) == ("", "", None, 1)
    assert live.started_at is not None
    assert live.finished_at is not None
    assert live.created_at <= live.started_at <= live.finished_at
    assert list(stage.settings.directory.iterdir()) == []
    # On the three channels alike.
    statuses = [channel for event_type, channel, _ in told if event_type == "deployment.status"]
    place = stage.place
    for channel in (f"user:{place.user_id}", f"workspace:{place.workspace_id}"):
        assert statuses.count(channel) == statuses.count(f"deployment:{deployment.id}")


async def test_the_one_before_serves_until_the_new_one_does_and_is_retired_in_the_same_moment(stage: Stage) -> None:
    app = await stage.place.app()
    swapping, go = asyncio.Event(), asyncio.Event()
    async with stage.running():
        first = await stage.ended(await stage.place.enqueue(app), "live")

        async def swap(_: Task) -> None:
            swapping.set()
            await go.wait()

        stage.engine.acts["swap", 2] = swap
        await stage.place.told()
        second = await stage.place.enqueue(app)
        await swapping.wait()
        assert (await stage.get(first)).status == "live"
        go.set()
        await stage.ended(second, "live")
    retired = await stage.get(first)
    assert (retired.status, retired.reason) == ("retired", "Replaced")
    assert retired.message == "Deployment 2 took its place."
    told = [(data["number"], data["status"]) for _, channel, data in await stage.place.told()
            if channel.startswith("deployment:") and data.get("status") in ("retired", "live")]  # fmt: skip
    assert told[:2] == [(1, "retired"), (2, "live")]
    assert stage.engine.containers == {f"shop-{second.id}"}


async def test_of_those_that_wait_the_newest_is_next_and_the_others_never_are(stage: Stage) -> None:
    app, other = await stage.place.app(), await stage.place.app("blog")
    go = asyncio.Event()
    stage.engine.acts["build", 1] = wait_for(go)
    async with stage.running(concurrency=4):
        first = await stage.place.enqueue(app)
        await stage.engine.begun["build", 1].wait()
        waiting = [await stage.place.enqueue(app) for _ in range(3)]
        # Another app's does not wait for it.
        await stage.engine.begun["build"].wait()
        stage.engine.acts.pop(("build", 1))
        await stage.ended(await stage.place.enqueue(other), "live")
        assert {(await stage.get(one)).status for one in waiting} == {"queued"}
        go.set()
        last = await stage.ended(waiting[-1], "live")
    assert (await stage.get(first)).status == "retired"
    for one in [await stage.get(one) for one in waiting[:-1]]:
        assert (one.status, one.reason, one.finished) == ("superseded", "Superseded", True)
        assert one.message == "Deployment 4 is newer, and was begun instead."
    assert [number for number, step in stage.engine.done if step == "swap"] == [1, 1, 4]
    assert last.number == 4


async def test_an_app_has_one_deployment_at_a_time_however_many_workers_there_are(stage: Stage) -> None:
    app = await stage.place.app()
    at_work, most = 0, 0

    async def build(_: Task) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.01)
        at_work -= 1

    stage.engine.acts["build"] = build
    async with stage.running(), stage.running(engine=stage.engine), stage.running(engine=stage.engine):
        made = []
        for _ in range(12):
            made.append(await stage.place.enqueue(app))
            await asyncio.sleep(0.005)
        await stage.ended(made[-1], "live")
        for one in made:
            await stage.ended(one, "live", "retired", "superseded")
    assert most == 1
    assert [row["count"] for row in await stage.fetch("SELECT count(*) FROM deployments WHERE status = 'live'")] == [1]


@pytest.mark.parametrize("step", ["clone", "probe"])
async def test_a_failure_leaves_the_old_one_serving_and_nothing_of_the_new(stage: Stage, step: str) -> None:
    app = await stage.place.app()
    async with stage.running() as worker:
        first = await stage.ended(await stage.place.enqueue(app), "live")
        stage.engine.acts[step, 2] = fail(StepFailed("Broken", "It is broken: mend it."))
        await stage.place.told()
        second = await stage.ended(await stage.place.enqueue(app), "failed")
        await until(lambda: _is(worker.ended == {"live": 1, "failed": 1}))
    assert (second.reason, second.message, second.step) == ("Broken", "It is broken: mend it.", step)
    assert [(s["name"], s["status"]) for s in second.steps] == [
        *((before, "done") for before in STEPS[: STEPS.index(step)]), (step, "failed"),
    ]  # fmt: skip
    assert (await stage.get(first)).status == "live"
    assert stage.engine.containers == {f"shop-{first.id}"}
    assert stage.engine.images == {f"cluster-code-shop:{first.id}"}
    assert "It is broken: mend it.\n" in await stage.log(second)
    assert list(stage.settings.directory.iterdir()) == []
    assert history(await stage.place.told(), second)[-1] == f"failed {step}:failed"


@pytest.mark.parametrize(
    ("error", "reason", "told"),
    [
        (EngineRefused(500, "no"), "DockerRefused", "The Docker engine refuses: no"),
        (TimeoutError(), "InternalError", "The step build broke off: tell an operator, whose logs say why."),
    ],
)
async def test_what_a_step_does_not_expect_fails_the_deployment(
    stage: Stage, error: Exception, reason: str, told: str
) -> None:
    stage.engine.acts["build"] = fail(error)
    stage.engine.acts["discard"] = fail(KeyError("odd"))
    async with stage.running():
        failed = await stage.ended(await stage.place.enqueue(await stage.place.app()), "failed")
    assert (failed.reason, failed.message) == (reason, told)


@pytest.mark.parametrize("step", ["drain", "clean"])
async def test_what_serves_does_not_fail_over_what_is_left_to_be_tidied_up(stage: Stage, step: str) -> None:
    stage.engine.acts[step] = fail(StepFailed("Broken", "It cannot be."))
    async with stage.running():
        live = await stage.ended(await stage.place.enqueue(await stage.place.app()), "live")
    assert (live.reason, live.message) == ("", "")
    assert {s["name"]: s["status"] for s in live.steps}[step] == "failed"


@pytest.mark.parametrize("step", ["drain", "clean"])
async def test_what_does_not_stay_up_fails_and_the_one_before_is_live_again(stage: Stage, step: str) -> None:
    app = await stage.place.app()
    async with stage.running() as worker:
        await stage.ended(await stage.place.enqueue(app), "live")
        first = await stage.ended(await stage.place.enqueue(app), "live")
        stage.engine.acts[step, 3] = fail(StepFailed("Unsteady", "It does not stay up."))
        await stage.place.told()
        second = await stage.ended(await stage.place.enqueue(app), "failed")
        await until(lambda: _is(worker.ended == {"live": 2, "failed": 1}))
    assert (second.reason, second.message, second.image, second.step) == (
        "Unsteady",
        "It does not stay up.",
        None,
        step,
    )
    again = await stage.get(first)
    assert (again.status, again.reason, again.message, again.finished_at) == ("live", "", "", first.finished_at)
    assert f"shop-{second.id}" not in stage.engine.containers
    told = await stage.place.told()
    assert history(told, second)[-1] == f"failed {step}:failed"
    statuses = [(data["number"], data["status"]) for _, channel, data in told
                if channel.startswith("deployment:") and data.get("number") == 2]  # fmt: skip
    assert statuses == [(2, "retired"), (2, "live")]


async def test_a_rollback_runs_the_image_that_was_and_builds_none(stage: Stage) -> None:
    app = await stage.place.app()
    async with stage.running():
        first = await stage.ended(await stage.place.enqueue(app), "live")
        second = await stage.ended(await stage.place.enqueue(app), "live")
        stage.engine.acts["probe", 3] = fail(StepFailed("Broken", "No."))
        failed = await stage.ended(await stage.roll_back(first), "failed")
        again = await stage.ended(await stage.roll_back(first), "live")
    assert [step for number, step in stage.engine.done if number == 4] == STEPS[2:]
    assert (again.image, again.image_id, again.commit_id) == (first.image, first.image_id, first.commit_id)
    assert (again.rollback_of, again.cause, failed.status) == (first.id, "rollback", "failed")
    assert stage.engine.tasks[4].image == first.image
    assert stage.engine.tasks[2].image is None
    assert {(await stage.get(one)).status for one in (first, second)} == {"retired"}
    # What failed took with it only what was its own.
    assert {f"cluster-code-shop:{one.id}" for one in (first, second)} <= stage.engine.images


# Cancelling. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["clone", "swap"])
async def test_cancelling_ends_the_step_that_is_under_way_and_removes_what_it_has_made(stage: Stage, step: str) -> None:
    app = await stage.place.app()
    async with stage.running() as worker:
        first = await stage.ended(await stage.place.enqueue(app), "live")
        stage.engine.acts[step, 2] = wait_for(asyncio.Event())
        second = await stage.place.enqueue(app)
        await stage.engine.begun[step, 2].wait()
        async with asyncio.timeout(5):
            await stage.cancel(second)
            cancelled = await stage.ended(second, "cancelled")
        await until(lambda: _is(worker.ended == {"live": 1, "cancelled": 1}))
        assert worker.lost == 0
    assert (cancelled.reason, cancelled.message) == ("Cancelled", "Cancelled, as requested.")
    assert cancelled.steps[-1]["name"] == step
    assert cancelled.steps[-1]["status"] == "cancelled"
    assert (await stage.get(first)).status == "live"
    assert stage.engine.containers == {f"shop-{first.id}"}
    assert stage.engine.images == {f"cluster-code-shop:{first.id}"}
    assert (await stage.log(second)).endswith("Cancelled.\n")


async def test_what_takes_long_to_be_removed_is_removed_after_the_cancel_is_told(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_CANCEL_DEADLINE", 0.05)
    go = asyncio.Event()
    stage.engine.acts |= {"swap": wait_for(asyncio.Event()), "discard": wait_for(go)}
    async with stage.running():
        deployment = await stage.place.enqueue(await stage.place.app())
        await stage.engine.begun["swap"].wait()
        await stage.cancel(deployment)
        await stage.ended(deployment, "cancelled")
        assert stage.engine.containers == {f"shop-{deployment.id}"}
        go.set()
        await until(lambda: _is(not stage.engine.containers))


async def test_cancelling_needs_no_engine(stage: Stage) -> None:
    async def goes_away(_: Task) -> None:
        stage.engine.away = "Docker does not answer."
        raise ProviderUnavailable(stage.engine.away)

    stage.engine.acts["build"] = goes_away
    async with stage.running():
        deployment = await stage.place.enqueue(await stage.place.app())
        await stage.until(deployment, "deploying", reason="DockerUnavailable")
        async with asyncio.timeout(5):
            await stage.cancel(deployment)
            await stage.ended(deployment, "cancelled")


async def test_a_cancel_whose_worker_has_died_is_carried_out_by_the_next(stage: Stage) -> None:
    deployment = await stage.place.enqueue(await stage.place.app())
    async with stage.pool.acquire() as connection, connection.transaction():
        [claimed] = await leases.claim(connection, 0.01, 1)
    await stage.cancel(deployment)
    async with stage.running():
        await stage.ended(deployment, "cancelled")
    assert claimed.id == deployment.id
    assert [step for _, step in stage.engine.done] == ["discard"]


# An engine that is away. ----------------------------------------------------------------------------------------------


async def test_while_the_engine_is_away_deployments_stay_queued_and_are_told_why_once(stage: Stage) -> None:
    stage.engine.away = "Docker at unix:///x does not answer: is dockerd running?"
    deployment = await stage.place.enqueue(await stage.place.app())
    async with stage.running() as worker:
        waiting = await stage.until(deployment, "queued", reason="DockerUnavailable")
        assert waiting.message == f"Waiting for the Docker engine. {stage.engine.away}"
        asked = stage.engine.asked

        async def asked_again() -> bool:
            return stage.engine.asked >= asked + 2

        await until(asked_again)
        assert worker.trouble == stage.engine.away
        stage.engine.away = ""
        live = await stage.ended(deployment, "live")
        assert worker.trouble == ""
    assert (live.reason, live.message) == ("", "")
    assert history(await stage.place.told(), deployment)[:3] == ["queued", "queued", "deploying"]


@pytest.mark.parametrize("step", ["clone", "drain"])
async def test_an_engine_that_goes_away_fails_nothing(stage: Stage, step: str) -> None:
    failures = 0

    async def flaky(_: Task) -> None:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise ProviderUnavailable("Docker does not answer.")

    stage.engine.acts[step] = flaky
    async with stage.running():
        deployment = await stage.place.enqueue(await stage.place.app())
        live = await stage.ended(deployment, "live")
    assert failures == 3
    assert (live.reason, live.message, live.attempts) == ("", "", 1)
    told = [data for _, channel, data in await stage.place.told()
            if channel == f"deployment:{deployment.id}" and data.get("reason") == "DockerUnavailable"]  # fmt: skip
    assert [(data["step"], data["message"]) for data in told] == [
        (step, "Waiting for the Docker engine. Docker does not answer.")
    ]
    assert (await stage.log(deployment)).count("Waiting: Docker does not answer.") == 1


# Workers that die, end, or lose their lease. --------------------------------------------------------------------------


async def _claimed(stage: Stage, lease: float = 0.01) -> Any:
    async with stage.pool.acquire() as connection, connection.transaction():
        [claimed] = await leases.claim(connection, lease, 1)
    return claimed


@pytest.mark.parametrize(
    ("columns", "goes_on"),
    [
        ({}, STEPS),
        ({"step": "run", "image": "i:1", "image_id": "sha256:1"}, STEPS[2:]),
        ({"step": "swap", "image": "i:1", "image_id": "sha256:1", "container": "c"}, STEPS[2:]),
        ({"step": "drain", "image": "i:1", "image_id": "sha256:1", "container": "c", "status": "live"}, STEPS[5:]),
    ],
)
async def test_another_worker_goes_on_where_a_killed_one_ended(
    stage: Stage, columns: dict[str, Any], goes_on: list[str]
) -> None:
    deployment = await stage.place.enqueue(await stage.place.app())
    await _claimed(stage)
    stage.engine.images.add("i:1")
    done = STEPS[: STEPS.index(columns.get("step", "clone"))]
    steps: list[dict[str, Any]] = [{"name": step, "status": "done", "seconds": 1.0} for step in done]
    if "step" in columns:
        steps.append({"name": columns["step"], "status": "running", "seconds": None})
    await stage.place.set(deployment, steps=steps, **columns)
    async with stage.running():
        live = await stage.ended(deployment, "live")
    assert [step for _, step in stage.engine.done] == goes_on
    assert [(step["name"], step["status"]) for step in live.steps] == [(step, "done") for step in STEPS]
    assert live.attempts == 2


async def test_the_third_worker_that_dies_of_a_deployment_is_the_last(stage: Stage) -> None:
    app = await stage.place.app()
    deployment = await stage.place.enqueue(app)
    for _ in range(3):
        await until(lambda: _expired(stage, deployment))
        await _claimed(stage)
    await stage.place.set(deployment, step="build")
    async with stage.running():
        failed = await stage.ended(deployment, "failed")
    assert failed.reason == "WorkerDied"
    assert failed.message.startswith(
        "The worker has died 3 times during this deployment, the last time in the step bui"
    )
    assert [step for _, step in stage.engine.done] == ["discard"]


async def _expired(stage: Stage, deployment: Any) -> bool:
    [row] = await stage.fetch(
        "SELECT coalesce(lease_expires_at < now(), true) AS expired FROM deployments WHERE id = $1", deployment.id
    )
    return bool(row["expired"])


async def test_a_worker_that_ends_gives_back_what_it_has_and_another_goes_on_at_once(stage: Stage) -> None:
    stage.engine.acts["build"] = wait_for(asyncio.Event())
    deployment = await stage.place.enqueue(await stage.place.app())
    async with stage.running(lease=300.0):
        await stage.engine.begun["build"].wait()
    released = await stage.get(deployment)
    assert (released.status, released.lease_owner, released.finished) == ("deploying", None, False)
    assert list(stage.settings.directory.iterdir()) == []
    del stage.engine.acts["build"]
    async with stage.running(lease=300.0):
        live = await stage.ended(deployment, "live")
    # It did not die.
    assert live.attempts == 1


async def test_what_ends_within_the_grace_is_brought_to_its_end(stage: Stage) -> None:
    go = asyncio.Event()
    stage.engine.acts["build"] = wait_for(go)
    deployment = await stage.place.enqueue(await stage.place.app())
    async with stage.running(grace=30.0):
        await stage.engine.begun["build"].wait()
        asyncio.get_running_loop().call_later(0.05, go.set)
    assert (await stage.get(deployment)).status == "live"


async def test_the_only_worker_takes_over_at_once_what_a_killed_one_had(stage: Stage) -> None:
    deployment = await stage.place.enqueue(await stage.place.app())
    await _claimed(stage, lease=300.0)
    async with stage.pool.acquire() as connection:
        assert await leases.void(connection) == 1
    async with stage.running():
        await stage.ended(deployment, "live")


async def test_who_has_lost_its_lease_ends_the_step_and_writes_nothing_more(stage: Stage) -> None:
    engine, cancelled = Engine(), asyncio.Event()

    async def stuck(task: Task) -> None:
        task.say("before\n")
        try:
            await asyncio.Event().wait()
        finally:
            task.say("after\n")
            cancelled.set()

    engine.acts["build"] = stuck
    deployment = await stage.place.enqueue(await stage.place.app())
    async with stage.running(engine=engine) as worker:
        await engine.begun["build"].wait()
        # As if it had been away for long.
        await stage.place.set(deployment, lease_owner=None, next_attempt_at=deployment.created_at.replace(year=2099))
        await cancelled.wait()
        await until(lambda: _is(worker.lost == 1))
    left = await stage.get(deployment)
    assert (left.status, left.step, [step["status"] for step in left.steps]) == (
        "deploying",
        "build",
        ["done", "running"],
    )
    assert "after" not in await stage.log(deployment)
    assert "discard" not in [step for _, step in engine.done]


async def _is(true: bool) -> bool:
    return true


async def test_leases_are_renewed_however_long_a_step_takes(stage: Stage) -> None:
    go = asyncio.Event()
    stage.engine.acts["build"] = wait_for(go)
    deployment = await stage.place.enqueue(await stage.place.app())
    async with stage.running(lease=6.0), stage.running(lease=6.0):
        await stage.engine.begun["build"].wait()
        [row] = await stage.fetch("SELECT lease_expires_at FROM deployments WHERE id = $1", deployment.id)

        async def renewed() -> bool:
            [now] = await stage.fetch("SELECT lease_expires_at FROM deployments WHERE id = $1", deployment.id)
            return (now["lease_expires_at"] - row["lease_expires_at"]).total_seconds() > 1.2

        await until(renewed)
        go.set()
        live = await stage.ended(deployment, "live")
    assert live.attempts == 1
    assert [step for _, step in stage.engine.done].count("build") == 1


async def test_directories_of_killed_workers_are_removed_and_no_others(stage: Stage) -> None:
    deployment = await stage.place.enqueue(await stage.place.app())
    claimed = await _claimed(stage, lease=300.0)
    folder = stage.settings.directory
    held = directories.of_claim(folder, claimed.id, claimed.lease_owner)
    left = directories.of_claim(folder, claimed.id, uuid4())
    for path in (held, left):
        await directories.make(path)
        (path / "sub").mkdir()
        (path / "sub" / "file").write_text("x")
    (folder / "notes").write_text("an operator's")
    async with stage.pool.acquire() as connection:
        assert await directories.remove_leftovers(connection, folder) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([held.name, "notes"])
    assert deployment.id == claimed.id
    assert held.stat().st_mode & 0o777 == 0o700


# Secrets and settings. ------------------------------------------------------------------------------------------------


async def test_a_step_sees_the_secrets_and_nobody_else_does(stage: Stage) -> None:
    app = await stage.place.app(secrets=AppSecrets(env={"PASSWORD": "hunter2"}, deploy_token="t0ken"))
    stage.engine.acts["build"] = say("hun", "ter2 and t0k", "en\n")
    async with stage.running():
        deployment = await stage.ended(await stage.place.enqueue(app), "live")
    assert stage.engine.tasks[1].secrets.env == {"PASSWORD": "hunter2"}
    assert await stage.log(deployment) == "*** and ***\n"
    assert "hunter2" not in str(await stage.place.told())
    assert "hunter2" not in repr(stage.engine.tasks[1])


async def test_what_is_quoted_of_strangers_is_told_without_secrets(stage: Stage) -> None:
    app = await stage.place.app(secrets=AppSecrets(env={"PASSWORD": "hunter2", "SUBJECT": "Commit of 1"}))
    stage.engine.acts["probe"] = fail(StepFailed("Crashed", "It ended: hunter2 is wrong."))
    async with stage.running():
        failed = await stage.ended(await stage.place.enqueue(app), "failed")
    assert (failed.message, failed.commit_message) == ("It ended: *** is wrong.", "***")
    told = str(await stage.place.told())
    assert "hunter2" not in told
    assert "Commit of 1" not in told


async def test_secrets_that_no_key_opens_fail_the_deployment(stage: Stage) -> None:
    app = await stage.place.app(secrets=AppSecrets(env={"PASSWORD": "hunter2"}))
    deployment = await stage.place.enqueue(app)
    async with stage.running(secrets_key=["A" * 43]):
        failed = await stage.ended(deployment, "failed")
    assert failed.reason == "SecretsUnreadable"
    assert "SECRETS_KEY" in failed.message


async def test_a_directory_that_cannot_be_written_fails_the_deployment(stage: Stage) -> None:
    stage.settings.directory.write_text("a file")
    async with stage.running():
        failed = await stage.ended(await stage.place.enqueue(await stage.place.app()), "failed")
    assert (failed.reason, failed.message) == ("NoDirectory", "The worker cannot write to DEPLOY_DIR: File exists.")


# Removing apps. -------------------------------------------------------------------------------------------------------


async def test_an_app_is_removed_once_nothing_of_it_is_under_way(stage: Stage) -> None:
    app = await stage.place.app()
    async with stage.running():
        await stage.ended(await stage.place.enqueue(app), "live")
        stage.engine.acts["build", 2] = wait_for(asyncio.Event())
        await stage.place.enqueue(app)
        await stage.engine.begun["build", 2].wait()
        await stage.place.enqueue(app)
        await stage.place.told()
        await stage.delete(app)
        await until(lambda: _gone(stage))
    assert stage.engine.done[-2:] == [(2, "discard"), (app.id, "remove_app")]
    told = await stage.place.told()
    assert [event_type for event_type, channel, _ in told if channel.startswith("workspace:")][-1] == "app.deleted"
    assert {data["status"] for event_type, _, data in told if event_type == "deployment.status"} >= {"cancelled"}


async def _gone(stage: Stage) -> bool:
    return not await stage.fetch("SELECT id FROM apps")


async def test_a_removal_that_is_hindered_is_tried_again_and_says_what_hinders(stage: Stage) -> None:
    app = await stage.place.app()
    stage.engine.away = "Docker does not answer."
    async with stage.running():
        await stage.delete(app)

        async def told() -> bool:
            [row] = await stage.fetch("SELECT message FROM apps")
            return bool(row["message"] == "Waiting for the Docker engine. Docker does not answer.")

        await until(told)
        stage.engine.away = ""
        await until(lambda: _gone(stage))
    told_of = [event_type for event_type, channel, _ in await stage.place.told() if channel.startswith("workspace:")]
    assert told_of == ["app.created", "app.updated", "app.updated", "app.deleted"]


# A database that is away. ---------------------------------------------------------------------------------------------


async def test_a_database_that_cuts_connections_doubles_and_loses_nothing(
    stage: Stage, place: Place, own: Pool
) -> None:
    app = await place.app()

    async def talk(task: Task) -> None:
        for number in range(15):
            task.say(f"line {number}\n")
            await asyncio.sleep(0.01)

    stage.engine.acts["build"] = stage.engine.acts["probe"] = talk
    async with stage.running(pool=own):
        deployment = await place.enqueue(app)
        for _ in range(10):
            await stage.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'own' AND datname = current_database()"
            )
            await asyncio.sleep(0.1)
        await stage.ended(deployment, "live")
    lines = [f"line {number}" for number in range(15)]
    assert (await stage.log(deployment)).splitlines() == lines + lines
    told = await place.told()
    pieces = [data for event_type, _, data in told if event_type == "deployment.log"]
    assert "".join(piece["text"] for piece in pieces) == await stage.log(deployment)
    statuses = history(told, deployment)
    assert len(statuses) == 2 + 14 + 1
