from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from marshmallow import ValidationError

from orchestrator import machine_import
from orchestrator.errors import Invalid
from orchestrator.machine_fields import flatten, parse_bytes, parse_cores
from orchestrator.machine_import import Change, read_file, read_text
from orchestrator.machine_kinds import MACHINES, PROVIDER_OPTIONS, ChartValuesSchema, LocalOptionsSchema
from orchestrator.machine_schema import MachineConfigSchema, ProviderSchema, errors_for_kind
from orchestrator.machines import MachineConfig, ProviderRow, pick

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(
    ("written", "size"), [("4Gi", 4 << 30), ("512Mi", 512 << 20), ("1.5k", 1500), ("1G", 10**9), (7, 7), ("7", 7)]
)
def test_sizes_are_written_as_kubernetes_writes_them(written: Any, size: int) -> None:
    assert parse_bytes(written) == size


@pytest.mark.parametrize(
    "written",
    ["", "4GB", "-1", "0", "0.1", "1e3", " 1Gi", "9999999999Ti", "9" * 400, 10**400, True, 1.5, None, [], "\u0661Gi"],
)
def test_other_sizes_are_refused(written: Any) -> None:
    with pytest.raises(ValidationError):
        parse_bytes(written)


@pytest.mark.parametrize(("written", "cores"), [(2, 2.0), (0.5, 0.5), ("500m", 0.5), ("2", 2.0)])
def test_cores_are_written_as_kubernetes_writes_them(written: Any, cores: float) -> None:
    assert parse_cores(written) == cores


@pytest.mark.parametrize("written", [0, -1, True, "x", "1Gi", float("nan"), float("inf"), 1025, 10**400, None])
def test_other_cores_are_refused(written: Any) -> None:
    with pytest.raises(ValidationError):
        parse_cores(written)


def errors(text: str) -> list[str]:
    with pytest.raises(Invalid) as refused:
        read_text(text, source="file.yaml")
    assert refused.value.field == "file"
    return [line.strip() for line in str(refused.value).splitlines()]


def test_the_examples_are_valid() -> None:
    assert [entry["name"] for entry in read_file(CONFIGS / "providers.yaml").providers] == ["local"]
    small = read_file(CONFIGS / "machine-configs.yaml").machine_configs[0]
    assert small["memory"] == 2 << 30
    assert list(small["services"]) == ["preview", "vscode"]


def test_the_examples_in_comments_are_valid_and_say_all_that_can_be_said() -> None:
    providers, configs = (
        (CONFIGS / name).read_text().replace("\n  # - ", "\n  - ").replace("\n  #   ", "\n    ")
        for name in ("providers.yaml", "machine-configs.yaml")
    )
    read = read_text(f"{providers}\n{configs}", source="x")
    kinds = {entry["kind"]: entry for entry in read.providers}
    assert list(kinds) == ["local", "docker", "devpod", "kubernetes"]
    by_kind = {entry["provider"]: entry for entry in read.machine_configs}
    for kind in ("docker", "devpod"):
        assert set(kinds[kind]["options"]) == set(PROVIDER_OPTIONS[kind]().fields)
        service, options = (set(schema().fields) for schema in MACHINES[kind])
        assert set(by_kind[kind]["options"]) == options
        assert {name for one in by_kind[kind]["services"].values() for name in one} == service
    for name in LocalOptionsSchema().fields:
        assert re.search(rf"\n      (# )?{name}:", providers), name
    for name in (*ProviderSchema().fields, *MachineConfigSchema().fields):
        assert re.search(rf"\n  (- |  |  # ){name}:", providers + configs), name


def test_every_error_is_told_with_its_place() -> None:
    assert errors(
        """
        providers:
          - {name: local, kind: local, options: {clone_deadline: soon, nonsense: 1}}
          - {name: -x, kind: lokal}
          - {name: dark, kind: docker, default: true, enabled: false}
        machine_configs:
          - {name: a, provider: local, cpu: lots, services: {preview: {command: []}}}
          - {name: b, provider: local, services: {web: {command: [x]}, chat: 5}}
          - {name: c, provider: local, memory: 4GB, colour: red}
          - {provider: local}
        """
    ) == [
        "file.yaml is not valid, nothing was changed:",
        "providers[0].options.clone_deadline: Not a valid number.",
        "providers[0].options.nonsense: Unknown field.",
        "providers[1].name: must be 1 to 63 of a-z, 0-9 and '-', not '-' at either end",
        "providers[1].kind: must be one of: local, docker, devpod, kubernetes",
        "providers[2].default: a provider that is not enabled cannot be the default",
        "machine_configs[0].cpu: must be a number of cores such as 2, 0.5 or 500m, not 'lots'",
        "machine_configs[1].services.web: is no service: known are preview, chat, vscode",
        "machine_configs[1].services.chat: must be a mapping",
        "machine_configs[2].memory: must be a size such as 512Mi or 4Gi, not '4GB'",
        "machine_configs[2].colour: Unknown field.",
        "machine_configs[3].name: Missing data for required field.",
    ]


