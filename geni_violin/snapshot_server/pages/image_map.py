"""Image maps, byte for byte (``docs/formats.md``). Pure.

::

    MAGIC | header's length | header (JSON) | preamble | kinds (zstd) | fills (zstd) | digests | BLAKE3 of all before

``kinds`` has a byte for each page of all blocks in their order: 0 for a page that never came, 1 for one full of one
byte, 2 for one with a digest. ``fills`` has that one byte for each page of kind 1, ``digests`` that digest for each
page of kind 2, in the pages' order, and after those the digests of the pieces: first of the tail, then of what was not
understood. Together with the items' digests the last 32 bytes are a Merkle root of the whole image.
"""

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from geni_violin.core.errors import MachineFault
from geni_violin.snapshot_server.pages.digests import DIGEST_BYTES, Digests, array_from
from geni_violin.snapshot_server.stream.events import PAGE_BYTES, RamBlock

MAGIC = b"GVIMAP\0\1"
"""The first 8 bytes: name and version."""
ABSENT, FILL, PAGE = 0, 1, 2
PIECE_BYTES = 1 << 20
"""Tail and opaque bytes are kept in pieces of this size, the last one shorter."""
MAX_PAGES = 1 << 28
"""The most memory that an image has: 1 TiB."""
MAX_PREAMBLE_BYTES = 1 << 20

_LENGTH = struct.Struct("<I")
_MAX_HEADER_BYTES = 4 << 20
_LEVEL = 3


@dataclass(frozen=True)
class Pieces:
    """Bytes that are kept in pieces: how many there are in all, and the digest of each piece."""

    total_bytes: int
    digests: tuple[bytes, ...]

    def lengths(self) -> list[int]:
        """How many bytes each piece has."""
        return piece_lengths(self.total_bytes)


def piece_lengths(total_bytes: int) -> list[int]:
    """How many bytes each piece of so many has."""
    whole, rest = divmod(total_bytes, PIECE_BYTES)
    return [PIECE_BYTES] * whole + [rest] * bool(rest)


NOTHING = Pieces(0, ())


@dataclass(frozen=True, eq=False)
class ImageMap:
    """Everything of an image but its items.

    :ivar received_bytes: how long the stream was.
    :ivar pack_bytes: what its items added to packs.
    :ivar preamble: the stream's bytes before the first page; empty if it was not understood.
    :ivar blocks: the RAM blocks, as in the preamble.
    :ivar kinds: uint8, one for each page of all blocks.
    :ivar fills: uint8, one for each page of kind :data:`FILL`.
    :ivar digests: one for each page of kind :data:`PAGE`.
    :ivar tail: the state of devices.
    :ivar opaque: what was not understood, from where it begins to the stream's end.
    :ivar reason: why it was not understood, in words for people; empty if all was.
    """

    received_bytes: int
    pack_bytes: int
    preamble: bytes
    blocks: tuple[RamBlock, ...]
    kinds: NDArray[np.uint8]
    fills: NDArray[np.uint8]
    digests: Digests
    tail: Pieces = NOTHING
    opaque: Pieces = NOTHING
    reason: str = ""

    def first_pages(self) -> NDArray[np.int64]:
        """For each block the number of its first page among all pages; at the end how many there are."""
        return np.concatenate(([0], np.cumsum([block.pages for block in self.blocks], dtype=np.int64)))

    def all_digests(self) -> Digests:
        """Of all pages and pieces."""
        return np.concatenate((self.digests, self.piece_digests()))

    def piece_digests(self) -> Digests:
        """Of all pieces, the tail's first."""
        return array_from(b"".join(self.tail.digests + self.opaque.digests))

    def logical_bytes(self) -> int:
        """How many bytes a reader gets, fills and absent pages left out."""
        return len(self.digests) * PAGE_BYTES + self.tail.total_bytes + self.opaque.total_bytes


