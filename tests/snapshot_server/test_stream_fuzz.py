"""Whatever comes: the declared error or events, in bounded time and memory, and nothing lost."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from stream_harness import (
    Record,
    devices,
    memory_of,
    opening,
    page_of,
    pieces_of,
    plain,
    rewritten,
    setup,
    stream_of,
)
from test_stream_reader import portions

from geni_violin.core.errors import InvalidInput
from geni_violin.snapshot_server.stream.events import Event, FillRun, PageRun, Preamble
from geni_violin.snapshot_server.stream.reader import StreamReader

_RECORDS = [
    [Record(0, number, page_of(number) if number % 7 < 5 else 0) for number in range(20)],
    [Record(1, 0, 0), Record(1, 1, page_of(9)), *(Record(0, number, 0) for number in range(100, 130))],
    [Record(0, number, page_of(number + 100)) for number in range(12)],
]
VALID = stream_of(_RECORDS)
_STRUCTURE = [0, 8, 9, 13, 30, 31, 40, 50, 60, 80, 100, 110, len(opening() + setup()), len(VALID) - len(devices())]
places = st.one_of(st.integers(0, len(VALID) - 1), st.sampled_from(_STRUCTURE), st.integers(0, 200))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The valid stream with up to four wounds."""
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        place = min(draw(places), len(data))
        match draw(st.sampled_from(("flip", "set", "cut", "remove", "insert", "repeat"))):
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "set":
                replacement = draw(st.sampled_from((b"\xff" * 8, bytes(8), b"\xff", b"\x7f" * 4, b"\1", b"\6")))
                data[place : place + len(replacement)] = replacement
            case "cut":
                del data[place:]
            case "remove":
                del data[place : place + draw(st.integers(1, 5_000))]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=20))
            case _:
                data[place:place] = data[place : place + draw(st.integers(1, 9_000))]
    return bytes(data)


def fed_until_refused(stream: bytes, sizes: list[int]) -> tuple[list[Event], bool]:
    """The events, and whether the stream was refused."""
    reader, events = StreamReader(), list[Event]()
    try:
        for piece in pieces_of(stream, sizes):
            events += reader.feed(piece)
        return events + reader.finish(), False
    except InvalidInput:
        return events, True


def size_of(event: Event) -> int:
    """How many bytes an event holds."""
    match event:
        case PageRun():
            return event.data.nbytes + event.pages.nbytes
        case FillRun():
            return event.pages.nbytes
        case _:
            return len(event.data)


@settings(deadline=None, max_examples=150)
@given(mutated(), portions)
@example(VALID, [1 << 20])
def test_no_stream_does_harm(stream: bytes, sizes: list[int]) -> None:
    events, refused = fed_until_refused(stream, sizes)
    reopened = 5 + 8 + 256 + 4096 + 13
    assert sum(map(size_of, events)) <= len(stream) + reopened
    for event in events:
        if isinstance(event, PageRun | FillRun):
            assert isinstance(events[0], Preamble)
            assert 0 <= event.pages.min() <= event.pages.max() < events[0].blocks[event.block].pages
    whole, refused_whole = fed_until_refused(stream, [1 << 20])
    assert refused == refused_whole
    if not refused:
        assert plain(events) == plain(whole)


@settings(deadline=None, max_examples=80)
@given(mutated())
def test_what_is_taken_is_written_so_that_it_is_taken_again(stream: bytes) -> None:
    events, refused = fed_until_refused(stream, [1 << 20])
    if not refused and events:
        again, refused = fed_until_refused(rewritten(events), [1 << 20])
        assert not refused
        assert memory_of(again) == memory_of(events)
        assert plain(again)[-1] == plain(events)[-1]


@settings(deadline=None, max_examples=80)
@given(st.binary(max_size=300), st.booleans())
def test_noise_does_no_harm(noise: bytes, after_setup: bool) -> None:
    stream = (opening() + setup() if after_setup else b"QEVM\0\0\0\3") + noise
    fed_until_refused(stream, [64])
