"""Power cuts and damaged disks: a listed snapshot is whole, everything else goes."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snapshot_harness import (
    IN_TRANSIT,
    MACS,
    files_below,
    image_of,
    manifest_of,
    request_of,
    stage_recorded,
    store_image,
    stream_of,
    take,
    take_sealed,
    words_of,
)

from geni_violin.core.errors import MachineFault, NoSpace
from geni_violin.core.messages import Manifest, SealChannels
from geni_violin.runtime import pcap
from geni_violin.snapshot_server import records
from geni_violin.snapshot_server.backends import local
from geni_violin.snapshot_server.pages.page_store import PageStore, open_folder

STEPS = ("fsync", "replace", "link", "unlink", "mkdir", "rmdir")


class PowerCut(BaseException):
    """Not an Exception, so that nothing cleans up after it."""


class Recorder:
    """Stands before the system calls that change or secure names: records them, and cuts the power before one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut_before: int = -1) -> None:
        self.steps: list[tuple[str, str]] = []
        self._cut_before = cut_before
        for name in STEPS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if 0 <= self._cut_before <= len(self.steps):  # and what comes after it does not happen either
                raise PowerCut
            target = args[1] if name in ("replace", "link") else args[0]
            self.steps.append((name, _path_of(target)))
            return real(*args, **kwargs)

        return step


def _path_of(target: Any) -> str:
    return Path(f"/proc/self/fd/{target}").readlink().name if isinstance(target, int) else Path(target).name


def crash(store: PageStore) -> None:
    """Let go of the store's locks as the end of its process would; nothing is kept that was not kept before."""
    store._packer.close()
    store._opened._locks.close()


def _secured(steps: list[tuple[str, str]], name: str, folder: str) -> None:
    """An object was given its name after its bytes were on the disk, and its folder was synced after that."""
    at = steps.index(("link", name))
    before = steps[max((number for number in range(at) if steps[number][0] == "link"), default=-1) + 1 : at]
    assert before[0][0] == "fsync"
    assert steps[at + 1] == ("fsync", folder)


def test_an_image_is_secured_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_folder(tmp_path)
    store.stage(request_of())
    writer = store.open_writer("id-1", "n1")
    writer.write(memoryview(stream_of(5000)))
    recorder = Recorder(monkeypatch)
    stored = writer.finish()
    pack = Path(_packs_below(tmp_path)[0]).name
    assert [name for step, name in recorder.steps if step == "link"] == [pack, "n1"]
    _secured(recorder.steps, pack, "packs")
    recorder.steps = recorder.steps[recorder.steps.index(("fsync", "packs")) + 2 :]  # and the temporary name's removal
    _secured(recorder.steps, "n1", "id-1")
    recorder.steps.clear()
    store.publish(manifest_of(request_of(), [stored]))
    _secured(recorder.steps, "id-1.json", "manifests")
    assert recorder.steps[-2:] == [("unlink", "id-1.json"), ("fsync", "stagings")]
    recorder.steps.clear()
    store.delete("id-1")
    removals = [name for step, name in recorder.steps if step == "unlink"]
    assert removals == ["id-1.json", "id-1.json", "n1", pack]  # its staging (none), its manifest, ...
    assert recorder.steps.index(("fsync", "manifests")) < recorder.steps.index(("unlink", "n1"))
    assert recorder.steps.index(("fsync", "id-1")) < recorder.steps.index(("unlink", pack))
    store.close()


def test_channel_states_are_secured_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_folder(tmp_path)
    stored = stage_recorded(store)
    recorder = Recorder(monkeypatch)
    store.put_record("id-1", "n1", "sent", pcap.encode([]))
    assert recorder.steps[-3:] == [("fsync", "n1.sent.partial"), ("replace", "n1.sent"), ("fsync", "id-1")]
    recorder.steps.clear()
    channels = store.seal_channels("id-1", SealChannels(MACS))
    names = [*(f"{vm}.channel" for vm in MACS), "sealed.json"]
    assert [name for step, name in recorder.steps if step == "link"] == names
    for name in names:
        _secured(recorder.steps, name, "id-1")
    recorder.steps.clear()
    store.publish(manifest_of(request_of(vms=tuple(MACS)), stored, channels))
    removed = [name for step, name in recorder.steps if step == "unlink" and "." in name]
    assert removed[0] == "id-1.json"
    assert sorted(removed[1:]) == sorted(f"{vm}.{kind}" for vm in MACS for kind in ("received", "sent"))
    assert recorder.steps.index(("fsync", "manifests")) < recorder.steps.index(("unlink", "id-1.json"))
    store.close()


