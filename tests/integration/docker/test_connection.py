"""The way to an engine: where it is said to be, TLS, versions of the API, and what is no engine at all."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderUnavailable
from tests.integration.docker.forwarding import over_tls


@asynccontextmanager
async def serving(version: Any, info: web.Response | None = None) -> AsyncIterator[tuple[str, list[str]]]:
    """Something that answers `/version` so, and all else with `info`; its host, and the paths that were asked for."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path == "/version":
            return version if isinstance(version, web.Response) else web.json_response(version)
        return info or web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "tcp://{}:{}".format(*runner.addresses[0][:2]), asked
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        ({"ApiVersion": "1.41", "MinAPIVersion": "1.12"}, "v1.41"),
        ({"ApiVersion": "1.47", "MinAPIVersion": "1.24"}, "v1.47"),
        ({"ApiVersion": "1.99", "MinAPIVersion": "1.44"}, "v1.51"),
    ],
)
async def test_the_newest_version_that_both_know_is_spoken(version: dict[str, str], spoken: str) -> None:
    async with serving(version) as (host, asked), Engine(host) as engine:
        await engine.json("GET", "/containers/json")
        await engine.json("GET", "/containers/json")
        assert asked == ["/version", *[f"/{spoken}/containers/json"] * 2]


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ({"Version": "18.09", "ApiVersion": "1.39"}, r"is too old \(18.09\): it takes Docker 20.10 or newer"),
        ({"Version": "40", "ApiVersion": "1.99", "MinAPIVersion": "1.60"}, r"is too new \(40\)"),
        ({"name": "elastic"}, "answers, but not as a Docker engine does"),
        (web.Response(text="<html>", content_type="text/html"), "cannot be read: is it a Docker engine"),
        (web.Response(text="<html>", status=404), "answered 404, and not as a Docker engine does"),
        (web.Response(status=302, headers={"Location": "http://elsewhere.invalid/"}), "answered 302"),
    ],
)
async def test_what_is_no_engine_of_ours_is_told_so(version: Any, sentence: str) -> None:
    async with serving(version) as (host, _), Engine(host, name="The engine") as engine:
        with pytest.raises(ProviderUnavailable, match=f"^The engine at {host} .*{sentence}"):
            await engine.info()


async def test_an_engine_that_goes_down_is_unavailable_and_other_faults_are_refusals() -> None:
    known = {"ApiVersion": "1.41"}
    down = web.json_response({"message": "the daemon is shutting down"}, status=500)
    async with serving(known, down) as (host, _), Engine(host) as engine:
        with pytest.raises(ProviderUnavailable, match="shutting down"):
            await engine.json("GET", "/containers/json")
    fault = web.json_response({"message": "port is already allocated"}, status=500)
    async with serving(known, fault) as (host, _), Engine(host) as engine:
        with pytest.raises(EngineRefused, match=r"^port is already allocated$"):
            await engine.json("GET", "/containers/json")


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("unix:///nowhere/docker.sock", "at unix:///nowhere/docker.sock cannot be reached (No such file or directory)"),
        ("tcp://127.0.0.1:1", "at tcp://127.0.0.1:1 cannot be reached (Connect call failed"),
        ("/var/run/docker.sock", "'/var/run/docker.sock' is no Docker host: give unix:///path or tcp://host:port."),
        ("ssh://there", "'ssh://there' is no Docker host"),
    ],
)
async def test_a_host_without_engine_is_named(host: str, sentence: str) -> None:
    async with Engine(host) as engine:
        with pytest.raises(ProviderUnavailable) as caught:
            await engine.info()
    assert sentence in str(caught.value)


async def test_a_closed_engine_says_so(engine: Engine) -> None:
    await engine.close()
    await engine.close()
    with pytest.raises(ProviderUnavailable, match="are closed"):
        await engine.info()


async def test_cancelling_closes_the_connection(tmp_path: Path) -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        asked.set()
        await reader.read()
        closed.set()
        writer.close()

    path = tmp_path / "socket"
    server = await asyncio.start_unix_server(taken, path)
    async with Engine(f"unix://{path}") as other:
        asking = asyncio.create_task(other.info())
        await asyncio.wait_for(asked.wait(), 10)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(closed.wait(), 10)
    server.close()
    await server.wait_closed()


async def test_tls_goes_by_the_environment(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not engine.host.startswith("unix://"):
        pytest.skip("The engine has no socket here to be put behind TLS.")
    certificates(tmp_path)
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "ca.pem")
    server_tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server_tls.verify_mode = ssl.CERT_REQUIRED
    async with over_tls(engine.host.removeprefix("unix://"), server_tls) as host:
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path / "none"))
        async with Engine(host) as other:
            with pytest.raises(ProviderUnavailable, match="certificate"):
                await other.info()
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
        async with Engine(host) as other:
            assert (await other.info()).os == "linux"


def certificates(folder: Path) -> None:
    """An authority that has signed itself, and is server and client as well."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(alternative, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(pem)
    (folder / "cert.pem").write_bytes(pem)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(secret)
