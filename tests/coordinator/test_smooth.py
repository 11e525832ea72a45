"""Snapshots when nothing goes wrong, or when what goes wrong can be borne."""

import pytest
from coordinator_harness import World, under_both_policies
from fake_services import raises
from fake_vm import takes

from geni_violin.coordinator.views import UNCOORDINATED_NOTE, UNCOUNTED_NOTE
from geni_violin.core.errors import PeerFault


@pytest.mark.parametrize("strategy", ["background", "precopy", "stop"])
@under_both_policies
async def test_each_strategy_commits_and_keeps_the_rules_at_every_vm(world: World, strategy: str) -> None:
    view = await world.commits(strategy=strategy)
    world.assert_cut_in_order(strategy)
    assert {vm.strategy for vm in view.snapshot.vms} == {strategy}
    assert all(vm.downtime_ms > 0 and vm.received_bytes > 0 for vm in view.snapshot.vms)
    assert (await world.commits(strategy=strategy)).snapshot.epoch == 2


@under_both_policies
async def test_an_agent_that_is_slow_but_within_its_deadline_commits(world: World) -> None:
    slowness_ms = 600.0
    world.qemu("n2").trouble("stopped", takes(slowness_ms / 1000))
    view = await world.commits()
    assert next(vm for vm in view.snapshot.vms if vm.name == "n2").downtime_ms >= slowness_ms


@under_both_policies
async def test_cuts_can_be_spread_on_purpose(world: World) -> None:
    view = await world.commits(delays_ms={"n1": 0, "n3": 300})
    assert view.snapshot.skew_ms >= 250


@under_both_policies
async def test_where_background_is_refused_precopy_stands_in_and_the_notes_say_so(world: World) -> None:
    world.qemu("n2").refusals["background"] = "Background-snapshot is not compatible with vhost-user"
    view = await world.commits()
    assert {vm.name: vm.strategy for vm in view.snapshot.vms} == {
        "n1": "background",
        "n2": "precopy",
        "n3": "background",
    }
    assert view.snapshot.strategy == "mixed"
    assert any("n2" in note and "vhost-user" in note and "precopy" in note for note in view.snapshot.notes)


@under_both_policies
async def test_without_coordination_it_commits_loudly_and_touches_no_color(world: World) -> None:
    before = list(world.controller.log)
    view = await world.commits(coordination="none")
    assert view.snapshot.notes[0] == UNCOORDINATED_NOTE
    assert world.controller.log == before
    assert world.controller.epochs("lab") == {0}
    assert (await world.commits()).snapshot.epoch == 1


@under_both_policies
async def test_a_count_that_cannot_be_had_is_no_reason_to_abort(world: World) -> None:
    counters = "GET /v1/slices/lab/counters"
    world.controller.app.add(counters, world.nothing)  # the count before the cut
    world.controller.app.add(counters, raises(PeerFault("a switch does not answer")))
    view = await world.commits()
    assert UNCOUNTED_NOTE in view.snapshot.notes
