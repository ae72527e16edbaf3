"""The servers under test and their load: processes that end with this one, however it ends, on a core each."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import psutil

import migrations
from auth.permissions import Identity
from auth.tokens import Tokens, TokenSettings
from orchestrator.database import connect
from orchestrator.settings import DatabaseSettings
from scripts.embedded import embedded_postgres
from tests.benchmarks.stage import SECRET, free_port, on

_HERE = Path(__file__).parent
# Git ignores it: compiled programs, and what npm installs.
CACHE = _HERE.parent.parent / "bench"
_NCHAN = (Path("/usr/lib/nginx/modules/ngx_nchan_module.so"), Path("/usr/share/nginx/modules/ngx_nchan_module.so"))
# What 10,000 connections take, and a process beside them.
_FILES = 12_000
# Handshakes under way at a time.
_AT_ONCE = 64


class Missing(Exception):
    """Something that the benchmark needs is not on this machine; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of server. `missing` says how to get it, or nothing when it is here."""

    name: str
    title: str
    missing: Callable[[], str]
    # From the ports for browsers and for publishing, and a folder of its own.
    argv: Callable[[int, int, Path], list[str]]
    # How messages reach it: `frames` (control.py), or `http`, by POST to the port for browsers.
    publishing: str = "frames"
    # Its first frame says that it is ready, not the 101.
    greets: bool = False
    # It answers what its probe has seen (`control.Probe`); Node answers nothing, and collects its garbage before.
    probed: bool = False


def _no_compiler() -> str:
    return "" if shutil.which("cc") else "there is no C compiler: apt install gcc libc6-dev"


def _no_nchan() -> str:
    if shutil.which("nginx") and any(module.exists() for module in _NCHAN):
        return ""
    return "apt install nginx-light libnginx-mod-nchan"


def _no_ws() -> str:
    if not (shutil.which("node") and shutil.which("npm")):
        return "apt install nodejs npm"
    folder = CACHE / "node"
    if not (folder / "node_modules" / "ws").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), "ws@8"]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            return f"npm could not install ws into {folder}"
    return ""


def _no_websockets() -> str:
    return "" if importlib.util.find_spec("websockets") else "pip install 'cluster-code[bench]'"


def compiled(name: str) -> str:
    """The path of one of the C programs, compiled when its source is newer. Raises Missing."""
    source, program = _HERE / "native" / f"{name}.c", CACHE / "bin" / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        if reason := _no_compiler():
            raise Missing(reason)
        program.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror"]
        if subprocess.run(["cc", *flags, "-o", str(program), str(source)], check=False).returncode:
            raise Missing(f"{source} does not compile: see above")
    return str(program)


def _nginx(port: int, _: int, folder: Path) -> list[str]:
    """One worker; everything else as the documentation of nchan has it."""
    module = next(module for module in _NCHAN if module.exists())
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"""load_module {module};
            daemon off;
            {"user root;" if os.geteuid() == 0 else ""}
            worker_processes 1;
            worker_rlimit_nofile {_FILES};
            pid {folder}/nginx.pid;
            error_log {folder}/error.log crit;
            events {{ worker_connections {_FILES}; }}
            http {{
                access_log off;
                client_body_temp_path {folder}/body;
                proxy_temp_path {folder}/proxy;
                fastcgi_temp_path {folder}/fastcgi;
                uwsgi_temp_path {folder}/uwsgi;
                scgi_temp_path {folder}/scgi;
                nchan_shared_memory_size 512M;
                server {{
                    listen 127.0.0.1:{port} backlog=4096;
                    keepalive_requests 1000000000;
                    location = /ready {{ return 200; }}
                    location = /pub {{
                        nchan_publisher;
                        nchan_channel_id $arg_id;
                        nchan_message_buffer_length 100;
                    }}
                    location = /ws {{ nchan_subscriber websocket; nchan_channel_id $arg_channels; }}
                    location = /two {{ nchan_subscriber websocket; nchan_channel_id $arg_channels $arg_own; }}
                }}
            }}"""
    )
    return ["nginx", "-c", str(configuration), "-p", str(folder), "-e", str(folder / "error.log")]


def _python(module: str) -> Callable[[int, int, Path], list[str]]:
    return lambda port, control, _: [sys.executable, "-m", f"tests.benchmarks.{module}", str(port), str(control)]


def _floor(how: str) -> Callable[[int, int, Path], list[str]]:
    return lambda port, control, _: [compiled("floor"), str(port), str(control), how]


def _node(port: int, control: int, _: Path) -> list[str]:
    return ["node", "--expose-gc", str(_HERE / "peers" / "ws_loop.js"), str(port), str(control), str(CACHE / "node")]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ours", "Cluster Code", lambda: "", _python("serve"), greets=True, probed=True),
        Kind("floor", "C floor", _no_compiler, _floor("plain")),
        Kind("joining", "joining C floor", _no_compiler, _floor("join")),
        Kind("nchan", "nginx + nchan", _no_nchan, _nginx, publishing="http"),
        Kind("ws", "Node ws", _no_ws, _node, probed=True),
        Kind("websockets", "Python websockets", _no_websockets, _python("peers.websockets_broadcast"), probed=True),
        Kind("aiohttp", "aiohttp send_str", lambda: "", _python("peers.aiohttp_loop"), probed=True),
    )
}


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the server under test runs, and where everything else does. Empty: wherever the system likes."""

    server: frozenset[int]
    rest: frozenset[int]

    @classmethod
    def share(cls) -> Cores:
        """The first core is the server's. With one core only, there is nothing to share."""
        first, *rest = sorted(os.sched_getaffinity(0))
        return cls(frozenset({first}), frozenset(rest)) if rest else cls(frozenset(), frozenset())


