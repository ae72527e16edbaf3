"""The way into a cluster: from a kubeconfig, or from the service account of the pod that we run in.

`kubernetes_asyncio` reads the files and runs the credential plugins. It is imported where it is needed, and in a
thread: that takes two seconds of CPU and 70 MB, whatever of it is named. What it must not do is done here:

- Certificates go from the data into the TLS context: it would leave keys in temporary files, which it never closes.
- It has no deadlines, and leaves plugins behind that hang.
- It passes over what it does not know, or does not find: impersonation, auth-providers, the user itself.
- It asks an OIDC issuer for tokens without looking at its certificate, and cannot keep the new refresh token: an
  id-token is used as it stands there.
- It says what stands in the files, secrets too. Nothing of that comes into an error: files are named, and what is wrong
  with them, but not what they say.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import os
import re
import shutil
import ssl
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import psutil
import yaml
from multidict import CIMultiDict
from yarl import URL

from orchestrator.cluster.tls import Tls
from orchestrator.errors import ProviderUnavailable

if TYPE_CHECKING:
    from kubernetes_asyncio.client import Configuration
    from kubernetes_asyncio.config.kube_config import ConfigNode

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DEFAULT_KUBECONFIG = "~/.kube/config"

# Seconds for reading what is there, and for a plugin, which may have to ask its cloud.
DEADLINE = 60.0
# Seconds after which a token's file is read again: it is replaced long before the token expires.
TOKEN_AGE = 60.0
# Seconds before their end that credentials of a plugin are asked for anew.
_LEEWAY = 60.0
# Seconds between two attempts to get what was not to be had, while the old may still do, and between two runs of a
# plugin that fails.
_REST = 5.0

# What of `extensions` of a cluster is for plugins.
_EXTENSION = "client.authentication.k8s.io/exec"
_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
# In the environment of a plugin and of all that it starts.
_MARK, _INFO = "CLUSTER_CODE_PLUGIN", "CLUSTER_CODE_EXEC_INFO"
# Runs a plugin without our terminal, where it would ask someone; it is told so, and of the cluster where it wants to
# know. What it complains of may be secret, and nobody reads it before it has ended.
_QUIETLY = f'KUBERNETES_EXEC_INFO=${_INFO}; unset {_INFO}; exec "$@" </dev/null 2>/dev/null'


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
    """What was read in `where`: credentials that lack their TLS context, and that (None: no TLS)."""

    where: str
    credentials: Credentials
    tls: Tls | None
    # Seconds that it is good for.
    lasts: float


class Access(ABC):
    """The way into one cluster. Nothing is read before it is asked for: what is missing may still come."""

    # Whether it is that of the pod that we run in.
    in_cluster = False

    def __init__(self) -> None:
        self._loading = asyncio.Lock()
        self._credentials: Credentials | None = None
        self._due = 0.0
        # With the same context open connections are kept.
        self._tls: tuple[Tls, ssl.SSLContext] | None = None

    async def credentials(self) -> Credentials:
        """What is to be used now. Raises ProviderUnavailable, naming the file that is missing or wrong."""
        if (known := self._credentials) is not None and time.monotonic() < self._due:
            return known
        async with self._loading:
            known = self._credentials
            if known is None:
                return await self._read()
            if time.monotonic() >= self._due:
                try:
                    return await self._read()
                except ProviderUnavailable:
                    # They may do for a while yet; when they do not, `renew` says why there are no others.
                    self._due = time.monotonic() + _REST
            return known

    async def renew(self, refused: Credentials) -> Credentials:
        """What is to be used now that these were refused: read anew, unless that has been done since.

        Raises ProviderUnavailable.
        """
        async with self._loading:
            known = self._credentials
            if known is None or known is refused:
                # Whom the machine trusts may have changed, too.
                self._tls = None
                return await self._read()
            return known

    async def _read(self) -> Credentials:
        loaded = await self._load()
        if loaded.tls is None:
            self._credentials = loaded.credentials
        else:
            if self._tls is None or self._tls[0] != loaded.tls:
                self._tls = loaded.tls, await asyncio.to_thread(loaded.tls.context, loaded.where)
            self._credentials = replace(loaded.credentials, ssl=self._tls[1])
        self._due = time.monotonic() + loaded.lasts
        return self._credentials

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
        where = f"The service account in {self._folder}"
        async with _deadline(f"{where} cannot be read"):
            return await asyncio.to_thread(self._open, where)

    def _open(self, where: str) -> _Loaded:
        from kubernetes_asyncio.client import Configuration
        from kubernetes_asyncio.config.config_exception import ConfigException
        from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader

        if not os.environ.get("KUBERNETES_SERVICE_HOST"):
            raise ProviderUnavailable(
                "There is no service account, since this is no pod (KUBERNETES_SERVICE_HOST is not set): give the"
                " provider a kubeconfig."
            )
        authority, token_file = self._folder / "ca.crt", self._folder / "token"
        environment = {"KUBERNETES_SERVICE_PORT": "443"} | os.environ
        found = Configuration()
        with _readable(where):
            tls = Tls(authority.read_bytes())
            # It would read the token again when it is asked for it, on the loop.
            loader = InClusterConfigLoader(str(token_file), str(authority), False, environment)
            try:
                loader.load_and_set(found)
            except ConfigException as error:
                raise ProviderUnavailable(f"{where} cannot be used: {error}") from error
        return _Loaded(where, Credentials(loader.host, headers=_headers(found, token_file)), tls, TOKEN_AGE)


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
        async with _deadline(f"The kubeconfig {path} cannot be read"):
            chosen = await asyncio.to_thread(_choose, path, self._context)
        granted = await self._run(chosen, chosen.known.exec) if chosen.known.exec else _Granted()
        async with _deadline(f"What {path} names cannot be read"):
            return await asyncio.to_thread(chosen.load, granted)

    async def _run(self, chosen: _Chosen, plugin: _Plugin) -> _Granted:
        at, why = self._failed
        if time.monotonic() < at + _REST:
            raise ProviderUnavailable(why)
        try:
            return await _run(chosen, plugin)
        except ProviderUnavailable as error:
            self._failed = time.monotonic(), str(error)
            raise


# What a kubeconfig says. ---------------------------------------------------------------------------------------------


# What the library does not know, or takes for anything: `insecure-skip-tls-verify: "false"` for true.


class _Cluster(msgspec.Struct, rename="kebab"):
    server: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str | None = None
    proxy_url: str | None = None
    extensions: list[dict[str, Any]] | None = None


class _Variable(msgspec.Struct):
    name: str
    value: str


class _Plugin(msgspec.Struct, rename="camel"):
    command: str
    api_version: str
    args: list[str] | None = None
    env: list[_Variable] | None = None
    install_hint: str | None = None
    provide_cluster_info: bool = False
    interactive_mode: str | None = None


class _User(msgspec.Struct, rename="kebab"):
    token: str | None = None
    token_file: str | None = msgspec.field(name="tokenFile", default=None)
    as_: str | None = msgspec.field(name="as", default=None)
    as_uid: str | None = None
    as_groups: list[str] | None = None
    as_user_extra: dict[str, list[str]] | None = None
    exec: _Plugin | None = None
    auth_provider: dict[str, Any] | None = None


class _Granted(msgspec.Struct, rename="camel"):
    """What a plugin gives: a token, or a certificate with its key as PEM, or both."""

    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None
    expiration_timestamp: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The cluster and the user of one context; `name` is the kubeconfig's, as it is told to people."""

    name: str
    cluster: ConfigNode
    user: ConfigNode
    known: _User

    def load(self, granted: _Granted) -> _Loaded:
        """All that it takes to connect. Raises ProviderUnavailable."""
        from kubernetes_asyncio.client import Configuration
        from kubernetes_asyncio.config.kube_config import KubeConfigLoader

        server = _url(self.cluster.safe_get("server") or "", f"the server in {self.name}")
        shown = ("tokenFile",) if self.known.token_file and not granted.token else ("token", "username", "password")
        # Of certificates and plugins it is not told: see above.
        cluster = _picked(self.cluster, "server", "insecure-skip-tls-verify", "tls-server-name", "proxy-url")
        user = _picked(self.user, *shown)
        if token := granted.token or self._id_token():
            user["token"] = token
        loader = KubeConfigLoader(
            {
                "clusters": [{"name": "its", "cluster": cluster}],
                "users": [{"name": "its", "user": user}],
                "contexts": [{"name": "its", "context": {"cluster": "its", "user": "its"}}],
            },
            "its",
            config_base_path=str(_folder(self.user)),
        )
        found = Configuration()
        with _readable(self.name):
            # It waits for nothing now, but reads files.
            asyncio.run(loader.load_and_set(found))
            tls = self._tls(granted, verify=found.verify_ssl) if server.scheme == "https" else None
        token_file = _folder(self.user) / user["tokenFile"] if "tokenFile" in user else None
        headers = _headers(found, token_file)
        self._impersonate(headers)
        proxy = _url(found.proxy, f"the proxy-url in {self.name}") if found.proxy else None
        lasts = TOKEN_AGE if token_file else math.inf
        if granted.expiration_timestamp:
            left = (granted.expiration_timestamp - datetime.now(UTC)).total_seconds() - _LEEWAY
            # Not at once again, also where clocks differ.
            lasts = min(lasts, max(left, _REST))
        credentials = Credentials(
            str(server).rstrip("/"), headers=headers, server_name=found.tls_server_name, proxy=proxy
        )
        return _Loaded(self.name, credentials, tls, lasts)

    def _impersonate(self, headers: CIMultiDict[str]) -> None:
        user = self.known
        if user.as_:
            headers["Impersonate-User"] = user.as_
            if user.as_uid:
                headers["Impersonate-Uid"] = user.as_uid
            for group in user.as_groups or ():
                headers.add("Impersonate-Group", group)
            for key, values in (user.as_user_extra or {}).items():
                for value in values:
                    headers.add(f"Impersonate-Extra-{quote(key, safe='')}", value)

    def _id_token(self) -> str | None:
        """Of an OIDC issuer. When it has expired kubectl, or whoever put it there, has to get another."""
        if not (provider := self.known.auth_provider):
            return None
        config = provider.get("config")
        if provider.get("name") == "oidc" and isinstance(config, dict) and isinstance(config.get("id-token"), str):
            return str(config["id-token"])
        raise ProviderUnavailable(
            f"{self.name} gets its credentials in a way that Kubernetes has given up (auth-provider): use a credential"
            " plugin (exec)."
        )

    def _tls(self, granted: _Granted, *, verify: bool) -> Tls:
        authority = self.pem(self.cluster, "certificate-authority")
        if granted.client_certificate_data and granted.client_key_data:
            shown = granted.client_certificate_data.encode(), granted.client_key_data.encode()
            return Tls(authority, verify, *shown)
        return Tls(authority, verify, self.pem(self.user, "client-certificate"), self.pem(self.user, "client-key"))

    def pem(self, node: ConfigNode, what: str) -> bytes | None:
        """What stands there under a name, or in the file named there. Raises ProviderUnavailable, OSError."""
        from kubernetes_asyncio.config.kube_config import FileOrData

        data = FileOrData(_picked(node, what, f"{what}-data"), what, file_base_path=str(_folder(node))).as_data()
        try:
            return base64.b64decode("".join(data.split()), validate=True) if data else None
        except (binascii.Error, ValueError):
            raise ProviderUnavailable(f"{self.name} has {what}-data that is no base64: correct it.") from None


