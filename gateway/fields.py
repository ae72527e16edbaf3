"""The marshmallow fields that the schemas of all resources share: strict types, bounded lengths, printable text."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate

# PostgreSQL's bigint, which every id is.
MAX_ID = 2**63 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")


class Matches(validate.Validator):
    """The whole value matches `pattern`, written in what ECMA 262, RE2 and Python have in common.

    Anchors are added where OpenAPI needs them. The message never repeats the value, which may be a secret.
    """

    def __init__(self, pattern: str, error: str) -> None:
        self.regex = re.compile(f"^{pattern}$")
        self._whole = re.compile(pattern)
        self._message = error

    def __call__(self, value: str) -> str:
        """Return the value, or raise ValidationError."""
        if not self._whole.fullmatch(value):
            raise ValidationError(self._message)
        return value


# As `auth.names` has it: no control characters (C0, C1), no line and paragraph separators.
PRINTABLE = Matches(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*", "Control characters and line breaks are not allowed.")
NO_NUL = Matches(r"[^\x00]*", "NUL is not allowed.")
# Only the shape: whether mail arrives there is for a mail to find out.
_ADDRESS = Matches(
    r"[^\x00-\x20\x7f-\xa0\u2028\u2029@]+@[^\x00-\x20\x7f-\xa0\u2028\u2029@]+", "Must look like name@example.org."
)


def _not_blank(value: str) -> None:
    if not value.strip():
        raise ValidationError("Must not be blank.")


class Text(fields.String):
    """A string of `least` to `most` characters without control characters; with `least`, not only blanks."""

    def __init__(self, *, least: int = 1, most: int = 200, allowed: Matches = PRINTABLE, **kwargs: Any) -> None:
        checks: list[Any] = [validate.Length(min=least or None, max=most), allowed]
        if least:
            checks.append(_not_blank)
        super().__init__(validate=[*checks, *kwargs.pop("checks", ())], **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        if not isinstance(value, str):
            raise self.make_error("invalid")
        # JSON cannot bring one in; a URL with bytes that are no UTF-8 can.
        if _SURROGATE.search(value):
            raise self.make_error("invalid_utf8")
        return value


class Email(Text):
    """An address of at most 254 characters (RFC 5321, section 4.5.3.1.3)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(most=254, allowed=_ADDRESS, **kwargs)


class Whole(fields.Integer):
    """An integer in a JSON body: no string, no fraction, no boolean."""

    def __init__(self, least: int, most: int, **kwargs: Any) -> None:
        super().__init__(strict=True, validate=[validate.Range(least, most)], **kwargs)

    def _validated(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.make_error("invalid")
        return value


class WholeInQuery(fields.Integer):
    """An integer in a query string: decimal digits, and nothing else."""

    def __init__(self, least: int, most: int, **kwargs: Any) -> None:
        super().__init__(validate=[validate.Range(least, most)], **kwargs)

    def _validated(self, value: Any) -> int:
        if not isinstance(value, str) or not value.isascii() or not value.isdecimal() or len(value) > 19:
            raise self.make_error("invalid")
        return int(value)


class FlagInQuery(fields.Boolean):
    """true or false, in a query string."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if value not in ("true", "false"):
            raise self.make_error("invalid", input=value)
        return bool(value == "true")


_AGO = re.compile(r"([0-9]{1,9})([smhd]?)")
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Since(fields.Field[datetime]):
    """A moment in a query string: RFC 3339, or how long ago (`90s`, `10m`, `2h`, `1d`; a bare number are seconds)."""

    default_error_messages = {  # noqa: RUF012  As the parent has it.
        "invalid": "Must be a moment such as 2026-03-01T12:00:00Z, or how long ago: 90s, 10m, 2h or 1d."
    }

    def __init__(self, **kwargs: Any) -> None:
        pattern = f"^({_AGO.pattern}|{_MOMENT.pattern})$"
        super().__init__(metadata={"type": "string", "pattern": pattern, **kwargs.pop("metadata", {})}, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> datetime:
        try:
            if ago := _AGO.fullmatch(value):
                return datetime.now(UTC) - timedelta(seconds=int(ago[1]) * _UNITS[ago[2]])
            if _MOMENT.fullmatch(value):
                return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise self.make_error("invalid") from error
        raise self.make_error("invalid")


class Flag(fields.Boolean):
    """true or false, and nothing that looks like them."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


# Bytes: what Linux takes for one variable is 128 KiB, and for all of them and the arguments 2 MiB.
LONGEST_VALUE = 32 << 10
_LARGEST_ENVIRONMENT = 256 << 10


def _value_fits(value: str) -> None:
    if len(value.encode()) > LONGEST_VALUE:
        raise ValidationError(f"Longer than {LONGEST_VALUE} bytes.")


def _environment_fits(env: dict[str, str | None]) -> None:
    if sum(len(name) + len((value or "").encode()) for name, value in env.items()) > _LARGEST_ENVIRONMENT:
        raise ValidationError(f"Longer than {_LARGEST_ENVIRONMENT} bytes in all.")


def environment(description: str, *, nullable: bool = False, **kwargs: Any) -> fields.Dict:
    """Environment variables by name. `nullable`: null stands for one that is to be removed."""
    return fields.Dict(
        keys=Text(
            most=128, allowed=Matches(r"[A-Za-z_][A-Za-z0-9_]*", "No name for a variable: [A-Za-z_][A-Za-z0-9_]*.")
        ),
        values=Text(least=0, most=LONGEST_VALUE, allowed=NO_NUL, checks=[_value_fits], allow_none=nullable),
        validate=[validate.Length(max=256), _environment_fits],
        metadata={"description": description},
        **kwargs,
    )


class Uuid(fields.UUID):
    """A UUID in its canonical form."""

    def _validated(self, value: Any) -> Any:
        if not isinstance(value, str) or len(value) != 36:
            raise self.make_error("invalid_uuid")
        return super()._validated(value)


def object_id(**kwargs: Any) -> Whole:
    """The id of an object, in a body."""
    return Whole(1, MAX_ID, **kwargs)


def object_id_in_query(**kwargs: Any) -> WholeInQuery:
    """The id of an object, in a query string."""
    return WholeInQuery(1, MAX_ID, **kwargs)


class PageQuery(Schema):
    """Which page of a list."""

    page = WholeInQuery(1, 1_000_000, load_default=1)
    page_size = WholeInQuery(1, 100, load_default=20)


class Pagination(Schema):
    """Where in a list this page is."""

    page = fields.Integer(required=True)
    page_size = fields.Integer(required=True)
    total = fields.Integer(required=True)
    total_pages = fields.Integer(required=True)
    total_is_exact = fields.Boolean(
        metadata={"description": "false: there are more than `total`; counting stopped there."}
    )


def moment(**kwargs: Any) -> fields.DateTime:
    """A point in time in an answer: RFC 3339, in UTC."""
    return fields.DateTime(required=True, **kwargs)


def page_of(item: type[Schema]) -> type[Schema]:
    """The schema of a page of `item`s."""
    name = item.__name__
    return type(
        f"{name}Page",
        (Schema,),
        {
            "items": fields.List(fields.Nested(item), required=True),
            "pagination": fields.Nested(Pagination, required=True),
            "__doc__": f"A page of {name} objects.",
        },
    )
