"""What any store of images can do, and when a manifest may be published.

The rest of the server knows only :class:`ImageStore`. Every method may block on the disk, so none is called from the
event loop; all may be called from several threads at a time. What must hold for every store:

* an image is *stored* only when its bytes and its checksum survive a power cut;
* a snapshot is listed if and only if its manifest was published, and then all its images are stored, and its channel
  states are those that were sealed, or it has none;
* opening a store again after a crash removes whatever is neither listed nor staged, but for parts that images share:
  those go with :meth:`ImageStore.free_leftovers`, which is for once after each start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from geni_violin.core.errors import Conflict
from geni_violin.core.messages import ChannelSummary, Manifest, SealChannels, StageRequest

MANIFEST_VERSION = 1
"""The form of manifests that this release writes, and the only one that it reads."""


@dataclass(frozen=True)
class StoredImage:
    """An image that is durable.

    ``stored_bytes`` is what it added to the store, ``blake3`` the root of the checksums of all that it consists of.
    ``note`` is what people should know of it; mostly empty.
    """

    vm: str
    received_bytes: int
    stored_bytes: int
    blake3: str
    note: str = ""


class ImageWriter(Protocol):
    """One image on its way in. Used by one thread at a time."""

    def write(self, data: memoryview) -> None:
        """Append; ``data`` may be reused when this returns.

        :raise NoSpace: the disk is full.
        :raise MachineFault: the disk failed in another way.
        """

    def finish(self) -> StoredImage:
        """Make the image durable. After an error the image is not stored, and :meth:`abort` is due.

        :raise NoSpace: the disk is full.
        :raise MachineFault: the disk failed in another way.
        """

    def abort(self) -> None:
        """Remove whatever was written; at most once, and never after :meth:`finish` succeeded."""


class ImageReader(Protocol):
    """One image on its way out. Used by one thread at a time."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """A stream that QEMU loads to the state that was stored: the one received, or an equivalent one.

        Each chunk stays as it is for as long as it is kept.

        :raise MachineFault: part of the image is damaged, and nothing of that part was given out.
        """

    def close(self) -> None:
        """Let go of the image; at most once, and of no iterator in the middle of a step."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ImageStore(Protocol):
    """Stagings, images and published snapshots."""

    def free_bytes(self) -> int | None:
        """How many bytes of images there is room for, what is reserved by stagings not taken off; None: unknown.

        :raise MachineFault: the disk cannot be asked.
        """

    def stage(self, request: StageRequest, lasting: bool = True) -> None:
        """Take the name and reserve room. The same request again changes nothing.

        :param lasting: a restart of the server leaves it; else it discards it, because whoever stages it is gone then,
            and the same request again is a conflict, because it is somebody else's.
        :raise InvalidInput: see ``names.check_stage_request``.
        :raise AlreadyExists: the name or the id is taken.
        :raise Conflict: the id is staged with other contents.
        :raise NoSpace: there is no room for the images, or none left in the slice's quota.
        """

    def staging(self, snapshot_id: str) -> StageRequest:
        """What was staged under this id.

        :raise NotFound: nothing, or it was published or discarded since.
        """

    def open_writer(self, snapshot_id: str, vm: str) -> ImageWriter:
        """Begin to store a staged image.

        :raise NotFound: it is not staged.
        :raise Conflict: it is stored, or being written.
        """

    def stored_image(self, snapshot_id: str, vm: str) -> StoredImage | None:
        """The image, if it is durable, of a staged or published snapshot."""

    def put_record(self, snapshot_id: str, vm: str, kind: str, data: bytes) -> None:
        """Keep what a VM's edge recorded, in the pcap format; durable when this returns. It replaces an earlier one.

        :param kind: ``received`` or ``sent``.
        :raise InvalidInput: see ``names.check_record``.
        :raise NotFound: the VM is not staged.
        :raise Conflict: the channel states are sealed, and this is another record.
        :raise NoSpace: there is no room for it.
        """

    def seal_channels(self, snapshot_id: str, request: SealChannels) -> list[ChannelSummary]:
        """Put the channel states of a staged snapshot together; durable when this returns. Once more changes nothing.

        :raise NotFound: the snapshot is not staged.
        :raise InvalidInput: the addresses are not those of the staged VMs.
        :raise Conflict: an image is not durable; or they are sealed with other addresses.
        :raise NoSpace: there is no room for them.
        """

    def discard(self, snapshot_id: str) -> None:
        """Forget a staging, its images and its channel states; an unknown one is fine.

        No image of it may be being written.

        :raise Conflict: the snapshot is published.
        """

    def publish(self, manifest: Manifest) -> Manifest:
        """Make the snapshot exist, in one atomic step. The same manifest again changes nothing.

        :raise NotFound: the snapshot is not staged.
        :raise Conflict: an image or a channel state is not durable or is not what the manifest says; another manifest
            is published.
        """

    def snapshots(self) -> list[Manifest]:
        """All that exist, the oldest first."""

    def snapshot(self, id_or_name: str) -> Manifest:
        """The snapshot of that id, else of that name.

        :raise NotFound: there is none.
        """

    def open_image(self, snapshot_id: str, vm: str) -> ImageReader:
        """An image of a published snapshot. It stays readable if the snapshot is deleted.

        :raise NotFound: no such snapshot or VM.
        :raise MachineFault: the image is not the one of the manifest, or part of it is missing.
        """

    def channels(self, id_or_name: str) -> list[ChannelSummary]:
        """What the channel states of a published snapshot are; none if they were not sealed.

        :raise NotFound: there is no such snapshot.
        """

    def channel(self, id_or_name: str, vm: str) -> bytes:
        """The frames that a restore replays to a VM, in order, in the pcap format; no frames where nothing was sealed.

        :raise NotFound: no such snapshot or VM.
        :raise MachineFault: it is damaged.
        """

    def verify(self, id_or_name: str) -> Manifest:
        """Read everything of a snapshot back.

        :raise NotFound: there is no such snapshot.
        :raise MachineFault: it is damaged; names what is damaged of which VM, and the object.
        """

    def delete(self, id_or_name: str) -> None:
        """Make a snapshot not exist, then free its room.

        :raise NotFound: there is none.
        """

    def free_leftovers(self) -> None:
        """Free the parts of images that a crash left and that nothing needs; what cannot be freed is logged, and stays.

        It may take as long as reading all that the store knows of its images. Everything else may go on meanwhile.
        """

    def close(self) -> None:
        """Let another server use the store; what is being freed is given up."""


