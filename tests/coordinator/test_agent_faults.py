"""What an agent or its VM does wrong aborts the snapshot, and nothing else."""

import asyncio
import time

import pytest
from coordinator_harness import World, scenario, under_both_policies
from fake_services import raises
from fake_vm import Trouble, breaks, fails, hangs, takes

from geni_violin.coordinator import vm_part
from geni_violin.core.errors import Conflict


@scenario
async def test_one_agent_refuses_to_prepare(world: World) -> None:
    for strategy in ("background", "precopy", "stop"):
        world.qemu("n3").refusals[strategy] = "Migration is disabled by a device"
    await world.aborts("Migration is disabled by a device")
    assert all("STOP" not in qemu.trace for qemu in world.qemus())
    assert world.controller.epochs("lab") == {0}
    world.qemu("n3").refusals.clear()
    await world.commits()


@scenario
async def test_a_vm_that_does_not_run_is_refused_before_anything_is_touched(world: World) -> None:
    await world.qemu("n2").die()
    await world.aborts("VM n2 is failed")
    assert all("STOP" not in qemu.trace for qemu in world.qemus())


@pytest.mark.parametrize("strategy", ["background", "precopy", "stop"])
@under_both_policies
async def test_the_migration_of_one_vm_fails(world: World, strategy: str) -> None:
    for point in ("start", "middle", "end"):
        world.qemu("n1").trouble(point, fails(f"QEMU's words at {point}"))
        await world.aborts(f"QEMU's words at {point}", strategy=strategy)
    await world.commits(strategy=strategy)


@pytest.mark.parametrize(
    ("strategy", "points"),
    [("background", ["hold", "release"]), ("precopy", ["continue", "resume"]), ("stop", ["pause", "resume"])],
)
@under_both_policies
async def test_a_command_to_one_vm_fails(world: World, strategy: str, points: list[str]) -> None:
    for point in points:
        world.qemu("n1").trouble(point, fails("it was refused"))
        await world.aborts("it was refused", strategy=strategy)
    await world.commits(strategy=strategy)


@pytest.mark.parametrize("point", ["hold", "stopped", "middle", "end", "release"])
@under_both_policies
async def test_one_vm_dies_in_its_cut(world: World, point: str) -> None:
    qemu = world.qemu("n2")
    qemu.trouble(point, qemu.die)
    await world.aborts("n2")
    await world.aborts("VM n2 is failed")  # it is told that the VM is dead, not that a cut is under way
    await world.recreate()
    await world.commits()


@under_both_policies
async def test_an_agent_that_is_too_slow(world: World) -> None:
    world.qemu("n2").trouble("stopped", takes(1.5))
    world.shorten(cut_ms=600, stream_ms=1200)
    await world.aborts("deadline")  # the agent's own; on a busy machine the coordinator's may come first
    assert world.controller.epochs("lab") == {1}
    await world.commits()


@scenario
async def test_a_stream_that_hangs(world: World) -> None:
    world.qemu("n2").trouble("middle", hangs)
    world.shorten(cut_ms=500)
    await world.aborts("the image's stream does not move")
    await world.commits()


@scenario
async def test_no_answer_to_prepare(world: World) -> None:
    world.agents["h2"].faults.add("POST .*/cut/prepare", hangs)
    world.shorten(prepare_ms=500)
    await world.aborts("still preparing at the deadline; no answer from n3")
    assert world.controller.epochs("lab") == {0}
    await world.commits()


@pytest.mark.parametrize(
    "trouble", [fails("try again"), breaks(OSError(5, "I/O error"))], ids=["as the contract says", "defect"]
)
@scenario
async def test_a_vm_is_let_go_also_if_the_commands_for_that_fail_at_first(world: World, trouble: Trouble) -> None:
    for point in ("cancel", "resume", "release"):
        world.qemu("n1").trouble("stopped", fails("the migration broke"))  # the VM is held, and not yet recolored
        world.qemu("n1").trouble(point, trouble, trouble)
        await world.aborts("the migration broke")
        world.qemu("n1").troubles.clear()  # a second cancellation was not needed
    await world.commits()


