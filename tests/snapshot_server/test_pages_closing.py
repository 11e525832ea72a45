"""Operations beside one another, and beside the end of the store: no deadlock, nothing half done, nothing lost."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pages_harness import assert_same, image_with, opened, packs_of, put_image, seeds, take_images
from snapshot_harness import MACS, files_below, manifest_of, request_of, stage_recorded
from test_pages_faults import Fragile, with_rubbish

from geni_violin.core.errors import Conflict, MachineFault, NotFound
from geni_violin.core.messages import SealChannels
from geni_violin.snapshot_server.backends import local
from geni_violin.snapshot_server.pages.page_store import PageStore, open_folder

PATIENCE_S = 20.0
N1 = {"n1": image_with(seeds(1, 70))}


class Slow(Fragile):
    """Deletions of some objects wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = ""
        self.is_waiting, self.go = threading.Event(), threading.Event()

    def delete(self, key: str) -> None:
        if self.slow and key.startswith(self.slow):
            self.is_waiting.set()
            assert self.go.wait(PATIENCE_S)
        super().delete(key)


@pytest.fixture
def backend() -> Slow:
    return Slow()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_sealing_beside_a_deletion(backend: Slow, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with opened(backend, tmp_path) as store:
        take_images(store, "a", N1)
        stage_recorded(store)
        backend.slow = "manifests/"
        deleting = pool.submit(store.delete, "a")
        assert backend.is_waiting.wait(PATIENCE_S)
        sealing = pool.submit(store.seal_channels, "id-1", SealChannels(MACS))
        with pytest.raises(TimeoutError):  # an image is looked up under the lock that the deletion holds
            sealing.result(0.2)
        backend.go.set()
        deleting.result(PATIENCE_S)
        assert len(sealing.result(PATIENCE_S)) == len(MACS)


def test_a_store_is_closed_when_the_collection_has_ended(
    backend: Slow, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Packs are neither written nor deleted when another server may have the store already."""
    store = PageStore(backend, tmp_path)
    with_rubbish(store)
    plan = store.plan_collection()
    assert len(plan.rewrite) == 1
    putting, go = threading.Event(), threading.Event()

    def wait(key: str) -> None:
        putting.set()
        assert go.wait(PATIENCE_S)

    backend.before_put = wait
    collecting = pool.submit(store.collect, plan)
    assert putting.wait(PATIENCE_S)
    closing = pool.submit(store.close)
    with pytest.raises(TimeoutError):
        closing.result(0.2)
    with pytest.raises(MachineFault), opened(backend, tmp_path):
        pass
    go.set()
    closing.result(PATIENCE_S)
    assert collecting.done()
    with pytest.raises(Conflict, match="being closed"):
        store.collect(plan)
    with opened(backend, tmp_path) as again:
        assert_same(again, "b", {"n1": image_with(seeds(1, 100))})


def test_closing_waits_for_what_is_being_changed(backend: Slow, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    store = PageStore(backend, tmp_path)
    take_images(store, "a", N1)
    backend.slow = "manifests/"
    deleting = pool.submit(store.delete, "a")
    assert backend.is_waiting.wait(PATIENCE_S)
    closing = pool.submit(store.close)
    with pytest.raises(TimeoutError):
        closing.result(0.2)
    with pytest.raises(MachineFault), opened(backend, tmp_path):
        pass
    backend.go.set()
    deleting.result(PATIENCE_S)
    closing.result(PATIENCE_S)
    with opened(backend, tmp_path) as again:
        assert again.snapshots() == []


def test_a_deletion_does_not_wait_for_a_sweep_that_is_under_way(
    backend: Slow, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Whoever sweeps sweeps once more."""
    with opened(backend, tmp_path) as store:
        for name, first in (("a", 1), ("b", 1001)):
            take_images(store, name, {"n1": image_with(seeds(first, 70), name.encode())})
    with opened(backend, tmp_path) as store:
        reading, go = threading.Event(), threading.Event()

        def wait(key: str) -> None:
            if key == "images/b/n1":
                reading.set()
                assert go.wait(PATIENCE_S)

        backend.before_get = wait
        sweeping = pool.submit(store.free_leftovers)
        assert reading.wait(PATIENCE_S)
        pool.submit(store.delete, "a").result(PATIENCE_S)
        assert len(packs_of(backend)) == 2
        go.set()
        sweeping.result(PATIENCE_S)
        assert len(packs_of(backend)) == 1
        assert_same(store, "b", {"n1": image_with(seeds(1001, 70), b"b")})


def test_a_map_that_is_deleted_and_made_anew_while_it_is_read_is_read_again(
    backend: Slow, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with opened(backend, tmp_path) as store:
        take_images(store, "a", N1)
    new = {"n1": image_with(seeds(5001, 70))}
    with opened(backend, tmp_path) as store:
        read, go = threading.Event(), threading.Event()
        original = backend.get

        def late(key: str) -> bytes:
            data = original(key)
            if key == "images/a/n1" and not read.is_set():
                read.set()
                assert go.wait(PATIENCE_S)
            return data

        backend.get = late  # type: ignore[method-assign]
        sweeping = pool.submit(store.free_leftovers)
        assert read.wait(PATIENCE_S)
        store.delete("a")
        take_images(store, "a", new)
        go.set()
        sweeping.result(PATIENCE_S)
        store.free_leftovers()
        assert_same(store, "a", new)


def test_a_snapshot_that_the_backend_does_not_list_yet_survives_a_restart(backend: Slow, tmp_path: Path) -> None:
    """Swift lists what was put only a while later, if its container servers are busy."""
    with opened(backend, tmp_path) as store:
        take_images(store, "a", N1)
    original = backend.list
    for hidden in ("manifests/a.json", "images/a/n1"):
        backend.list = lambda prefix="", hidden=hidden: (  # type: ignore[method-assign, misc]
            entry for entry in original(prefix) if entry[0] != hidden
        )
        with opened(backend, tmp_path) as store:
            store.free_leftovers()
        backend.list = original  # type: ignore[method-assign]
        with opened(backend, tmp_path) as store:
            assert_same(store, "a", N1)


def test_a_pack_that_is_listed_but_gone_does_not_keep_the_store_from_opening(backend: Slow, tmp_path: Path) -> None:
    with opened(backend, tmp_path) as store:
        take_images(store, "a", N1)
    original = backend.list
    gone = f"packs/{'0' * 32}"
    backend.list = lambda prefix="": iter(  # type: ignore[method-assign]
        sorted([*original(prefix), *([(gone, 4096)] if gone.startswith(prefix) else [])])
    )
    with opened(backend, tmp_path) as store:
        assert_same(store, "a", N1)


def test_a_snapshot_whose_manifest_is_damaged_can_be_deleted(backend: Slow, tmp_path: Path) -> None:
    with opened(backend, tmp_path) as store:
        take_images(store, "a", N1)
        take_images(store, "b", {"n1": image_with(seeds(2001, 70))})
    backend.flip("manifests/a.json", 1000)
    with opened(backend, tmp_path) as store:
        with pytest.raises(MachineFault, match=r"cannot be read|damaged"):
            store.snapshots()
        store.delete("a")
        assert [manifest.id for manifest in store.snapshots()] == ["b"]
        assert_same(store, "b", {"n1": image_with(seeds(2001, 70))})


def test_a_manifest_whose_put_failed_at_the_end_is_made_durable_by_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_folder(tmp_path)
    synced: list[Path] = []
    failing = True

    def sync(folder: Path) -> None:
        if folder.name == "manifests" and failing:
            raise OSError(5, "Input/output error")
        synced.append(folder)

    request = request_of("a", "a", ("n1",), 1 << 26)
    store.stage(request)
    stored = put_image(store, "a", "n1", N1["n1"])
    manifest = manifest_of(request, [stored])
    monkeypatch.setattr(local, "sync_folder", sync)
    with pytest.raises(MachineFault):
        store.publish(manifest)
    with pytest.raises(MachineFault):
        store.publish(manifest)
    failing = False
    assert store.publish(manifest) == manifest
    assert any(folder.name == "manifests" for folder in synced)
    with pytest.raises(NotFound):
        store.staging("a")
    store.close()


def test_an_imports_staging_ends_with_its_server(tmp_path: Path) -> None:
    store = open_folder(tmp_path)
    request = request_of("a", "a", ("n1",), 1 << 26)
    store.stage(request, lasting=False)
    with pytest.raises(Conflict):
        store.stage(request, lasting=False)
    put_image(store, "a", "n1", N1["n1"])
    store.stage(request_of("b", "b", ("n1",), 1 << 26))
    store.close()
    again = open_folder(tmp_path)
    again.free_leftovers()
    assert files_below(tmp_path) == {"state/stagings/b.json"}
    take_images(again, "a", N1)
    again.close()
