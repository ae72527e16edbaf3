"""The values of a session's chart: what its provider, its machine config and its project say, laid over one another.

No secret is among them, since Helm keeps them and shows them: the project's environment and its repository's URL are in
a Secret, which the values only name.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from orchestrator.machine_fields import parse_bytes, parse_cores
from orchestrator.machine_kinds import SERVICES
from orchestrator.providers.contract import SessionSpec
from orchestrator.providers.options import KubernetesOptions


def values_of(spec: SessionSpec, options: KubernetesOptions, env_secret: str) -> dict[str, Any]:
    """All that the chart is told. Later layers win: the provider's values, the machine, its values, the project.

    Who the session is nobody can change. A machine config that names services runs these, and those that the project
    names; one that names none, what the chart runs by itself.
    """
    machine, project = spec.machine, spec.chart_values.get("services", {})
    # Kubernetes keeps it, too, and takes whole seconds.
    values: dict[str, Any] = {"progressDeadlineSeconds": ceil(options.progress_deadline)}
    if options.base_domain is not None:
        values["ingress"] = {"enabled": True, "host": f"{spec.ref.namespace}.{options.base_domain}"}
    for layer in (options.values, _of_machine(spec), machine.options.get("values", {}), {"services": project}):
        values = overlaid(values, layer)
    if machine.services:
        named = machine.services.keys() | project.keys()
        values = overlaid({"services": {name: {"enabled": name in named} for name in SERVICES}}, values)
    return values | {
        "instance": options.instance,
        "project": str(spec.project_uuid),
        "session": str(spec.ref.session_id),
        "replicas": 1,
        "envSecret": env_secret,
    }


def _of_machine(spec: SessionSpec) -> dict[str, Any]:
    machine = spec.machine
    resources: dict[str, str] = {}
    if machine.cpu is not None:
        resources["cpu"] = _cores(machine.cpu)
    if machine.memory_bytes is not None:
        resources["memory"] = str(machine.memory_bytes)
    values: dict[str, Any] = {"services": {name: _of_service(said) for name, said in machine.services.items()}}
    if resources:
        values["resources"] = resources
    if machine.disk_bytes is not None:
        values["storage"] = {"size": str(machine.disk_bytes)}
    return values


def _of_service(said: Mapping[str, Any]) -> dict[str, Any]:
    """A service of a machine config (`machine_kinds.KubernetesServiceSchema`) in the chart's words."""
    values = {name: said[name] for name in ("image", "command", "args", "env", "port", "path") if name in said}
    if "pull_policy" in said:
        values["imagePullPolicy"] = said["pull_policy"]
    if "ready" in said:
        values["ready"] = said["ready"] or ""
    limits = {}
    if "cpu" in said:
        limits["cpu"] = _cores(parse_cores(said["cpu"]))
    if "memory" in said:
        limits["memory"] = str(parse_bytes(said["memory"]))
    if limits:
        values["resources"] = {"limits": limits}
    return values


def _cores(cores: float) -> str:
    return f"{max(round(cores * 1000), 1)}m"


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, mapping by mapping, as Helm does it: what is `above` wins, and null takes away what is below it."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = overlaid(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return result
