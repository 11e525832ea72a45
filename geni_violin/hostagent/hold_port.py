"""A VM's hold port: frames out of its TAP device through the inbound queue and back into it, for the frame pump.

Theory of operation. Armed, the switch gives the VM's frames to the hold port with the slice's tag on. What is written
back goes to the VM's own port (``controller/pipeline.py``). All that the VM gets takes this way then, so it stays in
order. The VM's own broadcasts come to its hold port as well, as to any port that they did not come from, and go no
further.

Open vSwitch reads what is written back through a packet socket, which drops what finds no room there. So no more is
written than has room; the rest waits, and is tried again.

*Overtaken frames.* When the switch takes the direct path again, frames that it gave to the hold port just before may
reach the VM after later ones. No counter tells, so the VM's TAP device is listened to (packet(7)): what comes by there
and is not the next frame that was written back came by the direct path, and every frame that was written back and comes
by after the first of those counts as reordered. That is true of two frames of the same sender, and more than true of
others.
"""

import ctypes
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from geni_violin.core.errors import MachineFault
from geni_violin.hostagent.frame_pump import Watched
from geni_violin.hostagent.inbound_queue import InboundQueue
from geni_violin.hostagent.switch_end import SwitchEnd

_FRAME_BYTES = 65_536
_FRAMES_A_TURN = 256
_FRAMES_BETWEEN_LOOKS = 32
_MOST_OUT_BYTES = 256 << 20
_NOTED_BYTES = 128
"""How much of a frame is compared: past the sequence numbers and checksums of TCP and UDP."""
_SOURCE = slice(6, 12)
_ETH_P_ALL, _PACKET_OUTGOING = 0x0003, 4  # linux/if_ether.h, linux/if_packet.h
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33  # asm-generic/socket.h
_LISTENED_BYTES = 16 << 20


class OvertakingWatch:
    """Listens to what the switch gives a VM. All methods are called under the channel's lock.

    :param tap: the VM's TAP device; nothing that was written back is on its way to it now.
    :raise MachineFault: it cannot be listened to.
    """

    def __init__(self, tap: str) -> None:
        self.overtaken = Overtaken()
        try:
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        except OSError as error:
            raise MachineFault(f"cannot listen to {tap}: {error.strerror}", "run as root") from error
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _LISTENED_BYTES)
            _attach_filter(self.socket)
            self.socket.bind((tap, 0))
            self.socket.setblocking(False)
            self._forget_what_came_before()
            self.socket.bind((tap, _ETH_P_ALL))
        except OSError as error:
            self.socket.close()
            raise MachineFault(f"cannot listen to {tap}: {error.strerror}", "run as root") from error

    def _forget_what_came_before(self) -> None:
        """A socket that is not bound hears all devices."""
        while self._heard() is not None:
            pass

    def _heard(self) -> bytes | None:
        try:
            return self.socket.recv(_NOTED_BYTES)
        except OSError:  # nothing more, or the device is gone
            return None

    def look(self) -> None:
        """Take in what has come by."""
        while (frame := self._heard()) is not None:
            self.overtaken.came_by(frame)

    def close(self) -> None:
        """Listen no more."""
        self.socket.close()


class Overtaken:
    """Tells frames that were written back from direct ones, by their beginnings, and counts the overtaken. Pure."""

    def __init__(self) -> None:
        self.frames_reordered = 0
        self._expected: deque[bytes] = deque()
        self._direct_seen = False

    @property
    def all_came_by(self) -> bool:
        """Whether everything that was written back has reached the VM's device."""
        return not self._expected

    def written_back(self, frame: bytes) -> None:
        """This frame will come by, after all that were written back before it."""
        self._expected.append(frame[:_NOTED_BYTES])

    def came_by(self, frame: bytes) -> None:
        """This frame has reached the VM's device. Frames that should have before were lost on their way, or unheard."""
        noted = frame[:_NOTED_BYTES]
        if noted not in self._expected:
            self._direct_seen = True
            return
        while self._expected.popleft() != noted:
            pass
        self.frames_reordered += self._direct_seen


