"""The edges' records of stagings, in a local folder, and the sealed channel states of snapshots, as objects.

::

    FOLDER/ID/VM.received, VM.sent   what a VM's edge recorded, while the snapshot is staged
    channels/ID/VM.channel           the channel state of a VM
    channels/ID/sealed.json          a Seal: the channel states are whole, and this is what they are

A snapshot is sealed if and only if it has a Seal, which is put last. Everything is whole or absent, and durable when
the method that wrote it returns. The caller sees to it that one method runs at a time.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from geni_violin.core.errors import AlreadyExists, Conflict, GeniViolinError, MachineFault, NotFound
from geni_violin.core.messages import ChannelSummary
from geni_violin.runtime.pcap import Frame, decode, encode
from geni_violin.runtime.processes import sync_folder
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.channels import Late, channel_of, late_of, parsed_macs
from geni_violin.snapshot_server.cut_clock import clock_at_stop_ns
from geni_violin.snapshot_server.names import RECEIVED, SENT
from geni_violin.snapshot_server.pages.documents import decode_document, encode_document
from geni_violin.snapshot_server.records import PARTIAL_SUFFIX, disk_faults, write_file

CHANNELS = "channels/"
_SEALED = "sealed.json"
_NAME = "seal"


@dataclass(frozen=True)
class StoredChannel:
    """A channel state that is durable: its size in bytes in the store, and its BLAKE3."""

    summary: ChannelSummary
    stored_bytes: int
    blake3: str


@dataclass(frozen=True)
class Seal:
    """All channel states of a snapshot, and the addresses by which they were put together."""

    macs: dict[str, str]
    channels: tuple[StoredChannel, ...]

    def frames(self) -> dict[str, int]:
        """How many frames the channel state of each VM has."""
        return {channel.summary.vm: channel.summary.frames for channel in self.channels}


class ChannelStates:
    """Records below a folder, which exists, and channel states in a backend."""

    def __init__(self, backend: ObjectBackend, folder: Path) -> None:
        self._backend = backend
        self._folder = folder

    def put(self, snapshot_id: str, vm: str, kind: str, data: bytes) -> None:
        """Keep a record; it replaces an earlier one.

        :raise Conflict: the snapshot is sealed, and the record is another one.
        """
        path = self._record(snapshot_id, vm, kind)
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
            data = _bytes_at(self._record(snapshot_id, vm, kind))
        return decode(data) if data is not None else []

    def seal(
        self, snapshot_id: str, vms: list[str], macs: dict[str, str], end_of_image: Callable[[str], bytes]
    ) -> Seal:
        """Put all channel states together, and then the seal. Once more gives the same seal.

        :param end_of_image: by VM, the end of its image, in which its clock is.
        :raise InvalidInput: the addresses are not those of the VMs.
        :raise Conflict: they are sealed with other addresses.
        """
        addresses = parsed_macs(macs, vms)
        seal = self.seal_of(snapshot_id)
        if seal is None:
            late = {vm: self._late(snapshot_id, vm, end_of_image) for vm in vms}
            stored = [self._put_channel(snapshot_id, vm, late, addresses) for vm in vms]
            seal = Seal(macs, tuple(stored))
            self._backend.put(_seal_key(snapshot_id), encode_document(_NAME, seal))
        elif seal.macs != macs:
            raise Conflict(f"the channel state of snapshot {snapshot_id} is sealed with other addresses")
        return seal

    def _late(self, snapshot_id: str, vm: str, end_of_image: Callable[[str], bytes]) -> Late:
        sent = self.frames(snapshot_id, vm, SENT)
        return late_of(vm, sent, clock_at_stop_ns(end_of_image(vm)) if sent else None)

    def _put_channel(self, snapshot_id: str, vm: str, late: dict[str, Late], macs: dict[str, bytes]) -> StoredChannel:
        frames, late_frames = channel_of(vm, self.frames(snapshot_id, vm, RECEIVED), late, macs)
        size = sum(len(frame.data) for frame in frames)
        own = late[vm]
        data = encode(frames)
        self._put_anew(_key(snapshot_id, vm), data)
        summary = ChannelSummary(vm, len(frames), size, late_frames, own.undecided_frames, own.note)
        return StoredChannel(summary, len(data), blake3(data).hexdigest())

    def seal_of(self, snapshot_id: str) -> Seal | None:
        """The seal, if the snapshot has one."""
        key = _seal_key(snapshot_id)
        try:
            data = self._backend.get(key)
        except NotFound:
            return None
        return decode_document(Seal, _NAME, data, f"the seal {key}")

    def read(self, snapshot_id: str, vm: str) -> bytes:
        """The sealed channel state of a VM, in the pcap format.

        :raise MachineFault: there is none, or it is damaged.
        """
        seal = self.seal_of(snapshot_id)
        words = f"there is no object {_seal_key(snapshot_id)}"
        for channel in seal.channels if seal else ():
            if channel.summary.vm == vm:
                data, words = self._checked(snapshot_id, channel)
                if not words:
                    return data
        raise MachineFault(f"the channel state of VM {vm} is damaged: {words}", "do not restore this snapshot")

    def damages(self, snapshot_id: str, frames: dict[str, int]) -> list[str]:
        """What is wrong with the channel states of a snapshot.

        :param frames: by VM name, how many its channel state should have; a snapshot that was not sealed has none.
        """
        try:
            seal = self.seal_of(snapshot_id)
        except MachineFault as error:
            return [error.message]
        if seal is None:
            return [f"there is no object {_seal_key(snapshot_id)}"] if any(frames.values()) else []
        found = []
        for channel in seal.channels:
            _data, words = self._checked(snapshot_id, channel)
            if words:
                found.append(f"channel state of VM {channel.summary.vm}: {words}")
        return found

    def settle(self, snapshot_id: str) -> None:
        """The snapshot is published: its records are no longer needed, nor is anything of one that was not sealed."""
        self._remove_records(snapshot_id)
        if not self._backend.exists(_seal_key(snapshot_id)):
            self._remove_objects(snapshot_id)

    def remove(self, snapshot_id: str) -> None:
        """Have nothing of a snapshot; it is fine if there is nothing."""
        self._remove_records(snapshot_id)
        self._remove_objects(snapshot_id)

    def ids(self) -> set[str]:
        """Of which snapshots there are objects."""
        return {key.split("/")[1] for key, _size in self._backend.list(CHANNELS)}

    def recover(self, published: set[str], staged: set[str]) -> None:
        """After a crash: what belongs to no snapshot goes, and what a published one no longer needs."""
        for snapshot_id in self.ids() - published - staged:
            self.remove(snapshot_id)
        for path in list(self._folder.rglob(f"*{PARTIAL_SUFFIX}")):
            if path.is_file():  # an id may end like that, and then so does its folder
                path.unlink()
        for folder in list(self._folder.iterdir()):
            if folder.name in published:
                self.settle(folder.name)
            elif folder.name not in staged:
                self._remove_records(folder.name)
        sync_folder(self._folder)

    def _put_anew(self, key: str, data: bytes) -> None:
        """Put an object of a snapshot that is not sealed yet, in the place of one that a crash left."""
        try:
            self._backend.put(key, data)
        except AlreadyExists:
            self._backend.delete(key)
            self._backend.put(key, data)

    def _checked(self, snapshot_id: str, channel: StoredChannel) -> tuple[bytes, str]:
        """A channel state, and what is wrong with it."""
        key = _key(snapshot_id, channel.summary.vm)
        try:
            data = self._backend.get(key)
        except GeniViolinError as error:
            return b"", error.message
        if len(data) != channel.stored_bytes:
            return b"", f"{key} has {len(data)} bytes instead of {channel.stored_bytes}"
        if (found := blake3(data).hexdigest()) != channel.blake3:
            return b"", f"{key} has BLAKE3 {found} instead of {channel.blake3}"
        return data, ""

    def _remove_records(self, snapshot_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder / snapshot_id)
            sync_folder(self._folder)

    def _remove_objects(self, snapshot_id: str) -> None:
        seal_key = _seal_key(snapshot_id)
        keys = [key for key, _size in self._backend.list(f"{CHANNELS}{snapshot_id}/")]
        for key in sorted(keys, key=lambda key: key != seal_key):  # the seal first: a sealed snapshot is whole
            self._backend.delete(key)

    def _record(self, snapshot_id: str, vm: str, kind: str) -> Path:
        return self._folder / snapshot_id / f"{vm}.{kind}"


def _key(snapshot_id: str, vm: str) -> str:
    return f"{CHANNELS}{snapshot_id}/{vm}.channel"


def _seal_key(snapshot_id: str) -> str:
    return f"{CHANNELS}{snapshot_id}/{_SEALED}"


def _bytes_at(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
