"""What each kind of provider takes: its options, those of its machine configs, and their services.

Loading fills in no defaults: what is stored is what was written, and a default that changes later changes for all.
"""

from __future__ import annotations

from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from orchestrator.machine_fields import (
    HOST,
    NAME,
    Bytes,
    Command,
    Cores,
    Environment,
    Json,
    address_field,
    amount,
    capabilities_field,
    path_field,
    plain,
    seconds,
    user_field,
    word,
    words,
)

KINDS = ("local", "docker", "devpod", "kubernetes")
SERVICES = ("preview", "chat", "vscode")


class LocalServiceSchema(Schema):
    """One process of a session of the local provider."""

    command = Command(required=True)
    port = fields.Integer(strict=True, validate=validate.Range(0, 65535))
    path = path_field()
    ready = path_field(allow_none=True)
    env = Environment()
    optional = fields.Boolean()
    limit_memory = fields.Boolean()


class LocalMachineOptionsSchema(Schema):
    """The options of a machine config of the local provider."""

    cpu_seconds = fields.Integer(strict=True, validate=validate.Range(min=1))


class LocalOptionsSchema(Schema):
    """The options of a local provider; `orchestrator.providers.options` says what each means."""

    directory = fields.String(validate=[validate.Length(min=1), plain])
    repo_schemes = fields.List(fields.String(validate=validate.Regexp(r"[a-z][a-z0-9+.-]*\Z")))
    ssh_key = fields.String(validate=[validate.Length(min=1), plain])
    env = Environment()
    clone_deadline = seconds()
    ready_deadline = seconds()
    exec_deadline = seconds()
    stop_grace = seconds()
    restart_delay = seconds()
    stable_after = seconds()
    crashes = fields.Integer(strict=True, validate=validate.Range(1, 1000))


class KubernetesServiceSchema(Schema):
    """One container of a session at a Kubernetes provider; what is left out is the chart's."""

    image = word("an image such as registry.example.com/name:tag")
    pull_policy = fields.String(validate=validate.OneOf(("Always", "IfNotPresent", "Never")))
    command = words()
    args = words()
    env = Environment()
    port = amount(1, 65535)
    path = path_field()
    ready = path_field(allow_none=True)
    cpu = Cores()
    memory = Bytes()


class KubernetesMachineOptionsSchema(Schema):
    """The options of a machine config of a Kubernetes provider."""

    chart = word("a path, oci://… or repository/name")
    chart_version = word("a version")
    values = Json()


class KubernetesOptionsSchema(Schema):
    """The options of a Kubernetes provider; `orchestrator.providers.options` says what each means."""

    kubeconfig = fields.String(validate=[validate.Length(min=1), plain])
    context = fields.String(validate=[validate.Length(min=1), plain])
    in_cluster = fields.Boolean()
    # The value of a label.
    instance = fields.String(validate=NAME)
    helm = fields.String(validate=[validate.Length(min=1), plain])
    chart = word("a path, oci://… or repository/name")
    chart_version = word("a version")
    values = Json()
    base_domain = fields.String(
        validate=validate.Regexp(
            r"(?=.{1,200}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\Z",
            error="must be a domain such as sessions.example.com",
        )
    )
    pod_security = fields.String(validate=validate.OneOf(("privileged", "baseline", "restricted")))
    transient_reasons = fields.List(fields.String(validate=validate.Regexp(r"[A-Za-z]{1,100}\Z")))
    transient_grace = seconds()
    progress_deadline = seconds()
    # Less than a step about a session may take (`sessions.steps.STOP_DEADLINE`): then it can still be told what hangs.
    stop_deadline = seconds(240.0)
    delete_deadline = seconds(240.0)
    exec_deadline = seconds()
    request_timeout = seconds()
    log_streams = amount(0, 100_000)

    @validates_schema
    def _one_way_in(self, data: dict[str, Any], **_: Any) -> None:
        if data.get("in_cluster") and ("kubeconfig" in data or "context" in data):
            raise ValidationError({"in_cluster": ["the service account, or a kubeconfig: not both"]})


class DockerServiceSchema(Schema):
    """One container of a session at a Docker provider."""

    image = word("an image such as registry.example.com/name:tag", required=True)
    pull_policy = fields.String(validate=validate.OneOf(("Always", "IfNotPresent", "Never")))
    command = words()
    args = words()
    env = Environment()
    port = amount(1, 65535)
    path = path_field()
    ready = path_field(allow_none=True)
    # A command that is run in the container.
    healthcheck = words()
    cpu = Cores()
    memory = Bytes()
    user = user_field(names=True)
    read_only_root = fields.Boolean()


class DockerMachineOptionsSchema(Schema):
    """The options of a machine config of a Docker provider, in place of the provider's own."""

    user = user_field()
    cap_add = capabilities_field()
    pids_limit = amount(16, 1_000_000)
    runtime = word("the name of a runtime")


