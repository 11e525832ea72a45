"""Packs, byte for byte (``docs/formats.md``). Pure.

::

    MAGIC | frame ... | frame table | digest table | trailer

Both tables are written when all frames are, so a pack is made in one go from its beginning; a reader begins at the
trailer, which has a fixed size. Each byte is under a checksum: a frame under the one in the frame table, the tables and
the trailer's numbers under the one in the trailer; the last magic is compared when a pack is opened, the first by
``verify``.
"""

import struct
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from geni_violin.core.errors import MachineFault
from geni_violin.snapshot_server.pages.digests import DIGEST_BYTES, Digests, array_from

MAGIC = b"GVPACK\0\1"
"""The first 8 bytes: name and version."""
END_MAGIC = b"GVPKEND\1"
TRAILER_BYTES = 56

FRAME = np.dtype([("offset", "<u8"), ("length", "<u4"), ("item_bytes", "<u4"), ("items", "<u4"), ("blake3", "u1", 32)])
"""Of each frame: where it begins, how many bytes it has, how many of how many bytes each are in it, and its BLAKE3."""

MAX_ITEMS = 1 << 15
"""The most items of a pack: 128 MiB of pages. It bounds the tables, however well the frames compress."""
MAX_ITEM_BYTES = 1 << 20
MAX_FRAME_ITEMS = 1 << 8
MAX_RAW_BYTES = 1 << 20
"""The most that a frame is decompressed to."""
MAX_FRAME_BYTES = MAX_RAW_BYTES + (64 << 10)
"""The most that a frame has: zstd makes what does not compress a little longer."""

_TRAILER = struct.Struct("<QII32s8s")


@dataclass(frozen=True, eq=False)
class PackTable:
    """What is in a pack.

    :ivar frames: of type :data:`FRAME`, in the pack's order.
    :ivar digests: of all items, frame by frame.
    """

    frames: NDArray[np.void]
    digests: Digests

    def first_items(self) -> NDArray[np.int64]:
        """For each frame, the number of its first item."""
        items: NDArray[np.int64] = self.frames["items"].astype(np.int64)
        return np.cumsum(items) - items


def encode_tables(frames: NDArray[np.void], digests: bytes, offset: int) -> bytes:
    """Everything of a pack behind its frames.

    :param offset: where the frames end.
    """
    tables = frames.tobytes() + digests
    items = len(digests) // DIGEST_BYTES
    numbers = struct.pack("<QII", offset, len(frames), items)
    return tables + _TRAILER.pack(offset, len(frames), items, blake3(tables + numbers).digest(), END_MAGIC)


def tables_place(trailer: bytes, pack_bytes: int, what: str) -> tuple[int, int]:
    """Offset and length of the tables with the trailer.

    :param trailer: the last :data:`TRAILER_BYTES` of the pack.
    :param pack_bytes: the pack's size.
    :param what: what people call the pack.
    :raise MachineFault: it is damaged.
    """
    offset, frames, items, _checksum, magic = _TRAILER.unpack(trailer)
    length = frames * FRAME.itemsize + items * DIGEST_BYTES + TRAILER_BYTES
    if magic != END_MAGIC or offset + length != pack_bytes:
        raise MachineFault(f"{what} is damaged: its last {TRAILER_BYTES} bytes are not those of a pack")
    return offset, length


def decode_tables(data: bytes, offset: int, what: str) -> PackTable:
    """What is in a pack.

    :param data: from ``offset`` to the end, as :func:`tables_place` tells.
    :raise MachineFault: it is damaged.
    """
    end = len(data) - TRAILER_BYTES
    claimed, frame_count, items, checksum, magic = _TRAILER.unpack(data[end:])
    numbers = struct.pack("<QII", offset, frame_count, items)
    if claimed != offset or magic != END_MAGIC or blake3(data[:end] + numbers).digest() != checksum:
        raise MachineFault(f"{what} is damaged: its tables do not have the BLAKE3 that it says")
    middle = frame_count * FRAME.itemsize
    table = PackTable(np.frombuffer(data[:middle], FRAME), array_from(data[middle:end]))
    _check(table, offset, what)
    return table


def _check(table: PackTable, offset: int, what: str) -> None:
    """Whoever made the checksum may have made anything; nothing may be read outside the frames."""
    frames = table.frames
    ends = frames["offset"].astype(np.int64) + frames["length"]
    starts = np.concatenate(([len(MAGIC)], ends[:-1])) if len(frames) else ends
    raw = frames["items"].astype(np.int64) * frames["item_bytes"]
    sane = (
        bool((frames["offset"] == starts).all())
        and (int(ends[-1]) if len(frames) else len(MAGIC)) == offset
        and bool((frames["items"] >= 1).all() and (frames["items"] <= MAX_FRAME_ITEMS).all())
        and bool((frames["item_bytes"] >= 1).all() and (raw <= MAX_RAW_BYTES).all())
        and bool((frames["length"] <= MAX_FRAME_BYTES).all())
        and int(frames["items"].sum()) == len(table.digests)
    )
    if not sane:
        raise MachineFault(f"{what} is damaged: its tables contradict each other")
