"""Opening a page store: locks, what kind of store it is, and the index.

A backend that is empty becomes a page store by an object that says so. One that has other objects, but not that one, is
something else, and is left alone. Packs that cannot be read are left out of the index, so that damage to one snapshot
does not keep the others from being served; what is in them is missing, and ``verify`` says so.
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import BinaryIO

import structlog

from geni_violin.core.errors import AlreadyExists, MachineFault, NotFound
from geni_violin.runtime.processes import sync_folder
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages import index_cache
from geni_violin.snapshot_server.pages.catalog import Catalog, add_from_backend
from geni_violin.snapshot_server.pages.pack_builder import PREFIX
from geni_violin.snapshot_server.records import disk_faults

FORMAT_KEY = "store.json"
FORMAT = {"format": "GENI-VIOLIN page store", "version": 1}
_INDEX = "index.bin"

_log = structlog.get_logger(__name__)


class Opened:
    """A backend and a local folder, both locked until :meth:`close`.

    :ivar catalog: all packs that can be read.
    :ivar stagings: a folder for stagings.
    :ivar records: a folder for what edges recorded.
    """

    def __init__(self, backend: ObjectBackend, folder: Path) -> None:
        self._backend = backend
        self._folder = folder
        self.catalog = Catalog()
        self.stagings = folder / "stagings"
        self.records = folder / "records"
        with contextlib.ExitStack() as opened:
            with disk_faults("the store cannot be opened", folder):
                for part in (self.stagings, self.records):
                    part.mkdir(parents=True, exist_ok=True)
                sync_folder(folder)
                opened.enter_context(_locked(folder))
            opened.callback(backend.close)
            opened.enter_context(backend.lock(f"process {os.getpid()} on {os.uname().nodename}"))
            _check_format(backend)
            self._load_index()
            self._locks = opened.pop_all()

    def close(self) -> None:
        """Keep the index, and let another server use both."""
        try:
            with contextlib.suppress(OSError):  # it is a copy
                index_cache.save(self.catalog, self._folder / _INDEX)
        finally:
            self._locks.close()

    def _load_index(self) -> None:
        keys = dict(self._backend.list(PREFIX))
        index_cache.load(self.catalog, self._folder / _INDEX, {key.removeprefix(PREFIX): keys[key] for key in keys})
        known = {pack.key for pack in self.catalog.packs.values()}
        for key, size in keys.items():
            if key not in known:
                try:
                    add_from_backend(self.catalog, self._backend, key, size)
                except NotFound:  # it is listed a while longer than it exists
                    continue
                except MachineFault as error:
                    _log.error("pack_left_out", pack=key, reason=str(error))


def _check_format(backend: ObjectBackend) -> None:
    where = backend.describe()
    try:
        found = json.loads(backend.get(FORMAT_KEY))
    except NotFound:
        if any(True for _ in backend.list()):
            hint = "choose an empty one; snapshots of an earlier release are read by that release only"
            raise MachineFault(f"{where} has objects, but none that makes it a page store", hint) from None
        with contextlib.suppress(AlreadyExists):
            backend.put(FORMAT_KEY, json.dumps(FORMAT).encode())
        return
    except (ValueError, RecursionError) as error:
        raise MachineFault(f"{FORMAT_KEY} in {where} cannot be read: {error}", "put it back from a backup") from error
    if found != FORMAT:
        raise MachineFault(f"{where} is {found}", f"this release knows {FORMAT}: use the one that wrote it")


def _locked(folder: Path) -> BinaryIO:
    """The folder's lock file, locked until it is closed or the process ends."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise MachineFault(f"another snapshot server uses {folder}", "stop it, or choose another folder") from error
    return file
