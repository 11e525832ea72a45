"""Following a transaction by server-sent events."""

import asyncio
import json

from coordinator_harness import World, scenario
from fake_vm import fails

from geni_violin.core.messages import TransactionView
from geni_violin.core.transaction import Phase
from geni_violin.runtime.wire import decode

ORDER = [phase.value for phase in Phase]


async def _follow(world: World, transaction: str) -> list[TransactionView]:
    """All that the events endpoint tells, up to the end of the stream."""
    views = []
    url = f"{world.coordinator_service.url}/v1/transactions/{transaction}/events"
    async with world.http.stream("GET", url) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                assert line.startswith("data: ")
                views.append(decode(TransactionView, json.loads(line.removeprefix("data: "))))
    return views


def _in_order(views: list[TransactionView]) -> list[str]:
    """The states that were told, each once."""
    states = [view.state for view in views]
    assert states == sorted(states, key=ORDER.index)
    return sorted(set(states), key=ORDER.index)


@scenario
async def test_several_clients_see_the_states_in_order_up_to_the_end(world: World) -> None:
    transaction = await world.take(delays_ms={"n1": 100})
    for views in await asyncio.gather(*(_follow(world, transaction) for _ in range(3))):
        states = _in_order(views)
        assert states[-1] == "committed"
        assert {"cutting", "streaming"} <= set(states)
        received = [sum(vm.received_bytes for vm in view.snapshot.vms) for view in views]
        assert received == sorted(received) and received[-1] > 0
    assert [view.state for view in await _follow(world, transaction)] == ["committed"]


@scenario
async def test_the_end_of_an_aborted_one_tells_why(world: World) -> None:
    world.qemu("n1").trouble("middle", fails("the stream broke"))
    views = await _follow(world, await world.take())
    assert _in_order(views)[-1] == "aborted"
    assert "the stream broke" in views[-1].failure


@scenario
async def test_the_end_is_told_also_to_a_client_that_reads_slowly(world: World) -> None:
    """Between two looks of it the transaction can come to its end, and be forgotten."""
    transaction = await world.take()
    views = []
    async for view in world.coordinator.snapshots.follow(transaction):
        views.append(view)
        await world.over(transaction)
    assert [views[0].state, views[-1].state] == ["preparing", "committed"]


@scenario
async def test_the_stream_ends_with_the_coordinator(world: World) -> None:
    transaction = await world.take(delays_ms={"n1": 30_000})
    views: list[TransactionView] = []

    async def follow() -> None:
        async for view in world.coordinator.snapshots.follow(transaction):
            views.append(view)

    following = asyncio.create_task(follow())
    await world.reaches(transaction, "cutting")
    await world.coordinator.snapshots.close()
    async with asyncio.timeout(5):
        await following
    assert views[-1].state == "cutting"
