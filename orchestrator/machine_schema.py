"""What may be said about providers and machine configs: in YAML, in the database, over REST, to a provider.

One schema for all of them, so that what is accepted a start can run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from orchestrator.machine_fields import (
    FEW,
    HOST,
    OBJECT,
    Bytes,
    Cores,
    Flag,
    Id,
    Json,
    References,
    User,
    amount,
    name_field,
)
from orchestrator.machine_kinds import KINDS, MACHINES, PROVIDER_OPTIONS, SERVICES


@dataclass(frozen=True, slots=True)
class _Way:
    """How a kind of provider is reached. No `endpoint`: it has none. `credentials`: the names that it knows."""

    endpoint: str | None
    example: str
    credentials: str
    names: str

    def wrong_endpoint(self, value: str) -> str | None:
        """What is wrong with it; it is not repeated, since a URL may hold a password."""
        if self.endpoint is None:
            return f"is for other kinds: {self.example}"
        return None if re.fullmatch(self.endpoint, value) else f"must be {self.example}"

    def knows(self, name: str) -> bool:
        return re.fullmatch(self.credentials, name) is not None


_WAYS = {
    "local": _Way(None, "this one is the orchestrator's own machine", r"(?!)", "a local provider takes no credentials"),
    "docker": _Way(
        rf"unix:///[!-~]+|tcp://{HOST}:\d{{1,5}}",
        "a Docker host such as unix:///var/run/docker.sock or tcp://docker.example.com:2376",
        rf"ca|cert|key|{HOST}(:\d{{1,5}})?",
        "is no credential of a Docker provider: known are ca, cert and key, and registries by their host",
    ),
    "devpod": _Way(
        r"(?!-)[!-~]{1,500}",
        "one word: the host that DevPod's own provider gets",
        r"[A-Za-z_][A-Za-z0-9_]*",
        "is no credential of a DevPod provider: known are the options of DevPod's own provider, such as AWS_SECRET_KEY",
    ),
    "kubernetes": _Way(
        rf"https://{HOST}(:\d{{1,5}})?(/[!-~]*)?",
        "the URL of an API server such as https://203.0.113.7:6443, without a password",
        r"kubeconfig|token|certificate_authority",
        "is no credential of a Kubernetes provider: known are kubeconfig, token and certificate_authority",
    ),
}


def _wrong_tls(provider: Mapping[str, Any]) -> dict[str, Any]:
    """Certificates are for an engine that is elsewhere, and one that is shown has its key."""
    given = {"ca", "cert", "key"} & provider["credentials"].keys()
    if given and not (provider["endpoint"] or "").startswith("tcp://"):
        return {"credentials": ["ca, cert and key are for an endpoint tcp://host:port"]}
    if ("cert" in given) != ("key" in given):
        return {"credentials": ["cert and key go together"]}
    return {}


def _wrong_way_in(provider: Mapping[str, Any]) -> dict[str, Any]:
    """A cluster is reached in one way: by options, by a kubeconfig that is a credential, or by endpoint and token."""
    given, options = provider["credentials"].keys(), provider["options"].keys()
    own = sorted({"kubeconfig", "in_cluster"} & options)
    if "kubeconfig" in given and (given > {"kubeconfig"} or provider["endpoint"] or own):
        return {"credentials": ["a kubeconfig is the whole way in: no other credential, endpoint or option beside it"]}
    if provider["endpoint"] and "token" not in given:
        return {"endpoint": ["takes the credential `token`; without one, name a kubeconfig in the options"]}
    if not provider["endpoint"] and given & {"token", "certificate_authority"}:
        return {"endpoint": ["a token is for the API server that the endpoint names: name one"]}
    if provider["endpoint"] and (others := sorted({"kubeconfig", "context", "in_cluster"} & options)):
        return {"endpoint": [f"or the option {others[0]}: not both"]}
    return {}


class ProviderSchema(Schema):
    """An entry of `providers`."""

    name = name_field()
    kind = fields.String(required=True, validate=validate.OneOf(KINDS, error="must be one of: {choices}"))
    endpoint = fields.String(
        load_default=None,
        allow_none=True,
        metadata={"description": "Where it is, as its kind takes it; null: where the orchestrator's machine leads to."},
    )
    options = Json(load_default=dict, metadata=OBJECT)
    credentials = References(
        load_default=dict,
        metadata={**OBJECT, "description": "Where orchestrators find them: each {env: NAME} or {file: /path}."},
    )
    enabled = Flag(load_default=True)
    default = Flag(load_default=False)

    @validates_schema
    def _as_the_kind_has_it(self, data: dict[str, Any], **_: Any) -> None:
        wrong: dict[str, Any] = {}
        schema = PROVIDER_OPTIONS.get(data["kind"])
        if schema is not None and (options := schema().validate(data["options"])):
            wrong["options"] = options
        way = _WAYS[data["kind"]]
        if data["endpoint"] is not None and (problem := way.wrong_endpoint(data["endpoint"])):
            wrong["endpoint"] = [problem]
        if credentials := {name: [way.names] for name in data["credentials"] if not way.knows(name)}:
            wrong["credentials"] = credentials
        if not wrong and data["kind"] == "kubernetes":
            wrong = _wrong_way_in(data)
        elif not wrong and data["kind"] == "docker":
            wrong = _wrong_tls(data)
        if data["default"] and not data["enabled"]:
            wrong["default"] = ["a provider that is not enabled cannot be the default"]
        if wrong:
            raise ValidationError(wrong)


class MachineConfigSchema(Schema):
    """An entry of `machine_configs`, as far as it is the same for every kind of provider."""

    name = name_field()
    provider = name_field()
    default = Flag(load_default=False)
    cpu = Cores(load_default=None, allow_none=True)
    memory = Bytes(load_default=None, allow_none=True)
    disk = Bytes(load_default=None, allow_none=True)
    services = Json(load_default=dict, metadata=OBJECT)
    options = Json(load_default=dict, metadata=OBJECT)
    # Who may use it; both empty: everybody.
    users = fields.List(
        User(), load_default=list, validate=FEW, metadata={"description": "Who may use it: ids or addresses."}
    )
    workspaces = fields.List(
        Id(), load_default=list, validate=FEW, metadata={"description": "In whose projects it may be used: ids."}
    )
    max_sessions = amount(
        1, 1_000_000, load_default=None, allow_none=True, metadata={"description": "That may run with it at a time."}
    )

    @validates_schema
    def _known_services(self, data: dict[str, Any], **_: Any) -> None:
        wrong = {}
        for name, service in data["services"].items():
            if name not in SERVICES:
                wrong[name] = [f"is no service: known are {', '.join(SERVICES)}"]
            elif not isinstance(service, dict):
                wrong[name] = ["must be a mapping"]
        if wrong:
            raise ValidationError({"services": wrong})


def errors_for_kind(kind: str, machine_config: Mapping[str, Any]) -> dict[str, Any]:
    """What is wrong with a loaded machine config for a provider of this kind, shaped like marshmallow's messages."""
    if kind not in MACHINES:
        return {}
    service_schema, options_schema = MACHINES[kind]
    errors: dict[str, Any] = {}
    schema = service_schema()
    if services := {
        name: wrong for name, service in machine_config["services"].items() if (wrong := schema.validate(service))
    }:
        errors["services"] = services
    if options := options_schema().validate(machine_config["options"]):
        errors["options"] = options
    return errors


def place_of(provider: Mapping[str, Any]) -> Any:
    """What a provider looks after: another one with the same would tell all of it twice. None: that cannot be.

    Two names of one cluster are not seen through.
    """
    if not provider["enabled"] or provider["kind"] not in ("docker", "kubernetes"):
        return None
    options = provider["options"]
    way_in = [options.get(name) for name in ("kubeconfig", "context", "in_cluster")]
    own = [provider["kind"], provider["endpoint"], provider["credentials"].get("kubeconfig"), options.get("instance")]
    return own + way_in
