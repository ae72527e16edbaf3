"""Secrets in a log: none is seen, in whatever pieces and in whichever form it comes."""

from __future__ import annotations

import base64
import json
import random
from urllib.parse import quote

import pytest

from orchestrator.deployments import masking
from orchestrator.deployments.masking import MASK, Masker, credentials


@pytest.fixture(autouse=True, params=[masking._MANY, 0], ids=["few", "many"])
def _(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few forms and many are looked for in different ways, to the same end."""
    monkeypatch.setattr(masking, "_MANY", request.param)


def masked(secrets: list[str], *pieces: str) -> str:
    masker = Masker(secrets)
    return "".join(masker.feed(piece) for piece in pieces) + masker.end()


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["nothing to see\n"], "nothing to see\n"),
        (["A=hunter2!\n"], f"A={MASK}!\n"),
        (["A=hun", "ter", "2!"], f"A={MASK}!"),
        (["hunter2hunter2"], MASK + MASK),
        (["hunt", "ed\n"], "hunted\n"),
        (["hunhunter2"], f"hun{MASK}"),
        # The end of what comes: what may be half a secret is none of the log's business, a letter is.
        (["it ends with a h"], "it ends with a h"),
        (["it ends with hunter"], f"it ends with {MASK}"),
    ],
)
def test_a_secret_is_masked_where_it_is_whole(pieces: list[str], shown: str) -> None:
    assert masked(["hunter2"], *pieces) == shown


def test_secrets_that_overlap_are_masked_as_one() -> None:
    assert masked(["abcd", "abcdef"], "abcd", "ef.") == f"{MASK}."
    assert masked(["abcd", "abcdef"], "abcd", "eg.") == f"{MASK}eg."
    assert masked(["xabc", "abcd"], "xabc", "d.") == f"{MASK}."
    assert masked(["xabc", "abcd"], "xabc", "z.") == f"{MASK}z."
    assert masked(["aaaa"], *"aaaaaaaaa", "b") == f"{MASK}b"


def test_short_values_are_no_secrets() -> None:
    assert masked(["", "abc", "true"], "abc is true") == f"abc is {MASK}"


SECRET = 'p&ss "wörd"/+x'


@pytest.mark.parametrize("before", ["", "u", "us", "use", "user:"])
@pytest.mark.parametrize("after", ["", "!", "!!", "!!!"])
def test_a_secret_is_masked_in_base64_wherever_it_is_in_what_was_encoded(before: str, after: str) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        encoded = encode((before + SECRET + after).encode()).decode()
        shown = masked([SECRET], f"Authorization: Basic {encoded}\n")
        assert shown.startswith("Authorization: Basic ")
        assert MASK in shown
        # What is left is what came before and after it, with the characters that they share with it.
        assert len(shown) - len("Authorization: Basic \n") <= len(MASK) + 2 * len(before + after) + 4


@pytest.mark.parametrize("form", [quote(SECRET), quote(SECRET, safe=""), json.dumps(SECRET), f"'{SECRET}'"])
def test_a_secret_is_masked_in_an_url_and_in_json(form: str) -> None:
    shown = masked([SECRET], f"x={form}\n")
    assert "ss" not in shown
    assert MASK in shown


def test_each_line_of_a_key_is_masked_since_builders_put_something_before_each() -> None:
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\nAAAAAAAAAAAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
    shown = masked([key], "".join(f"#7 0.1 {line}\n" for line in key.splitlines()))
    assert shown.splitlines() == [
        "#7 0.1 -----BEGIN OPENSSH PRIVATE KEY-----", f"#7 0.1 {MASK}", f"#7 0.1 {MASK}",
        "#7 0.1 -----END OPENSSH PRIVATE KEY-----",
    ]  # fmt: skip
    assert masked([key], f"> {key}.") == f"> {MASK}."


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://ann:p%40ss@git.test/shop", {"p%40ss", "p@ss"}),
        ("https://ghp_0123456789@git.test/shop", {"ghp_0123456789"}),
        ("https://glpat-0123456789abcdef:x-oauth-basic@git.test/", {"glpat-0123456789abcdef", "x-oauth-basic"}),
        ("https://git.test/shop?private_token=t0ken", {"t0ken"}),
        ("ssh://git@git.test/shop", set()),
        ("git@git.test:shop", set()),
        ("https://[broken", set()),
    ],
)
def test_what_a_repositorys_url_keeps_secret(url: str, found: set[str]) -> None:
    assert set(credentials(url)) - {""} == found


@pytest.mark.random
def test_no_secret_is_seen_however_a_log_is_cut_into_pieces() -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(300):
        secrets = ["".join(draw.choices("abc", k=draw.randrange(4, 9))) for _ in range(draw.randrange(1, 4))]
        text = "".join(draw.choice([*secrets, *"abcab\n "]) for _ in range(draw.randrange(60)))
        pieces, rest = [], text
        while rest:
            cut = draw.randrange(1, 7)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        shown = masked(secrets, *pieces)
        assert not any(secret in shown for secret in secrets), (secrets, text, shown)
        # As if it had come as a whole, but for the end, where no more can come.
        whole = masked(secrets, f"{text}\n")
        assert masked(secrets, *pieces, "\n") == whole, (secrets, text)
