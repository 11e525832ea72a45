"""A pack in the making, in memory."""

import mmap
import secrets

import numpy as np
from numpy.typing import NDArray

from geni_violin.snapshot_server.pages.digests import DIGEST_BYTES, as_array
from geni_violin.snapshot_server.pages.pack_format import (
    FRAME,
    MAGIC,
    MAX_ITEMS,
    MAX_RAW_BYTES,
    TRAILER_BYTES,
    PackTable,
    encode_tables,
)

PACK_BYTES = 24 << 20
"""A pack is put before its frames are longer. Two of these are in memory, which is why it is not more."""
_MAX_TABLES_BYTES = MAX_ITEMS * (FRAME.itemsize + DIGEST_BYTES) + TRAILER_BYTES
_BUFFER_BYTES = PACK_BYTES + MAX_RAW_BYTES + _MAX_TABLES_BYTES

PREFIX = "packs/"


def new_buffer() -> NDArray[np.uint8]:
    """Room for a pack, which begins at a page, so that it can be written past the page cache.

    The kernel gives memory for it only as it is filled.
    """
    return np.frombuffer(mmap.mmap(-1, _BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


class PackBuilder:
    """Takes frames until it is full.

    :param buffer: from :func:`new_buffer`; in use until what :meth:`finish` gave is no longer needed.
    """

    def __init__(self, buffer: NDArray[np.uint8]) -> None:
        self.id = secrets.token_hex(16)
        self.key = PREFIX + self.id
        self._view = buffer.data
        self._view[: len(MAGIC)] = MAGIC
        self._end = len(MAGIC)
        self._frames: list[tuple[int, int, int, int, NDArray[np.uint8]]] = []
        self._digests: list[bytes] = []

    def fits(self, frame: bytes, items: int) -> bool:
        """Whether it has room for another frame of so many items."""
        return self._end + len(frame) <= PACK_BYTES + MAX_RAW_BYTES and (
            not self._frames or (self._end + len(frame) <= PACK_BYTES and len(self._digests) + items <= MAX_ITEMS)
        )

    def append(self, frame: bytes, checksum: bytes, item_bytes: int, digests: list[bytes]) -> None:
        """Take a frame that fits; ``checksum`` is its BLAKE3."""
        self._view[self._end : self._end + len(frame)] = frame
        self._frames.append((self._end, len(frame), item_bytes, len(digests), np.frombuffer(checksum, np.uint8)))
        self._digests += digests
        self._end += len(frame)

    def keep(self, chosen: list[bool]) -> None:
        """Give up the frames that are not chosen."""
        frames, digests, item = self._frames, self._digests, 0
        self._frames, self._digests, self._end = [], [], len(MAGIC)
        for (offset, length, item_bytes, items, checksum), wanted in zip(frames, chosen, strict=True):
            if wanted:
                self._view[self._end : self._end + length] = self._view[offset : offset + length]
                self._frames.append((self._end, length, item_bytes, items, checksum))
                self._digests += digests[item : item + items]
                self._end += length
            item += items

    def finish(self) -> tuple[memoryview, PackTable]:
        """The pack's bytes, and what is in it."""
        frames = np.array(self._frames, FRAME)
        tables = encode_tables(frames, b"".join(self._digests), self._end)
        end = self._end + len(tables)
        self._view[self._end : end] = tables
        return self._view[:end], PackTable(frames, as_array(self._digests))
