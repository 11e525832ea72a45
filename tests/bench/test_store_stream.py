"""What bench/store.py counts in a migration stream."""

import struct

import pytest

from bench.store_stream import PAGE_BYTES, Content, count

BEGINNING = b"QEVM\0\0\0\3" + b"\7" + struct.pack(">I", 3) + b"pc1"
BLOCK = b"\6pc.ram"
A, B = b"a1" * (PAGE_BYTES // 2), b"b1" * (PAGE_BYTES // 2)


def section(kind: int, records: bytes) -> bytes:
    """A section of the memory, whose id is 2, with its footer."""
    name = b"\3ram" + struct.pack(">II", 0, 4) if kind == 1 else b""
    return bytes([kind]) + struct.pack(">I", 2) + name + records + word(0, 0x10) + b"\x7e" + struct.pack(">I", 2)


def word(offset: int, flags: int) -> bytes:
    return struct.pack(">Q", offset | flags)


def stream(*records: bytes) -> bytes:
    """A stream with one block of memory, its records in two sections, and the state of some device."""
    sizes = word(4 * PAGE_BYTES, 4) + BLOCK + struct.pack(">Q", 4 * PAGE_BYTES)
    half = len(records) // 2
    parts = section(2, b"".join(records[:half])) + section(3, b"".join(records[half:]))
    return BEGINNING + section(1, sizes) + parts + b"\4" + bytes(50)


PAGES = (
    word(0, 0x08) + BLOCK + A,
    word(PAGE_BYTES, 0x28) + A,
    word(2 * PAGE_BYTES, 0x02) + BLOCK + b"\0",
    word(3 * PAGE_BYTES, 0x28) + B,
)


def test_pages_zeros_and_duplicates_are_counted() -> None:
    content = count(memoryview(stream(*PAGES)))
    assert content == Content(memory_bytes=4 * PAGE_BYTES, zero_pages=1, constant_pages=0, pages=3, duplicates=1)
    assert content.nonzero_bytes == 3 * PAGE_BYTES
    assert content.duplicate_share == pytest.approx(1 / 3)


def test_what_another_stream_has_is_a_duplicate() -> None:
    content = count(memoryview(stream(*PAGES)), memoryview(stream(*PAGES)))
    assert (content.pages, content.duplicates) == (6, 4)


def test_a_page_of_one_byte_counts_for_nothing() -> None:
    content = count(memoryview(stream(word(0, 0x08) + BLOCK + b"\xcc" * PAGE_BYTES, *PAGES[1:])))
    assert (content.constant_pages, content.pages, content.duplicates) == (1, 2, 0)


def test_an_image_without_pages_has_no_duplicates() -> None:
    assert count(memoryview(stream())).duplicate_share == 0.0


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b"QEVM\0\0\0\4", "no migration stream"),
        (BEGINNING + b"\x09", "unknown section 0x9"),
        (BEGINNING + section(1, word(0, 0x100)), "unknown record"),
        (BEGINNING + section(1, b"")[:-1] + b"\7", "no footer"),
    ],
)
def test_what_it_does_not_know_is_refused(broken: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        count(memoryview(broken))
