"""What a migration stream consists of, for those who keep it.

A reader gives these out in the stream's order::

    Preamble  (PageRun | FillRun)*  Tail                   a stream that is understood to its end
    Preamble  (PageRun | FillRun)*  Opaque Opaque*         one that is not, from some place on
                                    Opaque Opaque*         one that is not understood from its first byte

To make a stream again: ``Preamble.data``; each page once, in its last version; then ``Tail.data`` or the opaque pieces,
byte for byte. See ``writer``.

What holds of pages:

* in precopy a page may come again, as bytes or as a fill; then the last one counts. Runs are given out in an order in
  which it wins, though a run of pages and a run of fills may be swapped where they have no page in common;
* within a run the page numbers ascend, so each is there once;
* a page that never comes is one that the guest said it does not use (free page hints); the receiving QEMU leaves it as
  it was at its start. That is no error, and not the same as a fill of zeros: ROMs are not zero at the start;
* every page number is within its block.

All arrays are read-only copies that belong to the event: they stay as they are, whatever becomes of the buffer that the
stream was fed from, and may be handed to other threads.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
"""The one page size that is understood; streams with another are opaque."""


@dataclass(frozen=True)
class RamBlock:
    """A piece of guest memory. ``length_bytes`` is a multiple of the page size."""

    name: str
    length_bytes: int

    @property
    def pages(self) -> int:
        """How many pages it has; their numbers are from 0 up to this, exclusive."""
        return self.length_bytes // PAGE_BYTES


@dataclass(frozen=True)
class Preamble:
    """Everything before the first page. All else follows from ``data``: see ``preamble.parse_preamble``.

    :ivar data: the bytes themselves: header, configuration, and the setup section of RAM.
    :ivar blocks: RAM blocks in the stream's order; runs name them by their index here.
    :ivar section_id: the number of the RAM section.
    """

    data: bytes
    blocks: tuple[RamBlock, ...]
    section_id: int


@dataclass(frozen=True, eq=False)
class PageRun:
    """Pages with their bytes: at least one, at most ``layout.RUN_PAGES``.

    :ivar block: index of the RAM block.
    :ivar pages: page numbers, int64, shape (n,), ascending, not necessarily without gaps.
    :ivar data: their contents, uint8, shape (n, 4096), C-contiguous.
    """

    block: int
    pages: NDArray[np.int64]
    data: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class FillRun:
    """Pages that have one byte all over: at least one, at most ``layout.RUN_FILLS``.

    :ivar block: index of the RAM block.
    :ivar pages: page numbers, int64, shape (n,), ascending, not necessarily without gaps.
    :ivar fill: the byte, 0 to 255; from any QEMU since 2.0 it is 0.
    """

    block: int
    pages: NDArray[np.int64]
    fill: int


@dataclass(frozen=True)
class Tail:
    """The state of all devices, and QEMU's description of it: all that follows the pages, byte for byte.

    At most ``layout.TAIL_BYTES``; a stream with more is opaque from here on.
    """

    data: bytes


@dataclass(frozen=True)
class Opaque:
    """A piece of what is not understood; the pieces in order are the rest of the stream.

    After a preamble they begin at the start of a section. Where the stream left what is understood in the middle of
    one, the reader puts in front what re-opens it: a section header, and the last page once more, with the name of its
    block, on which the next records may build.

    :ivar data: never empty.
    :ivar reason: what was not understood, in words for people; the same in each piece of a stream.
    """

    data: bytes
    reason: str


Event: TypeAlias = Preamble | PageRun | FillRun | Tail | Opaque
