"""An archive that came in: everything is checked, then it is copied into the server's store.

What is wrong with an archive is the fault of whoever brings it, not of this machine, and is said so.
"""

import tempfile
from pathlib import Path

from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, MachineFault, NoSpace
from geni_violin.core.messages import Manifest
from geni_violin.snapshot_server.channels import parsed_macs
from geni_violin.snapshot_server.names import check_stage_request, checked_identifier
from geni_violin.snapshot_server.pages.channel_states import CHANNELS
from geni_violin.snapshot_server.pages.manifests import MANIFESTS
from geni_violin.snapshot_server.pages.opening import FORMAT_KEY
from geni_violin.snapshot_server.pages.pack_builder import PREFIX as PACKS
from geni_violin.snapshot_server.pages.page_store import PageStore
from geni_violin.snapshot_server.pages.usage import IMAGES
from geni_violin.snapshot_server.store import ImageStore
from geni_violin.snapshot_server.travel.archive_in import ArchiveReader
from geni_violin.snapshot_server.travel.copying import copy_snapshot, stage_request_of

_KNOWN = (PACKS, IMAGES, CHANNELS, MANIFESTS)


def import_archive(store: ImageStore, archive: Path, scratch: Path) -> Manifest:
    """Import a snapshot; it exists when this returns. If it fails, nothing has changed.

    :param archive: a file that does not change.
    :param scratch: a folder for what is small.
    :raise InvalidInput: it is no archive, of another version, cut short, damaged, or says what cannot be.
    :raise AlreadyExists: there is a snapshot of that name or id.
    :raise NoSpace: there is no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="import-", dir=scratch) as folder:
        reader = ArchiveReader(archive)
        try:
            _check_keys(reader)
            source = PageStore(reader, Path(folder))
        except (MachineFault, Conflict) as error:
            reader.close()
            raise _not_understood(error) from error
        except BaseException:
            reader.close()
            raise
        try:
            manifest = _checked(source)
            return copy_snapshot(source, store, manifest)
        finally:
            source.close()


def _check_keys(reader: ArchiveReader) -> None:
    """Refuse what this release would not import: a later one may keep in it what a snapshot cannot be without."""
    for key, _size in reader.list():
        if key != FORMAT_KEY and not key.startswith(_KNOWN):
            raise InvalidInput(f"the archive has an object {key!r}, which this release does not know")


def _checked(source: PageStore) -> Manifest:
    """The one snapshot of an archive, after all of it was read."""
    try:
        snapshots = source.snapshots()
    except MachineFault as error:
        raise _not_understood(error) from error
    if len(snapshots) != 1:
        raise InvalidInput(f"the archive has {len(snapshots)} snapshots", "expected one")
    manifest = snapshots[0]
    check_stage_request(stage_request_of(manifest))
    _check_slice(manifest)
    try:
        return source.verify(manifest.id)
    except MachineFault as error:
        raise _not_understood(error) from error


def _check_slice(manifest: Manifest) -> None:
    """Check what a restore makes names of folders and interfaces from.

    :raise InvalidInput: a name or a size that cannot be.
    """
    spec = manifest.slice
    switches = [switch.name for switch in spec.switches]
    hosts = [*spec.hosts, *(switch.host for switch in spec.switches), *(vm.host for vm in spec.vms)]
    for name in (spec.name, *switches, *hosts, *(vm.switch for vm in spec.vms), *(vm.name for vm in spec.vms)):
        checked_identifier(name, "name in a slice")
    if sorted(vm.name for vm in spec.vms) != sorted(vm.name for vm in manifest.vms):
        raise InvalidInput("the archive's slice has other VMs than its snapshot", "expected an image for each VM")
    if any(vm.image.memory_mib < 1 or vm.image.vcpus < 1 for vm in spec.vms):
        raise InvalidInput("the archive has a VM without memory or CPU", "both start at 1")
    parsed_macs({vm.name: vm.mac for vm in spec.vms}, [vm.name for vm in spec.vms])
    if any(vm.image.disks for vm in spec.vms):
        raise InvalidInput("the archive has a VM with disks, which this release does not restore")


def _not_understood(error: MachineFault | Conflict) -> GeniViolinError:
    if isinstance(error, NoSpace):  # in the scratch folder
        return error
    return InvalidInput(f"the archive cannot be imported: {error.message}", error.hint)
