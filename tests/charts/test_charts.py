"""The charts without a cluster: what they become, what they refuse, and what they promise in their READMEs.

After a change that is meant: `python -m tests.charts.chart`, and look at the difference.
"""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from gateway.settings import GatewaySettings, RealtimeSettings
from orchestrator.cluster import objects as labels
from orchestrator.machine_fields import parse_bytes, parse_cores
from orchestrator.machine_kinds import SERVICES
from orchestrator.settings import variables
from scripts.reference import SECTIONS
from tests.charts import chart
from tests.charts.chart import CASES, NAMES, NAMESPACE, Case

# The kinds that the charts may use, and since when, until when Kubernetes has each: (first, first without), minor of 1.
SERVED = {
    ("apps/v1", "Deployment"): (9, None),
    ("autoscaling/v2", "HorizontalPodAutoscaler"): (23, None),
    ("autoscaling/v2beta2", "HorizontalPodAutoscaler"): (12, 26),
    ("batch/v1", "Job"): (8, None),
    # What the Prometheus operator brings along.
    ("monitoring.coreos.com/v1", "ServiceMonitor"): (0, None),
    ("networking.k8s.io/v1", "Ingress"): (19, None),
    ("networking.k8s.io/v1", "NetworkPolicy"): (7, None),
    ("policy/v1", "PodDisruptionBudget"): (21, None),
    ("policy/v1beta1", "PodDisruptionBudget"): (5, 25),
    ("rbac.authorization.k8s.io/v1", "ClusterRole"): (8, None),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"): (8, None),
    **{
        ("v1", kind): (0, None)
        for kind in (
            "ConfigMap",
            "LimitRange",
            "Namespace",
            "PersistentVolumeClaim",
            "ResourceQuota",
            "Secret",
            "Service",
            "ServiceAccount",
        )
    },
}
SESSION = Case("dev-session-template", "defaults")
CONTAINER = Case("dev-container", "defaults")
SERVICE = Case("cluster-code", "defaults")


def _chat(**resources: Any) -> dict[str, Any]:
    return {"services": {"chat": {"resources": resources}}}


cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_a_chart_becomes_what_it_became_before(case: Case) -> None:
    now = chart.rendered(case)
    before = chart.objects(case.golden.read_text())
    change = difflib.unified_diff(_lines(before), _lines(now), "golden", "now", lineterm="")
    assert now == before, "\n".join(["python -m tests.charts.chart renews it", *change])


