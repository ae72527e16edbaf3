"""The admin commands, on a database of their own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import asyncpg
import pytest
from environs import Env

import migrations
from auth.permissions import Identity, Scope
from auth.tokens import Tokens
from gateway.token_settings import token_settings
from scripts import target
from scripts.instance import Instance
from tests.integration.scripts.conftest import Fetch, Run


def test_migrations_go_down_and_up_and_tell(run: Run) -> None:
    known = migrations.known()
    assert run("migrate:status") == (0, "".join(f"applied  {one}\n" for one in known), "")
    assert run("migrate:up") == (0, "The schema was up to date already.\n", "")
    assert run("migrate:down", "--count", "2") == (0, f"took back {known[-1]}\ntook back {known[-2]}\n", "")
    assert run("migrate:status")[1].splitlines()[-1] == f"missing  {known[-1]}"
    code, output, errors = run("provider", "list")
    assert (code, output) == (2, "")
    assert errors == (
        f"cluster-code: the database lacks 2 migration(s), from {known[-2]} on: run `cluster-code migrate:up`\n"
    )
    code, output, _ = run("migrate:up")
    assert (code, output) == (0, f"applied {known[-2]}\napplied {known[-1]}\nThe schema is up to date.\n")
    assert run("migrate:down", "--count", "99")[0] == 0
    assert run("migrate:down") == (0, "There was no migration to take back.\n", "")


@pytest.mark.parametrize("url", ["postgresql://x@127.0.0.1:1/none", "nonsense"])
@pytest.mark.parametrize("command", [["migrate:up"], ["provider", "list"]])
def test_a_database_that_is_not_there_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, url: str, command: list[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    code, output, errors = run(*command)
    assert (code, output) == (2, "")
    assert errors.startswith("cluster-code: DATABASE_URL: ")
    assert errors.count("\n") == 1


def test_a_user_is_made_with_a_password_from_standard_input(run: Run, fetch: Fetch) -> None:
    code, output, errors = run("user", "create", "ada@example.org", "--admin", given="a good password\n")
    assert (code, errors) == (0, "")
    assert output.endswith("(ada@example.org): added\n")
    assert fetch("SELECT email, name, is_admin FROM users") == [("ada@example.org", "ada", True)]
    assert fetch("SELECT count(*) FROM workspaces") == [(1,)]
    code, _, errors = run("user", "create", "ADA@example.org", given="a good password\n")
    assert code == 1
    assert "already" in errors
    assert run("user", "create", "eve@example.org", given="short\n")[0] == 1
    assert run("user", "create", "eve@example.org", given="")[0] == 2


def test_a_generated_password_is_printed_once(run: Run) -> None:
    code, output, _ = run("user", "create", "ada@example.org", "--name", "Ada", "--generate")
    assert code == 0
    assert len(output.splitlines()[1].removeprefix("password: ")) >= 20


async def authenticate(database_url: str, token: str) -> Identity:
    connection = await asyncpg.connect(database_url)
    try:
        return await Tokens(token_settings(Env())).authenticate(connection, token)
    finally:
        await connection.close()


def test_a_token_is_all_that_is_printed(run: Run, database_url: str) -> None:
    run("user", "create", "ada@example.org", "--generate")
    code, output, errors = run(
        "token", "issue", "Ada@Example.org", "--scope", "read", "--channel", "app:*", "--expires", "30m"
    )
    assert (code, errors) == (0, "")
    token, end = output.split("\n")
    assert end == ""
    identity = asyncio.run(authenticate(database_url, token))
    assert identity.email == "ada@example.org"
    assert identity.scopes == frozenset({Scope.READ})
    assert identity.channels == ("app:*",)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["nobody@example.org"], 1, "There is no user with the address 'nobody@example.org'."),
        (["ada@example.org", "--expires", "soon"], 2, "'soon' is no duration"),
        (["ada@example.org", "--expires", "0h"], 2, "'0h' is no duration"),
        (["ada@example.org", "--channel", "everything"], 1, "'everything' is no channel"),
        (["ada@example.org", "--scope", "root"], 2, "'root'"),
    ],
)
def test_a_token_that_cannot_be_issued_says_why(run: Run, arguments: list[str], code: int, error: str) -> None:
    run("user", "create", "ada@example.org", "--generate")
    got, output, errors = run("token", "issue", *arguments)
    assert (got, output) == (code, "")
    assert error in errors


def test_a_disabled_user_gets_no_token(run: Run, fetch: Fetch) -> None:
    run("user", "create", "ada@example.org", "--generate")
    fetch("UPDATE users SET is_disabled = true RETURNING id")
    code, output, errors = run("token", "issue", "ada@example.org")
    assert (code, output) == (1, "")
    assert "is disabled" in errors


USERS = [
    {"id": 7, "email": "ada@example.org", "name": "Ada"},
    {"id": "b-8", "email": "bob@example.org", "name": "Bob"},
]


def write(path: Path, users: object) -> str:
    path.write_text(json.dumps(users))
    return str(path)


@pytest.mark.parametrize("name", ["users.json", "users.yaml"])
def test_users_are_synced_and_syncing_again_changes_nothing(run: Run, fetch: Fetch, tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, USERS)
    told = "user 7 (ada@example.org): added\nuser b-8 (bob@example.org): added\n"
    assert run("sync-users", file, "--dry-run")[1] == told + "This was a dry run: nothing was changed.\n"
    assert fetch("SELECT * FROM users") == []
    assert run("sync-users", file) == (0, told, "")
    assert fetch("SELECT external_id, name FROM users ORDER BY id") == [("7", "Ada"), ("b-8", "Bob")]
    assert run("sync-users", file)[1].endswith("Nothing to change.\n")
    changed = [{**USERS[0], "name": "Ada Lovelace"}, {**USERS[1], "deleted": True}]
    assert run("sync-users", write(tmp_path / name, changed))[1] == (
        "user 7 (ada@example.org): changed\nuser b-8 (bob@example.org): deleted\n"
    )
    assert fetch("SELECT external_id, name FROM users") == [("7", "Ada Lovelace")]
    assert fetch("SELECT channel FROM outbox") == [("gateway",)]
    assert (
        run("sync-users", write(tmp_path / name, changed))[1].splitlines()[1] == "user b-8 (bob@example.org): unknown"
    )


def test_the_address_of_a_deleted_user_can_go_to_a_new_one(run: Run, fetch: Fetch, tmp_path: Path) -> None:
    run("sync-users", write(tmp_path / "users.json", USERS))
    swapped = [{"id": 9, "email": "bob@example.org", "name": "New Bob"}, {**USERS[1], "deleted": True}]
    assert run("sync-users", write(tmp_path / "users.json", swapped))[0] == 0
    assert fetch("SELECT external_id FROM users WHERE email = 'bob@example.org'") == [("9",)]


def test_a_sync_that_cannot_be_done_whole_is_not_done(run: Run, fetch: Fetch, tmp_path: Path) -> None:
    run("sync-users", write(tmp_path / "users.json", USERS))
    clash = [{"id": 10, "email": "eve@example.org", "name": "Eve"}, {"id": 11, "email": "ADA@example.org", "name": "A"}]
    code, output, errors = run("sync-users", write(tmp_path / "users.json", clash))
    assert (code, output) == (1, "")
    assert errors.startswith("cluster-code: [1] (id 11): ")
    assert fetch("SELECT count(*) FROM users") == [(2,)]


def test_an_account_that_a_sync_finds_by_its_address_is_said_to_be_linked(
    run: Run, fetch: Fetch, tmp_path: Path
) -> None:
    run("user", "create", "ada@example.org", "--generate")
    told = "user 7 (ada@example.org): linked\nuser b-8 (bob@example.org): added\n"
    assert run("sync-users", write(tmp_path / "users.json", USERS)) == (0, told, "")
    assert fetch("SELECT count(*) FROM users") == [(2,)]


def test_dead_letters_are_listed_newest_first(run: Run, fetch: Fetch) -> None:
    assert run("dead-letters")[0] == 0
    fetch(
        """INSERT INTO dead_letters (epoch, log_offset, event_id, routing_key, reason, body, created_at)
           VALUES ('e1', 1, 'a', 'app.old', 'not JSON', 'x', now() - interval '1 hour'),
                  ('e1', 2, 'b', 'app.new', 'data is missing', repeat('y', 100)::bytea, now()) RETURNING 1"""
    )
    code, output, errors = run("dead-letters")
    assert (code, errors) == (0, "")
    assert output.index("app.new") < output.index("app.old")
    for shown in ("e1:2", "data is missing", "yyyy", "not JSON"):
        assert shown in output
    assert "app.old" not in run("dead-letters", "--limit", "1")[1]
    fetch(
        r"""INSERT INTO dead_letters (epoch, log_offset, event_id, routing_key, reason, body)
            VALUES ('e1', 3, 'c', E'app.\033[2Jkey', 'no [/tag]', '[/body]') RETURNING 1"""
    )
    code, output, errors = run("dead-letters")
    assert (code, errors) == (0, "")
    assert "\N{REPLACEMENT CHARACTER}[2Jkey" in output
    assert "no [/tag]" in output
    assert "[/body]" in output
    assert "\033" not in output


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "is no JSON"),
        ("{}", "must be a list of users"),
        ("[{}]", "[0].id"),
        ('[{"id": true, "email": "a@b", "name": "A"}]', "[0].id"),
        ('[{"id": 1, "email": "a@b", "name": "A", "role": "x"}]', "[0].role"),
        ('[{"id": 1, "email": "a@b", "name": "A"}, {"id": "1", "email": "c@d", "name": "C"}]', "[1].id: '1' is the id"),
        ('[{"id": 1, "email": "a@b", "name": "A"}, {"id": 2, "email": "A@B", "name": "C"}]', "[1].email: 'A@B' is"),
        (json.dumps([{}] * 30), "more"),
    ],
)  # fmt: skip
def test_a_wrong_list_of_users_names_every_wrong_place(
    run: Run, fetch: Fetch, tmp_path: Path, text: str, error: str
) -> None:
    (file := tmp_path / "users.json").write_text(text)
    code, output, errors = run("sync-users", str(file))
    assert (code, output) == (1, "")
    assert error in errors
    assert fetch("SELECT * FROM users") == []


def test_declaring_the_exchange_needs_a_rabbitmq(run: Run) -> None:
    code, _, errors = run("exchange", "declare")
    assert code == 2
    assert "AMQP_URL is not set" in errors


def test_the_exchange_is_declared_and_what_was_there_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, amqp_url: str
) -> None:
    monkeypatch.setenv("AMQP_URL", amqp_url)
    parts = [
        "exchange apps.clusterix-code-v1", "stream cluster-code.events", "stream cluster-code.epochs",
        "queue cluster-code.dead-letter", "queue cluster-code.users",
    ]  # fmt: skip
    for what in ("declared", "was there"):
        assert run("exchange", "declare") == (0, "".join(f"{part}: {what}\n" for part in parts), "")


def test_the_settings_are_listed(run: Run) -> None:
    assert "HISTORY_SECONDS" in run("settings")[1]
    assert run("settings", "--env")[1].startswith("# Copy this file")
    assert run("settings", "--markdown")[1].startswith("| Variable |")


def test_wrong_usage_exits_with_2(run: Run) -> None:
    assert run("no-such-command")[0] == 2
    assert run("migrate:down", "--count", "0")[0] == 2
    assert run("--help")[0] == 0


def test_a_command_waits_for_its_turn_at_the_embedded_database_and_gives_up(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setattr(target, "_PATIENCE", 0.3)
    with Instance(tmp_path / "data").hold("another"):
        code, output, errors = run("migrate:status")
    assert (code, output) == (2, "")
    assert "is in use by another (pid" in errors


def test_secrets_are_encrypted_with_the_newest_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRETS_KEY", "")
    code, _, errors = run("secrets", "rotate")
    assert (code, "SECRETS_KEY is not set" in errors) == (2, True)
    monkeypatch.setenv("SECRETS_KEY", f"{'k' * 42}A")
    assert run("secrets", "rotate") == (0, "0 encrypted anew.\n", "")


def test_without_a_database_url_a_command_starts_the_embedded_one_and_ends_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("JWT_SECRET", "")
    assert run("migrate:up")[0] == 0
    assert run("user", "create", "ada@example.org", "--generate")[0] == 0
    assert run("token", "issue", "ada@example.org")[0] == 0
    assert not (tmp_path / "data" / "postgres" / "postmaster.pid").exists()
    assert (tmp_path / "data" / "jwt-secret").stat().st_mode & 0o777 == 0o600
