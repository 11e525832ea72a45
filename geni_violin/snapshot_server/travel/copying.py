"""A snapshot from one store to another, over nothing but what any store can do.

Images go as the streams that a restore would get. So what arrives is an image of its own: the same memory and devices,
another checksum of the whole, other sizes. Channel states go as records of what the VMs' edges received: all of their
frames are in transit to that VM, in that order.
"""

import contextlib
from dataclasses import replace

from geni_violin.core.errors import AlreadyExists, GeniViolinError, InvalidInput, NotFound
from geni_violin.core.messages import ExpectedImage, Manifest, SealChannels, StageRequest
from geni_violin.snapshot_server.names import RECEIVED
from geni_violin.snapshot_server.store import ImageStore, StoredImage

MORE_BYTES = 16 << 20
"""How much longer than the stream that was received one can be that loads to the same state: its records differ."""


def copy_snapshot(source: ImageStore, target: ImageStore, manifest: Manifest) -> Manifest:
    """Copy a published snapshot; gives the manifest that it has in ``target``. If it fails, ``target`` is as before.

    :raise AlreadyExists: ``target`` has a snapshot of that name or id.
    :raise NoSpace: it has no room for it.
    :raise MachineFault: an image in ``source`` is damaged.
    :raise InvalidInput: the manifest does not fit what a snapshot can be.
    """
    _refuse_published(target, manifest)
    target.stage(stage_request_of(manifest), lasting=False)
    try:
        stored = {vm.name: _copy_image(source, target, manifest.id, vm.name) for vm in manifest.vms}
        frames = _copy_channels(source, target, manifest)
        return target.publish(_arrived(manifest, stored, frames))
    except BaseException:
        with contextlib.suppress(GeniViolinError):  # what went wrong first is what people have to know
            target.discard(manifest.id)
        raise


def stage_request_of(manifest: Manifest) -> StageRequest:
    """What has to be staged for a snapshot to arrive."""
    images = tuple(ExpectedImage(vm.name, vm.received_bytes + MORE_BYTES) for vm in manifest.vms)
    return StageRequest(manifest.id, manifest.name, images, manifest.slice.name)


def _refuse_published(target: ImageStore, manifest: Manifest) -> None:
    for text in (manifest.id, manifest.name):
        try:
            found = target.snapshot(text)
        except NotFound:
            continue
        hint = f"delete the snapshot {found.name} first, if it is not needed"
        raise AlreadyExists(f"a snapshot {found.name!r} with id {found.id} exists already", hint)


def _copy_image(source: ImageStore, target: ImageStore, snapshot_id: str, vm: str) -> StoredImage:
    with source.open_image(snapshot_id, vm) as reader:
        writer = target.open_writer(snapshot_id, vm)
        try:
            for chunk in reader.chunks():
                writer.write(memoryview(chunk))
            return writer.finish()
        except BaseException:
            writer.abort()
            raise


def _copy_channels(source: ImageStore, target: ImageStore, manifest: Manifest) -> dict[str, int]:
    """How many frames each channel state has; empty where nothing was sealed."""
    if not source.channels(manifest.id):
        return {}
    specs = {spec.name: spec for spec in manifest.slice.vms}
    if missing := [vm.name for vm in manifest.vms if vm.name not in specs]:
        raise InvalidInput(f"the snapshot's slice has no VM {missing[0]!r}", "expected a VM for each image")
    for vm in manifest.vms:
        target.put_record(manifest.id, vm.name, RECEIVED, source.channel(manifest.id, vm.name))
    macs = {vm.name: specs[vm.name].mac for vm in manifest.vms}
    return {channel.vm: channel.frames for channel in target.seal_channels(manifest.id, SealChannels(macs))}


def _arrived(manifest: Manifest, stored: dict[str, StoredImage], frames: dict[str, int]) -> Manifest:
    """The manifest with what is true of it in its new store."""
    vms = tuple(
        replace(
            vm,
            received_bytes=stored[vm.name].received_bytes,
            stored_bytes=stored[vm.name].stored_bytes,
            blake3=stored[vm.name].blake3,
            frames_in_transit=frames.get(vm.name, 0),
        )
        for vm in manifest.vms
    )
    return replace(manifest, vms=vms, frames_in_transit=sum(frames.values()))