@cases
def test_helm_finds_nothing_to_complain_about(case: Case) -> None:
    linted = chart.helm(
        *("lint", "--strict", str(chart.CHARTS / case.chart), "--values", str(case.values)),
        *("--kube-version", case.kubernetes),
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert "[WARNING]" not in linted.stdout


@cases
def test_a_chart_uses_what_its_kubernetes_serves(case: Case) -> None:
    minor = int(case.kubernetes.split(".")[1])
    for one in chart.rendered(case):
        since, without = SERVED[one["apiVersion"], one["kind"]]
        assert since <= minor < (without or 1000), (one["apiVersion"], one["kind"])


@cases
def test_pods_have_no_right_that_they_do_not_need(case: Case) -> None:
    for owner, pod in _pods(case):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is (owner == "session-42-orchestrator")
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for container in pod["containers"] + pod.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            # It gives the volume to the pod's user, and can nothing else.
            root = container["name"] == "permissions"
            assert security["capabilities"].get("add") == (["CHOWN"] if root else None)
            assert security.get("runAsUser") == (0 if root else None)
            if security["readOnlyRootFilesystem"] and not root:
                assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


@cases
def test_what_runs_for_ever_is_probed_and_bounded(case: Case) -> None:
    for owner, pod in _pods(case):
        for container in pod["containers"]:
            assert "memory" in container["resources"]["limits"]
            if not owner.endswith("-migration"):
                assert {"readinessProbe", "livenessProbe"} <= container.keys()


@cases
def test_each_volume_that_is_mounted_is_there(case: Case) -> None:
    for _, pod in _pods(case):
        there = {volume["name"] for volume in pod["volumes"]}
        containers = pod["containers"] + pod.get("initContainers", [])
        assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == there


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_each_value_with_its_default_and_meaning(name: str) -> None:
    _, text, wanted = chart.readme(name)
    assert text == wanted, "python -m tests.charts.chart renews it"


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_knows_each_value(name: str) -> None:
    """One that it did not know would be refused as a typing error, although it is in the chart."""
    values = yaml.safe_load((chart.CHARTS / name / "values.yaml").read_text())
    schema = yaml.safe_load((chart.CHARTS / name / "values.schema.json").read_text())
    known = {key for key in schema["properties"] if key != "global"}
    assert known == values.keys()


@pytest.mark.parametrize(
    ("case", "values", "line"),
    [
        (SESSION, {"services": {"preview": {"port": 70000}}}, "services.preview.port: Must be less than or equal"),
        (SESSION, {"services": {"preview": {"prot": 1}}}, "services.preview: Additional property prot is not allowed"),
        (SESSION, {"service": {}}, "(root): Additional property service is not allowed"),
        (SESSION, {"services": {"chat": {"path": "chat"}}}, "services.chat.path: Does not match pattern"),
        (SESSION, {"services": {"chat": {"env": {"A B": "c"}}}}, 'services.chat.env: Property name of "A B"'),
        (SESSION, {"services": {"chat": {"image": None}}}, "services.chat.image: name an image, or set"),
        (SESSION, {"services": {name: {"enabled": False} for name in SERVICES}}, "services: at least one of"),
        (SESSION, {"replicas": 2}, "replicas: Must be less than or equal to 1"),
        (SESSION, {"session": "4/2"}, "session: Does not match pattern"),
        (SESSION, {"storage": {"size": "ten"}}, "storage.size: Does not match pattern"),
        (SESSION, {"storage": {"accessMode": "ReadOnly"}}, "storage.accessMode must be one of the following"),
        (SESSION, {"ingress": {"enabled": True}}, "ingress.host: name the host, or set ingress.enabled to false"),
        (SESSION, {"ingress": {"host": "Not A Host"}}, "ingress.host: Does not match pattern"),
        (SESSION, {"resources": {"cpu": "many"}}, "resources.cpu: Does not match pattern"),
        (SESSION, {"resources": {"cpu": "2m"}}, "resources.cpu: 2m leaves nothing for the service preview"),
        (SESSION, _chat(limits={"memory": "4Gi"}), "resources.memory: 4Gi leaves nothing for the service preview"),
        (SESSION, _chat(requests={"memory": "3Gi"}), "services.chat.resources.requests.memory: 3Gi is more than"),
        (SESSION, {"quota": {"pods": 0}}, "quota.pods: Must be greater than or equal to 1"),
        (CONTAINER, {"image": ""}, "image: name an image"),
        (CONTAINER, {"storage": {"path": "workspace"}}, "storage.path: Does not match pattern"),
        (CONTAINER, {"service": {"type": "Internal"}}, "service.type must be one of the following"),
        (CONTAINER, {"resources": {"limits": {"cpu": "-1"}}}, "resources.limits.cpu: Does not match pattern"),
        (SERVICE, {"image": {"repository": ""}}, "image.repository: name the image of Cluster Code in your registry"),
        (SERVICE, {"secrets": {"DATABASE_URL": ""}}, "secrets.DATABASE_URL: set it, or name a Secret that has it"),
        (SERVICE, {"secrets": {"AMQP_URL": ""}}, "secrets.AMQP_URL: set it, or name"),
        (SERVICE, {"secrets": {"AMQP_URL": "redis://here"}}, "secrets.AMQP_URL: Does not match pattern"),
        (SERVICE, {"secrets": {"JWT_SECRET": ""}}, "secrets.JWT_SECRET: set it, or name"),
        (SERVICE, {"secrets": {"JWT_SECRET": "short"}}, "secrets.JWT_SECRET: Does not match pattern"),
        (SERVICE, {"settings": {"DATABASE_URL": "x"}}, "settings.DATABASE_URL: this is a credential: put it under"),
        (SERVICE, {"settings": {"PORT": 80}}, "settings.PORT: the chart sets it"),
        (SERVICE, {"settings": {"log_level": "debug"}}, 'settings: Property name of "log_level"'),
        (SERVICE, {"ingress": {"enabled": True}}, "ingress.host: name the host"),
        (SERVICE, {"gateway": {"replicas": "two"}}, "gateway.replicas: Invalid type. Expected: integer, given: string"),
        (SERVICE, {"machines": {"machines": []}}, "machines: Additional property machines is not allowed"),
    ],
    ids=lambda value: None if isinstance(value, Case | dict) else value.split(": ")[0],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_a_line_that_names_it(case: Case, values: dict[str, Any], line: str) -> None:
    done = chart.template(case, **values)
    assert done.returncode != 0
    assert line in done.stderr
    assert not any(secret in done.stderr for secret in ("word", "redis://here"))


def test_all_of_a_session_says_whose_it_is() -> None:
    wanted = {
        labels.INSTANCE: "staging",
        labels.PROJECT: "6f1f9a52-5f0e-4f3b-8a0c-7a2a3f0a1b11",
        labels.SESSION: "4200000",
    }
    for one in chart.rendered(Case("dev-session-template", "everything")):
        assert one["metadata"]["labels"].items() >= wanted.items()
        if one["kind"] == "Deployment":
            assert one["spec"]["template"]["metadata"]["labels"].items() >= wanted.items()
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == NAMESPACE


def test_nothing_of_the_service_itself_is_taken_for_a_session() -> None:
    for one in chart.rendered(Case("cluster-code", "everything")):
        assert labels.INSTANCE not in one["metadata"]["labels"]


def test_a_new_version_of_a_chart_restarts_no_session() -> None:
    deployment = chart.only("Deployment", chart.rendered(SESSION))
    assert "helm.sh/chart" in deployment["metadata"]["labels"]
    assert "helm.sh/chart" not in deployment["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"resources": {"cpu": 0.1, "memory": "64Mi"}},
        {"resources": {"cpu": "7", "memory": 8589934592}},
        {"resources": {"cpu": "1500m", "memory": "3G"}, "services": {"chat": {"enabled": False}}},
        {"services": {"vscode": {"resources": {"limits": {"cpu": "1", "memory": "3Gi"}}}}},
        {"services": {"vscode": {"resources": {"limits": {"cpu": "500m"}, "requests": {"memory": "1Gi"}}}}},
        {"services": {"preview": {"share": 7}, "chat": {"share": 0.5}}},
    ],
)
def test_containers_share_the_whole_and_the_quota_has_room_for_the_next_pod(values: dict[str, Any]) -> None:
    clone = {"repository": {"image": "git"}, "storage": {"permissionsImage": "busybox"}}
    found = chart.rendered(SESSION, **values, **clone)
    pod = chart.only("Deployment", found)["spec"]["template"]["spec"]
    hard = chart.only("ResourceQuota", found)["spec"]["hard"]
    limits = chart.only("LimitRange", found)["spec"]["limits"][0]
    most = limits["max"]
    totals = {"cpu": "2000m", "memory": "4Gi"} | values.get("resources", {})
    assert hard["pods"] == "2"
    for resource, parse in (("cpu", parse_cores), ("memory", parse_bytes)):
        # Kubernetes refuses a LimitRange where it is otherwise.
        assert parse(limits["defaultRequest"][resource]) <= parse(limits["default"][resource]) <= parse(most[resource])
        whole = parse(totals[resource])
        for kind in ("limits", "requests"):
            each = [parse(one["resources"][kind][resource]) for one in pod["containers"]]
            first = [parse(one["resources"][kind][resource]) for one in pod["initContainers"]]
            # What Kubernetes counts for a pod.
            counted = max(sum(each), *first)
            assert 2 * counted <= parse(hard[f"{kind}.{resource}"]) + 1e-9
            if kind == "limits":
                assert whole * 0.95 <= sum(each) <= whole + 1e-9
                assert max(*each, *first) <= parse(most[resource]) + 1e-9
        for one in pod["containers"] + pod["initContainers"]:
            assert parse(one["resources"]["requests"][resource]) <= parse(one["resources"]["limits"][resource]) + 1e-9


def test_the_services_of_a_session_are_alike_but_for_their_ports_and_shares() -> None:
    """So that the README says it once."""
    services = yaml.safe_load((chart.CHARTS / "dev-session-template" / "values.yaml").read_text())["services"]
    assert tuple(services) == SERVICES
    own = {"port", "path", "share"}
    alike = [{key: value for key, value in one.items() if key not in own} for one in services.values()]
    assert alike[0] == alike[1] == alike[2]
    assert [one["port"] for one in services.values()] == [3000, 3001, 8080]
    assert [one["path"] for one in services.values()] == ["/preview", "/chat", "/vscode"]


def test_the_policies_of_sessions_let_the_gateways_in_that_the_service_has() -> None:
    gateway = chart.only("Deployment", chart.rendered(SERVICE), "session-42-gateway")
    has = gateway["spec"]["template"]["metadata"]["labels"]
    policy = chart.only("NetworkPolicy", chart.rendered(SESSION))
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    gateways, controllers = policy["spec"]["ingress"][0]["from"]
    assert gateways["podSelector"]["matchLabels"].items() <= has.items()
    assert controllers == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}


