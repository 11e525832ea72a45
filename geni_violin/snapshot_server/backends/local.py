"""Objects as files in a folder: the key is the path.

::

    FOLDER/.lock        held by the server that uses the folder
    FOLDER/.partial/    what is being written
    FOLDER/KEY          an object

A put writes and fsyncs a file in ``.partial``, then *links* it to its name, which fails if there is one, and fsyncs
the folder; a replace *renames* it there instead. So a crash leaves files in ``.partial`` at most, and whoever takes the
lock next removes them. Folders that become empty are removed; a put whose folder vanishes under it makes it again.

Images hold whatever was in the guests' memory: new folders and files are for this user alone.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from geni_violin.core.errors import AlreadyExists, MachineFault, NotFound
from geni_violin.runtime.processes import sync_folder
from geni_violin.snapshot_server.backends.keys import checked_key, checked_prefix, checked_range
from geni_violin.snapshot_server.records import disk_faults

_COPY_BYTES = 4 << 20
_BLOCK_BYTES = 4096
_LEAST_DIRECT_BYTES = 1 << 20
_TRIES = 100
"""How often a folder is made again that vanishes: another thread has to delete its last object in just that moment."""


class LocalBackend:
    """An :class:`~geni_violin.snapshot_server.backends.ObjectBackend` in a folder, which is made if need be.

    :raise MachineFault: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._partial = self._folder / ".partial"
        with self._faults("the store cannot be opened"):
            self._make_folder(self._partial)

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        path = self._path(key)
        if self.exists(key):  # spares the writing; what decides is the link
            raise self._exists_already(key)
        self._publish(key, data, lambda temporary: os.link(temporary, path))

    def replace(self, key: str, data: bytes) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        path = self._path(key)
        self._publish(key, data, lambda temporary: temporary.replace(path))

    def _publish(self, key: str, data: bytes | memoryview | Path, give_name: Callable[[Path], object]) -> None:
        """Write a file whole and durable, and only then have it appear under its key."""
        folder = self._path(key).parent
        temporary = self._partial / uuid.uuid4().hex
        with self._faults(f"object {key} cannot be written"):
            try:
                _write_durably(temporary, data)
                self._in_folder(folder, lambda: give_name(temporary))
                sync_folder(folder)
            except FileExistsError:
                raise self._exists_already(key) from None
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _in_folder(self, folder: Path, give_name: Callable[[], object]) -> None:
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                self._make_folder(folder)
                give_name()
                return
        raise OSError(errno.ENOENT, "the folder vanishes again and again", str(folder))

    def confirm(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        self.size(key)
        with self._faults(f"object {key} cannot be made durable"):
            sync_folder(self._path(key).parent)

    def get(self, key: str) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._reading(key) as path:
            return path.read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        checked_range(start, length)
        with self._reading(key) as path, path.open("rb", buffering=0) as file:
            parts, wanted = [], length
            while wanted and (part := os.pread(file.fileno(), wanted, start + length - wanted)):
                parts.append(part)
                wanted -= len(part)
        if wanted:
            raise MachineFault(f"object {key} in {self.describe()} ends before byte {start + length}")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, key: str) -> int:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._reading(key) as path:
            return path.stat().st_size

    def exists(self, key: str) -> bool:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        top = self._folder / checked_prefix(prefix)
        with self._faults("the objects cannot be listed"):
            return iter(sorted(self._below(top, prefix)))

    def _below(self, folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._below(Path(entry.path), f"{prefix}{entry.name}/")
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                yield f"{prefix}{entry.name}", entry.stat().st_size

    def delete(self, key: str) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        path = self._path(key)
        with self._faults(f"object {key} cannot be deleted"), contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)
            for folder in path.relative_to(self._folder).parents[:-1]:
                try:
                    (self._folder / folder).rmdir()
                except OSError:
                    break  # something is in it

    def free_bytes(self) -> int | None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        with self._faults("the free space cannot be told"):
            figures = os.statvfs(self._folder)
        return figures.f_bavail * figures.f_frsize

    @contextlib.contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`. A crash of this process ends it."""
        with self._faults("the store cannot be locked"):
            file = (self._folder / ".lock").open("a+b")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip()
                words = f"another snapshot server uses {self.describe()}" + (f": {holder}" if holder else "")
                raise MachineFault(words, "stop it, or choose another folder") from None
            with self._faults("the store cannot be opened"):
                file.truncate(0)
                file.write(owner.encode() + b"\n")
                file.flush()
                for left in self._partial.iterdir():
                    left.unlink()
                for folder, _folders, _files in os.walk(
                    self._folder
                ):  # what a killed server had linked, but not synced
                    sync_folder(Path(folder))
            yield

    def describe(self) -> str:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""
        return str(self._folder)

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.backends.ObjectBackend`."""

    def _path(self, key: str) -> Path:
        return self._folder / checked_key(key)

    def _make_folder(self, folder: Path) -> None:
        """Have a folder, durably, for this user alone."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        sync_folder(folder.parent)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        with self._faults(f"object {key} cannot be read"):
            try:
                yield self._path(key)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NotFound(f"there is no object {key} in {self.describe()}") from None

    def _faults(self, what_failed: str) -> contextlib.AbstractContextManager[None]:
        return disk_faults(what_failed, self._folder)

    def _exists_already(self, key: str) -> AlreadyExists:
        return AlreadyExists(f"object {key} exists already in {self.describe()}")


def _write_durably(path: Path, data: bytes | memoryview | Path) -> None:
    """Write a new file, and have its bytes on the disk when this returns."""
    path.touch(mode=0o600, exist_ok=False)
    written = 0
    if isinstance(data, memoryview):
        data = data.cast("B")
        written = _write_past_the_cache(path, data)
        data = data[written:]
    with path.open("r+b", buffering=0) as file:
        file.seek(written)
        for portion in _portions(data):
            rest = memoryview(portion)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def _write_past_the_cache(path: Path, data: memoryview) -> int:
    """Write what can be written without a copy in the page cache: a large buffer's blocks; how many bytes that is.

    The cache's memory must be found first, which on a virtual machine that has not used it for a while takes longer
    than the writing (O_DIRECT, open(2)). Not every file system has it, nor blocks of this size: then it is 0, or less.
    """
    end, written = len(data) - len(data) % _BLOCK_BYTES, 0
    if end < _LEAST_DIRECT_BYTES or data.readonly or _address(data) % _BLOCK_BYTES:
        return 0
    try:
        file = os.open(path, os.O_WRONLY | os.O_DIRECT)
        try:
            while written < end and written % _BLOCK_BYTES == 0:
                written += os.pwrite(file, data[written : min(end, written + _COPY_BYTES)], written)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    return written


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _portions(data: bytes | memoryview | Path) -> Iterator[bytes | memoryview]:
    if not isinstance(data, Path):
        yield data
        return
    with data.open("rb", buffering=0) as source:
        while portion := source.read(_COPY_BYTES):
            yield portion
