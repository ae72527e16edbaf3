"""The data directory of the embedded mode: who holds it, where its server is, and the secrets that are kept there.

    lock          held (flock) by the one process that may run the database; the kernel lets go when that process dies
    dev.json      where the running server is; written when it is ready, removed when it ends
    jwt-secret    made on first use
    secrets-key   the same
    postgres/     the embedded database; run/ its socket

All of it is for its owner only.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import SettingsError


class InUse(SettingsError):
    """Another process holds the data directory."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready: its process, where it answers, and its database when that is the embedded one."""

    pid: int
    url: str
    database_url: str | None


class Instance:
    """One data directory. Methods raise SettingsError, one line, when the directory cannot be used."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._announcement = self.directory / "dev.json"

    @property
    def name(self) -> str:
        """What tells it from other data directories of this machine, and of others that share something with it."""
        where = f"{socket.gethostname()}:{self.directory}"
        return f"dev-{hashlib.sha256(where.encode()).hexdigest()[:12]}"

    @contextmanager
    def hold(self, who: str) -> Iterator[None]:
        """Be the only process that uses the directory. Raises InUse, naming the one that does."""
        with _readable_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(descriptor):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise InUse(f"DATA_DIR: {self.directory} is in use by {holder}")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{who} (pid {os.getpid()})\n".encode(), 0)
            self._announcement.unlink(missing_ok=True)  # Of a process that was killed.
            yield
        finally:
            os.close(descriptor)

    @property
    def held(self) -> bool:
        """Whether a process holds the directory now."""
        try:
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SettingsError(f"DATA_DIR: cannot use {self.directory}: {error.strerror}") from error
        try:
            return not _lock(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def announce(self, url: str, database_url: str | None) -> Iterator[None]:
        """Let other commands find the server that is ready now."""
        running = Running(os.getpid(), url, database_url)
        with _readable_errors(self.directory):
            _write_private(self._announcement, json.dumps(asdict(running)))
        try:
            yield
        finally:
            self._announcement.unlink(missing_ok=True)

    def running(self) -> Running | None:
        """The server that is ready, if there is one. What a killed process left behind does not count."""
        if not self.held:
            return None
        try:
            return Running(**json.loads(self._announcement.read_text()))
        except FileNotFoundError:
            return None  # It is starting or ending.
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(f"DATA_DIR: cannot read {self._announcement}: {error}") from error

    def jwt_secret(self) -> str:
        """The secret that signs tokens; made on first use."""
        return self._kept("jwt-secret", lambda: secrets.token_hex(32))

    def secrets_key(self) -> str:
        """The key that apps' secrets are encrypted with; made on first use."""
        return self._kept("secrets-key", lambda: base64.b64encode(secrets.token_bytes(32)).decode())

    def _kept(self, name: str, make: Callable[[], str]) -> str:
        path = self.directory / name
        with _readable_errors(self.directory):
            try:
                secret = path.read_text().strip()
            except FileNotFoundError:
                secret = make()
                _write_private(path, secret)
        return secret


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_private(path: Path, text: str) -> None:
    """Write a file whole or not at all, readable by its owner only."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


@contextmanager
def _readable_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(f"DATA_DIR: cannot use {directory}: {error.strerror}") from error
