"""Frames to a pcap file and back."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.core.errors import InvalidInput
from geni_violin.runtime.pcap import Frame, decode, encode

FRAMES = st.lists(st.builds(Frame, st.integers(0, (1 << 32) * 1_000_000 - 1), st.binary(max_size=100)))


@given(FRAMES)
def test_what_is_written_is_read(frames: list[Frame]) -> None:
    assert decode(encode(frames)) == frames


@given(FRAMES.filter(bool), st.data())
def test_a_file_that_ends_early_is_refused_or_has_fewer_frames(frames: list[Frame], data: st.DataObject) -> None:
    whole = encode(frames)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        found = decode(part)
    except InvalidInput:
        return
    assert found == frames[: len(found)] and len(found) < len(frames)


def test_the_other_formats() -> None:
    nanoseconds = (
        struct.pack(">IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1) + struct.pack(">IIII", 7, 5999, 2, 60) + b"ab"
    )
    assert decode(nanoseconds) == [Frame(7_000_005, b"ab")]
    with pytest.raises(InvalidInput, match="link type 113"):
        decode(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 113))
    with pytest.raises(InvalidInput, match="no pcap file"):
        decode(b"\x0a\x0d\x0d\x0a" + bytes(40))
