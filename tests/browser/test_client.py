"""cluster-code.js in a real browser, against a real server: what it shows through cuts, freezes and navigation."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.browser.conftest import Stage

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


async def test_through_cuts_at_any_moment_it_shows_each_event_once_in_order(stage: Stage) -> None:
    app = await stage.open()
    for _ in range(4):
        await stage.publish(3)
        stage.proxy.cut()
        await stage.publish(2)
    await app.has_all()
    assert (await app.state("states")).count("connected") > 1
    await app.page.close()


async def test_without_a_network_it_waits_and_then_has_what_it_missed(stage: Stage) -> None:
    app = await stage.open()
    await stage.proxy.refuse()
    stage.proxy.cut()
    await stage.publish(3)
    await app.until("app.states.filter((state) => state === 'waiting').length >= 2")
    await stage.proxy.resume()
    # As the browser says it when the network is back.
    await app.page.evaluate("dispatchEvent(new Event('online'))")
    await stage.publish(2)
    await app.has_all()
    await app.page.close()


async def test_a_network_that_falls_silent_is_noticed_by_asking(stage: Stage) -> None:
    app = await stage.open()
    stage.proxy.freeze()
    await stage.publish(3)
    await app.page.evaluate("dispatchEvent(new Event('online'))")
    await app.until("app.states.includes('waiting')")
    await stage.proxy.resume()
    await stage.publish(2)
    await app.has_all()
    await app.page.close()


async def test_a_server_that_is_frozen_and_thawed_loses_nothing(stage: Stage) -> None:
    app = await stage.open()
    await stage.publish(2)
    # What still came after the question would answer it.
    await app.has_all()
    stage.server.signal(signal.SIGSTOP)
    try:
        await app.page.evaluate("dispatchEvent(new Event('online'))")
        await app.until("app.states.includes('waiting')")
    finally:
        stage.server.signal(signal.SIGCONT)
    await stage.publish(3)
    await app.has_all()
    await app.page.close()


async def test_a_tab_in_the_background_has_it_all(stage: Stage) -> None:
    app = await stage.open()
    protocol = await stage.context.new_cdp_session(app.page)
    other = await stage.context.new_page()
    await other.bring_to_front()
    await stage.publish(2)
    await app.has_all()
    # What Chromium does to a tab that was in the background for long.
    await protocol.send("Page.setWebLifecycleState", {"state": "frozen"})
    await stage.publish(3)
    stage.proxy.cut()
    await stage.publish(2)
    await protocol.send("Page.setWebLifecycleState", {"state": "active"})
    await app.page.bring_to_front()
    await app.has_all()
    await other.close()
    await app.page.close()


async def test_a_page_that_stood_still_has_it_all_when_it_goes_on(stage: Stage) -> None:
    app = await stage.open()
    renderers = [one for one in psutil.Process().children(recursive=True) if "--type=renderer" in one.cmdline()]
    assert renderers
    for renderer in renderers:
        renderer.suspend()
    try:
        await stage.publish(3)
        stage.proxy.cut()
        await stage.publish(2)
    finally:
        for renderer in renderers:
            renderer.resume()
    await stage.publish(1)
    await app.has_all()
    await app.page.close()


async def test_back_from_the_back_forward_cache_it_resumes(stage: Stage) -> None:
    app = await stage.open()
    await stage.publish(2)
    await app.has_all()
    await app.page.goto(f"{stage.url}/api/docs")
    await stage.publish(3)
    await app.page.go_back(wait_until="commit")
    await app.until("window.app !== undefined")
    assert await app.state("persisted") is True
    await stage.publish(1)
    await app.has_all()
    assert "paused" in await app.state("states")
    await app.page.close()


async def test_connect_close_and_page_events_at_once_never_make_two_sockets(stage: Stage) -> None:
    app = await stage.open()
    publishing = asyncio.create_task(stage.publish(10))
    await app.page.evaluate(
        """async () => {
          const client = app.client;
          for (let round = 0; round < 40; round++) {
            for (const step of [() => client.close(), () => client.connect(), () => dispatchEvent(new Event("online")),
              () => document.dispatchEvent(new Event("visibilitychange"))])
              if (Math.random() < 0.7) step();
            await new Promise((resolve) => setTimeout(resolve, Math.random() * 60));
          }
          client.connect();
        }"""
    )
    await publishing
    await app.has_all()
    await app.page.close()


async def test_one_channel_that_is_refused_takes_no_other_with_it(stage: Stage) -> None:
    app = await stage.open()
    workspaces = await stage.client.call("GET", "/workspaces")
    channel = f"workspace:{workspaces['items'][0]['id']}"
    # Both are asked for in the handshake, which is refused for one of them without the browser saying why.
    await app.page.evaluate(
        """async ([token, channel]) => {
          const { ClusterCode, swap } = await import("/static/cluster-code.js");
          app.client.close();
          app.client = new ClusterCode({ auth: swap(token) });
          app.client.on("error", (error) => app.errors.push(`${error.channel}: ${error.message}`));
          app.client.subscribe("session:99");
          app.client.subscribe(channel);
          app.client.connect();
        }""",
        [stage.client._token, channel],
    )
    await app.until("app.errors.includes('session:99: There is no such session.')")
    await app.until("app.client.state === 'connected'")
    assert await app.state("client.channels") == [channel]
    await app.page.evaluate("app.client.close()")
    await app.page.close()


async def test_closed_it_leaves_no_socket_and_no_attempt(stage: Stage) -> None:
    app = await stage.open()
    await app.page.evaluate("app.client.close()")
    await app.until("app.sockets.every(({ readyState }) => readyState === 3)")
    assert await app.state("states") == ["connecting", "connected", "closed"]
    await app.page.close()


async def test_a_log_that_begins_anew_is_told_to_the_app(stage: Stage) -> None:
    app = await stage.open()
    await stage.publish(1)
    await app.has_all()
    # In the embedded mode the log lies in memory.
    assert await stage.server.stop() == 0
    await stage.server.start()
    await app.until("app.lost.length > 0")
    (lost,) = await app.state("lost")
    assert lost["position"] == (await app.state("client.position"))
    await stage.publish(1)
    await app.until("app.names.length === 2")
    assert await app.state("names") == stage.published[-2:]
    await app.page.close()


async def test_a_gateway_that_restarts_or_is_killed_loses_nothing(start: Callable[..., Any], amqp_url: str) -> None:
    stage = await start(AMQP_URL=amqp_url)
    app = await stage.open()
    await stage.publish(3)
    assert await stage.server.stop() == 0
    await stage.server.start()
    await stage.publish(2)
    await stage.server.kill()
    await stage.server.start()
    await stage.publish(2)
    await app.has_all()
    await app.page.close()
    assert await stage.server.stop() == 0
