"""One image on its way in: a stream's events to pages, pieces, and at the end a map."""

import threading
from collections.abc import Callable, Iterable

from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.image_map import PIECE_BYTES, ImageMap, Pieces, encode_map, root_of
from geni_violin.snapshot_server.pages.map_builder import MapBuilder
from geni_violin.snapshot_server.pages.packer import Packer, Session
from geni_violin.snapshot_server.pages.usage import Usage
from geni_violin.snapshot_server.store import StoredImage
from geni_violin.snapshot_server.stream.events import Event, FillRun, Opaque, PageRun, Preamble, Tail
from geni_violin.snapshot_server.stream.reader import StreamReader

OPAQUE_NOTE = "its stream is stored whole, not as pages"

_one_map_at_a_time = threading.Lock()
"""A map is in memory a few times over while it is made, and streams of one snapshot end at much the same time."""


class PageWriter:
    """An :class:`~geni_violin.snapshot_server.store.ImageWriter`.

    :param key: the map's, which is put when all that it names is durable.
    :param session: already begun.
    :param on_end: called once, when the image is stored (then with it) or given up.
    """

    def __init__(
        self,
        vm: str,
        key: str,
        backend: ObjectBackend,
        packer: Packer,
        session: Session,
        usage: Usage,
        on_end: Callable[[StoredImage | None], None],
    ) -> None:
        self._vm = vm
        self._key = key
        self._backend = backend
        self._packer = packer
        self._session = session
        self._usage = usage
        self._on_end = on_end
        self._reader = StreamReader()
        self._map = MapBuilder()
        self._tail = _Piecewise(self._add_piece)
        self._opaque = _Piecewise(self._add_piece)
        self._reason = ""

    @property
    def received_bytes(self) -> int:
        """How many bytes have come."""
        return self._reader.taken_bytes

    @property
    def added_bytes(self) -> int:
        """How many bytes they have added to packs so far."""
        return round(self._session.added_bytes)

    def write(self, data: memoryview) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageWriter`."""
        self._take_all(self._reader.feed(data))

    def finish(self) -> StoredImage:
        """See :class:`~geni_violin.snapshot_server.store.ImageWriter`."""
        self._take_all(self._reader.finish())
        pieces = self._tail.finish(), self._opaque.finish()
        self._packer.finish(self._session)
        with _one_map_at_a_time:
            stored = self._put_map(*pieces)
        self._packer.end(self._session)
        self._on_end(stored)
        return stored

    def _put_map(self, tail: Pieces, opaque: Pieces) -> StoredImage:
        image = self._map.finish(self._reader.taken_bytes, self.added_bytes, tail, opaque, self._reason)
        self._map = MapBuilder()  # what it has is in the image now
        data = encode_map(image)
        # Everything that the map names is durable, and stays: the session pins it until the map's needs are recorded.
        self._backend.put(self._key, memoryview(data))
        self._usage.record(self._key, image.all_digests())
        return stored_image_of(self._vm, image, data)

    def abort(self) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageWriter`."""
        self._packer.end(self._session)
        self._on_end(None)

    def _take_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case PageRun(block, pages, data):
                self._map.set_pages(block, pages, self._packer.add_pages(self._session, data))
            case FillRun(block, pages, fill):
                self._map.set_fills(block, pages, fill)
            case Preamble():
                self._map.begin(event)
            case Tail(content):
                self._tail.add(content)
            case Opaque(content, reason):
                self._reason = reason
                self._opaque.add(content)

    def _add_piece(self, piece: bytes) -> bytes:
        return self._packer.add_piece(self._session, piece)


class _Piecewise:
    """Cuts bytes into pieces."""

    def __init__(self, add: Callable[[bytes], bytes]) -> None:
        self._add = add
        self._rest = bytearray()
        self._total_bytes = 0
        self._digests: list[bytes] = []

    def add(self, data: bytes) -> None:
        self._rest += data
        self._total_bytes += len(data)
        whole = len(self._rest) - len(self._rest) % PIECE_BYTES
        for start in range(0, whole, PIECE_BYTES):
            self._digests.append(self._add(bytes(self._rest[start : start + PIECE_BYTES])))
        del self._rest[:whole]

    def finish(self) -> Pieces:
        if self._rest:
            self._digests.append(self._add(bytes(self._rest)))
            self._rest.clear()
        return Pieces(self._total_bytes, tuple(self._digests))


def stored_image_of(vm: str, image: ImageMap, data: bytes | bytearray) -> StoredImage:
    """What is told of a stored image.

    :param data: its map's object.
    """
    note = f"{OPAQUE_NOTE}: {image.reason}" if image.opaque.total_bytes else ""
    return StoredImage(vm, image.received_bytes, image.pack_bytes + len(data), root_of(data), note)
