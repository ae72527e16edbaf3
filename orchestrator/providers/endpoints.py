"""Where a session in a cluster is reached: its Services and its Ingress as they are, whoever made them so."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.cluster.objects import Ingress, IngressPath, Service
from orchestrator.machine_kinds import SERVICES
from orchestrator.providers.contract import Endpoint, Endpoints, SessionRef

# On a Service: the path that people find it at, whatever a controller makes of the Ingress's.
PATH = "cluster-code.io/path"


def endpoints_of(ref: SessionRef, services: Iterable[Service], ingresses: Iterable[Ingress]) -> Endpoints:
    """The cluster's address of the session, and of each service the URL: the Ingress's, else the one in the cluster."""
    by_name = {service.metadata.name: service for service in services}
    ingresses = list(ingresses)
    whole = by_name.get(ref.container_name)
    found: dict[str, Endpoint] = {}
    for name in SERVICES:
        service = by_name.get(f"{ref.container_name}-{name}")
        if service is None:
            continue
        outside = next((one for ingress in ingresses for one in _outside(ingress, service)), None)
        if outside is not None:
            found[name] = outside
        elif service.spec.ports:
            path = service.metadata.annotations.get(PATH, "/")
            host = f"{service.metadata.name}.{ref.namespace}.svc:{service.spec.ports[0].port}"
            found[name] = Endpoint(f"http://{host}{path}", path)
    address = whole.spec.cluster_ip if whole is not None else ""
    return Endpoints(ip_address=address if address not in ("", "None") else None, **found)


def _outside(ingress: Ingress, service: Service) -> Iterable[Endpoint]:
    """The places where an Ingress leads to a service, as far as they can be named."""
    for rule in ingress.spec.rules:
        host = rule.host or _address(ingress)
        for one in rule.http.paths if rule.http is not None else ():
            if host and one.backend.service is not None and one.backend.service.name == service.metadata.name:
                path = service.metadata.annotations.get(PATH) or _plain(one)
                yield Endpoint(f"{'https' if _secure(ingress, rule.host) else 'http'}://{host}{path}", path)


def _address(ingress: Ingress) -> str:
    """Of the controller: what a rule without a host is reached at."""
    for address in ingress.status.load_balancer.ingress:
        if address.hostname or address.ip:
            return address.hostname or (f"[{address.ip}]" if ":" in address.ip else address.ip)
    return ""


def _plain(path: IngressPath) -> str:
    """The path as far as it is no regular expression, which some controllers take."""
    return path.path.partition("(")[0] or "/"


def _secure(ingress: Ingress, host: str) -> bool:
    """Whether the host is served by https. An entry without hosts is for all of them."""
    wildcard = "*." + host.partition(".")[2]
    return any(not tls.hosts or host in tls.hosts or wildcard in tls.hosts for tls in ingress.spec.tls)
