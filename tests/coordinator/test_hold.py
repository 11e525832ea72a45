"""The policy hold: edges and network armed in order, the second trigger, the old color's end, the channel state."""

import asyncio
import time
from dataclasses import replace

import pytest
from coordinator_harness import VMS, World, notes_of, scenario
from fake_services import raises
from fake_vm import fails, takes

from geni_violin.coordinator.views import IN_TRANSIT_NOTE, LIFETIME_NOTE
from geni_violin.core.color import color_of
from geni_violin.core.errors import Conflict, NoSpace, PeerFault
from geni_violin.core.messages import TransactionView, VmSnapshotView
from geni_violin.runtime.pcap import Frame

SETTLE = "POST .*/n3/cut/.*/settle"


def _vm(view: TransactionView, name: str) -> VmSnapshotView:
    return next(vm for vm in view.snapshot.vms if vm.name == name)


def _frames(world: World, vm: str, count: int) -> list[Frame]:
    """Frames to a VM that are all different."""
    mac = bytes.fromhex(next(spec for spec in world.spec.vms if spec.name == vm).mac.replace(":", ""))
    return [Frame(number, mac + bytes(6) + b"\x08\x00" + f"{vm} {number}".encode()) for number in range(count)]


@scenario
async def test_the_order_in_the_network(world: World) -> None:
    """The explorer proves that this order is right; here it is the one that is kept."""
    view = await world.commits()
    cuts = {f"recolor {vm} 1" for vm in VMS}
    log = [entry for entry in world.controller.log if not entry.startswith("put")]
    assert (log[0], set(log[1:4]), log[4:]) == ("arm n1,n2,n3 1", cuts, ["disarm 1"])
    assert (view.snapshot.network, notes_of(view)) == ("hold", ())
    assert all(vm.network == "hold" and vm.hold_ms > 0 for vm in view.snapshot.vms)


# --- arming -----------------------------------------------------------------------------------------------------------


@scenario
async def test_an_edge_that_cannot_be_armed(world: World) -> None:
    world.qemu("n3").trouble("arm", fails("QEMU has no such filter"))
    await world.aborts("QEMU has no such filter")
    assert all("STOP" not in qemu.trace for qemu in world.qemus())
    assert world.controller.epochs("lab") == {0}
    assert not any(entry.startswith("arm") for entry in world.controller.log)
    assert all("return path" in world.qemu(vm).trace for vm in VMS)
    await world.commits()


@scenario
async def test_an_edge_that_takes_too_long_to_be_armed(world: World) -> None:
    world.agents["h2"].faults.add("POST .*/n3/arm", takes(0.9))
    world.shorten(prepare_ms=400)
    await world.aborts("still armed at the deadline; no answer from n3")
    assert all("STOP" not in qemu.trace for qemu in world.qemus())
    await world.commits()


@scenario
async def test_a_vm_whose_frames_cannot_be_held_falls_back_to_drop_and_the_notes_say_so(world: World) -> None:
    world.qemu("n2").refusals["background"] = "Background-snapshot is not compatible with vhost-user"
    view = await world.commits()
    assert [vm.network for vm in view.snapshot.vms] == ["hold", "drop", "hold"]
    assert view.snapshot.network == "mixed"
    assert any("n2" in note and "cannot hold frames" in note for note in view.snapshot.notes)
    assert f"n2: {IN_TRANSIT_NOTE}" in view.snapshot.notes
    assert "arm n1,n3 1" in world.controller.log
    assert "arm" not in world.qemu("n2").trace


@scenario
async def test_where_no_frames_are_held_nothing_is_armed(world: World) -> None:
    for request in ({"network": "drop"}, {"strategy": "precopy"}):
        view = await world.commits(**request)
        assert view.snapshot.network == "drop"
        assert IN_TRANSIT_NOTE in view.snapshot.notes
    assert not any("arm" in entry for entry in world.controller.log)
    assert all("arm" not in qemu.trace for qemu in world.qemus())


# --- triggers ---------------------------------------------------------------------------------------------------------


async def _with_a_future_frame(world: World, **request: object) -> TransactionView:
    """A snapshot with n2 asked for late, and a future frame at its edge when n1 is cut."""

    async def send() -> None:
        world.qemu("n2").future_frame_seen()

    world.qemu("n1").trouble("release", send)
    return await world.commits(delays_ms={"n2": 400}, **request)


