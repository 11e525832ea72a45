"""A store that keeps one file per VM in a folder.

::

    FOLDER/lock                         held by the server that uses the folder
    FOLDER/stagings/ID.json             a StageRequest
    FOLDER/images/ID/VM.stream.partial  an image that is being received
    FOLDER/images/ID/VM.json            a StoredImage: size and checksum
    FOLDER/images/ID/VM.stream          an image that is durable
    FOLDER/channels/ID/...              records of edges, and channel states (channel_files)
    FOLDER/manifests/ID.json            a Manifest: the snapshot exists

Each change ends in one rename or one removal that decides it, and everything that it depends on was fsynced before:

* an image: fsync the partial file; write VM.json; *rename to VM.stream*; fsync the folder;
* channel states: write each; *write their seal*;
* publishing: *write ID.json in manifests* (to a temporary name, fsync, rename, fsync the folder); remove the staging,
  and what its edges recorded;
* discarding: *remove the staging*, then its images and channel states; deleting: *remove the manifest*, then these.

So at start, partial files, images and channel states without either record, and records of what was published since can
go.
"""

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from geni_violin.core.errors import AlreadyExists, Conflict, InvalidInput, MachineFault, NoSpace, NotFound
from geni_violin.core.messages import ChannelSummary, Manifest, SealChannels, StageRequest, VmImage
from geni_violin.runtime import pcap
from geni_violin.runtime.processes import sync_folder
from geni_violin.snapshot_server.channel_files import ChannelFiles, Seal
from geni_violin.snapshot_server.channels import Late, channel_of, late_of, parsed_macs
from geni_violin.snapshot_server.cut_clock import TAIL_BYTES, clock_at_stop_ns
from geni_violin.snapshot_server.file_writer import STREAM_SUFFIX, FileWriter
from geni_violin.snapshot_server.names import (
    RECEIVED,
    SENT,
    check_record,
    check_stage_request,
    checked_identifier,
    is_identifier,
)
from geni_violin.snapshot_server.records import (
    PARTIAL_SUFFIX,
    damage,
    disk_faults,
    read_record,
    record_names,
    record_path,
    remove_file,
    write_record,
)
from geni_violin.snapshot_server.store import (
    MANIFEST_VERSION,
    ImageWriter,
    StoredImage,
    check_publishable,
)


