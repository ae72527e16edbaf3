"""The labels that a container of an app has: whose it is, and what Traefik is to do with it.

Everything that goes into a rule is held against a pattern first, so that no name and no domain can end the host it
stands for and begin a rule of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.docker import labels as marks
from orchestrator.errors import Invalid, SettingsError
from orchestrator.settings import DeploySettings

# `apps.name` in the database.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_HOST = re.compile(r"(?=.{1,253}\Z)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

# Only for connections that were refused: Traefik sends nothing a second time that a server may have seen. All
# containers define it, and a middleware that two define differently is dropped: so its name tells what it does.
_RETRY = "cluster-code-retry-3-100ms"
_MIDDLEWARE = {
    f"traefik.http.middlewares.{_RETRY}.retry.attempts": "3",
    f"traefik.http.middlewares.{_RETRY}.retry.initialinterval": "100ms",
}
# What an image may not say of the containers that are made from it: its labels become theirs.
_RESERVED = ("traefik.", "cluster-code.io/")
# What a container was made from: a hash.
SPEC = "cluster-code.io/spec"


def hosts(name: str, domains: Iterable[str], base_domain: str) -> list[str]:
    """Where an app is reached: its own host first, then its domains.

    Raises Invalid (`name`, `domains`). A domain under BASE_DOMAIN would be another app's, or ours.
    """
    if not _NAME.fullmatch(name):
        raise Invalid(f"{name!r} is no name of an app: use up to 40 of a-z, 0-9 and -.", field="name")
    own = f"{name}.{base_domain}"
    if not _HOST.fullmatch(own):
        raise Invalid(f"{own!r} is no host: choose a shorter name.", field="name")
    return list(dict.fromkeys([own, *(_domain(domain, own, base_domain) for domain in domains)]))


def url(name: str, settings: DeploySettings) -> str:
    """Where a browser finds the app. Raises Invalid."""
    scheme = "https" if settings.cert_resolver else "http"
    return f"{scheme}://{hosts(name, (), settings.base_domain)[0]}"


def ours(settings: DeploySettings, *, app_id: int | None = None, deployment_id: int | None = None) -> dict[str, str]:
    """What marks containers and images of apps: of all of ours, of one app, of one deployment."""
    return {
        marks.INSTANCE: settings.instance,
        marks.APP: "" if app_id is None else str(app_id),
        **({} if deployment_id is None else {marks.DEPLOYMENT: str(deployment_id)}),
    }


def routes(
    name: str, domains: Sequence[str], port: int, settings: DeploySettings, *, router: str | None = None
) -> dict[str, str]:
    """What Traefik's Docker provider reads. `router`: another name for the router than the app's.

    Raises Invalid (`name`, `domains`, `port`) and SettingsError.
    """
    if not 0 < port < 65536:
        raise Invalid(f"A port is 1 to 65535, not {port}.", field="port")
    for variable, words in _words(settings).items():
        for word in words:
            if not _WORD.fullmatch(word):
                raise SettingsError(f"{variable}: {word!r} is no name.")
    rule = " || ".join(f"Host(`{host}`)" for host in hosts(name, domains, settings.base_domain))
    known = router or name
    http = {
        f"routers.{known}.rule": rule,
        f"routers.{known}.entrypoints": ",".join(settings.entrypoints),
        f"routers.{known}.service": name,
        f"routers.{known}.middlewares": _RETRY,
        **({f"routers.{known}.tls.certresolver": settings.cert_resolver} if settings.cert_resolver else {}),
        f"services.{name}.loadbalancer.server.port": str(port),
    }
    return {
        "traefik.enable": "true",
        "traefik.docker.network": settings.network,
        **{f"traefik.http.{key}": value for key, value in http.items()},
        **_MIDDLEWARE,
    }


def clashes(these: Mapping[str, str], those: Mapping[str, str]) -> bool:
    """Whether two containers say different things of a router of the same name.

    Traefik then drops it, for as long as it sees both. Of a service each only says where itself is.
    """
    one, other = _routers(these), _routers(those)
    return any(one[router] != other[router] for router in one.keys() & other.keys())


def forbidden(image: Mapping[str, str]) -> list[str]:
    """The labels of an image that no image of an app may have, but for ours that its container gets anyway."""
    replaced = {marks.INSTANCE, marks.APP, marks.DEPLOYMENT, marks.COMMIT, marks.CACHE, SPEC}
    return sorted(key for key in image if key.lower().startswith(_RESERVED) and key not in replaced)


def _domain(domain: str, own: str, base_domain: str) -> str:
    if not _HOST.fullmatch(domain):
        raise Invalid(f"{domain!r} is no domain: write it as in app.example.com.", field="domains")
    if domain != own and f".{domain}".endswith(f".{base_domain}"):
        raise Invalid(f"{domain!r} is under {base_domain}, where each app has its own name.", field="domains")
    return domain


def _words(settings: DeploySettings) -> dict[str, list[str]]:
    return {
        "TRAEFIK_ENTRYPOINTS": settings.entrypoints,
        "TRAEFIK_CERT_RESOLVER": [settings.cert_resolver] if settings.cert_resolver else [],
        "DEPLOY_NETWORK": [settings.network],
        "DEPLOY_INSTANCE": [settings.instance],
    }


def _routers(labels: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What labels say of routers: by name and property."""
    said: dict[str, dict[str, str]] = {}
    for key, value in labels.items():
        if key.startswith("traefik.http.routers."):
            name, _, of = key.removeprefix("traefik.http.routers.").partition(".")
            said.setdefault(name, {})[of] = value
    return said
