"""How many need each item of each pack.

Items are counted by their number among all items of all packs that there were when the tally began; later packs are not
in it. An item's size is its frame's, divided among the frame's items.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from geni_violin.snapshot_server.pages.catalog import Catalog, Pack
from geni_violin.snapshot_server.pages.digests import DIGEST_BYTES, Digests
from geni_violin.snapshot_server.pages.index import NOWHERE, frames_of, items_of, packs_of
from geni_violin.snapshot_server.pages.pack_format import FRAME

_PORTION = 1 << 14
"""How many digests are looked up at a time, so that streams wait for the lock for a few milliseconds only."""

Numbers = NDArray[np.int64]


class Tally:
    """See the module's theory of operation."""

    def __init__(self, catalog: Catalog, packs: Iterable[Pack]) -> None:
        self._catalog = catalog
        self.packs = {pack.number: pack for pack in packs}
        self._first: dict[int, int] = {}
        self._frame_firsts: dict[int, Numbers] = {}
        total = 0
        for pack in self.packs.values():
            items = pack.frames["items"].astype(np.int64)
            self._first[pack.number] = total
            self._frame_firsts[pack.number] = np.cumsum(items) - items
            total += pack.items
        self.counts = np.zeros(total, np.int32)
        """For each item how many need it."""

    def numbers(self, digests: Digests) -> Numbers:
        """The items of these digests, each once; what is in no pack of the tally is left out."""
        parts = []
        for start in range(0, len(digests), _PORTION):
            with self._catalog.lock:
                places = self._catalog.index.find(digests[start : start + _PORTION])
            places = places[places != NOWHERE]
            packs, frames, items = packs_of(places), frames_of(places), items_of(places)
            for pack in np.unique(packs).tolist():
                if pack in self.packs:
                    chosen = packs == pack
                    parts.append(self._first[pack] + self._frame_firsts[pack][frames[chosen]] + items[chosen])
        return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)

    def sizes(self) -> NDArray[np.float64]:
        """For each item how many bytes of its pack are its own."""
        parts = [np.zeros(0)]
        for pack in self.packs.values():
            items = pack.frames["items"].astype(np.int64)
            each = (pack.frames["length"] + FRAME.itemsize) / items + DIGEST_BYTES
            parts.append(np.repeat(each, items))
        return np.concatenate(parts)

    def copy_of_counts_with(self, needs: Iterable[Numbers]) -> NDArray[np.int32]:
        """The counts as they would be with these needs."""
        counts = self.counts.copy()
        for numbers in needs:
            counts[numbers] += 1
        return counts

    def live(self, pack: Pack) -> NDArray[np.bool_]:
        """For each item of a pack whether any needs it."""
        first = self._first[pack.number]
        return self.counts[first : first + pack.items] > 0
