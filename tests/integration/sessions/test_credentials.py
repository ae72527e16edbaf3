"""The credentials of providers, as orchestrators find them when they open these; and how soon they hear of a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import fleet, machine_changes
from orchestrator.machine_schema import ProviderSchema
from orchestrator.providers.contract import SessionRef
from tests.integration.sessions.conftest import Stage, until


async def state(stage: Stage, name: str) -> tuple[str, str]:
    (row,) = await stage.fetch("SELECT state, message FROM providers WHERE name = $1", name)
    return row["state"], row["message"]


async def put(stage: Stage, **given: Any) -> None:
    """Add a provider, as the API does."""
    async with stage.pool.acquire() as connection:
        await machine_changes.add_provider(connection, ProviderSchema().load({"kind": "docker", **given}))


async def test_a_change_is_taken_up_at_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing but the hint brings it about.
    monkeypatch.setattr(fleet, "CHECK_INTERVAL", 600.0)
    async with stage.running():
        await until(lambda: _is(stage, "staged", "up"))
        await put(stage, name="more", endpoint="tcp://203.0.113.7:2375")
        await until(lambda: _is(stage, "more", "up"))


async def _is(stage: Stage, name: str, wanted: str) -> bool:
    return (await state(stage, name))[0] == wanted


async def test_what_is_missing_is_told_and_taken_up_when_it_is_there(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "CHECK_INTERVAL", 0.05)
    file = tmp_path / "password"
    reference = {"registry.example.com": {"file": str(file)}}
    checks: list[SessionRef] = []

    async def checked(ref: SessionRef) -> None:
        checks.append(ref)

    stage.world.hooks["check"] = checked
    await put(stage, name="boxes", endpoint="tcp://203.0.113.7:2376", credentials=reference)
    async with stage.running():
        await until(lambda: _is(stage, "boxes", "down"))
        assert (await state(stage, "boxes"))[1] == (
            "The provider 'boxes' cannot be opened: its credential 'registry.example.com' is missing: "
            f"the file {file} cannot be read (No such file or directory)."
        )
        file.write_text("ann:first\n")
        await until(lambda: _is(stage, "boxes", "up"))
        assert stage.world.credentials["boxes"] == {"registry.example.com": "ann:first"}
        # Renewed where it lies, and away for a moment, in which the old one does.
        file.unlink()
        checks.clear()
        # Both are checked after each look at what they are opened with.
        await until(lambda: _checked(checks, 6))
        assert await _is(stage, "boxes", "up")
        file.write_text("ann:second\n")
        await until(lambda: _opened(stage, {"registry.example.com": "ann:second"}))
    kept = await stage.fetch("SELECT credentials::text, message FROM providers WHERE name = 'boxes'")
    assert [tuple(row) for row in kept] == [(f'{{"registry.example.com": {{"file": "{file}"}}}}', "")]


async def _checked(checks: list[SessionRef], times: int) -> bool:
    return len(checks) >= times


async def _opened(stage: Stage, credentials: dict[str, str]) -> bool:
    return stage.world.credentials["boxes"] == credentials
