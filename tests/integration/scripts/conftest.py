"""Commands as the shell runs them, on a database of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import structlog

from scripts import main

SECRET = "0123456789abcdefghijklmnopqrstuvwxyz"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs a command as the shell would; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JWT_SECRET", SECRET)

    def run(*arguments: str, given: str | None = None) -> tuple[int, str, str]:
        if given is not None:
            file = tmp_path / "given"
            file.write_text(given)
            with file.open() as stream:
                monkeypatch.setattr("sys.stdin", stream)
                code = _exit_code(arguments)
        else:
            code = _exit_code(arguments)
        output, errors = capsys.readouterr()
        return code, output, errors

    before = logging.getLogger().handlers[:], logging.getLogger().level
    yield run
    structlog.reset_defaults()
    logging.getLogger().handlers[:], logging.getLogger().level = before


def _exit_code(arguments: tuple[str, ...]) -> int:
    try:
        return main.run(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def fetch(database_url: str) -> Iterator[Callable[[str], list[tuple[object, ...]]]]:
    """The rows that a query gives."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield lambda query: connection.execute(query).fetchall()


Fetch = Callable[[str], list[tuple[object, ...]]]