def _packs_below(folder: Path) -> list[str]:
    """The packs, the oldest first."""
    names = [name for name in files_below(folder) if name.startswith("objects/packs/")]
    return sorted(names, key=lambda name: (folder / name).stat().st_mtime_ns)


def _life(store: PageStore, done: list[str]) -> None:
    """Two snapshots come, one goes, and one is discarded; ``done`` says how far that got."""
    first = take(store, request_of("id-1", "first", ("n1", "n2")))
    done.append("first is published")
    store.stage(request_of("id-2", "second"))
    store_image(store, "id-2", "n1", stream_of(100))
    done.append("second is stored")
    store.discard("id-2")
    done.append("second is discarded")
    take(store, request_of("id-3", "third"))
    done.append("third is published")
    store.delete(first.id)
    done.append("first is deleted")


def _check_reopened(folder: Path, done: list[str]) -> None:
    store = open_folder(folder)
    listed = {manifest.name for manifest in store.snapshots()}
    known = {manifest.id for manifest in store.snapshots()}
    known |= {path.stem for path in (folder / "state/stagings").iterdir()}
    assert {name.split("/")[2] for name in files_below(folder) if name.startswith("objects/images/")} <= known
    store.free_leftovers()
    assert store.plan_collection().delete == ()
    for name in listed:
        store.verify(name)
    sure = {name for name in ("first", "third") if f"{name} is published" in done}
    gone = {name for name in ("first",) if f"{name} is deleted" in done}
    # What was answered holds; the one step that was cut may have happened or not.
    assert listed >= sure - gone - ({"first"} if "third is published" in done else set())
    assert not listed & gone
    assert "second" not in listed
    if done == ["first is published", "second is stored"] and (folder / "state/stagings/id-2.json").exists():
        assert store.stored_image("id-2", "n1") is not None
    for snapshot_id in ("id-1", "id-2", "id-3"):
        if snapshot_id not in {manifest.id for manifest in store.snapshots()}:
            store.discard(snapshot_id)
    for manifest in store.snapshots():
        store.delete(manifest.id)
    assert files_below(folder) == set()
    store.close()


def test_the_power_may_fail_before_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = 0
    while True:
        folder, done = tmp_path / str(cuts), list[str]()
        store = open_folder(folder)
        with monkeypatch.context() as patch:
            Recorder(patch, cut_before=cuts)
            try:
                _life(store, done)
            except (PowerCut, MachineFault):  # a worker's power cut is told as a fault by the stream
                cuts += 1
                crashed = True
            else:
                crashed = False
        crash(store)
        _check_reopened(folder, done)
        if not crashed:
            break
    assert cuts > 40  # a life has that many steps; fewer would mean that they are no longer seen


def _check_sealed_life(folder: Path, done: list[str]) -> None:
    """Whatever was cut short, asking for everything again gives the same snapshot."""
    store = open_folder(folder)
    assert not [name for name in files_below(folder) if name.endswith(".partial")]
    if "published" in done:
        assert [manifest.name for manifest in store.snapshots()] == ["first"]
    if not store.snapshots():
        if "sealed" in done:
            assert [one.frames for one in store.seal_channels("id-1", SealChannels(MACS))] == [1, 3, 1]
        take_sealed(store)
    store.verify("first")
    assert {vm: words_of(store.channel("first", vm)) for vm in MACS} == IN_TRANSIT
    assert not [name for name in files_below(folder) if name.endswith((".received", ".sent"))]
    store.delete("first")
    assert files_below(folder) == set()
    assert list((folder / "state/records").iterdir()) == []
    store.close()


def test_the_power_may_fail_before_any_step_of_a_sealed_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, crashed = 0, True
    while crashed:
        folder, done = tmp_path / str(cuts), list[str]()
        store = open_folder(folder)
        with monkeypatch.context() as patch:
            Recorder(patch, cut_before=cuts)
            try:
                stored = stage_recorded(store)
                done.append("recorded")
                channels = store.seal_channels("id-1", SealChannels(MACS))
                done.append("sealed")
                store.publish(manifest_of(request_of(vms=tuple(MACS)), stored, channels))
                done.append("published")
            except (PowerCut, MachineFault):  # a worker's power cut is told as a fault by the stream
                cuts += 1
            else:
                crashed = False
        crash(store)
        _check_sealed_life(folder, done)
    assert cuts > 60  # such a life has that many steps; fewer would mean that they are no longer seen


