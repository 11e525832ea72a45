"""What the store and each snapshot take; see ``SnapshotSpace`` and ``StoreStats`` in ``core.messages``."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geni_violin.core.errors import NotFound
from geni_violin.core.messages import Manifest, SnapshotSpace, StoreStats
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.catalog import Catalog
from geni_violin.snapshot_server.pages.tally import Tally
from geni_violin.snapshot_server.pages.usage import IMAGES, image_key, read_map


def stats_of(
    backend: ObjectBackend, catalog: Catalog, manifests: Sequence[Manifest], free_bytes: int | None
) -> StoreStats:
    """Figures of all snapshots; what is staged is needed, but by no snapshot.

    :raise MachineFault: a map is damaged.
    """
    with catalog.lock:
        packs = list(catalog.packs.values())
    tally = Tally(catalog, packs)
    sizes = tally.sizes()
    needs: list[NDArray[np.int64]] = []
    logical: list[int] = []
    for manifest in manifests:
        numbers, logical_bytes = _needs_of(backend, tally, manifest)
        tally.counts[numbers] += 1
        needs.append(numbers)
        logical.append(logical_bytes)
    published = {image_key(manifest.id, vm.name) for manifest in manifests for vm in manifest.vms}
    maps = list(backend.list(IMAGES))
    staged = tally.copy_of_counts_with(
        _needs_of_map(backend, tally, key)[0] for key, _size in maps if key not in published
    )
    snapshots = tuple(
        SnapshotSpace(
            *(manifest.id, manifest.name, manifest.slice.name, logical_bytes),
            stored_bytes=sum(vm.stored_bytes for vm in manifest.vms),
            needed_bytes=round(sizes[numbers].sum()),
            shared_bytes=round(sizes[numbers][tally.counts[numbers] > 1].sum()),
        )
        for manifest, numbers, logical_bytes in zip(manifests, needs, logical, strict=True)
    )
    stored, needed = sum(pack.size_bytes for pack in packs), round(sizes[staged > 0].sum())
    return StoreStats(
        *(snapshots, sum(logical), stored, needed, round(sizes[tally.counts > 1].sum()), stored - needed),
        map_bytes=sum(size for _key, size in maps),
        packs=len(packs),
        free_bytes=free_bytes,
    )


def _needs_of(backend: ObjectBackend, tally: Tally, manifest: Manifest) -> tuple[NDArray[np.int64], int]:
    """The items that a snapshot needs, and its logical bytes."""
    found = [_needs_of_map(backend, tally, image_key(manifest.id, vm.name)) for vm in manifest.vms]
    return np.unique(np.concatenate([numbers for numbers, _bytes in found])), sum(count for _numbers, count in found)


def _needs_of_map(backend: ObjectBackend, tally: Tally, key: str) -> tuple[NDArray[np.int64], int]:
    try:
        image = read_map(backend, key)
    except NotFound:  # deleted meanwhile, or lost, which verify tells
        return np.zeros(0, np.int64), 0
    return tally.numbers(image.all_digests()), image.logical_bytes()
