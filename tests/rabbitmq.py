"""A real RabbitMQ for tests: one for the whole run, shared by all workers, and brokers that a test may kill.

Where it comes from, in this order:

1. `AMQP_URL`: a broker that runs already. Its management plugin must answer at `AMQP_MANAGEMENT_URL` (unset: port 15672
   of the same host), and the user must be an administrator: each test gets a virtual host of its own.
2. `rabbitmq-server`, started on free ports in a folder of its own.
3. As root where there is apt-get (Debian, Ubuntu): the package is installed, without starting its service.

Without any of them the tests skip, and with `CI` set they fail.

The shared broker is held by a process of its own (`python -m tests.rabbitmq`), which ends it when the run ends, however
that happens. It is started after the tests are collected, if one of them wants it, and boots beside the first tests.
"""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import ipaddress
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# The folder of this run, for the workers.
_RUN = "CLUSTER_CODE_TESTS_RABBITMQ"
# Seconds. A boot takes 8 on two idle cores.
BOOT_DEADLINE = 150.0
HOW_TO_GET_ONE = "no RabbitMQ: set AMQP_URL, or install one (apt install rabbitmq-server)"
_DEBIAN = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_USER = "rabbitmq"


class NoBroker(Exception):
    """There is no RabbitMQ to be had; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Server:
    """A RabbitMQ, and what its management plugin can do to it. `ca` is the file that certifies `tls_port`."""

    host: str
    port: int
    management: str
    user: str
    password: str
    tls_port: int = 0
    ca: str = ""

    def amqp_url(self, vhost: str = "/", *, port: int | None = None) -> str:
        """The URL of a virtual host; `port`: of a proxy on 127.0.0.1 before the server."""
        place = f"{self.host}:{self.port}" if port is None else f"127.0.0.1:{port}"
        return f"amqp://{quote(self.user, safe='')}:{quote(self.password, safe='')}@{place}/{quote(vhost, safe='')}"

    def amqps_url(self, vhost: str = "/") -> str:
        """The same over TLS, without the query that names the certificate authority."""
        return f"amqps://{self.user}:{self.password}@localhost:{self.tls_port}/{quote(vhost, safe='')}"

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One call of the management API below `/api/`; its answer, or None. Raises aiohttp.ClientError."""
        auth = aiohttp.encode_basic_auth(self.user, self.password)
        timeout = aiohttp.ClientTimeout(total=30)
        async with (
            aiohttp.ClientSession(headers={"Authorization": auth}, timeout=timeout) as session,
            session.request(method, f"{self.management}/api/{path}", json=body, raise_for_status=True) as answer,
        ):
            return json.loads(text) if (text := await answer.text()) else None

    async def add_vhost(self, name: str) -> None:
        """Make a virtual host; its maker may do all in it."""
        await self.call("PUT", f"vhosts/{quote(name, safe='')}")

    async def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it; its connections are closed."""
        await self.call("DELETE", f"vhosts/{quote(name, safe='')}")

    async def queues(self, vhost: str) -> list[dict[str, Any]]:
        """All queues and streams, as the management API tells them (`name`, `type`, `arguments`, …)."""
        return await self.call("GET", f"queues/{quote(vhost, safe='')}?disable_stats=true&enable_queue_totals=true")

    async def delete_queue(self, vhost: str, name: str) -> None:
        """Delete a queue or a stream."""
        await self.call("DELETE", f"queues/{quote(vhost, safe='')}/{quote(name, safe='')}")

    async def connections(self, vhost: str) -> list[dict[str, Any]]:
        """The connections open now; one that was just opened or closed may be missing or there for a moment."""
        return await self.call("GET", f"vhosts/{quote(vhost, safe='')}/connections")

    async def close_connections(self, vhost: str) -> int:
        """Close all connections to a virtual host, as an operator may; how many there were."""
        closed = 0
        for connection in await self.connections(vhost):
            try:
                await self.call("DELETE", f"connections/{quote(connection['name'], safe='')}")
                closed += 1
            except aiohttp.ClientResponseError as error:
                if error.status != 404:
                    raise
        return closed


class Broker:
    """A RabbitMQ of one's own: started, killed, frozen, started again on the same data and ports, stopped.

    `config` is added to its rabbitmq.conf. Belongs to the main thread: its processes end when that ends.

        async with Broker() as broker:
            await broker.server.add_vhost("one")
            await broker.kill()
            await broker.start()
    """

    def __init__(self, folder: Path | None = None, *, config: str = "") -> None:
        self._script = find()
        self._folder = folder or Path(tempfile.mkdtemp(prefix="cluster-code-rabbitmq-"))
        self._folder.chmod(0o755)
        self._config = config
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ports = free_ports(5)
        amqp, management, tls, _, _ = self._ports
        self.server = Server(
            "127.0.0.1",
            amqp,
            f"http://127.0.0.1:{management}",
            "tests",
            "tests only",
            tls,
            str(self._folder / "ca.pem"),
        )
        self._prepare()

    async def __aenter__(self) -> Broker:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pid(self) -> int:
        """The Erlang VM's. Raises IndexError when it does not run."""
        return self._processes[-1].pid

    @property
    def running(self) -> bool:
        """Whether it was started, and neither killed nor ended since."""
        return bool(self._processes)

    async def start(self) -> None:
        """Start, with the data that is there, and return once it takes connections. Raises NoBroker."""
        epmd, dist = self._ports[3:]
        self._run(["epmd", "-address", "127.0.0.1", "-port", str(epmd)])
        self._run(
            [str(self._script)],
            {
                "RABBITMQ_NODENAME": f"tests-{dist}@localhost",
                "RABBITMQ_DIST_PORT": str(dist),
                "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
                "RABBITMQ_LOG_BASE": str(self._folder / "log"),
                "RABBITMQ_PID_FILE": str(self._folder / "pid"),
                "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
                "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
                # The machine's own configuration is none of ours.
                "RABBITMQ_CONF_ENV_FILE": "/dev/null",
                # No shell around the Erlang VM, so that it is our child, and what kills that kills the broker.
                "RABBITMQ_ALLOW_INPUT": "1",
                "RABBITMQ_SERVER_START_ARGS": "-noinput -kernel inet_dist_use_interface {127,0,0,1}",
            },
        )
        await self._answer()
        await self._settle()

    async def kill(self) -> None:
        """End it with SIGKILL, as a crash does. The data stays, and what was declared before the call. Idempotent."""
        if self._processes:
            # A frozen one cannot be waited for.
            with suppress(aiohttp.ClientError, TimeoutError):
                await self._wrote_down()
        await self._end_processes()

    async def _end_processes(self) -> None:
        for process in reversed(self._processes):
            process.kill()
        for process in self._processes:
            await _ended(process, 30)
        self._processes.clear()

    async def end(self) -> None:
        """Shut it down in order. The data stays. Idempotent."""
        if self._processes:
            self._processes[-1].terminate()
            await _ended(self._processes[-1], 60)
        await self._end_processes()

    async def stop(self) -> None:
        """Kill it and remove its data. Idempotent."""
        await self._end_processes()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def wipe(self) -> None:
        """Remove all data of a broker that does not run: it starts as a new one, at the same ports."""
        shutil.rmtree(self._folder / "mnesia")

    def freeze(self) -> None:
        """Stop all its work, with its connections open: it neither reads nor writes until `thaw`."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    async def ctl(self, *args: str) -> str:
        """What `rabbitmqctl` with these arguments prints. Takes some seconds. Raises RuntimeError."""
        script = self._script.with_name("rabbitmqctl")
        process = await asyncio.create_subprocess_exec(
            *_as_user(),
            script,
            "--node",
            f"tests-{self._ports[4]}@localhost",
            *args,
            env=self._environment({}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        printed, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(printed.decode(errors="replace"))
        return printed.decode()

    def _prepare(self) -> None:
        amqp, management, tls, _, _ = self._ports
        certify(self._folder)
        (self._folder / "enabled_plugins").write_text("[rabbitmq_management].\n")
        (self._folder / "rabbitmq.conf").write_text(
            f"""listeners.tcp.1 = 127.0.0.1:{amqp}
