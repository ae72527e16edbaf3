"""What may be said about providers, machine configs and charts: in YAML, in the database, over REST, to a provider.

One schema for all of them, so that what is accepted a start can run. Loading fills in no defaults: what is stored
is what was written, and a default that changes later changes for all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema

KINDS = ("local", "docker", "devpod", "kubernetes")
SERVICES = ("preview", "chat", "vscode")

_NAME = validate.Regexp(
    r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z", error="must be 1 to 63 of a-z, 0-9 and '-', not '-' at either end"
)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]*)\Z", re.ASCII)
# The suffixes of Kubernetes' quantities: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
_BYTES = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
_MOST_BYTES = 2**50
_MOST_CORES = 1024.0


def parse_bytes(value: Any) -> int:
    """A size such as `4Gi`, `512M` or `1048576`, in bytes. Raises ValidationError."""
    found = _QUANTITY.match(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
    if found is None or found[2] not in _BYTES:
        raise ValidationError(f"must be a size such as 512Mi or 4Gi, not {value!r}")
    size = int(float(found[1]) * _BYTES[found[2]])
    if not 0 < size <= _MOST_BYTES:
        raise ValidationError(f"must be more than nothing and at most 1024Ti, not {value!r}")
    return size


def parse_cores(value: Any) -> float:
    """A number of cores such as `2`, `0.5` or `500m`. Raises ValidationError."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (found := _QUANTITY.match(value)) and found[2] in ("", "m"):
        number = float(found[1]) / (1000 if found[2] else 1)
    if not 0 < number <= _MOST_CORES:
        raise ValidationError(f"must be a number of cores such as 2, 0.5 or 500m, not {value!r}")
    return number


class _Bytes(fields.Field[int]):
    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        return parse_bytes(value)


class _Cores(fields.Field[float]):
    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> float:
        return parse_cores(value)


class _Json(fields.Field[dict[str, Any]]):
    """A mapping that jsonb can hold."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValidationError("must be a mapping")
        wrong: dict[str, list[str]] = {}
        for place, problem in _not_json(value, "", 0):
            wrong.setdefault(place, []).append(problem)
        if wrong:
            raise ValidationError(wrong)
        return value


def _not_json(value: Any, place: str, depth: int) -> Iterator[tuple[str, str]]:
    """Each part of a value that jsonb cannot hold: `(place, what is wrong)`."""
    if depth > 32:
        yield place, "is nested too deeply"
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield place or "_schema", f"the key {key!r} must be a string: put it in quotes"
            else:
                yield from _not_json(key, place or "_schema", depth + 1)
                yield from _not_json(inner, f"{place}.{key}" if place else key, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_json(inner, f"{place}[{index}]", depth + 1)
    elif isinstance(value, str):
        if problem := _not_text(value):
            yield place, problem
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, "must be a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield place, "is a number too large"
    elif value is not None and not isinstance(value, bool | int | float):
        yield place, f"is a {type(value).__name__}: put it in quotes"


def _not_text(value: str) -> str | None:
    if "\0" in value:
        return "must not hold a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must be text that UTF-8 can hold"
    return None


def _text(value: str) -> None:
    if problem := _not_text(value):
        raise ValidationError(problem)


class _Environment(fields.Field[dict[str, str]]):
    """Names and values of environment variables."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, str]:
        if not isinstance(value, dict):
            raise ValidationError("must be a mapping")
        wrong: dict[str, list[str]] = {}
        for name, inner in value.items():
            if not isinstance(name, str) or not _ENV_NAME.match(name):
                wrong[str(name)] = ["is no name of an environment variable"]
            elif not isinstance(inner, str):
                wrong[name] = [f"must be a string: put {inner!r} in quotes"]
            elif problem := _not_text(inner):
                wrong[name] = [problem]
        if wrong:
            raise ValidationError(wrong)
        return value


