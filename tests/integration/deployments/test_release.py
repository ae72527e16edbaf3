"""The steps from an image to what serves, at a real Docker engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from orchestrator.deployments import gate, release
from orchestrator.deployments.contract import AppSecrets, Image, StepFailed
from orchestrator.docker import labels as marks
from orchestrator.settings import DeploySettings
from tests.integration.deployments.releasing import SERVE, Site, until


async def health(site: Site, container: str | int) -> str:
    return str((await site.inspect(container))["State"]["Health"]["Status"])


async def test_a_container_is_confined_marked_and_given_its_settings(site: Site) -> None:
    secrets = AppSecrets(env={"TOKEN": "hush", "LEVEL": "9"})
    task = site.task(7, secrets, port=8000, env={"LEVEL": "1", "A": "b c"}, cpu=0.5, memory_bytes=64 << 20)
    container = await release.run(site.owned.engine, task, await site.image(task), site.settings)
    found = await site.inspect(container)
    host, config = found["HostConfig"], found["Config"]
    assert found["Name"] == f"/{site.name}-7"
    assert {"TOKEN=hush", "LEVEL=9", "A=b c", "PORT=8000"} <= set(config["Env"])
    assert "LEVEL=1" not in config["Env"]
    assert (host["NanoCpus"], host["Memory"]) == (500_000_000, 64 << 20)
    assert host["PidsLimit"] == 1024
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["CapDrop"] == ["ALL"]
    assert host["Init"] is True
    assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
    assert config["Labels"][marks.INSTANCE] == site.settings.instance
    assert (config["Labels"][marks.APP], config["Labels"][marks.DEPLOYMENT]) == ("1", "7")
    assert config["Labels"][f"traefik.http.routers.{site.name}.rule"] == f"Host(`{site.name}.apps.test`)"
    assert config["Labels"]["traefik.docker.network"] == site.settings.network
    assert list(found["NetworkSettings"]["Networks"]) == [site.settings.network]
    network = await site.owned.engine.networks.inspect(site.settings.network)
    assert network is not None
    assert network["Labels"] == {marks.INSTANCE: site.settings.instance}


async def test_one_deployment_follows_another_and_can_be_gone_back_to(site: Site) -> None:
    first = site.task(1, health_path="/")
    image = await site.image(first)
    container = await site.deploy(first, image)
    assert await health(site, container) == "healthy"
    assert (await site.inspect(container))["HostConfig"]["RestartPolicy"]["Name"] == "always"
    await site.deploy(site.task(2))
    assert await site.containers() == [2]
    await site.deploy(site.task(3, image=image.name), image)
    assert await site.containers() == [3]
    assert (await site.inspect(3))["Image"] == image.id
    assert await site.images() == [1, 2]
    assert f"http://{site.name}.apps.test is served by the container {site.name}-3." in site.log


async def test_each_step_may_be_done_again(site: Site) -> None:
    engine, settings = site.owned.engine, site.settings
    await site.deploy(site.task(1))
    task = site.task(2)
    image = await site.image(task)
    container = await release.run(engine, task, image, settings)
    assert await release.run(engine, task, image, settings) == container
    for _ in range(2):
        await release.probe(engine, task, container, settings)
    for _ in range(2):
        await release.swap(engine, task, container, settings)
    for _ in range(2):
        await release.drain(engine, task, settings)
    assert await health(site, 1) == "unhealthy"
    for _ in range(2):
        await release.clean(engine, task, settings)
    assert await health(site, container) == "healthy"
    for _ in range(2):
        await release.discard(engine, task, settings)
    assert (await site.containers(), await site.images()) == ([], [1])
    for _ in range(2):
        await release.remove_app(engine, 1, settings)
    assert await site.images() == []


async def test_a_leftover_that_is_not_what_is_wanted_is_replaced(site: Site) -> None:
    engine, settings = site.owned.engine, site.settings
    task = site.task(1, env={"A": "1"})
    image = await site.image(task)
    first = await release.run(engine, task, image, settings)
    changed = site.task(1, env={"A": "2"})
    second = await release.run(engine, changed, image, settings)
    assert second != first
    await engine.containers.kill(second)
    await until(lambda: ended(site, second))
    third = await release.run(engine, changed, image, settings)
    assert third != second
    assert await site.containers() == [1]


async def ended(site: Site, container: str) -> bool:
    return not gate.is_running(await site.inspect(container))


async def test_what_is_foreign_is_not_touched(site: Site) -> None:
    engine = site.owned.engine
    task = site.task(1)
    image = await site.image(task)
    foreign = await engine.containers.create(task.container, {"Image": site.base, "Cmd": ["true"], "Labels": {}})
    try:
        with pytest.raises(
            StepFailed, match=f"There is a container {task.container} already that is not ours"
        ) as taken:
            await release.run(engine, task, image, site.settings)
        assert taken.value.reason == "NameTaken"
        # Those of another installation, too.
        other = replace(site.settings, instance="another")
        await release.discard(engine, task, other)
        await release.remove_app(engine, 1, other)
        await release.discard(engine, task, site.settings)
        assert (await site.inspect(1))["Id"] == foreign
        assert await site.images() == []
    finally:
        await engine.containers.remove(foreign)


@pytest.mark.parametrize(
    ("script", "settings", "reason", "message"),
    [
        (
            "echo one; printf '\\033[31mThe database hunter2-0123 cannot be found.\\033[0m\\n\\n'; exit 3",
            {},
            "Crashed",
            # Without its seconds where the engine has begun to start it again.
            (
                r"^The app ended( after [0-9.]+ seconds)? with exit code 3;"
                r" its last line: The database \*\*\* cannot .*d\.$"
            ),
        ),
        ("echo one; tail /dev/zero", {"memory_bytes": 16 << 20}, "OutOfMemory", r"limit of 16 MiB"),
        (f"echo one; PORT=3000; {SERVE}", {}, "WrongPort", r"listens on port 8080, but something does on 3000:"),
        ("echo one; sleep 99", {}, "NotHealthy", r"Nothing listens on port 8080 within 2 seconds: .* not only on 127"),
        (
            f"echo one; {SERVE}",
            {"health_path": "/cgi-bin/bad"},
            "NotHealthy",
            r"^/cgi-bin/bad answers 500, within 2 seconds not anything between 200 and 399\.$",
        ),
    ],
)  # fmt: skip
async def test_an_app_that_does_not_come_up_is_told_why(
    site: Site, script: str, settings: dict[str, object], reason: str, message: str
) -> None:
    engine, deploy = site.owned.engine, replace(site.settings, probe_deadline=2.0)
    if reason in ("Crashed", "OutOfMemory"):
        deploy = site.settings
    task = site.task(1, AppSecrets(env={"PASSWORD": "hunter2-0123"}), **settings)
    container = await release.run(engine, task, await site.image(task, script), deploy)
    with pytest.raises(StepFailed, match=message) as failed:
        await release.probe(engine, task, container, deploy)
    assert failed.value.reason == reason
    assert "one\n" in site.log
    await release.discard(engine, task, deploy)
    assert (await site.containers(), await site.images()) == ([], [])


async def test_a_redirect_is_an_answer_and_the_path_may_have_a_query(site: Site) -> None:
    task = site.task(1, health_path="/cgi-bin/login?next=/")
    await site.deploy(task, await site.image(task))


async def test_an_image_that_speaks_to_traefik_is_refused(site: Site) -> None:
    task = site.task(1)
    image = await site.image(task, Labels={"traefik.http.routers.evil.rule": "Host(`bank.apps.test`)"})
    with pytest.raises(StepFailed, match=r"has the label traefik\.http\.routers\.evil\.rule") as refused:
        await release.run(site.owned.engine, task, image, site.settings)
    assert refused.value.reason == "ForbiddenLabels"
    assert await site.containers() == []


async def test_an_image_that_is_gone_is_told(site: Site) -> None:
    with pytest.raises(StepFailed, match=f"The image {site.task(9).tag} is gone") as gone:
        await release.run(site.owned.engine, site.task(9), Image(site.task(9).tag, "sha256:0"), site.settings)
    assert gone.value.reason == "ImageGone"


async def test_what_the_engine_does_not_take_is_told(site: Site) -> None:
    task = site.task(1, memory_bytes=1 << 20)
    with pytest.raises(StepFailed, match=r"The container does not start: .*[Mm]emory") as failed:
        await release.run(site.owned.engine, task, await site.image(task), site.settings)
    assert failed.value.reason == "StartFailed"
    assert await site.containers() == []


async def test_a_gate_tells_what_it_is_and_is_open_again_after_a_restart(site: Site) -> None:
    engine = site.owned.engine
    container = await site.deploy(site.task(1))
    await engine.json("POST", f"/containers/{container}/restart", params={"t": "0"})
    assert await health(site, container) in ("starting", "healthy")
    await asyncio.wait_for(gate.opens(engine, container), 30)
    await gate.swing(engine, container, opened=False)
    await asyncio.wait_for(gate.closes(engine, container), 30)
    await gate.swing(engine, container, opened=True)
    await asyncio.wait_for(gate.opens(engine, container), 30)
    # A check that waits is under way.
    await until(lambda: site.runs(container, "/.cluster-code/gate"))
    await engine.json("POST", f"/containers/{container}/pause")
    await engine.json("POST", f"/containers/{container}/unpause")
    await asyncio.wait_for(gate.opens(engine, container), 30)


async def test_a_gate_works_for_users_without_rights(site: Site) -> None:
    task = site.task(1)
    image = await site.image(task, f"cd /tmp && {SERVE}", User="65534:65534")
    container = await site.deploy(task, image)
    assert await health(site, container) == "healthy"


async def test_what_serves_stays_while_the_new_one_does_not_stay_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "STEADY", 1.0)
    monkeypatch.setattr(release, "_UNSTEADY", 2.0)
    engine, settings = site.owned.engine, site.settings
    await site.deploy(site.task(1))
    task = site.task(2)
    image = await site.image(task, "httpd -p $PORT -h /www; sleep 0.5; exit 1")
    await site.deploy(task, image, tidy=False)
    with pytest.raises(StepFailed, match="does not stay up"):
        await release.drain(engine, task, settings)
    await until(lambda: ended_or_starts(site))
    assert await health(site, 1) == "healthy"
    assert await site.containers() == [1, 2]


async def ended_or_starts(site: Site) -> bool:
    return not gate.is_open(await site.inspect(2))


async def test_only_the_newest_images_are_kept_and_that_which_runs(site: Site) -> None:
    for number in (1, 2, 3):
        await site.image(site.task(number))
    await site.deploy(site.task(4, keep_images=2))
    assert await site.images() == [3, 4]
    foreign = f"somebodys/{site.name}:3"
    await site.owned.engine.images.tag(site.task(3).tag, foreign)
    try:
        await site.deploy(site.task(5, keep_images=1))
        assert await site.images() == [5, foreign]
    finally:
        await site.owned.engine.images.remove(foreign)


def test_what_is_waited_for_is_what_traefik_takes_by_default() -> None:
    assert release.LETS_GO > 2.0
    assert DeploySettings().drain > 0
