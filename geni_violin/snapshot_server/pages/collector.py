"""Rubbish: what it is, a plan of what to do about it, and doing it, while snapshots are taken.

Theory of operation. Packs that nothing needs are deleted. Where part of a pack is rubbish (pages that precopy sent
again, images that were deleted or given up), the rest is copied to a new pack, and then the old one goes. Order of
effects: the new pack is durable; under the catalog's lock the index turns from the old pack to the new one; the old
pack is deleted. A crash in between leaves some items in two packs, of which one counts; the other is rubbish.

What a stream finds in a pack while a collection is at work must not be taken for rubbish. The catalog counts finds, so:
remember the count, then look at all maps, then copy. When it comes to turning, a pack stays if a stream has found
anything in it since, or if anybody pins it, or did at the beginning: then it is a case for the next collection.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import zstandard

from geni_violin.core.errors import MachineFault, NotFound
from geni_violin.core.messages import CollectionPlan
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.catalog import Catalog, Pack
from geni_violin.snapshot_server.pages.digests import Rows, item_digest, page_digests
from geni_violin.snapshot_server.pages.frames import FrameReader, FrameRef, Items
from geni_violin.snapshot_server.pages.index import segment_of
from geni_violin.snapshot_server.pages.pack_builder import PACK_BYTES, PackBuilder, new_buffer
from geni_violin.snapshot_server.pages.pack_format import MAX_ITEMS
from geni_violin.snapshot_server.pages.packer import FRAME_PAGES, LEVEL
from geni_violin.snapshot_server.pages.tally import Tally
from geni_violin.snapshot_server.pages.usage import Usage, read_map

MIN_RUBBISH = 0.25
"""Which part of a pack must be rubbish for the rest to be worth moving."""


class Collector:
    """See the module's theory of operation."""

    def __init__(self, backend: ObjectBackend, catalog: Catalog, usage: Usage) -> None:
        self._backend = backend
        self._catalog = catalog
        self._usage = usage
        self._one_at_a_time = threading.Lock()

    def plan(self, min_rubbish: float = MIN_RUBBISH) -> CollectionPlan:
        """What a collection would do now.

        :param min_rubbish: which part of a pack must be rubbish for the rest to be moved; 0 for any.
        :raise MachineFault: a map cannot be read, so that what it needs is not known.
        """
        tally = self.tally_of_all()
        with self._catalog.lock:
            pinned = self._catalog.pinned()
            dead = [pack for pack in self._usage.unneeded() if pack.number in tally.packs]
        skipped = pinned | {pack.number for pack in dead}
        rewrite, rubbish = [], 0.0
        sizes = tally.sizes()
        for pack, live_bytes in _live_bytes(tally, sizes):
            spare = pack.size_bytes - live_bytes
            if pack.number not in skipped and not tally.live(pack).all() and spare >= min_rubbish * pack.size_bytes:
                rewrite.append(pack)
                rubbish += spare
        freed = sum(pack.size_bytes for pack in dead) + round(rubbish)
        moved = sum(pack.size_bytes for pack in rewrite) - round(rubbish)
        return CollectionPlan(_ids(dead), _ids(rewrite), freed, moved)

    def execute(self, plan: CollectionPlan) -> CollectionPlan:
        """Do what was planned, as far as it is still right; gives what was done.

        :raise MachineFault: a map or a pack cannot be read.
        :raise Conflict: the store is being closed; what is done stays done.
        :raise NoSpace: there is no room for the new packs.
        """
        with self._one_at_a_time:
            deleted = self._usage.sweep(wait=True)
            freed, moved, rewritten = sum(pack.size_bytes for pack in deleted), 0, []
            with self._catalog.lock:
                finds, pinned = self._catalog.finds, self._catalog.pinned()
                wanted = set(plan.rewrite)
                chosen = [pack for pack in self._catalog.packs.values() if pack.id in wanted]
            chosen = [pack for pack in chosen if pack.number not in pinned]
            tally = self.tally_of_all()
            for group in _groups(tally, chosen):
                self._usage.refuse_closed()
                new_bytes = self._rewrite(tally, group, finds)
                if new_bytes is not None:
                    rewritten += group
                    moved += new_bytes
                    freed += sum(pack.size_bytes for pack in group) - new_bytes
        return CollectionPlan(_ids(deleted), _ids(rewritten), freed, moved)

    def tally_of_all(self) -> Tally:
        """How many images need each item of the packs that there are.

        :raise MachineFault: a map cannot be read.
        """
        with self._catalog.lock:
            packs = list(self._catalog.packs.values())
        tally = Tally(self._catalog, packs)
        for key in self._usage.complete():
            self._usage.refuse_closed()
            try:
                digests = read_map(self._backend, key).all_digests()
            except NotFound:
                continue  # deleted meanwhile
            tally.counts[tally.numbers(digests)] += 1
        return tally

    def _rewrite(self, tally: Tally, group: Sequence[Pack], finds: int) -> int | None:
        """Move what is needed of these packs to one new pack: its size in bytes, None if they have to stay."""
        numbers = [pack.number for pack in group]
        with self._catalog.lock:
            if not self._catalog.packs.keys() >= set(numbers):
                return None  # nothing needs one of them any more, and it was swept
            self._catalog.pin(numbers)
        try:
            builder = self._moved(tally, group)
            if builder is None:
                return None
            data, table = builder.finish()
            self._backend.put(builder.key, data)
        finally:
            with self._catalog.lock:
                self._catalog.unpin(numbers)
        with self._catalog.lock:
            number = self._catalog.new_number()
        segment = segment_of(number, table)
        with self._catalog.lock:
            packs, pinned = self._catalog.packs, self._catalog.pinned()
            is_free = all(one.number in packs and one.number not in pinned and one.found_at <= finds for one in group)
            if is_free:
                for pack in group:
                    self._catalog.drop(pack.number)
                    self._usage.moved(pack.number, number)
                self._catalog.add(number, builder.id, table, len(data), segment)
        if not is_free:
            self._backend.delete(builder.key)
            return None
        self._usage.delete(group)
        return len(data)

    def _moved(self, tally: Tally, group: Sequence[Pack]) -> PackBuilder | None:
        """What is needed of these packs in a new one; None if it does not fit."""
        builder = PackBuilder(new_buffer())
        for digests, frame, item_bytes in self._live_frames(tally, group):
            if not builder.fits(frame, len(digests)):
                return None
            builder.append(frame, item_digest(frame), item_bytes, digests)
        return builder

    def _live_frames(self, tally: Tally, group: Sequence[Pack]) -> Iterator[tuple[list[bytes], bytes, int]]:
        """The needed items of packs in new frames: their digests, the frame, and the size of each item."""
        compressor = zstandard.ZstdCompressor(level=LEVEL)
        for items in _regrouped(self._live_items(tally, group)):
            yield page_digests(items), compressor.compress(items.tobytes()), items.shape[1]

    def _live_items(self, tally: Tally, group: Sequence[Pack]) -> Iterator[Items]:
        reader = FrameReader(self._backend)
        try:
            for pack in group:
                counts = pack.frames["items"].astype(np.int64)
                live = np.split(tally.live(pack), np.cumsum(counts)[:-1])
                refs = [FrameRef(pack, number) for number, chosen in enumerate(live) if chosen.any()]
                for ref, items in reader.read(refs):
                    if isinstance(items, str):
                        raise MachineFault(f"frame {ref.number} of pack {pack.key} is damaged: {items}", _VERIFY)
                    yield items[live[ref.number]]
        finally:
            reader.close()


