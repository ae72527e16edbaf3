"""Builds of images by one engine: what is asked of it, and what it tells meanwhile."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from typing import Any, Literal

from orchestrator.docker.connection import Connection
from orchestrator.docker.images import configured, encoded

Builder = Literal["classic", "buildkit"]

# Seconds that sending the context may take.
UPLOAD_DEADLINE = 900.0
# As an engine calls what it tells of BuildKit, in base64 of a trace.
_TRACE = "moby.buildkit.trace"


class Builds:
    """All raise ProviderUnavailable and EngineRefused."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def run(
        self, context: AsyncIterable[bytes], builder: Builder, params: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Build from a tar archive, and yield what the engine tells, as it comes.

        That is `{"stream": text}`, `{"status": …}` of images that are pulled, `{"aux": {"ID": image id}}`,
        `{"error": …, "errorDetail": {"code", "message"}}`, and from BuildKit `{"trace": bytes}`. `params` are the
        API's; registries are asked with what DOCKER_CONFIG has. Raises EngineRefused, 400: the Dockerfile cannot be
        read. Closing the generator, or cancelling, has the engine end the build.
        """
        headers = {"X-Registry-Config": encoded(configured(os.environ))}
        wanted = {"version": "2" if builder == "buildkit" else "1", **params}
        async with self._connection.stream(
            "POST", "/build", params=wanted, data=context, headers=headers, begin=UPLOAD_DEADLINE
        ) as stream:
            async for told in stream.objects():
                if told.get("id") == _TRACE:
                    yield {"trace": base64.b64decode(told["aux"])}
                else:
                    yield told