def test_a_policy_without_peers_lets_nobody_in() -> None:
    """In a NetworkPolicy, an empty `from` is everybody."""
    policy = chart.only("NetworkPolicy", chart.rendered(CONTAINER, networkPolicy={"from": []}))
    assert "ingress" not in policy["spec"]


def test_credentials_are_in_secrets_alone() -> None:
    for one in chart.rendered(Case("cluster-code", "everything")):
        assert (one["kind"] == "Secret") or ("word" not in yaml.safe_dump(one))


def test_the_service_knows_each_credential_by_its_name() -> None:
    secret = {one.name for _, settings in SECTIONS for one, _ in variables(settings) if one.secret}
    values = yaml.safe_load((chart.CHARTS / "cluster-code" / "values.yaml").read_text())
    # The other is of `cluster-code dev` alone.
    assert set(values["secrets"]) == secret - {"ADMIN_PASSWORD"}


def test_every_setting_that_the_chart_sets_is_one() -> None:
    names = {one.name for _, settings in SECTIONS for one, _ in variables(settings)}
    configured = chart.only("ConfigMap", chart.rendered(SERVICE, ingress={"enabled": True, "host": "a.example.com"}))
    assert configured["data"].keys() <= names


def test_a_change_of_settings_or_credentials_restarts_what_reads_them() -> None:
    def checksums(**values: Any) -> list[dict[str, str]]:
        found = chart.rendered(SERVICE, **values)
        return [
            chart.only("Deployment", found, f"session-42-{name}")["spec"]["template"]["metadata"]["annotations"]
            for name in ("gateway", "orchestrator")
        ]

    before = checksums()
    for values in ({"settings": {"LOG_LEVEL": "debug"}}, {"secrets": {"METRICS_TOKEN": "another"}}):
        assert all(one != other for one, other in zip(before, checksums(**values), strict=True))


