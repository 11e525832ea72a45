"""The tunnel's header: frames arrive whole and in order, and what is missing is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.hostagent.tunnel import HEADER_BYTES, Receiver, ReceiverCounters, Sender

FRAMES = st.lists(st.binary(min_size=1, max_size=60), max_size=20)


@given(FRAMES)
def test_frames_arrive_as_they_were_sent(frames: list[bytes]) -> None:
    sender, receiver = Sender(7), Receiver()
    assert [receiver.unwrap(sender.wrap(frame)) for frame in frames] == frames
    assert receiver.counters == ReceiverCounters(arrived=len(frames))


@given(st.permutations(range(8)), st.integers(0, 8))
def test_whatever_the_network_does_the_order_is_kept(order: list[int], first: int) -> None:
    sender, receiver = Sender(7), Receiver()
    datagrams = [sender.wrap(bytes([number])) for number in range(8)]
    taken = [receiver.unwrap(datagrams[number]) for number in order[first:]]
    arrived = [frame[0] for frame in taken if frame is not None]
    assert arrived == sorted(arrived)
    if arrived:
        assert receiver.counters == ReceiverCounters(len(arrived), arrived[-1] - arrived[0] + 1 - len(arrived))


def test_a_repeated_datagram_is_taken_once() -> None:
    sender, receiver = Sender(7), Receiver()
    datagram = sender.wrap(b"a")
    assert [receiver.unwrap(datagram), receiver.unwrap(datagram)] == [b"a", None]


def test_a_sender_that_starts_anew_is_listened_to_from_its_first_frame() -> None:
    receiver, old, new = Receiver(), Sender(7), Sender(8)
    for _ in range(3):
        receiver.unwrap(old.wrap(b"old"))
    new.wrap(b"lost")
    assert receiver.unwrap(new.wrap(b"new")) == b"new"
    assert receiver.counters == ReceiverCounters(arrived=4, missed=0)


@pytest.mark.parametrize("datagram", [b"", b"x", bytes(HEADER_BYTES)])
def test_what_is_no_frame_is_ignored(datagram: bytes) -> None:
    receiver = Receiver()
    assert receiver.unwrap(datagram) is None
    assert receiver.counters == ReceiverCounters()
