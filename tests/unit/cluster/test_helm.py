from __future__ import annotations

import pytest

from orchestrator.cluster.helm import DeploymentBroken, ReleaseBroken, failure
from orchestrator.errors import ApiRefused, ClusterCodeError, ProviderFailure, ProviderUnavailable

USER = 'User "user" cannot list resource "secrets" in API group "" in the namespace "n"'

SCHEMA = "values don't meet the specifications of the schema(s) in the following chart(s):\ndev-session-template:\n"


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            'Error: Kubernetes cluster unreachable: Get "https://10.0.0.1/": dial tcp: connect: connection refused',
            ProviderUnavailable,
            (
                "helm upgrade did not get through to the cluster or its chart: Kubernetes cluster unreachable: Get"
                ' "https://10.0.0.1/": dial tcp: connect: connection refused'
            ),
        ),
        (
            "Error: UPGRADE FAILED: etcdserver: request timed out",
            ProviderUnavailable,
            "helm upgrade did not get through to the cluster or its chart: etcdserver: request timed out",
        ),
        (
            f"Error: query: failed to query with labels: secrets is forbidden: {USER}",
            ApiRefused,
            f"secrets is forbidden: {USER}",
        ),
        (
            (
                f"coalesce.go:1: warning\nError: UPGRADE FAILED: {SCHEMA}"
                "- services.preview.port: Invalid type. Expected: integer, given: string\n"
                "- storage: Additional property x is not allowed\n\n"
            ),
            ProviderFailure,
            (
                "The chart refuses the session's values: services.preview.port: Invalid type. Expected: integer, given:"
                " string; storage: Additional property x is not allowed. Correct the machine config, or the project's"
                " chart values."
            ),
        ),
        (
            f"Error: INSTALLATION FAILED: {SCHEMA}- at '/services/preview/port': got string, want integer\n",
            ProviderFailure,
            (
                "The chart refuses the session's values: at '/services/preview/port': got string, want integer."
                " Correct the machine config, or the project's chart values."
            ),
        ),
        (
            (
                'Error: Unable to continue with install: Service "session-2" in namespace "n" exists and cannot be'
                " imported into the current release: invalid ownership metadata; label validation error: missing key"
            ),
            ProviderFailure,
            (
                "The Service session-2 is in the session's namespace already, and was not made for the session: remove"
                " it, and start again."
            ),
        ),
        (
            "Error: UPGRADE FAILED: another operation (install/upgrade/rollback) is in progress",
            ReleaseBroken,
            "helm upgrade: another operation (install/upgrade/rollback) is in progress",
        ),
        (
            'Error: UPGRADE FAILED: no revision for release "session-1"',
            ReleaseBroken,
            'helm upgrade: no revision for release "session-1"',
        ),
        (
            'Error: UPGRADE FAILED: cannot patch "session-1" with kind Deployment: it is invalid: two probes',
            DeploymentBroken,
            'helm upgrade: cannot patch "session-1" with kind Deployment: it is invalid: two probes',
        ),
        (
            'Error: UPGRADE FAILED: cannot patch "session-1" with kind Deployment: Patch "https://a/": unexpected EOF',
            ProviderUnavailable,
            (
                'helm upgrade did not get through to the cluster or its chart: cannot patch "session-1" with kind'
                ' Deployment: Patch "https://a/": unexpected EOF'
            ),
        ),
        # Neither an outage nor a broken release, whatever the chart stumbles over.
        (
            "Error: INSTALLATION FAILED: parse error at (other/templates/a.yaml:1): unexpected EOF",
            ProviderFailure,
            "helm upgrade cannot make anything of the chart: parse error at (other/templates/a.yaml:1): unexpected EOF",
        ),
        (
            (
                'Error: UPGRADE FAILED: template: other/a.yaml:1:3: executing "other/a.yaml" at <mustFromJson "x">:'
                " error calling mustFromJson: invalid character 'x' looking for beginning of value"
            ),
            ProviderFailure,
            (
                'helm upgrade cannot make anything of the chart: template: other/a.yaml:1:3: executing "other/a.yaml"'
                " at <mustFromJson \"x\">: error calling mustFromJson: invalid character 'x' looking for beginning of"
                " value"
            ),
        ),
        ("Error: repo foo not found", ProviderFailure, "helm upgrade failed: repo foo not found"),
        ("", ProviderFailure, "helm upgrade failed: it did not say why"),
    ],
)
def test_what_helm_says_is_told_in_our_words(said: str, kind: type[ClusterCodeError], told: str) -> None:
    error = failure("upgrade", said)
    assert type(error) is kind
    assert str(error) == told


def test_failures_are_classified() -> None:
    assert isinstance(refused := failure("upgrade", f"Error: secrets is forbidden: {USER}"), ApiRefused)
    assert (refused.status, refused.reason) == (403, "Forbidden")
    template = "Error: execution error at (dev-session-template/templates/deployment.yaml:9:3): services: name an image"
    assert isinstance(wrong := failure("upgrade", template), ProviderFailure)
    assert wrong.reason == "InvalidValues"
    assert str(wrong) == (
        "The chart refuses the session's values: services: name an image. Correct the machine config, or the project's"
        " chart values."
    )
