"""The contract of a store of images. A new store joins by a line in ``STORES``."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from snapshot_harness import (
    CLOCK_US,
    IN_TRANSIT,
    MACS,
    MIB,
    RECEIVED,
    SENT,
    changed,
    files_below,
    frame_to,
    image_of,
    manifest_of,
    request_of,
    stage_recorded,
    stopped_stream,
    store_image,
    stream_of,
    take,
    take_sealed,
    words_of,
)

from geni_violin.core.errors import AlreadyExists, Conflict, InvalidInput, MachineFault, NoSpace, NotFound
from geni_violin.core.messages import SealChannels
from geni_violin.runtime import pcap
from geni_violin.snapshot_server.names import (
    MAX_RECORD_BYTES,
    check_record_size,
    check_stage_request,
    checked_identifier,
    is_identifier,
)
from geni_violin.snapshot_server.pages.page_store import open_folder
from geni_violin.snapshot_server.store import ImageStore

STORES: dict[str, Callable[[Path], ImageStore]] = {"pages": open_folder}


@pytest.fixture(params=STORES)
def opener(request: pytest.FixtureRequest) -> Callable[[Path], ImageStore]:
    return STORES[request.param]


@pytest.fixture
def store(opener: Callable[[Path], ImageStore], tmp_path: Path) -> Iterator[ImageStore]:
    opened = opener(tmp_path)
    yield opened
    opened.close()


def test_what_was_stored_is_given_back(store: ImageStore) -> None:
    manifest = take(store, request_of(vms=("n1", "n2")))
    assert store.snapshots() == [manifest]
    assert store.snapshot("id-1") == store.snapshot("first") == store.verify("first") == manifest
    for seed, vm in enumerate(("n1", "n2")):
        assert image_of(store, "id-1", vm) == stream_of(5000, seed)


def test_a_snapshot_does_not_exist_before_it_is_published(store: ImageStore) -> None:
    request = request_of()
    store.stage(request)
    stored = store_image(store, "id-1", "n1", stream_of(5000))
    assert store.snapshots() == []
    with pytest.raises(NotFound):
        store.snapshot("first")
    with pytest.raises(NotFound):
        store.open_image("id-1", "n1")
    assert store.stored_image("id-1", "n1") == stored


def test_staging_again_is_fine_and_staging_otherwise_is_not(store: ImageStore) -> None:
    store.stage(request_of())
    store.stage(request_of())
    with pytest.raises(Conflict):
        store.stage(request_of(vms=("n1", "n2")))
    assert store.staging("id-1") == request_of()


@pytest.mark.parametrize("publish", [False, True])
@pytest.mark.parametrize(("snapshot_id", "name"), [("id-2", "first"), ("id-2", "id-1"), ("first", "second")])
def test_a_name_is_taken_once(store: ImageStore, publish: bool, snapshot_id: str, name: str) -> None:
    """An id counts as a name, because both are looked up by the same word."""
    if publish:
        take(store, request_of())
    else:
        store.stage(request_of())
    with pytest.raises(AlreadyExists):
        store.stage(request_of(snapshot_id, name))
    store.stage(request_of("id-3", "third"))


def test_a_name_is_free_again_after_delete_and_discard(store: ImageStore) -> None:
    take(store, request_of())
    store.delete("first")
    store.stage(request_of("id-2", "first"))
    store.discard("id-2")
    take(store, request_of("id-3", "first"))
    assert [manifest.id for manifest in store.snapshots()] == ["id-3"]


def free_bytes_of(store: ImageStore) -> int:
    free = store.free_bytes()
    assert free is not None, "a folder can tell its room"
    return free


def test_no_room_is_told_with_figures(store: ImageStore) -> None:
    free = free_bytes_of(store)
    with pytest.raises(NoSpace, match=rf"may need {2 * free} bytes, \d+ are free"):
        store.stage(request_of(expected_bytes=free, vms=("n1", "n2")))
    with pytest.raises(NotFound):
        store.staging("id-1")


def test_room_is_promised_once(store: ImageStore) -> None:
    """Two snapshots that fit one at a time do not fit together; what is stored is no longer reserved."""
    three_fifths = free_bytes_of(store) * 3 // 5
    store.stage(request_of(expected_bytes=three_fifths))
    with pytest.raises(NoSpace, match="reserved"):
        store.stage(request_of("id-2", "second", expected_bytes=three_fifths))
    store_image(store, "id-1", "n1", stream_of(5000))
    store.stage(request_of("id-2", "second", expected_bytes=three_fifths))


def test_an_image_has_one_writer(store: ImageStore) -> None:
    store.stage(request_of())
    writer = store.open_writer("id-1", "n1")
    with pytest.raises(Conflict):
        store.open_writer("id-1", "n1")
    writer.write(memoryview(stream_of(5000)))
    writer.finish()
    with pytest.raises(Conflict):
        store.open_writer("id-1", "n1")


def test_only_what_is_staged_is_written(store: ImageStore) -> None:
    with pytest.raises(NotFound):
        store.open_writer("id-1", "n1")
    store.stage(request_of())
    with pytest.raises(NotFound):
        store.open_writer("id-1", "n2")


def test_an_aborted_image_leaves_nothing_and_can_be_written_again(store: ImageStore, tmp_path: Path) -> None:
    store.stage(request_of())
    before = files_below(tmp_path)
    writer = store.open_writer("id-1", "n1")
    writer.write(memoryview(stream_of(5000)))
    writer.abort()
    assert files_below(tmp_path) == before
    assert store.stored_image("id-1", "n1") is None
    store_image(store, "id-1", "n1", stream_of(5000))


def test_publishing_needs_durable_images_that_the_manifest_describes(store: ImageStore) -> None:
    request = request_of(vms=("n1", "n2"))
    store.stage(request)
    first = store_image(store, "id-1", "n1", stream_of(5000))
    second = replace(first, vm="n2")
    with pytest.raises(Conflict, match="n2 is not durable"):
        store.publish(manifest_of(request, [first, second]))
    with pytest.raises(Conflict, match="other VMs"):
        store.publish(manifest_of(request, [first]))
    store_image(store, "id-1", "n2", stream_of(6000, 2))
    with pytest.raises(Conflict, match="VM n2 are not those"):
        store.publish(manifest_of(request, [first, second]))
    assert store.snapshots() == []


@pytest.mark.parametrize("change", [{"blake3": "0" * 64}, {"received_bytes": 4999}, {"stored_bytes": 1}])
def test_a_manifest_that_lies_is_refused(store: ImageStore, change: dict[str, object]) -> None:
    request = request_of()
    store.stage(request)
    manifest = manifest_of(request, [store_image(store, "id-1", "n1", stream_of(5000))])
    with pytest.raises(Conflict):
        store.publish(changed(manifest, **change))
    with pytest.raises(Conflict):
        store.publish(replace(manifest, name="other"))
    with pytest.raises(InvalidInput):
        store.publish(replace(manifest, skew_ms=float("nan")))
    assert store.publish(manifest) == manifest


def test_publishing_again_is_fine_and_publishing_otherwise_is_not(store: ImageStore) -> None:
    manifest = take(store, request_of())
    assert store.publish(manifest) == manifest
    with pytest.raises(Conflict):
        store.publish(replace(manifest, skew_ms=99.0))
    assert store.snapshots() == [manifest]


def test_what_was_not_staged_is_not_published(store: ImageStore) -> None:
    request = request_of()
    store.stage(request)
    manifest = manifest_of(request, [store_image(store, "id-1", "n1", stream_of(5000))])
    store.discard("id-1")
    with pytest.raises(NotFound):
        store.publish(manifest)


def test_discarding(store: ImageStore, tmp_path: Path) -> None:
    before = files_below(tmp_path)
    store.stage(request_of())
    store_image(store, "id-1", "n1", stream_of(5000))
    store.discard("id-1")
    store.discard("id-1")
    assert files_below(tmp_path) == before
    take(store, request_of())
    with pytest.raises(Conflict):
        store.discard("id-1")
    store.verify("first")


def test_an_image_stays_readable_while_its_snapshot_is_deleted(store: ImageStore, tmp_path: Path) -> None:
    before = files_below(tmp_path)
    take(store, request_of(), size=3 * MIB)
    with store.open_image("id-1", "n1") as reader:
        store.delete("id-1")
        assert sum(len(chunk) for chunk in reader.chunks()) == 3 * MIB
    assert files_below(tmp_path) == before
    with pytest.raises(NotFound):
        store.delete("id-1")


# --- channel states ---------------------------------------------------------------------------------------------------


def test_a_sealed_snapshot_gives_back_what_was_in_transit(store: ImageStore) -> None:
    manifest = take_sealed(store)
    assert {vm: words_of(store.channel("first", vm)) for vm in MACS} == IN_TRANSIT
    assert (manifest.frames_in_transit, [vm.frames_in_transit for vm in manifest.vms]) == (5, [1, 3, 1])
    sizes = [(14 + 6,), (14 + 8, 14 + 6, 14 + 8), (14 + 8,)]
    assert [(one.vm, one.frames, one.frame_bytes, one.late_frames, one.note) for one in store.channels("id-1")] == [
        ("n1", 1, sum(sizes[0]), 0, ""),
        ("n2", 3, sum(sizes[1]), 2, ""),
        ("n3", 1, sum(sizes[2]), 1, ""),
    ]
    assert store.verify("first") == manifest


def test_records_are_replaced_until_they_are_sealed(store: ImageStore) -> None:
    stage_recorded(store)
    other = pcap.encode([frame_to(MACS["n3"], "other")])
    store.put_record("id-1", "n3", "received", other)
    first = store.seal_channels("id-1", SealChannels(MACS))
    assert [channel.frames for channel in first] == [1, 3, 2]
    assert store.seal_channels("id-1", SealChannels(MACS)) == first
    store.put_record("id-1", "n3", "received", other)  # an answer was lost, and so it is asked again
    with pytest.raises(Conflict, match="is sealed"):
        store.put_record("id-1", "n3", "received", pcap.encode(RECEIVED["n3"]))
    with pytest.raises(Conflict, match="sealed with other addresses"):
        store.seal_channels("id-1", SealChannels(MACS | {"n1": MACS["n2"]}))
    assert store.seal_channels("id-1", SealChannels(MACS)) == first


def test_a_snapshot_that_was_not_sealed_has_no_channel_state(store: ImageStore, tmp_path: Path) -> None:
    request = request_of(vms=tuple(MACS))
    stored = stage_recorded(store)
    with pytest.raises(NotFound):
        store.channel("first", "n1")
    store.publish(manifest_of(request, stored))
    assert store.channels("first") == []
    assert {words for vm in MACS for words in words_of(store.channel("first", vm))} == set()
    assert not [name for name in files_below(tmp_path) if "channels" in name or "records" in name]
    store.verify("first")


def test_a_vm_without_records_has_an_empty_channel_state(store: ImageStore) -> None:
    request = request_of()
    store.stage(request)
    stored = store_image(store, "id-1", "n1", stream_of(5000))
    channels = store.seal_channels("id-1", SealChannels({"n1": MACS["n1"]}))
    assert [(channel.frames, channel.frame_bytes, channel.note) for channel in channels] == [(0, 0, "")]
    store.publish(manifest_of(request, [stored], channels))
    assert store.channel("first", "n1") == pcap.encode([])


def test_frames_that_cannot_be_told_late_are_counted_and_not_replayed(store: ImageStore) -> None:
    """n1's image does not tell its clock, so of the four frames that it sent nothing is known."""
    store.stage(request_of(vms=tuple(MACS)))
    stored = [store_image(store, "id-1", vm, stream_of(5000) if vm == "n1" else stopped_stream()) for vm in MACS]
    for vm in MACS:
        store.put_record("id-1", vm, "sent", pcap.encode(SENT[vm]))
    channels = store.seal_channels("id-1", SealChannels(MACS))
    assert [(one.frames, one.undecided_frames, one.note != "") for one in channels] == [
        (0, 4, True),
        (0, 0, False),
        (0, 0, False),
    ]
    store.publish(manifest_of(request_of(vms=tuple(MACS)), stored, channels))
    assert store.channels("first") == channels


