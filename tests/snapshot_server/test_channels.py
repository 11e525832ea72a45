"""Which frames are in transit to whom, from what the edges recorded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapshot_harness import BROADCAST, CLOCK_NS, CLOCK_US, MACS, frame_to

from geni_violin.core.errors import InvalidInput
from geni_violin.runtime.pcap import Frame
from geni_violin.snapshot_server.channels import SECONDS_OF_A_DATE, Late, channel_of, late_of, parsed_macs

OCTETS = parsed_macs(MACS, MACS)
MULTICAST = "33:33:00:00:00:01"
US = 1_000_000


def words(frames: tuple[Frame, ...] | list[Frame]) -> list[str]:
    return [frame.data[14:].decode() for frame in frames]


def sent_at(*stamps_us: int) -> list[Frame]:
    return [frame_to(MACS["n2"], str(number), at_us) for number, at_us in enumerate(stamps_us)]


def test_a_frame_is_late_up_to_the_microsecond_of_the_stop() -> None:
    late = late_of("n1", sent_at(CLOCK_US - 1, CLOCK_US, CLOCK_US + 1), CLOCK_NS)
    assert (words(late.frames), late.undecided_frames, late.note) == (["0", "1"], 0, "")


@given(
    clock_us=st.integers(0, 10**14),
    spans_us=st.lists(st.integers(-249_000, 249_000), min_size=1, max_size=20).map(sorted),
    date_s=st.integers(SECONDS_OF_A_DATE, 4_000_000_000),
)
def test_a_date_in_the_stamps_changes_nothing(clock_us: int, spans_us: list[int], date_s: int) -> None:
    """As long as the frames lie within a quarter of a second of the cut, wherever in it."""
    clock_us += 249_000
    known = late_of("n1", sent_at(*(clock_us + span for span in spans_us)), clock_us * 1000)
    guessed = late_of("n1", sent_at(*(clock_us + span + date_s * US for span in spans_us)), clock_us * 1000)
    assert words(known.frames) == words(guessed.frames) == [str(n) for n, span in enumerate(spans_us) if span <= 0]
    assert guessed.note == known.note == ""


@pytest.mark.parametrize("stamps_s", [(0.0, 1.4), (-0.7, 0.6)])
def test_frames_that_were_held_for_long_are_undecided(stamps_s: tuple[float, ...]) -> None:
    stamps_us = [CLOCK_US + int(stamp * US) for stamp in stamps_s]
    late = late_of("n1", sent_at(*(1_700_000_000 * US + stamp for stamp in stamps_us)), CLOCK_NS)
    assert (late.frames, late.undecided_frames) == ((), 2)
    assert late.note.startswith(
        "n1: 2 frames that it sent around its cut are not replayed by a restore: they were held"
    )
    assert words(late_of("n1", sent_at(*stamps_us), CLOCK_NS).frames) == ["0"]  # with stamps of its own clock


def test_without_a_clock_nothing_is_late() -> None:
    late = late_of("n1", sent_at(1, 2, 3), None)
    assert (late.frames, late.undecided_frames) == ((), 3)
    assert "its image does not tell its clock" in late.note
    assert late_of("n1", [], None) == Late()


def test_what_was_received_comes_first_and_then_sender_by_sender() -> None:
    received = [frame_to(MACS["n2"], "received", 77)]
    late = {
        "n3": Late((frame_to(MACS["n2"], "c", 99),)),
        "n1": Late((frame_to(MACS["n2"], "a", 50), frame_to(MACS["n2"], "b", 60))),
    }
    frames, late_frames = channel_of("n2", received, late, OCTETS)
    assert (words(frames), late_frames) == (["received", "c", "a", "b"], 3)
    assert [frame.at_us for frame in frames] == [77, 99, 99, 99]  # never back in time


def test_a_late_frame_is_for_one_or_for_all_others() -> None:
    late = {
        "n1": Late(
            (
                frame_to(MACS["n2"], "to 2"),
                frame_to(BROADCAST, "to all"),
                frame_to(MULTICAST, "to a group"),
                frame_to("52:54:00:00:00:09", "to nobody"),
                frame_to(MACS["n1"], "to itself"),
                Frame(0, bytes.fromhex("ffffffffffff")),
            )
        )
    }
    assert words(channel_of("n1", [], late, OCTETS)[0]) == []
    assert words(channel_of("n2", [], late, OCTETS)[0]) == ["to 2", "to all", "to a group"]
    assert words(channel_of("n3", [], late, OCTETS)[0]) == ["to all", "to a group"]


@pytest.mark.parametrize("mac", ["", "52:54", "zz:54:00:00:00:01", "01:54:00:00:00:01", "52:54:00:00:00:01:02"])
def test_addresses_that_cannot_be(mac: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be the address of VM n1"):
        parsed_macs({"n1": mac}, ["n1"])


@pytest.mark.parametrize("vms", [(), ("n1",), ("n1", "n2", "n3", "n4")])
def test_addresses_of_other_vms(vms: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match="not those of the staged VMs"):
        parsed_macs(MACS, vms)
