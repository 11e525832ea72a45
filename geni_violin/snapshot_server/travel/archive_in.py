"""A backend that reads an archive, and changes nothing.

The container is checked from its first byte to its last when it is opened: so whatever is read later was there, and was
what its checksum says. That protects from damage, not from malice: whoever writes an archive writes its checksums too.
So no length is believed before it is compared with the file's, and the objects' contents are the page store's to check.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from geni_violin.core.errors import Conflict, InvalidInput, MachineFault, NotFound
from geni_violin.snapshot_server.backends.keys import checked_key, checked_prefix, checked_range
from geni_violin.snapshot_server.records import disk_faults
from geni_violin.snapshot_server.travel.archive_format import (
    CHECKSUM_BYTES,
    HEAD,
    MAGIC,
    MAX_ENTRIES,
    check_magic,
    decode_head,
    decode_key,
)

_READ_BYTES = 4 << 20
_MAX_DOCUMENT_BYTES = 64 << 20
"""What is JSON is read as a whole before it is understood."""


@dataclass(frozen=True)
class _Place:
    start: int
    length: int


class ArchiveReader:
    """An :class:`~geni_violin.snapshot_server.backends.ObjectBackend` over an archive, a file that does not change.

    :raise InvalidInput: it is no archive, of another version, cut short, or damaged.
    :raise MachineFault: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._faults():
            self._file = path.open("rb", buffering=0)
            try:
                self._places = _places_of(self._file.fileno())
            except BaseException:
                self._file.close()
                raise

    def confirm(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self._place(key)

    def get(self, key: str) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        place = self._place(key)
        if key.endswith(".json") and place.length > _MAX_DOCUMENT_BYTES:
            raise MachineFault(f"object {key} in {self.describe()} has {place.length} bytes")
        return self._read(place)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        checked_range(start, length)
        place = self._place(key)
        if start + length > place.length:
            raise MachineFault(f"object {key} in {self.describe()} ends before byte {start + length}")
        return self._read(_Place(place.start + start, length))

    def size(self, key: str) -> int:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return self._place(key).length

    def exists(self, key: str) -> bool:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return checked_key(key) in self._places

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        checked_prefix(prefix)
        return iter(sorted((key, place.length) for key, place in self._places.items() if key.startswith(prefix)))

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`.

        :raise Conflict: always.
        """
        del data
        raise self._unchangeable(key)

    def replace(self, key: str, data: bytes) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`.

        :raise Conflict: always.
        """
        del data
        raise self._unchangeable(key)

    def delete(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`.

        :raise Conflict: it is there.
        """
        if self.exists(key):
            raise self._unchangeable(key)

    def free_bytes(self) -> int | None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return 0

    @contextlib.contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`. Whoever only reads is in nobody's way."""
        del owner
        yield

    def describe(self) -> str:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return "the archive"

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self._file.close()

    def _place(self, key: str) -> _Place:
        try:
            return self._places[checked_key(key)]
        except KeyError:
            raise NotFound(f"there is no object {key} in {self.describe()}") from None

    def _read(self, place: _Place) -> bytes:
        with self._faults():
            return _read(self._file.fileno(), place.start, place.length)

    def _unchangeable(self, key: str) -> Conflict:
        return Conflict(f"object {key} in {self.describe()} cannot be changed")

    def _faults(self) -> contextlib.AbstractContextManager[None]:
        return disk_faults("the archive cannot be read", self._path.parent)


def _places_of(descriptor: int) -> dict[str, _Place]:
    """Where each object is, after everything was read and compared with its checksum."""
    size = os.fstat(descriptor).st_size
    check_magic(_read(descriptor, 0, min(size, len(MAGIC))))
    whole, at = blake3(MAGIC), len(MAGIC)
    places: dict[str, _Place] = {}
    while True:
        _refuse_short(size, at + HEAD.size + CHECKSUM_BYTES)
        raw = _read(descriptor, at, HEAD.size)
        head = decode_head(raw)
        whole.update(raw)
        at += HEAD.size
        if head.is_end:
            break
        _refuse_short(size, at + head.key_bytes + head.data_bytes + CHECKSUM_BYTES)
        name = _read(descriptor, at, head.key_bytes)
        key = decode_key(name)
        if key in places or len(places) >= MAX_ENTRIES:
            raise InvalidInput(f"the archive has object {key} twice, or more than {MAX_ENTRIES} objects")
        places[key] = _Place(at + head.key_bytes, head.data_bytes)
        entry = blake3()
        end = at + head.key_bytes + head.data_bytes
        for start in range(at, end, _READ_BYTES):
            portion = _read(descriptor, start, min(_READ_BYTES, end - start))
            entry.update(portion)
            whole.update(portion)
        checksum = _read(descriptor, end, CHECKSUM_BYTES)
        if checksum != entry.digest():
            raise InvalidInput(f"the archive is damaged: object {key} does not have the BLAKE3 that it should")
        whole.update(checksum)
        at = end + CHECKSUM_BYTES
    if _read(descriptor, at, CHECKSUM_BYTES) != whole.digest():
        raise InvalidInput("the archive is damaged: it does not have the BLAKE3 that it says at its end")
    if size > at + CHECKSUM_BYTES:
        raise InvalidInput(f"the archive is followed by {size - at - CHECKSUM_BYTES} bytes that are not part of it")
    return places


def _refuse_short(size: int, needed: int) -> None:
    if needed > size:
        raise InvalidInput(f"the archive is cut short: it has {size} bytes, and needs at least {needed}")


def _read(descriptor: int, start: int, length: int) -> bytes:
    parts, at, end = [], start, start + length
    while at < end and (part := os.pread(descriptor, end - at, at)):
        parts.append(part)
        at += len(part)
    if at < end:
        raise InvalidInput("the archive is cut short")
    return b"".join(parts)