def encode_map(image: ImageMap) -> bytearray:
    """An image map's object, made without a second copy of its digests. The same image gives the same bytes."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    kinds, fills = compressor.compress(image.kinds.tobytes()), compressor.compress(image.fills.tobytes())
    header = {
        "received_bytes": image.received_bytes,
        "pack_bytes": image.pack_bytes,
        "preamble_bytes": len(image.preamble),
        "blocks": [[block.name, block.length_bytes] for block in image.blocks],
        "kinds_bytes": len(kinds),
        "fills_bytes": len(fills),
        "fills": len(image.fills),
        "pages": len(image.digests),
        "tail_bytes": image.tail.total_bytes,
        "opaque_bytes": image.opaque.total_bytes,
        "reason": image.reason,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    digests = (image.digests.reshape(-1).view(np.uint8).data, image.piece_digests().tobytes())
    parts = (MAGIC, _LENGTH.pack(len(text)), text, image.preamble, kinds, fills, *digests)
    body = bytearray(sum(map(len, parts)) + DIGEST_BYTES)
    end = 0
    for part in parts:
        body[end : end + len(part)] = part
        end += len(part)
    body[end:] = blake3(memoryview(body)[:end]).digest()
    return body


def root_of(data: bytes | bytearray) -> str:
    """The Merkle root that an image map's object says that it has, as a hexadecimal number."""
    return data[-DIGEST_BYTES:].hex()


def decode_map(data: bytes | bytearray, what: str) -> ImageMap:
    """An image map.

    :param what: what people call it.
    :raise MachineFault: it is damaged, or of another version.
    """
    if data[: len(MAGIC)] != MAGIC:
        if data[: len(MAGIC) - 1] == MAGIC[:-1]:
            raise MachineFault(f"{what} is of version {data[len(MAGIC) - 1]}", f"this release knows {MAGIC[-1]}")
        raise MachineFault(f"{what} is damaged: it does not begin as an image map")
    if blake3(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise MachineFault(f"{what} is damaged: it does not have the BLAKE3 that it says")
    try:
        return _decoded(memoryview(data)[len(MAGIC) : -DIGEST_BYTES])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error, zstandard.ZstdError) as error:
        raise MachineFault(f"{what} cannot be understood: {error}") from error


def _decoded(body: memoryview) -> ImageMap:
    (length,) = _LENGTH.unpack_from(body)
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes")
    rest = _Cursor(body[_LENGTH.size :])
    header: dict[str, Any] = json.loads(bytes(rest.take(length)))
    preamble = bytes(rest.take(_count(header, "preamble_bytes", MAX_PREAMBLE_BYTES)))
    blocks = tuple(RamBlock(str(name), int(size)) for name, size in header["blocks"])
    pages = sum(block.pages for block in blocks)
    if not 0 <= pages <= MAX_PAGES or any(block.length_bytes <= 0 for block in blocks):
        raise ValueError(f"its blocks have {pages} pages")
    kinds = _bytes_of(rest.take(_count(header, "kinds_bytes")), pages)
    fills = _bytes_of(rest.take(_count(header, "fills_bytes")), _count(header, "fills", pages))
    digests = array_from(rest.take(DIGEST_BYTES * _count(header, "pages", pages)))
    tail, opaque = (_pieces(rest, _count(header, name)) for name in ("tail_bytes", "opaque_bytes"))
    counts = [int(np.count_nonzero(kinds == kind)) for kind in (ABSENT, FILL, PAGE)]  # less memory than bincount takes
    if rest.left or counts != [pages - len(fills) - len(digests), len(fills), len(digests)]:
        raise ValueError("its parts contradict each other")
    sizes = _count(header, "received_bytes"), _count(header, "pack_bytes")
    return ImageMap(*sizes, preamble, blocks, kinds, fills, digests, tail, opaque, str(header["reason"]))


class _Cursor:
    """Takes bytes from the front."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def left(self) -> int:
        return len(self._data)

    def take(self, count: int) -> memoryview:
        if count > len(self._data):
            raise ValueError("it ends early")
        taken, self._data = self._data[:count], self._data[count:]
        return taken


def _count(header: dict[str, Any], name: str, most: int = 1 << 48) -> int:
    value = header[name]
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"its {name} is {value!r}")
    return value


def _bytes_of(compressed: memoryview, expected: int) -> NDArray[np.uint8]:
    if zstandard.frame_content_size(compressed) != expected:  # asked first, because so much memory would be taken
        raise ValueError(f"a part of it does not have the {expected} bytes that it should")
    raw = zstandard.ZstdDecompressor().decompress(compressed)
    return np.frombuffer(raw, np.uint8)


def _pieces(rest: _Cursor, total_bytes: int) -> Pieces:
    count = len(piece_lengths(total_bytes)) if total_bytes <= rest.left * PIECE_BYTES else -1
    if count < 0:
        raise ValueError("it ends early")
    data = bytes(rest.take(DIGEST_BYTES * count))
    return Pieces(total_bytes, tuple(data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)))
