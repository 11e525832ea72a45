"""The packs that there are, the index of what is in them, and the lock that guards both.

One condition variable for all that packing, reading and collecting share: each holds it for well under a millisecond,
but for the merge of large segments of the index. Nothing waits for a disk under it.

A pack is *needed* while an image has items in it (``usage``) or somebody who is at work pins it: a stream that found an
item there, a reader. What is neither may go, and is dropped from the index under the lock first, so that nobody can
come to need it.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geni_violin.core.errors import MachineFault
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.index import PageIndex, Segment, segment_of
from geni_violin.snapshot_server.pages.pack_builder import PREFIX
from geni_violin.snapshot_server.pages.pack_format import (
    TRAILER_BYTES,
    PackTable,
    decode_tables,
    tables_place,
)


@dataclass(eq=False)
class Pack:
    """A durable pack.

    :ivar frames: of type ``pack_format.FRAME``.
    :ivar found_at: the catalog's count when a stream last found an item in it.
    """

    number: int
    id: str
    frames: NDArray[np.void]
    items: int
    size_bytes: int
    found_at: int = 0

    @property
    def key(self) -> str:
        """The object's key."""
        return PREFIX + self.id


class Catalog:
    """See the module's theory of operation. Every method is for holders of :attr:`lock`, but the constructor."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.index = PageIndex()
        self.packs: dict[int, Pack] = {}
        self.finds = 0
        self._next_number = 0
        self._pins: Counter[int] = Counter()

    def new_number(self) -> int:
        """A number for a pack; none is given out twice."""
        self._next_number += 1
        return self._next_number

    def add(self, number: int, pack_id: str, table: PackTable, size_bytes: int, segment: Segment | None) -> Pack:
        """There is another pack.

        :param segment: its entries, from :func:`segment_of`; None if the index has them.
        """
        pack = Pack(number, pack_id, table.frames, len(table.digests), size_bytes)
        self.packs[number] = pack
        if segment is not None:
            self.index.add(number, segment)
        return pack

    def load(self, found: Iterable[Pack], highest: int, segment: Segment) -> None:
        """Begin with these packs, and with entries of packs of which some may be gone.

        :param highest: the highest number among the entries.
        """
        self.packs = {pack.number: pack for pack in found}
        self._next_number = highest
        self.index.load(list(self.packs), highest, segment)

    def drop(self, number: int) -> Pack:
        """Nobody will find anything in this pack any more."""
        self.index.drop(number)
        return self.packs.pop(number)

    def found(self, numbers: Iterable[int]) -> None:
        """A stream has found items in these packs."""
        self.finds += 1
        for number in numbers:
            self.packs[number].found_at = self.finds

    def pin(self, numbers: Iterable[int]) -> None:
        """Keep these packs."""
        self._pins.update(list(numbers))  # a list, lest a mapping's values be counted

    def unpin(self, numbers: Iterable[int]) -> None:
        """They were pinned once less."""
        self._pins.subtract(list(numbers))
        self._pins = +self._pins

    def pinned(self) -> set[int]:
        """Which packs somebody pins."""
        return set(self._pins)


def read_table(backend: ObjectBackend, key: str, size_bytes: int) -> PackTable:
    """What is in a pack, by itself.

    :raise MachineFault: it is damaged.
    """
    what = f"pack {key}"
    if size_bytes < TRAILER_BYTES:
        raise MachineFault(f"{what} is damaged: it has {size_bytes} bytes")
    trailer = backend.get_range(key, size_bytes - TRAILER_BYTES, TRAILER_BYTES)
    offset, length = tables_place(trailer, size_bytes, what)
    return decode_tables(backend.get_range(key, offset, length), offset, what)


def add_from_backend(catalog: Catalog, backend: ObjectBackend, key: str, size_bytes: int) -> None:
    """Rebuild a pack's part of catalog and index from the pack."""
    table = read_table(backend, key, size_bytes)
    with catalog.lock:
        number = catalog.new_number()
        catalog.add(number, key.removeprefix(PREFIX), table, size_bytes, segment_of(number, table))
