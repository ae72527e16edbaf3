"""Asking a service from outside whether it is ready."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aiohttp

from orchestrator.providers.contract import Endpoint

# Seconds that one question may take.
_TIMEOUT = 5.0
# Seconds in which a proxy hangs up when there is nobody behind it: Docker's accepts connections for a container's port
# before anything listens there.
_HANG_UP = 0.2


async def unready(endpoint: Endpoint | None, path: str | None) -> str | None:
    """Why a service is not ready; None: it is.

    With a path, it is when a GET of it is answered with anything below 500; without one, when it takes connections.
    """
    if endpoint is None:
        return "it has no address yet"
    try:
        async with asyncio.timeout(_TIMEOUT):
            if path is None:
                return await _connects(endpoint)
            url = urlsplit(endpoint.url)
            async with aiohttp.request("GET", f"http://{url.netloc}{path}", allow_redirects=False) as answer:
                return None if answer.status < 500 else f"{path} answers {answer.status}"
    except TimeoutError:
        return f"it does not answer within {_TIMEOUT:g} s at {endpoint.url}"
    except (OSError, aiohttp.ClientError):
        return f"nothing answers at {endpoint.url}"


async def _connects(endpoint: Endpoint) -> str | None:
    url = urlsplit(endpoint.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        async with asyncio.timeout(_HANG_UP):
            said = await reader.read(1)
    except TimeoutError:
        return None
    finally:
        writer.close()
    return None if said else f"nothing answers at {endpoint.url}"
