"""The Docker engine of the tests, an image that takes no registry, and an engine and a registry of a test's own.

The engine is the one that DOCKER_HOST names, or this machine's: it is shared, so each test marks what it makes by a
label (`Owned`), finds it by that, and takes it away in the end. Nothing else there is ever touched.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

from orchestrator.docker import labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderUnavailable

HOW_TO_GET_ONE = "No Docker engine answers: start dockerd (apt install docker.io), or set DOCKER_HOST."
BUSYBOX = Path("/bin/busybox")
# Seconds.
_BOOT_DEADLINE = 60.0
# The addresses of an engine of a test's own begin so; those of tests that run at once differ.
_PREFIX = f"10.{100 + os.getpid() % 100}"


class NoDocker(Exception):
    """There is no engine, or nothing to make an image of; the message says how to get one."""


async def find() -> Engine:
    """An open engine. Raises NoDocker."""
    engine = Engine()
    try:
        await engine.connection.ping()
    except ProviderUnavailable as error:
        await engine.close()
        raise NoDocker(f"{HOW_TO_GET_ONE} {error}") from None
    return engine


# Images. --------------------------------------------------------------------------------------------------------------


def tar(files: Mapping[str, bytes | str], *, links: Mapping[str, str] | None = None, mode: int = 0o755) -> bytes:
    """A tar archive of files (a name that ends in `/`: a folder) and symbolic links."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.rstrip("/"))
            data = content.encode() if isinstance(content, str) else content
            entry.mode, entry.size = mode, len(data)
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
            archive.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return packed.getvalue()


def busybox_files() -> dict[str, bytes | str]:
    """A shell and nothing else, as `Registry.add` takes it."""
    if not BUSYBOX.exists():
        raise NoDocker(f"There is no {BUSYBOX} to make images of: apt install busybox-static.")
    return {"bin/": b"", "bin/sh": BUSYBOX.read_bytes()}


@cache
def busybox_tar() -> bytes:
    """The files of a system that has a shell, the usual commands, `httpd` and `nc`."""
    if not BUSYBOX.exists():
        raise NoDocker(f"There is no {BUSYBOX} to make images of: apt install busybox-static.")
    listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, check=True, text=True).stdout.split()
    files: dict[str, bytes | str] = {
        "bin/": b"",
        "etc/": b"",
        "root/": b"",
        "tmp/": b"",
        "bin/busybox": BUSYBOX.read_bytes(),
    }
    files |= {"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"}
    files |= {"etc/group": "root:x:0:\nnogroup:x:65534:\n"}
    return tar(files, links={f"bin/{name}": "busybox" for name in listed if name != "busybox"})


async def make_busybox(engine: Engine, name: str) -> str:
    """Make an image with a shell under this name (`repository:tag`), and return the name."""
    repository, _, tag = name.partition(":")
    params = {"fromSrc": "-", "repo": repository, "tag": tag, "changes": "ENV PATH=/bin"}
    async with engine.connection.stream(
        "POST", "/images/create", params=params, data=busybox_tar(), begin=60, idle=60
    ) as stream:
        async for part in stream.objects():
            assert "error" not in part, part
    return name


# What tests make. -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Owned:
    """What one test makes at an engine has the label `labels.INSTANCE` with this value."""

    engine: Engine
    instance: str

    @property
    def labels(self) -> dict[str, str]:
        """To be put on everything."""
        return {labels.INSTANCE: self.instance}

    async def remove(self) -> None:
        """Take away all that has it: containers, networks, volumes, images."""
        engine = self.engine
        for container in await engine.containers.list(self.labels):
            await engine.containers.remove(container["Id"], volumes=True)
        for network in await engine.networks.list(self.labels):
            await engine.networks.remove(network["Id"])
        for volume in await engine.volumes.list(self.labels):
            await engine.volumes.remove(volume["Name"], force=True)
        # Those that others are made of go with them, or after them.
        while images := await engine.images.list(self.labels):
            gone = [await self._removed(name) for image in images for name in _names(image)]
            if not any(gone):
                raise AssertionError(f"images are left: {images}")

    async def _removed(self, image: str) -> bool:
        try:
            await self.engine.images.remove(image, force=True)
        except EngineRefused:
            return False
        return True