class DockerOptionsSchema(Schema):
    """The options of a Docker provider; `orchestrator.providers.options` says what each means."""

    instance = fields.String(validate=NAME)
    publish = address_field(allow_none=True)
    url_host = fields.String(validate=validate.Regexp(rf"{HOST}\Z", error="must be the name of a host, or an address"))
    ports = fields.List(amount(1024, 65535), validate=validate.Length(equal=2))
    user = user_field()
    cap_add = capabilities_field()
    pids_limit = amount(16, 1_000_000)
    runtime = word("the name of a runtime")
    init = fields.Boolean()
    env = Environment()
    repo_schemes = fields.List(fields.String(validate=validate.Regexp(r"[a-z][a-z0-9+.-]*\Z")))
    ssh_key = fields.String(validate=[validate.Length(min=1), plain])
    log_size = Bytes()
    log_files = amount(1, 100)
    clone_deadline = seconds()
    ready_deadline = seconds()
    exec_deadline = seconds()
    stop_grace = seconds(120.0)
    stable_after = seconds()
    crashes = amount(1, 1000)
    request_timeout = seconds()

    @validates_schema
    def _some_ports(self, data: dict[str, Any], **_: Any) -> None:
        if (ports := data.get("ports")) and ports[0] >= ports[1]:
            raise ValidationError({"ports": ["must be the first and the last of some ports, such as [20000, 29999]"]})


class DevPodServiceSchema(Schema):
    """One service in the container of a session at a DevPod provider."""

    # None: the devcontainer.json starts it.
    command = words()
    port = amount(1, 65535, required=True)
    path = path_field()
    ready = path_field(allow_none=True)
    env = Environment()


class DevPodMachineOptionsSchema(Schema):
    """The options of a machine config of a DevPod provider."""

    # Of DevPod's own provider, over what our provider says: AWS_INSTANCE_TYPE, say.
    provider_options = Environment()
    devcontainer_path = word("a path in the repository")
    devcontainer_image = word("an image such as registry.example.com/name:tag")
    fallback_image = word("an image such as registry.example.com/name:tag")
    clone = fields.String(validate=validate.OneOf(("full", "blobless", "treeless", "shallow")))
    submodules = fields.Boolean()


class DevPodOptionsSchema(Schema):
    """The options of a DevPod provider; `orchestrator.providers.options` says what each means."""

    binary = fields.String(validate=[validate.Length(min=1), plain])
    provider = fields.String(
        validate=validate.Regexp(r"[a-z0-9][a-z0-9-]{0,31}\Z", error="must be 1 to 32 of a-z, 0-9 and '-'")
    )
    source = word("what `devpod provider add` takes: a name, a URL, or the path of a file")
    options = Environment()
    env = Environment()
    directory = fields.String(validate=[validate.Length(min=1), plain])
    # Part of DevPod's ids, which have 48 characters at most.
    instance = fields.String(
        validate=validate.Regexp(r"[a-z0-9][a-z0-9-]{0,19}\Z", error="must be 1 to 20 of a-z, 0-9 and '-'")
    )
    repo_schemes = fields.List(fields.String(validate=validate.OneOf(("https", "http", "ssh", "file"))))
    up_deadline = seconds()
    ready_deadline = seconds()
    status_deadline = seconds(50.0)
    stop_deadline = seconds(120.0)
    delete_deadline = seconds(120.0)
    exec_deadline = seconds()
    reconcile_interval = seconds()
    restart_delay = seconds()
    crashes = amount(1, 1000)


class ChartServiceSchema(Schema):
    """What a project may say of one container."""

    # The same pattern as OpenAPI can have it: without lookahead and Python's own anchor.
    image = word("an image such as registry.example.com/name:tag", metadata={"pattern": "^[!-,.-~][!-~]{0,499}$"})
    command = words()
    args = words()
    env = Environment(metadata={"type": "object", "additionalProperties": {"type": "string"}})


class ChartServicesSchema(Schema):
    """The containers that a session has."""

    preview = fields.Nested(ChartServiceSchema)
    chat = fields.Nested(ChartServiceSchema)
    vscode = fields.Nested(ChartServiceSchema)


class ChartValuesSchema(Schema):
    """What a project may say of its chart, over what its machine config says."""

    services = fields.Nested(ChartServicesSchema)


# What a kind knows of its options, of the services of its machine configs, and of their options.
PROVIDER_OPTIONS: dict[str, type[Schema]] = {
    "local": LocalOptionsSchema,
    "docker": DockerOptionsSchema,
    "devpod": DevPodOptionsSchema,
    "kubernetes": KubernetesOptionsSchema,
}
MACHINES: dict[str, tuple[type[Schema], type[Schema]]] = {
    "local": (LocalServiceSchema, LocalMachineOptionsSchema),
    "docker": (DockerServiceSchema, DockerMachineOptionsSchema),
    "devpod": (DevPodServiceSchema, DevPodMachineOptionsSchema),
    "kubernetes": (KubernetesServiceSchema, KubernetesMachineOptionsSchema),
}
