"""The container of an archive, byte for byte (``docs/formats.md``). Pure.

::

    MAGIC                          8 bytes, the last one the version
    entry, entry, …                each: head | key | data | BLAKE3 of key and data
    end                            a head of length 0 without a key | BLAKE3 of everything before this checksum

A head is ``ENTR`` or ``ENDS``, the key's length (u16) and the data's length (u64), little-endian. Keys are those of a
backend, so none can be a path that leads anywhere. What the keys name is the page store's business.
"""

import struct
from dataclasses import dataclass

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.backends.keys import checked_key

MAGIC = b"GVARCH\0\1"
HEAD = struct.Struct("<4sHQ")
CHECKSUM_BYTES = 32
MAX_KEY_BYTES = 1100
MAX_ENTRIES = 1 << 20
_ENTRY, _END = b"ENTR", b"ENDS"


@dataclass(frozen=True)
class Head:
    """What stands in front of an entry; a key of length 0 is the end's."""

    key_bytes: int
    data_bytes: int

    @property
    def is_end(self) -> bool:
        """Whether no entry follows any more."""
        return not self.key_bytes


def encode_head(key: bytes, data_bytes: int) -> bytes:
    """The bytes in front of an entry's key and data."""
    return HEAD.pack(_ENTRY, len(key), data_bytes)


def encode_end_head() -> bytes:
    """The bytes in front of the last checksum."""
    return HEAD.pack(_END, 0, 0)


def check_magic(data: bytes) -> None:
    """Check an archive's first bytes.

    :raise InvalidInput: they are of something else, or of a version that this release does not know.
    """
    if data == MAGIC:
        return
    if data[:-1] == MAGIC[:-1]:
        hint = f"this release knows version {MAGIC[-1]}: use the one that wrote it, or a newer one"
        raise InvalidInput(f"the archive is of version {data[-1]}", hint)
    raise InvalidInput("this is no archive of a snapshot", "expected a file that geni-violin snapshot export wrote")


def decode_head(data: bytes) -> Head:
    """What stands in front of an entry.

    :raise InvalidInput: no archive has this there.
    """
    kind, key_bytes, data_bytes = HEAD.unpack(data)
    head = Head(key_bytes, data_bytes)
    if kind == _END and not key_bytes and not data_bytes:
        return head
    if kind != _ENTRY or not 0 < key_bytes <= MAX_KEY_BYTES:
        raise InvalidInput("the archive is damaged: it has something else where an entry should begin")
    return head


def decode_key(data: bytes) -> str:
    """An entry's key.

    :raise InvalidInput: it could lead out of the store.
    """
    try:
        return checked_key(data.decode("ascii"))
    except UnicodeDecodeError:
        raise InvalidInput(f"the archive has an object {data!r}", "expected keys of ASCII letters") from None
