"""The records of pages, many at a time.

Theory of operation. Records of pages that follow one another in a block have one length, and so have fills. Where eight
such records seem to follow, the headers are looked at as an array with that stride, and as many as are regular are
taken at once. What seems to be the eighth header may be the middle of a page: it only decides which way is tried. All
other records are taken one by one.
"""

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.stream.batch import Batch, Pages
from geni_violin.snapshot_server.stream.events import PAGE_BYTES, RamBlock
from geni_violin.snapshot_server.stream.layout import (
    CONTINUE,
    EOS,
    FLAGS,
    HEADER_BYTES,
    PAGE,
    PAGE_RECORD_BYTES,
    PAGE_SHIFT,
    ZERO,
    ZERO_RECORD_BYTES,
)
from geni_violin.snapshot_server.stream.preamble import NotUnderstood

_NEXT_PAGE, _NEXT_ZERO = PAGE | CONTINUE, ZERO | CONTINUE
_FEW = 8
_PROBED_ZEROS = 64
_header_at = struct.Struct(">Q").unpack_from


class Records:
    """Takes records out of buffers.

    :ivar batch: where the pages go.
    :ivar block: index of the block of the record before, None at first.
    :ivar ended: whether the record that ends the section was taken.
    """

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self.batch = Batch()
        self.block: int | None = None
        self.ended = False
        self._blocks = blocks
        self._indices = {block.name.encode(): index for index, block in enumerate(blocks)}
        self._limit = 0  # how many pages the block has; none before there is a block

    def take(self, view: memoryview, position: int) -> int:
        """Take what is there from a position on, up to the end of the section; the position behind it.

        :raise NotUnderstood: there is a record of an unknown form, at its position.
        :raise InvalidInput: a record contradicts the list of blocks.
        """
        self.ended = False
        end = len(view)
        while position + HEADER_BYTES <= end:
            (header,) = _header_at(view, position)
            flags = header & FLAGS
            if flags == _NEXT_PAGE:
                taken = self._next_pages(view, position, header >> PAGE_SHIFT)
            elif flags == _NEXT_ZERO:
                taken = self._next_zeros(view, position, header >> PAGE_SHIFT)
            elif flags in (PAGE, ZERO):
                taken = self._named(view, position, header >> PAGE_SHIFT, flags)
            elif header == EOS:
                self.ended = True
                return position + HEADER_BYTES
            else:
                raise NotUnderstood(f"a record of pages has the flags {flags:#x}", position)
            if taken == position:
                break
            position = taken
        return position

    def reopening(self) -> bytes:
        """A record that changes no page, and after which the next may be of the same block without saying so."""
        example = self.batch.example()
        if self.block is None or example is None:
            return b""
        page, content = example
        flags, data = (ZERO, bytes((content,))) if isinstance(content, int) else (PAGE, content)
        return struct.pack(">Q", page << PAGE_SHIFT | flags) + named(self._blocks[self.block].name) + data

    # --- one record at a time -----------------------------------------------------------------------------------------

    def _named(self, view: memoryview, position: int, page: int, flags: int) -> int:
        """A record with the name of its block; its own position if it is not all there."""
        name_start = position + HEADER_BYTES + 1
        if name_start > len(view):
            return position
        data_start = name_start + view[name_start - 1]
        data_end = data_start + (PAGE_BYTES if flags == PAGE else 1)
        if data_end > len(view):
            return position
        name = bytes(view[name_start:data_start])
        if name not in self._indices:
            raise InvalidInput(f"the stream has a page of RAM block {name!r}", "expected one of its list of blocks")
        self.block = self._indices[name]
        self._limit = self._blocks[self.block].pages
        self._check(page)
        self.batch.begin_block(self.block)
        self._add(view[data_start:data_end], page, flags)
        return data_end

    def _add(self, data: memoryview, page: int, flags: int) -> None:
        if flags == PAGE:
            self.batch.add_page(page, data)
        else:
            self.batch.add_fill(page, data[0])

    def _check(self, page: int) -> None:
        if page >= self._limit:
            if self.block is None:
                raise InvalidInput("the stream's first page is of the same block as the one before it")
            block = self._blocks[self.block]
            raise InvalidInput(f"the stream has page {page} of RAM block {block.name}", f"it has {block.pages} pages")

    # --- many records -------------------------------------------------------------------------------------------------

    def _next_pages(self, view: memoryview, position: int, page: int) -> int:
        self._check(page)
        rest = len(view) - position
        if rest > _FEW * PAGE_RECORD_BYTES:
            (ahead,) = _header_at(view, position + (_FEW - 1) * PAGE_RECORD_BYTES)
            if ahead & FLAGS == _NEXT_PAGE:
                return self._page_run(view, position, min(rest // PAGE_RECORD_BYTES, self.batch.page_room))
        if rest < PAGE_RECORD_BYTES:
            return position
        end = position + PAGE_RECORD_BYTES
        self.batch.add_page(page, view[position + HEADER_BYTES : end])
        return end

    def _page_run(self, view: memoryview, position: int, most: int) -> int:
        pages = self._numbers(view, position, most, PAGE_RECORD_BYTES, _NEXT_PAGE)
        rows = np.ndarray((len(pages), PAGE_BYTES), np.uint8, view, position + HEADER_BYTES, (PAGE_RECORD_BYTES, 1))
        self.batch.add_pages(pages, rows)
        return position + len(pages) * PAGE_RECORD_BYTES

    def _next_zeros(self, view: memoryview, position: int, page: int) -> int:
        self._check(page)
        rest = len(view) - position
        if rest > _FEW * ZERO_RECORD_BYTES:
            ahead = position + (_FEW - 1) * ZERO_RECORD_BYTES
            like_this = view[ahead + HEADER_BYTES] == view[position + HEADER_BYTES]
            if like_this and _header_at(view, ahead)[0] & FLAGS == _NEXT_ZERO:
                return self._zero_run(view, position, min(rest // ZERO_RECORD_BYTES, self.batch.fill_room))
        if rest < ZERO_RECORD_BYTES:
            return position
        self.batch.add_fill(page, view[position + HEADER_BYTES])
        return position + ZERO_RECORD_BYTES

    def _zero_run(self, view: memoryview, position: int, most: int) -> int:
        pages, fill = self._like_first(view, position, min(most, _PROBED_ZEROS))
        # Most runs are short, some are very long: all that is there is only looked at where a few are alike.
        if len(pages) == _PROBED_ZEROS < most:
            pages, fill = self._like_first(view, position, most)
        self.batch.add_fills(pages, fill)
        return position + len(pages) * ZERO_RECORD_BYTES

    def _like_first(self, view: memoryview, position: int, most: int) -> tuple[Pages, int]:
        """The page numbers of the fills from a position on that are of the same byte as the first, and the byte."""
        pages = self._numbers(view, position, most, ZERO_RECORD_BYTES, _NEXT_ZERO)
        fills = np.ndarray(len(pages), np.uint8, view, position + HEADER_BYTES, (ZERO_RECORD_BYTES,))
        return pages[: _leading(fills == fills[0])], int(fills[0])

    def _numbers(self, view: memoryview, position: int, most: int, stride: int, flags: int) -> Pages:
        """The page numbers of the regular records from a position on, of which there is at least one."""
        headers = np.ndarray(most, ">u8", view, position, (stride,)).astype(np.int64)
        headers = headers[: _leading(headers & FLAGS == flags)]
        # A header with its highest bit set is a negative number here, and very large without its sign.
        pages = (headers.view(np.uint64) >> np.uint64(PAGE_SHIFT)).view(np.int64)
        self._check(int(pages.max()))
        return pages


def named(name: str) -> bytes:
    """A block's name as it stands in a record."""
    return bytes((len(name),)) + name.encode()


def _leading(regular: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    first = int(regular.argmin())
    return len(regular) if regular[first] else first
