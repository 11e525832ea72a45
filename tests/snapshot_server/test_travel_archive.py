"""Archives: a snapshot out of one store and into another; and everything that must not get in."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from snapshot_harness import MACS, RECEIVED, files_below, manifest_of, request_of, stage_recorded, store_image, words_of

from geni_violin.core.errors import AlreadyExists, Conflict, InvalidInput, NoSpace, NotFound
from geni_violin.core.messages import Manifest, SealChannels
from geni_violin.core.model import Image, SliceSpec, SwitchSpec, VmSpec
from geni_violin.snapshot_server.pages.page_store import PageStore, open_folder
from geni_violin.snapshot_server.travel.archive_format import HEAD, MAGIC, encode_end_head, encode_head
from geni_violin.snapshot_server.travel.archive_in import ArchiveReader
from geni_violin.snapshot_server.travel.exporting import export_snapshot
from geni_violin.snapshot_server.travel.importing import import_archive

Entries = list[tuple[bytes, bytes]]


def spec_of(names: tuple[str, ...]) -> SliceSpec:
    """A slice that has these VMs."""
    image = Image("/boot/vmlinuz", "/boot/initrd", "vm={vm}", 128, 1)
    vms = tuple(
        VmSpec(name, number, "h1", "s1", f"10.9.0.{number}/24", MACS[name], image)
        for number, name in enumerate(names, start=1)
    )
    return SliceSpec("mandelbrot", ("h1",), (SwitchSpec("s1", "h1"),), (), vms)


def take_in(store: PageStore, snapshot_id: str = "id-1", name: str = "first") -> Manifest:
    """A snapshot of three VMs with frames in transit, in a store."""
    stored = stage_recorded(store, snapshot_id, name)
    channels = store.seal_channels(snapshot_id, SealChannels(MACS))
    manifest = manifest_of(request_of(snapshot_id, name, tuple(MACS)), stored, channels)
    return store.publish(replace(manifest, slice=spec_of(tuple(MACS))))


def image_in(store: PageStore, snapshot: str, vm: str) -> bytes:
    """What a restore would get."""
    with store.open_image(snapshot, vm) as reader:
        return b"".join(reader.chunks())


def archive_of(store: PageStore, snapshot: str, scratch: Path) -> bytes:
    """A whole archive."""
    scratch.mkdir(exist_ok=True)
    with export_snapshot(store, snapshot, "archive", "", scratch) as going:
        return b"".join(iter(going.take, b""))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[PageStore]:
    """A store with one snapshot, "first"."""
    store = open_folder(tmp_path / "here")
    take_in(store)
    yield store
    store.close()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[PageStore]:
    """An empty store on another machine."""
    store = open_folder(tmp_path / "there")
    yield store
    store.close()


@pytest.fixture
def bring(there: PageStore, tmp_path: Path) -> Callable[[bytes], Manifest]:
    """Imports an archive there."""
    (tmp_path / "scratch-there").mkdir()

    def run(data: bytes) -> Manifest:
        (tmp_path / "archive").write_bytes(data)
        return import_archive(there, tmp_path / "archive", tmp_path / "scratch-there")

    return run


def entries_of(data: bytes) -> Entries:
    """An archive's keys and objects, read by nothing but the format's description."""
    entries: Entries = []
    at = len(MAGIC)
    while True:
        kind, key_bytes, data_bytes = HEAD.unpack_from(data, at)
        at += HEAD.size
        if kind == b"ENDS":
            assert data[at:] == blake3(data[:at]).digest()
            return entries
        entries.append((data[at : at + key_bytes], data[at + key_bytes : at + key_bytes + data_bytes]))
        at += key_bytes + data_bytes
        assert data[at : at + 32] == blake3(data[at - key_bytes - data_bytes : at]).digest()
        at += 32


def archive_from(entries: Entries, magic: bytes = MAGIC) -> bytes:
    """An archive of these objects, with all the checksums that it needs."""
    parts = [magic]
    for key, data in entries:
        parts += [encode_head(key, len(data)), key, data, blake3(key + data).digest()]
    whole = b"".join([*parts, encode_end_head()])
    return whole + blake3(whole).digest()


# --- what should work -------------------------------------------------------------------------------------------------


def test_what_arrives_restores_like_what_left(
    here: PageStore, there: PageStore, bring: Callable[[bytes], Manifest], tmp_path: Path
) -> None:
    left = here.snapshot("first")
    arrived = bring(archive_of(here, "first", tmp_path / "scratch"))
    assert there.snapshots() == [arrived]
    assert there.verify("first") == arrived
    assert (arrived.id, arrived.name, arrived.slice, arrived.notes) == (left.id, left.name, left.slice, left.notes)
    for vm in left.vms:
        assert image_in(there, "first", vm.name) == image_in(here, "first", vm.name)
        assert there.channel("first", vm.name) == here.channel("first", vm.name)
    assert arrived.frames_in_transit == left.frames_in_transit > 0
    assert words_of(there.channel("first", "n1"))[: len(RECEIVED["n1"])] == ["2 to 1"]


def test_an_archive_travels_on(
    here: PageStore, there: PageStore, bring: Callable[[bytes], Manifest], tmp_path: Path
) -> None:
    first = archive_of(here, "first", tmp_path / "scratch")
    bring(first)
    keys = [
        {key.split(b"/")[0] for key, _ in entries_of(data)}
        for data in (first, archive_of(there, "first", tmp_path / "scratch"))
    ]
    assert keys[0] == keys[1] == {b"store.json", b"packs", b"images", b"channels", b"manifests"}


def test_the_manifest_comes_last(here: PageStore, tmp_path: Path) -> None:
    """So no part of an archive can be taken for a whole one, even by a reader that does not check its end."""
    assert entries_of(archive_of(here, "first", tmp_path / "scratch"))[-1][0] == b"manifests/id-1.json"


def test_like_images_are_in_an_archive_once(there: PageStore, tmp_path: Path) -> None:
    data = b"QEVM\0\0\0\3\xff" + os.urandom(3 << 20)  # the byte that no section begins with: stored whole
    for name, vms in (("one", ("n1",)), ("three", ("n1", "n2", "n3"))):
        request = request_of(name, name, vms)
        there.stage(request)
        stored = [store_image(there, name, vm, data) for vm in vms]
        there.publish(replace(manifest_of(request, stored), slice=spec_of(vms)))
    one, three = (len(archive_of(there, name, tmp_path / "scratch")) for name in ("one", "three"))
    assert three < one * 1.1


def test_exporting_leaves_nothing_behind(here: PageStore, tmp_path: Path) -> None:
    before = files_below(tmp_path / "here")
    archive_of(here, "first", tmp_path / "scratch")
    with export_snapshot(here, "first", "archive", "", tmp_path / "scratch"):
        pass  # nobody takes it
    assert files_below(tmp_path / "here") == before
    assert list((tmp_path / "scratch").iterdir()) == []


def test_one_vm_as_a_bare_stream(here: PageStore, tmp_path: Path) -> None:
    with export_snapshot(here, "first", "qemu", "n2", tmp_path) as going:
        assert b"".join(iter(going.take, b"")) == image_in(here, "first", "n2")


@pytest.mark.parametrize(
    ("form", "vm", "kind", "words"),
    [
        ("qemu", "", InvalidInput, "has 3 VMs; choose one of n1, n2, n3"),
        ("qemu", "n9", NotFound, "no VM 'n9'"),
        ("archive", "n1", InvalidInput, "all VMs"),
        ("zip", "", InvalidInput, "no form 'zip'"),
    ],
)
def test_what_cannot_be_exported(
    here: PageStore, tmp_path: Path, form: str, vm: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        export_snapshot(here, "first", form, vm, tmp_path)


def test_libvirt_needs_a_stream_that_tells_its_machine(here: PageStore, tmp_path: Path) -> None:
    with (
        export_snapshot(here, "first", "libvirt", "n1", tmp_path) as going,
        pytest.raises(Conflict, match="machine type"),
    ):
        going.take()


# --- what must not get in ---------------------------------------------------------------------------------------------


def is_unharmed(there: PageStore, tmp_path: Path) -> None:
    """Nothing is left of what was refused."""
    assert there.snapshots() == []
    assert list((tmp_path / "scratch-there").iterdir()) == []
    outside = [path for path in tmp_path.rglob("*") if path.name in ("evil", "evil.json")]
    assert outside == []
    assert files_below(tmp_path / "there" / "objects") - {".lock"} == {"store.json"}


Change = Callable[[bytes], bytes]


def _with_entry(key: bytes, data: bytes = b"evil") -> Change:
    return lambda archive: archive_from([*entries_of(archive), (key, data)])


def _without(prefix: bytes) -> Change:
    return lambda archive: archive_from([entry for entry in entries_of(archive) if not entry[0].startswith(prefix)])


def _with_manifest(change: Callable[[dict[str, object]], None]) -> Change:
    """Another manifest, with the checksum that it needs."""

    def run(archive: bytes) -> bytes:
        entries = entries_of(archive)
        key, data = entries[-1]
        document = json.loads(data)
        inner = document
        while "vms" not in inner:  # below a checksum of its own
            inner = next(value for value in inner.values() if isinstance(value, dict))
        change(inner)
        return archive_from([*entries[:-1], (key, json.dumps(document).encode())])

    return run


def _flipped_in(prefix: bytes) -> Change:
    """One bit of an object, and the container's checksums made to fit."""

    def run(archive: bytes) -> bytes:
        entries = entries_of(archive)
        number = next(number for number, (key, _) in enumerate(entries) if key.startswith(prefix))
        key, data = entries[number]
        middle = len(data) // 2
        entries[number] = key, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return archive_from(entries)

    return run


