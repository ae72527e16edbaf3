"""A real Docker engine, as our client sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.docker import labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderUnavailable
from tests.docker import Daemon, Owned, make_busybox, tar
from tests.integration.docker.forwarding import over_socket


def config(owned: Owned, image: str, script: str, **more: Any) -> dict[str, Any]:
    return {"Image": image, "Cmd": ["sh", "-c", script], "Labels": owned.labels, "StopTimeout": 1} | more


async def run(owned: Owned, image: str, script: str, **more: Any) -> str:
    container = await owned.engine.containers.create("", config(owned, image, script, **more))
    await owned.engine.containers.start(container)
    return container


async def said(engine: Engine, container: str, **options: Any) -> list[tuple[str, str]]:
    return [(stream, text) async for stream, _, text in engine.logs(container, **options)]


async def test_it_says_what_it_is(engine: Engine) -> None:
    info = await engine.info()
    assert info.os == "linux"
    assert info.arch in ("amd64", "arm64")
    assert info.cpus >= 1
    assert info.memory_bytes > 1 << 28
    assert info.root_dir.startswith("/")
    assert tuple(map(int, info.api_version.split("."))) >= (1, 41)


async def test_what_is_being_made_when_its_maker_is_cancelled_is_there_to_be_removed(
    owned: Owned, busybox: str
) -> None:
    engine, name = owned.engine, f"{owned.instance}-late"
    for making in (
        engine.containers.create(name, config(owned, busybox, "true")),
        engine.volumes.ensure(name, owned.labels),
    ):
        made: asyncio.Task[Any] = asyncio.create_task(making)
        await asyncio.sleep(0)
        made.cancel()
        await asyncio.wait({made})
        assert made.cancelled()
    assert await engine.containers.inspect(name)
    assert await engine.volumes.inspect(name)


async def test_several_that_need_a_network_at_once_make_one(owned: Owned) -> None:
    name = f"{owned.instance}-net"
    async with Engine(owned.engine.host) as other:
        made = [one.networks.ensure(name, owned.labels) for one in (owned.engine, other) * 2]
        await asyncio.gather(*made)
        assert len(await other.networks.list(owned.labels)) == 1
        assert (
            await owned.engine.networks.ensure(name, owned.labels) == (await other.networks.inspect(name) or {})["Id"]
        )


async def test_a_container_lives_and_every_step_can_be_done_twice(owned: Owned, busybox: str) -> None:
    containers = owned.engine.containers
    name = f"{owned.instance}-one"
    container = await containers.create(name, config(owned, busybox, "sleep 1000"))
    for _ in range(2):
        await containers.start(container)
    found = await containers.inspect(name)
    assert found is not None
    assert (found["Id"], found["State"]["Running"]) == (container, True)
    with pytest.raises(EngineRefused) as taken:
        await containers.create(name, config(owned, busybox, "true"))
    assert taken.value.status == 409
    await containers.update(container, {"PidsLimit": 99})
    await containers.rename(container, f"{name}-more")
    assert [one["Names"] for one in await containers.list(owned.labels, all=False)] == [[f"/{name}-more"]]
    await containers.kill(container)
    assert await containers.wait(container) == 137
    assert await containers.list(owned.labels, all=False) == []
    for _ in range(2):
        await containers.kill(container)
        await containers.stop(container, 0)
    for _ in range(2):
        await containers.remove(container)
        await containers.stop(container, 0)
        await containers.kill(container)
    assert await containers.inspect(container) is None
    assert await containers.list(owned.labels) == []


async def test_what_the_engine_refuses_is_told_in_its_words(owned: Owned) -> None:
    with pytest.raises(EngineRefused, match="No such image: nobody/has:this") as refused:
        await owned.engine.containers.create("", config(owned, "nobody/has:this", "true"))
    assert refused.value.status == 404
    with pytest.raises(EngineRefused, match="No such container"):
        await owned.engine.containers.start("nobody")
    with pytest.raises(EngineRefused, match="No such container"):
        await said(owned.engine, "nobody")


async def test_logs_have_lines_of_any_size_by_stream_and_time(owned: Owned, busybox: str) -> None:
    script = (
        "echo one; printf 'a\\000b\\377c\\n'; echo; echo err >&2; head -c 100000 /dev/zero | tr '\\0' x; echo;"
        "head -c 1500000 /dev/zero | tr '\\0' y; echo; printf end"
    )
    container = await run(owned, busybox, script)
    lines = [line async for line in owned.engine.logs(container, follow=True)]
    assert [text for stream, _, text in lines if stream == "stderr"] == ["err"]
    out = [text for stream, _, text in lines if stream == "stdout"]
    assert out[:3] == ["one", "a\ufffdb\ufffdc", ""]
    assert out[3] == "x" * 100_000
    assert out[4] == "y" * (1 << 20)
    assert out[5:] == ["end"]
    times = [at for stream, at, _ in lines if stream == "stdout"]
    assert times == sorted(times)
    # Whoever resumes gets what was written since.
    assert ("stdout", "end") in await said(owned.engine, container, since=times[-1])
    assert ("stdout", "end") not in await said(owned.engine, container, since=times[-1] + timedelta(seconds=1))
    assert len(await said(owned.engine, container, tail=1)) == 1


async def test_a_terminal_has_lines_too(owned: Owned, busybox: str) -> None:
    script = "echo one; echo two >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf end"
    container = await run(owned, busybox, script, Tty=True)
    lines = await said(owned.engine, container, follow=True)
    assert lines == [("stdout", text) for text in ("one", "two", "x" * 40_000, "end")]


async def test_logs_are_followed_as_they_are_written(owned: Owned, busybox: str) -> None:
    container = await run(owned, busybox, "echo one; until [ -e /go ]; do sleep 0.05; done; echo two")
    async with aclosing(owned.engine.logs(container, follow=True)) as lines, asyncio.timeout(30):
        assert (await anext(lines))[2] == "one"
        await owned.engine.containers.exec(container, ["touch", "/go"])
        assert (await anext(lines))[2] == "two"
        with pytest.raises(StopAsyncIteration):
            await anext(lines)


async def test_commands_run_in_containers(owned: Owned, busybox: str) -> None:
    container = await run(owned, busybox, "sleep 1000")
    script = "echo $A $(id -u); echo err >&2; exit 3"
    code, output = await owned.engine.containers.exec(container, ["sh", "-c", script], env={"A": "b"}, user="65534")
    assert code == 3
    assert sorted(output.split(b"\n")) == [b"", b"b 65534", b"err"]
    code, output = await owned.engine.containers.exec(container, ["sh", "-c", "head -c 2000000 /dev/zero"])
    assert (code, len(output)) == (0, 1 << 20)
    code, output = await owned.engine.containers.exec(container, ["nothing"])
    assert (code, b"nothing" in output) == (126, True) or code == 127
    with pytest.raises(ProviderUnavailable, match=r"did not end within 0\.5 seconds"):
        await owned.engine.containers.exec(container, ["sleep", "1000"], timeout=0.5)


async def test_archives_are_unpacked_into_containers(owned: Owned, busybox: str) -> None:
    content = tar({"large": bytes(3 << 20), "small": "text"})

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(content), 1 << 20):
            yield content[at : at + (1 << 20)]

    async def broken() -> AsyncIterator[bytes]:
        yield content[: 1 << 20]
        raise KeyError("a fault of the archive's own")

    container = await owned.engine.containers.create("", config(owned, busybox, "wc -c /tmp/*; cat /root/small"))
    await owned.engine.containers.put_archive(container, "/tmp", pieces())
    await owned.engine.containers.put_archive(container, "/root", content)
    with pytest.raises(KeyError):
        await owned.engine.containers.put_archive(container, "/etc", broken())
    with pytest.raises(EngineRefused):
        await owned.engine.containers.put_archive(container, "/nowhere", content)
    await owned.engine.containers.start(container)
    lines = [text.split() for _, text in await said(owned.engine, container, follow=True)]
    assert lines == [["3145728", "/tmp/large"], ["4", "/tmp/small"], ["3145732", "total"], ["text"]]


async def test_networks_and_volumes_are_made_once_and_foreign_ones_refused(owned: Owned, busybox: str) -> None:
    networks, volumes = owned.engine.networks, owned.engine.volumes
    name = owned.instance
    network = await networks.ensure(name, owned.labels)
    assert await networks.ensure(name, owned.labels) == network
    assert [one["Id"] for one in await networks.list(owned.labels)] == [network]
    container = await run(owned, busybox, "sleep 1000")
    for _ in range(2):
        await networks.connect(network, container, aliases=["web"])
    found = await networks.inspect(network)
    assert found is not None
    assert list(found["Containers"]) == [container]
    for _ in range(2):
        await networks.disconnect(network, container)
    with pytest.raises(EngineRefused, match=f"There is a network {name} already that is not ours"):
        await networks.ensure(name, {**owned.labels, "more": "1"})
    for _ in range(2):
        await networks.remove(network)
    assert await networks.inspect(network) is None

    assert (await volumes.ensure(name, owned.labels))["Name"] == name
    assert (await volumes.ensure(name, owned.labels))["Name"] == name
    assert [one["Name"] for one in await volumes.list(owned.labels)] == [name]
    with pytest.raises(EngineRefused, match=f"There is a volume {name} already that is not ours"):
        await volumes.ensure(name, {**owned.labels, "more": "1"})
    for _ in range(2):
        await volumes.remove(name)
    assert await volumes.inspect(name) is None


async def test_events_are_told_as_they_happen_from_where_one_left_off(owned: Owned, busybox: str) -> None:
    since = await owned.engine.now()
    container = await run(owned, busybox, "true")
    filters = {"container": [container]}
    async with asyncio.timeout(30), aclosing(owned.engine.events(since=since, filters=filters)) as events:
        assert await anext(events) == {"Type": "engine", "Action": "connected"}
        told = []
        while "die" not in told:
            told.append((await anext(events))["Action"])
        await owned.engine.containers.remove(container)
        while "destroy" not in told:
            told.append((await anext(events))["Action"])
    assert [action for action in told if action in ("create", "start", "die", "destroy")] == [
        "create", "start", "die", "destroy",
    ]  # fmt: skip
    again = await owned.engine.happened(since=since, until=await owned.engine.now(), filters=filters)
    assert [event["Action"] for event in again] == told


async def test_no_event_is_lost_or_told_twice_when_a_connection_breaks(
    owned: Owned, busybox: str, tmp_path: Path
) -> None:
    if not owned.engine.host.startswith("unix://"):
        pytest.skip("The engine has no socket here to be cut off from.")
    filters = {"label": labels.selectors(owned.labels), "event": ["create"]}
    made: list[str] = []

    async def make() -> None:
        made.append(await owned.engine.containers.create("", config(owned, busybox, "true")))

    target = owned.engine.host.removeprefix("unix://")
    async with (
        over_socket(target, tmp_path / "socket") as (host, forwarding),
        Engine(host) as engine,
        asyncio.timeout(60),
        aclosing(engine.events(filters=filters)) as events,
    ):
        told = []
        for _ in range(3):
            assert (await anext(events))["Action"] == "connected"
            for _ in range(2):
                await make()
            while len(told) < len(made):
                told.append((await anext(events))["Actor"]["ID"])
            forwarding.cut()
            await make()
            assert (await anext(events))["Action"] == "lost"
        assert (await anext(events))["Action"] == "connected"
        while len(told) < len(made):
            told.append((await anext(events))["Actor"]["ID"])
        assert told == made


async def test_events_go_on_over_a_restart_of_the_engine(dockerd: Daemon) -> None:
    async with Engine(dockerd.host) as engine, asyncio.timeout(60):
        await make_busybox(engine, "one:1")
        async with aclosing(engine.events()) as events:
            assert (await anext(events))["Action"] == "connected"
            made = []
            for _ in range(3):
                made.append(await engine.containers.create("", {"Image": "one:1", "Cmd": ["true"]}))
                event = await anext(events)
                assert (event["Action"], event["Actor"]["ID"]) == ("create", made[-1])
            dockerd.kill()
            lost = await anext(events)
            assert (lost["Type"], lost["Action"], dockerd.host in lost["message"]) == ("engine", "lost", True)
            await dockerd.start()
            made.append(await engine.containers.create("", {"Image": "one:1", "Cmd": ["true"]}))
            assert (await anext(events))["Action"] == "connected"
            # Also when it happened before we were there again; and nothing comes twice.
            event = await anext(events)
            assert (event["Action"], event["Actor"]["ID"]) == ("create", made[-1])


async def test_a_killed_engine_is_unavailable_and_then_there_again(dockerd: Daemon) -> None:
    async with Engine(dockerd.host) as engine:
        await make_busybox(engine, "one:1")
        command = ["sh", "-c", "trap exit TERM; echo a; sleep 1000 & wait"]
        container = await engine.containers.create("", {"Image": "one:1", "Cmd": command})
        await engine.containers.start(container)
        async with aclosing(engine.logs(container, follow=True)) as lines:
            await anext(lines)
            dockerd.kill()
            with pytest.raises(ProviderUnavailable, match=rf"^Docker at {dockerd.host} hung up"):
                await anext(lines)
        with pytest.raises(ProviderUnavailable, match=rf"^Docker at {dockerd.host} cannot be reached .*: start it"):
            await engine.info()
        await dockerd.start()
        assert await engine.images.inspect("one:1")


async def test_a_frozen_engine_is_not_waited_for(dockerd: Daemon) -> None:
    async with Engine(dockerd.host, timeout=0.5) as engine:
        await engine.info()
        dockerd.freeze()
        began = time.monotonic()
        with pytest.raises(ProviderUnavailable, match=r"did not answer within 0\.5 seconds"):
            await engine.containers.list()
        assert time.monotonic() < began + 10
        dockerd.thaw()
        async with asyncio.timeout(30):
            while True:
                try:
                    await engine.containers.list()
                    break
                except ProviderUnavailable:
                    continue