class FileStore:
    """An :class:`~geni_violin.snapshot_server.store.ImageStore` in a folder, which is made if need be.

    :raise MachineFault: the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stagings = folder / "stagings"
        self._images = folder / "images"
        self._manifests = folder / "manifests"
        self._channel_folder = folder / "channels"
        self._channels = ChannelFiles(self._channel_folder)
        self._mutex = threading.Lock()  # held for records only, never while an image is read or written
        self._channel_mutex = threading.Lock()  # for all of self._channels; taken after the other one
        with disk_faults("the store cannot be opened", folder):
            for part in (self._stagings, self._images, self._channel_folder, self._manifests):
                part.mkdir(parents=True, exist_ok=True)
            sync_folder(folder)
            self._lock_file = _locked(folder)
            self._recover()

    def free_bytes(self) -> int:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        with disk_faults("the free space cannot be told", self._folder):
            figures = os.statvfs(self._folder)
        return figures.f_bavail * figures.f_frsize

    def stage(self, request: StageRequest) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        check_stage_request(request)
        with self._mutex:
            staged = read_record(StageRequest, record_path(self._stagings, request.snapshot_id))
            if staged == request:
                return
            if staged is not None:
                raise Conflict(f"snapshot {request.snapshot_id} is staged with another name or other images")
            self._refuse_taken_name(request)
            self._refuse_without_room(f"snapshot {request.name}", sum(image.expected_bytes for image in request.images))
            write_record(record_path(self._stagings, request.snapshot_id), request)

    def staging(self, snapshot_id: str) -> StageRequest:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        checked_identifier(snapshot_id, "snapshot id")
        staged = read_record(StageRequest, record_path(self._stagings, snapshot_id))
        if staged is None:
            raise NotFound(f"no snapshot {snapshot_id} is staged")
        return staged

    def open_writer(self, snapshot_id: str, vm: str) -> ImageWriter:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        with self._mutex:
            self._refuse_unknown_vm(snapshot_id, vm)
            if self.stored_image(snapshot_id, vm) is not None:
                raise Conflict(f"the image of VM {vm} is there already")
            with disk_faults(f"VM {vm}'s image cannot be begun", self._folder):
                (self._images / snapshot_id).mkdir(exist_ok=True)
                sync_folder(self._images)
                try:
                    return FileWriter(self._images / snapshot_id, vm)
                except FileExistsError as error:
                    raise Conflict(f"the image of VM {vm} is being received already") from error

    def stored_image(self, snapshot_id: str, vm: str) -> StoredImage | None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        if not self._stream(snapshot_id, vm).exists():
            return None
        return read_record(StoredImage, record_path(self._images / snapshot_id, vm))

    def put_record(self, snapshot_id: str, vm: str, kind: str, data: bytes) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        check_record(vm, kind, data)
        with self._mutex:
            self._refuse_unknown_vm(snapshot_id, vm)
            self._refuse_without_room(f"what VM {vm} {kind}", 2 * len(data))  # once more in the channel state
        with self._channel_mutex:
            self.staging(snapshot_id)
            self._channels.put(snapshot_id, vm, kind, data)

    def seal_channels(self, snapshot_id: str, request: SealChannels) -> list[ChannelSummary]:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        with self._channel_mutex:
            vms = [image.vm for image in self.staging(snapshot_id).images]
            macs = parsed_macs(request.macs, vms)
            seal = self._channels.seal_of(snapshot_id)
            if seal is None:
                late = {vm: self._late(snapshot_id, vm) for vm in vms}
                seal = self._channels.seal(snapshot_id, request.macs, self._put_together(snapshot_id, late, macs))
            elif seal.macs != request.macs:
                raise Conflict(f"the channel state of snapshot {snapshot_id} is sealed with other addresses")
        return [channel.summary for channel in seal.channels]

    def _late(self, snapshot_id: str, vm: str) -> Late:
        if self.stored_image(snapshot_id, vm) is None:
            raise Conflict(f"the image of VM {vm} is not durable", "seal when each image's state is durable")
        sent = self._channels.frames(snapshot_id, vm, SENT)
        return late_of(vm, sent, clock_at_stop_ns(self._end_of_image(snapshot_id, vm)) if sent else None)

    def _end_of_image(self, snapshot_id: str, vm: str) -> bytes:
        path = self._stream(snapshot_id, vm)
        with disk_faults(f"the image of VM {vm} cannot be read", self._folder), path.open("rb") as file:
            file.seek(-min(TAIL_BYTES, path.stat().st_size), os.SEEK_END)
            return file.read()

    def _put_together(
        self, snapshot_id: str, late: dict[str, Late], macs: dict[str, bytes]
    ) -> Iterator[tuple[ChannelSummary, list[pcap.Frame]]]:
        for vm, own in late.items():
            frames, late_frames = channel_of(vm, self._channels.frames(snapshot_id, vm, RECEIVED), late, macs)
            size = sum(len(frame.data) for frame in frames)
            yield ChannelSummary(vm, len(frames), size, late_frames, own.undecided_frames, own.note), frames

    def discard(self, snapshot_id: str) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        checked_identifier(snapshot_id, "snapshot id")
        with self._mutex, disk_faults(f"staging {snapshot_id} cannot be discarded", self._folder):
            if record_path(self._manifests, snapshot_id).exists():
                raise Conflict(f"snapshot {snapshot_id} is published", "delete the snapshot instead")
            remove_file(record_path(self._stagings, snapshot_id))
            self._remove_contents(snapshot_id)

    def publish(self, manifest: Manifest) -> Manifest:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        checked_identifier(manifest.id, "snapshot id")
        if manifest.version != MANIFEST_VERSION:
            raise InvalidInput(f"the manifest is of version {manifest.version}", f"expected {MANIFEST_VERSION}")
        with self._mutex, self._channel_mutex:
            published = self._manifest(manifest.id)
            if published is None:
                self._publish_first(manifest)
            elif published != manifest:
                raise Conflict(f"snapshot {manifest.id} is published with another manifest")
        return manifest

    def _publish_first(self, manifest: Manifest) -> None:
        staging = self.staging(manifest.id)
        stored = {image.vm: self.stored_image(manifest.id, image.vm) for image in staging.images}
        check_publishable(manifest, staging, stored, _frames(self._channels.seal_of(manifest.id)))
        # The commit point. All that the manifest speaks of was made durable by FileWriter.finish and ChannelFiles.seal.
        path = record_path(self._manifests, manifest.id)
        try:
            write_record(path, manifest)
            with disk_faults(f"the staging of snapshot {manifest.id} cannot be removed", self._folder):
                remove_file(record_path(self._stagings, manifest.id))
                self._channels.settle(manifest.id)
        except NoSpace as error:
            if not path.exists():
                raise
            # The manifest has its name already: "no space" would be taken for a certain no, which it is not.
            raise MachineFault(f"snapshot {manifest.id} is published but not yet durable: {error}") from error

    def snapshots(self) -> list[Manifest]:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        manifests = (self._manifest(name) for name in record_names(self._manifests))
        return sorted(
            (manifest for manifest in manifests if manifest is not None),
            key=lambda manifest: (manifest.created_at, manifest.id),
        )

    def snapshot(self, id_or_name: str) -> Manifest:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        found = self._manifest(id_or_name) if is_identifier(id_or_name) else None
        if found is None:
            found = next((manifest for manifest in self.snapshots() if manifest.name == id_or_name), None)
        if found is None:
            raise NotFound(f"there is no snapshot {id_or_name!r}", "geni-violin snapshot list shows those that exist")
        return found

    def open_image(self, snapshot_id: str, vm: str) -> BinaryIO:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        manifest, image = self._published_image(snapshot_id, vm)
        path = self._stream(manifest.id, vm)
        with disk_faults(f"the image of VM {vm} cannot be read", self._folder):
            file = path.open("rb", buffering=0)
            if (size := os.fstat(file.fileno()).st_size) == image.stored_bytes:
                return file
            file.close()
        raise MachineFault(f"the image of VM {vm} is damaged: {path} has {size} bytes instead of {image.stored_bytes}")

    def channels(self, id_or_name: str) -> list[ChannelSummary]:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        manifest = self.snapshot(id_or_name)
        with self._channel_mutex:
            seal = self._channels.seal_of(manifest.id)
        return [channel.summary for channel in seal.channels] if seal else []

    def channel(self, id_or_name: str, vm: str) -> bytes:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        manifest, image = self._published_image(id_or_name, vm)
        with self._channel_mutex:
            return self._channels.read(manifest.id, vm) if image.frames_in_transit else pcap.encode([])

    def verify(self, id_or_name: str) -> Manifest:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        manifest = self.snapshot(id_or_name)
        damages = [
            f"VM {vm.name}: {words}"
            for vm in manifest.vms
            if (words := damage(self._stream(manifest.id, vm.name), vm.stored_bytes, vm.blake3))
        ]
        with self._channel_mutex:
            damages += self._channels.damages(manifest.id, {vm.name: vm.frames_in_transit for vm in manifest.vms})
        if damages:
            raise MachineFault(f"snapshot {manifest.name} is damaged: {'; '.join(damages)}", "do not restore it")
        return manifest

    def delete(self, id_or_name: str) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        with self._mutex, disk_faults(f"snapshot {id_or_name} cannot be deleted", self._folder):
            snapshot_id = self.snapshot(id_or_name).id
            # A staging outlives publishing only if its removal failed. It goes first, else it would be staged again.
            remove_file(record_path(self._stagings, snapshot_id))
            remove_file(record_path(self._manifests, snapshot_id))
            self._remove_contents(snapshot_id)

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        self._lock_file.close()

    # --- paths and records --------------------------------------------------------------------------------------------

    def _stream(self, snapshot_id: str, vm: str) -> Path:
        folder = self._images / checked_identifier(snapshot_id, "snapshot id")
        return folder / f"{checked_identifier(vm, 'VM name')}{STREAM_SUFFIX}"

    def _manifest(self, snapshot_id: str) -> Manifest | None:
        manifest = read_record(Manifest, record_path(self._manifests, snapshot_id))
        if manifest is not None and manifest.version != MANIFEST_VERSION:
            words = f"the manifest of snapshot {snapshot_id} is of version {manifest.version}"
            raise MachineFault(words, f"this release knows version {MANIFEST_VERSION}: use the one that wrote it")
        return manifest

    def _published_image(self, id_or_name: str, vm: str) -> tuple[Manifest, VmImage]:
        manifest = self.snapshot(id_or_name)
        for image in manifest.vms:
            if image.name == vm:
                return manifest, image
        raise NotFound(f"snapshot {manifest.name} has no VM {vm!r}")

    def _stagings_now(self) -> list[StageRequest]:
        found = (read_record(StageRequest, record_path(self._stagings, name)) for name in record_names(self._stagings))
        return [staged for staged in found if staged is not None]

    def _remove_contents(self, snapshot_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._images / snapshot_id)
        with self._channel_mutex:
            self._channels.remove(snapshot_id)

    # --- what is refused ----------------------------------------------------------------------------------------------

    def _refuse_unknown_vm(self, snapshot_id: str, vm: str) -> None:
        if vm not in {image.vm for image in self.staging(snapshot_id).images}:
            raise NotFound(f"no image of VM {vm} is expected in snapshot {snapshot_id}")

    def _refuse_taken_name(self, request: StageRequest) -> None:
        taken = {text: "exists" for manifest in self.snapshots() for text in (manifest.id, manifest.name)}
        for staged in self._stagings_now():
            taken |= {staged.snapshot_id: "is being taken", staged.name: "is being taken"}
        for text in (request.name, request.snapshot_id):
            if text in taken:
                raise AlreadyExists(f"a snapshot {text!r} {taken[text]} already", "choose another name")

    def _refuse_without_room(self, what: str, needed_bytes: int) -> None:
        reserved = sum(self._outstanding_bytes(staged) for staged in self._stagings_now())
        free = self.free_bytes()
        if needed_bytes > free - reserved:
            figures = f"it may need {needed_bytes} bytes, {free} are free, {reserved} of them reserved by snapshots"
            hint = f"free space in {self._folder}, or delete snapshots that are no longer needed"
            raise NoSpace(f"no room for {what}: {figures}", hint)

    def _outstanding_bytes(self, staged: StageRequest) -> int:
        """How many bytes may still come for the images of a staging."""
        outstanding = 0
        for image in staged.images:
            final = self._stream(staged.snapshot_id, image.vm)
            if not final.exists():
                outstanding += image.expected_bytes - _size(final.with_name(final.name + PARTIAL_SUFFIX))
        return outstanding

    # --- start --------------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Remove what a crash left; see the module's theory."""
        for path in self._folder.rglob(f"*{PARTIAL_SUFFIX}"):
            if path.is_file():  # an id may end like that, and then so does its folder
                path.unlink()
        published = set(record_names(self._manifests))
        for name in published:
            record_path(self._stagings, name).unlink(missing_ok=True)
        staged = set(record_names(self._stagings))
        for folder in self._images.iterdir():
            if folder.name not in published | staged:
                shutil.rmtree(folder)
        self._channels.recover(published, staged)
        sync_folder(self._stagings)
        sync_folder(self._images)


def _frames(seal: Seal | None) -> dict[str, int]:
    """How many frames the sealed channel states have, by VM name."""
    return {channel.summary.vm: channel.summary.frames for channel in seal.channels} if seal else {}


def _locked(folder: Path) -> BinaryIO:
    """The folder's lock file, locked until it is closed or the process ends."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise MachineFault(f"another snapshot server uses {folder}", "stop it, or choose another folder") from error
    return file


def _size(path: Path) -> int:
    """A file's size in bytes, 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
