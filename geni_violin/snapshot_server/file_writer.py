"""How one image comes into a folder; ``file_store`` says why in this order."""

import contextlib
import json
import os
from pathlib import Path

from blake3 import blake3

from geni_violin.runtime.processes import sync_folder, write_atomically
from geni_violin.runtime.wire import encode
from geni_violin.snapshot_server.records import PARTIAL_SUFFIX, disk_faults, record_path
from geni_violin.snapshot_server.store import StoredImage

STREAM_SUFFIX = ".stream"


class FileWriter:
    """Receives one image; see the module's theory for the order of its steps."""

    def __init__(self, folder: Path, vm: str) -> None:
        self._vm = vm
        self._record_path = record_path(folder, vm)
        self._final_path = folder / f"{vm}{STREAM_SUFFIX}"
        self._partial_path = folder / f"{vm}{STREAM_SUFFIX}{PARTIAL_SUFFIX}"
        self._received_bytes = 0
        self._hash = blake3()
        self._file = self._partial_path.open("xb", buffering=0)

    def write(self, data: memoryview) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageWriter`."""
        rest = data
        with disk_faults(
            f"VM {self._vm}'s image broke off after {self._received_bytes} bytes", self._final_path.parent
        ):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(data)
        self._received_bytes += len(data)

    def finish(self) -> StoredImage:
        """See :class:`~geni_violin.snapshot_server.store.ImageWriter`."""
        image = StoredImage(self._vm, self._received_bytes, self._received_bytes, self._hash.hexdigest())
        with disk_faults(f"VM {self._vm}'s image could not be made durable", self._final_path.parent):
            os.fsync(self._file.fileno())
            self._file.close()
            write_atomically(self._record_path, json.dumps(encode(image)).encode())
            self._partial_path.replace(self._final_path)
            sync_folder(self._final_path.parent)
        return image

    def abort(self) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageWriter`."""
        record_partial = self._record_path.with_name(self._record_path.name + PARTIAL_SUFFIX)
        with contextlib.suppress(OSError):
            self._file.close()
        # A removal that fails leaves rubbish for the next start, and nothing that could be taken for an image.
        for path in (self._final_path, self._partial_path, self._record_path, record_partial):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
