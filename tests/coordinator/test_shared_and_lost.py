"""What slices share, and what is lost for good: found by trying to break the coordinator."""

from dataclasses import replace

import httpx
import pytest
from coordinator_harness import World, make_spec, scenario
from fake_services import raises

from geni_violin.coordinator import slices
from geni_violin.core.errors import PeerFault
from geni_violin.core.model import LinkSpec, SliceSpec, SwitchSpec
from geni_violin.runtime.wire import encode


def _over_a_transit_switch(name: str) -> SliceSpec:
    """A slice whose VMs talk by way of a switch that has none."""
    spec = make_spec(name)
    return replace(
        spec,
        switches=(SwitchSpec("s1", "h1"), SwitchSpec("transit", "h2"), SwitchSpec("s2", "h1")),
        links=(LinkSpec("s1", "transit"), LinkSpec("transit", "s2")),
        vms=tuple(replace(vm, host="h1", switch="s1" if vm.index == 1 else "s2") for vm in spec.vms),
    )


@scenario
async def test_a_switch_that_another_slice_needs_stays(world: World) -> None:
    """No VM is on it, so its host's agent would let it go; only the coordinator knows who needs it."""
    await world.request("DELETE", "/v1/slices/lab")
    for name in ("one", "two"):
        response = await world.request("POST", "/v1/slices", {"spec": encode(_over_a_transit_switch(name))})
        assert response.status_code == 201, response.text
    switches = world.agents["h2"].host.dpids
    assert (await world.request("DELETE", "/v1/slices/two")).status_code == 200
    assert "transit" in switches
    assert (await world.request("DELETE", "/v1/slices/one")).status_code == 200
    assert "transit" not in switches


@scenario
async def test_a_restore_touches_nothing_while_a_host_is_away(world: World) -> None:
    await world.commits(name="kept")
    pids = {qemu.definition.name: id(qemu) for qemu in world.qemus()}
    await world.agents["h2"].service.vanish()
    response = await world.request("POST", "/v1/snapshots/kept/restore", {})
    assert response.status_code == 502
    assert {qemu.definition.name: id(qemu) for qemu in world.qemus()} == pids
    assert (await world.get("/v1/slices/lab"))["vms"][0]["state"] == "running"


@scenario
async def test_a_slice_whose_switch_is_gone_can_be_deleted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its abort waits for a recolor that never comes; without VMs the colors mean nothing."""
    world.shorten(cut_ms=500)
    monkeypatch.setattr(slices, "CANCEL_PATIENCE_S", 0.5)
    away = raises(PeerFault("switch 1 is not connected"))
    world.controller.app.add("POST .*/recolor", away, times=None, body='"epoch":1')
    transaction = await world.take()
    await world.reaches(transaction, "aborting")
    assert (await world.request("DELETE", "/v1/slices/lab")).status_code == 200
    assert (await world.get(f"/v1/transactions/{transaction}"))["state"] == "aborted"
    assert (await world.request("GET", "/v1/slices/lab")).status_code == 404


@scenario
async def test_an_address_that_is_none_is_refused_and_forgotten(world: World) -> None:
    for bad in ("http://[::1", "nonsense", "http://"):
        assert (await world.request("PUT", "/v1/hosts/bad", {"url": bad})).status_code == 422
    assert "bad" not in await world.get("/v1/hosts")


@scenario
async def test_what_is_nowhere_is_a_problem_document(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.coordinator_url, trust_env=False) as client:
        response = await client.get("/v1/nowhere")
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    assert (await world.request("GET", "/v1/snapshots/none%3Fx=1")).status_code == 404