def _ids(packs: Iterable[Pack]) -> tuple[str, ...]:
    return tuple(pack.id for pack in packs)


_VERIFY = "snapshot verify tells which snapshots have it"


def _live_bytes(tally: Tally, sizes: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Iterator[tuple[Pack, float]]:
    start = 0
    for pack in tally.packs.values():
        yield pack, float(sizes[start : start + pack.items][tally.live(pack)].sum())
        start += pack.items


def _groups(tally: Tally, packs: Iterable[Pack]) -> Iterator[list[Pack]]:
    """Packs of which what is needed goes together into one new pack."""
    live_bytes = {pack.number: size for pack, size in _live_bytes(tally, tally.sizes())}
    group: list[Pack] = []
    group_bytes, group_items = 0.0, 0
    for pack in packs:
        if pack.number not in live_bytes:
            continue
        size, items = live_bytes[pack.number], int(np.count_nonzero(tally.live(pack)))
        if group and (group_bytes + size > 0.75 * PACK_BYTES or group_items + items > MAX_ITEMS):
            yield group
            group, group_bytes, group_items = [], 0.0, 0
        group.append(pack)
        group_bytes, group_items = group_bytes + size, group_items + items
    if group:
        yield group


def _regrouped(parts: Iterable[Items]) -> Iterator[Rows]:
    """Pages in full frames again; pieces one by one, as they come."""
    waiting: list[Items] = []
    count = 0
    for items in parts:
        if waiting and waiting[0].shape[1] != items.shape[1]:
            yield np.concatenate(waiting)
            waiting, count = [], 0
        waiting.append(items)
        count += len(items)
        while count >= FRAME_PAGES or (waiting and items.shape[1] * count >= _MAX_FRAME_BYTES):
            joined = np.concatenate(waiting)
            whole = min(FRAME_PAGES, max(1, _MAX_FRAME_BYTES // items.shape[1]))
            yield joined[:whole]
            waiting, count = ([joined[whole:]], count - whole) if count > whole else ([], 0)
    if waiting:
        yield np.concatenate(waiting)


_MAX_FRAME_BYTES = 256 << 10
