"""The programs that tests run and that `tests/programs.sh` builds: where they are, once they are there."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

# Seconds that a build which is under way may still take.
_BUILD_DEADLINE = 1200.0


def program(name: str) -> str:
    """The path of `traefik` or `devpod`: what `TRAEFIK_BIN` or `DEVPOD_BIN` names, one that was built, one on the PATH.

    Waits for a build that is under way (blocking: a test that may have to wait has a timeout to match). Without any the
    test skips; where everything must be there it fails.
    """
    named = os.environ.get(f"{name.upper()}_BIN")
    if named:
        return named
    found = _built(name) or shutil.which(name)
    deadline = time.monotonic() + _BUILD_DEADLINE
    while found is None and _building() and time.monotonic() < deadline:
        time.sleep(1)
        found = _built(name)
    if found := found or _built(name):
        return found
    problem = f"There is no {name}: build one by tests/programs.sh (Go, 5 minutes), or name one by {name.upper()}_BIN."
    if os.environ.get("CI"):
        pytest.fail(problem, pytrace=False)
    pytest.skip(problem)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cluster-code-tests"


def _built(name: str) -> str | None:
    return max((str(path) for path in _folder().glob(f"{name}-v*")), default=None)


def _building() -> bool:
    """Whether `tests/programs.sh` runs: it holds the lock meanwhile."""
    with suppress(FileNotFoundError), (_folder() / "building").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
