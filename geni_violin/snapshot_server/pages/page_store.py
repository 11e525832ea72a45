"""Stagings, images and snapshots over a backend: the page store as the rest of the server sees it.

Objects in the backend, which is complete in itself; all but ``quotas.json`` are written once::

    store.json              what this is, and its version
    packs/PACK              items (pack_format)
    images/ID/VM            an image map (image_map)
    channels/ID/...         channel states (channel_states)
    manifests/ID.json       a manifest: the snapshot exists
    quotas.json             limits (quotas)

The local folder has what is of use to this server only: ``lock``, ``stagings/ID.json``, ``records/ID/...`` and
``index.bin``. Each change ends in one put or one removal that decides it, and all that it depends on is durable before:

* an image: packs; *its map*;
* channel states: each; *their seal*;
* publishing: *the manifest*; the staging goes, and what its edges recorded;
* discarding: *the staging goes*, then its images and channel states; deleting: *the manifest goes*, then these.

Packs that nothing needs go last: a crash before that leaves them. They are freed after the next start, beside the
streams that come by then. What belongs to a snapshot that is being taken stays: an image that is durable has a map,
staged or published; and a stream that is under way pins the packs that it relies on (``usage``, ``catalog``).
"""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import structlog

from geni_violin.core.errors import (
    Conflict,
    GeniViolinError,
    InvalidInput,
    MachineFault,
    NoSpace,
    NotFound,
)
from geni_violin.core.messages import (
    ChannelSummary,
    CollectionPlan,
    Manifest,
    Quota,
    SealChannels,
    StageRequest,
    StoreStats,
    VmImage,
)
from geni_violin.runtime import pcap
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.backends.local import LocalBackend
from geni_violin.snapshot_server.cut_clock import TAIL_BYTES
from geni_violin.snapshot_server.names import check_record, check_stage_request, checked_identifier
from geni_violin.snapshot_server.pages.channel_states import ChannelStates
from geni_violin.snapshot_server.pages.collector import MIN_RUBBISH, Collector
from geni_violin.snapshot_server.pages.gate import Gate
from geni_violin.snapshot_server.pages.image_map import decode_map
from geni_violin.snapshot_server.pages.image_reader import PageReader
from geni_violin.snapshot_server.pages.image_writer import PageWriter, stored_image_of
from geni_violin.snapshot_server.pages.manifests import Manifests
from geni_violin.snapshot_server.pages.opening import Opened
from geni_violin.snapshot_server.pages.packer import Budget, Packer
from geni_violin.snapshot_server.pages.quotas import Quotas
from geni_violin.snapshot_server.pages.refusals import check_names_free, check_room
from geni_violin.snapshot_server.pages.stagings import Stagings
from geni_violin.snapshot_server.pages.stats import stats_of
from geni_violin.snapshot_server.pages.usage import IMAGES, Usage, image_key, read_map
from geni_violin.snapshot_server.pages.verifier import damages_of, read_published_map
from geni_violin.snapshot_server.store import (
    MANIFEST_VERSION,
    ImageWriter,
    StoredImage,
    check_publishable,
)

_PARTS_OF_EARLIER_STORES = ("images", "manifests", "stagings")

_log = structlog.get_logger(__name__)


P = ParamSpec("P")
T = TypeVar("T")