class _Command(fields.Field[list[Any]]):
    """A list of words, or a list of such lists: the first whose program is found is taken."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> list[Any]:
        choices = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        for words in choices:
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise ValidationError("must be a list of strings (quote numbers), or a list of such lists")
            if not words[0]:
                raise ValidationError("must begin with the name of a program")
            for word in words:
                _text(word)
        return list(value)


def _path(**options: Any) -> fields.String:
    plain = validate.Regexp(r"/[!-~]*\Z", error="must begin with '/' and hold no blanks")
    return fields.String(validate=plain, **options)


class _References(fields.Field[dict[str, dict[str, str]]]):
    """Credentials: where each is to be found, never itself. What is wrong is not repeated: it may be the secret."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, dict[str, str]]:
        if not isinstance(value, dict) or not all(isinstance(name, str) and not _not_text(name) for name in value):
            raise ValidationError("must be a mapping of names")
        wrong = {name: [_REFERENCE] for name, reference in value.items() if not _is_reference(reference)}
        if wrong:
            raise ValidationError(wrong)
        return value


_REFERENCE = "must be a reference, {env: NAME} or {file: /path}: a value itself is never kept"


def _is_reference(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, name),) = value.items()
    if not isinstance(name, str) or _not_text(name):
        return False
    return bool(_ENV_NAME.match(name)) if kind == "env" else kind == "file" and name.startswith("/")


class _Flag(fields.Boolean):
    """true or false, and nothing that looks like them."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class _Id(fields.Field[int]):
    """The id of a row."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**63:
            raise ValidationError(f"must be an id, such as 7, not {value!r}")
        return value


class _User(_Id):
    """The id of a user, or the address."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> Any:
        if not isinstance(value, str):
            return super()._deserialize(value, attr, data, **kwargs)
        if "@" not in value or len(value) > 254 or _not_text(value):
            raise ValidationError(f"must be the id or the e-mail address of a user, not {value!r}")
        return value


_few = validate.Length(max=1000)
_OBJECT = {"type": "object"}


def _name() -> fields.String:
    # The same pattern as OpenAPI can have it.
    pattern = {"pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
    return fields.String(required=True, validate=_NAME, metadata=pattern)


class LocalServiceSchema(Schema):
    """One process of a session of the local provider."""

    command = _Command(required=True)
    port = fields.Integer(strict=True, validate=validate.Range(0, 65535))
    path = _path()
    ready = _path(allow_none=True)
    env = _Environment()
    optional = fields.Boolean()
    limit_memory = fields.Boolean()


class LocalMachineOptionsSchema(Schema):
    """The options of a machine config of the local provider."""

    cpu_seconds = fields.Integer(strict=True, validate=validate.Range(min=1))


def _seconds(most: float = 86400.0) -> fields.Float:
    return fields.Float(validate=validate.Range(min=0.0, min_inclusive=False, max=most))


class LocalOptionsSchema(Schema):
    """The options of a local provider; `orchestrator.providers.options` says what each means."""

    directory = fields.String(validate=[validate.Length(min=1), _text])
    repo_schemes = fields.List(fields.String(validate=validate.Regexp(r"[a-z][a-z0-9+.-]*\Z")))
    ssh_key = fields.String(validate=[validate.Length(min=1), _text])
    env = _Environment()
    clone_deadline = _seconds()
    ready_deadline = _seconds()
    exec_deadline = _seconds()
    stop_grace = _seconds()
    restart_delay = _seconds()
    stable_after = _seconds()
    crashes = fields.Integer(strict=True, validate=validate.Range(1, 1000))


def _word(what: str, **options: Any) -> fields.String:
    """One word of printable ASCII, that no program takes for an option."""
    plain = validate.Regexp(r"(?!-)[!-~]{1,500}\Z", error=f"must be {what}, without blanks")
    return fields.String(validate=plain, **options)


def _words() -> fields.List[Any]:
    return fields.List(fields.String(validate=_text), validate=validate.Length(max=1000))


def _amount(least: int, most: int, **options: Any) -> fields.Integer:
    return fields.Integer(strict=True, validate=validate.Range(least, most), **options)


_HOST = r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)"


def _user() -> fields.String:
    """As `docker run --user` takes it; empty: the image's own."""
    plain = validate.Regexp(
        r"([A-Za-z0-9_.-]{1,64}(:[A-Za-z0-9_.-]{1,64})?)?\Z", error="must be a user such as 1000:1000"
    )
    return fields.String(validate=plain)


