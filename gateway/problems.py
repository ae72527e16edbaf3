"""Answers that say no: RFC 9457 problem documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web


class Problem(Exception):
    """Raised anywhere while a request is handled; the middleware answers it.

    `detail` is a sentence for the caller; `errors` maps each wrong field to what is wrong with it. `in_use_by`: who
    holds up what is refused.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Mapping[str, Sequence[str]] | None = None,
        headers: Mapping[str, str] | None = None,
        in_use_by: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}
        self.in_use_by = in_use_by

    def response(self, request_id: str) -> web.Response:
        """The answer, `application/problem+json`."""
        document: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.errors:
            document["errors"] = self.errors
        if self.in_use_by:
            document["in_use_by"] = self.in_use_by
        return web.Response(
            status=self.status,
            body=orjson.dumps(document),
            content_type="application/problem+json",
            headers=self.headers,
        )
