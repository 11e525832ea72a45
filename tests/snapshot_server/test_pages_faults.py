"""Flipped bits, power cuts between any two writes to the backend, and collections beside snapshots that are taken."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pages_harness import assert_same, image_with, opened, packs_of, put_image, seeds, take_images
from snapshot_harness import MACS, image_of, manifest_of, request_of, stage_recorded, take_sealed

from geni_violin.core.errors import Conflict, GeniViolinError, MachineFault
from geni_violin.core.messages import SealChannels
from geni_violin.snapshot_server.backends.memory import MemoryBackend
from geni_violin.snapshot_server.pages.page_store import PageStore


class PowerCut(BaseException):
    """Not an Exception, so that nothing cleans up after it."""


class Fragile(MemoryBackend):
    """Objects whose bits can be flipped, and a power that can fail before a put or a deletion, or just after it."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0
        self.cut_at = -1
        self.after = False
        self.before_put: Callable[[str], object] = lambda key: None
        self.before_get: Callable[[str], object] = lambda key: None

    def flip(self, key: str, bit: int) -> None:
        data = bytearray(self._objects[key])
        data[bit // 8] ^= 1 << bit % 8
        self._objects[key] = bytes(data)

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        self.before_put(key)
        self._change(lambda: super(Fragile, self).put(key, data))

    def get(self, key: str) -> bytes:
        self.before_get(key)
        return super().get(key)

    def delete(self, key: str) -> None:
        self._change(lambda: super(Fragile, self).delete(key))

    def _change(self, change: Callable[[], None]) -> None:
        if 0 <= self.cut_at < self.changes:
            raise PowerCut  # the power stays off
        cut = self.changes == self.cut_at
        self.changes += 1
        if cut and not self.after:
            raise PowerCut
        change()
        if cut:
            raise PowerCut


@pytest.fixture
def backend() -> Fragile:
    return Fragile()


@pytest.fixture
def store(backend: Fragile, tmp_path: Path) -> Iterator[PageStore]:
    with opened(backend, tmp_path) as store:
        yield store


# --- flipped bits -----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found_and_named(backend: Fragile, tmp_path: Path) -> None:
    """Every object of a snapshot, and in each of them every 97th bit: all bytes' places modulo 97 are tried."""
    with opened(backend, tmp_path / "1") as store:
        take_images(store, "a", {"n1": image_with(seeds(1, 70)), "n2": image_with(seeds(60, 30), bytes(range(256)))})
        take_sealed(store, "id-1", "sealed")
    keys = [(key, size) for key, size in backend.list() if key != "store.json"]
    assert {key.split("/")[0] for key, _size in keys} == {"packs", "images", "channels", "manifests"}
    for key, size in keys:
        with opened(backend, tmp_path / "1") as store:
            for bit in [*range(0, 8 * size, 997), 8 * size - 1]:
                backend.flip(key, bit)
                with pytest.raises(MachineFault) as caught:
                    for name in ("a", "sealed"):
                        store.verify(name)
                assert key in caught.value.message, (key, bit)
                backend.flip(key, bit)
            for name in ("a", "sealed"):
                store.verify(name)


def test_damage_names_vm_pages_and_pack(backend: Fragile, store: PageStore) -> None:
    take_images(store, "a", {"n1": image_with(seeds(1, 100)), "n2": image_with(seeds(1, 40))})
    packs = store._catalog.packs.values()  # which frame comes first in a pack is the compressing threads' to say
    pack, frame = next((pack, at) for pack in packs for at, items in enumerate(pack.frames["items"]) if items == 64)
    backend.flip(pack.key, 8 * (int(pack.frames["offset"][frame]) + 12))
    with pytest.raises(MachineFault) as caught:
        store.verify("a")
    for words in ("VM n1: pages 0 to 63 (64 of them) of block pc.ram", "VM n2: pages 0 to 39 (40 of them)", pack.key):
        assert words in caught.value.message
    with pytest.raises(
        MachineFault, match=rf"VM n1 is damaged, pages 0 to 63.* of block pc\.ram: frame {frame} of pack {pack.key}"
    ):
        image_of(store, "a", "n1")


def test_a_pack_that_cannot_be_read_does_not_keep_others_from_being_served(backend: Fragile, tmp_path: Path) -> None:
    with opened(backend, tmp_path / "1") as store:
        take_images(store, "a", {"n1": image_with(seeds(1, 50))})
        (damaged,) = packs_of(backend)
        take_images(store, "b", {"n1": image_with(seeds(100, 50), b"another state")})
    backend.flip(damaged, 8 * (backend.size(damaged) - 20))
    with opened(backend, tmp_path / "2") as store:  # a start that has to ask the packs
        store.verify("b")
        assert_same(store, "b", {"n1": image_with(seeds(100, 50), b"another state")})
        with pytest.raises(MachineFault, match="no pack has pages 0 to 49"):
            store.verify("a")
        with pytest.raises(MachineFault, match="no pack has"):
            store.open_image("a", "n1")
        with pytest.raises(GeniViolinError):
            store.verify("a")
        take_images(store, "c", {"n1": image_with(seeds(1, 50))})  # the pages come again, and are stored again
        store.verify("a")


def test_while_a_map_cannot_be_read_no_pack_goes(backend: Fragile, tmp_path: Path) -> None:
    with opened(backend, tmp_path) as store:
        take_images(store, "a", {"n1": image_with(seeds(1, 50))})
        take_images(store, "b", {"n1": image_with(seeds(100, 50))})
    backend.flip("images/a/n1", 99)
    with opened(backend, tmp_path) as store:
        store.delete("b")
        assert len(packs_of(backend)) == 2
        with pytest.raises(MachineFault, match="images/a/n1"):
            store.plan_collection()
        store.delete("a")
        assert packs_of(backend) == []


# --- power cuts -------------------------------------------------------------------------------------------------------


def _life(store: PageStore, done: list[str]) -> None:
    """Snapshots come and go, one sealed; then rubbish is collected."""
    take_images(store, "a", {"n1": image_with(seeds(1, 90)), "n2": image_with(seeds(30, 90))})
    done.append("a is taken")
    take_images(store, "b", {"n1": image_with(seeds(60, 60))})
    done.append("b is taken")
    stored = stage_recorded(store, "c", "c")
    channels = store.seal_channels("c", SealChannels(MACS))
    store.publish(manifest_of(request_of("c", "c", tuple(MACS)), stored, channels))
    done.append("c is taken")
    store.delete("a")
    done.append("a is deleted")
    store.collect(store.plan_collection(min_rubbish=0))
    done.append("collected")


@pytest.mark.parametrize("after", [False, True])
def test_the_power_may_fail_at_any_change(tmp_path: Path, after: bool) -> None:
    cut, crashed = 0, True
    while crashed:
        backend, done, folder = Fragile(), list[str](), tmp_path / str(cut)
        store = PageStore(backend, folder)
        backend.changes, backend.cut_at, backend.after = 0, cut, after
        try:
            _life(store, done)
            crashed = False
        except (PowerCut, MachineFault):  # a worker's power cut is told as a fault by the stream
            cut += 1
        backend.cut_at = -1
        store._packer.close()
        store._opened._locks.close()
        _check_reopened(backend, folder, done)
    assert cut > 20  # a life has that many changes


@contextlib.contextmanager
def _reopened_with_leftovers(backend: Fragile, folder: Path) -> Iterator[PageStore]:
    """A store with a snapshot "a", in which the power failed between the packs of "b" and its image map."""
    store = PageStore(backend, folder)
    take_images(store, "a", {"n1": image_with(seeds(1, 90))})
    store.stage(request_of("b", "b", expected_bytes=1 << 26))
    backend.changes, backend.cut_at = 0, 1
    with pytest.raises(PowerCut):
        put_image(store, "b", "n1", image_with(seeds(500, 90)))
    backend.cut_at = -1
    store._packer.close()
    store._opened._locks.close()
    assert len(packs_of(backend)) == 2
    with opened(backend, folder) as reopened:
        yield reopened


def test_packs_that_a_crash_left_are_freed_without_a_deletion(backend: Fragile, tmp_path: Path) -> None:
    with _reopened_with_leftovers(backend, tmp_path) as store:
        store.free_leftovers()
        assert len(packs_of(backend)) == 1
        assert store.staging("b").name == "b"  # whether it goes on is the coordinator's to say
        assert_same(store, "a", {"n1": image_with(seeds(1, 90))})
        stored = put_image(store, "b", "n1", image_with(seeds(500, 90)))
        store.publish(manifest_of(request_of("b", "b"), [stored]))
        assert_same(store, "b", {"n1": image_with(seeds(500, 90))})


def test_leftovers_that_a_stream_has_found_stay(backend: Fragile, tmp_path: Path) -> None:
    stream = image_with(seeds(500, 90))
    with _reopened_with_leftovers(backend, tmp_path) as store:
        writer = store.open_writer("b", "n1")
        writer.write(memoryview(stream))
        store.free_leftovers()
        assert len(packs_of(backend)) == 2
        store.publish(manifest_of(request_of("b", "b"), [writer.finish()]))
        store.free_leftovers()
        assert_same(store, "b", {"n1": stream})


def test_a_store_that_is_closed_does_not_wait_until_all_leftovers_are_freed(backend: Fragile, tmp_path: Path) -> None:
    maps: list[str] = []
    reading, go_on = threading.Event(), threading.Event()

    def slowly(key: str) -> None:
        if key.startswith("images/"):
            maps.append(key)
            reading.set()
            assert go_on.wait(20)

    with opened(backend, tmp_path) as store:
        take_images(store, "a", {f"n{number}": image_with(seeds(number, 3)) for number in range(1, 6)})
    store = PageStore(backend, tmp_path)
    backend.before_get = slowly
    freeing, closing = threading.Thread(target=store.free_leftovers), threading.Thread(target=store.close)
    freeing.start()
    assert reading.wait(20)
    closing.start()
    while not store._usage._closed.is_set():
        time.sleep(0.001)
    go_on.set()
    for thread in (closing, freeing):
        thread.join(20)
        assert not thread.is_alive()
    assert len(maps) == 1
    with pytest.raises(Conflict, match="closed"):
        store.plan_collection()


def _check_reopened(backend: Fragile, folder: Path, done: list[str]) -> None:
    images = {
        "a": {"n1": image_with(seeds(1, 90)), "n2": image_with(seeds(30, 90))},
        "b": {"n1": image_with(seeds(60, 60))},
    }
    with opened(backend, folder) as store:
        listed = {manifest.name for manifest in store.snapshots()}
        for name in listed:
            store.verify(name)
            if name in images:
                assert_same(store, name, images[name])
        assert listed >= {name for name in "abc" if f"{name} is taken" in done} - {"a"}
        assert "a" in listed or "c is taken" in done or "a is taken" not in done
        assert not ("a" in listed and "a is deleted" in done)
        for name in "abc":
            if name not in listed:
                store.discard(name)
        store.collect(store.plan_collection(min_rubbish=0))
        assert store.stats().rubbish_bytes <= 100 * store.stats().packs + 64
        for name in listed:
            store.verify(name)
            store.delete(name)
        assert [key for key, _size in backend.list()] == ["store.json"]


# --- collections beside snapshots -------------------------------------------------------------------------------------


def with_rubbish(store: PageStore) -> None:
    """A pack of which half is rubbish."""
    take_images(store, "a", {"n1": image_with(seeds(1, 200))})
    take_images(store, "b", {"n1": image_with(seeds(1, 100))})
    store.delete("a")


def test_what_is_found_while_a_collection_is_at_work_stays(backend: Fragile, store: PageStore) -> None:
    """The new snapshot needs just those pages that the collection took for rubbish when it looked."""
    with_rubbish(store)
    plan = store.plan_collection()
    assert len(plan.rewrite) == 1
    stream = image_with(seeds(101, 100))
    taken: list[str] = []

    def take_just_before_the_new_pack(key: str) -> None:
        if key.startswith("packs/") and not taken:
            taken.append("c")
            take_images(store, "c", {"n1": stream})

    backend.before_put = take_just_before_the_new_pack
    assert store.collect(plan).rewrite == ()
    assert taken
    assert_same(store, "c", {"n1": stream})
    store.verify("c")
    store.verify("b")
    assert len(packs_of(backend)) == len({pack.key for pack in store._catalog.packs.values()})


def test_what_a_stream_has_found_before_a_collection_stays(backend: Fragile, store: PageStore) -> None:
    with_rubbish(store)
    stream = image_with(seeds(101, 100))
    store.stage(request_of("c", "c"))
    writer = store.open_writer("c", "n1")
    writer.write(memoryview(stream)[:-50])
    assert store.plan_collection().rewrite == ()
    plan = store.plan_collection()
    store.collect(plan)
    writer.write(memoryview(stream)[-50:])
    store.publish(manifest_of(request_of("c", "c"), [writer.finish()]))
    assert_same(store, "c", {"n1": stream})
    store.verify("c")


def test_collections_beside_streams(store: PageStore) -> None:
    """Snapshots are taken and deleted while collections run: whatever is listed verifies."""
    faults: list[BaseException] = []
    ended = threading.Event()

    def collect() -> None:
        try:
            while not ended.is_set():
                store.collect(store.plan_collection(min_rubbish=0))
        except BaseException as error:
            faults.append(error)

    collecting = threading.Thread(target=collect)
    collecting.start()
    images = {f"s{number}": {"n1": image_with(seeds(1 + 37 * (number % 5), 150))} for number in range(25)}
    try:
        for number, (name, streams) in enumerate(images.items()):
            take_images(store, name, streams)
            if number >= 2:
                store.delete(f"s{number - 2}")
    finally:
        ended.set()
        collecting.join()
    assert faults == []
    for name in ("s23", "s24"):
        store.verify(name)
        assert_same(store, name, images[name])
    store.collect(store.plan_collection(min_rubbish=0))
    assert store.stats().rubbish_bytes <= 100 * store.stats().packs + 64


def test_a_put_that_fails_fails_those_who_need_it_only(backend: Fragile, store: PageStore) -> None:
    store.stage(request_of("a", "a", ("n1", "n2")))

    def refuse(key: str) -> None:
        if key.startswith("packs/"):
            raise MachineFault("the disk hums")

    backend.before_put = refuse
    with pytest.raises(MachineFault, match="the disk hums"):
        put_image(store, "a", "n1", image_with(seeds(1, 30)))
    backend.before_put = lambda key: None
    first = put_image(store, "a", "n1", image_with(seeds(1, 30)))
    second = put_image(store, "a", "n2", image_with(seeds(1, 40)))
    store.publish(manifest_of(request_of("a", "a", ("n1", "n2")), [first, second]))
    store.verify("a")