def _capabilities() -> fields.List[Any]:
    one = fields.String(
        validate=validate.Regexp(r"[A-Z_]{1,64}\Z", error="must be a capability such as NET_BIND_SERVICE")
    )
    return fields.List(one, validate=validate.Length(max=100))


def _address(**options: Any) -> fields.String:
    def valid(value: str) -> None:
        try:
            ip_address(value)
        except ValueError:
            raise ValidationError("must be an IP address such as 127.0.0.1 or 0.0.0.0") from None

    return fields.String(validate=valid, **options)


class KubernetesServiceSchema(Schema):
    """One container of a session at a Kubernetes provider; what is left out is the chart's."""

    image = _word("an image such as registry.example.com/name:tag")
    pull_policy = fields.String(validate=validate.OneOf(("Always", "IfNotPresent", "Never")))
    command = _words()
    args = _words()
    env = _Environment()
    port = _amount(1, 65535)
    path = _path()
    ready = _path(allow_none=True)
    cpu = _Cores()
    memory = _Bytes()


class KubernetesMachineOptionsSchema(Schema):
    """The options of a machine config of a Kubernetes provider."""

    chart = _word("a path, oci://… or repository/name")
    chart_version = _word("a version")
    values = _Json()


class KubernetesOptionsSchema(Schema):
    """The options of a Kubernetes provider; `orchestrator.providers.options` says what each means."""

    kubeconfig = fields.String(validate=[validate.Length(min=1), _text])
    context = fields.String(validate=[validate.Length(min=1), _text])
    in_cluster = fields.Boolean()
    # The value of a label.
    instance = fields.String(validate=_NAME)
    helm = fields.String(validate=[validate.Length(min=1), _text])
    chart = _word("a path, oci://… or repository/name")
    chart_version = _word("a version")
    values = _Json()
    base_domain = fields.String(
        validate=validate.Regexp(
            r"(?=.{1,200}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\Z",
            error="must be a domain such as sessions.example.com",
        )
    )
    pod_security = fields.String(validate=validate.OneOf(("privileged", "baseline", "restricted")))
    transient_reasons = fields.List(fields.String(validate=validate.Regexp(r"[A-Za-z]{1,100}\Z")))
    transient_grace = _seconds()
    progress_deadline = _seconds()
    # Less than a step about a session may take (`sessions.steps.STOP_DEADLINE`): then it can still be told what hangs.
    stop_deadline = _seconds(240.0)
    delete_deadline = _seconds(240.0)
    exec_deadline = _seconds()
    request_timeout = _seconds()
    log_streams = _amount(0, 100_000)

    @validates_schema
    def _one_way_in(self, data: dict[str, Any], **_: Any) -> None:
        if data.get("in_cluster") and ("kubeconfig" in data or "context" in data):
            raise ValidationError({"in_cluster": ["the service account, or a kubeconfig: not both"]})


class DockerServiceSchema(Schema):
    """One container of a session at a Docker provider."""

    image = _word("an image such as registry.example.com/name:tag", required=True)
    pull_policy = fields.String(validate=validate.OneOf(("Always", "IfNotPresent", "Never")))
    command = _words()
    args = _words()
    env = _Environment()
    port = _amount(1, 65535)
    path = _path()
    ready = _path(allow_none=True)
    # A command that is run in the container.
    healthcheck = _words()
    cpu = _Cores()
    memory = _Bytes()
    user = _user()
    read_only_root = fields.Boolean()


class DockerMachineOptionsSchema(Schema):
    """The options of a machine config of a Docker provider, in place of the provider's own."""

    user = _user()
    cap_add = _capabilities()
    pids_limit = _amount(16, 1_000_000)
    runtime = _word("the name of a runtime")


