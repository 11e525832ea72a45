"""Ascending pages, collected and given out together.

Theory of operation. Guests mix pages and fills finely, so each record by itself would be a dear event. A batch takes
both as long as they are of one block and their page numbers ascend: then no page is in it twice, and it can be given
out as one run of pages and one of fills, in whatever order. (Fills by themselves, all of one byte, may come in any
order and again: they are sorted at last.) It is given out when that ends or a run is full. What is in a run thus
depends on the records alone, and not on the portions in which they came.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from geni_violin.snapshot_server.stream.events import PAGE_BYTES, Event, FillRun, PageRun
from geni_violin.snapshot_server.stream.layout import RUN_FILLS, RUN_PAGES

Pages = NDArray[np.int64]
Rows = NDArray[np.uint8]

Array = TypeVar("Array", Pages, Rows)

_LOWEST = -1  # every page number is above it


class Batch:
    """Collects pages; what is complete is appended to ``events``, which the owner takes away."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._block = 0
        self._last = _LOWEST  # the highest page number in the batch
        self._fill = 0
        self._disordered = False  # whether the fills do not ascend
        self._page_count = self._fill_count = 0
        self._page_numbers = np.empty(RUN_PAGES, np.int64)
        self._fill_numbers = np.empty(RUN_FILLS, np.int64)
        self._rows = np.empty((RUN_PAGES, PAGE_BYTES), np.uint8)
        self._bytes = self._rows.reshape(-1).data
        self._example: tuple[int, bytes | int] | None = None

    @property
    def page_room(self) -> int:
        """How many pages can be added at most at once."""
        return RUN_PAGES - self._page_count

    @property
    def fill_room(self) -> int:
        """How many fills can be added at most at once."""
        return RUN_FILLS - self._fill_count

    def begin_block(self, block: int) -> None:
        """What is added from here on is of this block."""
        if block != self._block:
            self.flush()
            self._block, self._example = block, None

    def add_page(self, page: int, data: memoryview) -> None:
        """One page."""
        if page <= self._last:
            self.flush()
        count = self._page_count
        self._page_numbers[count] = page
        self._bytes[count * PAGE_BYTES : (count + 1) * PAGE_BYTES] = data
        self._pages_added(1, page)

    def add_pages(self, pages: Pages, rows: Rows) -> None:
        """Many pages, at most :attr:`page_room`; in any order, though it is ascending ones that are fast."""
        for start, end in _ascending(pages):
            if pages[start] <= self._last:
                self.flush()
            count = self._page_count
            self._page_numbers[count : count + end - start] = pages[start:end]
            self._rows[count : count + end - start] = rows[start:end]
            self._pages_added(end - start, int(pages[end - 1]))

    def add_fill(self, page: int, fill: int) -> None:
        """One page that is full of a byte."""
        self._make_way(page, fill)
        self._fill_numbers[self._fill_count] = page
        self._fills_added(1, page <= self._last, page)

    def add_fills(self, pages: Pages, fill: int) -> None:
        """Many pages that are full of one byte, at most :attr:`fill_room`."""
        for start, end in _ascending(pages) if self._page_count else [(0, len(pages))]:
            self._make_way(int(pages[start]), fill)
            count = self._fill_count
            self._fill_numbers[count : count + end - start] = pages[start:end]
            disordered = pages[start] <= self._last or len(_ascending(pages[start:end])) > 1
            self._fills_added(end - start, bool(disordered), int(pages[start:end].max()))

    def flush(self) -> None:
        """Give out what there is."""
        self._example = self.example()
        if self._page_count:
            self.events.append(PageRun(self._block, *self._taken_pages()))
        if self._fill_count:
            numbers = self._fill_numbers[: self._fill_count]
            numbers = np.unique(numbers) if self._disordered else numbers.copy()
            self.events.append(FillRun(self._block, _frozen(numbers), self._fill))
        self._page_count = self._fill_count = 0
        self._disordered = False
        self._last = _LOWEST

    def example(self) -> tuple[int, bytes | int] | None:
        """Some page of the block in its latest version: its number, and its bytes or the byte it is full of."""
        if self._page_count:
            return int(self._page_numbers[self._page_count - 1]), self._rows[self._page_count - 1].tobytes()
        if self._fill_count:
            return int(self._fill_numbers[self._fill_count - 1]), self._fill
        return self._example

    def _make_way(self, page: int, fill: int) -> None:
        """Give out what a fill of a page cannot be added to."""
        if fill != self._fill or (page <= self._last and self._page_count):
            self.flush()
            self._fill = fill

    def _pages_added(self, count: int, last: int) -> None:
        self._page_count += count
        self._last = last
        if self._page_count == RUN_PAGES:
            self.flush()

    def _fills_added(self, count: int, disordered: bool, highest: int) -> None:
        self._fill_count += count
        self._disordered |= disordered
        self._last = max(self._last, highest)
        if self._fill_count == RUN_FILLS:
            self.flush()

    def _taken_pages(self) -> tuple[Pages, Rows]:
        """The pages as arrays of their own: a full buffer is handed over, few pages are copied out of it."""
        numbers, rows = self._page_numbers[: self._page_count], self._rows[: self._page_count]
        if self._page_count < RUN_PAGES // 2:
            return _frozen(numbers.copy()), _frozen(rows.copy())
        self._page_numbers = np.empty_like(self._page_numbers)
        self._rows = np.empty_like(self._rows)
        self._bytes = self._rows.reshape(-1).data
        return _frozen(numbers), _frozen(rows)


def _ascending(pages: Pages) -> list[tuple[int, int]]:
    """The stretches, as start and end, within which the numbers ascend."""
    falls = (pages[1:] <= pages[:-1]).nonzero()[0]
    if not len(falls):
        return [(0, len(pages))]
    breaks = (falls + 1).tolist()
    return list(zip([0, *breaks], [*breaks, len(pages)], strict=True))


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array
