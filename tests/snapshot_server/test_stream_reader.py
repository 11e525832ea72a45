"""What the reader makes of streams made by hand: pages in order, in any portions; what it does not know is whole."""

import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_harness import (
    BLOCKS,
    PAGE_BYTES,
    Loader,
    Record,
    Recorder,
    devices,
    footer,
    memory_of,
    name_of,
    opening,
    page_of,
    plain,
    read,
    rest_of,
    rewritten,
    section,
    setup,
    stream_of,
)

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.stream import layout
from geni_violin.snapshot_server.stream.batch import Pages
from geni_violin.snapshot_server.stream.events import FillRun, Opaque, PageRun, Preamble, RamBlock, Tail
from geni_violin.snapshot_server.stream.preamble import parse_preamble
from geni_violin.snapshot_server.stream.reader import StreamReader
from geni_violin.snapshot_server.stream.records import Records

_KINDS = ("pages", "zeros", "fills", "mixed")


@st.composite
def stretches(draw: st.DrawFn) -> list[Record]:
    """Records as a guest's memory gives them: neighbors, of one kind or mixed, now and then a page once more."""
    block = draw(st.sampled_from((0, 0, 0, 1)))
    start = draw(st.integers(0, BLOCKS[block].pages - 1))
    count = min(draw(st.sampled_from((1, 1, 2, 9, 20, 40))), BLOCKS[block].pages - start)
    kind = draw(st.sampled_from(_KINDS))
    seed = draw(st.integers(1, 250))

    def content(number: int) -> bytes | int:
        if kind == "pages" or (kind == "mixed" and number % 3):
            return page_of(seed + number)
        return seed + number // 5 if kind == "fills" else 0

    return [Record(block, start + number, content(number) if kind != "fills" else seed) for number in range(count)]


sections = st.lists(st.lists(stretches(), max_size=4).map(lambda parts: list(chain(*parts))), max_size=3).map(
    lambda parts: [[Record(0, 0, 0)], *parts]  # a device before the first page is another matter
)
portions = st.builds(
    lambda small, large: [*small, large],
    st.lists(st.sampled_from((1, 7, 8, 9)), max_size=4),
    st.sampled_from((2_000, 4_104, 4_105, 65_536, 1 << 20)),
)


@settings(deadline=None, max_examples=40)
@given(sections, portions)
def test_portions_change_nothing(records: list[list[Record]], sizes: list[int]) -> None:
    stream = stream_of(records)
    assert plain(read(stream, sizes)) == plain(read(stream))


def test_each_byte_by_itself_changes_nothing() -> None:
    stream = stream_of([_SOME, _SOME[20:]])
    assert plain(read(stream, (1,))) == plain(read(stream))


@settings(deadline=None, max_examples=40)
@given(sections)
def test_the_last_version_of_a_page_counts(records: list[list[Record]]) -> None:
    events = read(stream_of(records))
    assert memory_of(events) == Loader(stream_of(records)).memory
    assert isinstance(events[0], Preamble)
    assert events[-1] == Tail(devices())


@settings(deadline=None, max_examples=40)
@given(sections)
def test_within_a_run_pages_ascend_and_arrays_cannot_be_written(records: list[list[Record]]) -> None:
    for event in read(stream_of(records)):
        if isinstance(event, PageRun | FillRun):
            numbers = event.pages.tolist()
            assert numbers == sorted(set(numbers)) != []
            assert not event.pages.flags.writeable
        if isinstance(event, PageRun):
            assert event.data.shape == (len(event.pages), PAGE_BYTES)
            assert event.data.flags.c_contiguous
            assert not event.data.flags.writeable


def test_neighbors_of_both_kinds_are_few_events() -> None:
    records = [Record(0, number, page_of(number) if number % 2 else 0) for number in range(512)]
    events = read(stream_of([records]), (100_000,))
    assert [type(event) for event in events] == [Preamble, PageRun, FillRun, Tail]
    assert [len(event.pages) for event in events if isinstance(event, PageRun | FillRun)] == [256, 256]


def test_the_preamble_is_what_stands_before_the_first_page() -> None:
    preamble = read(stream_of([[Record(0, 1, 0)]]))[0]
    assert preamble == Preamble(opening() + setup(), BLOCKS, 2)
    assert parse_preamble(opening() + setup()) == preamble


