"""What an armed edge passes on, keeps, records and drops."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.core.color import color_of
from geni_violin.hostagent import inbound_queue
from geni_violin.hostagent.inbound_queue import InboundQueue, Mode

VLAN_ID, EPOCH = 9, 4
OLD, NEW = color_of(EPOCH - 1), color_of(EPOCH)
ADDRESSES = bytes(12)
INNER_TAG = struct.pack("!HH", 0x8100, 3 << 13 | 100)


def plain(number: int, inner: bytes = b"") -> bytes:
    """A frame as the VM should see it."""
    return ADDRESSES + inner + struct.pack("!HI", 0x88B5, number)


def tagged(number: int, color: int, inner: bytes = b"", vlan_id: int = VLAN_ID) -> bytes:
    """The same as an armed port gives it."""
    frame = plain(number, inner)
    return frame[:12] + struct.pack("!HH", 0x8100, color << 13 | vlan_id) + frame[12:]


def numbers(frames: list[bytes]) -> list[int]:
    """What frames are numbered, once they are as the VM should see them."""
    found = [int.from_bytes(frame[-4:]) for frame in frames]
    assert all(frame in (plain(number), plain(number, INNER_TAG)) for frame, number in zip(frames, found, strict=True))
    return found


def test_the_three_modes() -> None:
    queue = InboundQueue(VLAN_ID, EPOCH)
    assert numbers(queue.take([plain(1), tagged(2, OLD), tagged(3, NEW), tagged(4, OLD)], 10)) == [1, 2, 4]
    assert queue.future_frame_seen
    queue.hold()
    assert queue.take([tagged(5, OLD), tagged(6, NEW), plain(7)], 20) == []
    assert numbers(queue.deliver()) == [3, 5, 6, 7]
    assert numbers(queue.take([tagged(8, NEW), tagged(9, OLD), plain(10)], 30)) == [8, 9, 10]
    assert [(frame.at_us, numbers([frame.data])) for frame in queue.received] == [(20, [5]), (20, [7]), (30, [9])]
    assert (queue.frames_held, queue.frames_overflowed) == (4, 0)


def test_before_the_cut_nothing_is_recorded_and_old_frames_are_no_trigger() -> None:
    queue = InboundQueue(VLAN_ID, EPOCH)
    queue.take([plain(1), tagged(2, OLD)], 0)
    assert not queue.future_frame_seen and queue.received == [] and queue.frames_held == 0


def test_a_guests_own_tags_stay_inside() -> None:
    queue = InboundQueue(VLAN_ID, EPOCH)
    assert numbers(queue.take([tagged(1, OLD, INNER_TAG), plain(2, INNER_TAG)], 0)) == [1, 2]
    stranger = tagged(3, NEW, vlan_id=VLAN_ID + 1)
    assert queue.take([stranger], 0) == [stranger], "a tag that is not the slice's belongs to the guest"


def test_frames_too_short_for_a_tag_pass() -> None:
    queue = InboundQueue(VLAN_ID, EPOCH)
    short = ADDRESSES + b"\x81\x00"
    assert queue.take([short, b""], 0) == [short, b""]


@pytest.mark.parametrize("bound", ["MOST_FRAMES", "MOST_BYTES"])
def test_what_finds_no_room_is_dropped_counted_and_not_recorded(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(inbound_queue, bound, 3 if bound == "MOST_FRAMES" else 3 * len(plain(0)))
    queue = InboundQueue(VLAN_ID, EPOCH)
    queue.hold()
    queue.take([tagged(number, OLD) for number in range(5)], 0)
    assert numbers(queue.deliver()) == [0, 1, 2] == numbers([frame.data for frame in queue.received])
    assert (queue.frames_held, queue.frames_overflowed) == (3, 2)
    assert numbers(queue.take([tagged(9, NEW)], 0)) == [9], "there is room again"


STEPS = st.lists(
    st.one_of(st.sampled_from(["hold", "deliver"]), st.tuples(st.integers(0, 2), st.booleans())), max_size=40
)


@given(STEPS)
def test_each_sender_s_frames_stay_whole_and_in_order(steps: list[str | tuple[int, bool]]) -> None:
    """Three senders; a sender's frames are old, and from some point on new."""
    queue, arrived, cut = InboundQueue(VLAN_ID, EPOCH), [], [False] * 3
    sent: list[tuple[int, int]] = []
    acts: dict[str, Callable[[], list[bytes] | None]] = {"hold": queue.hold, "deliver": queue.deliver}
    for number, step in enumerate(steps):
        if isinstance(step, str):
            arrived += numbers(acts[step]() or [])
            continue
        sender, cuts = step
        cut[sender] = cut[sender] or cuts
        sent.append((number, sender))
        passed = queue.take([tagged(number, NEW if cut[sender] else OLD)], number)
        assert not (passed and cut[sender]) or queue.mode is Mode.DELIVER, "a new frame before the cut"
        arrived += numbers(passed)
    arrived += numbers(queue.deliver())
    for sender in range(3):
        mine = [number for number, by in sent if by == sender]
        assert [number for number in arrived if number in mine] == mine
