"""What the sweep makes of an engine that does not agree with the database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.deployments import release, sweep
from orchestrator.deployments.contract import StepFailed
from orchestrator.docker import labels as marks
from tests.integration.deployments.conftest import KEYS, Place
from tests.integration.deployments.releasing import Site


async def live(place: Place, site: Site, **options: object) -> Site:
    """The site of an app in the database, whose one deployment serves."""
    app = await place.app(site.name, **options)
    deployment = await place.enqueue(app)
    there = replace(site, app_id=app.id)
    task = there.task(deployment.id)
    image = await there.image(task)
    await there.deploy(task, image)
    columns = {"status": "live", "image": image.name, "image_id": image.id, "container": "shop"}
    await place.set(deployment, **columns, finished_at=deployment.created_at)
    return there


async def swept(place: Place, site: Site) -> None:
    await sweep.sweep(site.owned.engine, place.pool, KEYS, site.settings)


async def test_leftovers_go_and_what_serves_stays(place: Place, site: Site) -> None:
    shop = await live(place, site, keep_images=1)
    [serving] = await shop.containers()
    engine = site.owned.engine
    left = [shop.task(900), replace(shop, app_id=77, name=f"gone-{site.name}").task(901)]
    sites = [shop, replace(shop, app_id=77, name=f"gone-{site.name}")]
    for one, task in zip(sites, left, strict=True):
        await release.run(engine, task, await one.image(task), site.settings)
    foreign = await engine.containers.create(
        "",
        {
            "Image": site.base,
            "Cmd": ["true"],
            "Labels": {marks.INSTANCE: "another", marks.APP: "77", marks.DEPLOYMENT: "901"},
        },
    )
    try:
        await swept(place, site)
        assert [await one.containers() for one in sites] == [[serving], []]
        assert await sites[1].images() == []
        assert await shop.images() == [serving]
        assert await engine.containers.inspect(foreign)
        before = await shop.inspect(serving)
        await swept(place, site)
        assert await shop.inspect(serving) == before
    finally:
        await engine.containers.remove(foreign)


async def test_images_of_what_failed_go_and_what_has_gone_is_known(place: Place, site: Site) -> None:
    shop = await live(place, site, keep_images=2)
    [serving] = await shop.containers()
    # Its worker could not remove it.
    await shop.image(shop.task(901))
    app = await place.app(f"bank-{site.name}", keep_images=2)
    retired = await place.enqueue(app)
    bank = replace(site, app_id=retired.app_id, name=f"bank-{site.name}")
    image = await bank.image(bank.task(retired.id))
    columns = {"image": image.name, "image_id": image.id, "finished_at": retired.created_at}
    await place.set(retired, status="retired", **columns)
    await swept(place, site)
    assert await shop.images() == [serving]
    assert await bank.images() == [retired.id]
    newer = await place.enqueue(app)
    second = await bank.image(bank.task(newer.id))
    await place.set(newer, status="retired", **columns | {"image": second.name, "image_id": second.id})
    await place.pool.execute("UPDATE apps SET settings = settings || '{\"keep_images\": 1}'")
    await swept(place, site)
    assert await bank.images() == [newer.id]
    rows = await place.pool.fetch("SELECT image FROM deployments WHERE app_id = $1 ORDER BY id", bank.app_id)
    assert [row["image"] for row in rows] == [None, second.name]


async def test_what_serves_and_is_gone_runs_again(place: Place, site: Site) -> None:
    shop = await live(place, site)
    [serving] = await shop.containers()
    await site.owned.engine.containers.remove(f"{shop.name}-{serving}")
    await swept(place, site)
    assert await shop.containers() == [serving]
    again = await shop.inspect(serving)
    assert again["State"]["Health"]["Status"] == "healthy"
    # One that runs, and whose gate somebody was about to open.
    await release.gate.swing(site.owned.engine, again["Id"], opened=False)
    await release.gate.closes(site.owned.engine, again["Id"])
    await swept(place, site)
    seen = await shop.inspect(serving)
    assert (seen["Id"], seen["State"]["Health"]["Status"]) == (again["Id"], "healthy")


async def test_an_app_that_somebody_works_on_is_left_alone(place: Place, site: Site) -> None:
    shop = await live(place, site)
    deployment = await place.enqueue(await place.app(f"bank-{site.name}"))
    await place.set(deployment, status="deploying")
    bank = replace(site, app_id=deployment.app_id, name=f"bank-{site.name}")
    await bank.deploy(bank.task(deployment.id), tidy=False)
    await swept(place, site)
    assert await bank.containers() == [deployment.id]
    assert len(await shop.containers()) == 1


async def test_what_serves_beside_a_live_one_that_does_not_is_not_taken_away(place: Place, site: Site) -> None:
    shop = await live(place, site)
    [newest] = await shop.containers()
    before = shop.task(newest - 1)
    await shop.deploy(before, tidy=False)
    await site.owned.engine.containers.stop(f"{shop.name}-{newest}", 0)
    await swept(place, site)
    assert await shop.containers() == [newest - 1, newest]
    # But that one was started again.
    assert (await shop.inspect(newest))["State"]["Health"]["Status"] == "healthy"
    await swept(place, site)
    assert await shop.containers() == [newest]


async def test_a_build_needs_room(site: Site) -> None:
    await sweep.require_room(site.owned.engine, replace(site.settings, free_bytes=1))
    with pytest.raises(StepFailed, match=r"^The Docker engine's disk has [0-9.]+ GiB free, and a build needs") as full:
        await sweep.require_room(site.owned.engine, replace(site.settings, free_bytes=1 << 60))
    assert full.value.reason == "DiskFull"
