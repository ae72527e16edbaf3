from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.realtime import protocol
from gateway.realtime.protocol import CloseCode, Position
from tests.unit.realtime.wire import frames


@pytest.mark.parametrize(
    ("sent", "action"),
    [
        ('{"action":"subscribe","channel":"session:42"}', protocol.Subscribe("session:42", None, None)),
        (
            '{"action":"subscribe","channel":"session:42","since":"k3v9:7","id":"a","more":1}',
            protocol.Subscribe("session:42", "k3v9:7", "a"),
        ),
        (
            '{"action":"subscribe","channel":"session:42","since":null,"id":null}',
            protocol.Subscribe("session:42", None, None),
        ),
        ('{"action":"unsubscribe","channel":"session:42","id":""}', protocol.Unsubscribe("session:42", "")),
        ('{"action":"ping"}', protocol.Ping(None)),
        ('{"action":"refresh","token":"t"}', protocol.Refresh("t", None)),
    ],
)
def test_each_action_is_read(sent: str, action: protocol.Action) -> None:
    assert protocol.parse(sent.encode()) == action


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"ping"',
        b"null",
        b"{}",
        b'{"action":7}',
        b'{"action":null}',
        b'{"action":"subscribe"}',
        b'{"action":"subscribe","channel":42}',
        b'{"action":"subscribe","channel":"a:b","since":7}',
        b'{"action":"unsubscribe","channel":["a"]}',
        b'{"action":"refresh"}',
        b'{"action":"refresh","token":{}}',
        b'{"action":"ping","id":7}',
        b'{"action":"ping","id":{"a":1}}',
        b'{"action":"ping","id":"\\ud800"}',
        b'{"action":"ping","id":"\xff"}',
        b"[" * 60_000,
        b'{"action":' + b"[" * 3_000 + b"]" * 3_000 + b"}",
        b'{"action":"ping","id":' + b"9" * 5_000 + b"}",
    ],
)
def test_what_is_no_action_is_malformed(sent: bytes) -> None:
    with pytest.raises(protocol.Rejected) as caught:
        protocol.parse(sent)
    assert caught.value.malformed
    assert caught.value.code == "malformed"


def test_an_unknown_action_is_told_with_its_id_and_is_not_malformed() -> None:
    with pytest.raises(protocol.Rejected) as caught:
        protocol.parse(b'{"action":"dance","id":"x"}')
    assert (caught.value.code, caught.value.malformed, caught.value.id) == ("unknown_action", False, "x")


def test_nul_and_long_strings_come_back_as_they_were_sent() -> None:
    echo = "\0" + "x" * 50_000
    action = protocol.parse(orjson.dumps({"action": "ping", "id": echo}))
    ((_, payload),) = frames(protocol.control("pong", "user:7", {}, action.id))
    assert orjson.loads(payload) == {"event_type": "pong", "channel": "user:7", "data": {"id": echo}}


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")))
def test_no_bytes_raise_anything_but_rejected(data: bytes) -> None:
    try:
        protocol.parse(data)
    except protocol.Rejected:
        return


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {"action": st.sampled_from(["subscribe", "unsubscribe", "ping", "refresh"]) | _json},
        optional={"channel": _json, "since": _json, "id": _json, "token": _json},
    )
)
def test_an_action_of_any_types_is_read_or_rejected_and_its_id_can_be_echoed(frame: object) -> None:
    try:
        action = protocol.parse(orjson.dumps(frame))
    except protocol.Rejected as rejected:
        protocol.error("user:1", rejected.code, str(rejected), echo=rejected.id)
    else:
        protocol.control("pong", "user:1", {}, action.id)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 100_000])
def test_a_frame_holds_its_payload_whatever_its_size(size: int) -> None:
    payload = b"x" * size
    framed = protocol.frame(payload)
    assert list(frames(framed)) == [(0x81, payload)]
    assert protocol.payload_of(framed) == payload


def test_several_events_make_one_array_frame() -> None:
    assert list(frames(protocol.array_frame([b'{"a":1}', b'{"b":2}']))) == [(0x81, b'[{"a":1},{"b":2}]')]


def test_control_frames_are_those_of_the_rfc() -> None:
    assert bytes.fromhex("8900") == protocol.PING
    assert protocol.pong_frame(b"hi") == b"\x8a\x02hi"
    assert protocol.close_frame(1000) == b"\x88\x02\x03\xe8"
    ((first, payload),) = frames(protocol.close_frame(CloseCode.TOO_SLOW))
    assert first == 0x88
    assert payload[:2] == (4008).to_bytes(2, "big")
    assert payload[2:] == b"too slow: buffer full"


def test_every_close_code_of_ours_has_a_reason_that_fits_into_its_frame() -> None:
    ours = {code for code in CloseCode if code >= 4000}
    assert set(protocol.REASONS) == ours
    assert all(len(reason.encode()) <= 123 for reason in protocol.REASONS.values())


def test_the_offset_is_spliced_in_as_the_last_key() -> None:
    body = b'{"event_type":"a","channel":"b:1","data":{}}'
    framed = protocol.event_frame(body + b" \n", 7)
    assert framed == protocol.frame(b'{"event_type":"a","channel":"b:1","data":{},"offset":7}')


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"}", b"null"])
def test_an_offset_goes_into_objects_only(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        protocol.event_frame(body, 7)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("k3v9:1041", Position("k3v9", 1041)),
        ("a:0", Position("a", 0)),
        ("", None),
        ("k3v9", None),
        ("k3v9:", None),
        (":7", None),
        ("k3v9:-1", None),
        ("k3v9:7 ", None),
        ("k3v9:7\n", None),
        ("K3V9:7", None),
        ("k3v9:\u0667", None),
        ("k3v9:" + "9" * 20, None),
        ("k" * 33 + ":7", None),
        ("k3v9:7\0", None),
    ],
)
def test_positions_are_read_strictly(text: str, position: Position | None) -> None:
    assert protocol.parse_position(text) == position
    if position is not None:
        assert str(position) == text


def test_times_are_utc_in_whole_seconds() -> None:
    assert protocol.timestamp(None) is None
    assert protocol.timestamp(1_700_000_000.9) == "2023-11-14T22:13:20Z"