def _choose(path: str, context: str | None) -> _Chosen:
    """Read one or more kubeconfigs, and choose a context. Raises ProviderUnavailable."""
    from kubernetes_asyncio.config.kube_config import ConfigNode, KubeConfigMerger

    name = f"The kubeconfig {path}"
    with _readable(name):
        merger = KubeConfigMerger(path)
        if (merged := merger.config) is None:
            raise ProviderUnavailable(f"{name} is not there: set KUBECONFIG, or the provider's option `kubeconfig`.")
        # To the library the last counts.
        currents = (one.get("current-context") for one in merger.config_files.values())
        if not (context := context or next(filter(None, currents), None)):
            raise ProviderUnavailable(f"{name} has no current-context: set it, or the provider's option `context`.")
        if not (named := merged["contexts"].get_with_name(context, safe=True)):
            there = ", ".join(sorted(str(node["name"]) for node in merged.value["contexts"])) or "none"
            raise ProviderUnavailable(f"{name} has no context {context!r}: it has {there}.")
        found = {"cluster": ConfigNode("cluster", {}, path), "user": ConfigNode("user", {}, path)}
        for kind in found:
            # A user there need not be.
            if (wanted := named["context"].safe_get(kind)) or kind == "cluster":
                if not (entry := merged[f"{kind}s"].get_with_name(wanted, safe=True)):
                    raise ProviderUnavailable(f"{name} has no {kind} {wanted!r}, which the context {context!r} names.")
                found[kind] = ConfigNode(kind, entry.safe_get(kind) or {}, entry.path)
        msgspec.convert(found["cluster"].value, _Cluster)
        return _Chosen(name, **found, known=msgspec.convert(found["user"].value, _User))