@scenario
async def test_a_defect_of_the_hypervisor_adapter_leaves_no_vm_paused_or_held(world: World) -> None:
    for point in ("hold", "start", "release"):
        world.qemu("n1").trouble(point, breaks(KeyError(point)))
        await world.aborts(f"KeyError: '{point}'")
    world.qemu("n1").trouble("progress", breaks(KeyError("ram")), breaks(KeyError("ram")))
    await world.aborts("KeyError: 'ram'")
    await world.commits()


@pytest.mark.parametrize("point", ["hold", "stopped", "middle", "end"])
@under_both_policies
async def test_an_agent_vanishes_in_its_cut_and_its_vms_are_let_go_by_their_own_deadline(
    world: World, point: str
) -> None:
    service = world.agents["h2"].service
    world.qemu("n3").trouble(point, service.vanish)
    world.shorten(cut_ms=600, stream_ms=1200)
    began = time.monotonic()
    view = await world.over(await world.take())
    assert time.monotonic() - began < 6
    await service.come_back()
    await world.is_aborted(view, "n3")
    await world.commits()


@scenario
async def test_an_agent_vanishes_before_its_cut(world: World) -> None:
    agent = world.agents["h2"]
    agent.faults.add("POST .*/cut/prepare", agent.service.vanish, after=True)
    world.shorten(cut_ms=600, stream_ms=1200)
    view = await world.over(await world.take())
    await agent.service.come_back()
    await world.is_aborted(view, "the host agent of h2")
    assert world.controller.epochs("lab") <= {0, 1}
    await world.commits()


@under_both_policies
async def test_an_agent_vanishes_after_its_cut(world: World) -> None:
    agent = world.agents["h2"]
    world.qemu("n1").trouble("middle", takes(0.5))  # n3 is done long before
    agent.faults.add("GET .*/cut/.*", agent.service.vanish, after=True)
    world.shorten(cut_ms=600, stream_ms=1200)
    view = await world.over(await world.take())
    await agent.service.come_back()
    await world.is_aborted(view, "n3")
    await world.commits()


@pytest.mark.parametrize("point", ["hold", "stopped", "middle"])
@under_both_policies
async def test_an_agent_crashes_in_a_cut_and_the_next_one_undoes_it(world: World, point: str) -> None:
    agent, qemu = world.agents["h2"], world.qemu("n3")
    reached = asyncio.Event()

    async def crash() -> None:
        reached.set()
        await asyncio.sleep(3600)

    qemu.trouble(point, crash)
    world.shorten(cut_ms=600, stream_ms=1200)
    transaction = await world.take()
    await reached.wait()
    await agent.crash()
    view = await world.over(transaction)
    await agent.restart()
    await world.is_aborted(view, "n3")
    await world.commits()


@scenario
async def test_a_cut_that_arrives_after_it_was_cancelled_does_nothing(world: World) -> None:
    """The agent gets the request late, when the transaction is over already."""
    late = asyncio.Event()

    async def wait() -> None:
        await late.wait()

    fault = world.agents["h2"].faults.add("POST .*/n3/cut", wait)
    world.agents["h1"].faults.add("POST .*/n1/cut", raises(Conflict("n1 says no")))
    view = await world.over(await world.take())
    await world.is_aborted(view, "n1 says no")
    assert fault.seen.is_set()
    late.set()
    await asyncio.sleep(0)
    await world.commits()
    assert world.qemu("n3").trace.count("STOP") == 1


@scenario
async def test_an_agent_that_takes_requests_and_never_answers(world: World) -> None:
    """It neither cuts nor cancels; the transaction ends all the same."""
    world.agents["h2"].faults.add("POST .*/cut", hangs)
    world.agents["h2"].faults.add("DELETE .*/cut/.*", hangs, times=None)
    world.shorten(cut_ms=500)
    patience = vm_part.CANCEL_PATIENCE_MS
    vm_part.CANCEL_PATIENCE_MS = 500.0
    try:
        view = await world.over(await world.take())
    finally:
        vm_part.CANCEL_PATIENCE_MS = patience
    await world.is_aborted(view, "no answer from n3")
    world.agents["h2"].faults.clear()
    await world.commits()
