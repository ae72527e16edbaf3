"""The way into a cluster: from a kubeconfig, or from the service account of the pod that we run in.

Read here and not by `kubernetes_asyncio`: that takes 80 MB and two seconds of the loop to import, leaves private keys
in temporary files, waits for credential plugins without a deadline, asks an OIDC issuer for tokens without looking at
its certificate, and keeps the line end of a token's file. Nothing that is read here ever comes into an error: files are
named, and what is wrong with them, but not what they say.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import os
import ssl
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import yaml
from multidict import CIMultiDict
from yarl import URL

from orchestrator.cluster import plugin
from orchestrator.cluster.plugin import Plugin
from orchestrator.errors import ProviderUnavailable

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DEFAULT_KUBECONFIG = "~/.kube/config"

# Seconds after which a token's file is read again: it is replaced long before the token expires.
TOKEN_AGE = 60.0
# Seconds before their end that credentials of a plugin are asked for anew.
_LEEWAY = 60.0
# Seconds between two attempts to get what was not to be had, while the old may still do, and between two runs of a
# plugin that fails.
_REST = 5.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """Where the API is, and what to show it. What may hold a secret is left out of the representation."""

    # `https://host:port`, perhaps with a path; no slash at the end.
    server: str
    ssl: ssl.SSLContext | None = None
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict, repr=False)
    # That the server's certificate is for, where it is not the host's.
    server_name: str | None = None
    proxy: URL | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _Loaded:
    credentials: Credentials
    # Holds the bearer token, and is read again and again.
    token_file: Path | None = None
    # Seconds that the credentials are good for.
    lasts: float = math.inf


class Access(ABC):
    """The way into one cluster. Nothing is read before it is asked for: what is missing may still come."""

    # Whether it is that of the pod that we run in.
    in_cluster = False

    def __init__(self) -> None:
        self._loading = asyncio.Lock()
        self._loaded: _Loaded | None = None
        self._due = 0.0

    async def credentials(self) -> Credentials:
        """What is to be used now. Raises ProviderUnavailable, naming the file that is missing or wrong."""
        if (loaded := self._loaded) is not None and time.monotonic() < self._due:
            return loaded.credentials
        async with self._loading:
            loaded = self._loaded
            if loaded is None:
                return self._take(await self._load())
            if time.monotonic() >= self._due:
                try:
                    loaded = await self._reread(loaded)
                except ProviderUnavailable:
                    # They may do for a while yet; when they do not, `renew` says why there are no others.
                    self._due = time.monotonic() + _REST
                else:
                    self._take(loaded)
            return loaded.credentials

    async def renew(self, refused: Credentials) -> Credentials:
        """What is to be used now that these were refused: read anew, unless that has been done since.

        Raises ProviderUnavailable.
        """
        async with self._loading:
            loaded = self._loaded
            if loaded is None or loaded.credentials is refused:
                return self._take(await self._load())
            return loaded.credentials

    def _take(self, loaded: _Loaded) -> Credentials:
        self._loaded = loaded
        self._due = time.monotonic() + (TOKEN_AGE if loaded.token_file else loaded.lasts)
        return loaded.credentials

    async def _reread(self, loaded: _Loaded) -> _Loaded:
        if loaded.token_file is None:
            return await self._load()
        headers = loaded.credentials.headers.copy()
        headers["Authorization"] = f"Bearer {await asyncio.to_thread(_token, loaded.token_file)}"
        # With the same TLS context open connections are kept, too.
        return replace(loaded, credentials=replace(loaded.credentials, headers=headers))

    @abstractmethod
    async def _load(self) -> _Loaded: ...


def find(kubeconfig: str | None = None, context: str | None = None, in_cluster: bool | None = None) -> Access:
    """The way in that is asked for. Without any: KUBECONFIG, else the service account of our pod, else ~/.kube/config.

    Reads nothing yet.
    """
    named = kubeconfig or context or os.environ.get("KUBECONFIG")
    if in_cluster or (in_cluster is None and not named and ServiceAccount.there()):
        return ServiceAccount()
    return Kubeconfig(kubeconfig, context)


class ServiceAccount(Access):
    """That of the pod that we run in: `folder` has its token, which is replaced again and again, and the CA."""

    in_cluster = True

    def __init__(self, folder: Path = SERVICE_ACCOUNT) -> None:
        super().__init__()
        self._folder = folder

    @staticmethod
    def there() -> bool:
        """Whether we run in a pod that has one."""
        return "KUBERNETES_SERVICE_HOST" in os.environ and (SERVICE_ACCOUNT / "token").exists()

    async def _load(self) -> _Loaded:
        return await asyncio.to_thread(self._read)

    def _read(self) -> _Loaded:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ProviderUnavailable(
                "There is no service account, since this is no pod (KUBERNETES_SERVICE_HOST is not set): give the"
                " provider a kubeconfig."
            )
        authority, token_file = self._folder / "ca.crt", self._folder / "token"
        headers = CIMultiDict({"Authorization": f"Bearer {_token(token_file)}"})
        context = _tls_context(_read(authority), str(authority))
        place = f"[{host}]" if ":" in host else host
        return _Loaded(Credentials(f"https://{place}:{port}", context, headers), token_file)


class Kubeconfig(Access):
    """A kubeconfig, and one of its contexts (None: its current one).

    `path` may be several, with `:` between them, merged as kubectl does: what comes first counts. None: KUBECONFIG,
    else `~/.kube/config`. What a context asks for and cannot be had is refused, never passed over.
    """

    def __init__(self, path: str | None = None, context: str | None = None) -> None:
        super().__init__()
        self._path = path
        self._context = context
        # When the plugin failed last, by `time.monotonic()`, and why.
        self._failed = (-math.inf, "")

    async def _load(self) -> _Loaded:
        path = self._path or os.environ.get("KUBECONFIG") or DEFAULT_KUBECONFIG
        chosen = await asyncio.to_thread(_choose, path, self._context)
        granted = plugin.Granted()
        if chosen.user.exec is not None:
            granted = await self._run(chosen, chosen.user.exec)
        return await asyncio.to_thread(chosen.load, granted)

    async def _run(self, chosen: _Chosen, named: Plugin) -> plugin.Granted:
        at, why = self._failed
        if time.monotonic() < at + _REST:
            raise ProviderUnavailable(why)
        try:
            return await plugin.run(named, chosen.described(), Path(chosen.user.folder), chosen.name)
        except ProviderUnavailable as error:
            self._failed = time.monotonic(), str(error)
            raise


# What a kubeconfig says. ---------------------------------------------------------------------------------------------


class _Cluster(msgspec.Struct, rename="kebab"):
    server: str = ""
    certificate_authority: str | None = None
    certificate_authority_data: str | None = None
    insecure_skip_tls_verify: bool = False
    tls_server_name: str | None = None
    proxy_url: str | None = None
    extensions: list[dict[str, Any]] | None = None


class _User(msgspec.Struct, rename="kebab"):
    client_certificate: str | None = None
    client_certificate_data: str | None = None
    client_key: str | None = None
    client_key_data: str | None = None
    token: str | None = None
    token_file: str | None = msgspec.field(name="tokenFile", default=None)
    username: str | None = None
    password: str | None = None
    as_: str | None = msgspec.field(name="as", default=None)
    as_uid: str | None = None
    as_groups: list[str] | None = None
    as_user_extra: dict[str, list[str]] | None = None
    exec: Plugin | None = None
    auth_provider: dict[str, Any] | None = None
    # Where its kubeconfig lies.
    folder: str = ""


class _Context(msgspec.Struct):
    cluster: str = ""
    user: str = ""


class _NamedCluster(msgspec.Struct):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct):
    name: str
    user: _User | None = None


class _NamedContext(msgspec.Struct):
    name: str
    context: _Context


class _Config(msgspec.Struct, rename="kebab"):
    current_context: str | None = None
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None
    contexts: list[_NamedContext] | None = None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The cluster and the user of one context; `name` is the kubeconfig's, as it is told to people."""

    name: str
    cluster: _Cluster
    user: _User

    def described(self) -> dict[str, Any]:
        """What a plugin that wants to know it is told of the cluster."""
        cluster = self.cluster
        own = next((one for one in cluster.extensions or () if one.get("name") == plugin.EXTENSION), {})
        authority = self._data(
            "certificate-authority", cluster.certificate_authority_data, cluster.certificate_authority
        )
        told = {
            "server": cluster.server,
            "tls-server-name": cluster.tls_server_name,
            "insecure-skip-tls-verify": cluster.insecure_skip_tls_verify or None,
            "certificate-authority-data": base64.b64encode(authority).decode() if authority else None,
            "proxy-url": cluster.proxy_url,
            "config": own.get("extension"),
        }
        return {name: value for name, value in told.items() if value is not None}

    def load(self, granted: plugin.Granted) -> _Loaded:
        """All that it takes to connect. Raises ProviderUnavailable."""
        cluster = self.cluster
        server = _url(cluster.server, f"the server in {self.name}")
        proxy = _url(cluster.proxy_url, f"the proxy-url in {self.name}") if cluster.proxy_url else None
        headers, token_file = self._headers(granted)
        expires = granted.expiration_timestamp
        return _Loaded(
            Credentials(
                str(server).rstrip("/"),
                self._context(granted) if server.scheme == "https" else None,
                headers,
                cluster.tls_server_name,
                proxy,
            ),
            token_file,
            # Not at once again, also where clocks differ.
            max((expires - datetime.now(UTC)).total_seconds() - _LEEWAY, _REST) if expires else math.inf,
        )

    def _headers(self, granted: plugin.Granted) -> tuple[CIMultiDict[str], Path | None]:
        """What each request has, and the file of the token in there."""
        user, headers, token_file = self.user, CIMultiDict[str](), None
        if user.token_file and not granted.token:
            # It counts for more than a token that stands there, as with kubectl.
            token_file = Path(user.folder, user.token_file)
            headers["Authorization"] = f"Bearer {_token(token_file)}"
        elif token := granted.token or user.token or self._id_token():
            headers["Authorization"] = f"Bearer {token.strip()}"
        elif user.username:
            both = f"{user.username}:{user.password or ''}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(both).decode()}"
        if user.as_:
            headers["Impersonate-User"] = user.as_
            if user.as_uid:
                headers["Impersonate-Uid"] = user.as_uid
            for group in user.as_groups or ():
                headers.add("Impersonate-Group", group)
            for key, values in (user.as_user_extra or {}).items():
                for value in values:
                    headers.add(f"Impersonate-Extra-{quote(key, safe='')}", value)
        return headers, token_file

    def _id_token(self) -> str | None:
        """Of an OIDC issuer. When it has expired kubectl, or whoever put it there, has to get another."""
        if not (provider := self.user.auth_provider):
            return None
        config = provider.get("config")
        if provider.get("name") == "oidc" and isinstance(config, dict) and isinstance(config.get("id-token"), str):
            return str(config["id-token"])
        raise ProviderUnavailable(
            f"{self.name} gets its credentials in a way that Kubernetes has given up (auth-provider): use a credential"
            " plugin (exec)."
        )

    def _context(self, granted: plugin.Granted) -> ssl.SSLContext:
        cluster, user = self.cluster, self.user
        authority = self._data(
            "certificate-authority", cluster.certificate_authority_data, cluster.certificate_authority
        )
        context = _tls_context(authority, self.name, verify=not cluster.insecure_skip_tls_verify)
        if granted.client_certificate_data and granted.client_key_data:
            certificate: bytes | None = granted.client_certificate_data.encode()
            key: bytes | None = granted.client_key_data.encode()
        else:
            certificate = self._data("client-certificate", user.client_certificate_data, user.client_certificate)
            key = self._data("client-key", user.client_key_data, user.client_key)
        if certificate and key:
            _present(context, certificate, key, self.name)
        return context

    def _data(self, what: str, data: str | None, path: str | None) -> bytes | None:
        if data:
            try:
                return base64.b64decode("".join(data.split()), validate=True)
            except (binascii.Error, ValueError):
                raise ProviderUnavailable(f"{self.name} has {what}-data that is no base64: correct it.") from None
        return _read(Path(path)) if path else None


