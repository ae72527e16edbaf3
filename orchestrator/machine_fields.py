"""The fields that schemas of providers and machine configs are made of, and how what is wrong is told."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from marshmallow import ValidationError, fields, validate

NAME = validate.Regexp(
    r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z", error="must be 1 to 63 of a-z, 0-9 and '-', not '-' at either end"
)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]*)\Z", re.ASCII)
# The suffixes of Kubernetes' quantities: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
_BYTES = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
_MOST_BYTES = 2**50
_MOST_CORES = 1024.0


def parse_bytes(value: Any) -> int:
    """A size such as `4Gi`, `512M` or `1048576`, in bytes. Raises ValidationError."""
    found = _QUANTITY.match(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
    if found is None or found[2] not in _BYTES:
        raise ValidationError(f"must be a size such as 512Mi or 4Gi, not {value!r}")
    size = float(found[1]) * _BYTES[found[2]]
    if not 1 <= size <= _MOST_BYTES:
        raise ValidationError(f"must be more than nothing and at most 1024Ti, not {str(value)[:40]!r}")
    return int(size)


def parse_cores(value: Any) -> float:
    """A number of cores such as `2`, `0.5` or `500m`. Raises ValidationError."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(min(value, _MOST_CORES + 1))
    elif isinstance(value, str) and (found := _QUANTITY.match(value)) and found[2] in ("", "m"):
        number = float(found[1]) / (1000 if found[2] else 1)
    if not 0 < number <= _MOST_CORES:
        raise ValidationError(f"must be a number of cores such as 2, 0.5 or 500m, not {value!r}")
    return number


class Bytes(fields.Field[int]):
    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        return parse_bytes(value)


class Cores(fields.Field[float]):
    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> float:
        return parse_cores(value)


class Json(fields.Field[dict[str, Any]]):
    """A mapping that jsonb can hold."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValidationError("must be a mapping")
        wrong: dict[str, list[str]] = {}
        for place, problem in _not_json(value, "", 0):
            wrong.setdefault(place, []).append(problem)
        if wrong:
            raise ValidationError(wrong)
        return value


def _not_json(value: Any, place: str, depth: int) -> Iterator[tuple[str, str]]:
    """Each part of a value that jsonb cannot hold: `(place, what is wrong)`."""
    if depth > 32:
        yield place, "is nested too deeply"
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield place or "_schema", f"the key {key!r} must be a string: put it in quotes"
            else:
                yield from _not_json(key, place or "_schema", depth + 1)
                yield from _not_json(inner, f"{place}.{key}" if place else key, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_json(inner, f"{place}[{index}]", depth + 1)
    elif isinstance(value, str):
        if problem := _not_text(value):
            yield place, problem
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, "must be a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield place, "is a number too large"
    elif value is not None and not isinstance(value, bool | int | float):
        yield place, f"is a {type(value).__name__}: put it in quotes"


def _not_text(value: str) -> str | None:
    if "\0" in value:
        return "must not hold a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must be text that UTF-8 can hold"
    return None


def plain(value: str) -> None:
    if problem := _not_text(value):
        raise ValidationError(problem)


class Environment(fields.Field[dict[str, str]]):
    """Names and values of environment variables."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, str]:
        if not isinstance(value, dict):
            raise ValidationError("must be a mapping")
        wrong: dict[str, list[str]] = {}
        for name, inner in value.items():
            if not isinstance(name, str) or not _ENV_NAME.match(name):
                wrong[str(name)] = ["is no name of an environment variable"]
            elif not isinstance(inner, str):
                wrong[name] = [f"must be a string: put {inner!r} in quotes"]
            elif problem := _not_text(inner):
                wrong[name] = [problem]
        if wrong:
            raise ValidationError(wrong)
        return value


