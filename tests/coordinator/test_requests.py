"""Requests that are refused, each with a problem document and without touching anything."""

import asyncio
from typing import Any

from coordinator_harness import World, make_spec, scenario
from fake_vm import takes

from geni_violin.runtime.wire import encode


async def _is_refused(world: World, status: int, words: str, path: str, body: Any) -> None:
    response = await world.request("POST", path, body)
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]


@scenario
async def test_requests_that_can_never_be_right(world: World) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"strategy": "telepathy"}, "no strategy 'telepathy'"),
        ({"network": "pray"}, "no network policy 'pray'"),
        ({"coordination": "horoscope"}, "no coordination 'horoscope'"),
        ({"delays_ms": {"n9": 1}}, "has no VM n9"),
        ({"delays_ms": {"n1": -1}}, "delay is out of range"),
        ({"delays_ms": {"n1": "soon"}}, "delays_ms"),
        ({"name": "../etc"}, "'../etc' cannot be a snapshot's name"),
        ({"name": "Upper"}, "cannot be a snapshot's name"),
    ]
    for body, words in bad:
        await _is_refused(world, 422, words, "/v1/slices/lab/snapshots", body)
    assert all("STOP" not in qemu.trace for qemu in world.qemus())
    await world.commits()


@scenario
async def test_unknown_names(world: World) -> None:
    await _is_refused(world, 404, "'nolab'", "/v1/slices/nolab/snapshots", {})
    await _is_refused(world, 404, "'nolab'", "/v1/slices/nolab/fail", {})
    await _is_refused(world, 404, "'n9'", "/v1/slices/lab/fail", {"vm": "n9"})
    await _is_refused(world, 404, "'nosnap'", "/v1/snapshots/nosnap/restore", {})
    paths = ("slices/nolab", "snapshots/nosnap", "transactions/t", "transactions/t/events", "slices/lab/vms/n9/console")
    for path in paths:
        assert (await world.request("GET", f"/v1/{path}")).status_code == 404
    for path in ("slices/nolab", "snapshots/nosnap"):
        assert (await world.request("DELETE", f"/v1/{path}")).status_code == 404


@scenario
async def test_a_second_snapshot_at_the_same_time_is_a_conflict(world: World) -> None:
    world.qemu("n1").trouble("middle", takes(0.3))
    transaction = await world.take()
    await _is_refused(world, 409, "under way", "/v1/slices/lab/snapshots", {})
    await world.reaches(transaction, "streaming")
    await _is_refused(world, 409, "under way", "/v1/slices/lab/snapshots", {})
    view = await world.over(transaction)
    assert view.state == "committed"
    await world.assert_sound(view)
    await world.commits()


@scenario
async def test_of_many_at_once_exactly_one_is_taken(world: World) -> None:
    path = "/v1/slices/lab/snapshots"
    responses = await asyncio.gather(*(world.request("POST", path, {}) for _ in range(8)))
    assert sorted(response.status_code for response in responses) == [202] + 7 * [409]
    taken = next(response.json()["id"] for response in responses if response.status_code == 202)
    view = await world.over(taken)
    assert view.state == "committed"
    await world.assert_sound(view)


@scenario
async def test_a_taken_name_is_a_conflict(world: World) -> None:
    await world.commits(name="first")
    await _is_refused(world, 409, "'first' already", "/v1/slices/lab/snapshots", {"name": "first"})
    await _is_refused(world, 409, "'lab' already", "/v1/slices", {"spec": encode(make_spec())})
    assert (await world.commits()).snapshot.name == "lab-1"
    assert (await world.request("DELETE", "/v1/snapshots/first")).status_code == 200
    world.committed.discard(next(iter(world.committed - {s["id"] for s in await world.get("/v1/snapshots")})))
    await world.commits(name="first")


@scenario
async def test_two_slices_want_the_same_name_at_the_same_time(world: World) -> None:
    await world.create("lab2")
    paths = [f"/v1/slices/{name}/snapshots" for name in ("lab", "lab2")]
    responses = await asyncio.gather(*(world.request("POST", path, {"name": "same"}) for path in paths))
    assert sorted(response.status_code for response in responses) == [202, 409]
    for response in responses:
        if response.is_success:
            view = await world.over(response.json()["id"])
            assert view.state == "committed"
            await world.assert_sound(view)


@scenario
async def test_a_slice_is_deleted_during_its_snapshot(world: World) -> None:
    world.qemu("n1").trouble("middle", takes(1.0))
    transaction = await world.take()
    await world.reaches(transaction, "streaming")
    assert (await world.request("DELETE", "/v1/slices/lab")).status_code == 200
    view = await world.over(transaction)
    assert (view.state, view.failure) == ("aborted", "the slice is deleted")
    assert list(world.qemus()) == [] and world.controller.slices == {}
    assert world.manifests() == []
    await world.create()
    await world.commits()
