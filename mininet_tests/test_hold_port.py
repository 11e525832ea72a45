"""Frames held in the switch, as the guests see it: real QEMU, real Open vSwitch, real cuts under traffic.

The workload is that of ``test_causality``. Two of four VMs have their edge in the switch, and these are on different
switches; then all four. The control is the policy ``drop`` on the same slice: it loses frames, so there is something
that hold ports keep.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mininet_tests.slice_harness import REPOSITORY, Slice, installation, wait_for

VMS = ("n1", "n2", "n3", "n4")
HELD_IN_SWITCH = {"mixed": ("n1", "n3"), "all": VMS}
SNAPSHOTS = 4
WIDEST_MS = 150.0
TOKENS = 4 * 1000
QUIESCE_AFTER_S = 32
"""The guests' uptime at which they stop, so that tokens in flight can be counted; later than all snapshots."""


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Slice]:
    """A slice some of whose VMs have their edge in the switch, established."""
    with installation(f"hold-port-{request.param}") as made:
        made.ok("up", str(_topology(tmp_path, HELD_IN_SWITCH[request.param])))
        with made.client() as client:
            running = Slice(client, "causality", VMS)
            running.wait_until_established()
            yield running


def _topology(folder: Path, vms: tuple[str, ...]) -> Path:
    text = (REPOSITORY / "topologies" / "causality.yaml").read_text()
    text = text.replace("../.cache", str(REPOSITORY / ".cache"))
    text = text.replace("gv.tokens=1000", f"gv.tokens=1000 gv.quiesce_after={QUIESCE_AFTER_S}")
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


@pytest.mark.parametrize("held", HELD_IN_SWITCH, indirect=True)
def test_hold_ports_lose_nothing_and_restores_neither(held: Slice) -> None:
    """Several snapshots, each other one spread; frames of the future start cuts too; then a restore to the end."""
    rng = random.Random(31)
    triggers: set[str] = set()
    figures = []
    for number in range(1, SNAPSHOTS + 1):
        delays = held.spread(rng, WIDEST_MS) if number % 2 else {}
        done = held.take(f"s{number}", delays_ms=delays, second_trigger=number != 1)
        assert done["state"] == "committed", done["failure"]
        snapshot = done["snapshot"]
        assert (snapshot["network"], snapshot["frames_dropped"]) == ("hold", 0), snapshot["notes"]
        triggers |= {vm["trigger"] for vm in snapshot["vms"]}
        figures.append([snapshot[key] for key in ("frames_held", "frames_in_transit")])
        figures[-1] += [sum(vm["frames_reordered"] for vm in snapshot["vms"])]
        figures[-1] += [round(max(vm["downtime_ms"] for vm in snapshot["vms"]))]
    print(f"\nheld, in transit, reordered, longest downtime ms: {figures}; triggers {triggers}")
    assert all(frames_held > 0 and in_transit > 0 for frames_held, in_transit, *_ in figures)
    assert triggers == {"coordinator", "future frame"}
    _check(held.wait_for_reports(held.offsets(), 2), "live")
    _check(held.wait_for_reports(_restored(held, "s1"), 3), "restored s1")
    since = _restored(held, f"s{SNAPSHOTS}")
    ends = wait_for(
        lambda: [report for vm in VMS for report in held.reports(vm, since[vm], "GV-FINAL")][3:], 60, "the guests' end"
    )
    assert ends
    finals = {vm: held.reports(vm, since[vm], "GV-FINAL")[-1] for vm in VMS}
    _check(finals, "at the end")
    assert sum(report["balance"] for report in finals.values()) == TOKENS


@pytest.mark.parametrize("held", ["all"], indirect=True)
def test_without_holding_frames_are_lost(held: Slice) -> None:
    """The control: the same slice with ``drop``. Consistent, by the pause order, and not lossless."""
    done = held.take("d1", network="drop", delays_ms=held.spread(random.Random(31), WIDEST_MS), second_trigger=False)
    assert done["state"] == "committed", done["failure"]
    assert done["snapshot"]["frames_dropped"] > 0
    reports = held.wait_for_reports(held.offsets(), 2)
    assert sum(report["udp_lost"] for report in reports.values()) > 0
    reports = held.wait_for_reports(_restored(held, "d1"), 2)
    assert not any(report["udp_duplicates"] for report in reports.values())
