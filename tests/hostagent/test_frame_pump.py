"""The thread that moves frames between QEMU's sockets, with sockets in QEMU's place."""

import socket
import struct
import time
from collections.abc import Callable

import pytest

from geni_violin.hostagent.frame_pump import FrameChannel, FramePump
from geni_violin.hostagent.inbound_queue import InboundQueue

VLAN_ID = 5
FRAMES = 2_000


class Qemu:
    """Both sockets of one interface, as QEMU has them, and the agent's channel at their other ends."""

    def __init__(self, pump: FramePump, on_future: Callable[[], object] = lambda: None) -> None:
        self.diverts, theirs = socket.socketpair()
        self.takes, injects = socket.socketpair()
        self.takes.settimeout(10)
        self._stream = self.takes.makefile("rb")
        self.channel = FrameChannel(theirs, injects, InboundQueue(VLAN_ID, epoch=1), on_future)
        pump.add(self.channel)

    def divert(self, number: int, color: int, size: int = 60) -> None:
        tag = struct.pack("!HH", 0x8100, color << 13 | VLAN_ID)
        frame = bytes(12) + tag + b"\x88\xb5" + struct.pack("!I", number) + bytes(size)
        self.diverts.sendall(struct.pack("!I", len(frame)) + frame)

    def taken(self, count: int) -> list[int]:
        """The numbers of the next frames that are passed on, which have no tag."""
        frames = [self._stream.read(*struct.unpack("!I", self._stream.read(4))) for _ in range(count)]
        assert all(frame[12:14] == b"\x88\xb5" for frame in frames)
        return [struct.unpack("!I", frame[14:18])[0] for frame in frames]

    def close(self) -> None:
        for end in (self.diverts, self._stream, self.takes):
            end.close()


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def drained(qemu: Qemu) -> bool:
    with qemu.channel.lock:
        return qemu.channel.drained()


@pytest.fixture
def pump() -> FramePump:
    return FramePump()


def test_frames_of_several_interfaces_pass_in_order(pump: FramePump) -> None:
    interfaces = [Qemu(pump) for _ in range(3)]
    for number in range(50):
        for qemu in interfaces:
            qemu.divert(number, color=0)
    for qemu in interfaces:
        assert qemu.taken(50) == list(range(50))
        pump.remove(qemu.channel)
        qemu.close()


def test_what_qemu_does_not_take_at_once_waits_and_keeps_its_order(pump: FramePump) -> None:
    """More than the socket has room for; meanwhile another interface's frames pass."""
    slow, quick = Qemu(pump), Qemu(pump)
    for number in range(FRAMES):
        slow.divert(number, color=0, size=1000)
    until(lambda: len(slow.channel.watched()) == 2)
    quick.divert(7, color=0)
    assert quick.taken(1) == [7]
    assert not drained(slow)
    assert slow.taken(FRAMES) == list(range(FRAMES))
    until(lambda: drained(slow))
    for number in range(FRAMES):  # and once more, after it was waited for
        slow.divert(number, color=0, size=1000)
    assert slow.taken(FRAMES) == list(range(FRAMES))
    for qemu in (slow, quick):
        pump.remove(qemu.channel)
        qemu.close()


def test_frames_that_were_held_are_delivered_before_later_ones(pump: FramePump) -> None:
    seen: list[bool] = []
    qemu = Qemu(pump, lambda: seen.append(True))
    for number in range(100):
        qemu.divert(number, color=1, size=4000)
    until(lambda: qemu.channel.queue.frames_held == 100)
    assert seen == [True], "the first frame of the future is told, once"
    with qemu.channel.lock:
        pump.put(qemu.channel, qemu.channel.queue.deliver())
    for number in range(100, 200):
        qemu.divert(number, color=1)
    assert qemu.taken(200) == list(range(200))
    pump.remove(qemu.channel)
    qemu.close()


def test_an_interface_that_goes_leaves_the_others_alone(pump: FramePump) -> None:
    """Removed while QEMU takes nothing, or gone by itself; then another may get the same descriptors."""
    stays, removed, gone = Qemu(pump), Qemu(pump), Qemu(pump)
    for number in range(FRAMES):
        removed.divert(number, color=0, size=1000)
    until(lambda: len(removed.channel.watched()) == 2)
    pump.remove(removed.channel)
    removed.close()
    gone.close()
    later = Qemu(pump)
    for qemu in (stays, later):
        qemu.divert(1, color=0)
        assert qemu.taken(1) == [1]
    for qemu in (stays, gone, later):
        pump.remove(qemu.channel)
        qemu.close()
