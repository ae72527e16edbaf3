"""Schemathesis, an independent client that knows the OpenAPI document alone, against a running gateway."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from auth import projects
from auth.tokens import TokenSettings
from gateway.app import build, listening
from gateway.context import CONTEXT
from orchestrator.database import Pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.sessions import store
from orchestrator.settings import DatabaseSettings
from tests.integration.gateway.conftest import SECRET, SETTINGS, Api

# Not among them: what a schema cannot say (positive_data_acceptance: the last owner stays, a page beyond the 10,000th
# entry), and that what is deleted is gone (use_after_free: a deleted session can still be read).
CHECKS = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
    "ignored_auth",
]  # fmt: skip


# It waits for the end of each answer, which a stream of lines has not; and it would give its own account another
# password, which ends the token that it calls with.
CONFIG = """
[[operations]]
include-path = "/api/v1/users/{user_id}"
parameters = { user_id = 5 }

[[operations]]
include-path = "/api/v1/sessions/{session_id}/logs"
parameters = { follow = "false" }

[[operations]]
include-path = "/api/v1/deployments/{deployment_id}/logs"
parameters = { follow = "false" }
"""


# Seconds, of a machine that is busy with other things. On one that is not it takes half a minute, and one core.
DEADLINE = 900.0


# Not that it measures time: beside others it takes so long that all wait for it in the end.
@pytest.mark.late
@pytest.mark.random
@pytest.mark.timeout(DEADLINE + 60)
async def test_whatever_the_document_allows_is_answered_as_it_says(
    pool: Pool, database_settings: DatabaseSettings, tmp_path: Path
) -> None:
    log = MemoryLog()
    settings = replace(SETTINGS, port=0, rate_limit_hooks="", secrets_key=["k" * 43])
    app = build(settings, TokenSettings(secret=SECRET), pool, log, database_settings)
    api = Api(None, pool, app[CONTEXT])  # type: ignore[arg-type]
    await api.fetch(
        """WITH p AS (INSERT INTO providers (name, kind, is_default) VALUES ('here', 'local', true) RETURNING id)
           INSERT INTO machine_configs (name, provider_id, is_default) SELECT 'small', id, true FROM p"""
    )
    # Some to be deleted and disabled, lest the caller is; with a session each, for it may make another provider the
    # default before it makes one.
    for _ in range(20):
        person = await api.person()
        async with pool.acquire() as connection, connection.transaction():
            project = await projects.create(connection, person.workspace_id, name="site")
            await store.create(connection, project=project, user_id=person.id, provider=None, machine_config=None)
    root = await api.person(is_admin=True)
    # Its address is tried most.
    await api.fetch(
        """INSERT INTO apps (workspace_id, name, repo_url, settings) VALUES ($1, 'one', 'https://git.test/x', '{}')""",
        root.workspace_id,
    )
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    try:
        async with listening(app, app[CONTEXT].settings) as port:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/api/openapi.json",
                "--header", f"Authorization: Bearer {root.token}", "--checks", ",".join(CHECKS), "--no-color",
                # Each operation is reached by each phase: of what is random a little, since it is another each time.
                "--phases", "coverage,fuzzing,stateful", "--max-examples", "3", "--continue-on-failure",
                "--request-timeout", "120", "--suppress-health-check", "too_slow",
                cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)},
            )  # fmt: skip
            try:
                async with asyncio.timeout(DEADLINE):
                    output, _ = await process.communicate()
            except TimeoutError:
                process.kill()
                await process.wait()
                raise
    finally:
        await log.close()
    report = output.decode()
    print(report)
    assert process.returncode == 0, "see the report above: each failure with a curl command, and the seed"
    # It did reach what it should have: a caller that is signed in, and every operation.
    selected, tested = re.findall(r"(?:Selected|Tested): (\d+)", report)[:2]
    assert selected == tested
    assert await api.fetch("SELECT 1 FROM sessions WHERE desired <> 'running' LIMIT 1")
