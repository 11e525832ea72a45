"""The coordinator is killed in each state of a transaction, and started again over the same journal."""

import asyncio
import re
from collections.abc import Awaitable, Callable

import pytest
from coordinator_harness import CoordinatorProcess, World, scenario, under_a_policy, under_both_policies
from fake_vm import takes

Point = Callable[[World, Callable[[], Awaitable[None]]], None]
"""Have something happen, once, when a transaction is at a certain point."""


def _request(request: str, *, after: bool = False, body: str = "", at: str = "server") -> Point:
    def arrange(world: World, happening: Callable[[], Awaitable[None]]) -> None:
        faults = {
            "server": world.server_faults,
            "controller": world.controller.app,
            "h2": world.agents["h2"].faults,
        }[at]
        faults.add(request, happening, after=after, body=body)

    return arrange


def _in_vm(point: str) -> Point:
    def arrange(world: World, happening: Callable[[], Awaitable[None]]) -> None:
        world.qemu("n3").trouble(point, happening)

    return arrange


POINTS: dict[str, tuple[Point, str]] = {
    "preparing, promised": (_request("POST .*/prepare", after=True, at="h2"), "aborted"),
    "preparing, staged": (_request("POST /v1/stagings", after=True), "aborted"),
    "armed, one edge is": (_request("POST .*/n3/arm", after=True, at="h2"), "aborted"),
    "armed, the barrier": (_request("POST .*/recolor", body='"epoch":0', at="controller"), "aborted"),
    "armed, the network is not": (_request("POST .*/lab/arm", at="controller"), "aborted"),
    "armed, the network is": (_request("POST .*/lab/arm", after=True, at="controller"), "aborted"),
    "cutting, before the first request": (_request("POST .*/n3/cut", at="h2"), "aborted"),
    "cutting, a VM is stopped": (_in_vm("stopped"), "aborted"),
    "cutting, recolored": (_request("POST .*/recolor", body='"n3"', after=True, at="controller"), "aborted"),
    "streaming": (_in_vm("middle"), "aborted"),
    "streaming, not retired": (_request("GET .*/colors", at="controller"), "aborted"),
    "streaming, not disarmed": (_request("POST .*/disarm", at="controller"), "aborted"),
    "streaming, disarmed": (_request("POST .*/disarm", after=True, at="controller"), "aborted"),
    "streaming, not settled": (_request("POST .*/n3/cut/.*/settle", at="h2"), "aborted"),
    "streaming, settled": (_request("POST .*/n3/cut/.*/settle", after=True, at="h2"), "aborted"),
    "streaming, sealed": (_request("POST .*/channels", after=True), "aborted"),
    "streaming, all durable": (_request("GET .*/counters", at="controller"), "aborted"),
    "committing, not published": (_request("POST .*/publish"), "committed"),
    "committing, published": (_request("POST .*/publish", after=True), "committed"),
}


BEFORE_THE_NETWORK = {"preparing, promised", "preparing, staged", "armed, one edge is"}
"""Nothing was asked of the network that could have admitted a future frame."""
ONLY_DROP = {"armed, the barrier"}
ONLY_HOLD = {
    name for name in POINTS if re.search("edge|network|disarmed|settled|sealed", name) and name not in ONLY_DROP
}
CASES = [
    (policy, name) for policy, other in (("hold", ONLY_DROP), ("drop", ONLY_HOLD)) for name in POINTS.keys() - other
]


async def _play(world: World, name: str, kill: Callable[[], Awaitable[None]]) -> None:
    """Kill the coordinator when the transaction is at the point, start another, and see what becomes of it."""
    arrange, outcome = POINTS[name]
    if name == "streaming, all durable":
        world.controller.app.add("GET .*/counters", world.nothing)  # the count before the cut
    reached, transactions = asyncio.Event(), []

    async def here() -> None:
        reached.set()
        await kill()

    if name == "streaming":  # the others' images are out and durable
        for vm in ("n1", "n2"):
            world.qemu(vm).trouble("middle", world.nothing)
    if name == "streaming, not retired":  # the counters are asked, also where all else takes long
        world.settings.max_frame_lifetime_ms = 1000
    arrange(world, here)
    transactions.append(await world.take())
    async with asyncio.timeout(30):
        await reached.wait()
    await kill()
    await world.start_coordinator()
    view = await world.over(transactions[0])
    assert view.state == outcome
    assert ("stopped in the middle" in view.failure) == (outcome == "aborted")
    await world.assert_sound(view)
    assert world.controller.epochs("lab") == {0 if name in BEFORE_THE_NETWORK else 1}
    await world.commits()


@pytest.mark.parametrize(("policy", "name"), sorted(CASES))
@under_a_policy
async def test_a_coordinator_that_stops_leaves_the_rest_to_the_next_one(world: World, name: str) -> None:
    stopped = asyncio.Event()

    async def stop() -> None:
        """Without any cleanup: connections break, tasks are dropped."""
        if not stopped.is_set():
            stopped.set()
            await world.coordinator_service.stop()

    await _play(world, name, stop)


@pytest.mark.parametrize("name", ["cutting, a VM is stopped", "streaming", "committing, not published"])
@scenario
async def test_a_coordinator_that_is_killed_by_sigkill(world: World, name: str) -> None:
    await world.coordinator_service.stop()
    process = CoordinatorProcess(world)
    try:
        world.use_coordinator_at(await process.url())
        await _play(world, name, process.kill)
    finally:
        await process.kill()


@under_both_policies
async def test_a_second_crash_during_the_recovery(world: World) -> None:
    world.qemu("n3").trouble("middle", takes(0.2))
    transaction = await world.take()
    await world.reaches(transaction, "streaming")
    for _ in range(3):
        await world.coordinator_service.stop()
        await world.start_coordinator()
    await world.is_aborted(await world.over(transaction), "stopped in the middle")
    await world.commits()


@scenario
async def test_a_slice_that_is_being_recovered_takes_no_snapshot(world: World) -> None:
    release = asyncio.Event()

    async def wait() -> None:
        await release.wait()

    world.qemu("n3").trouble("middle", takes(0.3))
    transaction = await world.take()
    await world.reaches(transaction, "streaming")
    await world.coordinator_service.stop()
    world.server_faults.add("DELETE /v1/stagings/.*", wait)
    await world.start_coordinator()
    response = await world.request("POST", "/v1/slices/lab/snapshots", {})
    assert response.status_code == 409
    release.set()
    await world.is_aborted(await world.over(transaction))
    await world.commits()