def _changes(method: Callable[Concatenate["PageStore", P], T]) -> Callable[Concatenate["PageStore", P], T]:
    """A method that changes the store, and so does not begin once it is being closed (``gate``)."""

    @functools.wraps(method)
    def gated(self: "PageStore", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.gate.passing():
            return method(self, *args, **kwargs)

    return gated


class PageStore:
    """An :class:`~geni_violin.snapshot_server.store.ImageStore` in a backend, which it closes at its end.

    :param folder: the local folder, made if need be; a store has always the same one.
    :raise MachineFault: the folder or the backend cannot be used, or another server uses one of them; or what is in the
        backend is no page store of this version.
    """

    def __init__(self, backend: ObjectBackend, folder: Path) -> None:
        self.gate = Gate()
        self._opened = Opened(backend, folder)
        self._backend = backend
        self._catalog = self._opened.catalog
        self._stagings = Stagings(self._opened.stagings)
        self._manifests = Manifests(backend)
        self._channels = ChannelStates(backend, self._opened.records)
        self._mutex = (
            threading.RLock()
        )  # for stagings, manifests and writers; never held while an image is read or written
        self._channel_mutex = threading.Lock()  # for all of self._channels; taken after the other one
        self._packer = Packer(backend, self._catalog)
        self._usage = Usage(backend, self._catalog, self._known_images)
        self._collector = Collector(backend, self._catalog, self._usage)
        self._writers: dict[str, PageWriter] = {}  # by the map's key
        self._stored: dict[str, StoredImage] = {}
        self._budgets: dict[str, Budget] = {}
        self._removals = 0
        try:
            self._quotas = Quotas(backend)
            self._recover()
        except BaseException:
            self.close()
            raise

    def free_bytes(self) -> int | None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        return self._backend.free_bytes()

    @_changes
    def stage(self, request: StageRequest, lasting: bool = True) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        check_stage_request(request)
        with self._mutex:
            staged = self._stagings.find(request.snapshot_id)
            if staged == request and lasting:
                return
            if staged == request:
                raise Conflict(f"snapshot {request.snapshot_id} is being taken already")
            if staged is not None:
                raise Conflict(f"snapshot {request.snapshot_id} is staged with another name or other images")
            check_names_free(request, self.snapshots(), self._stagings.all())
            self._refuse_without_room(f"snapshot {request.name}", sum(image.expected_bytes for image in request.images))
            self._quotas.left_bytes(request.slice, self._manifests.all)
            self._stagings.put(request, lasting)

    def staging(self, snapshot_id: str) -> StageRequest:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        return self._stagings.get(snapshot_id)

    @_changes
    def open_writer(self, snapshot_id: str, vm: str) -> ImageWriter:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        with self._mutex:
            staged = self._refuse_unknown_vm(snapshot_id, vm)
            if self.stored_image(snapshot_id, vm) is not None:
                raise Conflict(f"the image of VM {vm} is there already")
            key = image_key(snapshot_id, vm)
            if key in self._writers:
                raise Conflict(f"the image of VM {vm} is being received already")
            session = self._packer.begin(self._budget_of(staged))
            ended = functools.partial(self._writer_ended, key)
            writer = PageWriter(vm, key, self._backend, self._packer, session, self._usage, ended)
            self._writers[key] = writer
        return writer

    def _writer_ended(self, key: str, stored: StoredImage | None) -> None:
        with self._mutex:
            del self._writers[key]
            if stored is not None:
                self._stored[key] = stored
        if stored is None:
            self._sweep()

    def stored_image(self, snapshot_id: str, vm: str) -> StoredImage | None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        key = image_key(checked_identifier(snapshot_id, "snapshot id"), checked_identifier(vm, "VM name"))
        with self._mutex:
            if key in self._stored or key in self._writers:
                return self._stored.get(key)
            removals = self._removals
        try:
            data = self._backend.get(key)
        except NotFound:
            return None
        stored = stored_image_of(vm, decode_map(data, f"image map {key}"), data)
        with self._mutex:
            if self._removals == removals:  # else it may be gone by now
                self._stored[key] = stored
        return stored

    @_changes
    def put_record(self, snapshot_id: str, vm: str, kind: str, data: bytes) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        check_record(vm, kind, data)
        with self._mutex:
            self._refuse_unknown_vm(snapshot_id, vm)
            self._refuse_without_room(f"what VM {vm} {kind}", 2 * len(data))  # once more in the channel state
        with self._channel_mutex:
            self.staging(snapshot_id)
            self._channels.put(snapshot_id, vm, kind, data)

    @_changes
    def seal_channels(self, snapshot_id: str, request: SealChannels) -> list[ChannelSummary]:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        for image in self.staging(snapshot_id).images:
            if self.stored_image(snapshot_id, image.vm) is None:
                raise Conflict(f"the image of VM {image.vm} is not durable", "seal when each image's state is durable")
        with self._channel_mutex:
            vms = [image.vm for image in self.staging(snapshot_id).images]
            seal = self._channels.seal(snapshot_id, vms, request.macs, lambda vm: self._end_of_image(snapshot_id, vm))
        return [channel.summary for channel in seal.channels]

    def _end_of_image(self, snapshot_id: str, vm: str) -> bytes:
        image = read_map(self._backend, image_key(snapshot_id, vm))
        with PageReader(vm, image, self._backend, self._catalog, lambda: None) as reader:
            return reader.end(TAIL_BYTES)

    @_changes
    def discard(self, snapshot_id: str) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        checked_identifier(snapshot_id, "snapshot id")
        with self._mutex:
            if self._manifests.exists(snapshot_id):
                raise Conflict(f"snapshot {snapshot_id} is published", "delete the snapshot instead")
            self._stagings.remove(snapshot_id)
            self._budgets.pop(snapshot_id, None)
            self._remove_contents(snapshot_id)
        self._sweep()

    @_changes
    def publish(self, manifest: Manifest) -> Manifest:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        checked_identifier(manifest.id, "snapshot id")
        if manifest.version != MANIFEST_VERSION:
            raise InvalidInput(f"the manifest is of version {manifest.version}", f"expected {MANIFEST_VERSION}")
        with self._mutex, self._channel_mutex:
            published = self._manifests.get(manifest.id)
            if published is None:
                self._publish_first(manifest)
            elif published != manifest:
                raise Conflict(f"snapshot {manifest.id} is published with another manifest")
            elif self._stagings.find(manifest.id) is not None:  # it failed after the manifest had its name
                self._manifests.confirm(manifest.id)
                self._end_staging(manifest.id)
        return manifest

    def _publish_first(self, manifest: Manifest) -> None:
        staging = self.staging(manifest.id)
        stored = {image.vm: self.stored_image(manifest.id, image.vm) for image in staging.images}
        seal = self._channels.seal_of(manifest.id)
        check_publishable(manifest, staging, stored, seal.frames() if seal else {})
        # The commit point. All that it speaks of was made durable by PageWriter.finish and ChannelStates.seal.
        try:
            self._manifests.put(manifest)
            self._end_staging(manifest.id)
        except NoSpace as error:
            if not self._manifests.exists(manifest.id):
                raise
            # The manifest has its name already: "no space" would be taken for a certain no, which it is not.
            raise MachineFault(f"snapshot {manifest.id} is published but not yet durable: {error}") from error

    def _end_staging(self, snapshot_id: str) -> None:
        self._stagings.remove(snapshot_id)
        self._budgets.pop(snapshot_id, None)
        self._channels.settle(snapshot_id)

    def snapshots(self) -> list[Manifest]:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        return self._manifests.all()

    def snapshot(self, id_or_name: str) -> Manifest:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        return self._manifests.find(id_or_name)

    def open_image(self, snapshot_id: str, vm: str) -> PageReader:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        manifest, wanted = self._published_image(snapshot_id, vm)
        key = image_key(manifest.id, vm)

        def sweep_if_deleted() -> None:
            if not self._backend.exists(key):
                self._sweep()

        image = read_published_map(self._backend, manifest.id, wanted)
        return PageReader(vm, image, self._backend, self._catalog, sweep_if_deleted)

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
        manifest = self._manifests.reread(self.snapshot(id_or_name).id)
        if manifest is None:
            raise NotFound(f"snapshot {id_or_name!r} was deleted meanwhile")
        damages = list(damages_of(self._backend, self._catalog, manifest))
        with self._channel_mutex:
            damages += self._channels.damages(manifest.id, {vm.name: vm.frames_in_transit for vm in manifest.vms})
        if damages:
            raise MachineFault(f"snapshot {manifest.name} is damaged: {'; '.join(damages)}", "do not restore it")
        return manifest

    @_changes
    def delete(self, id_or_name: str) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        with self._mutex:
            snapshot_id = self._manifests.id_of(id_or_name)
            # A staging outlives publishing only if its removal failed. It goes first, else it would be staged again.
            self._stagings.remove(snapshot_id)
            self._manifests.delete(snapshot_id)
            self._remove_contents(snapshot_id)
        self._sweep()

    @_changes
    def free_leftovers(self) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        self._sweep()

    def close(self) -> None:
        """See :class:`~geni_violin.snapshot_server.store.ImageStore`."""
        self._usage.close()
        self.gate.close()
        self._packer.close()
        self._opened.close()

    # --- the store as a whole -----------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """What the store and each snapshot take.

        :raise MachineFault: an image map is damaged.
        """
        return stats_of(self._backend, self._catalog, self.snapshots(), self.free_bytes())

    def plan_collection(self, min_rubbish: float = MIN_RUBBISH) -> CollectionPlan:
        """What a collection of rubbish would do; see :meth:`~.collector.Collector.plan`."""
        return self._collector.plan(min_rubbish)

    @_changes
    def collect(self, plan: CollectionPlan) -> CollectionPlan:
        """Do what was planned, as far as it is still right; see :meth:`~.collector.Collector.execute`."""
        return self._collector.execute(plan)

    def quotas(self) -> list[Quota]:
        """The quotas of slices."""
        return self._quotas.all(self.snapshots())

    @_changes
    def set_quota(self, slice_name: str, limit_bytes: int | None) -> None:
        """Set a slice's quota, or take it away; see :meth:`~.quotas.Quotas.set`."""
        self._quotas.set(slice_name, limit_bytes)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _published_image(self, id_or_name: str, vm: str) -> tuple[Manifest, VmImage]:
        manifest = self.snapshot(id_or_name)
        for image in manifest.vms:
            if image.name == vm:
                return manifest, image
        raise NotFound(f"snapshot {manifest.name} has no VM {vm!r}")

    def _budget_of(self, staged: StageRequest) -> Budget:
        if staged.snapshot_id not in self._budgets:
            left = self._quotas.left_bytes(staged.slice, self._manifests.all)
            stored = (self.stored_image(staged.snapshot_id, image.vm) for image in staged.images)
            added = sum(image.stored_bytes for image in stored if image is not None)
            self._budgets[staged.snapshot_id] = Budget(left, added)
        return self._budgets[staged.snapshot_id]

    def _remove_contents(self, snapshot_id: str) -> None:
        self._removals += 1
        for key, _size in list(self._backend.list(f"{IMAGES}{snapshot_id}/")):
            self._backend.delete(key)
            self._usage.forget(key)
            self._stored.pop(key, None)
        with self._channel_mutex:
            self._channels.remove(snapshot_id)

    def _sweep(self) -> None:
        """Free the room of packs that nothing needs. What cannot be freed now stays for a collection."""
        try:
            swept = self._usage.sweep(wait=False)
            if swept:
                _log.info("packs_freed", packs=len(swept), bytes=sum(pack.size_bytes for pack in swept))
        except GeniViolinError as error:
            _log.warning("packs_not_freed", reason=str(error))

    def _recover(self) -> None:
        """Remove what a crash left; see the module's theory."""
        images = [key for key, _size in self._backend.list(IMAGES)]
        found = {key.split("/")[1] for key in images} | self._channels.ids()
        published = set(self._manifests.ids())
        # An object store may list what was put only a while later. What is to be deleted is asked for by its name.
        published |= {snapshot_id for snapshot_id in found - published if self._manifests.exists(snapshot_id)}
        self._stagings.recover(published)
        staged = self._stagings.ids()
        for key in images:
            if key.split("/")[1] not in published | staged:
                self._backend.delete(key)
        self._channels.recover(published, staged)

    def _known_images(self) -> list[str]:
        """The maps of all snapshots that exist."""
        return [image_key(manifest.id, vm.name) for manifest in self._manifests.all() for vm in manifest.vms]

    # --- what is refused ----------------------------------------------------------------------------------------------

    def _refuse_unknown_vm(self, snapshot_id: str, vm: str) -> StageRequest:
        checked_identifier(vm, "VM name")
        staged = self.staging(snapshot_id)
        if vm not in {image.vm for image in staged.images}:
            raise NotFound(f"no image of VM {vm} is expected in snapshot {snapshot_id}")
        return staged

    def _refuse_without_room(self, what: str, needed_bytes: int) -> None:
        free = self.free_bytes()
        if free is not None:
            reserved = sum(self._outstanding_bytes(staged) for staged in self._stagings.all())
            check_room(what, needed_bytes, free, reserved, self._backend.describe())

    def _outstanding_bytes(self, staged: StageRequest) -> int:
        """How many bytes may still come for the images of a staging."""
        outstanding = 0
        for image in staged.images:
            writer = self._writers.get(image_key(staged.snapshot_id, image.vm))
            if writer is not None:
                outstanding += max(0, image.expected_bytes - writer.received_bytes)
            elif self.stored_image(staged.snapshot_id, image.vm) is None:
                outstanding += image.expected_bytes
        return outstanding


def open_folder(folder: Path) -> PageStore:
    """A page store with all that belongs to it in one folder, which is made if need be.

    :raise MachineFault: the folder cannot be used, or another server uses it, or it is a store of an earlier release.
    """
    if any((folder / name).is_dir() for name in _PARTS_OF_EARLIER_STORES):
        hint = "choose another folder; snapshots in this one are read by the release that took them"
        raise MachineFault(f"{folder} is a store of an earlier release, with one file for each image", hint)
    return PageStore(LocalBackend(folder / "objects"), folder / "state")
