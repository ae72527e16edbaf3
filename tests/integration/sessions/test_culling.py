"""What time ends."""

from __future__ import annotations

import pytest

from orchestrator.sessions import culling
from tests.integration.sessions.conftest import Stage


async def _cull(stage: Stage) -> dict[str, int]:
    async with stage.pool.acquire() as connection:
        return await culling.cull(connection, stage.settings)


async def test_a_session_whose_time_is_up_is_deleted_and_told_why(stage: Stage) -> None:
    session = await stage.create()
    kept = await stage.create(await stage.project("other"))
    await stage.execute("UPDATE sessions SET expires_at = now() WHERE id = $1", session.id)
    async with stage.running():
        await stage.until(session, "deleted")
        await stage.until(kept, "running")
    assert ("deleting", "Expired") in await stage.history(session)


async def test_expired_sessions_are_asked_to_go_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culling, "BATCH", 2)
    for number in range(5):
        await stage.create(await stage.project(f"p{number}"))
    await stage.execute("UPDATE sessions SET expires_at = now()")
    assert (await _cull(stage))["expired"] == 5
    assert (await _cull(stage))["expired"] == 0


async def test_deleted_sessions_are_kept_for_a_while(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culling, "BATCH", 2)
    sessions = [await stage.create(await stage.project(f"p{number}")) for number in range(6)]
    await stage.execute("UPDATE sessions SET status = 'deleted', desired = 'deleted', updated_at = now()")
    assert (await _cull(stage))["sessions"] == 0
    await stage.execute(
        "UPDATE sessions SET updated_at = now() - make_interval(secs => $1) WHERE id <> $2",
        stage.settings.deleted_retention + 1,
        sessions[0].id,
    )
    assert (await _cull(stage))["sessions"] == 5
    assert await stage.execute("SELECT count(*) FROM session_events") == 1


async def test_old_keys_and_tokens_are_forgotten(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culling, "BATCH", 2)
    for table, columns, values in (
        (
            "idempotency_keys",
            "user_id, key, request_hash, status, body, created_at",
            "$1, n::text, '', 200, '', moment",
        ),
        ("refresh_tokens", "user_id, family, token_hash, expires_at", "$1, gen_random_uuid(), n::text::bytea, moment"),
        ("spent_short_tokens", "jti, expires_at", "gen_random_uuid(), moment + ($1::bigint * interval '0')"),
    ):
        await stage.execute(
            f"""INSERT INTO {table} ({columns}) SELECT {values} FROM generate_series(1, 6) n,
                LATERAL (SELECT now() + CASE WHEN n > 5 THEN 1 ELSE -1 END * interval '25 hours' AS moment) m""",  # noqa: S608  The names above.
            stage.user_id,
        )
    counts = await _cull(stage)
    assert (counts["idempotency_keys"], counts["refresh_tokens"], counts["short_tokens"]) == (5, 5, 5)
    assert await stage.execute("SELECT count(*) FROM idempotency_keys") == 1
