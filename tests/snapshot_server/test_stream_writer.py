"""What the writer makes of events is read as the same image, and loads the same memory."""

from collections.abc import Iterator

from hypothesis import given, settings
from stream_harness import (
    Loader,
    Record,
    devices,
    memory_of,
    page_of,
    plain,
    read,
    rest_of,
    rewritten,
    stream_of,
)
from test_stream_reader import sections

from geni_violin.snapshot_server.stream.events import FillRun, PageRun, Preamble
from geni_violin.snapshot_server.stream.writer import write_stream


@settings(deadline=None, max_examples=40)
@given(sections)
def test_what_is_written_is_read_as_the_same_image(records: list[list[Record]]) -> None:
    events = read(stream_of(records))
    stream = rewritten(events)
    loaded = Loader(stream)
    assert loaded.memory == Loader(stream_of(records)).memory
    assert loaded.rest == devices()
    again = read(stream)
    assert memory_of(again) == memory_of(events)
    assert plain(again)[0] == plain(events)[0]
    assert plain(again)[-1] == plain(events)[-1]


def test_a_block_is_named_once() -> None:
    records = [Record(0, number, page_of(number)) for number in range(600)] + [Record(1, 0, 0), Record(1, 1, 5)]
    stream = rewritten(read(stream_of([records])))
    assert stream == stream_of([records])


def test_runs_are_asked_for_one_at_a_time() -> None:
    """A store can fetch them as they are wanted."""
    events = read(stream_of([[Record(0, number, page_of(number)) for number in range(600)]]))
    asked = []

    def runs() -> Iterator[PageRun | FillRun]:
        for event in events:
            if isinstance(event, PageRun | FillRun):
                asked.append(event)
                yield event

    preamble = events[0]
    assert isinstance(preamble, Preamble)
    pieces = write_stream(preamble, runs(), rest_of(events))
    kept = [bytes(next(pieces)) for _ in range(2)]
    assert asked == []
    views = [next(pieces)]
    assert len(asked) == 1
    views += list(pieces)
    assert len(asked) == 3
    assert b"".join([*kept, *views]) == rewritten(events)
