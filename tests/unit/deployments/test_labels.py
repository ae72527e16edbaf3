"""What Traefik is told of an app, and that nobody can make it say something else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.deployments import labels
from orchestrator.docker import labels as marks
from orchestrator.errors import Invalid, SettingsError
from orchestrator.settings import DeploySettings

SETTINGS = DeploySettings(base_domain="apps.example.com")
# As Traefik reads a rule of ours: hosts, and nothing else.
RULE = re.compile(r"Host\(`[a-z0-9.-]+`\)( \|\| Host\(`[a-z0-9.-]+`\))*")
# What would end a host, a rule or a label, and what looks like a name.
HOSTILE = st.text(alphabet="ab9-.`)(|&!'\" \n\t\\{}$,@=:/*AÄ", max_size=50)


def test_an_app_is_reached_at_its_own_host_and_at_its_domains() -> None:
    assert labels.routes("shop", ["shop.example.org", "www.example.org"], 3000, SETTINGS) == {
        "traefik.enable": "true",
        "traefik.docker.network": "cluster-code",
        "traefik.http.routers.shop.rule": (
            "Host(`shop.apps.example.com`) || Host(`shop.example.org`) || Host(`www.example.org`)"
        ),
        "traefik.http.routers.shop.entrypoints": "web",
        "traefik.http.routers.shop.service": "shop",
        "traefik.http.routers.shop.middlewares": "cluster-code-retry-3-100ms",
        "traefik.http.services.shop.loadbalancer.server.port": "3000",
        "traefik.http.middlewares.cluster-code-retry-3-100ms.retry.attempts": "3",
        "traefik.http.middlewares.cluster-code-retry-3-100ms.retry.initialinterval": "100ms",
    }


def test_with_a_certificate_resolver_it_is_reached_over_tls() -> None:
    secure = replace(SETTINGS, cert_resolver="letsencrypt", entrypoints=["web", "websecure"])
    routes = labels.routes("shop", [], 3000, secure)
    assert routes["traefik.http.routers.shop.tls.certresolver"] == "letsencrypt"
    assert routes["traefik.http.routers.shop.entrypoints"] == "web,websecure"
    assert labels.url("shop", secure) == "https://shop.apps.example.com"
    assert labels.url("shop", SETTINGS) == "http://shop.apps.example.com"


@given(name=HOSTILE, domains=st.lists(HOSTILE, max_size=3))
def test_no_name_and_no_domain_injects_a_rule(name: str, domains: list[str]) -> None:
    try:
        routes = labels.routes(name, domains, 80, SETTINGS)
    except Invalid:
        return
    rules = [value for key, value in routes.items() if key.endswith(".rule")]
    assert len(rules) == 1
    assert RULE.fullmatch(rules[0])
    assert rules[0].startswith(f"Host(`{name}.apps.example.com`)")
    assert {key.split(".")[3] for key in routes if ".routers." in key or ".services." in key} == {name}


@pytest.mark.parametrize(
    "domain",
    [
        "",
        "localhost",
        "a b.example.org",
        "a`)||Host(`b.example.org",
        "-a.example.org",
        "a..example.org",
        "a.example.org.",
        "A.example.org",
        "a_b.example.org",
        f"{'a' * 64}.example.org",
        ".".join(["a" * 60] * 5),
        "a.example.org\n",
    ],
)
def test_what_is_no_domain_is_refused(domain: str) -> None:
    with pytest.raises(Invalid, match="is no domain") as refused:
        labels.hosts("shop", [domain], "apps.example.com")
    assert refused.value.field == "domains"


@pytest.mark.parametrize("domain", ["apps.example.com", "bank.apps.example.com", "a.b.apps.example.com"])
def test_a_domain_that_is_another_apps_host_is_refused(domain: str) -> None:
    with pytest.raises(Invalid, match="where each app has its own name"):
        labels.hosts("shop", [domain], "apps.example.com")


def test_an_app_may_name_its_own_host_again() -> None:
    hosts = labels.hosts("shop", ["shop.apps.example.com", "myapps.example.com"], "apps.example.com")
    assert hosts == ["shop.apps.example.com", "myapps.example.com"]


def test_a_port_is_a_port() -> None:
    with pytest.raises(Invalid, match="A port is 1 to 65535, not 65536"):
        labels.routes("shop", [], 65536, SETTINGS)


@pytest.mark.parametrize(
    ("variable", "wrong"),
    [
        ("TRAEFIK_ENTRYPOINTS", replace(SETTINGS, entrypoints=["web,other"])),
        ("TRAEFIK_CERT_RESOLVER", replace(SETTINGS, cert_resolver="a b")),
        ("DEPLOY_NETWORK", replace(SETTINGS, network="a/b")),
    ],
)
def test_settings_that_are_no_names_are_refused(variable: str, wrong: DeploySettings) -> None:
    with pytest.raises(SettingsError, match=f"^{variable}: "):
        labels.routes("shop", [], 80, wrong)


def test_what_traefik_would_drop_is_known() -> None:
    before = labels.routes("shop", ["shop.example.org"], 80, SETTINGS)
    assert not labels.clashes(labels.routes("shop", ["shop.example.org"], 81, SETTINGS), before)
    assert not labels.clashes(labels.routes("shop2", [], 80, SETTINGS), before)
    assert labels.clashes(labels.routes("shop", [], 80, SETTINGS), before)
    assert labels.clashes(labels.routes("shop", ["shop.example.org"], 80, replace(SETTINGS, cert_resolver="a")), before)
    assert not labels.clashes(labels.routes("shop", [], 80, SETTINGS, router="shop_7"), before)


def test_an_image_may_not_speak_to_traefik_or_for_us() -> None:
    said = {"Traefik.http.routers.a.rule": "Host(`a`)", "traefik.enable": "true", "maintainer": "me"}
    said |= {marks.APP: "1", marks.SESSION: "3", "cluster-code.io/other": "x"}
    assert labels.forbidden(said) == [
        "Traefik.http.routers.a.rule",
        "cluster-code.io/other",
        marks.SESSION,
        "traefik.enable",
    ]