def _names(image: Mapping[str, Any]) -> list[str]:
    """What to remove it by; without a name that is its id."""
    return [name for name in image["RepoTags"] or () if name != "<none>:<none>"] or [image["Id"]]


# An engine of a test's own. -------------------------------------------------------------------------------------------


class Daemon:
    """A private `dockerd`, to be killed, frozen and started again. Takes root.

    It lives in a network of its own, since it would take, or remove, the bridge of the machine's engine: its containers
    reach each other, but not the machine, nor the machine them, unless it is `reachable`. `data` is where it keeps all
    it has (a small file system, say); by default a folder that goes with it.

        async with Daemon() as daemon:
            engine = Engine(daemon.host)
            daemon.kill()
            await daemon.start()
    """

    def __init__(self, *arguments: str, reachable: bool = False, data: Path | None = None) -> None:
        if os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "ip", "nsenter"))):
            raise NoDocker("A dockerd of a test's own takes root, dockerd and ip (apt install docker.io iproute2).")
        # A socket's path has at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="dockerd-", dir="/tmp"))
        self._data = data or self._folder / "data"
        self._arguments = arguments
        self._reachable = reachable
        self._network: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.host = f"unix://{self._folder}/socket"

    async def __aenter__(self) -> Daemon:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def log(self) -> str:
        """What it said."""
        return (self._folder / "log").read_text(errors="replace")

    async def start(self) -> None:
        """Start it, and return when it answers."""
        # What a killed one left: dead processes that nobody has reaped would be taken for living ones.
        for name in ("pid", "exec/containerd/containerd.pid"):
            (self._folder / name).unlink(missing_ok=True)
        if self._network is None:
            self._network = await asyncio.to_thread(self._make_network)
        self._process = await asyncio.to_thread(self._spawn)
        deadline = time.monotonic() + _BOOT_DEADLINE
        async with Engine(self.host) as engine:
            while True:
                with suppress(ProviderUnavailable):
                    await engine.connection.ping()
                    return
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise NoDocker(f"dockerd does not start: {self.log[-2000:]}")
                await asyncio.sleep(0.05)

    def _make_network(self) -> subprocess.Popen[bytes]:
        """What holds a network of its own open; one that is reachable has an end of a cable in it, and we the other."""
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        # The same for as long as it is being started.
        while _network_of(holder.pid) == _network_of(os.getpid()):
            time.sleep(0.005)
        within = ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "ip"]
        _run(*within, "link", "set", "lo", "up")
        if self._reachable:
            ours, its = f"test{holder.pid}", "cable"
            _run("ip", "link", "add", ours, "type", "veth", "peer", "name", its, "netns", str(holder.pid))
            _run("ip", "address", "add", f"{_PREFIX}.255.1/30", "dev", ours)
            _run("ip", "link", "set", ours, "up")
            _run(*within, "address", "add", f"{_PREFIX}.255.2/30", "dev", its)
            _run(*within, "link", "set", its, "up")
            _run(*within, "route", "add", "default", "via", f"{_PREFIX}.255.1")
            _run("ip", "route", "add", f"{_PREFIX}.0.0/16", "via", f"{_PREFIX}.255.2")
        return holder

    def _spawn(self) -> subprocess.Popen[bytes]:
        assert self._network is not None
        command = ["nsenter", f"--net=/proc/{self._network.pid}/ns/net", "dockerd"]
        command += ["--host", self.host, "--data-root", str(self._data), "--exec-root", f"{self._folder}/exec"]
        command += ["--pidfile", f"{self._folder}/pid", "--iptables=false", "--ip6tables=false"]
        command += ["--bip", f"{_PREFIX}.0.1/24", "--default-address-pool", f"base={_PREFIX}.128.0/18,size=24"]
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen([*command, *self._arguments], stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """End it as a power cut does: with -9, and without a word. What ran in containers goes on."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def terminate(self) -> None:
        """Ask it to end, and what runs in containers with it."""
        self._signal(signal.SIGTERM)

    def freeze(self) -> None:
        """It takes connections, and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    async def close(self) -> None:
        """End it, and all that is left of it."""
        self.thaw()
        self.terminate()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, 20)
            except subprocess.TimeoutExpired:
                self.kill()
        await asyncio.to_thread(self._sweep)
        if self._network is not None:
            # The cable goes with it.
            self._network.kill()
            self._network.wait()

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _sweep(self) -> None:
        # Containers, and what holds them, outlive a dockerd that was killed.
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                for child in process.children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                process.kill()
        psutil.wait_procs(left, 10)
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed(mounts):
            if mount.startswith((f"{self._folder}/", f"{self._data}/")):
                subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return any(str(self._folder) in argument for argument in process.cmdline())
        except psutil.Error:
            return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _network_of(process: int) -> str:
    return str(Path(f"/proc/{process}/ns/net").readlink())


