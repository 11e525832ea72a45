"""Objects in a bucket of an S3-compatible object store: the key is the object's name, after a prefix if there is one.

An object is created in one request, on the condition that it does not exist (``If-None-Match: *``): the store makes it
visible whole or not at all, and durable before it answers. Uploads in several parts cannot have that condition, so an
object passes through memory whole; packs are made with that in mind. Hidden names (``.lock``) are the backend's own.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from geni_violin.core.errors import MachineFault, NotFound
from geni_violin.snapshot_server.backends.keys import checked_key, checked_prefix, checked_range
from geni_violin.snapshot_server.backends.s3_lock import locked
from geni_violin.snapshot_server.backends.s3_objects import S3Objects


class S3Backend:
    """An :class:`~geni_violin.snapshot_server.backends.ObjectBackend` in a bucket, which exists.

    :raise PeerFault: the object store does not answer, refuses the credentials, or has no such bucket.
    """

    def __init__(self, objects: S3Objects) -> None:
        self._objects = objects
        next(objects.list("probe/"), None)  # what is wrong with address, bucket or credentials is said at once

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self._objects.create(checked_key(key), data)

    def replace(self, key: str, data: bytes) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self._objects.overwrite(checked_key(key), data)

    def confirm(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`. What is visible is durable."""
        self.size(key)

    def get(self, key: str) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return self._objects.get(checked_key(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        checked_range(start, length)
        if not length:  # S3 has no empty ranges
            self.size(key)
            return b""
        data = self._objects.get_range(checked_key(key), start, length)
        if len(data) < length:
            raise MachineFault(f"object {key} in {self.describe()} ends before byte {start + length}")
        return data

    def size(self, key: str) -> int:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return self._objects.size(checked_key(key))

    def exists(self, key: str) -> bool:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        found = self._objects.list(checked_prefix(prefix))
        return iter(sorted((name, size) for name, size in found if not name.startswith(".")))

    def delete(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self._objects.delete(checked_key(key))

    def free_bytes(self) -> int | None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`. No object store tells."""
        return None

    def lock(self, owner: str) -> AbstractContextManager[None]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend` and ``s3_lock``."""
        return locked(self._objects, owner)

    def describe(self) -> str:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return self._objects.where

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
