"""A hold port's channel over a pair of sockets, and which frames count as overtaken."""

import os
import socket
from collections.abc import Iterator
from typing import cast

import pytest
from test_inbound_queue import EPOCH, NEW, OLD, VLAN_ID, numbers, plain, tagged

from geni_violin.hostagent.hold_port import HoldPortChannel, Overtaken
from geni_violin.hostagent.inbound_queue import InboundQueue
from geni_violin.hostagent.switch_end import SwitchEnd

MAC = bytes.fromhex("525400000001")


class ScriptedSwitchEnd:
    """The switch's end of a device, with as much room as it is told."""

    def __init__(self) -> None:
        self.room = True
        self.closed = False

    def has_room(self) -> bool:
        return self.room

    def has_read(self) -> bool:
        return self.room

    def close(self) -> None:
        self.closed = True


class Port:
    """A channel, and the switch that gives it frames and takes them back."""

    def __init__(self) -> None:
        ours, self.switch = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (ours, self.switch):
            end.setblocking(False)
        self.end = ScriptedSwitchEnd()
        self.triggers = 0
        self.queue = InboundQueue(VLAN_ID, EPOCH)
        self.channel = HoldPortChannel(
            ours.detach(), cast(SwitchEnd, self.end), self.queue, MAC, self._future_frame_seen
        )

    def _future_frame_seen(self) -> None:
        self.triggers += 1

    def give(self, *frames: bytes) -> None:
        """Frames come to the hold port."""
        for frame in frames:
            self.switch.send(frame)
        assert self.channel.turn()

    def back(self) -> list[int]:
        """The frames that have come back since the last call."""
        found = []
        while True:
            try:
                found.append(self.switch.recv(2048))
            except BlockingIOError:
                return numbers(found)


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    if not made.end.closed:
        made.channel.close()
    made.switch.close()


def test_old_frames_go_back_at_once_and_new_ones_after_the_cut(port: Port) -> None:
    port.give(tagged(1, OLD), tagged(2, NEW), tagged(3, OLD), tagged(4, NEW))
    assert (port.back(), port.triggers) == ([1, 3], 1)
    with port.channel.lock:
        port.queue.hold()
    port.give(tagged(5, OLD))
    assert port.back() == []
    with port.channel.lock:
        port.channel.put(port.queue.deliver())
    port.give(tagged(6, NEW))
    assert port.back() == [2, 4, 5, 6]
    assert numbers([frame.data for frame in port.queue.received]) == [5], "in transit"
    assert port.channel.drained()


def test_what_the_vm_has_sent_to_all_does_not_come_back_to_it(port: Port) -> None:
    own = tagged(1, OLD)
    port.give(own[:6] + MAC + own[12:], tagged(2, OLD))
    assert port.back() == [2]
    assert port.queue.frames_taken == 1


def test_what_the_switch_has_no_room_for_waits_in_order(port: Port) -> None:
    port.end.room = False
    port.give(tagged(1, OLD), tagged(2, OLD))
    assert port.back() == []
    assert not port.channel.is_written_back()
    port.end.room = True
    port.give(tagged(3, OLD))
    assert port.back() == [1, 2, 3]
    assert port.channel.is_written_back()


def test_frames_that_nobody_has_read_yet_are_on_their_way(port: Port) -> None:
    port.switch.send(tagged(1, OLD))
    assert not port.channel.all_taken()
    assert port.channel.turn()
    assert port.channel.all_taken()


def test_a_channel_that_is_closed_takes_no_turn(port: Port) -> None:
    with port.channel.lock:
        port.channel.close()
    unused = os.open(os.devnull, os.O_RDONLY)  # has the number that the channel's device had
    assert not port.channel.turn()
    os.close(unused)


def overtaken(*happened: tuple[str, int]) -> Overtaken:
    watch = Overtaken()
    for what, number in happened:
        {"back": watch.written_back, "by": watch.came_by}[what](plain(number))
    return watch


@pytest.mark.parametrize(
    ("happened", "count", "left"),
    [
        ([("back", 1), ("by", 1), ("by", 2)], 0, 0),
        ([("back", 1), ("by", 2), ("by", 1)], 1, 0),
        ([("back", 1), ("back", 2), ("by", 1), ("by", 3), ("by", 2), ("by", 4)], 1, 0),
        ([("by", 3), ("back", 1), ("back", 2), ("by", 1), ("by", 2)], 2, 0),
        ([("back", 1), ("back", 2), ("by", 2), ("by", 3)], 0, 0),
        ([("back", 1), ("by", 2)], 0, 1),
    ],
    ids=["none", "one", "the last", "all that came after", "one was lost", "on its way"],
)
def test_which_frames_count_as_overtaken(happened: list[tuple[str, int]], count: int, left: int) -> None:
    watch = overtaken(*happened)
    assert (watch.frames_reordered, watch.all_came_by) == (count, left == 0)
