"""A snapshot as a stream of bytes, in any form, made while it goes out.

A thread makes it and waits while :data:`QUEUE_PIECES` pieces wait to be taken: that bounds the memory, and it ends when
nobody takes them any more.
"""

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from geni_violin.core.errors import Conflict, InvalidInput, NotFound
from geni_violin.core.messages import Manifest
from geni_violin.snapshot_server.pages.page_store import PageStore
from geni_violin.snapshot_server.store import ImageStore
from geni_violin.snapshot_server.stream.libvirt_file import SavedDomain, encode_header
from geni_violin.snapshot_server.travel.archive_out import ArchiveWriter
from geni_violin.snapshot_server.travel.copying import copy_snapshot
from geni_violin.snapshot_server.travel.domain_xml import domain_xml, machine_of

ARCHIVE, LIBVIRT, QEMU = "archive", "libvirt", "qemu"
FORMATS = (ARCHIVE, LIBVIRT, QEMU)
PIECE_BYTES = 1 << 20
QUEUE_PIECES = 8

Emit = Callable[[bytes | memoryview], None]


class Export:
    """Bytes on their way out. :meth:`take` and :meth:`close` block.

    :param produce: gives all bytes to the function that it is called with; that raises when nobody wants them.
    """

    def __init__(self, produce: Callable[[Emit], None]) -> None:
        self._pieces: queue.Queue[bytes | Exception] = queue.Queue(QUEUE_PIECES)
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(produce,), name="export", daemon=True)
        self._thread.start()

    def take(self) -> bytes:
        """The next piece; empty at the end.

        :raise GeniViolinError: what kept the rest from being made.
        """
        piece = self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        """Want no more of it; its thread has ended when this returns."""
        self._unwanted.set()
        while self._thread.is_alive():
            try:
                self._pieces.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _run(self, produce: Callable[[Emit], None]) -> None:
        try:
            produce(self._emit)
        except Exception as error:
            self._pieces.put(error)
        else:
            self._pieces.put(b"")

    def _emit(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            if self._unwanted.is_set():
                raise Conflict("nobody wants the export any more")
            # A copy, because whoever made the bytes may use their place again.
            self._pieces.put(bytes(view[start : start + PIECE_BYTES]))


def export_snapshot(store: ImageStore, id_or_name: str, form: str, vm: str, scratch: Path) -> Export:
    """Begin to export a snapshot.

    :param vm: which VM, for the forms of one VM; may be empty if the snapshot has only one.
    :param scratch: a folder for what is small.
    :raise NotFound: no such snapshot or VM.
    :raise InvalidInput: no such form, or it needs a VM.
    """
    manifest = store.snapshot(id_or_name)
    if form not in FORMATS:
        raise InvalidInput(f"a snapshot has no form {form!r}", f"expected {', '.join(FORMATS)}")
    _refuse_disks(manifest)
    if form == ARCHIVE:
        if vm:
            raise InvalidInput("an archive has all VMs of a snapshot", f"choose a VM for {LIBVIRT} and {QEMU} only")
        return Export(lambda emit: write_archive(store, manifest, emit, scratch))
    chosen = _chosen(manifest, vm)
    return Export(lambda emit: _write_stream(store, manifest, chosen, form, emit))


def write_archive(store: ImageStore, manifest: Manifest, emit: Emit, scratch: Path) -> None:
    """Give out an archive of a snapshot."""
    with tempfile.TemporaryDirectory(prefix="export-", dir=scratch) as folder:
        archive = ArchiveWriter(emit, Path(folder) / "objects")
        target = PageStore(archive, Path(folder) / "state")
        try:
            copy_snapshot(store, target, manifest)
        finally:
            target.close()
        archive.finish()


def _write_stream(store: ImageStore, manifest: Manifest, vm: str, form: str, emit: Emit) -> None:
    with store.open_image(manifest.id, vm) as reader:
        chunks = reader.chunks()
        first = _at_least(chunks, PIECE_BYTES)
        if form == LIBVIRT:
            xml = domain_xml(manifest, vm, machine_of(first))
            emit(encode_header(SavedDomain(xml, was_running=True)))
        emit(first)
        for chunk in chunks:
            emit(chunk)


def _at_least(chunks: Iterator[bytes | memoryview], count: int) -> bytes:
    """The first chunks, together so many bytes, or all."""
    parts: list[bytes | memoryview] = []
    while sum(map(len, parts)) < count and (chunk := next(chunks, None)) is not None:
        parts.append(chunk)
    return b"".join(parts)


def _chosen(manifest: Manifest, vm: str) -> str:
    names = [image.name for image in manifest.vms]
    if not vm and len(names) == 1:
        return names[0]
    if not vm:
        raise InvalidInput(f"snapshot {manifest.name} has {len(names)} VMs", f"choose one of {', '.join(names)}")
    if vm not in names:
        raise NotFound(f"snapshot {manifest.name} has no VM {vm!r}", f"it has {', '.join(names)}")
    return vm


def _refuse_disks(manifest: Manifest) -> None:
    for vm in manifest.slice.vms:
        if vm.image.disks:
            raise Conflict(f"VM {vm.name} has disks, which this release neither snapshots nor exports")
