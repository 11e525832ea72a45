"""The clock that a real QEMU's image holds is the one that its dump of frames is stamped with. Needs root."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

from geni_violin.hostagent.qemu import QemuVm
from geni_violin.hostagent.vm_events import Resumed
from geni_violin.runtime import pcap
from geni_violin.snapshot_server.channels import Late, late_of
from geni_violin.snapshot_server.cut_clock import TAIL_BYTES, clock_at_stop_ns
from mininet_tests.hypervisor_harness import (
    Bench,
    Scenario,
    Wire,
    echo_of,
    image_of_paused,
    snapshot,
)

DUMP = "cut-clock.pcap"
ECHO_REQUEST = 8


@contextlib.asynccontextmanager
async def filter_on(vm: QemuVm, kind: str, **properties: str | int) -> AsyncIterator[None]:
    """A filter of its own on the VM's network interface; the last one that frames to the guest pass."""
    await vm._execute("object-add", **{"qom-type": kind, "id": f"test-{kind}", "netdev": "net0", **properties})
    yield
    await vm._execute("object-del", id=f"test-{kind}")


def dumped(vm: QemuVm) -> list[pcap.Frame]:
    return pcap.decode((vm.console_path.parent / DUMP).read_bytes())


def date_s() -> int:
    """The date as QEMU puts it into its stamps: in UTC, but counted as if it were local time."""
    return int(time.mktime(time.gmtime(time.time())))


def clock_of(image: bytes) -> int:
    clock_ns = clock_at_stop_ns(image[-TAIL_BYTES:])
    assert clock_ns is not None, "the image does not tell its guest's clock"
    return clock_ns


@pytest.mark.parametrize("strategy", ["stop", "background"])
def test_a_frame_of_the_pause_has_the_images_clock_to_the_microsecond(
    play: Callable[[Scenario], None], strategy: str
) -> None:
    """Frames to the guest are held, and let through a dump while it is paused: its clock stands still then."""

    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            with contextlib.closing(Wire(own.tap)) as wire:
                async with filter_on(vm, "filter-buffer", queue="tx", interval=4_000_000_000):
                    for number in range(3):
                        wire.ping(number)
                    await asyncio.sleep(0.3)
                    await vm.pause()
                    began_s = date_s()
                    async with filter_on(vm, "filter-dump", queue="tx", file=DUMP):
                        made_s = date_s()
                        await vm._execute("qom-set", path="/objects/test-filter-buffer", property="status", value="off")
                        image = await image_of_paused(vm, strategy)
            clock_us = clock_of(image) // 1000
            in_pause = dumped(vm)[:3]
            assert len(in_pause) == 3
            assert len({frame.at_us for frame in in_pause}) == 1
            seconds, rest_us = divmod(in_pause[0].at_us - clock_us, 1_000_000)
            assert rest_us == 0
            # A second more or less: the machine's date may be set meanwhile.
            assert began_s - 1 <= seconds <= made_s + 1, "the stamps are not ahead by the date of the dump's making"
            assert len(late_of("n1", in_pause, clock_of(image)).frames) == 3
            assert late_of("n1", in_pause, clock_of(image) - 1_000_000).frames == ()

    play(scenario)


def numbers_of(frames: tuple[pcap.Frame, ...]) -> list[int]:
    """The numbers of the guest's own pings."""
    echoes = [echo_of(frame.data) for frame in frames]
    return [number for kind, number in echoes if kind == ECHO_REQUEST]


async def late_in_a_snapshot(vm: QemuVm, strategy: str) -> tuple[bytes, Late, int]:
    """An image; what of the guest's frames around the cut is late; and how many frames that were."""
    async with filter_on(vm, "filter-dump", queue="rx", file=DUMP):
        await asyncio.sleep(0.2)
        with vm.watch() as watch:
            taking = asyncio.create_task(snapshot(vm, strategy))
            await watch.until(lambda event: isinstance(event, Resumed), 30.0)
            await asyncio.sleep(0.2)
            sent = dumped(vm)
        image, _events = await taking
    return image, late_of("n1", sent, clock_of(image)), len(sent)


@pytest.mark.parametrize("strategy", ["background", "precopy", "stop"])
def test_a_restored_guest_goes_on_behind_its_last_late_frame(play: Callable[[Scenario], None], strategy: str) -> None:
    """The guest numbers its pings: what its image has sent ends exactly where what is judged late ends."""

    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            image, late, sent = await late_in_a_snapshot(vm, strategy)
        assert (late.note, late.undecided_frames) == ("", 0)
        numbers = numbers_of(late.frames)
        assert 3 < len(late.frames) < sent - 3, f"{len(late.frames)} of {sent} frames are late"
        async with own.restored(image) as copy:
            with contextlib.closing(Wire(own.tap)) as wire:
                await copy.run()
                await asyncio.sleep(1.0)
                requests, _replies = wire.seen()
        print(f"{strategy}: {len(late.frames)} of {sent} late; then {requests[0]} after {numbers[-1]}")
        assert requests[0] == numbers[-1] + 1

    play(scenario)