class Command(fields.Field[list[Any]]):
    """A list of words, or a list of such lists: the first whose program is found is taken."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> list[Any]:
        choices = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        for words in choices:
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise ValidationError("must be a list of strings (quote numbers), or a list of such lists")
            if not words[0]:
                raise ValidationError("must begin with the name of a program")
            for word in words:
                plain(word)
        return list(value)


def path_field(**options: Any) -> fields.String:
    plain = validate.Regexp(r"/[!-~]*\Z", error="must begin with '/' and hold no blanks")
    return fields.String(validate=plain, **options)


class References(fields.Field[dict[str, dict[str, str]]]):
    """Credentials: where each is to be found, never itself. What is wrong is not repeated: it may be the secret."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, dict[str, str]]:
        if not isinstance(value, dict) or not all(isinstance(name, str) and not _not_text(name) for name in value):
            raise ValidationError("must be a mapping of names")
        wrong = {name: [_REFERENCE] for name, reference in value.items() if not _is_reference(reference)}
        if wrong:
            raise ValidationError(wrong)
        return value


_REFERENCE = "must be a reference, {env: NAME} or {file: /path}: a value itself is never kept"


def _is_reference(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, name),) = value.items()
    if not isinstance(name, str) or _not_text(name):
        return False
    return bool(_ENV_NAME.match(name)) if kind == "env" else kind == "file" and name.startswith("/")


class Flag(fields.Boolean):
    """true or false, and nothing that looks like them."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Id(fields.Field[int]):
    """The id of a row."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**63:
            raise ValidationError(f"must be an id, such as 7, not {value!r}")
        return value


class User(Id):
    """The id of a user, or the address."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> Any:
        if not isinstance(value, str):
            return super()._deserialize(value, attr, data, **kwargs)
        if "@" not in value or len(value) > 254 or _not_text(value):
            raise ValidationError(f"must be the id or the e-mail address of a user, not {value!r}")
        return value


FEW = validate.Length(max=1000)
OBJECT = {"type": "object"}


def name_field() -> fields.String:
    # The same pattern as OpenAPI can have it.
    pattern = {"pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
    return fields.String(required=True, validate=NAME, metadata=pattern)


def seconds(most: float = 86400.0) -> fields.Float:
    return fields.Float(validate=validate.Range(min=0.0, min_inclusive=False, max=most))


def word(what: str, **options: Any) -> fields.String:
    """One word of printable ASCII, that no program takes for an option."""
    plain = validate.Regexp(r"(?!-)[!-~]{1,500}\Z", error=f"must be {what}, without blanks")
    return fields.String(validate=plain, **options)


def words() -> fields.List[Any]:
    return fields.List(fields.String(validate=plain), validate=validate.Length(max=1000))


def amount(least: int, most: int, **options: Any) -> fields.Integer:
    return fields.Integer(strict=True, validate=validate.Range(least, most), **options)


HOST = r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)"


def user_field(*, names: bool = False) -> fields.String:
    """As `docker run --user` takes it; empty: the image's own. Without `names` numbers only, to give files to them."""
    one = r"[A-Za-z0-9_.-]{1,64}" if names else r"\d{1,9}"
    plain = validate.Regexp(rf"({one}(:{one})?)?\Z", error="must be a user such as 1000:1000")
    return fields.String(validate=plain)


def capabilities_field() -> fields.List[Any]:
    one = fields.String(
        validate=validate.Regexp(r"[A-Z_]{1,64}\Z", error="must be a capability such as NET_BIND_SERVICE")
    )
    return fields.List(one, validate=validate.Length(max=100))


def address_field(**options: Any) -> fields.String:
    def valid(value: str) -> None:
        try:
            ip_address(value)
        except ValueError:
            raise ValidationError("must be an IP address such as 127.0.0.1 or 0.0.0.0") from None

    return fields.String(validate=valid, **options)


def flatten(messages: Any, place: str = "") -> list[str]:
    """Marshmallow's nested messages as lines: `machine_configs[2].memory: must be …`."""
    if isinstance(messages, dict):
        lines = []
        for key, inner in messages.items():
            if key == "_schema":
                lines += flatten(inner, place)
            elif isinstance(key, int):
                lines += flatten(inner, f"{place}[{key}]")
            else:
                lines += flatten(inner, f"{place}.{key}" if place else str(key))
        return lines
    return [f"{place}: {message}" if place else str(message) for message in messages]


def errors_by_field(messages: Any) -> dict[str, list[str]]:
    """Marshmallow's nested messages by the place that `flatten` gives them: `services.preview.port`."""
    fields: dict[str, list[str]] = {}
    for line in flatten(messages):
        place, _, problem = line.partition(": ")
        fields.setdefault(place, []).append(problem)
    return fields
