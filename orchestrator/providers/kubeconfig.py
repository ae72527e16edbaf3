"""A kubeconfig from a provider's endpoint and credentials, in memory: no secret of ours lies on a disk."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping

_NAME = "cluster-code"


class PrivateKubeconfig:
    """A kubeconfig that this process and its children can read at `path` until `close`; nobody else can."""

    def __init__(self, text: str) -> None:
        self._file = os.memfd_create("kubeconfig")
        with os.fdopen(os.dup(self._file), "w") as file:
            file.write(text)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self._closed = False

    def close(self) -> None:
        """Give it back. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._file)


def text(endpoint: str | None, credentials: Mapping[str, str]) -> str | None:
    """What the kubeconfig says: that of the credentials, or one for the endpoint and its token; None where neither is.

    They are as `machine_schema.ProviderSchema` lets them pass.
    """
    if "kubeconfig" in credentials:
        return credentials["kubeconfig"]
    if endpoint is None:
        return None
    cluster = {"server": endpoint}
    if authority := credentials.get("certificate_authority"):
        cluster["certificate-authority-data"] = base64.b64encode(authority.encode()).decode()
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": _NAME,
            "contexts": [{"name": _NAME, "context": {"cluster": _NAME, "user": _NAME}}],
            "clusters": [{"name": _NAME, "cluster": cluster}],
            "users": [{"name": _NAME, "user": {"token": credentials["token"]}}],
        }
    )