def test_each_sender_has_its_own_clock(store: ImageStore) -> None:
    store.stage(request_of(vms=tuple(MACS)))
    for number, vm in enumerate(MACS):
        store_image(store, "id-1", vm, stopped_stream(clock_ns=number * 10**9))
        sent = [frame_to(MACS["n3"], f"{vm} {second}", second * 10**6) for second in (0, 1, 2)]
        store.put_record("id-1", vm, "sent", pcap.encode(sent))
    assert [channel.frames for channel in store.seal_channels("id-1", SealChannels(MACS))] == [0, 0, 3]


def test_sealing_needs_durable_images_and_known_addresses(store: ImageStore) -> None:
    with pytest.raises(NotFound):
        store.seal_channels("id-1", SealChannels(MACS))
    store.stage(request_of(vms=("n1", "n2")))
    macs = {vm: MACS[vm] for vm in ("n1", "n2")}
    store_image(store, "id-1", "n1", stopped_stream())
    with pytest.raises(Conflict, match="image of VM n2 is not durable"):
        store.seal_channels("id-1", SealChannels(macs))
    store_image(store, "id-1", "n2", stopped_stream())
    for wrong in (MACS, {"n1": MACS["n1"]}, macs | {"n2": "nonsense"}):
        with pytest.raises(InvalidInput):
            store.seal_channels("id-1", SealChannels(wrong))
    assert [channel.vm for channel in store.seal_channels("id-1", SealChannels(macs))] == ["n1", "n2"]


