"""Real QEMU: images, failures in the middle of them, held frames, and agents that come back. Needs root."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from geni_violin.core.errors import AlreadyExists, Conflict, MachineFault
from geni_violin.hostagent.cleanup import CleanedUp, clean_up
from geni_violin.hostagent.hypervisor import FAILED, PAUSED, RUNNING
from geni_violin.hostagent.qemu import QemuVm
from geni_violin.hostagent.vm_events import Died, MigrationStatus, Resumed, VmEvent
from mininet_tests.hypervisor_harness import (
    Bench,
    Receiver,
    Scenario,
    Wire,
    end_of_migration,
    load,
    snapshot,
    start_migration,
    ticks,
    ticks_on,
)

STRATEGIES = ("background", "precopy", "stop")


def words(events: list[VmEvent]) -> list[str]:
    """Events as a transcript."""
    return [event.status if isinstance(event, MigrationStatus) else type(event).__name__ for event in events]


TRANSCRIPTS = {
    "background": ["setup", "active", "Stopped", "Resumed", "completed"],
    "precopy": ["setup", "active", "Stopped", "pre-switchover", "device", "completed", "Resumed"],
    "stop": ["Stopped", "setup", "active", "completed", "Resumed"],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_restores_what_was_running(play: Callable[[Scenario], None], strategy: str) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            assert await vm.refusal(strategy) == ""
            before = ticks(vm)[-1]
            image, events = await snapshot(vm, strategy)
            assert words(events) == TRANSCRIPTS[strategy]
            await ticks_on(vm)
            progress = await vm.migration_progress()
            assert (progress.status, progress.error) == ("completed", "")
            assert 0 < progress.transferred_bytes <= len(image)
        async with own.restored(image) as copy:
            assert await copy.status() == PAUSED
            assert ticks(copy) == []
            with contextlib.closing(Wire(own.tap)) as wire:
                await copy.run()
                await ticks_on(copy)
                assert 0x8035 not in wire.ethertypes(), "QEMU announced itself into the slice (RARP)"
            assert before <= ticks(copy)[0] <= before + 20

    play(scenario)


def test_pause_and_run(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            with vm.watch() as watch:
                began = time.time()
                stopped_at = await vm.pause()
                assert began - 0.01 <= stopped_at <= time.time()
                assert await vm.status() == PAUSED
                with pytest.raises(Conflict, match="is not running"):
                    await vm.pause()
                await vm.run()
                await vm.run()
                assert await vm.status() == RUNNING
                assert words(watch.pending()) == ["Stopped", "Resumed"]
            await ticks_on(vm)

    play(scenario)


# --- failures in the middle of an image -------------------------------------------------------------------------------


async def check_unharmed(own: Bench, vm: QemuVm) -> None:
    """The VM runs, and its next snapshot in the background is good. Ends the VM."""
    await check_running(vm)
    image, events = await snapshot(vm, "background")
    assert words(events) == TRANSCRIPTS["background"]
    last = ticks(vm)[-1]
    await vm.delete()
    async with own.restored(image) as copy:
        await copy.run()
        await ticks_on(copy)
        assert abs(ticks(copy)[0] - last) < 300, "the image is of another time"


async def check_running(vm: QemuVm) -> None:
    """The VM can be made to run, and can be cut again, with any strategy."""
    await vm.ensure_running()
    assert await vm.status() == RUNNING
    await ticks_on(vm)
    for strategy in STRATEGIES:
        assert await vm.refusal(strategy) == ""


@pytest.mark.faults
def test_a_vm_survives_receivers_that_hang_up(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            for strategy in STRATEGIES:
                with vm.watch() as watch:
                    if strategy == "stop":
                        await vm.pause()
                    await start_migration(vm, strategy, Receiver(close_after=4_000_000))
                    assert words(await end_of_migration(vm, watch))[-1] == "failed"
                await check_running(vm)
            await check_unharmed(own, vm)

    play(scenario)


@pytest.mark.faults
def test_a_vm_survives_cancellations_at_any_moment(play: Callable[[Scenario], None]) -> None:
    moments = [("background", moment) for moment in ("setup", "active", "Stopped", "Resumed")]

    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            for strategy, moment in [*moments, ("precopy", "active"), ("precopy", "pre-switchover")]:
                receiver = Receiver(stall_after=1_000_000 if strategy == "background" else None)
                with vm.watch() as watch:
                    await start_migration(vm, strategy, receiver)
                    await watch.until(lambda event: words([event]) == [moment], 30.0)  # noqa: B023
                    assert await vm.cancel_migration() in ("cancelled", "failed")
                await receiver_end(receiver)
                await check_running(vm)
            await check_unharmed(own, vm)

    play(scenario)


async def receiver_end(receiver: Receiver) -> bytes:
    """What a receiver got that stalled."""
    receiver.close()
    return await receiver.whole()


def test_what_keeps_a_vm_from_running_is_cancelled(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            with vm.watch() as watch:
                await start_migration(vm, "precopy", Receiver())
                await watch.until(lambda event: words([event]) == ["pre-switchover"], 30.0)
                assert await vm.ensure_running()
                assert "cancelled" in words(watch.pending())
            await check_running(vm)

    play(scenario)


async def hang(own: Bench, vm: QemuVm) -> None:
    """Let QEMU wait for a stalled receiver: the guest, and often QEMU's main loop, write to protected memory."""
    with contextlib.closing(Wire(own.tap)) as wire:
        for number in range(500):
            wire.ping(number)
            await asyncio.sleep(0.002)
    assert waits_for_memory(vm.pid), "no thread of QEMU waits for the receiver"


