from __future__ import annotations

from typing import Any
from uuid import UUID

from orchestrator.providers.chart_values import overlaid, values_of
from orchestrator.providers.contract import Machine, SessionRef, SessionSpec
from orchestrator.providers.options import KubernetesOptions

PROJECT = UUID(int=7)
WHO = {
    "progressDeadlineSeconds": 300,
    "instance": "cluster-code",
    "project": str(PROJECT),
    "session": "42",
    "replicas": 1,
    "envSecret": "session-env-1",
}


def values(
    machine: Machine | None = None, chart_values: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    spec = SessionSpec(
        SessionRef(42, str(PROJECT), "session-42"),
        PROJECT,
        "https://user:hunter2@example.org/shop.git",
        "main",
        {"TOKEN": "hunter2"},
        machine or Machine("small"),
        chart_values or {},
    )
    told = values_of(spec, KubernetesOptions(**options), "session-env-1")
    assert "hunter2" not in repr(told)
    return told


def test_without_a_word_all_is_as_the_chart_has_it() -> None:
    assert values() == {"services": {}, **WHO}


def test_a_machine_config_becomes_values() -> None:
    machine = Machine(
        "large",
        cpu=1.5,
        memory_bytes=1 << 30,
        disk_bytes=5 << 30,
        services={
            "preview": {
                "image": "node:22", "pull_policy": "Always", "command": ["npm"], "args": ["start"], "env": {"A": "b"},
                "port": 8000, "path": "/", "ready": "/health", "cpu": "250m", "memory": "512Mi",
            },
            "chat": {"image": "chat:1", "ready": None},
        },
    )  # fmt: skip
    told = values(machine)
    assert told["resources"] == {"cpu": "1500m", "memory": str(1 << 30)}
    assert told["storage"] == {"size": str(5 << 30)}
    assert told["services"] == {
        "preview": {
            "enabled": True, "image": "node:22", "imagePullPolicy": "Always", "command": ["npm"], "args": ["start"],
            "env": {"A": "b"}, "port": 8000, "path": "/", "ready": "/health",
            "resources": {"limits": {"cpu": "250m", "memory": str(512 << 20)}},
        },
        "chat": {"enabled": True, "image": "chat:1", "ready": ""},
        "vscode": {"enabled": False},
    }  # fmt: skip


def test_the_provider_is_overruled_by_the_machine_and_that_by_the_project() -> None:
    told = values(
        Machine(
            "m",
            cpu=1,
            services={"preview": {"image": "machine", "args": ["m"], "env": {"A": "machine", "B": "machine"}}},
            options={"values": {"resources": {"cpu": "3"}, "nodeSelector": {"disk": None}, "replicas": 5}},
        ),
        {"services": {"preview": {"image": "project", "env": {"A": "project"}}, "vscode": {"image": "code"}}},
        values={
            "services": {"preview": {"image": "provider", "command": ["p"]}, "chat": {"image": "provider"}},
            "resources": {"cpu": "7", "memory": "7Gi"},
            "nodeSelector": {"disk": "fast"},
            "session": "1",
        },
    )
    assert told == {
        "services": {
            "preview": {
                "enabled": True, "image": "project", "command": ["p"], "args": ["m"],
                "env": {"A": "project", "B": "machine"},
            },
            "chat": {"enabled": False, "image": "provider"},
            "vscode": {"enabled": True, "image": "code"},
        },
        "resources": {"cpu": "3", "memory": "7Gi"},
        "nodeSelector": {"disk": None},
        **WHO,
    }  # fmt: skip


def test_a_base_domain_gives_each_project_a_host() -> None:
    told = values(base_domain="dev.example.com", values={"ingress": {"className": "nginx"}})
    assert told["ingress"] == {"enabled": True, "host": f"{PROJECT}.dev.example.com", "className": "nginx"}


def test_layers_are_laid_mapping_by_mapping() -> None:
    assert overlaid({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"b": None, "c": [2]}, "d": {"e": 1}}) == {
        "a": {"b": None, "c": [2]},
        "d": {"e": 1},
    }
