"""What the controller does wrong."""

import asyncio

import pytest
from coordinator_harness import World, scenario, under_both_policies, until
from fake_services import Happening, raises

from geni_violin.core.errors import Conflict, PeerFault

RECOLOR = "POST /v1/slices/lab/recolor"
ARM = "POST /v1/slices/lab/arm"
FIRST_CUT = '"epoch":1'


def at_first_cut(world: World, happening: Happening, times: int | None = 1) -> None:
    """This happens to the recolors of the first cut, and not to the barrier before it."""
    world.controller.app.add(RECOLOR, happening, times=times, body=FIRST_CUT)


def at_arming(world: World, happening: Happening, times: int | None = 1, *, after: bool = False) -> None:
    """This happens when the network is armed, or, under the policy drop, passes its barrier."""
    request, body = (ARM, "") if world.policy == "hold" else (RECOLOR, '"epoch":0')
    world.controller.app.add(request, happening, times=times, body=body, after=after)


@under_both_policies
async def test_the_controller_refuses_a_recolor(world: World) -> None:
    at_first_cut(world, raises(Conflict("that is not the next epoch")))
    await world.aborts("that is not the next epoch")
    assert world.controller.epochs("lab") == {1}
    await world.commits()


@under_both_policies
async def test_the_controller_cannot_arm(world: World) -> None:
    """It may have armed some ports, so the colors go forward."""
    at_arming(world, raises(PeerFault("switch 2 does not answer")), times=None)
    world.shorten(cut_ms=500)
    await world.aborts("the network: switch 2 does not answer")
    assert all("STOP" not in qemu.trace for qemu in world.qemus())
    assert world.controller.epochs("lab") == {1}
    world.controller.app.clear()
    await world.commits()


@pytest.mark.parametrize("after", [False, True], ids=["before it is armed", "after it is armed"])
@under_both_policies
async def test_an_answer_to_arming_that_is_lost_is_asked_for_again(world: World, after: bool) -> None:
    at_arming(world, raises(PeerFault("the connection broke")), times=2, after=after)
    await world.commits()


@under_both_policies
async def test_the_controller_hangs_on_recolors_and_the_agents_cancel_by_themselves(world: World) -> None:
    mended = asyncio.Event()

    async def hang() -> None:
        await mended.wait()

    at_first_cut(world, hang, times=None)
    world.shorten(cut_ms=500)
    transaction = await world.take()
    await world.reaches(transaction, "aborting")
    for qemu in world.qemus():
        await until(lambda qemu=qemu: "release" in qemu.trace and not qemu.holding, "let go")  # type: ignore[misc]
        assert qemu.run_state == "running"
    assert (await world.get(f"/v1/transactions/{transaction}"))["state"] == "aborting"
    world.controller.app.clear()
    mended.set()  # all that hung is carried out now, late
    await world.is_aborted(await world.over(transaction), "deadline")
    assert world.controller.epochs("lab") == {1}
    await world.commits()


@pytest.mark.parametrize("strategy", ["background", "precopy", "stop"])
@under_both_policies
async def test_a_controller_that_restarts_in_the_middle_of_the_cuts_costs_no_snapshot(
    world: World, strategy: str
) -> None:
    """Two ports are recolored; the third VM waits, cut and held, until the controller is told of the slice again."""
    for vm in ("n1", "n2", "n3"):
        world.controller.app.add(RECOLOR, world.restart_controller if vm == "n3" else world.nothing, body=f'"{vm}"')
    await world.commits(strategy=strategy)
    assert world.controller.log.count("forgot") == 1


@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
@pytest.mark.parametrize("request_", ["POST .*/arm", "GET .*/colors", "POST .*/disarm", "GET .*/counters"])
@scenario
async def test_a_controller_that_restarts_between_arming_and_the_end_costs_no_snapshot(
    world: World, request_: str, after: bool
) -> None:
    world.controller.app.add(request_, world.restart_controller, after=after)
    await world.commits()


@pytest.mark.parametrize("moment", ["arm", "disarm"])
@scenario
async def test_a_controller_that_is_away_for_a_moment_costs_no_snapshot(world: World, moment: str) -> None:
    service = world.controller_service

    async def restart() -> None:
        await service.vanish()
        world.controller.forget()
        asyncio.get_running_loop().call_later(0.3, lambda: comings.append(asyncio.create_task(service.come_back())))

    comings: list[asyncio.Task[None]] = []
    world.controller.app.add(f"POST .*/{moment}", restart)
    await world.commits()
    assert len(comings) == 1


@scenario
async def test_a_request_to_arm_that_comes_after_the_abort_arms_nothing(world: World) -> None:
    mended, late = asyncio.Event(), 0

    async def hang() -> None:
        nonlocal late
        await mended.wait()
        late += 1

    world.controller.app.add(ARM, hang)
    world.shorten(prepare_ms=400)
    await world.aborts("still armed at the deadline; no answer from the network")
    mended.set()
    await until(lambda: late == 1, "the request is carried out")
    await world.commits()


@under_both_policies
async def test_a_controller_that_restarts_between_snapshots_is_told_the_slices_again(world: World) -> None:
    await world.commits()
    world.controller.forget()
    await until(lambda: "lab" in world.controller.slices, "the slice is installed again")
    assert world.controller.epochs("lab") == {1}
    await world.commits()


@under_both_policies
async def test_colors_are_driven_forward_until_the_controller_does_it(world: World) -> None:
    world.qemu("n1").trouble("stopped", world.qemu("n1").die)
    world.controller.app.add(RECOLOR, raises(PeerFault("no")), times=3, body='"vms":null,"epoch":1')
    world.controller.app.add(RECOLOR, raises(PeerFault("no")), times=3, body='"epoch":1,"vms":null')
    await world.aborts("n1")
    assert world.controller.epochs("lab") == {1}
