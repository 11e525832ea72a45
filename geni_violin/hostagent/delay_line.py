"""A delay line: frames come out in the order they went in, each a fixed time later, and some never. No I/O, no clock.

Theory of operation. All frames wait equally long, so they fall due in the order that they came in: a first-in first-out
queue is enough, and nothing is ever reordered. Whether a frame is lost is decided when it comes in, by a generator of
pseudo-random numbers whose seed is given: the same seed loses the same frames. The line is bounded in frames and in
bytes; a frame that finds it full is dropped, and counted apart from those that are lost on purpose.
"""

import random
from collections import deque
from dataclasses import dataclass

MAX_FRAMES = 65_536
MAX_BYTES = 64 << 20


@dataclass
class LineCounters:
    """Frames since the line was made."""

    entered: int = 0
    lost: int = 0
    overflowed: int = 0


class DelayLine:
    """One direction of a link.

    :param delay_ns: how long each frame waits.
    :param loss: the share of frames that are lost, 0 to 1; each frame's fate is independent of the others'.
    :param seed: of the generator that decides it.
    """

    def __init__(
        self, delay_ns: int, loss: float, seed: int, max_frames: int = MAX_FRAMES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._delay_ns, self._loss = delay_ns, loss
        self._chance = random.Random(seed)
        self._max_frames, self._max_bytes = max_frames, max_bytes
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self.counters = LineCounters()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def next_due_ns(self) -> int | None:
        """When the first frame falls due, on the clock of ``now_ns``; None if none waits."""
        return self._waiting[0][0] if self._waiting else None

    def put(self, frame: bytes, now_ns: int) -> None:
        """Take a frame in; ``now_ns`` must never go back from one call to the next."""
        self.counters.entered += 1
        if self._chance.random() < self._loss:
            self.counters.lost += 1
        elif len(self._waiting) >= self._max_frames or self._bytes + len(frame) > self._max_bytes:
            self.counters.overflowed += 1
        else:
            self._waiting.append((now_ns + self._delay_ns, frame))
            self._bytes += len(frame)

    def take(self, now_ns: int) -> bytes | None:
        """The first frame that has waited long enough, taken out; None if there is none."""
        if not self._waiting or self._waiting[0][0] > now_ns:
            return None
        _, frame = self._waiting.popleft()
        self._bytes -= len(frame)
        return frame
