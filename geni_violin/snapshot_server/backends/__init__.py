"""Where the store keeps its objects: a folder, or an S3-compatible object store.

Theory of operation. An object has a key and bytes. Almost all are *written once*: packs of pages, image maps,
manifests. An object is there whole or not at all, whatever happens in the middle of a put, and what a put has returned
for survives a power cut. So the last put of a chain decides whether all that it speaks of is visible, and that is all
the atomicity that the store above needs: no backend can change several objects at a time, and none has to.

Object stores differ in what they can do on condition. Creating only what is absent is common to all; replacing only
what is unchanged is not. So nothing here compares and swaps: two servers are kept apart by the backend's lock.

===========  ============================================================================================
``keys``     what may be a key (pure)
``memory``   objects in this process: for tests of what stands above, and a reference for the contract
``local``    a folder of files
``s3``       a bucket of an S3-compatible object store; ``s3_objects`` and ``s3_lock`` are parts of it
``opening``  from an address and credentials to a backend
===========  ============================================================================================

Credentials come from the environment or from a file. They are in no message, no log line and no ``describe()``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class ObjectBackend(Protocol):
    """Objects by key. Every method blocks and may be called from several threads at a time.

    Keys are those that ``keys.checked_key`` lets pass. Every method raises :class:`InvalidInput` for another key, and

    * :class:`NoSpace` where there is no room, :class:`MachineFault` where the disk failed in another way;
    * :class:`PeerFault` where an object store does not answer, refuses the credentials, or answers nonsense.
    """

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        """Create an object, whole or not at all; it is durable when this returns.

        Of several that put one key at the very same time at least one succeeds. Some object stores (Swift) let more of
        them succeed; the bytes are those of one. So keys that several may want have to differ by who wants them.

        :param data: its bytes, or a file with them, which stays as it is.
        :raise AlreadyExists: there is an object of that key; it stays as it is.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Create or overwrite an object: a reader sees the old bytes or the new ones. Durable when this returns.

        For small records, which fit in memory.
        """

    def confirm(self, key: str) -> None:
        """Have an object that exists be durable, though the put that made it may have failed in the end.

        :raise NotFound: there is no such object.
        """

    def get(self, key: str) -> bytes:
        """All bytes of an object.

        :raise NotFound: there is none.
        """

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes of an object from offset ``start`` on.

        :raise NotFound: there is no such object.
        :raise MachineFault: the object ends before.
        """

    def size(self, key: str) -> int:
        """How many bytes an object has.

        :raise NotFound: there is none.
        """

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """The key and the size in bytes of each object whose key begins with ``prefix``, by key.

        A prefix is empty or ends in ``/``. What is put or deleted meanwhile may or may not be among them.
        """

    def delete(self, key: str) -> None:
        """Have an object be gone, durably; it is fine if there is none."""

    def free_bytes(self) -> int | None:
        """How much room there is; None where that cannot be known."""

    def lock(self, owner: str) -> AbstractContextManager[None]:
        """Keep every other server out, from entering to leaving.

        :param owner: what people call this server, for the other one's message.
        :raise MachineFault: another one is in; the message says which and the hint what to do.
        """

    def describe(self) -> str:
        """What people call it, such as its folder or ``s3://bucket/prefix``; no credentials."""

    def close(self) -> None:
        """Let go of what the backend holds in this process; the objects stay."""