listeners.ssl.1 = 127.0.0.1:{tls}
ssl_options.cacertfile = {self._folder}/ca.pem
ssl_options.certfile = {self._folder}/server.pem
ssl_options.keyfile = {self._folder}/server.key
management.tcp.ip = 127.0.0.1
management.tcp.port = {management}
management.rates_mode = none
default_user = {self.server.user}
default_pass = {self.server.password}
default_user_tags.administrator = true
default_permissions.configure = .*
default_permissions.write = .*
default_permissions.read = .*
disk_free_limit.absolute = 1MB
log.console = false
log.file.level = warning
{self._config}
"""
        )
        if os.geteuid() == 0:
            for path in (self._folder, *self._folder.iterdir()):
                shutil.chown(path, _USER, _USER)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            # The Erlang cookie lies there: nodes of two folders cannot talk to each other.
            "HOME": str(self._folder),
            "ERL_EPMD_PORT": str(self._ports[3]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            **more,
        }

    def _run(self, argv: list[str], environment: Mapping[str, str] | None = None) -> None:
        with (self._folder / "output").open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    [*_as_user(), *argv],
                    cwd=self._folder,
                    env=self._environment(environment or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C is for the tests, which then end it.
                    start_new_session=True,
                )
            )

    async def _answer(self) -> None:
        deadline = asyncio.get_running_loop().time() + BOOT_DEADLINE
        while asyncio.get_running_loop().time() < deadline:
            if any(process.poll() is not None for process in self._processes):
                raise NoBroker(f"rabbitmq-server ended at once: {self._last_words()}")
            try:
                # The plugin answers after the listeners are open, except in a start that is half done.
                await self.server.call("GET", "overview")
                _, writer = await asyncio.open_connection(self.server.host, self.server.port)
                writer.close()
                await writer.wait_closed()
                return
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.1)
        raise NoBroker(f"rabbitmq-server did not start within {BOOT_DEADLINE:.0f} s: {self._last_words()}")

    async def _settle(self) -> None:
        """Wait until a kill finds the broker as one that has run for a while.

        RabbitMQ writes down half a second late that it has a coordinator of streams, which it starts with the first
        of them: killed before, it comes back without any stream working, for ever.
        """
        stream = {"durable": True, "arguments": {"x-queue-type": "stream"}}
        await self.server.call("PUT", "queues/%2F/first-stream", stream)

        async def written() -> bool:
            found = self._folder.glob("mnesia/*/coordination/*/names.dets")
            return any(b"rabbit_stream_coordinator" in path.read_bytes() for path in found)

        await eventually(written, within=BOOT_DEADLINE)
        await self.server.delete_queue("/", "first-stream")

    async def _wrote_down(self) -> None:
        """Wait until all that was declared is on disk, which RabbitMQ (by Mnesia) does not wait for itself."""
        name = f"written-{random.getrandbits(64)}"
        async with asyncio.timeout(5):
            await self.server.call("PUT", f"users/{name}", {"password": "", "tags": ""})

        async def written() -> bool:
            # It is one log for everything, whose parts go to a file a table.
            found = [path for kind in ("LOG", "DCL", "DCD") for path in self._folder.glob(f"mnesia/*/*.{kind}")]
            return any(name.encode() in path.read_bytes() for path in found if path.exists())

        await eventually(written, within=10)

    def _last_words(self) -> str:
        return " ".join((self._folder / "output").read_text(errors="replace").split())[-600:]


async def _ended(process: subprocess.Popen[bytes], timeout: float) -> None:
    async with asyncio.timeout(timeout):
        while process.poll() is None:
            await asyncio.sleep(0.01)


@cache
def _as_user() -> tuple[str, ...]:
    """What to put before a command: as root it runs as the package's user; on Linux it ends with who started it."""
    if not shutil.which("setpriv"):
        return ()
    user = (f"--reuid={_USER}", f"--regid={_USER}", "--init-groups") if os.geteuid() == 0 else ()
    return ("setpriv", "--pdeathsig=KILL", *user, "--")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens at, below those that outgoing connections take, so that a broker which
    is started again finds its own still free."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.add(port)
    return list(ports)


