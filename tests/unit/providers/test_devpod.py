"""What DevPod says, and what is made of it: pure parts."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ProviderFailure, ProviderUnavailable, SettingsError
from orchestrator.providers.devpod_command import Said, parse
from orchestrator.providers.devpod_home import Home, fingerprint
from orchestrator.providers.devpod_services import Following, define, script
from orchestrator.providers.devpod_troubles import of, telling
from orchestrator.providers.options import DevPodOptions
from orchestrator.providers.registry import open_provider


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"time":"…","message":"Clone repository\\n","level":"info"}', Said("info", "Clone repository")),
        ('{"message":"\\u001b[1mred\\u001b[0m","level":"fatal"}', Said("fatal", "red")),
        ('{"id":"x","state":"Running"}', None),
        ('{"message":7,"level":"info"}', None),
        ('{"message":"cut', None),
        ('["a"]', None),
        ("plain words", None),
        ("", None),
    ],
)
def test_a_line_of_the_log_is_told_from_others(line: str, said: Said | None) -> None:
    assert parse(line) == said


@pytest.mark.parametrize(
    ("line", "error", "told"),
    [
        ("error during connect: Get http://…", ProviderUnavailable, "cannot reach its Docker engine"),
        ('exec: "docker": executable file not found in $PATH', ProviderUnavailable, "needs the docker command"),
        ("Unable to connect to the server: dial tcp", ProviderUnavailable, "Kubernetes cluster"),
        ("pull access denied for x, repository does not exist", ProviderFailure, "RegistryUnauthorized"),
        ("build image: manifest unknown", ProviderFailure, "ImageNotFound"),
        ("failed to solve: process did not complete", ProviderFailure, "BuildFailed"),
        ("write /x: no space left on device", ProviderFailure, "DiskFull"),
        ("provider 'x' is not initialized, please", ProviderFailure, "DevPodProvider"),
        ("devcontainer up: start dev container: " + "x" * 999, ProviderFailure, "DevPodFailed"),
    ],
)
def test_what_devpod_says_is_classified(line: str, error: type[Exception], told: str) -> None:
    found = of([Said("info", "begin"), Said("info", line), Said("fatal", "exit status 1")], "do it")
    assert type(found) is error
    assert told in f"{getattr(found, 'reason', '')} {found}"
    assert len(str(found)) < 600


def test_the_words_that_tell_most_are_the_last_grave_ones() -> None:
    said = [Said("error", "it is broken"), Said("info", "later"), Said("fatal", "run agent command: exit status 1")]
    assert telling(said) == "it is broken"
    assert telling([Said("info", "one"), Said("info", "exit status 1")]) == "one"
    assert telling([]) == "it does not say why."


def follow(lines: list[str]) -> list[Any]:
    heard: list[Any] = []
    following = Following(
        "now",
        output=lambda service, line: heard.append((service, line)),
        ended=lambda *ending: heard.append(ending),
    )
    for line in lines:
        following(line)
    return heard


def test_what_was_written_before_the_following_is_left_out() -> None:
    heard = follow([
        "==> preview.log <==", "old", "\x1eended 1 1", "\x1efollow before", "older", "\x1efollow now", "new", "",
        "==> chat.log <==", "\x1efollow now", "hi", "", "", "bye", "\x1eended 3 4", "\x1eended x", "",
        "==> preview.log <==", "more",
    ])  # fmt: skip
    assert heard == [
        ("preview", "new"), ("chat", "hi"), ("chat", ""), ("chat", ""), ("chat", "bye"), ("chat", 3, 4),
        ("preview", "more"),
    ]  # fmt: skip


def test_a_flood_that_drowns_the_mark_does_not_silence_a_service_for_ever() -> None:
    heard = follow(["==> preview.log <==", *(f"line {number}" for number in range(1002))])
    assert heard == [("preview", "line 1001")]


def test_the_script_is_one_that_any_shell_runs(tmp_path: Path) -> None:
    services = define({"preview": {"command": ["echo", "it's $HOME", 'a "b"'], "port": 3000, "env": {"X": "y z"}}})
    command = script(services, "/work space", "now")
    assert command is not None
    words = shlex.split(command)
    assert words[:3] == ["exec", "sh", "-c"]
    assert subprocess.run(["sh", "-n", "-c", words[3]], check=False).returncode == 0
    assert "service preview cluster-code-preview-" in words[3]
    assert "env PORT=3000 'X=y z' echo 'it'\"'\"'s $HOME' 'a \"b\"'" in words[3]
    assert script(define({"preview": {"port": 3000}}), "/", "now") is None


def test_options_replace_those_of_before_and_leave_the_rest_of_the_configuration(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    home.write_options("docker", {"A": "1", "B": "2"})
    home.write_options("docker", {"B": "3"})
    home.write_options("cloud", {"C": "4"})
    config = (home.path / "config.yaml").read_text()
    assert "A:" not in config
    assert (home.path / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert config.count("userProvided: true") == 7
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})


def test_a_files_nonsense_is_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    (home.path / ".cluster-code/1.json").write_text("[1]")
    assert home.recall(1) == {}
    folder = home.path / "contexts/default/workspaces/x"
    folder.mkdir(parents=True)
    for text in ("", "{", "[]", "{}", '{"SubstitutionContext": null}', '{"MergedConfig": {"workspaceFolder": 7}}'):
        (folder / "workspace_result.json").write_text(text)
        assert home.folder("x") is None
    (folder / "workspace_result.json").write_text(json.dumps({"MergedConfig": {"workspaceFolder": "/site"}}))
    assert home.folder("x") == "/site"


def test_ssh_is_taken_only_where_the_provider_says_so(tmp_path: Path) -> None:
    def schemes(**options: Any) -> tuple[str, ...]:
        provider: Any = open_provider(
            "devpod", "d", options, data_dir=tmp_path, sink=print, repo_schemes=["https", "ssh", "git"]
        )
        found: tuple[str, ...] = provider._options.repo_schemes
        return found

    assert schemes() == ("https",)
    assert schemes(repo_schemes=["ssh"]) == ("ssh",)


@pytest.mark.parametrize(
    "options",
    [{"provider": "Docker!"}, {"instance": "x" * 21}, {"delete_deadline": 999}, {"options": {"A": 1}}, {"helm": "x"}],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"'d': options.*{next(iter(options))}"):
        DevPodOptions.load(options, provider="d")
