"""The directory of a local provider: who holds it, and the files of each session.

    {directory}/local.lock      held while a provider uses the directory
    {directory}/instance        what its processes are marked with
    {directory}/leaders.json    whose processes may be left when we are killed (`leaders`)
    {directory}/sessions/7/     workspace/  home/  tmp/  session.json
    {directory}/sessions/.gone-7-…   on its way out

Everything here blocks for the disk: call it in a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from orchestrator.errors import ProviderUnavailable

# Seconds that removing a session's files may take; what is left then is removed by the next attempt.
_REMOVE_DEADLINE = 120.0
# Seconds. A process that was killed holds its lock until its last thread has ended, and its children until they exec.
_LOCK_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class SessionFiles:
    """Where a session keeps its files."""

    root: Path

    @property
    def workspace(self) -> Path:
        """The clone: the user's. It is there only when it is whole."""
        return self.root / "workspace"

    @property
    def incoming(self) -> Path:
        """The clone while it is being made."""
        return self.root / "workspace.incoming"

    @property
    def home(self) -> Path:
        """HOME of the session's processes."""
        return self.root / "home"

    @property
    def tmp(self) -> Path:
        """TMPDIR of the session's processes."""
        return self.root / "tmp"

    def prepare(self) -> None:
        """Make the directories, and clear away what a killed start has left."""
        self.root.mkdir(mode=0o700, exist_ok=True)
        self.home.mkdir(mode=0o700, exist_ok=True)
        self.tmp.mkdir(mode=0o700, exist_ok=True)
        remove_tree(self.incoming)

    @property
    def has_work(self) -> bool:
        """Whether there is a workspace with anything in it."""
        return self.workspace.is_dir() and any(self.workspace.iterdir())

    def adopt(self) -> None:
        """The incoming clone is whole: make it the workspace, in one step."""
        self.incoming.rename(self.workspace)

    def read_state(self) -> dict[str, Any]:
        """What `write_state` wrote, or nothing."""
        try:
            state = json.loads((self.root / "session.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def write_state(self, **state: Any) -> None:
        """Remember where the workspace came from. Nothing secret."""
        new = self.root / "session.json.new"
        new.write_text(json.dumps(state))
        new.replace(self.root / "session.json")


class Directory:
    """The directory of one provider, held by at most one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.instance = ""
        self._lock: int | None = None

    @property
    def _sessions(self) -> Path:
        return self.path / "sessions"

    def files(self, session_id: int) -> SessionFiles:
        """The place of a session. An id that is no number would lead elsewhere: ValueError."""
        if type(session_id) is not int or session_id < 1:
            raise ValueError(f"a session's id must be a positive number, not {session_id!r}")
        return SessionFiles(self._sessions / str(session_id))

    def hold(self) -> None:
        """Take hold of the directory, making it if need be. Raises ProviderUnavailable, saying why."""
        try:
            self._sessions.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path / "local.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ProviderUnavailable(
                f"Local sessions cannot keep their files in {self.path}: {error.strerror}. Set DATA_DIR."
            ) from error
        try:
            _lock(lock)
            self.instance = self._identity()
        except BlockingIOError as error:
            os.close(lock)
            raise ProviderUnavailable(
                f"Another process runs local sessions in {self.path}: stop it, or set another DATA_DIR."
            ) from error
        except OSError as error:
            os.close(lock)
            raise ProviderUnavailable(f"{self.path} cannot be used: {error.strerror}.") from error
        self._lock = lock

    def release(self) -> None:
        """Let another process take hold."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """Raise ProviderUnavailable when files can no longer be written."""
        if not os.access(self._sessions, os.W_OK | os.X_OK):
            raise ProviderUnavailable(f"Local sessions cannot write to {self._sessions}: see its owner and its disk.")

    def clear(self) -> None:
        """Remove all files of all sessions. Raises ProviderUnavailable when something cannot be removed."""
        for root in self._sessions.iterdir():
            remove_tree(root)

    def remove(self, session_id: int) -> None:
        """Remove all files of a session, whatever their modes; symbolic links are not followed.

        Raises ProviderUnavailable when something cannot be removed.
        """
        root = self.files(session_id).root
        try:
            # First out of the way, so that what is half removed is never taken for a session.
            root.rename(self._sessions / f".gone-{session_id}-{uuid4().hex}")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ProviderUnavailable(f"{root} cannot be removed: {error.strerror}.") from error
        for gone in self._sessions.glob(f".gone-{session_id}-*"):
            remove_tree(gone)

    def _identity(self) -> str:
        """The same for this directory at every start, and different for a copy of it."""
        path = self.path / "instance"
        if not path.exists() or not path.read_text().strip():
            new = self.path / "instance.new"
            new.write_text(uuid4().hex)
            new.replace(path)
        place = self.path.stat()
        return hashlib.sha256(f"{path.read_text().strip()} {place.st_dev} {place.st_ino}".encode()).hexdigest()[:32]


def _lock(file: int) -> None:
    """Lock it; raises BlockingIOError when another process goes on holding it."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def remove_tree(path: Path) -> None:
    """Remove a file or a directory with all in it. Raises ProviderUnavailable.

    By rm(1), which follows no link, stays on its file system, and knows no depth or name that is too long.
    """
    if not os.path.lexists(path):
        return
    if _run("rm", "-rf", "--one-file-system", "--", str(path)) is None:
        return
    if not path.is_symlink():
        _run("chmod", "-R", "u+rwX", "--", str(path))
    if wrong := _run("rm", "-rf", "--one-file-system", "--", str(path)):
        raise ProviderUnavailable(f"{path} cannot be removed: {wrong}")


def _run(*argv: str) -> str | None:
    """None when the command succeeded, else the first line of what it said."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_REMOVE_DEADLINE, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired:
        return f"it takes longer than {_REMOVE_DEADLINE:.0f} s."
    if done.returncode == 0:
        return None
    return done.stderr.decode(errors="replace").partition("\n")[0] or f"exit code {done.returncode}."
