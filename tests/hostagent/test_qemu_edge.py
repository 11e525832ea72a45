"""How the edge tells that a TAP device is read empty, over a monitor and channels that only count."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from geni_violin.core.errors import MachineFault
from geni_violin.hostagent import qemu_edge
from geni_violin.hostagent.frame_pump import FrameChannel, FramePump
from geni_violin.hostagent.inbound_queue import InboundQueue
from geni_violin.hostagent.qemu_edge import QemuEdge

HELD_BY_A_TAP = 300


class _Channel:
    """A diversion through which ``frames`` more have come whenever QEMU has carried out a command."""

    def __init__(self, frames: int) -> None:
        self.lock, self.queue, self.frames = threading.Lock(), InboundQueue(7, 1), frames

    def all_taken(self) -> bool:
        return True


def _commands_until_read(monkeypatch: pytest.MonkeyPatch, frames: list[int], held: int) -> int:
    """How many commands it takes to tell that the TAP devices of interfaces with so many frames a command are read."""
    channels = [_Channel(count) for count in frames]
    commands: list[str] = []

    async def execute(command: str, **_arguments: Any) -> dict[str, Any]:
        commands.append(command)
        for channel in channels:
            channel.queue.frames_taken += channel.frames
        return {}

    async def pass_descriptor(_name: str, _fd: int) -> None:
        raise AssertionError

    edge = QemuEdge(execute, pass_descriptor, Path(), [f"tap{index}" for index in range(len(frames))], FramePump())
    edge._cut = qemu_edge._Cut(7, 1, channels)  # type: ignore[arg-type]
    monkeypatch.setattr(FrameChannel, "all_taken", _Channel.all_taken)
    monkeypatch.setattr(qemu_edge, "_queue_frames", lambda _tap: held)
    asyncio.run(edge._until_taps_are_read())
    return len(commands)


def test_few_frames_between_two_answers_tell_that_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _commands_until_read(monkeypatch, [0, 24], HELD_BY_A_TAP) == 2


def test_under_a_flood_as_many_frames_as_the_device_holds_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _commands_until_read(monkeypatch, [0, 25], HELD_BY_A_TAP) == HELD_BY_A_TAP // 25
    assert _commands_until_read(monkeypatch, [100, 25], HELD_BY_A_TAP) == HELD_BY_A_TAP // 25


def test_a_flood_into_a_device_that_does_not_tell_its_length_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineFault, match="frames come faster"):
        _commands_until_read(monkeypatch, [25], qemu_edge._queue_frames("no such device"))


def test_the_length_of_a_device_is_the_kernels(tmp_path: Path) -> None:
    assert qemu_edge._queue_frames("lo") == int(Path("/sys/class/net/lo/tx_queue_len").read_text())
