"""Consistency as the guests see it: real QEMU, real Open vSwitch, real cuts spread over half a second.

Every VM sends numbered datagrams to every other and moves tokens over one TCP connection a pair
(``topologies/guest/causality.c``). A VM that is restored sends again what its image had not sent; a receiver whose
image had received it already sees a number twice: an orphan. So orphans show themselves only after a restore. The same
workload with uncoordinated snapshots is the proof that the test can fail, and with the ``drop`` policy that there is
something to lose.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geni_violin.runtime import pcap
from mininet_tests.slice_harness import REPOSITORY, Slice, installation, wait_for

VMS = ("n1", "n2", "n3", "n4")
SNAPSHOTS = 8
"""`make bench-lossless` takes twenty."""
RESTORED = ("c3", "c6")
WIDEST_MS = 500.0
LEAST_DATAGRAMS_PER_S = 500
TOKENS = 4 * 1000
QUIESCE_AFTER_S = 100
"""The guests' uptime at which they stop, so that tokens in flight can be counted; later than all snapshots."""


@pytest.fixture(scope="module")
def causality(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Slice]:
    """A slice that runs the workload, established; one after the other."""
    with installation(f"causality-{request.param}") as made:
        made.ok("up", str(_topology(tmp_path_factory.mktemp("topology"))))
        with made.client() as client:
            running = Slice(client, "causality", VMS)
            running.wait_until_established()
            yield running


undamaged = pytest.mark.parametrize("causality", ["undamaged"], indirect=True)
"""On a slice whose guests lose nothing and hear nothing twice, in any test."""
damaged = pytest.mark.parametrize("causality", ["damaged"], indirect=True)
"""On a slice for what loses frames, and then for what has orphans."""


def _topology(folder: Path) -> Path:
    """The workload's topology with an end to the traffic, and absolute paths."""
    text = (REPOSITORY / "topologies" / "causality.yaml").read_text()
    text = text.replace("../.cache", str(REPOSITORY / ".cache"))
    text = text.replace("gv.tokens=1000", f"gv.tokens=1000 gv.quiesce_after={QUIESCE_AFTER_S}")
    text = text.replace("gv.rate=600", "gv.rate=800")
    path = folder / "causality.yaml"
    path.write_text(text)
    return path


def _assert_lossless(reports: dict[str, dict[str, Any]], where: str) -> None:
    """No datagram was lost, ever: neither at a snapshot nor by the restore that this life began with."""
    lost = {vm: report["udp_lost"] for vm, report in reports.items()}
    assert not any(lost.values()), f"{where}: datagrams lost {lost}"


def _assert_consistent(reports: dict[str, dict[str, Any]], where: str) -> None:
    """No orphan, no dead connection, no TCP byte twice or never, every VM's books balanced."""
    for vm, report in reports.items():
        for key in ("udp_duplicates", "udp_foreign", "tcp_dead", "tcp_violations"):
            assert report[key] == 0, f"{where}: {vm} {key} = {report[key]}"
        moved = sum(report["tokens_received"].values()) - sum(report["tokens_sent"].values())
        assert report["balance"] == report["start_tokens"] + moved, f"{where}: {vm}'s tokens"


