"""Objects of a cluster as bytes, a third smaller than their encoding elsewhere: the fields' names are not in them.

What is held of a pod is held ten thousand times, and the names of its fields would be half of it. So each struct gets a
twin of the same fields that is encoded as an array. Bytes are good only for the process that made them.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import StructMeta

T = TypeVar("T")

_encode_into = msgspec.msgpack.Encoder().encode_into


class Packing(Generic[T]):
    """Packs objects of one struct."""

    def __init__(self, type: type[T]) -> None:  # noqa: A002
        self._type = type
        struct: Any = type
        self._twin = _twin(struct)
        self._decode = msgspec.msgpack.Decoder(self._twin).decode
        self._buffer = bytearray()

    def pack(self, thing: T) -> bytes:
        """The object as bytes."""
        # A copy of just its size: what the encoder itself returns has room for half as much again.
        _encode_into(msgspec.convert(thing, self._twin, from_attributes=True), self._buffer)
        return bytes(self._buffer)

    def unpack(self, packed: bytes) -> T:
        """The object again."""
        return msgspec.convert(self._decode(packed), self._type, from_attributes=True)


@cache
def _twin(struct: Any) -> Any:
    # Every field is always there: defaults are of the struct alone.
    fields = [(field.name, _of_twins(field.type)) for field in msgspec.structs.fields(struct)]
    return msgspec.defstruct(struct.__name__, fields, array_like=True, frozen=True, gc=False)


def _of_twins(type: Any) -> Any:  # noqa: A002
    if isinstance(type, StructMeta):
        return _twin(type)
    if not (inside := get_args(type)):
        return type
    twins = tuple(map(_of_twins, inside))
    origin = get_origin(type)
    return Union[twins] if origin in (Union, UnionType) else origin[twins]  # noqa: UP007
