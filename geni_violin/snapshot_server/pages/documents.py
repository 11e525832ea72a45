"""Small JSON objects that tell when they are damaged: manifests and seals.

A document has one name beside its checksum, and is written in one form only, so that every bit of it counts::

    {"blake3":"…of the bytes of the record…","manifest":{…}}

The form is that of Python's ``json`` with ``,`` and ``:`` as separators and ASCII only.
"""

import json
from typing import Any, TypeVar

from blake3 import blake3

from geni_violin.core.errors import InvalidInput, MachineFault
from geni_violin.runtime.wire import decode, encode

T = TypeVar("T")


def encode_document(name: str, record: Any) -> bytes:
    """A document with this record.

    :raise InvalidInput: it holds a value that JSON cannot keep.
    """
    try:
        text = json.dumps(encode(record), separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InvalidInput(f"the {name} holds a value that JSON cannot keep", "expected finite numbers") from error
    return f'{{"blake3":"{blake3(text.encode()).hexdigest()}","{name}":{text}}}'.encode()


def decode_document(cls: type[T], name: str, data: bytes, what: str, version: int | None = None) -> T:
    """The record of a document.

    :param what: what people call it.
    :param version: what the record's ``version`` must be, if it has one.
    :raise MachineFault: it is damaged, or of another version.
    """
    try:
        content = json.loads(data)[name]
        found = content.get("version") if version is not None else None
        if found != version:
            hint = f"this release knows version {version}: use the one that wrote it"
            raise MachineFault(f"{what} is of version {found}", hint)
        text = json.dumps(content, separators=(",", ":")).encode()
        record = decode(cls, content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidInput) as error:
        raise MachineFault(f"{what} cannot be read: {error}", "put it back from a backup, or remove it") from error
    if data != f'{{"blake3":"{blake3(text).hexdigest()}","{name}":'.encode() + text + b"}":
        raise MachineFault(f"{what} is damaged: it does not have the BLAKE3 that it says", "put it back from a backup")
    return record
