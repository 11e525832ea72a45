"""The edges' records and the sealed channel state of snapshots, in a folder.

::

    FOLDER/ID/VM.received, VM.sent   what a VM's edge recorded, while the snapshot is staged
    FOLDER/ID/VM.channel             the channel state of a VM
    FOLDER/ID/sealed.json            a Seal: the channel states are whole, and this is what they are

A snapshot is sealed if and only if it has a Seal, which is written last. Every file is whole or absent, and durable
when the method that wrote it returns. The caller sees to it that one method runs at a time.
"""

import contextlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from geni_violin.core.errors import Conflict, MachineFault
from geni_violin.core.messages import ChannelSummary
from geni_violin.runtime.pcap import Frame, decode, encode
from geni_violin.runtime.processes import sync_folder
from geni_violin.snapshot_server.names import RECEIVED, SENT
from geni_violin.snapshot_server.records import (
    RECORD_SUFFIX,
    damage,
    disk_faults,
    read_record,
    remove_file,
    write_file,
    write_record,
)

_CHANNEL = "channel"
_SEAL = f"sealed{RECORD_SUFFIX}"


@dataclass(frozen=True)
class StoredChannel:
    """A channel state that is durable: its size in bytes on the disk, and its BLAKE3."""

    summary: ChannelSummary
    stored_bytes: int
    blake3: str


@dataclass(frozen=True)
class Seal:
    """All channel states of a snapshot, and the addresses by which they were put together."""

    macs: dict[str, str]
    channels: tuple[StoredChannel, ...]


class ChannelFiles:
    """Records and channel states below a folder, which exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, snapshot_id: str, vm: str, kind: str, data: bytes) -> None:
        """Keep a record; it replaces an earlier one.

        :raise Conflict: the snapshot is sealed, and the record is another one.
        """
        path = self._path(snapshot_id, vm, kind)
        if self.seal_of(snapshot_id) is not None:
            if _bytes_at(path) != data:
                raise Conflict(f"the channel state of snapshot {snapshot_id} is sealed", "bring records before that")
            return
        with disk_faults(f"what VM {vm} {kind} cannot be kept", self._folder):
            path.parent.mkdir(exist_ok=True)
            sync_folder(self._folder)
        write_file(path, data)

    def frames(self, snapshot_id: str, vm: str, kind: str) -> list[Frame]:
        """A record's frames; none if there is no record."""
        with disk_faults(f"what VM {vm} {kind} cannot be read", self._folder):
            data = _bytes_at(self._path(snapshot_id, vm, kind))
        return decode(data) if data is not None else []

    def seal(
        self, snapshot_id: str, macs: dict[str, str], channels: Iterable[tuple[ChannelSummary, list[Frame]]]
    ) -> Seal:
        """Write all channel states, then the seal."""
        with disk_faults(f"the channel state of snapshot {snapshot_id} cannot be kept", self._folder):
            (self._folder / snapshot_id).mkdir(exist_ok=True)
            sync_folder(self._folder)
        stored = []
        for summary, frames in channels:
            data = encode(frames)
            write_file(self._path(snapshot_id, summary.vm, _CHANNEL), data)
            stored.append(StoredChannel(summary, len(data), blake3(data).hexdigest()))
        seal = Seal(macs, tuple(stored))
        write_record(self._seal_path(snapshot_id), seal)
        return seal

    def seal_of(self, snapshot_id: str) -> Seal | None:
        """The seal, if the snapshot has one."""
        return read_record(Seal, self._seal_path(snapshot_id))

    def read(self, snapshot_id: str, vm: str) -> bytes:
        """The sealed channel state of a VM, in the pcap format.

        :raise MachineFault: there is none, or it is damaged.
        """
        seal = self.seal_of(snapshot_id)
        words = f"{self._seal_path(snapshot_id)}: No such file or directory"
        for channel in seal.channels if seal else ():
            if channel.summary.vm == vm:
                path = self._path(snapshot_id, vm, _CHANNEL)
                if not (words := damage(path, channel.stored_bytes, channel.blake3)):
                    return path.read_bytes()
        raise MachineFault(f"the channel state of VM {vm} is damaged: {words}", "do not restore this snapshot")

    def damages(self, snapshot_id: str, frames: dict[str, int]) -> list[str]:
        """What is wrong with the channel states of a snapshot.

        :param frames: by VM name, how many its channel state should have; a snapshot that was not sealed has none.
        """
        seal = self.seal_of(snapshot_id)
        if seal is None:
            return [f"{self._seal_path(snapshot_id)}: No such file or directory"] if any(frames.values()) else []
        found = []
        for channel in seal.channels:
            path = self._path(snapshot_id, channel.summary.vm, _CHANNEL)
            if words := damage(path, channel.stored_bytes, channel.blake3):
                found.append(f"channel state of VM {channel.summary.vm}: {words}")
        return found

    def settle(self, snapshot_id: str) -> None:
        """The snapshot is published: its records are no longer needed, nor is anything of one that was not sealed."""
        if not self._seal_path(snapshot_id).exists():
            self.remove(snapshot_id)
            return
        for path in list((self._folder / snapshot_id).iterdir()):
            if path.suffix in (f".{RECEIVED}", f".{SENT}"):
                remove_file(path)

    def remove(self, snapshot_id: str) -> None:
        """Have nothing of a snapshot; it is fine if there is nothing."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder / snapshot_id)

    def recover(self, published: set[str], staged: set[str]) -> None:
        """After a crash: what belongs to no snapshot goes, and what a published one no longer needs."""
        for folder in list(self._folder.iterdir()):
            if folder.name in published:
                self.settle(folder.name)
            elif folder.name not in staged:
                self.remove(folder.name)
        sync_folder(self._folder)

    def _seal_path(self, snapshot_id: str) -> Path:
        return self._folder / snapshot_id / _SEAL

    def _path(self, snapshot_id: str, vm: str, kind: str) -> Path:
        return self._folder / snapshot_id / f"{vm}.{kind}"


def _bytes_at(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
