"""What may be a key, and a prefix of keys. Pure.

A key is one to eight names with ``/`` between them. Names are those of ``names`` (letters, digits, ``.``, ``_``, ``-``,
the first a letter or a digit) with room for a suffix, so that a key is a path below the local backend's folder, never
``..`` or hidden, and means the same in an object store. Hidden names are the backends' own.
"""

import re

from geni_violin.core.errors import InvalidInput

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_KEY = re.compile(rf"{_NAME}(?:/{_NAME}){{0,7}}")
_PREFIX = re.compile(rf"(?:{_NAME}/){{0,7}}")


def checked_key(key: str) -> str:
    """``key``, if it can be one.

    :raise InvalidInput: it cannot.
    """
    # fullmatch, because "$" would let a newline at the end pass.
    if _KEY.fullmatch(key) is None:
        raise InvalidInput(
            f"{key!r} cannot be an object's key", "expected up to 8 names of letters, digits, '.', '_', '-'"
        )
    return key


def checked_prefix(prefix: str) -> str:
    """``prefix``, if it can be one: empty, or whole names each followed by ``/``.

    :raise InvalidInput: it cannot.
    """
    if _PREFIX.fullmatch(prefix) is None:
        raise InvalidInput(f"{prefix!r} cannot be a prefix of keys", "expected nothing, or names each followed by '/'")
    return prefix


def checked_range(start: int, length: int) -> None:
    """Check a range of bytes.

    :raise InvalidInput: it begins or ends before the first byte.
    """
    if start < 0 or length < 0:
        raise InvalidInput(f"{length} bytes from {start} on are no range of an object", "expected numbers from 0 on")