# Credential plugins. -------------------------------------------------------------------------------------------------


async def _run(chosen: _Chosen, plugin: _Plugin) -> _Granted:
    """Run the plugin of a kubeconfig. What it prints is not shown: it may be secret.

    Raises ProviderUnavailable. Cancelling kills it.
    https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
    """
    from kubernetes_asyncio.config.config_exception import ConfigException
    from kubernetes_asyncio.config.exec_provider import ExecProvider

    what = f"the credential plugin {plugin.command!r} of {chosen.name}"
    if plugin.api_version not in _VERSIONS or plugin.interactive_mode == "Always":
        raise ProviderUnavailable(f"Cannot use {what}: it must be non-interactive, and of {' or '.join(_VERSIONS)}.")
    # A relative path is meant from the kubeconfig.
    program = shutil.which(_folder(chosen.user) / plugin.command if os.sep in plugin.command else plugin.command)
    if program is None:
        hint = f" {plugin.install_hint}" if plugin.install_hint else ""
        raise ProviderUnavailable(f"Did not find {what}: install it.{hint}")
    asked = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": {"interactive": False}}
    if plugin.provide_cluster_info:
        asked["spec"] = {"interactive": False, "cluster": await asyncio.to_thread(_described, chosen)}
    provider = ExecProvider(chosen.user["exec"])
    provider.args = ["sh", "-c", _QUIETLY, "sh", program, *(plugin.args or ())]
    mark = uuid.uuid4().hex
    provider.env |= {_MARK: mark, _INFO: msgspec.json.encode(asked).decode()}
    running = asyncio.create_task(provider.run(), name="credential plugin")
    try:
        async with _deadline(f"{what} does not end"):
            status = await asyncio.shield(running)
        granted = msgspec.convert(status, _Granted)
    except ConfigException as error:
        if code := re.match(r"exec: process returned (-?\d+)", str(error)):
            raise ProviderUnavailable(
                f"Got no credentials: {what} ended with {code[1]}. Run kubectl with this kubeconfig, as the same user,"
                " to see what it has to say."
            ) from None
        raise ProviderUnavailable(f"Got no credentials: {what} printed something else.") from None
    except OSError as error:
        raise ProviderUnavailable(f"Cannot run {what} ({error.strerror}).") from error
    except (TypeError, msgspec.ValidationError):
        # Not even as a cause: the reason might show what it printed.
        raise ProviderUnavailable(f"Got no credentials: {what} printed something else.") from None
    finally:
        if not running.done():
            _kill(mark)
            # It takes leave of its process, unless that is not ours to kill.
            await asyncio.wait([running], timeout=_REST)
            running.cancel()
    if not granted.token and not (granted.client_certificate_data and granted.client_key_data):
        raise ProviderUnavailable(f"Got no credentials: {what} printed neither a token nor a certificate with its key.")
    return granted