def test_services_are_held_to_what_their_provider_knows() -> None:
    no_command = "must be a list of strings (quote numbers), or a list of such lists"
    assert errors(
        """
        providers: [{name: local, kind: local}, {name: cluster, kind: kubernetes}]
        machine_configs:
          - name: a
            provider: local
            services:
              preview: {command: [], port: 70000, path: nowhere, ready: "/a b"}
              chat: {command: [[a], []], env: {1x: y, A: 5}}
              vscode: {command: ["", x], image: x}
            options: {cpu_seconds: 0}
          - {name: b, provider: cluster, services: {preview: {image: x, optional: true}}, options: {anything: 1}}
          - {name: c, provider: elsewhere, services: {preview: {image: x}}}
        """
    )[1:] == [
        f"machine_configs[0].services.preview.command: {no_command}",
        "machine_configs[0].services.preview.port: Must be greater than or equal to 0 and less than or equal to 65535.",
        "machine_configs[0].services.preview.path: must begin with '/' and hold no blanks",
        "machine_configs[0].services.preview.ready: must begin with '/' and hold no blanks",
        f"machine_configs[0].services.chat.command: {no_command}",
        "machine_configs[0].services.chat.env.1x: is no name of an environment variable",
        "machine_configs[0].services.chat.env.A: must be a string: put 5 in quotes",
        "machine_configs[0].services.vscode.command: must begin with the name of a program",
        "machine_configs[0].services.vscode.image: Unknown field.",
        "machine_configs[0].options.cpu_seconds: Must be greater than or equal to 1.",
        "machine_configs[1].services.preview.optional: Unknown field.",
        "machine_configs[1].options.anything: Unknown field.",
    ]


def test_a_cluster_is_described_in_its_own_words() -> None:
    read_text(
        """
        providers:
          - name: cluster
            kind: kubernetes
            options: {kubeconfig: /etc/kubeconfig, context: east, base_domain: dev.example.com, log_streams: 0}
        machine_configs:
          - name: large
            provider: cluster
            cpu: 500m
            services: {preview: {image: "example.com/node:22", command: [sh], args: [-c, run], env: {A: b}, ready: /}}
            options: {chart: "oci://example.com/charts/session", chart_version: 1.2.3, values: {storage: {size: 1Gi}}}
        """,
        source="file.yaml",
    )
    assert errors(
        """
        providers:
          - {name: a, kind: kubernetes, options: {base_domain: "a`b", chart: --post-renderer=x}}
          - {name: b, kind: kubernetes, options: {context: a, in_cluster: true}}
        """
    )[1:] == [
        "providers[0].options.chart: must be a path, oci://… or repository/name, without blanks",
        "providers[0].options.base_domain: must be a domain such as sessions.example.com",
        "providers[1].options.in_cluster: the service account, or a kubeconfig: not both",
    ]


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({}, []),
        ({"services": {"chat": {"image": "a/b:1", "command": ["sh"], "args": [], "env": {"A": "b"}}}}, []),
        ({"services": {"web": {}}}, ["services.web: Unknown field."]),
        ({"services": {"chat": {"port": 1}}}, ["services.chat.port: Unknown field."]),
        ({"storage": {}}, ["storage: Unknown field."]),
        ({"services": {"chat": {"image": "--x"}}}, [
            "services.chat.image: must be an image such as registry.example.com/name:tag, without blanks"]),
    ],
)  # fmt: skip
def test_a_project_says_little_of_its_chart(values: dict[str, Any], wrong: list[str]) -> None:
    assert flatten(ChartValuesSchema().validate(values)) == wrong


def test_what_execve_cannot_take_is_refused() -> None:
    service = {"command": ["a", "\0"], "env": {"A": "\0", "B": "b"}}
    found = errors_for_kind(
        "local", {"services": {"preview": service, "chat": {"command": ["a"], "env": 5}}, "options": {}}
    )
    assert flatten(found) == [
        "services.preview.command: must not hold a NUL character",
        "services.preview.env.A: must not hold a NUL character",
        "services.chat.env: must be a mapping",
    ]


def test_what_jsonb_cannot_hold_is_refused() -> None:
    found = errors(
        """
        providers:
          - name: p
            kind: docker
            options: {a: "\\0", b: [1, .inf], c: 2024-01-01, 5: x, e: 99999999999999999999, f: {g: "\\ud800"}}
          - {name: q, kind: docker, options: [1]}
        """
    )[1:]
    assert found == [
        "providers[0].options.a: must not hold a NUL character",
        "providers[0].options.b[1]: must be a finite number",
        "providers[0].options.c: is a date: put it in quotes",
        "providers[0].options: the key 5 must be a string: put it in quotes",
        "providers[0].options.e: is a number too large",
        "providers[0].options.f.g: must be text that UTF-8 can hold",
        "providers[1].options: must be a mapping",
    ]