def test_the_power_may_fail_while_a_sealed_snapshot_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, crashed = 0, True
    while crashed:
        folder = tmp_path / str(cuts)
        store = open_folder(folder)
        take_sealed(store)
        with monkeypatch.context() as patch:
            Recorder(patch, cut_before=cuts)
            try:
                store.delete("first")
            except (PowerCut, MachineFault):  # a worker's power cut is told as a fault by the stream
                cuts += 1
            else:
                crashed = False
        crash(store)
        store = open_folder(folder)
        for manifest in store.snapshots():
            assert {vm: words_of(store.channel(manifest.id, vm)) for vm in MACS} == IN_TRANSIT
            store.verify(manifest.id)
            store.delete(manifest.id)
        store.collect(store.plan_collection())
        assert files_below(folder) == set()
        assert list((folder / "state/records").iterdir()) == []
        store.close()
    assert cuts > 8


def test_what_is_durable_and_staged_outlives_a_crash(tmp_path: Path) -> None:
    request = request_of(vms=("n1", "n2"))
    store = open_folder(tmp_path)
    store.stage(request)
    first = store_image(store, "id-1", "n1", stream_of(5000))
    store.open_writer("id-1", "n2").write(memoryview(stream_of(5000)))
    crash(store)
    store = open_folder(tmp_path)
    assert store.stored_image("id-1", "n1") == first
    assert store.stored_image("id-1", "n2") is None
    assert not [name for name in files_below(tmp_path) if name.endswith(".partial")]
    second = store_image(store, "id-1", "n2", stream_of(6000))
    store.publish(manifest_of(request, [first, second]))
    store.verify("id-1")
    store.close()


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "BLAKE3": _flip_a_bit,
    "ends before": lambda path: os.truncate(path, 4000),
    "no object": Path.unlink,
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, words: str) -> None:
    store = open_folder(tmp_path)
    take(store, request_of(vms=("n1", "n2")))
    second = _packs_below(tmp_path)[1]
    DAMAGES[words](tmp_path / second)
    with pytest.raises(MachineFault) as caught:
        store.verify("first")
    assert words in caught.value.message
    assert second.removeprefix("objects/") in caught.value.message
    assert "VM n2" in caught.value.message
    assert "VM n1" not in caught.value.message
    store.close()


MAP_DAMAGES: dict[str, Callable[[Path], object]] = {
    "BLAKE3": _flip_a_bit,
    "does not have the BLAKE3": lambda path: os.truncate(path, 100),
    "no object": Path.unlink,
}


@pytest.mark.parametrize("words", MAP_DAMAGES)
def test_a_damaged_map_is_found_and_named(tmp_path: Path, words: str) -> None:
    store = open_folder(tmp_path)
    take(store, request_of(vms=("n1", "n2")))
    MAP_DAMAGES[words](tmp_path / "objects/images/id-1/n2")
    for call in (lambda: store.verify("first"), lambda: store.open_image("id-1", "n2")):
        with pytest.raises(MachineFault) as caught:
            call()
        assert words in caught.value.message
        assert "images/id-1/n2" in caught.value.message
        assert "VM n2" in caught.value.message
        assert "VM n1" not in caught.value.message
    store.close()


CHANNEL_DAMAGES: dict[str, Callable[[Path], object]] = {
    "BLAKE3": _flip_a_bit,
    "30 bytes": lambda path: os.truncate(path, 30),
    "no object": Path.unlink,
}


