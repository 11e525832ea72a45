"""The edge of a real VM: numbered frames both ways through all of a cut, and none is lost, doubled or overtaken."""

import asyncio
import contextlib
import itertools
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from geni_violin.core.color import color_of
from geni_violin.hostagent import inbound_queue
from geni_violin.hostagent.edge import EdgeRecord
from geni_violin.hostagent.qemu import QemuVm
from geni_violin.hostagent.vm_events import Resumed
from mininet_tests.hypervisor_harness import (
    Bench,
    Receiver,
    Scenario,
    Wire,
    echo_of,
    echo_request,
    end_of_migration,
    snapshot,
    start_migration,
    ticks_on,
)

VLAN_ID = 77
EPOCH = 5
OLD, NEW = color_of(EPOCH - 1), color_of(EPOCH)
PERIOD_S = 0.001
"""Between two pings. A guest answers some 200 at once; what a burst has beyond that its kernel drops."""


class Traffic:
    """Sends the guest numbered pings, without a pause, from a thread; ``color`` None is without a tag."""

    def __init__(self, tap: str) -> None:
        self.wire = Wire(tap)
        self.color: int | None = None
        self.sent: list[tuple[int, int | None]] = []
        self.requests: list[int] = []
        self.replies: list[int] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for number in itertools.count(1):
            if self._over.wait(PERIOD_S):
                return
            with self._lock:
                self.wire.send(tagged(number, self.color))
                self.sent.append((number, self.color))

    def recolor(self, color: int | None) -> None:
        """From here on frames have this color."""
        with self._lock:
            self.color = color

    async def seen(self, seconds: float = 0.0) -> list[int]:
        """The guest's replies since the last call."""
        await asyncio.sleep(seconds)
        requests, replies = self.wire.seen()
        self.requests += requests
        self.replies += replies
        return replies

    async def end(self) -> None:
        """Send no more, and collect what is on its way."""
        self._over.set()
        self._thread.join()
        await self.seen(0.5)

    def close(self) -> None:
        """Stop."""
        self._over.set()
        self._thread.join()
        self.wire.close()

    def assert_whole(self) -> None:
        """Every ping was answered once and in order, and the guest's own pings left in order."""
        assert self.replies == [number for number, _ in self.sent]
        assert self.requests == list(range(self.requests[0], self.requests[0] + len(self.requests)))


def tagged(number: int, color: int | None) -> bytes:
    """An echo request with the slice's tag."""
    frame = echo_request(number)
    return frame if color is None else frame[:12] + struct.pack("!HH", 0x8100, color << 13 | VLAN_ID) + frame[12:]


@contextlib.asynccontextmanager
async def at_work(own: Bench) -> AsyncIterator[tuple[QemuVm, Traffic]]:
    """A booted VM with traffic both ways."""
    async with own.booted() as vm:
        traffic = Traffic(own.tap)
        try:
            await traffic.seen(0.3)
            yield vm, traffic
        finally:
            traffic.close()


Play = Callable[[Scenario], None]


async def one_cut(vm: QemuVm, traffic: Traffic) -> EdgeRecord:
    """A whole cut, with frames of every kind at every time, and what must hold in between."""
    triggered = asyncio.Event()
    await vm.edge.arm(VLAN_ID, EPOCH, triggered.set)
    traffic.recolor(OLD)
    assert await traffic.seen(0.2), "an armed edge keeps old frames"
    assert not triggered.is_set()
    receiver = Receiver()
    with vm.watch() as watch:
        await vm.edge.hold()
        await traffic.seen()
        assert not await traffic.seen(0.03), "frames passed a hold"
        traffic.recolor(NEW)
        await start_migration(vm, "background", receiver)
        await watch.until(lambda event: isinstance(event, Resumed), 10.0)
        assert not await traffic.seen(0.03), "frames passed a hold when the VM was resumed"
        await asyncio.wait_for(triggered.wait(), 1.0)
        consumed = max(traffic.replies)
        await vm.edge.release()
        assert await traffic.seen(0.1)
        for color in (OLD, NEW, None):  # the old ones from a VM that has not cut yet; at last the network is disarmed
            traffic.recolor(color)
            await asyncio.sleep(0.05)
        record = await vm.edge.return_path()
        await end_of_migration(vm, watch)
    check_record(record, traffic, consumed)
    return record


def check_record(record: EdgeRecord, traffic: Traffic, consumed: int) -> None:
    """Exactly what the guest had not consumed is in transit.

    :param consumed: the last ping whose reply was seen before the hold; replies to later ones are in ``record.sent``.
    """
    recorded = [echo_of(frame.data)[1] for frame in record.received]
    first = recorded[0]
    replied_in_hold = [echo_of(frame.data)[1] for frame in record.sent if echo_of(frame.data)[0] == 0]
    assert max([consumed, *(number for number in replied_in_hold if number < first)]) == first - 1
    assert recorded == [number for number, color in traffic.sent if number >= first and color == OLD]
    assert record.frames_overflowed == 0 and record.frames_held > 30


