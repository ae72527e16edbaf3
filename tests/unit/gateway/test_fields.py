from __future__ import annotations

from typing import Any

import pytest
from marshmallow import Schema, ValidationError

from gateway import fields
from gateway.api.projects import NewProject


class Everything(Schema):
    text = fields.Text(most=5)
    empty = fields.Text(least=0, most=5, allowed=fields.NO_NUL)
    email = fields.Email()
    id = fields.object_id()
    query_id = fields.object_id_in_query()
    flag = fields.Flag()
    uuid = fields.Uuid()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", "abc"),
        ("text", " a  "),
        ("text", "';--"),
        ("text", "日本語"),
        ("empty", ""),
        ("empty", "a\nb"),
        ("email", "admin@localhost"),
        ("id", 1),
        ("id", 2**63 - 1),
        ("flag", True),
        ("flag", False),
    ],
)
def test_a_good_value_is_taken_as_it_is(name: str, value: Any) -> None:
    assert Everything().load({name: value}) == {name: value}


def test_numbers_in_queries_are_digits() -> None:
    assert Everything().load({"query_id": "0042"}) == {"query_id": 42}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", ""),
        ("text", "   "),
        ("text", "abcdef"),
        ("text", "a\x00b"),
        ("text", "a\n"),
        ("text", "a\x1bb"),
        ("text", "a\x7fb"),
        ("text", "a\ud800"),
        ("text", 1),
        ("text", None),
        ("text", ["a"]),
        ("text", {"a": 1}),
        ("text", b"abc"),
        ("empty", "a\x00"),
        ("email", "nobody"),
        ("email", "a@b@c"),
        ("email", "a b@c"),
        ("email", "a" * 251 + "@b.c"),
        ("id", 0),
        ("id", -1),
        ("id", 2**63),
        ("id", 10**400),
        ("id", "1"),
        ("id", 1.0),
        ("id", True),
        ("query_id", "0"),
        ("query_id", "-1"),
        ("query_id", "+1"),
        ("query_id", "1.0"),
        ("query_id", "1_0"),
        ("query_id", " 1"),
        ("query_id", "\N{ARABIC-INDIC DIGIT ONE}"),
        ("query_id", "9" * 19),
        ("query_id", "9" * 5000),
        ("flag", "true"),
        ("flag", 1),
        ("flag", None),
        ("uuid", "x"),
        ("uuid", "{00000000-0000-0000-0000-000000000000}"),
        ("uuid", 5),
        ("unknown", 1),
    ],
)
def test_a_wrong_value_is_refused_at_its_field(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        Everything().load({name: value})
    assert set(refusal.value.messages) == {name}


@pytest.mark.parametrize(
    "env",
    [
        {"1A": "x"},
        {"A-B": "x"},
        {"": "x"},
        {"A": 1},
        {"A": None},
        {"A": "x\x00"},
        {"A": "x" * 32769},
        {"A": "é" * 16385},
        {f"A{number}": "x" for number in range(257)},
        {f"A{number}": "x" * 32000 for number in range(9)},
        ["A"],
        "A=b",
        None,
    ],
)
def test_an_environment_that_no_process_could_have_is_refused(env: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        NewProject().load({"workspace_id": 1, "name": "x", "env": env})
    assert set(refusal.value.messages) == {"env"}


def test_an_environment_keeps_its_values_verbatim() -> None:
    env = {"PATH": "/bin:$HOME", "_X1": "", "TEXT": "line\n'; DROP TABLE users; --\ttab"}
    assert NewProject().load({"workspace_id": 1, "name": "x", "env": env})["env"] == env
