"""The index against a dictionary, and what its cache does."""

from pathlib import Path

import numpy as np
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_harness import image_with, opened, seeds, take_images

from geni_violin.snapshot_server.backends.memory import MemoryBackend
from geni_violin.snapshot_server.pages.catalog import Catalog, add_from_backend
from geni_violin.snapshot_server.pages.digests import as_array
from geni_violin.snapshot_server.pages.index import (
    NOWHERE,
    PageIndex,
    frames_of,
    items_of,
    packs_of,
    segment_of,
)
from geni_violin.snapshot_server.pages.pack_format import FRAME, PackTable
from geni_violin.snapshot_server.pages.page_store import PageStore


def _digest(number: int) -> bytes:
    """Digests of which many have their first eight bytes in common, as nobody could make them by chance."""
    return bytes((number % 3,)) * 8 + blake3(bytes((number,))).digest(24)


def _table(frames: list[list[int]]) -> PackTable:
    rows = np.zeros(len(frames), FRAME)
    rows["items"] = [len(frame) for frame in frames]
    return PackTable(rows, as_array([_digest(number) for frame in frames for number in frame]))


_FRAMES = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=4)
_STEPS = st.lists(st.one_of(_FRAMES, st.integers(0, 12)), max_size=14)


@settings(deadline=None)
@given(_STEPS)
def test_it_finds_what_a_dictionary_finds(steps: list[list[list[int]] | int]) -> None:
    """A step adds a pack, or drops one. What is in several packs counts where it was added first."""
    index, packs = PageIndex(), dict[int, list[list[int]]]()
    model: dict[int, tuple[int, int, int]] = {}
    for number, step in enumerate(steps, start=1):
        if isinstance(step, int):
            if step in packs:
                index.drop(step)
                del packs[step]
                model = {item: place for item, place in model.items() if place[0] != step}
            continue
        packs[number] = step
        index.add(number, segment_of(number, _table(step)))
        found: dict[int, set[tuple[int, int, int]]] = {}
        for frame, items in enumerate(step):
            for slot, item in enumerate(items):
                found.setdefault(item, set()).add((number, frame, slot))
        for item, candidates in found.items():
            if item not in model:
                place = index.find(as_array([_digest(item)]))
                model[item] = (int(packs_of(place)[0]), int(frames_of(place)[0]), int(items_of(place)[0]))
                assert model[item] in candidates
    wanted = as_array([_digest(item) for item in range(41)])
    places = index.find(wanted)
    for item, place in enumerate(places.tolist()):
        if item not in model:
            assert place == int(NOWHERE)
        else:
            one = places[item : item + 1]
            assert (int(packs_of(one)[0]), int(frames_of(one)[0]), int(items_of(one)[0])) == model[item]


def test_no_digests_are_found_nowhere() -> None:
    assert PageIndex().find(as_array([])).size == 0
    assert (PageIndex().find(as_array([_digest(1)])) == NOWHERE).all()


def _entries(catalog: Catalog) -> set[tuple[bytes, str, int, int]]:
    """The whole index: digests, and where they are, with the packs by their ids."""
    segment = catalog.index.whole()
    digests = np.column_stack((segment.keys, segment.rest))
    packs, frames, items = packs_of(segment.places), frames_of(segment.places), items_of(segment.places)
    return {
        (row.tobytes(), catalog.packs[pack].id, frame, item)
        for row, pack, frame, item in zip(digests, packs.tolist(), frames.tolist(), items.tolist(), strict=True)
    }


def test_an_index_that_is_rebuilt_from_the_packs_is_the_same(tmp_path: Path) -> None:
    backend = MemoryBackend()
    with opened(backend, tmp_path) as store:
        for number in range(5):
            take_images(store, f"s{number}", {"n1": image_with(seeds(50 * number + 1, 120))})
        store.delete("s2")
        store.collect(store.plan_collection(min_rubbish=0))
        kept = _entries(store._catalog)
    assert len(kept) > 200
    rebuilt = Catalog()
    for key, size in backend.list("packs/"):
        add_from_backend(rebuilt, backend, key, size)
    assert _entries(rebuilt) == kept
    with opened(backend, tmp_path) as store:  # from the cache
        assert _entries(store._catalog) == kept


def test_a_cache_that_is_damaged_or_out_of_date_is_not_believed(tmp_path: Path) -> None:
    backend, path = MemoryBackend(), tmp_path / "index.bin"
    with opened(backend, tmp_path) as store:
        take_images(store, "a", {"n1": image_with(seeds(1, 50))})
    early = path.read_bytes()
    with opened(backend, tmp_path) as store:
        take_images(store, "b", {"n1": image_with(seeds(100, 50))})
        store.delete("a")
        kept = _entries(store._catalog)
    late = path.read_bytes()
    flipped = bytearray(late)
    flipped[len(late) // 2] ^= 1
    for content in (early, bytes(flipped), late[:-1], b"", late[: len(late) // 2], late):
        path.write_bytes(content)
        store = PageStore(backend, tmp_path)
        assert _entries(store._catalog) == kept
        store.verify("b")
        store._packer.close()
        store._opened._locks.close()  # as a crash would: nothing is saved
