"""A backend that writes an archive: what is put goes out at once, and is kept only if it is small.

The page store above reads back what it put only of records and image maps, which are kept in a scratch folder. Of
packs, nearly all of an archive, nothing is kept. What was put cannot be taken back, so nothing can be deleted or
replaced: whoever copies a snapshot has no reason to, unless it fails, and then there is no archive.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from geni_violin.core.errors import AlreadyExists, Conflict, NotFound
from geni_violin.snapshot_server.backends.keys import checked_key
from geni_violin.snapshot_server.backends.local import LocalBackend
from geni_violin.snapshot_server.pages.pack_builder import PREFIX
from geni_violin.snapshot_server.travel.archive_format import MAGIC, encode_end_head, encode_head


class ArchiveWriter:
    """An :class:`~geni_violin.snapshot_server.backends.ObjectBackend` whose objects go into an archive.

    :param emit: takes the archive's bytes in order; may block.
    :param scratch: an empty folder.
    """

    def __init__(self, emit: Callable[[bytes | memoryview], None], scratch: Path) -> None:
        self._emit = emit
        self._small = LocalBackend(scratch)
        self._packs: dict[str, int] = {}
        self._mutex = threading.Lock()
        self._hash = blake3()
        self._write(MAGIC)

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        content = data.read_bytes() if isinstance(data, Path) else data
        with self._mutex:
            if key.startswith(PREFIX):
                if checked_key(key) in self._packs:
                    raise AlreadyExists(f"object {key} exists already in {self.describe()}")
                self._packs[key] = len(content)
            else:
                self._small.put(key, content)
            name = key.encode()
            self._write(encode_head(name, len(content)))
            self._write(name)
            self._write(content)
            self._write(blake3(name).update(content).digest())

    def finish(self) -> None:
        """Write the archive's end."""
        with self._mutex:
            self._write(encode_end_head())
            self._emit(self._hash.digest())

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._emit(data)

    def replace(self, key: str, data: bytes) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`.

        :raise Conflict: always.
        """
        raise Conflict(f"object {key} in {self.describe()} has gone out already")

    def confirm(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self.size(key)

    def get(self, key: str) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return self._small.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return self._small.get_range(key, start, length)

    def size(self, key: str) -> int:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            return self._packs[key] if key in self._packs else self._small.size(key)

    def exists(self, key: str) -> bool:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            packs = [(key, size) for key, size in self._packs.items() if key.startswith(prefix)]
            return iter(sorted([*packs, *self._small.list(prefix)]))

    def delete(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`.

        :raise Conflict: it has gone out already.
        """
        if self.exists(key):
            raise Conflict(f"object {key} in {self.describe()} has gone out already")

    def free_bytes(self) -> int | None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return None

    @contextlib.contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`. Nobody else can know of it."""
        del owner
        yield

    def describe(self) -> str:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return "the archive"

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