# A registry of a test's own. ------------------------------------------------------------------------------------------


class Registry:
    """A registry on 127.0.0.1 that engines pull from, without TLS; it keeps images in memory.

        async with Registry() as registry:
            image = registry.add("team/web", "1", {"hello": "world"})  # 127.0.0.1:34567/team/web:1
            await engine.images.pull(image)

    `password`: what it asks of the user `user`. `fault`: the status that it answers everything with; 0: it never
    answers. `rate`: bytes of a layer in a second.
    """

    def __init__(self, *, password: str = "", rate: float | None = None) -> None:
        self.password = password
        self.rate = rate
        self.fault: int | None = None
        self.asked: list[str] = []
        self.host = ""
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[tuple[str, str], bytes] = {}
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Registry:
        app = web.Application()
        app.router.add_get("/v2/", self._version)
        app.router.add_get("/v2/{name:.+}/manifests/{reference}", self._manifest)
        app.router.add_get("/v2/{name:.+}/blobs/{digest}", self._blob)
        app.middlewares.append(self._guard)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.host = "{}:{}".format(*self._runner.addresses[0][:2])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        assert self._runner is not None
        await self._runner.cleanup()

    def add(
        self, name: str, tag: str, files: Mapping[str, bytes | str], *, labels: Mapping[str, str] | None = None
    ) -> str:
        """Keep an image with one layer, and return the name that engines pull it by."""
        layer = tar(files)
        packed = gzip.compress(layer, 1)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": dict(labels or {})},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
        described = json.dumps(config).encode()
        media = "application/vnd.docker"
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{media}.distribution.manifest.v2+json",
            "config": self._keep(f"{media}.container.image.v1+json", described),
            "layers": [self._keep(f"{media}.image.rootfs.diff.tar.gzip", packed)],
        }
        body = json.dumps(manifest).encode()
        self._manifests[name, tag] = self._manifests[name, _digest(body)] = body
        return f"{self.host}/{name}:{tag}"

    def _keep(self, kind: str, data: bytes) -> dict[str, str | int]:
        self._blobs[_digest(data)] = data
        return {"mediaType": kind, "size": len(data), "digest": _digest(data)}

    @web.middleware
    async def _guard(self, request: web.Request, handler: object) -> web.StreamResponse:
        self.asked.append(request.path)
        if self.fault is not None:
            if self.fault == 0:
                await self._closing.wait()
            errors = {"errors": [{"code": "STAGED", "message": f"staged {self.fault}"}]}
            return web.json_response(errors, status=self.fault or 503)
        known = "Basic " + base64.b64encode(f"user:{self.password}".encode()).decode()
        if self.password and request.headers.get("Authorization") != known:
            errors = {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}
            headers = {"WWW-Authenticate": 'Basic realm="tests"'}
            return web.json_response(errors, status=401, headers=headers)
        return await handler(request)  # type: ignore[operator,no-any-return]

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({}, headers={"Docker-Distribution-API-Version": "registry/2.0"})

    async def _manifest(self, request: web.Request) -> web.Response:
        body = self._manifests.get((request.match_info["name"], request.match_info["reference"]))
        if body is None:
            return web.json_response(
                {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}, status=404
            )
        kind = json.loads(body)["mediaType"]
        return web.Response(body=body, content_type=kind, headers={"Docker-Content-Digest": _digest(body)})

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        body = self._blobs.get(request.match_info["digest"])
        if body is None:
            return web.json_response({"errors": [{"code": "BLOB_UNKNOWN", "message": "blob unknown"}]}, status=404)
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        piece = len(body) if self.rate is None else max(1, int(self.rate / 20))
        for at in range(0, len(body), piece):
            await response.write(body[at : at + piece])
            if self.rate is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), piece / self.rate)
        return response


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