def _choose(path: str, context: str | None) -> _Chosen:
    """Read one or more kubeconfigs, and choose a context. Raises ProviderUnavailable."""
    name = f"The kubeconfig {path}"
    paths = [file for one in path.split(os.pathsep) if one and (file := Path(one).expanduser()).exists()]
    if not paths:
        raise ProviderUnavailable(f"{name} is not there: set KUBECONFIG, or the provider's option `kubeconfig`.")
    configs = [_config(file) for file in paths]
    context = context or next((one.current_context for one in configs if one.current_context), None)
    if not context:
        raise ProviderUnavailable(f"{name} has no current-context: set it, or the provider's option `context`.")
    contexts = {one.name: one.context for config in reversed(configs) for one in reversed(config.contexts or [])}
    if context not in contexts:
        raise ProviderUnavailable(f"{name} has no context {context!r}: it has {', '.join(sorted(contexts)) or 'none'}.")
    chosen = contexts[context]
    clusters = {one.name: one.cluster for config in reversed(configs) for one in reversed(config.clusters or [])}
    if chosen.cluster not in clusters:
        raise ProviderUnavailable(f"{name} has no cluster {chosen.cluster!r}, which the context {context!r} names.")
    users = {one.name: one.user for config in reversed(configs) for one in reversed(config.users or [])}
    if chosen.user and chosen.user not in users:
        raise ProviderUnavailable(f"{name} has no user {chosen.user!r}, which the context {context!r} names.")
    return _Chosen(name, clusters[chosen.cluster], users.get(chosen.user) or _User())


