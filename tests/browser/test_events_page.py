"""The page of live events, as a person uses it."""

from __future__ import annotations

import pytest
from playwright.async_api import Page, expect

from tests.browser.conftest import Stage
from tests.integration.endtoend.server import DEADLINE, PASSWORD

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]
expect.set_options(timeout=DEADLINE * 1000)


async def opened(stage: Stage) -> tuple[Page, list[str]]:
    """The page, and what its console complains of: the page's policy, above all."""
    page = await stage.context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(f"{stage.url}/")
    await page.get_by_role("link", name="Live events").click()
    return page, complaints


async def test_signed_in_by_password_one_sees_events_live_and_through_a_cut(stage: Stage) -> None:
    page, complaints = await opened(stage)
    await page.get_by_label("E-mail").fill("admin@localhost")
    await page.get_by_label("Password").fill("wrong")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("alert")).to_be_visible()
    assert complaints.pop().endswith("401 (Unauthorized)")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.locator("#state")).to_have_text("connected")
    await expect(page.get_by_role("alert")).to_be_hidden()
    await stage.publish(2)
    await expect(page.locator("tr.event")).to_have_count(2)

    stage.proxy.cut()
    await stage.publish(2)
    await expect(page.locator("tr.event")).to_have_count(4)
    rows = await page.locator("tr.event").all_inner_texts()
    assert [name for row in rows for name in stage.published if f'"{name}"' in row] == stage.published[::-1]
    await expect(page.locator("#reconnects")).to_have_text("1")
    await expect(page.locator("#count")).to_have_text("4")
    await expect(page.get_by_text("connected again, resuming after")).to_be_visible()

    await page.get_by_role("button", name="Disconnect").click()
    await expect(page.locator("#state")).to_have_text("disconnected")
    await page.get_by_role("button", name="Connect", exact=True).click()
    await expect(page.locator("#state")).to_have_text("connected")
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("Password")).to_be_visible()
    # Cut connections are told on the console by the browser itself.
    assert [text for text in complaints if "Content Security Policy" in text or "Error:" in text] == []
    await page.close()


async def test_with_a_token_one_chooses_channels_and_is_told_what_is_refused(stage: Stage) -> None:
    token = (await stage.client.call("POST", "/tokens", {"name": "page", "scopes": ["read"]}))["token"]
    page, complaints = await opened(stage)
    await page.get_by_label("Main or API token").fill(token)
    await page.get_by_role("button", name="Use the token").click()
    await expect(page.locator("#state")).to_have_text("connected")
    workspaces = await stage.client.call("GET", "/workspaces")
    channel = f"workspace:{workspaces['items'][0]['id']}"
    for name in (channel, "session:99"):
        await page.get_by_label("Channel", exact=True).fill(name)
        await page.get_by_role("button", name="Add").click()
    await expect(page.get_by_role("alert")).to_have_text("There is no such session.")
    await expect(page.get_by_text(f"subscribed to {channel}")).to_be_visible()
    await expect(page.locator("#channels li")).to_have_count(3)
    await page.get_by_role("button", name=f"Leave {channel}").click()
    await expect(page.locator("#channels li")).to_have_count(2)
    assert token not in await page.content()
    assert complaints == []
    await page.close()