def test_a_stream_without_a_configuration_is_read() -> None:
    stream = b"QEVM\0\0\0\3" + setup() + section(Recorder().bytes_of(_SOME[:3])) + devices()
    assert [type(event) for event in read(stream)] == [Preamble, PageRun, Tail]


# --- what is not understood -------------------------------------------------------------------------------------------

_SOME = [Record(0, number, page_of(number)) for number in range(3, 30)] + [Record(0, 40, 0), Record(1, 1, 7)]


@settings(deadline=None, max_examples=40)
@given(sections, portions, st.booleans())
def test_unknown_records_and_all_that_follow_build_on_the_same_memory(
    records: list[list[Record]], sizes: list[int], ends_ram: bool
) -> None:
    """A patch says neither its block nor the rest of its page: both come from before it."""
    recorder = Recorder()
    known = opening() + setup() + b"".join(section(recorder.bytes_of(some)) for some in records)
    known += section(
        recorder.bytes_of([*_SOME, Record(1, 1, b"patched", patch=True), *_SOME[:-1]]), 3 if ends_ram else 2
    )
    stream = known + section(recorder.bytes_of([Record(1, 0, 0)])) + devices()
    events = read(stream, sizes)
    reasons = {event.reason for event in events if isinstance(event, Opaque)}
    assert reasons == {"a record of pages has the flags 0x60"}
    assert [event for event in events if isinstance(event, Tail)] == []
    loaded, expected = Loader(rewritten(events)), Loader(stream)
    assert loaded.memory == expected.memory
    assert loaded.rest == expected.rest == devices()
    assert b"patched" in loaded.memory["/rom@etc/acpi/tables", 1]


UNKNOWN = {
    "no stream at all": (b"this is no stream", "magic number"),
    "a little of one": (b"no", "magic number"),
    "version 2": (b"QEVM\0\0\0\2" + bytes(9), "magic number and version 3"),
    "a subsection of the configuration": (opening() + b"\x05" + setup(), "section type 5 before"),
    "an early device": (opening() + devices(), "section type 4 before"),
    "a command": (opening() + b"\x08\0\1\0\0" + setup(), "section type 8 before"),
    "another iterable section first": (opening() + setup().replace(b"\3ram", b"\3vfi"), "b'vfi' of version 4"),
    "RAM of version 5": (opening() + setup().replace(b"ram\0\0\0\0\0\0\0\4", b"ram\0\0\0\0\0\0\0\5"), "of version 5"),
    "a setup without sizes": (opening() + setup().replace(b"\x04\6pc.ram", b"\x80\6pc.ram"), "with the size of memory"),
    "more than blocks": (opening() + setup()[:-13] + struct.pack(">Q", 0x200) + footer(), "more than a list of blocks"),
    "no footers": (opening() + setup()[:-5] + section(b""), "no footers"),
}