def _config(path: Path) -> _Config:
    """Read one kubeconfig; its relative paths are meant from where it lies."""
    name, folder = f"The kubeconfig {path}", path.absolute().parent
    try:
        config = msgspec.convert(yaml.safe_load(_read(path)) or {}, _Config)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        # Not even as a cause: it shows the line.
        raise ProviderUnavailable(f"{name} is no YAML{where}: correct it.") from None
    except msgspec.ValidationError as error:
        raise ProviderUnavailable(f"{name} is not as it should be: {error}. Correct it.") from None
    for one in config.clusters or ():
        if one.cluster.certificate_authority:
            one.cluster.certificate_authority = str(folder / one.cluster.certificate_authority)
    for each in config.users or ():
        if user := each.user:
            user.folder = str(folder)
            user.client_certificate = str(folder / user.client_certificate) if user.client_certificate else None
            user.client_key = str(folder / user.client_key) if user.client_key else None
    return config


# Files and TLS. ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProviderUnavailable(f"{path} cannot be read ({error.strerror}).") from error


def _token(path: Path) -> str:
    token = _read(path).decode(errors="replace").strip()
    if not token:
        raise ProviderUnavailable(f"{path} is empty: it should hold a token.")
    return token


def _url(text: str, what: str) -> URL:
    try:
        url = URL(text)
        # A port that is none shows when it is asked for.
        if url.scheme in ("http", "https") and url.host and url.port:
            return url
    except ValueError:
        # The reason would show it, and with it a password.
        pass
    raise ProviderUnavailable(f"Not a URL of http or https is {what}: correct it.")


def _tls_context(authority: bytes | None, where: str, *, verify: bool = True) -> ssl.SSLContext:
    """Trusts the authority (PEM), or without one what the machine trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif authority is None:
        context.load_default_certs()
    else:
        try:
            context.load_verify_locations(cadata=authority.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ProviderUnavailable(f"{where} has a certificate authority that is no certificate (PEM).") from None
    return context


def _present(context: ssl.SSLContext, certificate: bytes, key: bytes, where: str) -> None:
    """Show a certificate (PEM) to servers. OpenSSL takes it from files only, which are gone when this returns."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-") as folder:
        paths = Path(folder, "certificate"), Path(folder, "key")
        for path, content in zip(paths, (certificate, key), strict=True):
            path.touch(mode=0o600)
            path.write_bytes(content)
        try:
            # A key with a password would be asked for at the terminal.
            context.load_cert_chain(*paths, password="")
        except (ssl.SSLError, ValueError):
            raise ProviderUnavailable(
                f"{where} has a client certificate or a key that cannot be used: both must be PEM, belong together, and"
                " have no password."
            ) from None
