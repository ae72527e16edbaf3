"""The metrics of workers that share a port: whichever of them is asked answers for all, each by its number.

Every worker serves its own metrics at a Unix socket in a folder that only the supervisor's user can enter. The one that
Prometheus happens to reach asks all of them, and marks what each says with the label `worker`. So one address gives the
whole truth: counters of a worker never take turns with another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gateway.metrics import METRICS

# Seconds that a worker may take to answer another one.
_DEADLINE = 2.0


def path(folder: Path, number: int) -> Path:
    """The socket of a worker, which is there while it serves."""
    return folder / f"{number}.sock"


def numbers(folder: Path) -> list[int]:
    """The workers that serve, or did until they were killed."""
    return sorted(int(socket.stem) for socket in folder.glob("*.sock"))


class Siblings:
    """The workers of one supervisor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def render(self) -> bytes:
        """The metrics of all of them in the text format. A worker that does not answer is missing, and said to be."""
        workers = numbers(self._folder)
        texts = await asyncio.gather(*(self._ask(number) for number in workers))
        registry = CollectorRegistry()
        registry.register(_Merged(dict(zip(workers, texts, strict=True))))
        return generate_latest(registry)

    async def _ask(self, number: int) -> str | None:
        connector = aiohttp.UnixConnector(str(path(self._folder, number)))
        timeout = aiohttp.ClientTimeout(total=_DEADLINE)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get("http://worker/metrics", raise_for_status=True) as answer,
            ):
                return await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            return None


SIBLINGS = web.AppKey("siblings", Siblings)


@asynccontextmanager
async def joined(app: web.Application, folder: Path, number: int) -> AsyncIterator[None]:
    """Serve the application's metrics to the other workers while the body runs."""
    private = web.Application()

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await app[METRICS].render())

    private.router.add_get("/metrics", metrics)
    runner = web.AppRunner(private, access_log=None, handle_signals=False, shutdown_timeout=_DEADLINE)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path(folder, number))).start()
        yield
    finally:
        path(folder, number).unlink(missing_ok=True)
        await runner.cleanup()


class _Merged(Collector):
    def __init__(self, texts: dict[int, str | None]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("cluster_code_worker_up", "Whether the worker answered.", labels=["worker"])
        families: dict[str, Metric] = {}
        for number, text in self._texts.items():
            up.add_metric([str(number)], int(text is not None))
            for family in text_string_to_metric_families(text or ""):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [
                    sample._replace(labels={**sample.labels, "worker": str(number)}) for sample in family.samples
                ]
        return [up, *families.values()]