def _rates(first: dict[str, dict[str, Any]], last: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Datagrams a second that each VM sent between two reports, by the guests' own clocks."""
    return {
        vm: 1000 * (last[vm]["udp_sent"] - first[vm]["udp_sent"]) / (last[vm]["t_ms"] - first[vm]["t_ms"]) for vm in VMS
    }


def _restore(running: Slice, name: str, seconds: int) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Kill all VMs, restore, let them run; the last report of each, and where the new life's console begins."""
    running.request("POST", f"/v1/slices/{running.name}/fail", {})
    since = running.offsets()
    view = running.request("POST", f"/v1/snapshots/{name}/restore", {})
    assert view["state"] == "running"
    assert len({vm["port_color"] for vm in view["vms"]}) == 1
    return running.wait_for_reports(since, seconds, timeout_s=90), since


@undamaged
def test_a_future_frame_starts_a_cut_that_nobody_asks_for(causality: Slice) -> None:
    """The second trigger: VMs that the coordinator would keep waiting for seconds cut with the first."""
    done = causality.take("t1", delays_ms={"n2": 3000.0, "n3": 3000.0, "n4": 3000.0})
    assert done["state"] == "committed", done["failure"]
    triggers = {vm["name"]: vm["trigger"] for vm in done["snapshot"]["vms"]}
    assert triggers == {"n1": "coordinator", **dict.fromkeys(("n2", "n3", "n4"), "future frame")}
    assert done["snapshot"]["skew_ms"] < 2500
    _assert_lossless(causality.wait_for_reports(causality.offsets(), 2), "live")


@undamaged
def test_snapshots_have_no_orphans_and_lose_nothing(causality: Slice) -> None:
    """Eight snapshots, half of them with skews up to 0.5 s, the others as they come; several restored.

    Nothing received that was not sent, nothing lost, nothing broken.
    """
    rng = random.Random(20101115)
    since = causality.offsets()
    first = causality.wait_for_reports(since, 1)
    skews, held, in_transit = [], 0, 0
    for number in range(1, SNAPSHOTS + 1):
        delays = causality.spread(rng, WIDEST_MS * rng.uniform(0.1, 1.0)) if number % 2 else {}
        done = causality.take(f"c{number}", delays_ms=delays, second_trigger=not delays)
        assert done["state"] == "committed", done["failure"]
        snapshot = done["snapshot"]
        assert (snapshot["network"], snapshot["frames_dropped"]) == ("hold", 0), snapshot["notes"]
        skews.append(snapshot["skew_ms"])
        held, in_transit = held + snapshot["frames_held"], in_transit + snapshot["frames_in_transit"]
    last = causality.wait_for_reports(causality.offsets(), 2)
    rates = _rates(first, last)
    print(f"\nskews ms: {sorted(round(skew) for skew in skews)}; datagrams/s sent: {rates}")
    print(f"frames held {held}, in transit {in_transit}")
    _assert_consistent(last, "live")
    _assert_lossless(last, "live")
    assert held > 0 and in_transit > 0
    assert max(skews) > WIDEST_MS * 0.6
    assert min(rates.values()) >= LEAST_DATAGRAMS_PER_S
    _assert_frames_can_be_had(causality, "c7")
    vlans = {causality.request("GET", "/v1/slices/causality")["vlan_id"]}
    for name in RESTORED:
        reports, _ = _restore(causality, name, 6)
        _assert_consistent(reports, f"restored {name}")
        _assert_lossless(reports, f"restored {name}")
        vlans.add(causality.request("GET", "/v1/slices/causality")["vlan_id"])
    assert len(vlans) == 1 + len(RESTORED), "a restore must have a VLAN ID that the slice did not have before (R3)"
    _assert_tokens_conserved(causality)


def _assert_frames_can_be_had(running: Slice, name: str) -> None:
    """The channel state is as many frames as the snapshot says, and they have no tag of the slice's."""
    snapshot = running.request("GET", f"/v1/snapshots/{name}")
    frames = pcap.decode(running.client.get(f"/v1/snapshots/{name}/frames").raise_for_status().content)
    assert len(frames) == snapshot["frames_in_transit"] == sum(vm["frames_in_transit"] for vm in snapshot["vms"]) > 0
    assert {frame.data[12:14].hex() for frame in frames} <= {"0800", "0806"}


@damaged
def test_the_drop_policy_is_consistent_too_and_tells_its_losses(causality: Slice) -> None:
    """What the papers did: no orphan, but frames of the future and frames in transit are lost."""
    rng = random.Random(2)
    for number in range(1, 4):
        delays = causality.spread(rng, WIDEST_MS)
        done = causality.take(f"d{number}", network="drop", delays_ms=delays)
        assert done["state"] == "committed", done["failure"]
        assert done["snapshot"]["frames_dropped"] > 0
    _assert_consistent(causality.wait_for_reports(causality.offsets(), 2), "live")
    reports, _ = _restore(causality, "d3", 4)
    _assert_consistent(reports, "restored d3")
    assert sum(report["udp_lost"] for report in reports.values()) > 0, "without losses hold has nothing to save"


def _assert_tokens_conserved(running: Slice) -> None:
    """Restore the last snapshot and let the guests come to their end: every token is there, once."""
    _, since = _restore(running, f"c{SNAPSHOTS}", 1)
    finals = wait_for(
        lambda: all(running.reports(vm, since[vm], "GV-FINAL") for vm in VMS), QUIESCE_AFTER_S, "the guests' end"
    )
    assert finals
    reports = {vm: running.reports(vm, since[vm], "GV-FINAL")[-1] for vm in VMS}
    _assert_consistent(reports, "final")
    assert sum(report["balance"] for report in reports.values()) == TOKENS


@damaged
def test_uncoordinated_snapshots_have_orphans(causality: Slice) -> None:
    """The same workload and skew without coordination: the guests notice. Without this, the test above is worthless."""
    rng = random.Random(7)
    found = 0
    for number in range(1, 6):
        name = f"u{number}"
        delays = causality.spread(rng, WIDEST_MS)
        done = causality.take(name, coordination="none", delays_ms=delays)
        assert done["state"] == "committed", done["failure"]
        assert any("NOT CONSISTENT" in note for note in done["snapshot"]["notes"])
        reports, _ = _restore(causality, name, 4)
        orphans = sum(report["udp_duplicates"] for report in reports.values())
        print(f"\nuncoordinated {name}: skew {done['snapshot']['skew_ms']:.0f} ms, {orphans} orphans")
        found += orphans
        if found:
            return
    raise AssertionError("five uncoordinated snapshots without an orphan: the test cannot tell right from wrong")
