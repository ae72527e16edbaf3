from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.cluster.objects import Ingress, Service
from orchestrator.providers.contract import Endpoint, Endpoints, SessionRef
from orchestrator.providers.endpoints import endpoints_of

REF = SessionRef(42, "project", "session-42")


def service(name: str, port: int = 80, *, ip: str = "10.0.0.9", path: str | None = None) -> Service:
    annotations = {"cluster-code.io/path": path} if path else {}
    return msgspec.convert(
        {
            "metadata": {"name": name, "annotations": annotations},
            "spec": {"clusterIP": ip, "ports": [{"name": "x", "port": port}]},
        },
        Service,
    )


SERVICES = [
    service("session-42", ip="10.0.0.1"),
    service("session-42-preview", 3000, path="/preview"),
    service("session-42-vscode", 8080),
    service("session-43-chat", 3001),
]


def ingress(*paths: tuple[str, str], host: str = "dev.example.com", tls: Any = (), address: Any = ()) -> Ingress:
    rules = [
        {
            "host": host,
            "http": {"paths": [{"path": path, "backend": {"service": {"name": name}}} for path, name in paths]},
        },
        {"host": "nothing.example.com"},
    ]
    return msgspec.convert(
        {
            "spec": {"rules": rules, "tls": list(tls)},
            "status": {"loadBalancer": {"ingress": list(address)}},
        },
        Ingress,
    )


def test_without_an_ingress_services_are_reached_in_the_cluster() -> None:
    assert endpoints_of(REF, SERVICES, []) == Endpoints(
        "10.0.0.1",
        preview=Endpoint("http://session-42-preview.project.svc:3000/preview", "/preview"),
        vscode=Endpoint("http://session-42-vscode.project.svc:8080/", "/"),
    )


def test_an_ingress_leads_to_the_services_that_it_names() -> None:
    found = endpoints_of(REF, SERVICES, [ingress(("/other", "other"), ("/code", "session-42-vscode"))])
    assert found.vscode == Endpoint("http://dev.example.com/code", "/code")
    assert found.preview == Endpoint("http://session-42-preview.project.svc:3000/preview", "/preview")


def test_what_a_service_says_of_its_path_counts_more_than_a_regular_expression() -> None:
    paths = ("/preview(/|$)(.*)", "session-42-preview"), ("/code(/|$)(.*)", "session-42-vscode")
    found = endpoints_of(REF, SERVICES, [ingress(*paths, tls=[{"hosts": ["dev.example.com"]}])])
    assert found.preview == Endpoint("https://dev.example.com/preview", "/preview")
    assert found.vscode == Endpoint("https://dev.example.com/code", "/code")


def test_a_certificate_for_all_hosts_or_for_a_wildcard_makes_https() -> None:
    for tls in ({"secretName": "any"}, {"hosts": ["*.example.com"]}):
        found = endpoints_of(REF, SERVICES, [ingress(("/p", "session-42-vscode"), tls=[tls])])
        assert found.vscode == Endpoint("https://dev.example.com/p", "/p")
    found = endpoints_of(REF, SERVICES, [ingress(("/p", "session-42-vscode"), tls=[{"hosts": ["example.com"]}])])
    assert found.vscode == Endpoint("http://dev.example.com/p", "/p")


def test_a_rule_without_a_host_is_reached_at_the_controllers_address() -> None:
    path = "/p", "session-42-vscode"
    for address, host in (({"ip": "fd00::1"}, "[fd00::1]"), ({"ip": "1.2.3.4"}, "1.2.3.4"), ({"hostname": "lb"}, "lb")):
        found = endpoints_of(REF, SERVICES, [ingress(path, host="", address=[{}, address])])
        assert found.vscode == Endpoint(f"http://{host}/p", "/p")
    assert endpoints_of(REF, SERVICES, [ingress(path, host="")]) == endpoints_of(REF, SERVICES, [])


def test_nothing_is_reached_where_there_is_nothing() -> None:
    assert endpoints_of(REF, [], []) == Endpoints()
    assert endpoints_of(REF, [service("session-42", ip="None")], []) == Endpoints()