def test_records_that_are_refused(store: ImageStore, tmp_path: Path) -> None:
    good = pcap.encode(RECEIVED["n1"])
    with pytest.raises(NotFound):
        store.put_record("id-1", "n1", "received", good)
    store.stage(request_of())
    before = files_below(tmp_path)
    with pytest.raises(NotFound):
        store.put_record("id-1", "n2", "received", good)
    with pytest.raises(InvalidInput, match="no record 'dropped'"):
        store.put_record("id-1", "n1", "dropped", good)
    for damaged in (b"", good[:-1], b"\0" + good):
        with pytest.raises(InvalidInput):
            store.put_record("id-1", "n1", "received", damaged)
    assert files_below(tmp_path) == before
    take(store, request_of("id-2", "second"))
    with pytest.raises(NotFound):
        store.put_record("id-2", "n1", "received", good)


def test_a_record_has_a_largest_size() -> None:
    check_record_size(MAX_RECORD_BYTES)
    with pytest.raises(InvalidInput, match="longer than"):
        check_record_size(MAX_RECORD_BYTES + 1)


def test_a_record_without_room_is_refused(store: ImageStore) -> None:
    store.stage(request_of(expected_bytes=free_bytes_of(store) - 8 * MIB))
    with pytest.raises(NoSpace, match="no room for what VM n1 received"):
        store.put_record("id-1", "n1", "received", pcap.encode([pcap.Frame(0, bytes(60_000))] * 200))


