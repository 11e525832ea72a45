"""JSON to the core's dataclasses and back, checked at the border.

The core's dataclasses are the wire format between the parts, so there is one definition of each message.
"""

from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from geni_violin.core.errors import InvalidInput

T = TypeVar("T")


@cache
def _adapter(cls: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, cls))


def encode(value: Any) -> Any:
    """A dataclass (or a tuple, list or dict of them) as plain JSON values."""
    return _adapter(cast(Hashable, type(value))).dump_python(value, mode="json")


def decode(cls: type[T], data: Any) -> T:
    """Plain JSON values as an instance of ``cls``.

    :raise InvalidInput: they do not fit; the message names the first field that does not.
    """
    try:
        result: T = _adapter(cast(Hashable, cls)).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise InvalidInput(f"{place}: {first['msg']}", f"this is not a valid {cls.__name__}") from error
    return result
