"""What the snapshot server does wrong, or cannot do."""

import pytest
from coordinator_harness import World, scenario
from fake_services import raises
from fake_vm import hangs, takes

from geni_violin.core.errors import InvalidInput, MachineFault, NoSpace, PeerFault


@scenario
async def test_no_space_when_the_images_are_staged(world: World) -> None:
    world.store.full = True
    await world.aborts("no room for snapshot")
    assert all("STOP" not in qemu.trace for qemu in world.qemus())
    assert world.controller.epochs("lab") == {0}
    world.store.full = False
    await world.commits()


@pytest.mark.parametrize("strategy", ["background", "precopy", "stop"])
@scenario
async def test_the_disk_fills_during_the_streams(world: World, strategy: str) -> None:
    world.store.room_per_image = 100_000
    await world.aborts("", strategy=strategy)
    world.store.room_per_image = None
    await world.commits(strategy=strategy)


@scenario
async def test_no_space_at_the_commit_point_is_a_certain_no(world: World) -> None:
    world.server_faults.add("POST .*/publish", raises(NoSpace("the disk is full")))
    await world.aborts("the disk is full")
    await world.commits()


@scenario
async def test_a_manifest_that_is_refused_as_invalid_is_a_certain_no(world: World) -> None:
    world.server_faults.add("POST .*/publish", raises(InvalidInput("not a manifest")), times=None)
    await world.aborts("not a manifest")
    world.server_faults.clear()
    await world.commits()


@pytest.mark.parametrize("after", [False, True], ids=["before it is published", "after it is published"])
@scenario
async def test_an_unclear_answer_to_publish_is_asked_again(world: World, after: bool) -> None:
    world.server_faults.add("POST .*/publish", raises(MachineFault("disk trouble")), times=2, after=after)
    await world.commits()


@scenario
async def test_a_name_that_was_taken_meanwhile(world: World) -> None:
    """Between the coordinator's look and the staging somebody else took the name."""
    await world.commits(name="first")
    world.server_faults.add("GET /v1/snapshots", raises(PeerFault("busy")))
    response = await world.request("POST", "/v1/slices/lab/snapshots", {"name": "second"})
    assert response.status_code == 502
    await world.commits(name="second")


@scenario
async def test_the_snapshot_server_vanishes_during_the_streams_and_comes_back(world: World) -> None:
    for qemu in world.qemus():
        qemu.trouble("middle", takes(0.3))
    transaction = await world.take()
    await world.reaches(transaction, "streaming")
    await world.restart_server()
    await world.is_aborted(await world.over(transaction))
    await world.commits()


@scenario
async def test_a_staging_that_arrives_after_the_deadline_is_discarded_all_the_same(world: World) -> None:
    fault = world.server_faults.add("POST /v1/stagings", takes(0.9))
    world.shorten(prepare_ms=500)
    view = await world.over(await world.take())
    await fault.done.wait()
    await world.is_aborted(view, "still preparing at the deadline; no answer from the snapshot server")
    await world.commits()


@scenario
async def test_a_snapshot_server_that_does_not_answer_the_staging(world: World) -> None:
    world.server_faults.add("POST /v1/stagings", hangs)
    world.shorten(prepare_ms=500)
    await world.aborts("no answer from the snapshot server")
    await world.commits()


@scenario
async def test_an_image_that_never_becomes_durable(world: World) -> None:
    world.server_faults.add("GET .*/images/n2", hangs, times=None)
    world.shorten(stream_ms=1000)
    await world.aborts("n2")
    world.server_faults.clear()
    await world.commits()
