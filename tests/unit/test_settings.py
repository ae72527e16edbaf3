"""Settings: read from the environment, wrong ones told in one line, and the documentation held to the declarations."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from environs import Env

from gateway.settings import GatewaySettings, RealtimeSettings
from gateway.token_settings import TokenVariables, token_settings
from orchestrator.errors import SettingsError
from orchestrator.log_setup import LogSettings
from orchestrator.settings import (
    AmqpSettings,
    DatabaseSettings,
    DeploySettings,
    OrchestratorSettings,
    ProbeSettings,
    environment,
    load,
    positive,
    variable,
)
from scripts import reference
from scripts.settings import DevSettings

TOP = Path(__file__).parents[2]


@dataclass(frozen=True)
class Example:
    required: str = variable("EXAMPLE_REQUIRED", "str", help="What it is for.", secret=True)
    number: int = variable("EXAMPLE_NUMBER", "int", 3, help="How many.", check=positive)
    names: list[str] = variable("EXAMPLE_NAMES", "list", ["a"], help="Which.")
    pin: int = variable("EXAMPLE_PIN", "int", 0, help="The pin.", secret=True)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in reference.entries():
        monkeypatch.delenv(entry.name, raising=False)


def test_defaults_stand_where_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_REQUIRED", "here")
    assert load(Example, Env()) == Example(required="here", number=3, names=["a"], pin=0)


def test_the_environment_is_read_and_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_NUMBER", "7")
    monkeypatch.setenv("EXAMPLE_NAMES", "b,c")
    assert load(Example, Env(), required="given") == Example("given", 7, ["b", "c"])


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_NUMBER", "")
    assert load(Example, Env(), required="given").number == 3


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("EXAMPLE_REQUIRED", "", "EXAMPLE_REQUIRED is not set: What it is for."),
        ("EXAMPLE_NUMBER", "many", "EXAMPLE_NUMBER: 'many' is no whole number. How many."),
        ("EXAMPLE_NUMBER", "0", "EXAMPLE_NUMBER must be greater than 0, not 0. How many."),
        ("EXAMPLE_PIN", "hunter2", "EXAMPLE_PIN: the value given is no whole number. The pin."),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str
) -> None:
    if name != "EXAMPLE_REQUIRED":
        monkeypatch.setenv("EXAMPLE_REQUIRED", "here")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load(Example, Env())
    assert str(caught.value) == line


def test_the_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text("# Comment\nPORT=9000\nHOST='::1'\n")
    monkeypatch.setenv("PORT", "9001")
    monkeypatch.setenv("HOST", "")
    settings = load(GatewaySettings, environment(file))
    assert settings.port == 9001
    monkeypatch.delenv("HOST")
    assert load(GatewaySettings, environment(file)).host == "::1"


def test_an_environment_without_a_file_is_fine(tmp_path: Path) -> None:
    assert load(GatewaySettings, environment(tmp_path / "none")) == GatewaySettings()


@pytest.mark.parametrize(
    ("settings", "name", "value", "wrong"),
    [
        (GatewaySettings, "PORT", "65536", "PORT must be 0 to 65535, not 65536"),
        (GatewaySettings, "PORT", "http", "PORT: 'http' is no whole number"),
        (GatewaySettings, "REGISTRATION", "perhaps", "REGISTRATION: 'perhaps' is neither true nor false"),
        (RealtimeSettings, "WS_PING_INTERVAL", "-1", "WS_PING_INTERVAL must be greater than 0"),
        (DatabaseSettings, "DATABASE_POOL_SIZE", "0", "DATABASE_POOL_SIZE must be greater than 0"),
        (OrchestratorSettings, "ORCHESTRATOR_LEASE", "long", "ORCHESTRATOR_LEASE: 'long' is no number"),
        (ProbeSettings, "ORCHESTRATOR_PORT", "65536", "ORCHESTRATOR_PORT must be 0 to 65535, or off, not '65536'"),
        (ProbeSettings, "ORCHESTRATOR_PORT", "web", "ORCHESTRATOR_PORT must be 0 to 65535, or off, not 'web'"),
        (DevSettings, "KUBERNETES_DEMO_IMAGE", "a b", "KUBERNETES_DEMO_IMAGE must be an image, not 'a b'"),
        (TokenVariables, "JWT_ALGORITHM", "none", "JWT_ALGORITHM must be one of"),
        (LogSettings, "LOG_LEVEL", "loud", "LOG_LEVEL must be one of debug, info, warning, error, not 'loud'"),
        (LogSettings, "LOG_FORMAT", "xml", "LOG_FORMAT must be one of auto, text, json, not 'xml'"),
    ],
)
def test_values_out_of_range_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: type, name: str, value: str, wrong: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost/x")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=re.escape(wrong)):
        load(settings, Env())


def test_no_secret_is_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", "short-and-secret")
    with pytest.raises(SettingsError) as caught:
        token_settings(Env())
    assert "short-and-secret" not in str(caught.value)
    assert "32 bytes" in str(caught.value)


def test_every_settings_class_is_in_the_reference() -> None:
    classes = {settings for _, settings in reference.SECTIONS}
    assert classes == {
        *(GatewaySettings, RealtimeSettings, TokenVariables, LogSettings),
        *(AmqpSettings, DatabaseSettings, DeploySettings, OrchestratorSettings, ProbeSettings, DevSettings),
    }
    names = [entry.name for entry in reference.entries()]
    assert len(names) == len(set(names))
    assert all(entry.help.endswith(".") for entry in reference.entries())


def test_the_example_file_is_what_the_declarations_say() -> None:
    assert (TOP / ".env.example").read_text() == reference.env_file(), "run: cluster-code settings --env > .env.example"


def test_the_example_file_uncommented_gives_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text(re.sub(r"^#(?=[A-Z_]+=)", "", reference.env_file(), flags=re.MULTILINE))
    env = environment(file)
    for settings in (GatewaySettings, RealtimeSettings, OrchestratorSettings, TokenVariables, LogSettings, DevSettings):
        assert load(settings, env) == settings()
    names = {field.name for field in fields(DatabaseSettings)} - {"url"}
    assert all(
        getattr(load(DatabaseSettings, env, url="x"), name) == getattr(DatabaseSettings("x"), name) for name in names
    )
    for entry in reference.entries():  # What the file has set goes with the test.
        monkeypatch.delenv(entry.name, raising=False)


def test_the_readme_lists_every_variable() -> None:
    assert reference.markdown() in (TOP / "README.md").read_text(), "run: cluster-code settings --markdown"
