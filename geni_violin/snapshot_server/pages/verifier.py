"""Everything of a snapshot's images read back.

Every page is decompressed and hashed, and compared with what the map says. What the snapshot does not need of the packs
that it uses is looked at too, by the checksums of its frames and tables: damage there is damage to come.
"""

import contextlib
from collections.abc import Iterator

import numpy as np

from geni_violin.core.errors import GeniViolinError, InvalidInput, MachineFault, NotFound
from geni_violin.core.messages import Manifest, VmImage
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.catalog import Catalog, Pack, read_table
from geni_violin.snapshot_server.pages.digests import as_array, item_digest, page_digests
from geni_violin.snapshot_server.pages.frames import FrameReader, FrameRef, Items
from geni_violin.snapshot_server.pages.image_map import PAGE, ImageMap, decode_map, root_of
from geni_violin.snapshot_server.pages.image_reader import frames_at, group_starts
from geni_violin.snapshot_server.pages.index import NOWHERE, items_of, packs_of
from geni_violin.snapshot_server.pages.pack_format import MAGIC
from geni_violin.snapshot_server.pages.page_words import words_for_pages
from geni_violin.snapshot_server.pages.usage import image_key
from geni_violin.snapshot_server.stream.events import RamBlock
from geni_violin.snapshot_server.stream.preamble import parse_preamble


def read_published_map(backend: ObjectBackend, snapshot_id: str, wanted: VmImage) -> ImageMap:
    """The map of a published image, if it is the one that the manifest speaks of.

    :raise MachineFault: it is not, or it is damaged.
    """
    key = image_key(snapshot_id, wanted.name)
    what = f"the image of VM {wanted.name} is damaged"
    try:
        data = backend.get(key)
    except NotFound as error:
        raise MachineFault(f"{what}: {error.message}") from error
    image = decode_map(data, f"{what}: image map {key}")
    if root_of(data) != wanted.blake3:
        raise MachineFault(f"{what}: image map {key} has BLAKE3 {root_of(data)} instead of {wanted.blake3}")
    if image.preamble and _blocks_of(image.preamble) != image.blocks:
        raise MachineFault(f"{what}: image map {key} has other blocks of memory than its stream's beginning")
    return image


def _blocks_of(preamble: bytes) -> tuple[RamBlock, ...]:
    try:
        return parse_preamble(preamble).blocks
    except InvalidInput:
        return ()


def damages_of(backend: ObjectBackend, catalog: Catalog, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the images of a snapshot, in words."""
    with contextlib.closing(Verifier(backend, catalog)) as verifier:
        for vm in manifest.vms:
            try:
                image = read_published_map(backend, manifest.id, vm)
            except GeniViolinError as error:
                yield f"VM {vm.name}: {error.message}"
            else:
                yield from (f"VM {vm.name}: {words}" for words in verifier.image_damages(image))
        yield from verifier.pack_damages()


class Verifier:
    """Looks at the images of one snapshot, given one after the other; the packs stay as long."""

    def __init__(self, backend: ObjectBackend, catalog: Catalog) -> None:
        self._backend = backend
        self._catalog = catalog
        self._pinned: dict[int, Pack] = {}
        self._read: set[tuple[int, int]] = set()
        self._frames = FrameReader(backend)

    def close(self) -> None:
        """Let go of the packs."""
        self._frames.close()
        with self._catalog.lock:
            self._catalog.unpin(self._pinned)

    def image_damages(self, image: ImageMap) -> Iterator[str]:
        """What is wrong with an image, in words, without the VM's name."""
        digests = image.all_digests()
        with self._catalog.lock:
            places = self._catalog.index.find(digests)
            new = {
                number: self._catalog.packs[number] for number in self._packs_at(places) if number not in self._pinned
            }
            self._catalog.pin(new)
        self._pinned |= new
        numbers = np.concatenate(
            (np.flatnonzero(image.kinds == PAGE), np.full(len(digests) - len(image.digests), -1, np.int64))
        )
        lost = places == NOWHERE
        if lost.any():
            yield f"no pack has {_words(image, numbers[lost])}"
        order = np.argsort(places[~lost], kind="stable")
        places, numbers, digests = places[~lost][order], numbers[~lost][order], digests[~lost][order]
        starts = group_starts(places)
        refs = [FrameRef(self._pinned[pack], frame) for pack, frame in frames_at(places[starts])]
        ends = [*starts[1:].tolist(), len(places)][: len(starts)]  # none where there are no places
        for (ref, items), start, end in zip(self._frames.read(refs), starts.tolist(), ends, strict=True):
            self._read.add((ref.pack.number, ref.number))
            where = f"frame {ref.number} of pack {ref.pack.key}"
            if isinstance(items, str):
                yield f"{_words(image, numbers[start:end])}: {where}: {items}"
                continue
            found = as_array(_digests(items))[items_of(places[start:end])]
            wrong = (found != digests[start:end]).any(axis=1)
            if wrong.any():
                yield f"{_words(image, numbers[start:end][wrong])}: {where}: they do not have the BLAKE3 of the map"

    def pack_damages(self) -> Iterator[str]:
        """What is wrong with the packs that the images use, apart from what was told of the images."""
        for pack in self._pinned.values():
            try:
                self._check_ends(pack)
            except GeniViolinError as error:
                yield error.message
        refs = [
            FrameRef(pack, frame)
            for number, pack in self._pinned.items()
            for frame in range(len(pack.frames))
            if (number, frame) not in self._read
        ]
        for ref, items in self._frames.read(refs):
            if isinstance(items, str):
                yield f"frame {ref.number} of pack {ref.pack.key}, which this snapshot does not need: {items}"

    def _check_ends(self, pack: Pack) -> None:
        size = self._backend.size(pack.key)
        table = read_table(self._backend, pack.key, size)
        if self._backend.get_range(pack.key, 0, len(MAGIC)) != MAGIC:
            raise MachineFault(f"pack {pack.key} is damaged: it does not begin as a pack")
        if size != pack.size_bytes or table.frames.tobytes() != pack.frames.tobytes():
            raise MachineFault(f"pack {pack.key} is damaged: it is another one than it was")

    @staticmethod
    def _packs_at(places: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> list[int]:
        packs: list[int] = np.unique(packs_of(places[places != NOWHERE])).tolist()
        return packs


def _digests(items: Items) -> list[bytes]:
    return page_digests(items) if len(items) > 1 else [item_digest(items[0].data)]


def _words(image: ImageMap, numbers: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> str:
    pages = numbers[numbers >= 0]
    parts = [words_for_pages(image, pages)] if pages.size else []
    return ", ".join(parts + ["what is not pages"] * bool(len(pages) < len(numbers)))
