"""Following a cluster of 10,000 pods that change 2,000 times a second, against a loop that only reads and parses.

The cluster (`tests/benchmarks/cluster.py`) is a process of its own. The floor reads the same watch with aiohttp, finds
the lines and gives each to orjson; ours is an informer, as the bridge has it. Both run in turns under uvloop in one
thread, whose CPU time (user and system) is what is compared. Lag is from the change in the cluster to when the
informer tells it. While everything is listed, first and again, a timer of 1 ms looks how long the loop is away. Memory
is what is resident in a process that holds all pods, less what was before.

The whole bridge (`tests/benchmarks/bridge.py`) follows the same cluster, with a session for each pod in a PostgreSQL
of its own: once while every change is one that can be seen, and so is told twice, to the session and to administrators,
and once while none is.

    python -m tests.benchmarks.watch [--pods N] [--rate N] [--seconds N] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
import psutil
import uvloop

import migrations
from orchestrator import log_setup
from orchestrator.cluster.access import find
from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import INSTANCE, Pod
from orchestrator.cluster.watch import Batch, Informer
from orchestrator.settings import environment
from scripts.embedded import embedded_postgres
from tests.benchmarks import bridge
from tests.benchmarks.cluster import STAMP
from tests.benchmarks.control import Probe
from tests.benchmarks.report import Figure, Progress, percentile, show, spread
from tests.benchmarks.stage import free_port, on
from tests.kubernetes import PODS

_SELECTOR = f"{INSTANCE}=cluster-code"


@dataclass(frozen=True, slots=True)
class Load:
    """Pods there are, changes a second, seconds of them in a round, and rounds."""

    pods: int = 10_000
    rate: int = 2_000
    seconds: float = 5.0
    rounds: int = 5

    @property
    def changes(self) -> int:
        """Changes of one round."""
        return int(self.rate * self.seconds)


@dataclass(slots=True)
class Measured:
    """What came out: a value a round, or one for each change or list."""

    # CPU microseconds a change.
    floor: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    # The same of the whole bridge, while changes are told, and while there is nothing to tell of them.
    telling: list[float] = field(default_factory=list)
    silent: list[float] = field(default_factory=list)
    # Events told by the bridge, and seconds from the last change until all are.
    told: list[int] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    # Changes that each has seen.
    floor_seen: list[int] = field(default_factory=list)
    ours_seen: list[int] = field(default_factory=list)
    # Seconds.
    lags: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    lists: list[float] = field(default_factory=list)
    # Bytes a pod, and bytes of a pod's JSON.
    held: float = 0.0
    json: int = 0


class Target:
    """The cluster's process."""

    def __init__(self, port: int, process: asyncio.subprocess.Process) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._process = process

    async def __call__(self, command: str) -> float:
        """Have it do something; the seconds that it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command.encode() + b"\n")
        answer = (await self._process.stdout.readline()).split()
        return float(answer[1])


@asynccontextmanager
async def target(load: Load) -> AsyncIterator[Target]:
    """Start the cluster, and wait until it has its pods; it ends with the body."""
    port = free_port()
    argv = [sys.executable, "-m", "tests.benchmarks.cluster", str(port), str(load.pods), str(4 * load.rate)]
    process = await asyncio.create_subprocess_exec(
        *on(frozenset(), argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(120):
            if await process.stdout.readline() != b"ready\n":
                raise SystemExit(f"{argv} ended with {process.returncode}")
        yield Target(port, process)
    finally:
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Cluster]:
    """Ours, as production has it."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-bench-") as folder:
        path = Path(folder) / "kubeconfig"
        path.write_text(kubeconfig(url))
        cluster = Cluster(find(str(path)))
        try:
            yield cluster
        finally:
            await cluster.close()


def kubeconfig(url: str) -> str:
    """What configures a client."""
    return orjson.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {"server": url}}],
            "users": [{"name": "bench", "user": {}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        }
    ).decode()