def test_a_gateway_gets_the_time_that_draining_takes() -> None:
    defaults = {one.name: default for group in (GatewaySettings, RealtimeSettings) for one, default in variables(group)}
    grace, rate = defaults["SHUTDOWN_GRACE"], defaults["WS_DRAIN_RATE"]
    assert _grace() == 5 + 50_000 / rate + 2 * grace + 5
    assert _grace(settings={"SHUTDOWN_GRACE": 30, "WS_DRAIN_RATE": 100}) == 5 + 500 + 60 + 5
    assert _grace(gateway={"connections": 1000, "preStopSeconds": 0}) == 0 + 2 + 2 * grace + 5
    assert _grace(gateway={"terminationGracePeriodSeconds": 60}) == 60


def test_only_a_monitor_that_needs_a_token_shows_one() -> None:
    on = {"enabled": True}
    assert "authorization" not in _monitor(serviceMonitor=on)
    told = _monitor(serviceMonitor=on, secrets={"METRICS_TOKEN": "t"})["authorization"]["credentials"]
    assert (told["name"], told["key"]) == ("session-42", "METRICS_TOKEN")


def _grace(**values: Any) -> float:
    gateway = chart.only("Deployment", chart.rendered(SERVICE, **values), "session-42-gateway")
    seconds: float = gateway["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    return seconds


def _monitor(**values: Any) -> dict[str, Any]:
    (endpoint,) = chart.only("ServiceMonitor", chart.rendered(SERVICE, **values))["spec"]["endpoints"]
    return dict(endpoint)


def _pods(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """What runs: the name of its owner, and its pod's spec."""
    for one in chart.rendered(case):
        if one["kind"] in ("Deployment", "Job"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def _lines(found: list[dict[str, Any]]) -> list[str]:
    return yaml.safe_dump_all(found, sort_keys=True, width=200).splitlines()


@pytest.mark.parametrize("password", ["hunter2", "hun@ter2", "hunter%402"])
def test_what_git_says_is_told_without_the_password(password: str) -> None:
    rendered = chart.rendered(Case("dev-session-template", "everything"))
    pods = [one["spec"]["template"]["spec"] for one in rendered if one["kind"] == "Deployment"]
    clone = next(one for one in pods[0]["initContainers"] if one["name"] == "clone")
    masking = next(line for line in clone["command"][-1].splitlines() if line.strip().startswith("sed "))
    said = f"fatal: unable to access 'https://me:{password}@example.org/shop.git/': see https://example.org/a/b@c\n"
    told = subprocess.run(["sh", "-c", masking], input=said, capture_output=True, text=True, check=True, timeout=10)
    assert told.stdout == "fatal: unable to access 'https://example.org/shop.git/': see https://example.org/a/b@c\n"