class DockerOptionsSchema(Schema):
    """The options of a Docker provider; `orchestrator.providers.options` says what each means."""

    instance = fields.String(validate=_NAME)
    publish = _address(allow_none=True)
    url_host = fields.String(validate=validate.Regexp(rf"{_HOST}\Z", error="must be the name of a host, or an address"))
    ports = fields.List(_amount(1024, 65535), validate=validate.Length(equal=2))
    user = _user()
    cap_add = _capabilities()
    pids_limit = _amount(16, 1_000_000)
    runtime = _word("the name of a runtime")
    init = fields.Boolean()
    env = _Environment()
    repo_schemes = fields.List(fields.String(validate=validate.Regexp(r"[a-z][a-z0-9+.-]*\Z")))
    ssh_key = fields.String(validate=[validate.Length(min=1), _text])
    log_size = _Bytes()
    log_files = _amount(1, 100)
    clone_deadline = _seconds()
    ready_deadline = _seconds()
    exec_deadline = _seconds()
    stop_grace = _seconds(120.0)
    stable_after = _seconds()
    crashes = _amount(1, 1000)
    request_timeout = _seconds()

    @validates_schema
    def _some_ports(self, data: dict[str, Any], **_: Any) -> None:
        if (ports := data.get("ports")) and ports[0] >= ports[1]:
            raise ValidationError({"ports": ["must be the first and the last of some ports, such as [20000, 29999]"]})


class DevPodServiceSchema(Schema):
    """One service in the container of a session at a DevPod provider."""

    # None: the devcontainer.json starts it.
    command = _words()
    port = _amount(1, 65535, required=True)
    path = _path()
    ready = _path(allow_none=True)
    env = _Environment()


class DevPodMachineOptionsSchema(Schema):
    """The options of a machine config of a DevPod provider."""

    # Of DevPod's own provider, over what our provider says: AWS_INSTANCE_TYPE, say.
    provider_options = _Environment()
    devcontainer_path = _word("a path in the repository")
    devcontainer_image = _word("an image such as registry.example.com/name:tag")
    fallback_image = _word("an image such as registry.example.com/name:tag")
    clone = fields.String(validate=validate.OneOf(("full", "blobless", "treeless", "shallow")))
    submodules = fields.Boolean()


class DevPodOptionsSchema(Schema):
    """The options of a DevPod provider; `orchestrator.providers.options` says what each means."""

    binary = fields.String(validate=[validate.Length(min=1), _text])
    provider = fields.String(
        validate=validate.Regexp(r"[a-z0-9][a-z0-9-]{0,31}\Z", error="must be 1 to 32 of a-z, 0-9 and '-'")
    )
    source = _word("what `devpod provider add` takes: a name, a URL, or the path of a file")
    options = _Environment()
    env = _Environment()
    directory = fields.String(validate=[validate.Length(min=1), _text])
    # Part of DevPod's ids, which have 48 characters at most.
    instance = fields.String(
        validate=validate.Regexp(r"[a-z0-9][a-z0-9-]{0,19}\Z", error="must be 1 to 20 of a-z, 0-9 and '-'")
    )
    repo_schemes = fields.List(fields.String(validate=validate.OneOf(("https", "http", "ssh", "file"))))
    up_deadline = _seconds()
    ready_deadline = _seconds()
    status_deadline = _seconds(50.0)
    stop_deadline = _seconds(120.0)
    delete_deadline = _seconds(120.0)
    exec_deadline = _seconds()
    reconcile_interval = _seconds()
    restart_delay = _seconds()
    crashes = _amount(1, 1000)


class ChartServiceSchema(Schema):
    """What a project may say of one container."""

    # The same pattern as OpenAPI can have it: without lookahead and Python's own anchor.
    image = _word("an image such as registry.example.com/name:tag", metadata={"pattern": "^[!-,.-~][!-~]{0,499}$"})
    command = _words()
    args = _words()
    env = _Environment(metadata={"type": "object", "additionalProperties": {"type": "string"}})


class ChartServicesSchema(Schema):
    """The containers that a session has."""

    preview = fields.Nested(ChartServiceSchema)
    chat = fields.Nested(ChartServiceSchema)
    vscode = fields.Nested(ChartServiceSchema)


