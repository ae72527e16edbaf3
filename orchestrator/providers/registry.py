"""Which code stands behind each kind of provider."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster.tls import Tls
from orchestrator.errors import SettingsError
from orchestrator.providers import kubeconfig
from orchestrator.providers.contract import LogSink, Provider
from orchestrator.providers.local import LocalProvider
from orchestrator.providers.options import DevPodOptions, DockerOptions, KubernetesOptions, LocalOptions


def open_provider(
    kind: str,
    name: str,
    options: Mapping[str, Any],
    *,
    endpoint: str | None = None,
    credentials: Mapping[str, str] | None = None,
    data_dir: Path,
    sink: LogSink,
    repo_schemes: Sequence[str] | None = None,
) -> Provider:
    """A provider that takes hold of its place at the first call (`check`, say) and is to be closed.

    `endpoint` and `credentials` (values, as `orchestrator.credentials` finds them) are what its kind takes.
    `repo_schemes` are those of repositories, unless the provider's own options name others. Raises SettingsError,
    naming the provider, for wrong options and for a kind that this version cannot run.
    """
    schemes = {"repo_schemes": list(repo_schemes)} if repo_schemes is not None else {}
    if kind == "local":
        return LocalProvider(data_dir, sink, LocalOptions.load({**schemes, **options}, provider=name))
    if kind == "kubernetes":
        # Its client is large, and who has no cluster shall not pay for it.
        from orchestrator.providers.kubernetes import KubernetesProvider

        way_in = kubeconfig.text(endpoint, credentials or {})
        return KubernetesProvider(name, KubernetesOptions.load(options, provider=name), way_in)
    if kind == "docker":
        from orchestrator.docker.engine import Engine
        from orchestrator.providers.docker import DockerProvider

        loaded = DockerOptions.load({**schemes, **options}, provider=name)
        found = credentials or {}
        engine = Engine(endpoint or "", name=name, timeout=loaded.request_timeout, tls=_tls(name, found))
        return DockerProvider(name, loaded, engine, directory=data_dir, sink=sink, registries=found)
    if kind == "devpod":
        from orchestrator.providers.devpod import DevPodProvider

        # Over ssh it would clone with the keys of our own user, which an operator has to want.
        plain = [scheme for scheme in repo_schemes or () if scheme in ("https", "http")]
        schemes = {"repo_schemes": plain} if repo_schemes is not None else {}
        devpod = DevPodOptions.load({**schemes, **options}, provider=name)
        return DevPodProvider(name, data_dir, sink, devpod, endpoint=endpoint, credentials=credentials)
    raise SettingsError(
        f"The provider {name!r} is of the kind {kind!r}, which this version cannot run:"
        " known are 'local', 'docker', 'devpod' and 'kubernetes'."
    )


def _tls(name: str, credentials: Mapping[str, str]) -> ssl.SSLContext | None:
    """That of the credentials; None where they say nothing of it. Raises ProviderUnavailable: it cannot be used."""
    ca, cert, key = (value.encode() if (value := credentials.get(one)) else None for one in ("ca", "cert", "key"))
    if ca is None and cert is None:
        return None
    return Tls(ca, certificate=cert, key=key).context(f"The credentials of the provider {name!r}")
