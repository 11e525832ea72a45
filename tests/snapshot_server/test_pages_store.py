"""What the page store promises of pages: kept once, wherever they come from; given back as they were."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pages_harness import assert_same, image_with, loaded, opened, packs_of, portions, put_image, seeds, take_images
from snapshot_harness import MIB, image_of, manifest_of, request_of
from snapshot_harness import stream_of as opaque_stream
from stream_harness import Record, devices, page_of, stream_of

from geni_violin.core.errors import MachineFault, NoSpace
from geni_violin.snapshot_server.backends.memory import MemoryBackend
from geni_violin.snapshot_server.pages.page_store import PageStore, open_folder


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def store(backend: MemoryBackend, tmp_path: Path) -> Iterator[PageStore]:
    with opened(backend, tmp_path) as store:
        yield store


def test_an_image_of_every_kind_of_page_comes_back(store: PageStore) -> None:
    records = [
        *(Record(0, page, page_of(page % 7)) for page in range(300)),
        *(Record(0, page, 0) for page in range(300, 400)),
        Record(0, 400, 0xAA),
        Record(1, 0, page_of(3)),
        Record(1, 1, 0),
        *(Record(0, page, bytes((page % 256, 1)) * 2048) for page in range(410, 590)),
    ]
    stream = stream_of([records[:100], records[100:]])
    take_images(store, "a", {"n1": stream})
    assert_same(store, "a", {"n1": stream})


@pytest.mark.parametrize("portion", [1, 4097, 1 << 20])
def test_the_portions_in_which_it_comes_do_not_matter(store: PageStore, portion: int) -> None:
    stream = image_with(seeds(1, 5))
    request = request_of("a", "a")
    store.stage(request)
    stored = put_image(store, "a", "n1", stream, portion)
    store.publish(manifest_of(request, [stored]))
    assert_same(store, "a", {"n1": stream})


def test_the_last_version_of_a_page_counts_and_the_others_are_rubbish(store: PageStore) -> None:
    first = [Record(0, page, page_of(1000 + page)) for page in range(500)]
    again = [Record(0, page, page_of(2000 + page)) for page in range(250)] + [Record(0, 250, 0)]
    stream = stream_of([first, again])
    take_images(store, "a", {"n1": stream})
    assert_same(store, "a", {"n1": stream})
    rubbish = store.stats().rubbish_bytes
    assert rubbish > 250 * 20
    store.collect(store.plan_collection(min_rubbish=0))
    assert store.stats().rubbish_bytes < rubbish / 10
    assert_same(store, "a", {"n1": stream})


def test_pages_are_kept_once_across_vms_snapshots_and_places(store: PageStore, backend: MemoryBackend) -> None:
    pages = _random_pages(100)
    one = stream_of([[Record(0, page, data) for page, data in enumerate(pages)]])
    other = stream_of([[Record(0, 599 - page, data) for page, data in enumerate(pages)]])
    first = take_images(store, "a", {"n1": one, "n2": other})
    assert first.vms[0].stored_bytes > 100 * 4096
    assert first.vms[1].stored_bytes < 10_000
    second = take_images(store, "b", {"n1": one})
    assert second.vms[0].stored_bytes < 10_000
    kept = sum(size for _key, size in backend.list("packs/"))
    assert 100 * 4096 < kept < 100 * 4096 + 20_000
    for snapshot_id, streams in (("a", {"n1": one, "n2": other}), ("b", {"n1": one})):
        assert_same(store, snapshot_id, streams)


def test_two_streams_at_a_time_bring_a_page_once(store: PageStore, backend: MemoryBackend) -> None:
    stream = stream_of([[Record(0, page, data) for page, data in enumerate(_random_pages(300))]])
    request = request_of("a", "a", ("n1", "n2", "n3"), expected_bytes=4 * MIB)
    store.stage(request)
    writers = {vm: store.open_writer("a", vm) for vm in ("n1", "n2", "n3")}
    for portion in portions(stream, 100_000):  # in lockstep, so that all of it is new to each of them
        for writer in writers.values():
            writer.write(memoryview(portion))
    stored = [writer.finish() for writer in writers.values()]
    store.publish(manifest_of(request, stored))
    assert sum(size for _key, size in backend.list("packs/")) < 300 * 4096 + 50_000
    assert_same(store, "a", dict.fromkeys(writers, stream))
    assert sum(image.stored_bytes for image in stored) < 300 * 4096 + 100_000


def test_a_stream_that_ends_does_not_wait_for_another(store: PageStore) -> None:
    """What it shares with a stream that stands still is put all the same."""
    stream = image_with(seeds(1, 10))
    store.stage(request_of("a", "a"))
    slow = store.open_writer("a", "n1")
    slow.write(memoryview(stream)[:30_000])
    take_images(store, "b", {"n1": stream})
    assert_same(store, "b", {"n1": stream})
    slow.abort()
    assert_same(store, "b", {"n1": stream})


def test_a_stream_that_is_given_up_takes_nothing_from_another(store: PageStore) -> None:
    stream = image_with(seeds(1, 200))
    for vm_ends_first in (True, False):
        name = f"s{vm_ends_first}".lower()
        request = request_of(name, name, ("n1", "n2"), expected_bytes=4 * MIB)
        store.stage(request)
        given_up, other = store.open_writer(name, "n1"), store.open_writer(name, "n2")
        given_up.write(memoryview(stream)[:500_000])
        other.write(memoryview(stream))
        if vm_ends_first:
            given_up.abort()
        stored = other.finish()
        if not vm_ends_first:
            given_up.abort()
        first = put_image(store, name, "n1", stream)
        store.publish(manifest_of(request, [first, stored]))
        assert_same(store, name, {"n1": stream, "n2": stream})
        store.delete(name)
        assert store.stats().packs == 0


def test_pages_of_one_byte_cost_nothing(store: PageStore) -> None:
    manifest = take_images(store, "a", {"n1": image_with(dict.fromkeys(range(600), 0))})
    assert manifest.vms[0].stored_bytes < 1500
    assert store.stats().logical_bytes < 1000


def test_what_is_not_understood_is_stored_whole_and_said_so(store: PageStore) -> None:
    stream = opaque_stream(3 * MIB + 5)
    store.stage(request_of("a", "a"))
    stored = put_image(store, "a", "n1", stream)
    assert "stored whole" in stored.note
    store.publish(manifest_of(request_of("a", "a"), [stored]))
    assert image_of(store, "a", "n1") == stream
    known = request_of("b", "b")
    store.stage(known)
    assert put_image(store, "b", "n1", image_with(seeds(1, 3))).note == ""


def test_what_is_understood_up_to_a_place_is_stored_up_to_it(store: PageStore) -> None:
    records = [Record(0, page, page_of(page)) for page in range(1, 90)]
    stream = stream_of([[*records, Record(0, 3, b"patch", patch=True), Record(0, 99, page_of(7))]])
    stored = take_images(store, "a", {"n1": stream})
    assert_same(store, "a", {"n1": stream})
    assert stored.vms[0].received_bytes == len(stream)


def test_a_long_state_of_devices_comes_back(store: PageStore) -> None:
    state = np.random.default_rng(1).bytes(3 * MIB + 17)
    stream = image_with(seeds(1, 3), state)
    take_images(store, "a", {"n1": stream})
    assert_same(store, "a", {"n1": stream})


def test_a_reopened_store_knows_its_pages(backend: MemoryBackend, tmp_path: Path) -> None:
    stream = image_with(seeds(1, 100))
    with opened(backend, tmp_path / "1") as store:
        take_images(store, "a", {"n1": stream})
    for folder, lose in (("1", False), ("1", True), ("2", False)):
        if lose:
            (tmp_path / "1/index.bin").unlink()
        with opened(backend, tmp_path / folder) as store:
            name = f"{folder}{lose}".lower()
            assert take_images(store, name, {"n1": stream}).vms[0].stored_bytes < 6000
            assert_same(store, "a", {"n1": stream})
            store.verify("a")
    assert len(packs_of(backend)) == 1


def test_a_quota_ends_the_snapshot_that_exceeds_it(store: PageStore) -> None:
    """The manifests of the harness are all of one slice."""
    pages = _random_pages(400)
    one = stream_of([[Record(0, page, data) for page, data in enumerate(pages[:200])]])
    two = stream_of([[Record(0, page, data) for page, data in enumerate(pages)]])
    store.set_quota("mandelbrot", 300 * 4096)
    request = request_of("a", "a", expected_bytes=8 * MIB)
    staged = type(request)("a", "a", request.images, "mandelbrot")
    store.stage(staged)
    store.publish(manifest_of(staged, [put_image(store, "a", "n1", one)]))
    for name, stream in (("b", two),):
        store.stage(type(request)(name, name, request.images, "mandelbrot"))
        with pytest.raises(NoSpace, match="quota"):
            put_image(store, name, "n1", stream + b"")
        store.discard(name)
    assert [(quota.slice, quota.limit_bytes) for quota in store.quotas()] == [("mandelbrot", 300 * 4096)]
    assert store.quotas()[0].used_bytes == store.snapshot("a").vms[0].stored_bytes
    store.set_quota("mandelbrot", 100)
    with pytest.raises(NoSpace, match="quota of slice mandelbrot is used up"):
        store.stage(type(request)("c", "c", request.images, "mandelbrot"))
    store.set_quota("mandelbrot", None)
    take_images(store, "b", {"n1": two})
    assert_same(store, "b", {"n1": two})


def test_figures_of_what_is_shared(store: PageStore) -> None:
    pages = _random_pages(150)
    one = stream_of([[Record(0, page, data) for page, data in enumerate(pages[:100])]], devices(b""))
    two = stream_of([[Record(0, page, data) for page, data in enumerate(pages[50:])]], devices(b""))
    take_images(store, "a", {"n1": one})
    take_images(store, "b", {"n1": two})
    stats = store.stats()
    a, b = stats.snapshots
    assert (a.id, b.id, a.slice) == ("a", "b", "mandelbrot")
    assert 100 * 4096 <= a.logical_bytes == b.logical_bytes < 101 * 4096
    assert 50 * 4096 < a.shared_bytes < 52 * 4096 + 2000
    assert a.shared_bytes == b.shared_bytes == stats.shared_bytes
    assert 100 * 4096 < a.needed_bytes < 102 * 4096 + 5000
    assert stats.needed_bytes == pytest.approx(a.needed_bytes + b.needed_bytes - stats.shared_bytes, abs=2)
    assert 0 <= stats.rubbish_bytes < 2000
    before = stats.stored_bytes
    store.delete("a")
    plan = store.plan_collection(min_rubbish=0)
    freed = store.collect(plan).freed_bytes
    assert freed == pytest.approx(a.needed_bytes - a.shared_bytes, abs=3000)
    assert store.stats().stored_bytes == pytest.approx(before - freed, abs=10)


def test_a_store_of_an_earlier_release_is_left_alone(tmp_path: Path) -> None:
    for part in ("images", "manifests", "stagings", "channels"):
        (tmp_path / part).mkdir()
    with pytest.raises(MachineFault, match="store of an earlier release"):
        open_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["channels", "images", "manifests", "stagings"]


@pytest.mark.parametrize("found", [b"{", b'{"format": "GENI-VIOLIN page store", "version": 2}', None])
def test_a_backend_with_something_else_in_it_is_left_alone(tmp_path: Path, found: bytes | None) -> None:
    backend = MemoryBackend()
    backend.put("store.json" if found else "photos/1", found or b"x")
    before = list(backend.list())
    with pytest.raises(MachineFault, match=r"store\.json|version|page store"):
        PageStore(backend, tmp_path)
    assert list(backend.list()) == before


def test_reading_goes_on_while_the_store_changes(store: PageStore) -> None:
    """A reader has what it needs pinned: neither a deletion nor a collection takes it away."""
    stream = image_with(seeds(1, 500))
    take_images(store, "a", {"n1": stream})
    take_images(store, "b", {"n1": image_with(seeds(1, 100))})
    with store.open_image("a", "n1") as reader:
        chunks = reader.chunks()
        parts = [next(chunks)]
        done = threading.Event()

        def disturb() -> None:
            store.delete("a")
            store.collect(store.plan_collection(min_rubbish=0))
            done.set()

        thread = threading.Thread(target=disturb)
        thread.start()
        assert done.wait(30)
        thread.join()
        parts += chunks
    assert loaded(b"".join(parts)) == loaded(stream)
    store.collect(store.plan_collection(min_rubbish=0))
    assert store.stats().rubbish_bytes < 500
    assert_same(store, "b", {"n1": image_with(seeds(1, 100))})


def _random_pages(count: int) -> list[bytes]:
    return [np.random.default_rng(seed).bytes(4096) for seed in range(count)]