async def floor(cluster: Target, load: Load, measured: Measured) -> None:
    """One round of the loop that only reads and parses."""
    async with aiohttp.ClientSession(cluster.url, timeout=aiohttp.ClientTimeout()) as session:
        async with session.get(PODS, params={"limit": "1"}) as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        params = {"watch": "1", "resourceVersion": version, "labelSelector": _SELECTOR}
        seen = 0
        async with session.get(PODS, params=params) as answer:
            gc.collect()
            changing = asyncio.create_task(cluster(f"change {load.changes} {load.rate}"))
            before = time.thread_time()
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    orjson.loads(line)
                seen += len(lines)
                if seen >= load.changes:
                    break
            measured.floor.append((time.thread_time() - before) / load.changes * 1e6)
            measured.floor_seen.append(seen)
            await changing


async def ours(cluster: Target, load: Load, measured: Measured) -> None:
    """One round of an informer: a list, which is not counted, the changes, and a list again."""
    async with client(cluster.url) as api:
        informer = Informer(api, PODS, Pod, label_selector=_SELECTOR)
        async with aclosing(informer.batches()) as batches:
            await _list(load, informer, batches, measured)
            gc.collect()
            changing = asyncio.create_task(cluster(f"change {load.changes} {load.rate}"))
            before, seen = time.thread_time(), 0
            async for batch in batches:
                seen += len(batch.changes)
                # The first of them has waited longest.
                message = batch.changes[0].object.status.message
                measured.lags.append((time.monotonic_ns() - int(message.removeprefix(STAMP))) / 1e9)
                if seen >= load.changes:
                    break
            measured.ours.append((time.thread_time() - before) / load.changes * 1e6)
            measured.ours_seen.append(seen)
            await changing
            await cluster("expire")
            await _list(load, informer, batches, measured)


async def _list(load: Load, informer: Informer[Pod], batches: AsyncIterator[Batch[Pod]], measured: Measured) -> None:
    """Everything, for the first time or compared with what is held."""
    probe = Probe()
    begun = time.monotonic()
    probe.start()
    async for batch in batches:
        if batch.synced:
            break
    measured.lists.append(time.monotonic() - begun)
    measured.pauses.append(orjson.loads(probe.answer())["pause"])
    probe.stop()
    assert len(informer) == load.pods


async def bridged(
    cluster: Target, load: Load, measured: Measured, *, database: str, provider_id: int, folder: Path
) -> None:
    """One round of the whole bridge: changes that are told, then as many that are not."""
    path = folder / "kubeconfig"
    path.write_text(kubeconfig(cluster.url))
    async with bridge.following(database, provider_id, path) as following:
        for command, cpu in (("change", measured.telling), ("touch", measured.silent)):
            told, seen = following.read().told, _lines(following)
            gc.collect()
            before = time.thread_time()
            await cluster(f"{command} {load.changes} {load.rate}")
            ended = time.monotonic()
            while _lines(following) < seen + load.changes or following.read().waiting:
                await asyncio.sleep(0.02)
            if command == "change":
                measured.late.append(time.monotonic() - ended)
                measured.told.append(following.read().told - told)
            cpu.append((time.thread_time() - before) / load.changes * 1e6)


def _lines(following: bridge.Bridge) -> int:
    assert following._lead is not None
    return following._lead.held.pods.stats.lines


async def hold(url: str, pods: int) -> float:
    """Resident bytes a pod that an informer holds. For a process of its own."""
    async with client(url) as api:
        # The first answers of a client cost what later ones do not: they go before.
        await _hold(Informer(api, PODS, Pod, field_selector="metadata.name=none"))
        before = _resident()
        informer = Informer(api, PODS, Pod, label_selector=_SELECTOR)
        await _hold(informer)
        assert len(informer) == pods
        return (_resident() - before) / pods


async def _hold(informer: Informer[Pod]) -> None:
    async with aclosing(informer.batches()) as batches:
        async for batch in batches:
            if batch.synced:
                return


def _resident() -> int:
    gc.collect()
    # What the pages of the list took, and is free again, is nobody's.
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