def _attach_filter(listener: socket.socket) -> None:
    """Hear only what goes out to the device, and its beginning: a filter of four instructions (bpf(4))."""
    code = (
        (0x20, 0, 0, 0xFFFFF000 + 4),  # load the packet's type
        (0x15, 0, 1, _PACKET_OUTGOING),  # is it outgoing?
        (0x06, 0, 0, _NOTED_BYTES),
        (0x06, 0, 0, 0),
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HL", len(code), ctypes.addressof(program)))


class HoldPortChannel:
    """One hold port; a :class:`~geni_violin.hostagent.frame_pump.Channel`.

    :param descriptor: reads and writes the hold port's TAP device; closed by :meth:`close`.
    :param switch_end: by which the switch reads that device.
    :param mac: the VM's address.
    :param on_future: called once, from the pump's thread, at the first frame of the new color.
    """

    def __init__(
        self,
        descriptor: int,
        switch_end: SwitchEnd,
        queue: InboundQueue,
        mac: bytes,
        on_future: Callable[[], object],
    ) -> None:
        self.queue = queue
        self.lock = threading.Lock()
        self.switch_end = switch_end
        self.frames_overflowed = 0
        """Frames that the switch did not take, and that memory had no room for."""
        self.watch: OvertakingWatch | None = None
        self._descriptor = descriptor
        self._mac = mac
        self._on_future: Callable[[], object] | None = on_future
        self._outgoing: deque[bytes] = deque()
        self._outgoing_bytes = 0

    def watched(self) -> Watched:
        watch = self.watch
        listened = {watch.socket.fileno(): select.EPOLLIN} if watch else {}
        return {self._descriptor: select.EPOLLIN, **listened}

    @property
    def is_backed_up(self) -> bool:
        return bool(self._outgoing)

    def turn(self) -> bool:
        with self.lock:
            if self._descriptor < 0:
                return False
            frames = self._read()
            if frames:
                self._put(self.queue.take(frames, time.time_ns() // 1000))
            self.flush()
            self.look()
            seen = self.queue.future_frame_seen
        if seen and self._on_future is not None:
            on_future, self._on_future = self._on_future, None
            on_future()
        return frames is not None

    def _read(self) -> list[bytes] | None:
        """What there is to read, up to a bound; None if the device is gone."""
        frames: list[bytes] = []
        while len(frames) < _FRAMES_A_TURN:
            try:
                frame = os.read(self._descriptor, _FRAME_BYTES)
            except BlockingIOError:
                break
            except OSError:
                return None
            if frame[_SOURCE] != self._mac:
                frames.append(frame)
        return frames

    def listen(self, tap: str) -> None:
        """Count the frames that are overtaken from now on. Under the lock.

        :raise MachineFault: the VM's device cannot be listened to.
        """
        if self.watch is None:
            self.watch = OvertakingWatch(tap)

    def put(self, frames: Iterable[bytes]) -> None:
        self._put(frames)
        self.flush()

    def _put(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            if self._outgoing_bytes + len(frame) > _MOST_OUT_BYTES:
                self.frames_overflowed += 1
                continue
            self._outgoing.append(frame)
            self._outgoing_bytes += len(frame)

    def flush(self) -> None:
        """Write what waits, as far as the switch has room. Under the lock."""
        written = 0
        while self._outgoing:
            if written % _FRAMES_BETWEEN_LOOKS == 0 and not self.switch_end.has_room():
                return
            written += 1
            frame = self._outgoing.popleft()
            self._outgoing_bytes -= len(frame)
            if self.watch is not None:
                self.watch.overtaken.written_back(frame)
            try:
                os.write(self._descriptor, frame)
            except OSError:  # the device is gone, or down
                self.frames_overflowed += 1

    def all_taken(self) -> bool:
        """Whether nothing waits to be read. Under the lock."""
        return not select.select([self._descriptor], [], [], 0)[0]

    def is_written_back(self) -> bool:
        """Whether the switch has read all that was passed on. Under the lock."""
        self.flush()
        return not self._outgoing and self.switch_end.has_read()

    def drained(self) -> bool:
        """Whether nothing is on its way through the hold port any more. Under the lock."""
        return self.all_taken() and self.is_written_back()

    def look(self) -> None:
        """Take in what has reached the VM's device. Under the lock."""
        if self.watch is not None:
            self.watch.look()

    @property
    def frames_reordered(self) -> int:
        """How many frames came to the VM after one that may have been sent later."""
        return self.watch.overtaken.frames_reordered if self.watch is not None else 0

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1  # its number may soon be another's
        os.close(descriptor)
        self.switch_end.close()
        if self.watch is not None:
            self.watch.close()


def put_on(tap: str, frames: Sequence[bytes]) -> None:
    """Put frames into a VM's TAP device, as the switch does.

    :raise MachineFault: the device is not there, or does not take them.
    """
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((tap, 0))
            for frame in frames:
                sender.send(frame)
    except OSError as error:
        raise MachineFault(f"cannot put frames on {tap}: {error.strerror}", "is its VM there?") from error