def raise_limits() -> None:
    """Let this process and its children open as many files as the benchmarks need. Raises Missing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _FILES:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, max(hard, _FILES)))
    except (ValueError, PermissionError):
        raise Missing(
            f"10,000 connections take {_FILES} open files, and {hard} are allowed: run as root, or raise the limit "
            f"(ulimit -Hn; LimitNOFILE= of the service; nofile in /etc/security/limits.conf)"
        ) from None


def _cpu(process: psutil.Process) -> float:
    """To the nanosecond, where the kernel tells how long each thread has run; else in ticks of 10 ms."""
    if threads := list(Path(f"/proc/{process.pid}/task").glob("*/schedstat")):
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    times = process.cpu_times()
    return times.user + times.system


class Running:
    """A server under test."""

    def __init__(self, kind: Kind, port: int, control: int, process: psutil.Process) -> None:
        self.kind = kind
        self.port = port
        self.control = control
        self._process = process

    def _processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def cpu(self) -> float:
        """User and system seconds of all its processes so far."""
        return sum(_cpu(process) for process in self._processes())

    def memory(self) -> int:
        """Resident bytes of all its processes, those that they share counted once."""
        return sum(process.memory_full_info().pss for process in self._processes())

    async def ask(self) -> dict[str, float]:
        """What its probe has seen since it was last asked, by the names of `control.Probe`; empty without one."""
        if not self.kind.probed:
            return {}
        reader, writer = await asyncio.open_connection("127.0.0.1", self.control)
        writer.write(b"\0\0\0\1S")
        async with asyncio.timeout(60):
            answer: dict[str, float] = orjson.loads(await reader.readline())
        writer.close()
        return answer


class Browsers:
    """The load: `native/browsers.c`, which says what the commands and the figures are."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(self, command: str) -> dict[str, Any]:
        """Give a command, and wait for its figures. Raises Missing when connections are refused or lost."""
        await self.begin(command)
        return await self.figures()

    async def begin(self, command: str) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        await self._process.stdin.drain()

    async def figures(self) -> dict[str, Any]:
        """The next line that it answers."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise Missing("the load has ended: see above")
        figures: dict[str, Any] = orjson.loads(line)
        if figures.get("refused") or figures.get("lost"):
            raise Missing(f"the server refused or cut connections: {figures}")
        return figures


@dataclass(frozen=True, slots=True)
class Stage:
    """What all benchmarks share: a database with users, cores, a folder."""

    folder: Path
    database_url: str
    users: Sequence[int]
    cores: Cores

    @asynccontextmanager
    async def serve(self, kind: Kind, *, env: dict[str, str] | None = None) -> AsyncIterator[Running]:
        """Run a server until it takes connections; it is ended with the body. Raises Missing."""
        if reason := kind.missing():
            raise Missing(reason)
        port, control = free_port(), free_port()
        folder = Path(tempfile.mkdtemp(prefix=f"{kind.name}-", dir=self.folder))
        argv = on(self.cores.server, kind.argv(port, control, folder), death_signal="TERM")
        environment = os.environ | {"DATABASE_URL": self.database_url} | (env or {})
        child = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL)  # noqa: ASYNC220  A millisecond.
        try:
            for each in (port, control) if kind.publishing == "frames" else (port,):
                await _listening(each, child)
            yield Running(kind, port, control, psutil.Process(child.pid))
        finally:
            child.terminate()
            child.wait(30)

    @asynccontextmanager
    async def browsers(
        self, server: Running, count: int, *, own: bool = False, two: bool = False, publisher: bool = True
    ) -> AsyncIterator[Browsers]:
        """A load that may open `count` connections: all on one channel, or each on its `own`; and on a second one."""
        paths = self.folder / f"{uuid.uuid4().hex}.paths"
        paths.touch(0o600)
        paths.write_text("".join(f"{path}\n" for path in self._paths(server.kind, count, own=own, two=two)))
        publish_port = server.port if server.kind.publishing == "http" else server.control
        process = await asyncio.create_subprocess_exec(
            *on(
                self.cores.rest,
                [
                    compiled("browsers"),
                    str(server.port),
                    str(publish_port if publisher else 0),
                    server.kind.publishing,
                    "own" if own else "shared",
                    "greeted" if server.kind.greets else "silent",
                    str(paths),
                ],
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            yield Browsers(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def _paths(self, kind: Kind, count: int, *, own: bool, two: bool) -> list[str]:
        channels = [f"bench:{place if own else 0}" for place in range(count)]
        if kind.name == "ours":
            # With the user's own channel these are two already.
            tokens = self._tokens(count)
            return [f"/ws?channels={name}&token={token}" for name, token in zip(channels, tokens, strict=True)]
        if not two:
            return [f"/ws?channels={name}" for name in channels]
        if kind.name == "nchan":
            return [f"/two?channels={name}&own=user:{place}" for place, name in enumerate(channels)]
        return [f"/ws?channels={name},user:{place}" for place, name in enumerate(channels)]

    def _tokens(self, count: int) -> list[str]:
        """Short tokens, each of another user as long as there are others."""
        tokens = Tokens(TokenSettings(secret=SECRET, short_ttl=3600))
        expires_at = time.time() + 7200
        return [
            tokens.issue_short(
                Identity(
                    user_id=self.users[place % len(self.users)],
                    email="",
                    is_admin=False,
                    channels=("bench:*",),
                    expires_at=expires_at,
                    token_id=uuid.uuid4().hex,
                )
            )
            for place in range(count)
        ]


async def open_all(browsers: Browsers, count: int) -> None:
    """Open so many connections more, and let what they have stirred settle."""
    figures = await browsers(f"open {count} {_AT_ONCE}")
    if figures["open"] < count:
        raise Missing(f"{figures['open']} of {count} connections were opened")
    await asyncio.sleep(0.5)


async def _listening(port: int, child: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(60):
        while True:
            if child.poll() is not None:
                raise Missing(f"the server ended with {child.returncode}: see above")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def stage(users: int) -> AsyncIterator[Stage]:
    """Everything that the benchmarks of this module's servers stand on."""
    raise_limits()
    compiled("browsers")
    everywhere, cores = os.sched_getaffinity(0), Cores.share()
    if cores.rest:
        os.sched_setaffinity(0, cores.rest)
    try:
        async with _database(users) as (folder, url, ids):
            yield Stage(folder, url, ids, cores)
    finally:
        os.sched_setaffinity(0, everywhere)


@asynccontextmanager
async def _database(users: int) -> AsyncIterator[tuple[Path, str, list[int]]]:
    with tempfile.TemporaryDirectory(prefix="cluster-code-bench-") as name:
        folder = Path(name)
        async with embedded_postgres(folder / "database") as postgres:
            url = await postgres.create_database("bench")
            await asyncio.to_thread(migrations.apply, url)
            connection = await connect(DatabaseSettings(url=url), name="bench")
            try:
                yield folder, url, await _users(connection, users)
            finally:
                await connection.close()


async def _users(connection: asyncpg.Connection, count: int) -> list[int]:
    rows = await connection.fetch(
        """INSERT INTO users (email, name)
           SELECT n || '@example.test', 'Bench' FROM generate_series(1, $1::int) AS n RETURNING id""",
        count,
    )
    return [row["id"] for row in rows]