@pytest.mark.parametrize(("stream", "reason"), UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("sizes", [(1 << 20,), (1,), (5, 13)])
def test_an_unknown_beginning_is_kept_from_the_first_byte(stream: bytes, reason: str, sizes: Sequence[int]) -> None:
    stream += section(Recorder().bytes_of(_SOME)) + devices()
    if len(stream) > 10_000 and sizes == (1,):
        stream = stream[:10_000]
    events = read(stream, sizes)
    assert {type(event) for event in events} == {Opaque}
    assert b"".join(rest_of(events)) == stream
    assert all(reason in event.reason for event in events if isinstance(event, Opaque))


def test_a_very_short_other_thing_is_opaque() -> None:
    assert plain(read(b"QE?")) == [("opaque", b"QE?")]


LATER = {
    "another iterable section": b"\x01" + struct.pack(">I", 3) + name_of("vfio") + bytes(8) + footer(3),
    "a command": b"\x08\0\1\0\0",
    "an unknown type": b"\x42",
}


@pytest.mark.parametrize("some", [[], _SOME], ids=["before pages", "after pages"])
@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_an_unknown_section_is_kept_with_all_that_follow(later: bytes, some: list[Record]) -> None:
    """What follows may be of the last page's block without saying so: it is loaded once more, and nothing else."""
    recorder = Recorder()
    before = opening() + setup() + (section(recorder.bytes_of(some)) if some else b"")
    events = read(before + later + devices(), (17,))
    assert memory_of(events) == Loader(before).memory
    rest = b"".join(rest_of(events))
    again = section(Recorder().bytes_of([Record(1, 1, 7)])) if some else b""
    assert rest == again + later + devices()


def test_a_device_before_the_first_page_makes_the_rest_opaque() -> None:
    early = devices()[: devices().index(b"\0\x06")]
    events = read(opening() + setup() + early + section(Recorder().bytes_of(_SOME)) + devices())
    assert [type(event) for event in events] == [Preamble, Opaque]
    assert rest_of(events)[0].startswith(early)


def test_very_much_device_state_is_opaque_from_its_beginning() -> None:
    tail = devices(bytes(layout.TAIL_BYTES))
    events = read(stream_of([_SOME], tail))
    assert not [event for event in events if isinstance(event, Tail)]
    assert b"".join(rest_of(events)) == tail


# --- what is refused --------------------------------------------------------------------------------------------------

_BIG = RamBlock("big", layout.RAM_BYTES + PAGE_BYTES)
_MANY = [RamBlock(f"r{number}", PAGE_BYTES) for number in range(layout.BLOCKS + 1)]
_UNNAMED = struct.pack(">Q", PAGE_BYTES)
LIES = {
    "a machine name of 4 GiB": (b"QEVM\0\0\0\3\x07\xff\xff\xff\xff", "machine type has 4294967295 bytes"),
    "a machine without a name": (b"QEVM\0\0\0\3\x07\0\0\0\0", "machine type has 0 bytes"),
    "no memory": (opening() + setup((), 0), "0 bytes of RAM"),
    "too much memory": (opening() + setup((_BIG,)), "70368744181760 bytes of RAM"),
    "too many blocks": (opening() + setup(_MANY), "as number 4097"),
    "a block twice": (opening() + setup((*BLOCKS, BLOCKS[0])), "'pc.ram' as number 3"),
    "a block without a name": (opening() + setup((RamBlock("", PAGE_BYTES),)), "b'' as number 1"),
    "a block without pages": (opening() + setup((RamBlock("a", 0), BLOCKS[0])), "a has 0 bytes"),
    "half a page": (opening() + setup((RamBlock("a", 2048), RamBlock("b", 2048))), "a has 2048 bytes"),
    "blocks longer than their sum": (opening() + setup(BLOCKS, 601 * PAGE_BYTES), "tables has 8192 bytes, of 4096"),
    "another footer": (opening() + setup()[:-4] + bytes(4), "has the number 0"),
}
_OUTSIDE = [Record(0, number, page_of(number)) for number in range(580, 601)]
_ZEROS_OUTSIDE = [Record(0, number, 0) for number in range(580, 601)]


def _from_nowhere(record: Record) -> bytes:
    """A record of the block of the record before, where there was none."""
    return Recorder().bytes_of([Record(0, 0, 0), record])[len(Recorder().bytes_of([Record(0, 0, 0)])) :]


def _records(records: list[Record]) -> bytes:
    return opening() + setup() + section(Recorder().bytes_of(records))


LIES |= {
    "a page behind its block": (_records([Record(0, 600, page_of(1))]), "page 600 of RAM block pc.ram; it has 600"),
    "a run of pages over the end": (_records(_OUTSIDE), "page 600 of RAM block pc.ram"),
    "a run of fills over the end": (_records(_ZEROS_OUTSIDE), "page 600 of RAM block pc.ram"),
    "a page very far behind": (_records([Record(1, 0, 0), Record(1, (1 << 52) - 1, 0)]), "page 4503599627370495"),
    "a run with one very far behind": (
        _records([*_ZEROS_OUTSIDE[:12], Record(0, (1 << 52) - 1, 0), *_ZEROS_OUTSIDE[12:18]]),
        "page 4503599627370495",
    ),
    "a block that was not listed": (
        _records([]) + section(struct.pack(">Q", 8) + name_of("nvram") + page_of(0)),
        "RAM block b'nvram'",
    ),
    "no first block": (
        opening() + setup() + section(_from_nowhere(Record(0, 0, 0))),
        "first page is of the same block",
    ),
    "another section's records": (_records([]) + section(b"", section_id=3), "has the number 3"),
    "another section's footer": (_records([])[:-4] + bytes(4), "has the number 0"),
    "more records after the last": (_records([])[:-5] + bytes(8), "goes on with the byte 0x0"),
}


@pytest.mark.parametrize(("stream", "words"), LIES.values(), ids=LIES)
@pytest.mark.parametrize("sizes", [(1 << 20,), (13,)])
def test_lies_are_refused(stream: bytes, words: str, sizes: Sequence[int]) -> None:
    with pytest.raises(InvalidInput) as refused:
        read(stream + devices(), sizes)
    assert words in str(refused.value)


def test_a_stream_that_breaks_off_is_refused_wherever_it_does() -> None:
    stream = stream_of([_SOME[-3:], [Record(0, number, 0) for number in range(20)]])
    for length in range(8, len(stream), 3):
        with pytest.raises(InvalidInput, match=r"br(oke|eaks) off"):
            read(stream[:length])


def test_a_stream_that_goes_on_after_its_end_is_refused() -> None:
    with pytest.raises(InvalidInput, match="goes on for 5 bytes after its end"):
        read(stream_of([_SOME]) + b"again")
    with pytest.raises(InvalidInput, match=r"goes on for \d+ bytes after its end"):
        read(stream_of([_SOME]) + bytes(layout.TAIL_BYTES))


def test_a_device_whose_state_looks_like_an_end_is_no_end() -> None:
    tail = devices(b"\0\x06\0\0\0\2{}" + b"more state")
    assert read(stream_of([_SOME], tail))[-1] == Tail(tail)


@pytest.mark.parametrize("preamble", [b"", opening(), opening() + setup() + b"\2", b"nothing like it"])
def test_only_a_whole_preamble_is_taken_for_one(preamble: bytes) -> None:
    with pytest.raises(InvalidInput, match="preamble of a migration stream"):
        parse_preamble(preamble)


# --- memory -----------------------------------------------------------------------------------------------------------


def _endless_pages(mib: int) -> Iterator[bytes]:
    yield opening() + setup() + b"\2" + struct.pack(">I", 2)
    megabyte = Recorder().bytes_of([Record(number % 2, number % 2, page_of(number)) for number in range(256)])
    for _ in range(mib):
        yield megabyte


def _endless_tail(mib: int) -> Iterator[bytes]:
    yield stream_of([_SOME], b"\x04")
    for _ in range(mib):
        yield bytes(1 << 20)


def _backwards(mib: int) -> Iterator[bytes]:
    yield opening() + setup() + b"\2" + struct.pack(">I", 2)
    portion = Recorder().bytes_of([Record(0, number, 0) for number in range(599, -1, -1)])
    for _ in range(5 * mib):
        yield portion * 10


ENDLESS: dict[str, tuple[Callable[[int], Iterator[bytes]], int]] = {
    "pages, their blocks in turn": (_endless_pages, 8),
    "state of devices": (_endless_tail, 40),
    "fills, backwards": (_backwards, 40),
}


@pytest.mark.parametrize(("portions_of", "bound_mib"), ENDLESS.values(), ids=ENDLESS)
def test_memory_is_bounded_however_long_a_stream_is(
    portions_of: Callable[[int], Iterator[bytes]], bound_mib: int
) -> None:
    reader = StreamReader()
    tracemalloc.start()
    try:
        for portion in portions_of(100):
            reader.feed(portion)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reader.taken_bytes > 1 << 20
    assert peak < bound_mib << 20


def test_work_grows_with_a_stream_and_not_with_its_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills of another byte each that seem to be a run of one are the worst."""
    looked_at = []
    numbers = Records._numbers

    def counted(own: Records, view: memoryview, position: int, most: int, stride: int, flags: int) -> Pages:
        looked_at.append(most)
        return numbers(own, view, position, most, stride, flags)

    monkeypatch.setattr(Records, "_numbers", counted)
    records = [Record(0, number % 600, number % 7) for number in range(2_000)]
    read(stream_of([records]))
    assert 0 < sum(looked_at) < 100 * len(records)
