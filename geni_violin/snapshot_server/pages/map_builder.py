"""An image map in the making: what each page is, by the last that came of it.

Arrays have a place for each page of the guest's memory, zeroed by the kernel when they are first touched, so that
memory that never comes costs nothing. A page that comes again overwrites what came before; the item of the earlier
version stays in its pack as rubbish, which a collection takes.
"""

import numpy as np
from numpy.typing import NDArray

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.pages.digests import DIGEST_WORDS, Digests
from geni_violin.snapshot_server.pages.image_map import (
    FILL,
    MAX_PAGES,
    MAX_PREAMBLE_BYTES,
    PAGE,
    ImageMap,
    Pieces,
)
from geni_violin.snapshot_server.stream.events import PAGE_BYTES, Preamble, RamBlock


class MapBuilder:
    """See the module's theory of operation."""

    def __init__(self) -> None:
        self._preamble = b""
        self._blocks: tuple[RamBlock, ...] = ()
        self._first_pages: list[int] = []
        self._kinds = np.zeros(0, np.uint8)
        self._fills = np.zeros(0, np.uint8)
        self._digests: NDArray[np.uint64] = np.zeros((0, DIGEST_WORDS), "<u8")

    def begin(self, preamble: Preamble) -> None:
        """There is memory of these blocks.

        :raise InvalidInput: it is more than any image may have.
        """
        pages = [block.pages for block in preamble.blocks]
        if sum(pages) > MAX_PAGES or len(preamble.data) > MAX_PREAMBLE_BYTES:
            size = sum(pages) * PAGE_BYTES
            raise InvalidInput(f"the stream is of {size} bytes of memory", f"expected {MAX_PAGES * PAGE_BYTES} at most")
        self._preamble, self._blocks = preamble.data, preamble.blocks
        self._first_pages = [sum(pages[:number]) for number in range(len(pages))]
        self._kinds, self._fills = np.zeros(sum(pages), np.uint8), np.zeros(sum(pages), np.uint8)
        self._digests = np.zeros((sum(pages), DIGEST_WORDS), "<u8")

    def set_pages(self, block: int, pages: NDArray[np.int64], digests: Digests) -> None:
        """These pages have these digests."""
        at = pages + self._first_pages[block]
        self._kinds[at] = PAGE
        self._digests[at] = digests

    def set_fills(self, block: int, pages: NDArray[np.int64], fill: int) -> None:
        """These pages are full of this byte."""
        at = pages + self._first_pages[block]
        self._kinds[at] = FILL
        self._fills[at] = fill

    def finish(self, received_bytes: int, pack_bytes: int, tail: Pieces, opaque: Pieces, reason: str) -> ImageMap:
        """The map of the whole image."""
        fills, digests = self._fills[self._kinds == FILL], self._digests[self._kinds == PAGE]
        counts = (received_bytes, pack_bytes)
        return ImageMap(*counts, self._preamble, self._blocks, self._kinds, fills, digests, tail, opaque, reason)
