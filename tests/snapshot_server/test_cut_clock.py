"""The guest's clock at its cut, found in the end of a stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapshot_harness import CLOCK_NS, stopped_stream, stream_of, timer_section

from geni_violin.snapshot_server.cut_clock import TAIL_BYTES, clock_at_stop_ns

QEMU_SECTION = bytes.fromhex(
    "04000000000574696d6572000000000000000200000001809082e000000000000000000000000094216ce77e00000000"
)
"""As QEMU 7.2.22 sent it."""


def test_a_section_of_qemu() -> None:
    assert clock_at_stop_ns(QEMU_SECTION) == 2_485_218_535


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, (1 << 32) - 1), st.binary(max_size=80), st.binary())
def test_any_clock_among_any_bytes(clock_ns: int, section_id: int, before: bytes, after: bytes) -> None:
    assert clock_at_stop_ns(before + timer_section(clock_ns, section_id) + after) == clock_ns


def test_a_stream_without_it() -> None:
    assert clock_at_stop_ns(b"") is None
    assert clock_at_stop_ns(stream_of(5000)) is None


def test_what_a_guest_keeps_in_its_memory_does_not_count() -> None:
    """Memory comes before device state."""
    assert clock_at_stop_ns(stream_of(900) + timer_section(7) + stopped_stream()) == CLOCK_NS


@pytest.mark.parametrize("place", [4, 6, 14, 18, 30, -1, -5])
def test_a_section_that_differs_is_none(place: int) -> None:
    """Its name, instance, version, unused bytes, and the section's id in its footer."""
    section = bytearray(timer_section(CLOCK_NS))
    section[place] ^= 1
    assert clock_at_stop_ns(bytes(section)) is None


def test_a_section_that_is_cut_off_is_none() -> None:
    section = timer_section(CLOCK_NS)
    assert all(clock_at_stop_ns(section[:end]) is None for end in range(len(section)))


def test_the_tail_is_large_enough_for_many_processors() -> None:
    assert TAIL_BYTES > 160_000 + 1024 * 10_000