def test_two_cuts_lose_nothing_and_record_exactly_what_is_in_transit(play: Play) -> None:
    async def scenario(own: Bench) -> None:
        async with at_work(own) as (vm, traffic):
            for _ in range(2):
                record = await one_cut(vm, traffic)
                assert await vm.edge.return_path() == record, "a record can be asked for again"
            await traffic.end()
            traffic.assert_whole()

    play(scenario)


def test_a_future_frame_waits_while_old_ones_pass(play: Play) -> None:
    async def scenario(own: Bench) -> None:
        async with at_work(own) as (vm, traffic):
            triggers: list[float] = []
            await vm.edge.arm(VLAN_ID, EPOCH, lambda: triggers.append(time.monotonic()))
            traffic.recolor(OLD)
            await traffic.seen(0.1)
            traffic.recolor(NEW)
            await traffic.seen(0.05)
            assert len(triggers) == 1 and not await traffic.seen(0.1)
            await vm.edge.hold()
            await vm.edge.release()
            await vm.edge.return_path()
            traffic.recolor(None)
            await traffic.end()
            # What was tagged when the path came back is no concern of the edge: a real network is disarmed before that.
            assert traffic.replies == sorted(set(traffic.replies))

    play(scenario)


def test_what_finds_no_room_is_dropped_and_counted(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound_queue, "MOST_FRAMES", 50)

    async def scenario(own: Bench) -> None:
        async with at_work(own) as (vm, traffic):
            await vm.edge.arm(VLAN_ID, EPOCH, lambda: None)
            await vm.edge.hold()
            await traffic.seen(0.2)
            await vm.edge.release()
            record = await vm.edge.return_path()
            await traffic.end()
            missing = len(traffic.sent) - len(traffic.replies)
            assert record.frames_overflowed == missing > 0
            assert record.frames_held >= 50 and len(record.received) >= 50

    play(scenario)


def test_without_arms_both_directions_are_held_and_nothing_is_lost(play: Play) -> None:
    async def scenario(own: Bench) -> None:
        async with at_work(own) as (vm, traffic):
            await vm.edge.hold()
            await traffic.seen()
            assert not await traffic.seen(0.1), "frames passed a hold"
            await vm.edge.release()
            await traffic.end()
            traffic.assert_whole()

    play(scenario)


def test_the_sent_record_begins_where_the_hold_does(play: Play) -> None:
    """Every frame that the guest sent is either seen before the release or in the record, and none is in both."""

    async def scenario(own: Bench) -> None:
        async with at_work(own) as (vm, traffic):
            for _ in range(3):
                await vm.edge.arm(VLAN_ID, EPOCH, lambda: None)
                await vm.edge.hold()
                await traffic.seen(0.05)
                seen_before = list(traffic.requests)
                await vm.pause()
                await asyncio.sleep(0.05)
                await vm.run()
                await asyncio.sleep(0.05)
                await vm.edge.release()
                record = await vm.edge.return_path()
                sent = [number for kind, number in (echo_of(frame.data) for frame in record.sent) if kind == 8]
                assert sent[0] == seen_before[-1] + 1
                assert sent == list(range(sent[0], sent[0] + len(sent)))
                assert [frame.at_us for frame in record.sent] == sorted(frame.at_us for frame in record.sent)
                await traffic.seen(0.1)
            await traffic.end()
            traffic.assert_whole()

    play(scenario)


def test_an_agent_that_dies_with_an_armed_edge_is_followed_by_one_that_returns_the_path(play: Play) -> None:
    async def scenario(own: Bench) -> None:
        async with at_work(own) as (vm, traffic):
            await vm.edge.arm(VLAN_ID, EPOCH, lambda: None)
            await vm.edge.hold()
            await vm.detach()
            await ticks_on(vm)  # QEMU does not wait for a reader that is gone
            again = await own.hypervisor.attach("test", "n1")
            try:
                await again.edge.resume_after_restart()
                traffic.recolor(NEW)
                await traffic.seen()
                assert await traffic.seen(0.1), "the edge passes everything on until its path is returned"
                traffic.recolor(None)
                await again.edge.return_path()
                await traffic.seen(0.1)
                assert await traffic.seen(0.1)
                assert not list(again.console_path.parent.glob("*.pcap")) and not list(
                    again.console_path.parent.glob("edge*")
                )
            finally:
                await again.detach()

    play(scenario)


def test_channel_state_comes_before_everything_else(play: Play) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            image, _ = await snapshot(vm, "background")
        async with own.restored(image) as copy:
            await copy.edge.replay_held([])
            traffic = Traffic(own.tap)
            try:
                await asyncio.sleep(0.1)
                await copy.run()
                await copy.edge.replay([echo_request(number) for number in range(60_000, 60_100)])
                await traffic.end()
                assert traffic.replies == [*range(60_000, 60_100), *(number for number, _ in traffic.sent)]
            finally:
                traffic.close()

    play(scenario)
