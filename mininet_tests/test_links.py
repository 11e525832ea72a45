"""Links with a delay or a loss through real Open vSwitch: what they do to frames, and what becomes of them. Needs root.

The sites' ends are made without agents and coordinator, so that each fault can be made on its own; test_wan.py has the
whole installation.
"""

import asyncio
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from geni_violin.core.errors import MachineFault
from geni_violin.hostagent import ports
from geni_violin.hostagent.cleanup import clean_up, ledger_of
from geni_violin.hostagent.link_counters import Counters
from geni_violin.hostagent.link_ends import folder_of
from geni_violin.runtime.processes import ProcessRecord, is_alive

from .fabric_harness import ControllerProcess
from .link_harness import MAX_FRAME_BYTES, Site, Wan, median_ms, running_wan

GUEST_TAG = bytes.fromhex("81000014")
Scenario = Callable[[Wan], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(scope="module")
def controller() -> Iterator[ControllerProcess]:
    process = ControllerProcess()
    process.start()
    try:
        yield process
    finally:
        process.stop()
        process.client.close()
        process.log.close()


@pytest.fixture
def play(tmp_path: Path, controller: ControllerProcess) -> Play:
    """Plays a scenario with two sites of its own."""

    async def with_wan(scenario: Scenario, delay_ms: float, loss: float) -> None:
        async with running_wan(tmp_path, controller, delay_ms, loss) as wan:
            await scenario(wan)

    def played(scenario: Scenario, delay_ms: float = 20.0, loss: float = 0.0) -> None:
        asyncio.run(with_wan(scenario, delay_ms, loss))

    return played


def processes(wan: Wan) -> list[ProcessRecord]:
    """The link processes that live."""
    return [record for record in ledger_of(wan.settings).all() if is_alive(record)]


async def until(is_true: Callable[[], bool], patience_s: float = 20.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + patience_s
    while not is_true() and time.monotonic() < deadline:  # noqa: ASYNC110 (it happens in other processes)
        await asyncio.sleep(0.01)
    return is_true()


# --- what a link does to frames ---------------------------------------------------------------------------------------


def test_frames_are_delayed_accurately_and_keep_their_order(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        arrivals = await wan.stream(frames=3000, rate=1000)
        assert [arrival.number for arrival in arrivals] == list(range(3000))
        assert min(arrival.took_ms for arrival in arrivals) >= wan.delay_ms
        error_ms = median_ms(arrivals) - wan.delay_ms
        print(f"delay of {wan.delay_ms:g} ms at 1,000 frames/s: median error {error_ms:.3f} ms")
        assert error_ms <= 1.0

    play(scenario)


def test_the_share_of_lost_frames_is_what_was_asked_for(play: Play) -> None:
    """Within four standard deviations of the binomial distribution, and no frame is lost elsewhere or out of order."""
    frames, loss = 6000, 0.01

    async def scenario(wan: Wan) -> None:
        arrivals = await wan.stream(frames, rate=3000)
        numbers = [arrival.number for arrival in arrivals]
        assert numbers == sorted(set(numbers))
        lost = frames - len(numbers)
        print(f"loss of {loss:g}: {lost} of {frames} frames")
        assert abs(lost - frames * loss) <= 4 * math.sqrt(frames * loss * (1 - loss))
        counters = wan.a.counters()
        assert (counters.entered, counters.lost, counters.overflowed) == (frames, lost, 0)
        assert (wan.b.counters().missed, wan.b.counters().refused) == (0, 0)

    play(scenario, loss=loss)


@pytest.mark.parametrize("tags", [b"", GUEST_TAG, GUEST_TAG * 2], ids=["no tag", "own tag", "two own tags"])
def test_jumbo_frames_and_a_guests_own_tags_pass_unchanged(play: Play, tags: bytes) -> None:
    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        for size in (100, 1500, ports.JUMBO_BYTES):
            payload = os.urandom(size)
            wan.a.send(wan.b, payload, tags)
            frame = await asyncio.to_thread(wan.b.receive, 2.0)
            assert frame is not None, size
            assert frame[12:] == tags + b"\x88\xb5" + payload

    play(scenario, delay_ms=1.0)


def test_a_delayed_frame_does_not_outlive_its_slice(play: Play) -> None:
    """A restore gives the slice another VLAN ID while frames of its earlier life are on the link: none arrives (R3)."""

    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        for _ in range(20):
            wan.a.send(wan.b, b"from the earlier life")
        assert await until(lambda: wan.a.counters().waiting == 20)
        before = wan.b.counters().arrived
        await wan.put_slice(vlan_id=102)
        assert wan.a.counters().waiting == 20, "too slow a machine for this test"
        assert await asyncio.to_thread(wan.b.receive, 2.0) is None
        assert await until(lambda: wan.b.counters().arrived == before + 20)
        assert await wan.is_open()

    play(scenario, delay_ms=1000.0)


# --- what becomes of a link -------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_started_anew_at_its_old_address(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        for site in (wan.a, wan.b):
            ((end, counted),) = site.ends.counters()
            await dies_and_comes_back(site)
            assert await wan.opens()
            assert [again for again, _ in site.ends.counters()] == [end]
            assert await until(partial(counts_on, site, counted))
        assert len(processes(wan)) == 2

    play(scenario, delay_ms=1.0)


async def dies_and_comes_back(site: Site) -> None:
    """Kill a site's process and wait for the next one."""
    pid = site.pid()
    os.kill(pid, signal.SIGKILL)
    assert await until(lambda: site.pid() != pid)


def counts_on(site: Site, before: Counters) -> bool:
    """Whether a site's process has counted more than one before it."""
    now = site.counters()
    return now.entered + now.arrived > before.entered + before.arrived


def test_links_outlive_their_agent_and_the_next_one_watches_them(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        alive = processes(wan)
        wan.a.ends.detach()
        assert await wan.is_open()
        wan.a.ends = wan.a.new_agent()
        wan.a.ends.take_over()
        assert await wan.is_open()
        await wan.put_link()
        assert processes(wan) == alive
        os.kill(wan.a.pid(), signal.SIGKILL)
        assert await wan.opens()

    play(scenario, delay_ms=1.0)


def test_a_process_that_died_without_an_agent_is_started_by_the_next_one(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        wan.b.ends.detach()
        os.kill(wan.b.pid(), signal.SIGKILL)
        assert not await wan.is_open()
        wan.b.ends = wan.b.new_agent()
        wan.b.ends.take_over()
        assert await wan.opens()

    play(scenario, delay_ms=1.0)


def test_a_far_end_that_has_moved_is_followed(play: Play) -> None:
    """As after one switch was deleted and made again while the other stayed."""

    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        before = wan.a.pid()
        ((end, _),) = wan.b.ends.counters()
        await wan.b.ends.remove_all(wan.b.bridge)
        await wan.put_link()
        ((again, _),) = wan.b.ends.counters()
        assert again.address != end.address
        assert wan.a.pid() != before
        await wan.put_slice(vlan_id=101)
        assert await wan.opens()

    play(scenario, delay_ms=1.0)


def test_an_end_goes_with_all_that_belongs_to_it(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        ((end, _),) = wan.a.ends.counters()
        for _ in range(2):
            await wan.a.ends.remove_all(wan.a.bridge)
            assert not ports.exists(end.tap)
            assert end.tap not in await wan.a.switches.ports(wan.a.bridge)
            assert list(folder_of(wan.settings).glob(f"{end.tap}*")) == []
            assert [record.name for record in processes(wan)] != []  # the far end's
            assert ledger_of(wan.settings).get(end.record_name) is None
        await asyncio.sleep(0.5)
        assert not ports.exists(end.tap), "it was started anew"

    play(scenario, delay_ms=1.0)


def test_clean_up_finds_what_agents_that_died_have_left(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        left = processes(wan)
        assert len(left) == 2
        for site in (wan.a, wan.b):
            site.ends.detach()
        done = await clean_up(wan.settings)
        assert set(done.processes) == {record.name for record in left}
        assert len(done.taps) == 4
        assert not any(map(is_alive, left))
        assert ports.taps_of(wan.settings.installation_id) == []
        assert not folder_of(wan.settings).exists()

    play(scenario, delay_ms=1.0)


def test_a_process_ends_when_its_device_is_deleted(play: Play) -> None:
    """So even one that nobody knows of ends with clean-up."""

    async def scenario(wan: Wan) -> None:
        ((end, _),) = wan.a.ends.counters()
        (mine,) = [record for record in processes(wan) if record.name == end.record_name]
        wan.a.ends.detach()
        await ports.delete_tap(end.tap)
        assert await until(lambda: not is_alive(mine))

    play(scenario, delay_ms=1.0)


def test_an_end_that_cannot_be_made_leaves_nothing(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        await wan.a.ends.remove_all(wan.a.bridge)
        await wan.a.switches.delete_switch(wan.a.bridge)
        for peer_address in ("", "127.0.0.1:9"):
            end = wan.a.end(wan.b, wan.delay_ms, wan.loss, peer_address)
            with pytest.raises(MachineFault, match="no bridge named"):
                await wan.a.ends.put(end)
            assert not ports.exists(end.tap)
            assert wan.a.ends.counters() == []
            assert list(folder_of(wan.settings).glob(f"{end.tap}*")) == []

    play(scenario, delay_ms=1.0)


def test_a_device_that_another_process_has_is_told(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        ((end, _),) = wan.a.ends.counters()
        with pytest.raises(MachineFault, match=f"cannot open the TAP device {end.tap}: .*busy"):
            ports.open_tap(end.tap)
        with pytest.raises(MachineFault, match="there is no TAP device gvnosuch"):
            ports.open_tap("gvnosuch")

    play(scenario, delay_ms=1.0)


def test_frames_longer_than_jumbo_are_no_harm(play: Play) -> None:
    async def scenario(wan: Wan) -> None:
        assert await wan.opens()
        wan.a.send(wan.b, bytes(MAX_FRAME_BYTES - 100))
        assert await wan.is_open()

    play(scenario, delay_ms=1.0)
