"""Frames held in the switch, as the guests see it: real QEMU, real Open vSwitch, real cuts under traffic.

The workload is that of ``test_causality``. Two of four VMs have their edge in the switch, and these are on different
switches; then all four. The control is the policy ``drop`` on the same slice: it loses frames, so there is something
that hold ports keep.
"""

import asyncio
import os
import random
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geni_violin.hostagent import ports
from geni_violin.hostagent.hold_port import OvertakingWatch, put_on
from mininet_tests.slice_harness import REPOSITORY, Slice, installation, wait_for

TAP = "gvtesthold"
VMS = ("n1", "n2", "n3", "n4")
HELD_IN_SWITCH = {"mixed": ("n1", "n3"), "all": VMS}
SNAPSHOTS = 4
WIDEST_MS = 150.0
UNTIL_A_FUTURE_FRAME_MS = 1_500.0
"""Longer than a cut takes on a busy machine."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Slice]:
    """A slice some of whose VMs have their edge in the switch, established."""
    with installation(f"hold-port-{request.param}") as made:
        made.ok("up", str(_topology(tmp_path_factory.mktemp("topology"), HELD_IN_SWITCH[request.param])))
        with made.client() as client:
            running = Slice(client, "causality", VMS)
            running.wait_until_established()
            yield running


def _topology(folder: Path, vms: tuple[str, ...]) -> Path:
    text = (REPOSITORY / "topologies" / "causality.yaml").read_text()
    text = text.replace("../.cache", str(REPOSITORY / ".cache"))
    for vm in vms:
        text = text.replace(f"{{name: {vm},", f"{{name: {vm}, hold: switch,")
    path = folder / "causality.yaml"
    path.write_text(text)
    return path


def _check(reports: dict[str, dict[str, Any]], where: str) -> None:
    """No orphan, nothing lost, no dead connection, every VM's books balanced."""
    for vm, report in reports.items():
        for key in ("udp_duplicates", "udp_foreign", "udp_lost", "tcp_dead", "tcp_violations"):
            assert report[key] == 0, f"{where}: {vm} {key} = {report[key]}"
        moved = sum(report["tokens_received"].values()) - sum(report["tokens_sent"].values())
        assert report["balance"] == report["start_tokens"] + moved, f"{where}: {vm}'s tokens"


def _restored(running: Slice, name: str) -> dict[str, int]:
    """Kill all VMs and restore them; where their new lives' consoles begin."""
    running.request("POST", f"/v1/slices/{running.name}/fail", {})
    since = running.offsets()
    assert running.request("POST", f"/v1/snapshots/{name}/restore", {})["state"] == "running"
    return since


def _hear(watch: OvertakingWatch, count: int) -> None:
    """Listen until that many frames count as reordered."""

    def heard() -> bool:
        watch.look()
        return watch.overtaken.frames_reordered == count

    wait_for(heard, 5, f"{count} overtaken frames")


def test_overtaken_frames_are_counted_on_a_real_device() -> None:
    """Frames that are put on a VM's TAP device, as the switch does it, while some written back are on their way."""
    asyncio.run(ports.create_tap(TAP))
    try:
        descriptor = ports.open_tap(TAP)
        wait_for(lambda: ports.has_carrier(TAP), 5, "the device's carrier")
        watch = OvertakingWatch(TAP)
        frames = [bytes.fromhex("525400000001525400000002 88b5") + bytes([number]) * 60 for number in range(6)]
        for frame in frames[:4]:
            watch.overtaken.written_back(frame)
        put_on(TAP, [frames[0], frames[5], *frames[1:3]])
        _hear(watch, 2)
        put_on(TAP, frames[3:4])
        _hear(watch, 3)
        assert watch.overtaken.all_came_by
        os.write(descriptor, frames[4])
        watch.look()
        assert watch.overtaken.frames_reordered == 3, "what the VM sends is no concern of the watch"
        watch.close()
        copy = ports.tap_descriptor_of(os.getpid(), TAP)
        read = [os.read(copy, 2048) for _ in range(5)]
        assert read == [frames[number] for number in (0, 5, 1, 2, 3)]
        assert not select.select([copy], [], [], 0)[0], "the device is empty"
        for end in (copy, descriptor):
            os.close(end)
    finally:
        asyncio.run(ports.delete_tap(TAP))


@pytest.mark.parametrize("held", HELD_IN_SWITCH, indirect=True)
def test_hold_ports_lose_nothing_and_restores_neither(held: Slice) -> None:
    """Several snapshots, in the first of which frames of the future start cuts; the second one spread; two restores.

    Every VM's books balance, and no byte of a TCP stream is missing or twice: so every token is there, once.
    """
    rng = random.Random(31)
    triggers: set[str] = set()
    figures = []
    for number in range(1, SNAPSHOTS + 1):
        widest_ms = {1: UNTIL_A_FUTURE_FRAME_MS, 2: WIDEST_MS}.get(number)
        delays = held.spread(rng, widest_ms) if widest_ms else {}
        done = held.take(f"s{number}", delays_ms=delays, second_trigger=number != 2)
        assert done["state"] == "committed", done["failure"]
        snapshot = done["snapshot"]
        assert (snapshot["network"], snapshot["frames_dropped"]) == ("hold", 0), snapshot["notes"]
        triggers |= {vm["trigger"] for vm in snapshot["vms"]}
        figures.append([snapshot[key] for key in ("frames_held", "frames_in_transit")])
        figures[-1] += [sum(vm["frames_reordered"] for vm in snapshot["vms"])]
        figures[-1] += [round(max(vm["downtime_ms"] for vm in snapshot["vms"]))]
    print(f"\nheld, in transit, reordered, longest downtime ms: {figures}; triggers {triggers}")
    assert all(sum(figure[place] for figure in figures) > 0 for place in (0, 1)), "no frame was held, or in transit"
    assert triggers == {"coordinator", "future frame"}
    _check(held.wait_for_reports(held.offsets(), 2), "live")
    _check(held.wait_for_reports(_restored(held, "s1"), 3), "restored s1")
    _check(held.wait_for_reports(_restored(held, f"s{SNAPSHOTS}"), 3), f"restored s{SNAPSHOTS}")


@pytest.mark.parametrize("held", ["all"], indirect=True)
def test_without_holding_frames_are_lost(held: Slice) -> None:
    """The control: the same slice with ``drop``. Consistent, by the pause order, and not lossless."""
    done = held.take("d1", network="drop", delays_ms=held.spread(random.Random(31), WIDEST_MS), second_trigger=False)
    assert done["state"] == "committed", done["failure"]
    assert done["snapshot"]["frames_dropped"] > 0
    live = held.wait_for_reports(held.offsets(), 2)
    reports = held.wait_for_reports(_restored(held, "d1"), 2)
    lost = [sum(report["udp_lost"] for report in found.values()) for found in (live, reports)]
    print(f"\ndropped: {done['snapshot']['frames_dropped']}; datagrams lost live, restored: {lost}")
    assert sum(lost) > 0
    assert not any(report["udp_duplicates"] for report in reports.values())