async def measure(load: Load, progress: Progress, database: str, folder: Path) -> Measured:
    """All of it, in rounds in which floor, informer and bridge take turns. The database is migrated, and else empty."""
    measured = Measured()
    progress.at("the cluster fills")
    provider_id = await bridge.fill(database, load.pods)
    async with target(load) as cluster:
        async with aiohttp.ClientSession(cluster.url) as session, session.get(PODS, params={"limit": "1"}) as answer:
            measured.json = len(orjson.dumps((await answer.json())["items"][0]))
        for number in range(load.rounds + 1):
            progress.at(f"round {number} of {load.rounds}" if number else "warming up")
            turns = (floor, ours) if number % 2 else (ours, floor)
            for turn in turns:
                await turn(cluster, load, measured)
            await bridged(cluster, load, measured, database=database, provider_id=provider_id, folder=folder)
            if not number:
                measured = Measured(json=measured.json)
        progress.at("memory")
        argv = [sys.executable, "-m", "tests.benchmarks.watch", "--hold", cluster.url, "--pods", str(load.pods)]
        child = await asyncio.create_subprocess_exec(*on(frozenset(), argv), stdout=subprocess.PIPE)
        printed, _ = await child.communicate()
        measured.held = float(printed)
    return measured


def figures(load: Load, measured: Measured) -> list[Figure]:
    """What came out, beside what is wanted."""
    what = f"{load.pods:,} pods of {measured.json / 1024:.1f} KiB, {load.rate:,} changes a second"
    floor = statistics.median(measured.floor)

    def cpu(name: str, values: list[float], how: str) -> Figure:
        ratios = [one / other for one, other in zip(values, measured.floor, strict=True)]
        times = f"{statistics.median(values):.0f} against {floor:.0f} us a change"
        title = f"watch: CPU of {name}, times a loop that only reads and parses"
        return Figure(title, spread(ratios), "1.5", f"{how}; {times}")

    return [
        cpu("the informer", measured.ours, what),
        cpu("the whole bridge, every change told", measured.telling, f"{load.pods:,} sessions in PostgreSQL"),
        cpu("the whole bridge, none told", measured.silent, "changes that cannot be seen"),
        Figure(
            "watch: from the last change until the bridge has told all",
            f"{spread(measured.late)} s",
            "1 s",
            f"{2 * load.rate:,} rows of the outbox a second",
        ),
        Figure(
            "watch: from the change to the informer's telling it, p99",
            f"{percentile(measured.lags, 0.99) * 1000:.1f} ms",
            "1 s",
            f"p50 {percentile(measured.lags, 0.5) * 1000:.1f} ms, longest {max(measured.lags) * 1000:.1f} ms",
        ),
        Figure("watch: resident memory of a pod held", f"{measured.held:.0f} bytes", "2,048 bytes"),
        Figure(
            "watch: longest stop of the loop while all is listed",
            f"{spread([pause * 1000 for pause in measured.pauses], 1)} ms",
            "50 ms",
            f"a list takes {spread(measured.lists)} s",
        ),
    ]


async def run(load: Load | None = None) -> list[Figure]:
    """Measure, and say what came out."""
    load = load or Load()
    with Progress("watch") as progress, tempfile.TemporaryDirectory(prefix="cluster-code-bench-") as name:
        folder = Path(name)
        async with embedded_postgres(folder / "database") as postgres:
            url = await postgres.create_database("bench")
            await asyncio.to_thread(migrations.apply, url)
            # A thread of its own, for the loop that production has, and for CPU time that is of nothing else.
            return figures(load, await asyncio.to_thread(uvloop.run, measure(load, progress, url, folder)))


def main() -> None:
    usual = Load()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=usual.pods)
    parser.add_argument("--rate", type=int, default=usual.rate, help="changes a second")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="of a round")
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--hold", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    log_setup.configure(environment(None), at_least="error")
    if given.hold:
        print(uvloop.run(hold(given.hold, given.pods)))
        return
    show(asyncio.run(run(Load(given.pods, given.rate, given.seconds, given.rounds))))


if __name__ == "__main__":
    main()
