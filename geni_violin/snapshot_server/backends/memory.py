"""Objects in this process. Nothing survives it: for tests, and the shortest answer to what the contract asks for."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from geni_violin.core.errors import AlreadyExists, MachineFault, NoSpace, NotFound
from geni_violin.snapshot_server.backends.keys import checked_key, checked_prefix, checked_range


class MemoryBackend:
    """An :class:`~geni_violin.snapshot_server.backends.ObjectBackend` with room for ``capacity_bytes``."""

    def __init__(self, capacity_bytes: int = 1 << 40) -> None:
        self._capacity_bytes = capacity_bytes
        self._objects: dict[str, bytes] = {}
        self._owner = ""
        self._mutex = threading.Lock()

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        content = data.read_bytes() if isinstance(data, Path) else bytes(data)
        with self._mutex:
            if checked_key(key) in self._objects:
                raise AlreadyExists(f"object {key} exists already in {self.describe()}")
            self._keep(key, content)

    def replace(self, key: str, data: bytes) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            self._keep(checked_key(key), bytes(data))

    def _keep(self, key: str, content: bytes) -> None:
        others = sum(len(data) for name, data in self._objects.items() if name != key)
        if others + len(content) > self._capacity_bytes:
            raise NoSpace(
                f"no room for object {key} in {self.describe()}", "delete snapshots that are no longer needed"
            )
        self._objects[key] = content

    def confirm(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self.size(key)

    def get(self, key: str) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            try:
                return self._objects[checked_key(key)]
            except KeyError:
                raise NotFound(f"there is no object {key} in {self.describe()}") from None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        checked_range(start, length)
        data = self.get(key)[start : start + length]
        if len(data) < length:
            raise MachineFault(f"object {key} in {self.describe()} ends before byte {start + length}")
        return data

    def size(self, key: str) -> int:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return len(self.get(key))

    def exists(self, key: str) -> bool:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            return checked_key(key) in self._objects

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        checked_prefix(prefix)
        with self._mutex:
            found = sorted((key, len(data)) for key, data in self._objects.items() if key.startswith(prefix))
        return iter(found)

    def delete(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            self._objects.pop(checked_key(key), None)

    def free_bytes(self) -> int | None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            return self._capacity_bytes - sum(map(len, self._objects.values()))

    @contextlib.contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._mutex:
            if self._owner:
                raise MachineFault(f"{self._owner} uses {self.describe()}", "stop it, or choose another store")
            self._owner = owner
        try:
            yield
        finally:
            self._owner = ""

    def describe(self) -> str:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return "memory"

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
