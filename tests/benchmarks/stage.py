"""What the benchmarks measure: the real server in a process of its own, on a database filled as each needs it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import asyncpg
import psutil

from auth.tokens import Tokens, TokenSettings

SECRET = "benchmarks-use-a-secret-of-their-own-0123456789"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it listens, and its process, whose CPU time the operating system tells."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """User and system seconds that the process itself has used so far; its children are not counted."""
        times = self.process.cpu_times()
        return times.user + times.system

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def on(cores: frozenset[int], argv: Sequence[str], *, death_signal: str = "KILL") -> list[str]:
    """The command on these cores (none: on any), ended by that signal when this process dies, even by -9.

    The signal comes when the thread ends that starts it: let that be the main one.
    """
    pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))] if cores else []
    return ["setpriv", "--pdeathsig", death_signal, "--", *pinned, *argv]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main_token(user_id: int) -> str:
    """A main token that the servers of this module believe."""
    return Tokens(TokenSettings(secret=SECRET)).issue_main(user_id, expires_in=7200)


@asynccontextmanager
async def serve(argv: list[str], *, ready: str, port: int, env: dict[str, str] | None = None) -> AsyncIterator[Server]:
    """Run a server until its `ready` path answers 200; it is ended, politely, with the body."""
    child = subprocess.Popen(  # noqa: ASYNC220  Starting takes a millisecond.
        on(frozenset(), argv, death_signal="TERM"),
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession() as client, asyncio.timeout(60):
            while True:
                if child.poll() is not None:
                    raise SystemExit(f"{argv} ended with {child.returncode}")
                try:
                    async with client.get(f"http://127.0.0.1:{port}{ready}") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)
        yield Server(port, psutil.Process(child.pid))
    finally:
        child.terminate()
        await asyncio.to_thread(child.wait, 30)


def cluster_code(database_url: str, data_dir: Path) -> tuple[list[str], int, dict[str, str]]:
    """The command, the port and the environment of our own server, without rate limits."""
    port = free_port()
    return (
        [sys.executable, "-m", "scripts.main", "dev"],
        port,
        {
            "DATABASE_URL": database_url,
            "DATA_DIR": str(data_dir),
            "PORT": str(port),
            "JWT_SECRET": SECRET,
            "RATE_LIMIT_ADDRESS": "1000000/second",
            "RATE_LIMIT_USER": "1000000/second",
            "LOG_LEVEL": "warning",
        },
    )


async def fill(connection: asyncpg.Connection, *, sessions: int, crowd: int = 0) -> int:
    """One user with a workspace of `sessions` stopped sessions, and `crowd` other sessions, 100 a workspace.

    Returns the user's id. Nothing wants these sessions to run, so that no orchestrator touches them.
    """
    async with connection.transaction():
        provider = await connection.fetchval(
            """INSERT INTO providers (name, kind, enabled) VALUES ('nowhere', 'local', false)
               ON CONFLICT (name) DO UPDATE SET enabled = false RETURNING id"""
        )
        user = await connection.fetchval(
            "INSERT INTO users (email, name) VALUES (gen_random_uuid() || '@example.test', 'Bench') RETURNING id"
        )
        await connection.execute(
            """WITH made AS (INSERT INTO workspaces (name, personal_user_id) VALUES ('bench', $1) RETURNING id)
               INSERT INTO workspace_members (workspace_id, user_id, role) SELECT id, $1, 'owner' FROM made""",
            user,
        )
        await _sessions(connection, "SELECT id FROM workspaces WHERE personal_user_id = $3", user, provider, sessions)
        if crowd:
            await connection.execute(
                "INSERT INTO workspaces (name) SELECT 'crowd' FROM generate_series(1, $1)", max(1, crowd // 100)
            )
            await _sessions(
                connection,
                "SELECT id FROM workspaces WHERE name = 'crowd' AND $3::bigint IS NOT NULL",
                user,
                provider,
                crowd,
            )
    await connection.execute("VACUUM ANALYZE", timeout=600)
    return int(user)


async def _sessions(connection: asyncpg.Connection, workspaces: str, user: int, provider: int, count: int) -> None:
    await connection.execute(
        f"""WITH place AS (SELECT array_agg(id) AS ids FROM ({workspaces}) AS found),
                 made AS (INSERT INTO projects (workspace_id, name, created_by)
                          SELECT ids[1 + n % array_length(ids, 1)], 'project', $3
                            FROM place, generate_series(1, $1::bigint) AS n
                       RETURNING id, uuid, workspace_id)
            INSERT INTO sessions (project_id, project_uuid, workspace_id, user_id, provider_id, provider,
                                  machine_config, machine, namespace, container_name, desired, status,
                                  observed_generation, expires_at)
            SELECT id, uuid, workspace_id, $3, $2, 'nowhere', 'small', '{{}}', uuid::text, 'session', 'stopped',
                   'stopped', 1, now() + interval '1 year'
              FROM made""",  # noqa: S608  The text inserted is one of the two above.
        count,
        provider,
        user,
        timeout=600,
    )