@scenario
async def test_a_future_frame_starts_the_cut_of_its_receiver(world: World) -> None:
    view = await _with_a_future_frame(world)
    assert {vm.name: vm.trigger for vm in view.snapshot.vms} == {
        "n1": "coordinator",
        "n2": "future frame",
        "n3": "coordinator",
    }
    assert view.snapshot.skew_ms < 300
    listed = (await world.get("/v1/snapshots"))[0]
    assert [vm["trigger"] for vm in listed["vms"]] == ["coordinator", "future frame", "coordinator"]


@scenario
async def test_without_the_second_trigger_a_delay_is_kept(world: World) -> None:
    view = await _with_a_future_frame(world, second_trigger=False)
    assert _vm(view, "n2").trigger == "coordinator"
    assert view.snapshot.skew_ms > 300


# --- the old color's end ----------------------------------------------------------------------------------------------


@scenario
async def test_counters_that_never_balance_are_waited_for_as_long_as_a_frame_can_live(world: World) -> None:
    world.controller.lost_frames = 3
    world.settings.max_frame_lifetime_ms = 400
    began = time.monotonic()
    view = await world.commits()
    assert time.monotonic() - began > 0.4
    assert LIFETIME_NOTE in view.snapshot.notes
    world.controller.lost_frames = 0
    world.settings.max_frame_lifetime_ms = 10_000
    began = time.monotonic()
    assert LIFETIME_NOTE not in (await world.commits()).snapshot.notes
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("request_", ["GET .*/colors", "POST /v1/switches/purge"])
@scenario
async def test_counters_that_cannot_be_had_cost_no_snapshot(world: World, request_: str) -> None:
    world.controller.app.add(request_, raises(PeerFault("a switch is away")), times=None)
    world.agents["h2"].faults.add(request_, raises(PeerFault("Open vSwitch is away")), times=None)
    assert LIFETIME_NOTE in (await world.commits()).snapshot.notes


@scenario
async def test_an_abort_too_waits_for_the_old_color_s_end(world: World) -> None:
    world.controller.lost_frames = 3
    world.settings.max_frame_lifetime_ms = 400
    world.qemu("n1").trouble("middle", fails("the stream broke"))
    began = time.monotonic()
    await world.aborts("the stream broke")
    assert time.monotonic() - began > 0.4
    assert world.controller.log[-1] == "disarm 1"


# --- disarming and settling -------------------------------------------------------------------------------------------


@scenario
async def test_an_agent_that_is_away_for_a_moment_when_its_edge_shall_step_aside(world: World) -> None:
    world.agents["h2"].faults.add(SETTLE, raises(PeerFault("no connection")), times=3)
    world.agents["h1"].faults.add("POST .*/n1/cut/.*/settle", raises(PeerFault("the answer is lost")), after=True)
    await world.commits()


@scenario
async def test_an_agent_that_is_away_when_its_edge_shall_step_aside(world: World) -> None:
    """Its image is durable long since; without its record the channel state would not be whole."""
    service = world.agents["h2"].service
    world.controller.app.add("POST .*/disarm", service.vanish)
    world.qemu("n3").received = _frames(world, "n3", 3)
    world.shorten(cut_ms=500, stream_ms=1200)
    view = await world.over(await world.take())
    await service.come_back()
    await world.is_aborted(view, "the host agent of h2")
    await world.commits()


@scenario
async def test_an_agent_that_restarts_before_its_edge_steps_aside_has_lost_the_record(world: World) -> None:
    agent = world.agents["h2"]
    reached, mended = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await mended.wait()

    world.controller.app.add("POST .*/disarm", wait)
    world.qemu("n3").received = _frames(world, "n3", 3)
    transaction = await world.take()
    await reached.wait()
    await agent.crash()
    await agent.restart()
    mended.set()
    await world.is_aborted(await world.over(transaction), "n3")
    await world.commits()


@scenario
async def test_an_edge_that_cannot_step_aside_at_first(world: World) -> None:
    world.qemu("n2").trouble("return path", fails("QMP timed out"))
    await world.aborts("QMP timed out")
    await world.commits()


@scenario
async def test_a_vm_that_dies_when_its_edge_shall_step_aside(world: World) -> None:
    world.qemu("n2").trouble("return path", world.qemu("n2").die)
    await world.aborts("n2")
    await world.recreate()
    await world.commits()


