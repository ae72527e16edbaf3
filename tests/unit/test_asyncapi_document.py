"""`docs/asyncapi.yaml` is valid, and says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest

import gateway
from auth.errors import AuthError
from auth.permissions import Role
from gateway.api.apps import App
from gateway.api.deployments import Deployment, StepDone
from gateway.api.sessions import Container, Pod, Session
from gateway.realtime import authorization, protocol
from gateway.realtime.protocol import REASONS, CloseCode
from gateway.settings import RealtimeSettings
from orchestrator import events
from orchestrator.deployments import contract as deployments
from orchestrator.sessions.state import Desired, Status
from orchestrator.settings import variables
from tests import asyncapi
from tests.asyncapi import document, schema, validator

GATEWAY = Path(gateway.__file__).parent
REALTIME = "\n".join(path.read_text() for path in sorted((GATEWAY / "realtime").glob("*.py")))
API = "\n".join(path.read_text() for path in sorted((GATEWAY / "api").glob("*.py")))
WEBSOCKET: dict[str, Any] = document()["channels"]["websocket"]


def texts(name: str, key: str) -> set[str]:
    declared = schema(name)["properties"][key]
    return set(declared.get("enum", [declared.get("const")]))


@pytest.mark.timeout(200)
async def test_the_official_parser_finds_nothing_wrong() -> None:
    assert await asyncapi.parse() == "7 operations"


def test_every_close_code_is_listed_with_its_reason() -> None:
    codes = [code for code in CloseCode if code >= 4000]
    assert WEBSOCKET["x-close-codes"] == [
        {"code": code.value, "reason": REASONS[code], "reconnect": code < 4500} for code in codes
    ]
    assert schema("CloseCode")["enum"] == [code.value for code in codes]


def test_the_limits_are_those_of_the_settings() -> None:
    defaults = {variable.name: default for variable, default in variables(RealtimeSettings)}
    listed = {limit["variable"]: limit["default"] for limit in WEBSOCKET["x-limits"]}
    assert listed == {name: defaults[name] for name in listed}
    assert set(defaults) - set(listed) == {"REPLAY_READERS", "REPLAY_EVENTS"}


def test_the_actions_are_those_that_are_parsed() -> None:
    actions = {action.__name__ for action in get_args(protocol.Action)}
    named = {name for name, one in document()["components"]["schemas"].items() if "action" in one.get("properties", {})}
    assert named == actions
    for name in actions:
        (action,) = texts(name, "action")
        sent = {"action": action, "channel": "session:1", "since": "e:1", "token": "t", "id": "x"}
        known = {key: value for key, value in sent.items() if key in schema(name)["properties"]}
        validator(name).validate(known)
        parsed = protocol.parse(orjson.dumps(known))
        assert type(parsed).__name__ == name
        assert set(schema(name)["properties"]) == {"action", *type(parsed).__slots__}
        for key in schema(name)["required"]:
            without = {other: value for other, value in known.items() if other != key}
            assert not validator(name).is_valid(without)
            with pytest.raises(protocol.Rejected):
                protocol.parse(orjson.dumps(without))
        operation = document()["operations"][action]
        assert operation["messages"] == [{"$ref": f"#/channels/websocket/messages/{action}"}]


def test_the_control_messages_are_those_that_are_sent() -> None:
    sent = set(re.findall(r'control\(\s*"([a-z]+)"', REALTIME)) | set(re.findall(r'_send\(.*?"([a-z]+)"', REALTIME))
    described = {
        name[0].lower() + name[1:]
        for name, one in document()["components"]["schemas"].items()
        if "event_type" in one.get("properties", {}) and "offset" not in one["properties"]
    }
    assert described == sent
    channels = document()["channels"]
    assert described - {"closing"} <= set(channels["websocket"]["messages"])
    assert described & set(channels["serverSentEvents"]["messages"]) == {"connected", "expiring", "closing"}


def test_the_codes_of_errors_are_those_that_are_answered() -> None:
    explained = re.findall(r'return "([a-z_]+)", ', (GATEWAY / "realtime" / "actions.py").read_text())
    rejected = re.findall(r'Rejected\(\s*"([a-z_]+)"', REALTIME)
    assert set(schema("Error")["properties"]["data"]["properties"]["code"]["enum"]) == {*explained, *rejected}


def test_the_event_types_are_those_that_are_published() -> None:
    told = set(re.findall(r'"((?:project|member|workspace)\.[a-z]+ed)"', API))
    described = set().union(*(texts(name, "event_type") for name in ("Project", "Member", "Workspace")))
    assert described == told
    assert texts("SessionStatus", "event_type") == {events.SESSION_STATUS}
    assert texts("SessionLog", "event_type") == {events.SESSION_LOG}
    assert texts("SessionPod", "event_type") == {events.SESSION_POD}
    assert texts("SessionEvent", "event_type") == {events.SESSION_EVENT}
    assert texts("ClusterDeployment", "event_type") == {events.CLUSTER_DEPLOYMENT}
    assert texts("ClusterNamespace", "event_type") == {events.CLUSTER_NAMESPACE}
    assert texts("ClusterIngress", "event_type") == {events.CLUSTER_INGRESS}
    assert texts("DeploymentStatus", "event_type") == {events.DEPLOYMENT_STATUS}
    assert texts("DeploymentLog", "event_type") == {events.DEPLOYMENT_LOG}
    assert texts("App", "event_type") == {events.APP_CREATED, events.APP_UPDATED, events.APP_DELETED}


def test_a_pod_is_what_rest_answers() -> None:
    data = schema("SessionPod")["properties"]["data"]
    assert set(data["properties"]) == set(data["required"]) == {*Pod().fields, "change"}
    container = data["properties"]["containers"]["items"]
    assert set(container["properties"]) == set(container["required"]) == set(Container().fields)


def test_a_session_is_what_rest_answers() -> None:
    data = schema("SessionStatus")["properties"]["data"]
    assert set(data["properties"]) == set(data["required"]) == set(Session().fields)
    assert data["properties"]["status"]["enum"] == [status.value for status in Status]
    assert data["properties"]["desired"]["enum"] == [desired.value for desired in Desired]
    roles = schema("Member")["properties"]["data"]["properties"]["role"]["enum"]
    assert roles == [role.name.lower() for role in Role]


def test_a_deployment_and_an_app_are_what_rest_answers() -> None:
    data = schema("DeploymentStatus")["properties"]["data"]
    assert set(data["properties"]) == set(data["required"]) == set(Deployment().fields)
    assert data["properties"]["status"]["enum"] == [status.value for status in deployments.Status]
    assert data["properties"]["step"]["enum"] == ["", *(step.value for step in deployments.Step)]
    step = data["properties"]["steps"]["items"]
    assert set(step["properties"]) == set(step["required"]) == set(StepDone().fields)
    assert step["properties"]["name"]["enum"] == [step.value for step in deployments.Step]
    app = schema("App")["properties"]["data"]
    assert set(app["properties"]) == set(app["required"]) == set(App().fields)


@pytest.mark.parametrize(
    "name",
    [
        "user:7", "session:42", "workspace:1", "deployment:9", "broadcast", "cluster", "app:1", "a:b:c", "x:\n",
        "gateway", "gateway:1", "user:0", "user:01", "user:x", "session:", "broadcast:1", "nonsense", "", ":x", "app:",
        "x" * 199 + ":y", "users:7",
    ],
)  # fmt: skip
def test_the_names_of_channels_are_those_that_are_taken(name: str) -> None:
    try:
        kind = authorization.parse_channel(name).kind
    except AuthError:
        kind = None
    fitting = [one["title"] for one in schema("Channel")["oneOf"] if _fits(one, name)]
    assert fitting == ([kind] if kind else [])


def _fits(one: dict[str, Any], name: str) -> bool:
    if "const" in one:
        return name == one["const"]
    return re.search(one["pattern"], name) is not None and len(name) <= one.get("maxLength", 200)


def test_names_on_the_wire_are_those_of_the_code() -> None:
    assert schema("Name")["maxLength"] == events.MAX_NAME_LENGTH
    for text in ("k3v9:1041", "a:0", "a:", ":1", "A:1", "a:1x", f"{'a' * 33}:1", f"a:{'1' * 20}"):
        assert validator("Position").is_valid(text) == (protocol.parse_position(text) is not None)
    exchange = document()["channels"]["exchange"]["bindings"]["amqp"]["exchange"]
    assert exchange == {"name": events.EXCHANGE, "type": "topic", "durable": True, "autoDelete": False}
    assert protocol.SUBPROTOCOL in WEBSOCKET["description"]


@pytest.mark.parametrize("name", sorted(document()["components"]["messages"]))
def test_the_examples_are_what_they_are_examples_of(name: str) -> None:
    message = document()["components"]["messages"][name]
    wanted = message["payload"]["$ref"].rpartition("/")[2]
    assert wanted == name[0].upper() + name[1:]
    for example in message["examples"]:
        validator(wanted).validate(example["payload"])
        if "event_type" in example["payload"] and name != "publication":
            assert asyncapi.check_sent(example["payload"]) == wanted
    if name == "publication":
        assert events.parse(orjson.dumps(message["examples"][0]["payload"])) == ("build.done", "app:7")


@pytest.mark.parametrize("wrong", [{}, {"data": 1, "offset": 1}])
def test_what_is_no_publication_is_none(wrong: dict[str, Any]) -> None:
    body = {"event_type": "a", "channel": "b:c", **wrong}
    assert not validator("Publication").is_valid(body)
    with pytest.raises(events.InvalidEnvelope):
        events.parse(orjson.dumps(body))