def find() -> Path:
    """The script that starts a RabbitMQ here; installs the package where it may. Raises NoBroker."""
    if script := _installed():
        return script
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoBroker(HOW_TO_GET_ONE)
    _install()
    if script := _installed():
        return script
    raise NoBroker(HOW_TO_GET_ONE)


def _installed() -> Path | None:
    # Debian puts a wrapper on the PATH that leaves its output in the machine's folders.
    if _DEBIAN.exists():
        return _DEBIAN
    found = shutil.which("rabbitmq-server", path=f"{os.environ['PATH']}:/usr/sbin")
    return Path(found).resolve() if found else None


def _install() -> None:
    """Install the package, whose service does not start meanwhile. Raises NoBroker."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "rabbitmq-server"]
    try:
        for argv in (install, ["apt-get", "update", "--quiet"], install):
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
            if argv is install and done.returncode == 0:
                return
    finally:
        if ours:
            policy.unlink()
    raise NoBroker(f"{HOW_TO_GET_ONE}; apt-get failed: {' '.join(done.stderr.split())[-300:]}")


def certify(folder: Path) -> None:
    """Write a certificate authority (`ca.pem`) and, by it, a certificate for localhost (`server.pem`, `server.key`)."""
    now = datetime.datetime.now(datetime.UTC)
    authority = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Cluster Code tests")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])

    def certificate(name: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
        )

    root = certificate(issuer, authority.public_key()).add_extension(x509.BasicConstraints(True, 0), critical=True)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = certificate(subject, key.public_key()).add_extension(names, critical=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(root.sign(authority, hashes.SHA256()).public_bytes(pem))
    (folder / "server.pem").write_bytes(leaf.sign(authority, hashes.SHA256()).public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


# The broker of the run. ----------------------------------------------------------------------------------------------


def begin_run() -> None:
    """Called once, before any worker is started: they find each other by the folder that this names."""
    os.environ[_RUN] = tempfile.mkdtemp(prefix="cluster-code-rabbitmq-run-")


def end_run() -> None:
    """End the shared broker, if there is one, and remove all of the run. For who called `begin_run`."""
    folder = Path(os.environ.pop(_RUN))
    keeper = folder / "keeper"
    if keeper.exists():
        # It was started by a worker, which may have died: that it has ended is seen by its lock.
        pid = int(keeper.read_text())
        with (folder / "held").open() as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(pid, signal.SIGTERM)
                fcntl.flock(held, fcntl.LOCK_EX)
    shutil.rmtree(folder, ignore_errors=True)


def want() -> None:
    """Have the shared broker started, if nobody has; returns before it is ready. Raises NoBroker."""
    if os.environ.get("AMQP_URL"):
        return
    folder = Path(os.environ[_RUN])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "keeper").exists():
            return
        find()
        with (folder / "output").open("wb") as output:
            # Who collects first starts it, and may end before it: nobody waits for this child.
            controller = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            held = (folder / "held").open("w")
            fcntl.flock(held, fcntl.LOCK_EX)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.rabbitmq", str(folder), str(controller)],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # A lock belongs to the open file: the child holds it for as long as it lives.
                pass_fds=[held.fileno()],
            )
            held.close()
        (folder / "keeper").write_text(str(process.pid))
        _children.append(process)


# Kept, so that no destructor complains of a child that outlives this process on purpose.
_children: list[subprocess.Popen[bytes]] = []


async def shared() -> Server:
    """The shared broker, once it is ready. Raises NoBroker."""
    if url := os.environ.get("AMQP_URL"):
        return await _given(url)
    folder = Path(os.environ[_RUN])
    await asyncio.to_thread(want)
    ready, failed = folder / "ready", folder / "failed"
    async with asyncio.timeout(BOOT_DEADLINE + 10):
        while not ready.exists():
            if failed.exists():
                raise NoBroker(failed.read_text())
            await asyncio.sleep(0.05)
    return Server(**json.loads(ready.read_text()))


async def _given(url: str) -> Server:
    parts = urlsplit(url.split(",")[0])
    host = parts.hostname or "localhost"
    management = os.environ.get("AMQP_MANAGEMENT_URL") or f"http://{host}:15672"
    server = Server(host, parts.port or 5672, management.rstrip("/"), parts.username or "", parts.password or "")
    try:
        await server.call("GET", "overview")
    except (aiohttp.ClientError, OSError) as error:
        raise NoBroker(
            f"AMQP_URL is set, but {management} does not answer as its management plugin: {error}"
        ) from error
    return server


async def keep(folder: Path, controller: int) -> None:
    """Hold the shared broker until SIGTERM, or until the process `controller` is gone."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    watch = asyncio.create_task(_gone(controller, ended.set))
    try:
        async with Broker() as broker:
            (folder / "starting").write_text(json.dumps(asdict(broker.server)))
            (folder / "starting").rename(folder / "ready")
            await ended.wait()
    except NoBroker as error:
        (folder / "failing").write_text(str(error))
        (folder / "failing").rename(folder / "failed")
    finally:
        watch.cancel()
    if not _alive(controller):
        shutil.rmtree(folder, ignore_errors=True)


async def _gone(pid: int, call: Callable[[], None]) -> None:
    while _alive(pid):
        await asyncio.sleep(0.5)
    call()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def eventually(condition: Callable[[], Awaitable[bool]], *, within: float = 30.0) -> None:
    """Return once a condition is true; polls. Raises TimeoutError."""
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(keep(Path(sys.argv[1]), int(sys.argv[2])))
