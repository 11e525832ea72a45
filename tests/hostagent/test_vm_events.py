"""QMP's events in our words, and how they reach those who follow."""

import asyncio
from typing import Any

import pytest

from geni_violin.hostagent.qemu_monitor import event_of
from geni_violin.hostagent.qemu_tracking import MemoryTracking
from geni_violin.hostagent.vm_events import Died, EventFeed, MigrationStatus, Resumed, Stopped, VmEvent

STAMP = {"seconds": 1_763_638_000, "microseconds": 250_000}
AT = 1_763_638_000.25


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("STOP", {}, Stopped(AT)),
        ("RESUME", {}, Resumed(AT)),
        ("MIGRATION", {"status": "pre-switchover"}, MigrationStatus("pre-switchover", AT)),
        ("MIGRATION_PASS", {"pass": 1}, None),
        ("NIC_RX_FILTER_CHANGED", {"path": "/machine"}, None),
    ],
)
def test_translation(name: str, data: dict[str, Any], expected: VmEvent | None) -> None:
    assert event_of({"event": name, "data": data, "timestamp": STAMP}) == expected


def test_every_watch_sees_every_event_from_its_beginning_to_its_end() -> None:
    feed = EventFeed()
    feed.publish(Stopped(1.0))
    with feed.watch() as first:
        feed.publish(Resumed(2.0))
        with feed.watch() as second:
            feed.publish(Stopped(3.0))
        feed.publish(Resumed(4.0))
        assert second.pending() == [Stopped(3.0)]
        assert first.pending() == [Resumed(2.0), Stopped(3.0), Resumed(4.0)]


def test_until_skips_what_is_not_wanted_and_gives_up_in_time() -> None:
    async def scenario() -> None:
        feed = EventFeed()
        with feed.watch() as watch:
            feed.publish(Stopped(1.0))
            feed.publish(Resumed(2.0))
            assert await watch.until(lambda event: isinstance(event, Resumed), 1.0) == Resumed(2.0)
            with pytest.raises(TimeoutError):
                await watch.until(lambda event: isinstance(event, Resumed), 0.01)

    asyncio.run(scenario())


def undone(monkeypatch: pytest.MonkeyPatch, in_background: bool, *events: VmEvent) -> int:
    """How often the protection is undone after these events."""
    calls: list[int] = []

    def undo(pid: int) -> int:
        calls.append(pid)
        return 1

    async def scenario() -> None:
        tracking = MemoryTracking("n1", 4711)
        tracking.begin(in_background)
        for event in events:
            tracking.observe(event)
            await asyncio.sleep(0.03)
        await asyncio.wait_for(tracking.close(), 2.0)

    monkeypatch.setattr("geni_violin.hostagent.qemu_tracking.undo_write_protection", undo)
    asyncio.run(scenario())
    assert set(calls) <= {4711}
    return len(calls)


def test_a_background_snapshot_that_completes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        undone(monkeypatch, True, MigrationStatus("active", 1.0), Stopped(2.0), MigrationStatus("completed", 3.0)) == 0
    )


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_bad_end_is_undone_and_once_more_after_it(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    assert undone(monkeypatch, True, MigrationStatus(status, 1.0)) == 2


def test_a_cancellation_is_undone_again_and_again_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[VmEvent] = [
        MigrationStatus("cancelling", 1.0),
        Stopped(2.0),
        Resumed(3.0),
        MigrationStatus("cancelled", 4.0),
    ]
    assert undone(monkeypatch, True, *events) > 2


def test_other_strategies_have_nothing_to_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    assert undone(monkeypatch, False, MigrationStatus("failed", 1.0), Died(2.0, "")) == 0


def test_a_bad_end_leaves_a_trace_until_a_background_snapshot_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        tracking = MemoryTracking("n1", 4711)
        tracking.begin(in_background=True)
        tracking.observe(MigrationStatus("failed", 1.0))
        await tracking.settled()
        tracking.begin(in_background=False)
        tracking.observe(MigrationStatus("completed", 2.0))
        assert tracking.stale
        tracking.begin(in_background=True)
        tracking.observe(MigrationStatus("completed", 3.0))
        assert not tracking.stale

    monkeypatch.setattr("geni_violin.hostagent.qemu_tracking.undo_write_protection", lambda _pid: 1)
    asyncio.run(scenario())
