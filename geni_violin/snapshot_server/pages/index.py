"""Where each item is: from digest to place, in sorted arrays.

Theory of operation. A *place* is one 64-bit number: pack, frame in the pack, item in the frame. Entries are in a few
segments, each sorted by the first 8 bytes of the digest; a batch is looked up by one binary search in each segment,
and the other 24 bytes decide. New packs make small segments, and segments of like sizes are merged, so that there are
few and each entry is merged a few times only. 40 bytes an entry, and no Python object for any.

Packs have numbers, given out in the order in which they are added. The entries of a pack that is dropped are skipped
from then on, and leave at the next merge. An item that is in two packs (a collection was cut short) counts where it
was added first.

Nothing here locks; whoever shares an index does (``packer``).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geni_violin.snapshot_server.pages.digests import Digests
from geni_violin.snapshot_server.pages.pack_format import PackTable

Places = NDArray[np.uint64]

NOWHERE = np.uint64((1 << 64) - 1)
"""The place of what is not there."""
PACK_SHIFT, FRAME_SHIFT = np.uint64(40), np.uint64(16)
_FRAME_MASK, _ITEM_MASK = np.uint64((1 << 24) - 1), np.uint64((1 << 16) - 1)


def packs_of(places: Places) -> NDArray[np.int64]:
    """The pack's number in each place."""
    return (places >> PACK_SHIFT).astype(np.int64)


def frames_of(places: Places) -> NDArray[np.int64]:
    """The frame's number within its pack in each place."""
    return ((places >> FRAME_SHIFT) & _FRAME_MASK).astype(np.int64)


def items_of(places: Places) -> NDArray[np.int64]:
    """The item's number within its frame in each place."""
    return (places & _ITEM_MASK).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Segment:
    """Entries by their keys, ascending: the digests' first words, the other three, and the places."""

    keys: NDArray[np.uint64]
    rest: NDArray[np.uint64]
    places: Places


def segment_of(number: int, table: PackTable) -> Segment:
    """The entries of one pack."""
    counts = table.frames["items"].astype(np.int64)
    frames = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    items = (np.arange(len(table.digests)) - np.repeat(table.first_items(), counts)).astype(np.uint64)
    places = (np.uint64(number) << PACK_SHIFT) | (frames << FRAME_SHIFT) | items
    return _sorted(table.digests[:, 0], table.digests[:, 1:], places)


def _sorted(keys: NDArray[np.uint64], rest: NDArray[np.uint64], places: Places) -> Segment:
    order = np.argsort(keys, kind="stable")
    return Segment(keys[order], rest[order], places[order])


class PageIndex:
    """See the module's theory of operation."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._alive = np.zeros(64, dtype=bool)

    def __len__(self) -> int:
        """How many entries there are, those of dropped packs left out."""
        return sum(int(np.count_nonzero(self._lives(segment.places))) for segment in self._segments)

    def find(self, digests: Digests) -> Places:
        """The place of each, or :data:`NOWHERE`."""
        found = np.full(len(digests), NOWHERE)
        for segment in self._segments:
            missing = np.flatnonzero(found == NOWHERE)
            if not missing.size:
                break
            self._find_in(segment, digests, missing, found)
        return found

    def _find_in(self, segment: Segment, digests: Digests, missing: NDArray[np.intp], found: Places) -> None:
        """Look for those that are missing; goes on while keys are equal and the rest is not."""
        at = np.searchsorted(segment.keys, digests[missing, 0])
        while missing.size:
            inside = at < len(segment.keys)
            missing, at = missing[inside], at[inside]
            same = segment.keys[at] == digests[missing, 0]
            missing, at = missing[same], at[same]
            places = segment.places[at]
            hit = (segment.rest[at] == digests[missing, 1:]).all(axis=1) & self._lives(places)
            found[missing[hit]] = places[hit]
            missing, at = missing[~hit], at[~hit] + 1

    def add(self, number: int, segment: Segment) -> None:
        """Add a pack's entries, but those that are there already."""
        while number >= len(self._alive):
            self._alive = np.concatenate((self._alive, np.zeros_like(self._alive)))
        known = self.find(np.column_stack((segment.keys, segment.rest)))
        new = known == NOWHERE
        if not new.all():
            segment = Segment(segment.keys[new], segment.rest[new], segment.places[new])
        self._alive[number] = True
        if len(segment.keys):
            self._segments.append(segment)
        while len(self._segments) > 1 and len(self._segments[-2].keys) < 2 * len(self._segments[-1].keys):
            self._segments[-2:] = [self._merged(self._segments[-2:])]

    def drop(self, number: int) -> None:
        """Forget a pack."""
        self._alive[number] = False

    def whole(self) -> Segment:
        """All entries in one segment, which is the index's only one from then on."""
        self._segments = [self._merged(self._segments)] if self._segments else []
        empty = np.zeros(0, np.uint64)
        return self._segments[0] if self._segments else Segment(empty, empty.reshape(0, 3), empty)

    def load(self, numbers: list[int], highest: int, segment: Segment) -> None:
        """Begin with these entries; those of packs that are not of these numbers are skipped.

        :param highest: the highest number among the entries.
        """
        self._alive = np.zeros(max(64, 2 * highest), dtype=bool)
        self._alive[numbers] = True
        self._segments = [segment]

    def _merged(self, segments: list[Segment]) -> Segment:
        parts = []
        for segment in segments:
            lives = self._lives(segment.places)
            parts.append(
                segment if lives.all() else Segment(segment.keys[lives], segment.rest[lives], segment.places[lives])
            )
        return _sorted(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.rest for part in parts]),
            np.concatenate([part.places for part in parts]),
        )

    def _lives(self, places: Places) -> NDArray[np.bool_]:
        lives: NDArray[np.bool_] = self._alive[packs_of(places)]
        return lives
