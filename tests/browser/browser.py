"""A headless Chromium, driven by Playwright: Debian's or the system's own, nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import BrowserContext, async_playwright

HOW_TO_GET_ONE = "no Chromium: install one (apt install chromium), or name one by CHROMIUM"
_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# A browser that talks to nobody but us. What is hidden must count as hidden, as it does for people.
_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
# Playwright keeps pages out of the back-forward cache, and awake in the background; both are what is tested.
_UNWANTED = [
    "--disable-back-forward-cache",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
]


def executable() -> str:
    """Where it is. Skips the test when there is none; with CI set, fails it."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if found:
        return found
    if os.environ.get("CI"):
        pytest.fail(HOW_TO_GET_ONE, pytrace=False)
    pytest.skip(HOW_TO_GET_ONE)


@asynccontextmanager
async def chromium() -> AsyncIterator[BrowserContext]:
    """A browser with a profile of its own, ended with all of its processes."""
    path = executable()
    with tempfile.TemporaryDirectory(prefix="cc-chromium-", ignore_cleanup_errors=True) as profile:
        async with async_playwright() as playwright:
            context = await playwright.chromium.launch_persistent_context(
                profile,
                executable_path=path,
                headless=True,
                args=[*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])],
                ignore_default_args=_UNWANTED,
                chromium_sandbox=os.geteuid() != 0,
                env={**os.environ, "HOME": profile},
                viewport={"width": 1200, "height": 800},
            )
            try:
                yield context
            finally:
                await context.close()