def test_a_manifest_has_the_frames_that_were_sealed(store: ImageStore) -> None:
    stored = stage_recorded(store)
    request = request_of(vms=tuple(MACS))
    channels = store.seal_channels("id-1", SealChannels(MACS))
    manifest = manifest_of(request, stored, channels)
    for wrong, words in (
        (manifest_of(request, stored), "0 frames in transit to VM n1; 1 are sealed"),
        (changed(manifest, frames_in_transit=2), "2 frames in transit to VM n1; 1 are sealed"),
        (replace(manifest, frames_in_transit=6), "6 frames in transit in snapshot first; 5 are sealed"),
    ):
        with pytest.raises(Conflict) as caught:
            store.publish(wrong)
        assert words in str(caught.value)
    assert store.publish(manifest) == manifest == store.publish(manifest)


def test_discarding_and_deleting_remove_channel_states(store: ImageStore, tmp_path: Path) -> None:
    before = files_below(tmp_path)
    stage_recorded(store)
    store.discard("id-1")
    assert files_below(tmp_path) == before
    stage_recorded(store)
    store.seal_channels("id-1", SealChannels(MACS))
    store.discard("id-1")
    assert files_below(tmp_path) == before
    take_sealed(store)
    assert not [name for name in files_below(tmp_path) if name.endswith((".received", ".sent"))]
    store.delete("first")
    assert files_below(tmp_path) == before
    assert list((tmp_path / "state/records").iterdir()) == []
    with pytest.raises(NotFound):
        store.channels("first")


def test_channel_states_of_what_is_not_there(store: ImageStore) -> None:
    take_sealed(store)
    for call in (
        lambda: store.channel("first", "n9"),
        lambda: store.channel("none", "n1"),
        lambda: store.channels("none"),
    ):
        with pytest.raises(NotFound):
            call()


def test_clock_of_a_whole_tail(store: ImageStore) -> None:
    """Only the end of an image is looked at, and what is in its memory does not count."""
    store.stage(request_of(vms=("n1", "n2"), expected_bytes=40 * MIB))
    store_image(store, "id-1", "n1", stopped_stream(clock_ns=9, size=100) + stopped_stream(size=20 * MIB)[8:])
    store_image(store, "id-1", "n2", stopped_stream())
    store.put_record("id-1", "n1", "sent", pcap.encode([frame_to(MACS["n2"], "late", CLOCK_US)]))
    channels = store.seal_channels("id-1", SealChannels({vm: MACS[vm] for vm in ("n1", "n2")}))
    assert [channel.late_frames for channel in channels] == [0, 1]


@pytest.mark.parametrize("version", [0, 2])
def test_a_manifest_of_an_unknown_version_is_refused(store: ImageStore, version: int) -> None:
    request = request_of()
    store.stage(request)
    manifest = manifest_of(request, [store_image(store, "id-1", "n1", stream_of(5000))])
    with pytest.raises(InvalidInput, match=f"of version {version}"):
        store.publish(replace(manifest, version=version))
    assert store.publish(manifest) == manifest


