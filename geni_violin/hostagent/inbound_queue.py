"""What an armed edge does with each frame that comes for its VM. Pure: no socket, no clock.

Theory of operation. The network gives the frames of both colors of a cut, with the slice's tag on (IEEE 802.1Q: VLAN ID
and, in the priority, the color). A frame without that tag came before the port was armed, so it is of the old color, or
after it was disarmed, so it is of the new one. Three modes follow one another:

- PASS, before the cut: old frames are passed on; new ones wait. The first of them is the second trigger.
- HOLD, during the cut: every frame waits.
- DELIVER, after the cut: what waited is passed on in the order in which it came, then everything that comes.

An old frame that comes in HOLD or DELIVER was sent before its sender's cut and is received after this VM's: it is in
transit, and recorded. As the VM consumed everything before HOLD began, no other frame is (docs/architecture.md).
Frames of one sender to this VM stay in order: a sender's new frames all come after its old ones.

What waits is bounded in frames and in bytes; what finds no room is dropped, counted, and not recorded: it is lost in
the network, as far as the snapshot knows.
"""

from collections import deque
from collections.abc import Iterable
from enum import Enum

from geni_violin.core.color import color_of
from geni_violin.runtime.pcap import Frame

MOST_FRAMES = 10_000
"""As many as QEMU keeps for a guest whose ring is full (net/queue.c); more, let go at once, would be lost uncounted."""
MOST_BYTES = 128 << 20
_TAG = b"\x81\x00"


class Mode(Enum):
    """See the module's theory of operation."""

    PASS = "pass"
    HOLD = "hold"
    DELIVER = "deliver"


class InboundQueue:
    """The frames for one interface of a VM.

    :param vlan_id: the slice's.
    :param epoch: the one that the VM is to be cut into.
    """

    def __init__(self, vlan_id: int, epoch: int) -> None:
        self.mode = Mode.PASS
        self.frames_taken = 0
        self.frames_held = 0
        self.frames_overflowed = 0
        self.received: list[Frame] = []
        """The frames in transit, without the slice's tag."""
        self.frames_unrecorded = 0
        """Frames in transit that found no room in ``received``; the VM got them, a restore cannot replay them."""
        self.future_frame_seen = False
        self._vlan_id, self._new_color = vlan_id, color_of(epoch)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._received_bytes = 0

    def take(self, frames: Iterable[bytes], at_us: int) -> list[bytes]:
        """The frames that are passed on now, out of these that came ``at_us``; both in order."""
        passed = []
        for arrived in frames:
            self.frames_taken += 1
            is_new, frame = self._told_apart(arrived)
            self.future_frame_seen = self.future_frame_seen or is_new
            if self.mode is Mode.DELIVER or (self.mode is Mode.PASS and not is_new):
                passed.append(frame)
            elif not self._keep(frame):
                continue
            if self.mode is not Mode.PASS and not is_new:
                self._record(Frame(at_us, frame))
        return passed

    def _told_apart(self, frame: bytes) -> tuple[bool, bytes]:
        """Whether a frame is of the new color, and the frame without the slice's tag."""
        if frame[12:14] == _TAG and len(frame) > 15:
            control = frame[14] << 8 | frame[15]
            if control & 0xFFF == self._vlan_id:
                return control >> 13 == self._new_color, frame[:12] + frame[16:]
        return self.mode is Mode.DELIVER, frame

    def _keep(self, frame: bytes) -> bool:
        """Let a frame wait; whether there is room."""
        if len(self._waiting) >= MOST_FRAMES or self._waiting_bytes + len(frame) > MOST_BYTES:
            self.frames_overflowed += 1
            return False
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        self.frames_held += 1
        return True

    def _record(self, frame: Frame) -> None:
        if self._received_bytes + len(frame.data) > MOST_BYTES:
            self.frames_unrecorded += 1
            return
        self._received_bytes += len(frame.data)
        self.received.append(frame)

    def hold(self) -> None:
        """From here on every frame waits."""
        if self.mode is Mode.PASS:
            self.mode = Mode.HOLD

    def deliver(self) -> list[bytes]:
        """From here on no frame waits; those that did, in the order in which they came."""
        self.mode = Mode.DELIVER
        waited, self._waiting, self._waiting_bytes = list(self._waiting), deque(), 0
        return waited
