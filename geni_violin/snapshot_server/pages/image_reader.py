"""One image on its way out: map and frames to a stream that QEMU loads.

Theory of operation. Pages may come in any order, so they come as they lie in packs: each frame is read and decompressed
once, and packs are read from their beginnings to their ends. What is in memory is the map (36 bytes a page) and a few
frames. The reader pins the packs from the moment on when it looks up the map's digests, so a snapshot can be deleted
meanwhile.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from geni_violin.core.errors import MachineFault
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.catalog import Catalog
from geni_violin.snapshot_server.pages.frames import FrameReader, FrameRef, Items
from geni_violin.snapshot_server.pages.image_map import FILL, PAGE, PIECE_BYTES, ImageMap
from geni_violin.snapshot_server.pages.index import FRAME_SHIFT, NOWHERE, Places, frames_of, items_of, packs_of
from geni_violin.snapshot_server.pages.pack_format import MAX_FRAME_ITEMS
from geni_violin.snapshot_server.pages.page_words import words_for_pages
from geni_violin.snapshot_server.stream.events import FillRun, PageRun
from geni_violin.snapshot_server.stream.layout import RUN_FILLS, RUN_PAGES
from geni_violin.snapshot_server.stream.preamble import parse_preamble
from geni_violin.snapshot_server.stream.writer import write_stream

_COUNTING = np.arange(MAX_FRAME_ITEMS)


class PageReader:
    """An :class:`~geni_violin.snapshot_server.store.ImageReader`.

    :param on_close: called once.
    :raise MachineFault: an item is not in any pack.
    """

    def __init__(
        self, vm: str, image: ImageMap, backend: ObjectBackend, catalog: Catalog, on_close: Callable[[], None]
    ) -> None:
        self._vm = vm
        self._image = image
        self._catalog = catalog
        self._on_close = on_close
        with catalog.lock:
            self._pages = catalog.index.find(image.digests)
            self._pieces = catalog.index.find(image.piece_digests())
            self._refuse_missing()
            self._pinned = set(packs_of(self._pages).tolist()) | set(packs_of(self._pieces).tolist())
            catalog.pin(self._pinned)
            self._packs = {number: catalog.packs[number] for number in self._pinned}
        self._frames = FrameReader(backend)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chunks(self) -> Iterator[bytes | memoryview]:
        """See :class:`~geni_violin.snapshot_server.store.ImageReader`."""
        if not self._image.preamble:
            return self._rest()
        return write_stream(parse_preamble(self._image.preamble), self.runs(), self._rest())

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageReader`."""
        self._frames.close()
        with self._catalog.lock:
            self._catalog.unpin(self._pinned)
            self._pinned = set()
        self._on_close()

    def runs(self) -> Iterator[PageRun | FillRun]:
        """All fills, then all pages, each once.

        :raise MachineFault: a frame is damaged.
        """
        bounds = self._image.first_pages().tolist()
        yield from _fill_runs(self._image, bounds)
        numbers = np.flatnonzero(self._image.kinds == PAGE)
        order = np.argsort(self._pages, kind="stable")
        places, numbers = self._pages[order], numbers[order]
        starts = group_starts(places)
        refs = [FrameRef(self._packs[pack], frame) for pack, frame in frames_at(places[starts])]
        ends = [*starts[1:].tolist(), len(places)][: len(starts)]  # none where there are no places
        for (ref, items), start, end in zip(self._frames.read(refs), starts.tolist(), ends, strict=True):
            wanted = numbers[start:end]
            if isinstance(items, str):
                raise self._damaged(words_for_pages(self._image, wanted), ref, items)
            slots = items_of(places[start:end])
            for at in range(0, len(slots), RUN_PAGES):  # more than are in the frame, where pages are alike
                chosen = slice(at, at + RUN_PAGES)
                yield from _page_runs(wanted[chosen], _chosen(items, slots[chosen]), bounds)

    def end(self, count: int) -> bytes:
        """The image's end, from what is not pages: its last ``count`` bytes, or all if there are fewer.

        :raise MachineFault: a frame is damaged.
        """
        pieces = -(-count // PIECE_BYTES) + 1
        return b"".join(self._rest(max(0, len(self._pieces) - pieces)))[-count:]

    def _rest(self, first: int = 0) -> Iterator[memoryview]:
        refs = [FrameRef(self._packs[pack], frame) for pack, frame in frames_at(self._pieces[first:])]
        slots = items_of(self._pieces[first:]).tolist()
        for (ref, items), slot in zip(self._frames.read(refs), slots, strict=True):
            if isinstance(items, str):
                raise self._damaged("what is not pages", ref, items)
            yield items[slot].data

    def _damaged(self, what: str, ref: FrameRef, words: str) -> MachineFault:
        where = f"{what}: frame {ref.number} of pack {ref.pack.key}: {words}"
        return MachineFault(f"the image of VM {self._vm} is damaged, {where}", "snapshot verify tells all that is")

    def _refuse_missing(self) -> None:
        lost = np.flatnonzero(self._pages == NOWHERE)
        if lost.size:
            numbers = np.flatnonzero(self._image.kinds == PAGE)[lost]
            words = words_for_pages(self._image, numbers)
            raise MachineFault(f"the image of VM {self._vm} is damaged: no pack has {words}", "do not restore it")
        if (self._pieces == NOWHERE).any():
            raise MachineFault(f"the image of VM {self._vm} is damaged: no pack has all of what is not pages")


def group_starts(places: Places) -> NDArray[np.intp]:
    """Where in sorted places another frame begins."""
    frames = places >> FRAME_SHIFT
    return np.flatnonzero(np.concatenate((np.ones(min(len(frames), 1), bool), frames[1:] != frames[:-1])))


def frames_at(places: Places) -> list[tuple[int, int]]:
    """The pack's number and the frame's of each place."""
    return list(zip(packs_of(places).tolist(), frames_of(places).tolist(), strict=True))


def _page_runs(numbers: NDArray[np.intp], rows: NDArray[np.uint8], bounds: list[int]) -> Iterator[PageRun]:
    """One run for each block; within it the pages ascend.

    :param bounds: the first page of each block, and the end.
    """
    if (numbers[1:] < numbers[:-1]).any():
        order = np.argsort(numbers, kind="stable")
        numbers, rows = numbers[order], rows[order]
    start = 0
    while start < len(numbers):
        block = bisect_right(bounds, numbers[start]) - 1
        end = len(numbers) if numbers[-1] < bounds[block + 1] else int(np.searchsorted(numbers, bounds[block + 1]))
        yield PageRun(block, numbers[start:end] - bounds[block], rows[start:end])
        start = end


def _chosen(items: Items, slots: NDArray[np.int64]) -> Items:
    """These items; all in their order, as it is mostly, without a copy."""
    return items if len(slots) == len(items) and (slots == _COUNTING[: len(slots)]).all() else items[slots]


def _fill_runs(image: ImageMap, bounds: list[int]) -> Iterator[FillRun]:
    numbers = np.flatnonzero(image.kinds == FILL)
    for fill in np.unique(image.fills).tolist():
        chosen = numbers[image.fills == fill]
        for block, (first, last) in enumerate(itertools.pairwise(bounds)):
            start, end = np.searchsorted(chosen, (first, last)).tolist()
            for at in range(start, end, RUN_FILLS):
                yield FillRun(block, chosen[at : min(at + RUN_FILLS, end)] - first, fill)
