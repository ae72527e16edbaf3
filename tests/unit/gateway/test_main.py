from __future__ import annotations

from pathlib import Path

import pytest

from gateway.__main__ import main

SECRET = "kX3v9Qw7Lm2Zp8Rt5Yb1Nc6Hd4Gf0Js-"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DATABASE_URL": ""}, "DATABASE_URL is not set"),
        ({"PORT": "99999"}, "PORT must be 0 to 65535"),
        ({"AMQP_URL": ""}, "AMQP_URL is not set"),
        ({"AMQP_URL": "http://localhost"}, "AMQP_URL must begin with amqp"),
        ({"AMQP_URL": "amqp://localhost", "EVENTS_MAX_AGE": "never"}, "EVENTS_MAX_AGE must be like"),
        ({"AMQP_URL": "amqp://localhost", "JWT_SECRET": ""}, "JWT_SECRET is not set"),
        ({"AMQP_URL": "amqp://localhost", "RATE_LIMIT_LOGIN": "often"}, "RATE_LIMIT_LOGIN: 'often' is no rate"),
    ],
)
def test_a_replica_says_what_it_lacks_in_one_line_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    variables: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"DATABASE_URL": "postgresql:///x", "JWT_SECRET": SECRET, **variables}.items():
        monkeypatch.setenv(name, value)
    assert main() == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