def waits_for_memory(pid: int) -> bool:
    """Whether a thread of a process waits for a fault in protected memory to be answered."""
    return any(path.read_text() == "handle_userfault" for path in Path(f"/proc/{pid}/task").glob("*/wchan"))


@pytest.mark.faults
def test_a_stalled_receiver_cannot_keep_a_vm_hanging(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            receiver = Receiver(stall_after=1_000_000)
            with vm.watch() as watch:
                await start_migration(vm, "background", receiver)
                await watch.until(lambda event: isinstance(event, Resumed), 10.0)
                await hang(own, vm)
                assert await vm.cancel_migration() in ("cancelled", "failed")
            await receiver_end(receiver)
            await check_unharmed(own, vm)

    play(scenario)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_held_frames_are_let_go_whole_and_in_order(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            with contextlib.closing(Wire(own.tap)) as wire:
                await check_hold(vm, wire)

    play(scenario)


async def check_hold(vm: QemuVm, wire: Wire) -> None:
    """Send 3 × 100 pings: before, while held (with the VM paused meanwhile), after."""
    numbers = iter(range(1, 1_000))
    wire.seen()
    requests, replies = await traffic(wire, numbers)
    await vm.edge.hold()
    wire_before_hold = wire.seen()
    requests += wire_before_hold[0]
    replies += wire_before_hold[1]
    held_requests, held_replies = await traffic(wire, numbers)
    assert (held_requests, held_replies) == ([], []), "frames passed a hold"
    await vm.pause()
    assert await traffic(wire, numbers, 20) == ([], [])
    await vm.run()
    await ticks_on(vm)
    assert wire.seen() == ([], []), "frames passed a hold while the VM was resumed"
    await vm.edge.release()
    await vm.edge.release()
    for more in (await traffic(wire, numbers), await traffic(wire, iter(()), 100)):
        requests += more[0]
        replies += more[1]
    assert replies == list(range(1, 321))
    assert requests == list(range(requests[0], requests[0] + len(requests)))
    assert len(requests) > 100


async def traffic(wire: Wire, numbers: Iterator[int], count: int = 100) -> tuple[list[int], list[int]]:
    """Ping the guest ``count`` times in ``count`` × 5 ms; what it sent meanwhile."""
    for _, number in zip(range(count), numbers, strict=False):
        wire.ping(number)
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.3)
    return wire.seen()


# --- deaths, and agents that come back --------------------------------------------------------------------------------


def test_a_killed_vm_is_reported_and_its_handle_stays_usable(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            with vm.watch() as watch:
                os.kill(vm.pid, signal.SIGKILL)
                died = await asyncio.wait_for(watch.next(), 2.0)
            assert isinstance(died, Died)
            assert await vm.status() == FAILED
            with pytest.raises(Conflict, match="is gone"):
                await vm.pause()
            await vm.kill()

    play(scenario)


@contextlib.asynccontextmanager
async def deserted(own: Bench) -> AsyncIterator[QemuVm]:
    """A VM whose handle is dropped when the block ends; a new one must find it unharmed."""
    async with own.booted() as vm:
        yield vm
        await vm.detach()
        (again,) = await own.hypervisor.attach_all()
        try:
            assert (again.pid, again.definition) == (vm.pid, vm.definition)
            await check_unharmed(own, again)
        finally:
            await again.delete()


def test_an_agent_finds_its_vm_again(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with deserted(own) as vm:
            own.ledger.remove("vm:test:n1")  # as if the agent had died before it wrote the record
            with pytest.raises(AlreadyExists):
                await own.hypervisor.create(own.definition())
            assert await vm.status() == RUNNING

    play(scenario)


@pytest.mark.faults
def test_an_agent_comes_back_while_the_image_streams_on(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            receiver = Receiver()
            with vm.watch() as watch:
                await start_migration(vm, "background", receiver)
                await watch.until(lambda event: isinstance(event, Resumed), 10.0)
            await vm.detach()
            again = await own.hypervisor.attach("test", "n1")
            try:
                await receiver.whole()
                assert (await again.migration_progress()).status == "completed"
                await ticks_on(again)
            finally:
                await again.detach()

    play(scenario)


@pytest.mark.faults
def test_an_agent_comes_back_to_a_snapshot_that_failed_without_it(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with deserted(own) as vm:
            receiver = Receiver(stall_after=1_000_000)
            with vm.watch() as watch:
                await start_migration(vm, "background", receiver)
                await watch.until(lambda event: isinstance(event, Resumed), 10.0)
            await vm.detach()
            receiver.close()
            await asyncio.sleep(0.3)

    play(scenario)


@pytest.mark.faults
def test_an_agent_comes_back_to_a_vm_that_hangs(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            receiver = Receiver(stall_after=1_000_000)
            with vm.watch() as watch:
                await start_migration(vm, "background", receiver)
                await watch.until(lambda event: isinstance(event, Resumed), 10.0)
            await hang(own, vm)
            await vm.detach()
            again = await own.hypervisor.attach("test", "n1")
            try:
                await again.cancel_migration()
                await check_unharmed(own, again)
            finally:
                await again.delete()
                await receiver_end(receiver)

    play(scenario)


# --- what goes wrong at the beginning ---------------------------------------------------------------------------------


def test_a_tap_in_use_is_told_in_qemus_words_and_leaves_nothing(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted():
            with pytest.raises(MachineFault, match=r"n2 did not start: .*busy"):
                await own.hypervisor.create(own.definition("n2"))
            assert [record.name for record in own.ledger.all()] == ["vm:test:n1"]
            assert not (own.settings.run_dir / "vms" / "test" / "n2").exists()

    play(scenario)


def test_an_image_that_ends_early_is_refused(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            image, _ = await snapshot(vm, "background")
        for part in (0.0, 0.5, 0.9):
            with pytest.raises(MachineFault, match=r"could not load its image: \S+"):
                async with own.restored(image[: int(len(image) * part)]):
                    pass
            assert own.ledger.all() == []

    play(scenario)


def test_a_vm_that_waits_for_an_image_does_not_run(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        vm = await own.hypervisor.create(own.definition(incoming=True))
        try:
            assert await vm.status() == PAUSED
            with pytest.raises(Conflict, match="waits for an image"):
                await vm.run()
            with pytest.raises(MachineFault):
                await load(vm, b"this is no image" * 1_000)
        finally:
            await vm.delete()

    play(scenario)


def test_clean_up_takes_recorded_and_unrecorded_vms_and_can_be_repeated(play: Callable[[Scenario], None]) -> None:
    async def scenario(own: Bench) -> None:
        async with own.booted() as vm:
            own.ledger.remove("vm:test:n1")
            done = await clean_up(own.settings)
            assert done == CleanedUp(("vm:test:n1",), (), (own.tap,))
            assert await clean_up(own.settings) == CleanedUp((), (), ())
            await asyncio.sleep(0.05)
            assert await vm.status() == FAILED

    play(scenario)