@pytest.mark.parametrize("words", CHANNEL_DAMAGES)
def test_a_damaged_channel_state_is_named_and_not_given_back(tmp_path: Path, words: str) -> None:
    store = open_folder(tmp_path)
    take_sealed(store)
    key = "channels/id-1/n2.channel"
    CHANNEL_DAMAGES[words](tmp_path / "objects" / key)
    for call in (lambda: store.verify("first"), lambda: store.channel("first", "n2")):
        with pytest.raises(MachineFault) as caught:
            call()
        assert words in caught.value.message
        assert key in caught.value.message
    assert words_of(store.channel("first", "n1")) == IN_TRANSIT["n1"]
    store.close()


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("{")])
def test_a_lost_seal_is_no_snapshot_without_frames(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    store = open_folder(tmp_path)
    take_sealed(store)
    harm(tmp_path / "objects/channels/id-1/sealed.json")
    store.close()
    store = open_folder(tmp_path)  # a damaged snapshot does not keep the others from being served
    for call in (lambda: store.verify("first"), lambda: store.channel("first", "n2")):
        with pytest.raises(MachineFault, match=r"sealed\.json"):
            call()
    store.delete("first")
    assert files_below(tmp_path) == set()
    store.close()


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_image_is_not_given_back(tmp_path: Path, words: str) -> None:
    store = open_folder(tmp_path)
    take(store, request_of())
    DAMAGES[words](tmp_path / _packs_below(tmp_path)[0])
    with pytest.raises(MachineFault, match=words):
        image_of(store, "id-1", "n1")
    store.close()


def test_an_unreadable_manifest_is_named_and_its_images_are_kept(tmp_path: Path) -> None:
    store = open_folder(tmp_path)
    take(store, request_of())
    store.close()
    (tmp_path / "objects/manifests/id-1.json").write_text("{")
    store = open_folder(tmp_path)
    with pytest.raises(MachineFault, match=r"manifests/id-1\.json cannot be read"):
        store.snapshots()
    assert (tmp_path / "objects/images/id-1/n1").exists()
    store.close()


def test_a_manifest_of_a_newer_release_is_named(tmp_path: Path) -> None:
    store = open_folder(tmp_path)
    take(store, request_of())
    store.close()
    path = tmp_path / "objects/manifests/id-1.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    store = open_folder(tmp_path)
    with pytest.raises(MachineFault, match="of version 2"):
        store.snapshots()
    store.close()


@pytest.mark.parametrize("step", ["record", "seal"])
def test_a_full_disk_while_channel_states_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store = open_folder(tmp_path)
    stage_recorded(store)
    before = files_below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", _write_to_full_device)
        patch.setattr(local, "_write_durably", _fill_the_device)
        with pytest.raises(NoSpace, match="disk is full"):
            if step == "record":
                store.put_record("id-1", "n1", "received", pcap.encode([]))
            else:
                store.seal_channels("id-1", SealChannels(MACS))
    assert files_below(tmp_path) == before
    assert [channel.frames for channel in store.seal_channels("id-1", SealChannels(MACS))] == [1, 3, 1]
    store.close()


def test_a_full_disk_at_the_commit_point_leaves_the_snapshot_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of()
    store = open_folder(tmp_path)
    store.stage(request)
    manifest = manifest_of(request, [store_image(store, "id-1", "n1", stream_of(5000))])
    with monkeypatch.context() as patch:
        patch.setattr(local, "_write_durably", _fill_the_device)
        with pytest.raises(NoSpace, match="disk is full"):
            store.publish(manifest)
    assert store.snapshots() == list[Manifest]()
    assert not [name for name in files_below(tmp_path) if name.endswith(".partial")]
    assert store.publish(manifest) == manifest
    store.close()


def test_a_full_disk_just_after_the_commit_point_is_not_told_as_a_certain_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest has its name; only its folder could not be synced. Whoever asked has to ask again."""
    request = request_of()
    store = open_folder(tmp_path)
    store.stage(request)
    manifest = manifest_of(request, [store_image(store, "id-1", "n1", stream_of(5000))])

    def fail(folder: Path) -> None:
        if folder.name == "manifests":
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(local, "sync_folder", fail)
        with pytest.raises(MachineFault) as caught:
            store.publish(manifest)
    assert not isinstance(caught.value, NoSpace)
    assert store.publish(manifest) == manifest
    assert store.snapshots() == [manifest]
    store.close()


def _fill_the_device(path: Path, data: bytes | memoryview) -> None:
    """As much of an object as there is room for."""
    path.write_bytes(bytes(data[:1]))
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(data)


def _write_to_full_device(path: Path, data: bytes) -> None:
    """Leaves the half-written file that the real one would, with the kernel's own error."""
    path.with_name(path.name + ".partial").write_bytes(bytes(data[:1]))
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(data)
