"""Traces of TCP streams from captures."""

from pathlib import Path

import pytest
from captures import RECEIVER, SENDER, SYN, Sent, capture
from hypothesis import given
from hypothesis import strategies as st

from bench.tcp_trace import main, read_trace, trace_of, write_trace
from geni_violin.core.errors import InvalidInput

T0 = 1_700_000_000.0


def steady(count: int, first: int = 1001, step_s: float = 0.001, length: int = 1000) -> list[Sent]:
    """A stream without trouble."""
    return [Sent(T0 + index * step_s, first + index * length, length) for index in range(count)]


def test_a_steady_stream() -> None:
    trace = trace_of(capture(steady(5)), "x")
    assert [seq for _, seq in trace.points] == [1000, 2000, 3000, 4000, 5000]
    assert [t for t, _ in trace.points] == pytest.approx([0.0, 0.001, 0.002, 0.003, 0.004], abs=1e-6)
    assert (trace.stream_bytes, trace.segments, trace.segments_sent_again) == (5000, 5, 0)
    assert trace.longest_stall_s == pytest.approx(0.001, abs=1e-6)
    assert trace.began_at == pytest.approx(T0)


@pytest.mark.parametrize("change", [{"tags": (101 | 2 << 13,)}, {"tags": (101, 7)}, {"ipv6": True}])
def test_tags_and_ipv6(change: dict[str, object]) -> None:
    sent = [Sent(one.at, one.sequence, one.length, **change) for one in steady(3)]  # type: ignore[arg-type]
    assert [seq for _, seq in trace_of(capture(sent), "x").points] == [1000, 2000, 3000]


def test_a_frame_that_was_cut_short_counts_with_its_whole_length() -> None:
    assert trace_of(capture(steady(3), snap_bytes=96), "x").stream_bytes == 3000


def test_a_padded_frame_counts_without_its_padding() -> None:
    assert trace_of(capture([Sent(T0, 5, 1), Sent(T0 + 1, 6, 1)]), "x").stream_bytes == 2


def test_the_stream_begins_after_its_syn() -> None:
    sent = [Sent(T0, 999, 0, SYN), *steady(2, first=1000)]
    trace = trace_of(capture(sent), "x")
    assert [seq for _, seq in trace.points] == [1000, 2000]


def test_the_longest_stall_ends_with_new_bytes_not_with_old_ones() -> None:
    sent = [
        Sent(T0, 1, 100),
        Sent(T0 + 0.1, 101, 100),
        Sent(T0 + 0.3, 1, 100),  # sent again: advances nothing
        Sent(T0 + 0.5, 201, 100),
        Sent(T0 + 0.6, 301, 100),
    ]
    trace = trace_of(capture(sent), "x")
    assert trace.longest_stall_s == pytest.approx(0.4)
    assert trace.longest_stall_from_s == pytest.approx(0.1)
    assert trace.segments_sent_again == 1
    assert [seq for _, seq in trace.points] == [100, 200, 100, 300, 400]


def test_a_segment_that_fills_a_hole_was_sent_again() -> None:
    sent = [Sent(T0, 1, 100), Sent(T0 + 0.1, 201, 100), Sent(T0 + 0.2, 101, 100), Sent(T0 + 0.3, 301, 100)]
    trace = trace_of(capture(sent), "x")
    assert trace.segments_sent_again == 1
    assert trace.longest_stall_s == pytest.approx(0.2)


def test_acknowledgments_and_other_frames_are_passed_over() -> None:
    sent = [
        *steady(3),
        Sent(T0 + 1, 7, 0),  # an acknowledgment
        Sent(T0 + 1, 7, 10, source=RECEIVER, destination=SENDER),  # the other direction
        Sent(T0 + 1, 7, 500, fragment_offset=100),  # no beginning of a segment
    ]
    trace = trace_of(capture(sent), "x")
    assert (trace.stream_bytes, trace.segments) == (3000, 3)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"nothing", "ends within its header"),
        (capture([]), "no TCP segment"),
        (capture([Sent(T0, 1, 0)]), "no TCP segment"),
    ],
)
def test_what_is_no_capture_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        trace_of(data, "x")


@given(
    first=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=40),
    repeated=st.sets(st.integers(0, 39)),
)
def test_every_stream_is_told_whole_across_the_wrap(first: int, lengths: list[int], repeated: set[int]) -> None:
    sent, begin, ends = [], 0, []
    for index, length in enumerate(lengths):
        copies = 2 if index in repeated else 1
        for copy in range(copies):
            sent.append(Sent(T0 + index * 0.01 + copy * 0.001, first + begin, length))
            ends.append(begin + length)
        begin += length
    trace = trace_of(capture(sent), "x")
    assert [seq for _, seq in trace.points] == ends
    assert trace.stream_bytes == sum(lengths)
    assert trace.segments_sent_again == len(ends) - len(lengths)


def test_the_tool_writes_a_trace_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.pcap").write_bytes(capture(steady(100)))
    arguments = [str(tmp_path / "a.pcap"), "--name", "no snapshot", "--cut-at", str(T0 + 0.05)]
    assert main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
    assert "longest stall   1.0 ms" in capsys.readouterr().out
    trace = read_trace(tmp_path / "a.json")
    assert (trace.name, trace.stream_bytes) == ("no snapshot", 100_000)
    assert trace.cut_s == pytest.approx(0.05)
    write_trace(trace, tmp_path / "b.json")
    assert read_trace(tmp_path / "b.json") == trace


def test_the_tool_refuses_a_bad_file_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.pcap").write_bytes(b"nothing")
    assert main([str(tmp_path / "a.pcap"), "--name", "x", "--json", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "b.json").write_text('{"points": [[0, 1]]}')
    with pytest.raises(ValueError, match=r"b\.json is no trace"):
        read_trace(tmp_path / "b.json")