class ChartValuesSchema(Schema):
    """What a project may say of its chart, over what its machine config says."""

    services = fields.Nested(ChartServicesSchema)


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
        rf"unix:///[!-~]+|tcp://{_HOST}:\d{{1,5}}",
        "a Docker host such as unix:///var/run/docker.sock or tcp://docker.example.com:2376",
        rf"ca|cert|key|{_HOST}(:\d{{1,5}})?",
        "is no credential of a Docker provider: known are ca, cert and key, and registries by their host",
    ),
    "devpod": _Way(
        r"(?!-)[!-~]{1,500}",
        "one word: the host that DevPod's own provider gets",
        r"[A-Za-z_][A-Za-z0-9_]*",
        "is no credential of a DevPod provider: known are the options of DevPod's own provider, such as AWS_SECRET_KEY",
    ),
    "kubernetes": _Way(
        rf"https://{_HOST}(:\d{{1,5}})?(/[!-~]*)?",
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

    name = _name()
    kind = fields.String(required=True, validate=validate.OneOf(KINDS, error="must be one of: {choices}"))
    endpoint = fields.String(
        load_default=None,
        allow_none=True,
        metadata={"description": "Where it is, as its kind takes it; null: where the orchestrator's machine leads to."},
    )
    options = _Json(load_default=dict, metadata=_OBJECT)
    credentials = _References(
        load_default=dict,
        metadata={**_OBJECT, "description": "Where orchestrators find them: each {env: NAME} or {file: /path}."},
    )
    enabled = _Flag(load_default=True)
    default = _Flag(load_default=False)

    @validates_schema
    def _as_the_kind_has_it(self, data: dict[str, Any], **_: Any) -> None:
        wrong: dict[str, Any] = {}
        schema = _PROVIDER_OPTIONS.get(data["kind"])
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

    name = _name()
    provider = _name()
    default = _Flag(load_default=False)
    cpu = _Cores(load_default=None, allow_none=True)
    memory = _Bytes(load_default=None, allow_none=True)
    disk = _Bytes(load_default=None, allow_none=True)
    services = _Json(load_default=dict, metadata=_OBJECT)
    options = _Json(load_default=dict, metadata=_OBJECT)
    # Who may use it; both empty: everybody.
    users = fields.List(
        _User(), load_default=list, validate=_few, metadata={"description": "Who may use it: ids or addresses."}
    )
    workspaces = fields.List(
        _Id(), load_default=list, validate=_few, metadata={"description": "In whose projects it may be used: ids."}
    )
    max_sessions = _amount(
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


# What a kind knows of its options, of the services of its machine configs, and of their options.
_PROVIDER_OPTIONS: dict[str, type[Schema]] = {
    "local": LocalOptionsSchema,
    "docker": DockerOptionsSchema,
    "devpod": DevPodOptionsSchema,
    "kubernetes": KubernetesOptionsSchema,
}
_MACHINES: dict[str, tuple[type[Schema], type[Schema]]] = {
    "local": (LocalServiceSchema, LocalMachineOptionsSchema),
    "docker": (DockerServiceSchema, DockerMachineOptionsSchema),
    "devpod": (DevPodServiceSchema, DevPodMachineOptionsSchema),
    "kubernetes": (KubernetesServiceSchema, KubernetesMachineOptionsSchema),
}


def errors_for_kind(kind: str, machine_config: Mapping[str, Any]) -> dict[str, Any]:
    """What is wrong with a loaded machine config for a provider of this kind, shaped like marshmallow's messages."""
    if kind not in _MACHINES:
        return {}
    service_schema, options_schema = _MACHINES[kind]
    errors: dict[str, Any] = {}
    schema = service_schema()
    if services := {
        name: wrong for name, service in machine_config["services"].items() if (wrong := schema.validate(service))
    }:
        errors["services"] = services
    if options := options_schema().validate(machine_config["options"]):
        errors["options"] = options
    return errors


def flatten(messages: Any, place: str = "") -> list[str]:
    """Marshmallow's nested messages as lines: `machine_configs[2].memory: must be …`."""
    if isinstance(messages, dict):
        lines = []
        for key, inner in messages.items():
            if key == "_schema":
                lines += flatten(inner, place)
            elif isinstance(key, int):
                lines += flatten(inner, f"{place}[{key}]")
            else:
                lines += flatten(inner, f"{place}.{key}" if place else str(key))
        return lines
    return [f"{place}: {message}" if place else str(message) for message in messages]


def errors_by_field(messages: Any) -> dict[str, list[str]]:
    """Marshmallow's nested messages by the place that `flatten` gives them: `services.preview.port`."""
    fields: dict[str, list[str]] = {}
    for line in flatten(messages):
        place, _, problem = line.partition(": ")
        fields.setdefault(place, []).append(problem)
    return fields


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