def test_snapshots_are_listed_from_the_oldest(store: ImageStore) -> None:
    for number, created_at in enumerate((30.0, 10.0, 20.0)):
        request = request_of(f"id-{number}", f"name-{number}")
        store.stage(request)
        manifest = manifest_of(request, [store_image(store, f"id-{number}", "n1", stream_of(50))])
        store.publish(replace(manifest, created_at=created_at))
    assert [manifest.id for manifest in store.snapshots()] == ["id-1", "id-2", "id-0"]


def test_a_store_has_one_user(opener: Callable[[Path], ImageStore], store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(MachineFault, match="another snapshot server"):
        opener(tmp_path)
    store.close()
    opener(tmp_path).close()


@pytest.mark.parametrize("name", ["", "First", "-a", ".a", "a b", "a/b", "ä", "a\n", "a" * 64])
def test_names_that_cannot_be(store: ImageStore, name: str) -> None:
    with pytest.raises(InvalidInput):
        store.stage(request_of(name=name))


@pytest.mark.parametrize(("vms", "expected_bytes"), [((), 1), (("n1", "n1"), 1), (("n1",), 0), (("../n1",), 1)])
def test_stagings_that_cannot_be(vms: tuple[str, ...], expected_bytes: int) -> None:
    with pytest.raises(InvalidInput):
        check_stage_request(request_of(vms=vms, expected_bytes=expected_bytes))


HOSTILE = st.text(st.sampled_from("aB0._-/\\\0\n ~ä"), max_size=70) | st.text(max_size=5)


@given(HOSTILE)
def test_no_identifier_leaves_its_folder(text: str) -> None:
    if not is_identifier(text):
        with pytest.raises(InvalidInput):
            checked_identifier(text, "snapshot id")
        return
    folder = Path("/store/images")
    path = folder / text / f"{text}.stream.partial"
    assert path.resolve().relative_to(folder).parts == (text, f"{text}.stream.partial")
    assert len(path.name.encode()) <= 255


@settings(deadline=None)  # it waits for the disk
@given(identifier=HOSTILE.filter(lambda text: not is_identifier(text)))
def test_no_method_takes_an_identifier_that_cannot_be(
    tmp_path_factory: pytest.TempPathFactory, identifier: str
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = open_folder(folder)
    try:
        for refused in (
            lambda: store.stage(request_of(snapshot_id=identifier)),
            lambda: store.stage(request_of(vms=(identifier,))),
            lambda: store.staging(identifier),
            lambda: store.open_writer(identifier, "n1"),
            lambda: store.stored_image(identifier, "n1"),
            lambda: store.stored_image("id-1", identifier),
            lambda: store.discard(identifier),
            lambda: store.put_record(identifier, "n1", "sent", pcap.encode([])),
            lambda: store.put_record("id-1", identifier, "sent", pcap.encode([])),
            lambda: store.seal_channels(identifier, SealChannels({})),
        ):
            with pytest.raises(InvalidInput):
                refused()
        for unknown in (store.snapshot, store.verify, store.delete, store.channels):
            with pytest.raises(NotFound):
                unknown(identifier)
        assert files_below(folder) == set()
    finally:
        store.close()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.from_regex(r"[a-zA-Z0-9]([._-]?(partial|stream|json|a)){0,3}", fullmatch=True), min_size=2, max_size=6)
)
@example(["a.partial", "a.stream", "a", "a.json"])
def test_names_that_look_like_the_stores_own_do_not_collide(
    tmp_path_factory: pytest.TempPathFactory, identifiers: list[str]
) -> None:
    vms = tuple(dict.fromkeys(identifiers))
    folder = tmp_path_factory.mktemp("store")
    store = open_folder(folder)
    request = request_of(snapshot_id=vms[0], vms=vms)
    store.stage(request)
    stored = [store_image(store, vms[0], vm, stream_of(100, seed)) for seed, vm in enumerate(vms)]
    macs = {vm: f"52:54:00:00:01:{number:02x}" for number, vm in enumerate(vms)}
    for vm in vms:
        for kind in ("received", "sent"):
            store.put_record(vms[0], vm, kind, pcap.encode([frame_to(macs[vm], f"{vm} {kind}")]))
    channels = store.seal_channels(vms[0], SealChannels(macs))
    manifest = store.publish(manifest_of(request, stored, channels))
    store.close()
    store = open_folder(folder)
    assert store.verify(vms[0]) == manifest
    assert [words_of(store.channel(vms[0], vm)) for vm in vms] == [[f"{vm} received"] for vm in vms]
    store.close()
