"""Processes on the test's own database and virtual host; none of them outlives its test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest_asyncio

from orchestrator.settings import DatabaseSettings
from tests.integration.processes.process import Process
from tests.rabbitmq import free_ports

Make = Callable[..., Process]


@pytest_asyncio.fixture
async def made(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes processes, and ends those that run when the test ends."""
    processes: list[Process] = []
    (folder := tmp_path / "logs").mkdir()

    def make(module: str, *arguments: str, **environment: str) -> Process:
        (port,) = free_ports(1)
        process = Process(
            folder, module, *arguments, **{"PORT": str(port), "ORCHESTRATOR_PORT": str(port), **environment}
        )
        processes.append(process)
        return process

    yield make
    for process in processes:
        if process.running:
            await process.kill()


@pytest_asyncio.fixture
async def make(made: Make, database_settings: DatabaseSettings, amqp_url: str, tmp_path: Path) -> Make:
    """The same, on the test's database and virtual host."""

    def make(module: str, *arguments: str, **environment: str) -> Process:
        given = {
            "DATABASE_URL": database_settings.url,
            "AMQP_URL": amqp_url,
            "DATA_DIR": str(tmp_path / "data"),
            **environment,
        }
        return made(module, *arguments, **given)

    return make