def test_endless_nesting_is_refused() -> None:
    assert "is nested too deeply" in errors("providers: [{name: p, kind: docker, options: &o {o: *o}}]")[1]


def test_names_and_defaults_are_there_once() -> None:
    assert errors(
        """
        providers:
          - {name: p, kind: docker, default: true}
          - {name: p, kind: docker}
          - {name: q, kind: docker, default: true}
        machine_configs:
          - {name: a, provider: p, default: true}
          - {name: a, provider: q, default: true}
          - {name: c, provider: p, default: true}
        """
    )[1:] == [
        "providers[1].name: 'p' is the name of providers[0] already",
        "providers[2].default: providers[0] is the default already",
        "machine_configs[1].name: 'a' is the name of machine_configs[0] already",
        "machine_configs[2].default: machine_configs[0] is the default of the provider 'p' already",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "file.yaml is no YAML: "),
        ("providers: []\nproviders: []", "the key 'providers' twice"),
        ("- x", "must be a mapping"),
        ("", "must be a mapping"),
        ("machines: []", "machines: Unknown field."),
        ("providers: 5", "providers: Not a valid list."),
        ("providers: [5]", "providers[0]: Invalid input type."),
        ("!!python/object:os.system {}", "is no YAML"),
        ("\0", "is no YAML"),
        ("? [a, b]\n: x", "is no YAML"),
    ],
)
def test_what_is_no_such_file_is_refused(text: str, says: str) -> None:
    assert says in "\n".join(errors(text))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="cannot be read: No such file"):
        read_file(tmp_path / "absent.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(Invalid, match="larger than 1 MiB"):
        read_file(tmp_path / "large.yaml")


def test_merge_keys_are_no_repeats() -> None:
    loaded = read_text("providers: [&p {name: p, kind: docker}, {<<: *p, name: q}]", source="f")
    assert [entry["name"] for entry in loaded.providers] == ["p", "q"]


def test_a_change_reads_as_a_line() -> None:
    assert str(Change("provider", "p", "changed", ("options", "default"))) == "provider p: changed (options, default)"
    assert str(Change("provider", "p", "added")) == "provider p: added"


def row(name: str, *, enabled: bool = True, default: bool = False) -> ProviderRow:
    return ProviderRow(1, name, "local", None, {}, {}, enabled, default, "unknown", "", None)


def config(name: str, provider: str, *, default: bool = False) -> MachineConfig:
    return MachineConfig(1, name, 1, provider, default, None, None, None, {}, {})


ROWS = [row("near", default=True), row("far"), row("off", enabled=False)]
CONFIGS_THERE = [
    config("small", "near", default=True), config("big", "near"), config("huge", "far"), config("x", "off"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "machine_config", "chosen"),
    [
        (None, None, ("near", "small")),
        ("near", None, ("near", "small")),
        (None, "big", ("near", "big")),
        ("far", None, ("far", "huge")),
        (None, "huge", ("far", "huge")),
        ("far", "huge", ("far", "huge")),
    ],
)
def test_what_is_not_named_is_the_default_or_the_only_one(
    provider: str | None, machine_config: str | None, chosen: tuple[str, str]
) -> None:
    found_row, found_config = pick(ROWS, CONFIGS_THERE, provider, machine_config)
    assert (found_row.name, found_config.name) == chosen


@pytest.mark.parametrize(
    ("provider", "machine_config", "field", "says"),
    [
        ("none", None, "provider", "There is no provider 'none'; there are: near, far."),
        ("off", None, "provider", "The provider 'off' is disabled; enabled are: near, far."),
        (None, "x", "provider", "The provider 'off' is disabled; enabled are: near, far."),
        (None, "y", "machine_config", "There is no machine config 'y'; there are: big, huge, small, x."),
        ("far", "big", "machine_config", "There is no machine config 'big' at the provider 'far'; there are: huge."),
    ],
)
def test_what_cannot_be_had_is_told_with_what_there_is(
    provider: str | None, machine_config: str | None, field: str, says: str
) -> None:
    with pytest.raises(Invalid) as refused:
        pick(ROWS, CONFIGS_THERE, provider, machine_config)
    assert (refused.value.field, str(refused.value)) == (field, says)


def test_without_a_default_one_must_be_named() -> None:
    with pytest.raises(Invalid, match="There is no default provider: name one of: a, b"):
        pick([row("a"), row("b")], [], None, None)
    with pytest.raises(Invalid, match="has no default machine config: name one of: m, n"):
        pick([row("a")], [config("m", "a"), config("n", "a")], None, None)
    with pytest.raises(Invalid, match="name one of: none"):
        pick([], [], None, None)
    assert pick([row("a")], [config("m", "a")], None, None)[1].name == "m"


def test_a_snapshot_is_what_a_machine_is_made_of() -> None:
    assert set(config("m", "a").snapshot()) == {"name", "cpu", "memory_bytes", "disk_bytes", "services", "options"}
    assert machine_import.Import("f").providers == ()
