"""What a migration stream of QEMU has in it: pages, zeros, duplicates. Pure.

A reader of its own, shared with nothing that is measured. It knows the layout (QEMU, docs/devel/migration, "Stream
structure"; all numbers big-endian) as far as the end of the memory::

    "QEVM" | version 3 (4)
    07 configuration: length (4), name
    01 start | 02 part | 03 end of a device's section: section id (4)
       a start says: name length (1), name, instance (4), version (4)
       memory: records, each a word (8) whose low 12 bits are flags, and a block's name (length (1), name) unless 20:
          02 zero: fill byte (1)      04 sizes: total in the word, then name and length (8) of each block
          08 page: 4,096 bytes        10 end of the section's records
    7e footer: section id (4)
    04 the state of a device, all at once: the memory has come to its end
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

PAGE_BYTES = 4096
_MAGIC = b"QEVM\x00\x00\x00\x03"
_START, _PART, _END, _FULL, _CONFIGURATION, _FOOTER = 0x01, 0x02, 0x03, 0x04, 0x07, 0x7E
_ZERO, _SIZES, _PAGE, _END_OF_RECORDS, _SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
_FLAGS = 0xFFF


@dataclass(frozen=True)
class Content:
    """What was counted.

    ``constant_pages`` repeat one byte that is not zero, as Linux leaves the archive that it booted from; QEMU sends
    them whole, but here they count for nothing. ``pages`` are all others that are not zero, ``duplicates`` those of
    them whose bytes an earlier page of the same count has.
    """

    memory_bytes: int
    zero_pages: int
    constant_pages: int
    pages: int
    duplicates: int

    @property
    def nonzero_bytes(self) -> int:
        """The bytes of the pages that are not constant."""
        return self.pages * PAGE_BYTES

    @property
    def duplicate_share(self) -> float:
        """Duplicates among the pages that are not constant."""
        return self.duplicates / self.pages if self.pages else 0.0


class _Reader:
    """Numbers and names, one after the other."""

    def __init__(self, stream: memoryview) -> None:
        self.stream, self.at = stream, 0

    def number(self, size: int) -> int:
        self.at += size
        return int.from_bytes(self.stream[self.at - size : self.at], "big")

    def skip_name(self) -> None:
        self.at += 1 + self.stream[self.at]


def pages_of(stream: memoryview) -> Iterator[tuple[bool, memoryview]]:
    """Every record of the memory, in order: whether it is a zero page, and the page's bytes (none if it is).

    :raise ValueError: this is not such a stream.
    """
    reader = _Reader(stream)
    if bytes(stream[: len(_MAGIC)]) != _MAGIC:
        raise ValueError("this is no migration stream of version 3")
    reader.at = len(_MAGIC)
    kind = reader.number(1)
    if kind == _CONFIGURATION:
        reader.at += 4 + int.from_bytes(stream[reader.at : reader.at + 4], "big")
        kind = reader.number(1)
    while kind in (_START, _PART, _END):
        section = reader.number(4)
        if kind == _START:
            reader.skip_name()
            reader.at += 8
        yield from _records(reader)
        if (reader.number(1), reader.number(4)) != (_FOOTER, section):
            raise ValueError(f"no footer of section {section} before byte {reader.at}")
        kind = reader.number(1)
    if kind != _FULL:
        raise ValueError(f"unknown section {kind:#x} before byte {reader.at}")


def _records(reader: _Reader) -> Iterator[tuple[bool, memoryview]]:
    stream, unpack = reader.stream, struct.Struct(">Q").unpack_from
    while True:
        (word,) = unpack(stream, reader.at)
        reader.at += 8
        flags = word & _FLAGS
        if flags & _END_OF_RECORDS:
            return
        if flags & _SIZES:
            _skip_blocks(reader, word & ~_FLAGS)
            continue
        if not flags & _SAME_BLOCK:
            reader.skip_name()
        if flags & _ZERO:
            reader.at += 1
            yield True, stream[:0]
        elif flags & _PAGE:
            reader.at += PAGE_BYTES
            yield False, stream[reader.at - PAGE_BYTES : reader.at]
        else:
            raise ValueError(f"unknown record {flags:#x} before byte {reader.at}")


def _skip_blocks(reader: _Reader, total: int) -> None:
    while total > 0:
        reader.skip_name()
        total -= reader.number(8)


def count(*streams: memoryview) -> Content:
    """Count the pages of these streams together; a page that comes again in another is a duplicate too.

    :raise ValueError: one is not such a stream.
    """
    seen: set[bytes] = set()
    zeros = constant = pages = 0
    for stream in streams:
        for is_zero, page in pages_of(stream):
            if is_zero:
                zeros += 1
            elif page == bytes(page[:1]) * PAGE_BYTES:
                constant += 1
            else:
                pages += 1
                seen.add(hashlib.blake2b(page, digest_size=16).digest())
    return Content((zeros + constant + pages) * PAGE_BYTES, zeros, constant, pages, pages - len(seen))