# --- the channel state ------------------------------------------------------------------------------------------------


@scenario
async def test_what_edges_saw_is_told_and_the_channel_state_is_replayed_before_anything_else(world: World) -> None:
    first, third = world.qemu("n1"), world.qemu("n3")
    first.received, third.received = _frames(world, "n1", 5), _frames(world, "n3", 2)
    first.frames_held, third.frames_held = 7, 4
    view = await world.commits(name="full")
    assert (view.snapshot.frames_held, view.snapshot.frames_in_transit, view.snapshot.frames_dropped) == (11, 7, 6)
    assert [vm.frames_in_transit for vm in view.snapshot.vms] == [5, 0, 2]
    manifest = world.manifests()[0]
    assert [(vm.frames_held, vm.frames_in_transit) for vm in manifest.vms] == [(7, 5), (0, 0), (4, 2)]
    for body in ({}, {"as_slice": "twin"}):
        response = await world.request("POST", "/v1/snapshots/full/restore", body)
        assert response.status_code == 200, response.text
        for vm in ("n1", "n3"):
            qemu = world.qemu(vm, body.get("as_slice", "lab"))
            assert qemu.replayed == [frame.data for frame in _frames(world, vm, 5 if vm == "n1" else 2)]
            order = [qemu.trace.index(point) for point in ("load", "replay held", "RESUME", "replay")]
            assert order == sorted(order) and not qemu.holding
        assert "replay held" not in world.qemu("n2").trace
    await world.commits()


@scenario
async def test_a_restore_that_leaves_the_vms_paused_replays_when_they_are_let_run(world: World) -> None:
    world.qemu("n1").received = _frames(world, "n1", 3)
    await world.commits(name="full")
    assert (await world.request("POST", "/v1/snapshots/full/restore", {"paused": True})).status_code == 200
    assert world.qemu("n1").replayed == [] and world.qemu("n1").holding
    for _ in range(2):  # once more replays nothing
        assert (await world.request("POST", "/v1/slices/lab/resume", {})).status_code == 200
        assert len(world.qemu("n1").replayed) == 3


@scenario
async def test_an_edge_that_was_full_is_told(world: World) -> None:
    world.qemu("n2").frames_overflowed = 12
    view = await world.commits()
    assert "n2: 12 frames found no room at its edge and were dropped" in view.snapshot.notes
    assert view.snapshot.frames_dropped >= 12
    assert _vm(view, "n2").frames_overflowed == 12


@pytest.mark.parametrize("error", [Conflict("an image is not durable"), NoSpace("the disk is full")])
@scenario
async def test_a_snapshot_server_that_refuses_to_seal(world: World, error: Exception) -> None:
    world.server_faults.add("POST .*/channels", raises(error))  # type: ignore[arg-type]
    await world.aborts(str(error))
    await world.commits()


@pytest.mark.parametrize("after", [False, True], ids=["before it is sealed", "after it is sealed"])
@scenario
async def test_an_answer_about_sealing_that_is_lost_is_asked_for_again(world: World, after: bool) -> None:
    world.server_faults.add("POST .*/channels", raises(PeerFault("the connection broke")), after=after, times=2)
    await world.commits()


@scenario
async def test_a_record_that_the_snapshot_server_does_not_take(world: World) -> None:
    world.server_faults.add("PUT .*/n3/received", raises(NoSpace("the disk is full")))
    await world.aborts("the disk is full")
    await world.commits()


# --- without end ------------------------------------------------------------------------------------------------------


@scenario
async def test_a_hundred_snapshots_in_a_row(world: World) -> None:
    """Each begins when the one before is over; the colors go round; a new coordinator goes on at once."""
    world.settings.max_frame_lifetime_ms = 5000  # it would be noticed if one had to wait for it
    world.spec = replace(world.spec, vms=tuple(vm for vm in world.spec.vms if vm.name != "n2"))
    await world.recreate()
    for number in range(1, 101):
        view = await world.over(await world.take())
        assert (view.state, view.snapshot.epoch, notes_of(view)) == ("committed", number, ()), view.failure
        world.committed.add(view.id)
        if number in (40, 41):
            await world.coordinator_service.stop()
            await world.start_coordinator()
    await world.assert_sound(view)
    assert {vm["port_color"] for vm in (await world.get("/v1/slices/lab"))["vms"]} == {color_of(100)}
