"""The delay line: every frame waits equally long, the order is kept, and what is lost is decided by the seed."""

import math

from hypothesis import given
from hypothesis import strategies as st

from geni_violin.hostagent.delay_line import DelayLine

DELAY_NS = 20_000_000
GAPS_NS = st.lists(st.integers(0, 3 * DELAY_NS), max_size=60)


def frame(number: int) -> bytes:
    """A frame that can be told from the others."""
    return number.to_bytes(4, "big")


def take_all(line: DelayLine, now_ns: int) -> list[bytes]:
    """What is due by now."""
    taken = []
    while (due := line.take(now_ns)) is not None:
        taken.append(due)
    return taken


@given(GAPS_NS)
def test_each_frame_comes_out_when_it_is_due_and_in_order(gaps_ns: list[int]) -> None:
    line, now_ns = DelayLine(DELAY_NS, 0.0, seed=1), 0
    due_ns: list[int] = []
    taken: list[bytes] = []
    for number, gap_ns in enumerate(gaps_ns):
        now_ns += gap_ns
        taken += take_all(line, now_ns)
        assert len(taken) == sum(due <= now_ns for due in due_ns)
        line.put(frame(number), now_ns)
        due_ns.append(now_ns + DELAY_NS)
    while line.next_due_ns is not None:
        assert line.next_due_ns == due_ns[len(taken)]
        assert line.take(line.next_due_ns - 1) is None
        taken += take_all(line, line.next_due_ns)
    assert taken == [frame(number) for number in range(len(gaps_ns))]
    assert line.counters.entered == len(gaps_ns)
    assert line.counters.lost == line.counters.overflowed == 0


def survivors(loss: float, seed: int, frames: int) -> list[bytes]:
    line = DelayLine(0, loss, seed)
    for number in range(frames):
        line.put(frame(number), number)
    taken = take_all(line, frames)
    assert line.counters.lost == frames - len(taken)
    return taken


def test_the_loss_is_the_share_that_was_asked_for() -> None:
    frames, loss = 60_000, 0.01
    lost = frames - len(survivors(loss, seed=7, frames=frames))
    assert abs(lost - frames * loss) < 5 * math.sqrt(frames * loss * (1 - loss))


def test_the_seed_decides_which_frames_are_lost() -> None:
    assert survivors(0.3, seed=7, frames=200) == survivors(0.3, seed=7, frames=200)
    assert survivors(0.3, seed=7, frames=200) != survivors(0.3, seed=8, frames=200)


def test_nothing_or_everything_can_be_lost() -> None:
    assert len(survivors(0.0, seed=1, frames=500)) == 500
    assert survivors(1.0, seed=1, frames=500) == []


def test_a_full_line_drops_and_counts_what_comes_on_top() -> None:
    line = DelayLine(DELAY_NS, 0.0, seed=1, max_frames=3)
    for number in range(5):
        line.put(frame(number), now_ns=0)
    assert (line.counters.entered, line.counters.overflowed, len(line)) == (5, 2, 3)
    assert take_all(line, DELAY_NS) == [frame(0), frame(1), frame(2)]
    line.put(frame(9), now_ns=DELAY_NS)
    assert (len(line), line.counters.overflowed) == (1, 2)


def test_a_line_is_full_by_bytes_too() -> None:
    line = DelayLine(DELAY_NS, 0.0, seed=1, max_bytes=100)
    for size in (60, 41, 40):
        line.put(bytes(size), now_ns=0)
    assert line.counters.overflowed == 1
    assert [len(taken) for taken in take_all(line, DELAY_NS)] == [60, 40]
    line.put(bytes(100), now_ns=DELAY_NS)
    assert line.counters.overflowed == 1
