"""Slices: made whole or not at all, restored from whole images only."""

import asyncio
from dataclasses import replace

import pytest
from coordinator_harness import VMS, World, make_spec, scenario
from fake_services import raises
from fake_vm import takes

from geni_violin.core.errors import MachineFault
from geni_violin.core.model import SwitchSpec
from geni_violin.runtime.wire import encode


async def _is_absent(world: World, name: str) -> None:
    """Neither record nor rules nor VMs."""
    assert (await world.request("GET", f"/v1/slices/{name}")).status_code == 404
    assert name not in world.controller.slices
    assert [qemu for qemu in world.qemus() if qemu.definition.slice == name] == []


@pytest.mark.parametrize("after", [False, True], ids=["before it does it", "after it did it"])
@scenario
async def test_a_part_that_fails_leaves_nothing_of_the_slice(world: World, after: bool) -> None:
    for part, request in (
        ("h1", "PUT /v1/switches/s1"),
        ("h2", "PUT /v1/switches/s2/links"),
        ("h2", "PUT /v1/slices/other/vms/n3"),
        ("h2", "POST /v1/slices/other/vms/n3/run"),
        ("controller", "PUT /v1/slices/other"),
    ):
        faults = world.controller.app if part == "controller" else world.agents[part].faults
        faults.add(request, raises(MachineFault("scripted words")), after=after)
        response = await world.request("POST", "/v1/slices", {"spec": encode(make_spec("other"))})
        assert response.status_code == 503
        assert response.json()["detail"] == "scripted words"
        await _is_absent(world, "other")
    await world.create("other")
    assert (await world.get("/v1/slices/other"))["state"] == "running"


@scenario
async def test_a_host_without_an_agent_is_refused_and_leaves_nothing(world: World) -> None:
    spec = make_spec("other")
    for bad in (
        encode(spec) | {"switches": encode((*spec.switches, SwitchSpec("s3", "h3")))},
        encode(spec) | {"vms": [encode(vm) | {"host": "h3"} for vm in spec.vms]},
    ):
        response = await world.request("POST", "/v1/slices", {"spec": bad})
        assert response.status_code == 404
        assert "'h3'" in response.json()["detail"]
        await _is_absent(world, "other")


@scenario
async def test_a_host_without_vhost_net_is_told_before_anything_is_made(world: World) -> None:
    spec = make_spec("other")
    vms = [encode(replace(vm, vhost=vm.host == "h2")) for vm in spec.vms]
    world.agents["h1"].faults.add("PUT /v1/switches/s1", raises(MachineFault("a switch was made")))
    response = await world.request("POST", "/v1/slices", {"spec": encode(spec) | {"vms": vms}})
    assert (response.status_code, response.json()["detail"]) == (503, "host h2 has no /dev/vhost-net")
    await _is_absent(world, "other")


@scenario
async def test_an_agent_that_is_away_does_not_keep_a_slice_from_being_deleted(world: World) -> None:
    await world.agents["h2"].service.vanish()
    assert (await world.request("DELETE", "/v1/slices/lab")).status_code == 200
    assert "lab" not in world.controller.slices
    assert (await world.request("GET", "/v1/slices/lab")).status_code == 404


@scenario
async def test_a_failed_slice_is_restored_in_place_under_another_vlan_id(world: World) -> None:
    await world.commits()
    view = await world.commits(name="here")
    before = await world.get("/v1/slices/lab")
    await world.commits()
    failed = (await world.request("POST", "/v1/slices/lab/fail", {})).json()
    assert failed["state"] == "failed"
    assert (await world.request("POST", "/v1/snapshots/here/restore", {})).status_code == 200
    after = await world.get("/v1/slices/lab")
    assert (after["state"], after["epoch"]) == ("running", view.snapshot.epoch)
    assert after["vlan_id"] != before["vlan_id"]
    for vm in VMS:
        assert world.qemu(vm).loaded == world.image(view.id, vm)
    assert (await world.commits()).snapshot.epoch == view.snapshot.epoch + 1


@scenario
async def test_a_copy_beside_the_original(world: World) -> None:
    await world.commits(name="here")
    restore = "/v1/snapshots/here/restore"
    response = await world.request("POST", restore, {"as_slice": "twin", "paused": True})
    assert (response.status_code, response.json()["state"]) == (200, "suspended")
    slices = await world.get("/v1/slices")
    assert len({made["vlan_id"] for made in slices}) == len(slices) == 2
    assert (await world.request("POST", restore, {"as_slice": "twin"})).status_code == 409
    await world.commits()


@scenario
async def test_a_damaged_image_is_refused_before_any_vm_is_touched(world: World) -> None:
    view = await world.commits(name="here")
    path = world.store_dir / "objects/images" / view.id / "n2"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    pids = {qemu.pid: len(qemu.trace) for qemu in world.qemus()}
    for body in ({}, {"as_slice": "twin"}):
        response = await world.request("POST", "/v1/snapshots/here/restore", body)
        assert response.status_code == 503
        assert "n2" in response.json()["detail"]
    assert {qemu.pid: len(qemu.trace) for qemu in world.qemus()} == pids
    assert (await world.get("/v1/slices/lab"))["state"] == "running"
    await _is_absent(world, "twin")


@scenario
async def test_a_restore_that_fails_leaves_nothing_and_can_be_tried_again(world: World) -> None:
    await world.commits(name="here")
    world.agents["h2"].faults.add("POST .*/n3/load", raises(MachineFault("no memory")))
    response = await world.request("POST", "/v1/snapshots/here/restore", {})
    assert response.status_code == 503
    await _is_absent(world, "lab")
    assert (await world.request("POST", "/v1/snapshots/here/restore", {})).status_code == 200
    await world.commits()


@scenario
async def test_a_slice_under_a_snapshot_is_not_restored(world: World) -> None:
    await world.commits(name="here")
    world.qemu("n1").trouble("middle", takes(0.3))
    transaction = await world.take()
    assert (await world.request("POST", "/v1/snapshots/here/restore", {})).status_code == 409
    view = await world.over(transaction)
    assert view.state == "committed"
    await world.assert_sound(view)


@scenario
async def test_many_slices_at_once_get_different_vlan_ids(world: World) -> None:
    names = [f"s{number}" for number in range(5)]
    await asyncio.gather(*(world.create(name) for name in names))
    slices = await world.get("/v1/slices")
    assert len({made["vlan_id"] for made in slices}) == len(slices) == 6


@scenario
async def test_one_vm_can_be_failed(world: World) -> None:
    view = (await world.request("POST", "/v1/slices/lab/fail", {"vm": "n2"})).json()
    assert {vm["name"]: vm["state"] for vm in view["vms"]} == {"n1": "running", "n2": "failed", "n3": "running"}
    assert view["state"] == "failed"
    health = await world.get("/healthz")
    assert health["healthy"] and len(health["parts"]) == 4
    await world.agents["h2"].service.vanish()
    health = await world.get("/healthz")
    assert not health["healthy"] and health["parts"]["hostagent-h2"] != "healthy"
    assert (await world.get("/v1/slices/lab/vms/n1/console"))["next_offset"] > 0
