"""Which packs are needed by which image, and what becomes of those that none needs.

For each image that is stored, the packs with its items, by the index. It follows from the maps alone: what an image
needs is recorded when it becomes durable, and found out anew after a restart, before it is first asked for. So nothing
of it is kept that could be out of date. As long as a map cannot be read, nobody knows what it needs, and no pack goes.

A sweep may take long after a restart, because all maps are read; a store that is closed does not wait for that, nor
does who deletes something meanwhile: whoever sweeps sweeps once more.
"""

import threading
from collections.abc import Callable, Iterable

from geni_violin.core.errors import Conflict, NotFound
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.catalog import Catalog, Pack
from geni_violin.snapshot_server.pages.digests import Digests
from geni_violin.snapshot_server.pages.image_map import ImageMap, decode_map
from geni_violin.snapshot_server.pages.index import NOWHERE, packs_of

IMAGES = "images/"


def image_key(snapshot_id: str, vm: str) -> str:
    """The key of an image map."""
    return f"{IMAGES}{snapshot_id}/{vm}"


def read_map(backend: ObjectBackend, key: str) -> ImageMap:
    """An image map from the backend.

    :raise NotFound: there is none.
    :raise MachineFault: it is damaged.
    """
    return decode_map(backend.get(key), f"image map {key}")


class Usage:
    """See the module's theory of operation.

    :param known: gives the keys of maps that there must be, whether the backend lists them already or not.
    """

    def __init__(self, backend: ObjectBackend, catalog: Catalog, known: Callable[[], Iterable[str]]) -> None:
        self._backend = backend
        self._catalog = catalog
        self._known = known
        self._needs: dict[str, set[int]] = {}
        self._forgotten = 0
        self._sweeping = threading.Lock()
        self._wanted = threading.Event()
        self._closed = threading.Event()

    def close(self) -> None:
        """Sweep no more; a sweep that is under way has ended when this returns."""
        self._closed.set()
        with self._sweeping:
            pass

    def record(self, key: str, digests: Digests) -> None:
        """The map of this key is stored, and has these digests; all are in the index, or are lost."""
        with self._catalog.lock:
            self._record(key, digests)

    def _record(self, key: str, digests: Digests) -> None:
        places = self._catalog.index.find(digests)
        self._needs[key] = set(packs_of(places[places != NOWHERE]).tolist())

    def forget(self, key: str) -> None:
        """The map of this key is no longer stored."""
        with self._catalog.lock:
            self._needs.pop(key, None)
            self._forgotten += 1

    def is_stored(self, key: str) -> bool:
        """Whether that map is recorded."""
        with self._catalog.lock:
            return key in self._needs

    def moved(self, old: int, new: int) -> None:
        """What was needed of a pack is in another one; for holders of the catalog's lock."""
        for needs in self._needs.values():
            if old in needs:
                needs.remove(old)
                needs.add(new)

    def complete(self) -> list[str]:
        """Find out about all images that are stored; gives their keys.

        :raise MachineFault: a map cannot be read, so that what it needs is not known.
        :raise Conflict: the store is closed meanwhile.
        """
        keys = sorted({key for key, _size in self._backend.list(IMAGES)}.union(self._known()))
        for key in keys:
            self.refuse_closed()
            while not (self.is_stored(key) or self._found_out(key)):
                pass
        return keys

    def refuse_closed(self) -> None:
        """Refuse to go on with what takes long when the store is being closed.

        :raise Conflict: it is.
        """
        if self._closed.is_set():
            raise Conflict("the store is being closed", "ask again when the snapshot server runs")

    def _found_out(self, key: str) -> bool:
        """Read a map and record it; False if any was deleted meanwhile: this one may be another by now."""
        with self._catalog.lock:
            forgotten = self._forgotten
        try:
            digests = read_map(self._backend, key).all_digests()
        except NotFound:  # deleted meanwhile
            return True
        with self._catalog.lock:
            is_current = self._forgotten == forgotten
            if is_current:
                self._record(key, digests)
        return is_current

    def unneeded(self) -> list[Pack]:
        """Packs that nothing needs and nobody pins; for holders of the catalog's lock, after :meth:`complete`."""
        needed = self._catalog.pinned().union(*self._needs.values())
        return [pack for number, pack in self._catalog.packs.items() if number not in needed]

    def sweep(self, wait: bool) -> list[Pack]:
        """Delete packs that nothing needs; gives them.

        :param wait: for a sweep that is under way; else that one sweeps once more, and this one nothing.
        :raise MachineFault: see :meth:`complete`.
        :raise Conflict: see :meth:`complete`.
        """
        swept: list[Pack] = []
        self._wanted.set()
        while self._wanted.is_set() and self._sweeping.acquire(blocking=wait):
            try:
                self._wanted.clear()
                swept += self._sweep()
            finally:
                self._sweeping.release()
        return swept

    def _sweep(self) -> list[Pack]:
        self.complete()
        with self._catalog.lock:
            swept = [self._catalog.drop(pack.number) for pack in self.unneeded()]
        self.delete(swept)
        return swept

    def delete(self, packs: Iterable[Pack]) -> None:
        """Delete the objects of packs that were dropped."""
        for pack in packs:
            self._backend.delete(pack.key)
