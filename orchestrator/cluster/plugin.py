"""Credential plugins: the programs that kubeconfigs of clouds name, which print what to show to the API.

https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.errors import ProviderUnavailable

# Seconds: it may have to ask its cloud.
DEADLINE = 60.0
# What of `extensions` of a cluster is for plugins.
EXTENSION = "client.authentication.k8s.io/exec"
_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class _Variable(msgspec.Struct):
    name: str
    value: str


class Plugin(msgspec.Struct, rename="camel"):
    """`exec` of a user in a kubeconfig."""

    command: str
    api_version: str
    args: list[str] | None = None
    env: list[_Variable] | None = None
    install_hint: str | None = None
    provide_cluster_info: bool = False
    interactive_mode: str | None = None


class Granted(msgspec.Struct, rename="camel"):
    """What a plugin gives: a token, or a certificate with its key as PEM, or both."""

    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None
    expiration_timestamp: datetime | None = None


class _Answer(msgspec.Struct, rename="camel"):
    api_version: str
    status: Granted


async def run(plugin: Plugin, cluster: Mapping[str, Any], folder: Path, where: str) -> Granted:
    """Run a plugin of the kubeconfig `where` (its name in errors) that lies in `folder`, and return what it grants.

    `cluster` is what a plugin that asks for it is told of the cluster. What it prints is not shown: it may be secret.
    Raises ProviderUnavailable. Cancelling kills it.
    """
    what = f"the credential plugin {plugin.command!r} of {where}"
    if plugin.api_version not in _VERSIONS or plugin.interactive_mode == "Always":
        raise ProviderUnavailable(f"Cannot use {what}: it must be non-interactive, and of {' or '.join(_VERSIONS)}.")
    # A relative path is meant from the kubeconfig.
    program = shutil.which(str(folder / plugin.command) if os.sep in plugin.command else plugin.command)
    if program is None:
        hint = f" {plugin.install_hint}" if plugin.install_hint else ""
        raise ProviderUnavailable(f"Did not find {what}: install it.{hint}")
    spec: dict[str, Any] = {"interactive": False}
    if plugin.provide_cluster_info:
        spec["cluster"] = cluster
    asked = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
    environment = {one.name: one.value for one in plugin.env or ()}
    environment["KUBERNETES_EXEC_INFO"] = msgspec.json.encode(asked).decode()
    process = await asyncio.create_subprocess_exec(
        program,
        *(plugin.args or ()),
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            out, _ = await process.communicate()
    except TimeoutError:
        raise ProviderUnavailable(f"Gave up after {DEADLINE:.0f} seconds: {what} does not end.") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        raise ProviderUnavailable(
            f"Got no credentials: {what} ended with {process.returncode}. Run kubectl with this kubeconfig, as the same"
            " user, to see what it has to say."
        )
    try:
        granted = msgspec.json.decode(out, type=_Answer).status
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Not even as a cause: the reason might show what it printed.
        raise ProviderUnavailable(f"Got no credentials: {what} printed something else.") from None
    if not granted.token and not (granted.client_certificate_data and granted.client_key_data):
        raise ProviderUnavailable(f"Got no credentials: {what} printed neither a token nor a certificate with its key.")
    return granted