def check_publishable(
    manifest: Manifest, staging: StageRequest, stored: dict[str, StoredImage | None], frames: dict[str, int]
) -> None:
    """Check a manifest against what was staged and what is durable.

    :param stored: for each staged VM its image, None if it is not durable.
    :param frames: how many the sealed channel state of each VM has; empty if they were not sealed.
    :raise Conflict: they do not agree.
    """
    if manifest.name != staging.name:
        raise Conflict(f"snapshot {manifest.id} is staged as {staging.name!r}, not as {manifest.name!r}")
    if sorted(vm.name for vm in manifest.vms) != sorted(stored):
        raise Conflict(f"the manifest of {manifest.name} names other VMs than were staged: {', '.join(sorted(stored))}")
    for vm in manifest.vms:
        image = stored[vm.name]
        if image is None:
            raise Conflict(f"the image of VM {vm.name} is not durable", "publish when each image's state is durable")
        if (vm.received_bytes, vm.stored_bytes, vm.blake3) != (image.received_bytes, image.stored_bytes, image.blake3):
            raise Conflict(
                f"the manifest's sizes or checksum of VM {vm.name} are not those of its image",
                f"the image has {image.received_bytes} bytes and BLAKE3 {image.blake3}",
            )
        _check_frames(f"to VM {vm.name}", vm.frames_in_transit, frames.get(vm.name, 0))
    _check_frames(f"in snapshot {manifest.name}", manifest.frames_in_transit, sum(frames.values()))


def _check_frames(where: str, claimed: int, sealed: int) -> None:
    if claimed != sealed:
        raise Conflict(f"the manifest has {claimed} frames in transit {where}", f"{sealed} are sealed")
