"""Frames out of packs, ahead of their use.

Theory of operation. Frames that are wanted and stand close together in a pack are read at once, checked and
decompressed by a worker, while what was read before is being used. So there are always a few such *extents* in memory,
each of at most :data:`EXTENT_RAW_BYTES` when decompressed, and the backend, the workers and who uses the frames are all
busy at a time.

A frame that cannot be read is given out too, as words. Who restores stops there; who verifies goes on.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from geni_violin.core.errors import GeniViolinError
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.catalog import Pack

EXTENT_RAW_BYTES = 2 << 20
EXTENT_BYTES = 1 << 20
MAX_GAP_BYTES = 128 << 10
"""Reading so many bytes in vain is quicker than asking once more."""
WORKERS = 2
AHEAD = 4
"""How many extents are read ahead."""

Items: TypeAlias = NDArray[np.uint8]
"""The items of a frame, shape (n, bytes of each)."""


@dataclass(frozen=True)
class FrameRef:
    """A frame of a pack."""

    pack: Pack
    number: int

    @property
    def offset(self) -> int:
        return int(self.pack.frames["offset"][self.number])

    @property
    def end(self) -> int:
        return self.offset + int(self.pack.frames["length"][self.number])

    @property
    def raw_bytes(self) -> int:
        frame = self.pack.frames[self.number]
        return int(frame["items"]) * int(frame["item_bytes"])


Read: TypeAlias = tuple[FrameRef, Items | str]
"""A frame, and its items or what is wrong with it."""


def extents(refs: Sequence[FrameRef]) -> Iterator[list[FrameRef]]:
    """Parts of the list that are read at once."""
    extent: list[FrameRef] = []
    raw_bytes = 0
    for ref in refs:
        if extent and (
            ref.pack is not extent[0].pack
            or not 0 <= ref.offset - extent[-1].end <= MAX_GAP_BYTES
            or ref.end - extent[0].offset > EXTENT_BYTES
            or raw_bytes + ref.raw_bytes > EXTENT_RAW_BYTES
        ):
            yield extent
            extent, raw_bytes = [], 0
        extent.append(ref)
        raw_bytes += ref.raw_bytes
    if extent:
        yield extent


class FrameReader:
    """See the module's theory of operation. Used by one thread at a time."""

    def __init__(self, backend: ObjectBackend) -> None:
        self._backend = backend
        self._workers = ThreadPoolExecutor(WORKERS, "frames")

    def read(self, refs: Sequence[FrameRef]) -> Iterator[Read]:
        """These frames, in this order."""
        waiting = extents(refs)
        ahead: deque[Future[list[Read]]] = deque()
        for extent in itertools.islice(waiting, AHEAD):
            ahead.append(self._workers.submit(self._read_extent, extent))
        while ahead:
            reads = ahead.popleft().result()
            for extent in itertools.islice(waiting, 1):
                ahead.append(self._workers.submit(self._read_extent, extent))
            yield from reads

    def close(self) -> None:
        """Let the workers end."""
        self._workers.shutdown(cancel_futures=True)

    def _read_extent(self, extent: list[FrameRef]) -> list[Read]:
        start = extent[0].offset
        try:
            data = memoryview(self._backend.get_range(extent[0].pack.key, start, extent[-1].end - start))
        except GeniViolinError as error:
            return [(ref, error.message) for ref in extent]
        return [(ref, _items(ref, data[ref.offset - start : ref.end - start])) for ref in extent]


_local = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's; making one costs as much as some frames do."""
    made: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if made is None:
        made = _local.decompressor = zstandard.ZstdDecompressor()
    return made


def _items(ref: FrameRef, frame: memoryview) -> Items | str:
    entry = ref.pack.frames[ref.number]
    if blake3(frame).digest() != entry["blake3"].tobytes():
        return "it does not have the BLAKE3 that the pack says"
    try:
        if zstandard.frame_content_size(frame) != ref.raw_bytes:
            return "it does not have the size that the pack says"
        raw = _decompressor().decompress(frame)
    except zstandard.ZstdError as error:
        return str(error)
    return np.frombuffer(raw, np.uint8).reshape(int(entry["items"]), int(entry["item_bytes"]))