def _described(chosen: _Chosen) -> dict[str, Any]:
    """What a plugin that wants to know it is told of the cluster."""
    told = _picked(chosen.cluster, "server", "tls-server-name", "insecure-skip-tls-verify", "proxy-url")
    with _readable(chosen.name):
        if authority := chosen.pem(chosen.cluster, "certificate-authority"):
            told["certificate-authority-data"] = base64.b64encode(authority).decode()
    for one in chosen.cluster.safe_get("extensions") or ():
        if one.get("name") == _EXTENSION:
            told["config"] = one.get("extension")
    return told


def _kill(mark: str) -> None:
    """End a plugin with all that it has started."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                process.kill()


# Files and TLS. ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _deadline(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(DEADLINE):
            yield
    except TimeoutError:
        raise ProviderUnavailable(f"Gave up after {DEADLINE:.0f} seconds: {what}.") from None


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Tell what is wrong with the files that are read in the body, but not what they say."""
    from kubernetes_asyncio.config.config_exception import ConfigException

    try:
        yield
    except OSError as error:
        raise ProviderUnavailable(f"{error.filename or where} cannot be read ({error.strerror}).") from error
    except msgspec.ValidationError as error:
        raise ProviderUnavailable(f"{where} is not as it should be: {error}. Correct it.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name} is no YAML (line {mark.line + 1})" if mark else f"{where} is no YAML"
        # Not even as a cause: it shows the line.
        raise ProviderUnavailable(f"{place}: correct it.") from None
    except (AttributeError, LookupError, TypeError, ValueError, ConfigException):
        # With which the library meets what is YAML, but no kubeconfig.
        raise ProviderUnavailable(f"{where} is not as it should be: correct it.") from None


def _folder(node: ConfigNode) -> Path:
    """Where the kubeconfig lies: relative paths are meant from there."""
    return Path(node.path or "").absolute().parent


def _picked(node: ConfigNode, *names: str) -> dict[str, Any]:
    """What is said of these; to the library also nothing (`null`) is something."""
    return {name: value for name in names if (value := node.safe_get(name))}


def _headers(found: Configuration, token_file: Path | None) -> CIMultiDict[str]:
    """What each request has; the token with what the file has around it taken off."""
    shown = found.api_key.get("BearerToken", "").split()
    if token_file is not None and len(shown) < 2:
        raise ProviderUnavailable(f"{token_file} is empty: it should hold a token.")
    return CIMultiDict({"Authorization": " ".join(shown)} if shown else {})


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