CHANGES: dict[str, tuple[Change, str]] = {
    "empty": (lambda _: b"", "no archive"),
    "something else": (lambda _: b"\x7fELF" + bytes(1000), "no archive"),
    "a newer version": (lambda a: archive_from(entries_of(a), MAGIC[:-1] + b"\2"), "version 2"),
    "cut short in the magic": (lambda a: a[:5], "no archive"),
    "cut short in an object": (lambda a: a[: len(a) // 2], "cut short"),
    "cut short before its end": (lambda a: a[:-33], "cut short"),
    "its last byte is missing": (lambda a: a[:-1], "cut short"),
    "something follows": (lambda a: a + b"x", "followed by 1 bytes"),
    "an absurd length of an object": (
        lambda a: a[: len(MAGIC)] + struct.pack("<4sHQ", b"ENTR", 10, 1 << 63) + a[len(MAGIC) + HEAD.size :],
        "cut short",
    ),
    "an absurd length of a key": (
        lambda a: a[: len(MAGIC)] + struct.pack("<4sHQ", b"ENTR", 65535, 1) + a[len(MAGIC) + HEAD.size :],
        "something else where an entry should begin",
    ),
    "an object twice": (lambda a: archive_from([entries_of(a)[0], *entries_of(a)]), "twice"),
    "a key that leads out": (_with_entry(b"../../evil"), "cannot be an object's key"),
    "an absolute key": (_with_entry(b"/tmp/evil"), "cannot be an object's key"),
    "a key that is no text": (_with_entry(b"\xff\xfe"), "ASCII"),
    "a key that nobody knows": (_with_entry(b"disks/id-1/n1/0"), "does not know"),
    "quotas": (_with_entry(b"quotas.json"), "does not know"),
    "a hidden key": (_with_entry(b".lock/evil"), "cannot be an object's key"),
    "no store": (_without(b"store.json"), "none that makes it a page store"),
    "no manifest": (_without(b"manifests/"), "cannot be"),
    "no packs": (_without(b"packs/"), "cannot be imported"),
    "no image map": (_without(b"images/"), "cannot be imported"),
    "no channel states": (_without(b"channels/"), "cannot be imported"),
    "nothing at all": (lambda _: archive_from([]), "cannot be"),
    "a damaged pack": (_flipped_in(b"packs/"), "cannot be imported"),
    "a damaged image map": (_flipped_in(b"images/"), "cannot be imported"),
    "a damaged channel state": (_flipped_in(b"channels/"), "cannot be imported"),
    "a damaged manifest": (_flipped_in(b"manifests/"), "cannot be imported"),
    "a manifest of a newer version": (_with_manifest(lambda m: m.update(version=99)), "cannot be imported"),
    "a slice whose name leads out": (
        _with_manifest(lambda m: m.update(slice={**spec_as_json(), "name": "../evil"})),
        "cannot be",
    ),
}


def spec_as_json() -> dict[str, object]:
    """A slice as a manifest has it."""
    from geni_violin.runtime.wire import encode  # noqa: PLC0415

    plain: dict[str, object] = encode(spec_of(tuple(MACS)))
    return plain


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_wrong_is_refused_and_leaves_nothing(
    what: str, here: PageStore, there: PageStore, bring: Callable[[bytes], Manifest], tmp_path: Path
) -> None:
    change, words = CHANGES[what]
    with pytest.raises(InvalidInput, match=words):
        bring(change(archive_of(here, "first", tmp_path / "scratch")))
    is_unharmed(there, tmp_path)


def test_one_flipped_bit_anywhere_is_found(
    here: PageStore, there: PageStore, bring: Callable[[bytes], Manifest], tmp_path: Path
) -> None:
    archive = archive_of(here, "first", tmp_path / "scratch")
    for place in [*range(0, 24, 3), *range(24, len(archive), len(archive) // 25), len(archive) - 1]:
        damaged = bytearray(archive)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(InvalidInput):
            bring(bytes(damaged))
    is_unharmed(there, tmp_path)


def test_a_name_that_is_taken_is_told(
    here: PageStore, there: PageStore, bring: Callable[[bytes], Manifest], tmp_path: Path
) -> None:
    archive = archive_of(here, "first", tmp_path / "scratch")
    for snapshot_id, name in (("id-1", "another"), ("id-2", "first")):
        taken = take_in(there, snapshot_id, name)
        with pytest.raises(AlreadyExists, match=f"{name}.*exists already"):
            bring(archive)
        assert there.snapshots() == [taken]
        assert there.verify(name) == taken
        there.delete(name)
    bring(archive)


def test_without_room_nothing_gets_in(
    here: PageStore,
    there: PageStore,
    bring: Callable[[bytes], Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive = archive_of(here, "first", tmp_path / "scratch")
    with monkeypatch.context() as patch:
        patch.setattr(PageStore, "free_bytes", lambda _self: 1000)
        with pytest.raises(NoSpace, match="no room for snapshot first"):
            bring(archive)
    is_unharmed(there, tmp_path)
    bring(archive)


def test_the_reader_changes_nothing(here: PageStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(archive_of(here, "first", tmp_path / "scratch"))
    archive = ArchiveReader(tmp_path / "file")
    with pytest.raises(Conflict):
        archive.put("a", b"1")
    with pytest.raises(Conflict):
        archive.replace("store.json", b"1")
    with pytest.raises(Conflict):
        archive.delete("store.json")
    archive.delete("absent")
    with pytest.raises(NotFound):
        archive.get("absent")
    archive.close()
