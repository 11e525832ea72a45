"""What snapshots and restores cost the traffic of a slice: the causality workload, with ``hold`` and with ``drop``.

Four VMs on two hosts (``topologies/causality.yaml``) send one another numbered datagrams and move tokens over TCP. In
turn, on one and the same running slice: snapshots in a row; a quiet stretch without snapshots, as long as they took;
restores of the last ones. The guests count from inside what was lost, came twice or out of order, and their kernels
count retransmitted segments. Root, real QEMU and Open vSwitch; about five minutes.

Usage: ``python -m bench.lossless [--snapshots 20] [--restores 5] [--rate 900] [--policies hold drop] [--json FILE]``.
Ends with 1 if ``hold`` lost, doubled or broke anything.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mininet_tests.slice_harness import REPOSITORY, Installation, Slice, installation, wait_for

VMS = ("n1", "n2", "n3", "n4")
TOKENS = 4 * 1000
UDP_COUNTS = ("udp_sent", "udp_lost", "udp_duplicates", "udp_reordered")
TCP_COUNTS = ("tcp_dead", "tcp_violations", "tcp_retrans_segs", "tcp_loss_probes", "tcp_timeouts")
COUNTS = UDP_COUNTS + TCP_COUNTS
Reports = dict[str, dict[str, Any]]


@dataclass
class Figures:
    """What one policy did. Counts are sums over all VMs; milliseconds are of single VMs or snapshots."""

    policy: str
    datagrams_per_s: float = 0.0
    quiet: dict[str, int] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    downtime_ms: list[float] = field(default_factory=list)
    hold_ms: list[float] = field(default_factory=list)
    skew_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    frames_held: int = 0
    frames_dropped: int = 0
    frames_in_transit: int = 0
    second_triggers: int = 0
    notes: list[str] = field(default_factory=list)
    restores: list[dict[str, int]] = field(default_factory=list)
    tokens: int = 0

    @property
    def faults(self) -> list[str]:
        """What a lossless policy must not show."""
        rounds = [("live", self.live), *((f"restore {number}", one) for number, one in enumerate(self.restores, 1))]
        kinds = ("udp_lost", "udp_duplicates", "tcp_dead", "tcp_violations")
        found = [f"{where}: {kind} {counts[kind]}" for where, counts in rounds for kind in kinds if counts[kind]]
        return found + ([] if self.tokens == TOKENS else [f"{self.tokens} of {TOKENS} tokens"])


def topology(folder: Path, rate: int, quiesce_after_s: int) -> Path:
    """The workload's topology with another rate and an end, and absolute paths."""
    text = (REPOSITORY / "topologies" / "causality.yaml").read_text()
    text = text.replace("../.cache", str(REPOSITORY / ".cache")).replace("gv.rate=600", f"gv.rate={rate}")
    text = text.replace("gv.tokens=1000", f"gv.tokens=1000 gv.quiesce_after={quiesce_after_s}")
    path = folder / "causality.yaml"
    path.write_text(text)
    return path


def totals(reports: Reports) -> dict[str, int]:
    """The counts of all VMs together."""
    return {kind: sum(report[kind] for report in reports.values()) for kind in COUNTS}


def growth(before: Reports, after: Reports) -> dict[str, int]:
    """By how much the counts grew."""
    first, last = totals(before), totals(after)
    return {kind: last[kind] - first[kind] for kind in COUNTS}


def rate_between(before: Reports, after: Reports) -> float:
    """Datagrams a second of the slowest VM, by its own clock."""
    rates: list[float] = []
    for vm in VMS:
        sent, passed_ms = (after[vm][key] - before[vm][key] for key in ("udp_sent", "t_ms"))
        rates.append(1000.0 * sent / passed_ms)
    return float(min(rates))


def now(running: Slice, reports: int = 2) -> Reports:
    """A report of each VM that was made from here on."""
    return running.wait_for_reports(running.offsets(), reports)


def take_snapshots(running: Slice, figures: Figures, count: int) -> None:
    """Snapshots in a row, each begun when the one before is committed."""
    before, began = now(running), time.monotonic()
    for number in range(1, count + 1):
        done = running.take(f"{figures.policy}{number}", network=figures.policy)
        if done["state"] != "committed":
            raise SystemExit(f"snapshot {number} was not taken: {done['failure']}")
        _note_snapshot(figures, done["snapshot"])
        if sys.stdout.isatty():
            print(f"\r  {figures.policy}: {number} of {count} snapshots", end="", flush=True)
    print(f"\r  {figures.policy}: {count} snapshots taken", flush=True)
    after = now(running, 3)
    figures.seconds = time.monotonic() - began
    figures.live, figures.datagrams_per_s = growth(before, after), rate_between(before, after)


def _note_snapshot(figures: Figures, snapshot: dict[str, Any]) -> None:
    figures.downtime_ms += [vm["downtime_ms"] for vm in snapshot["vms"]]
    figures.hold_ms += [vm["hold_ms"] for vm in snapshot["vms"]]
    figures.skew_ms.append(snapshot["skew_ms"])
    figures.total_ms.append(snapshot["total_ms"])
    figures.frames_held += snapshot["frames_held"]
    figures.frames_dropped += snapshot["frames_dropped"]
    figures.frames_in_transit += snapshot["frames_in_transit"]
    figures.second_triggers += sum(vm["trigger"] == "future frame" for vm in snapshot["vms"])
    figures.notes = sorted({*figures.notes, *snapshot["notes"]})


def restore(running: Slice, name: str, seconds: int = 5) -> Reports:
    """Kill all VMs and restore; a report of each VM some seconds later. Its counts go on from the image's."""
    running.request("POST", f"/v1/slices/{running.name}/fail", {})
    since = running.offsets()
    running.request("POST", f"/v1/snapshots/{name}/restore", {})
    return running.wait_for_reports(since, seconds, timeout_s=90)


def tokens_at_the_end(running: Slice, timeout_s: float) -> int:
    """All tokens, once the guests have come to their end."""
    since = dict.fromkeys(VMS, 0)

    def finals() -> list[dict[str, Any]] | None:
        found = [running.reports(vm, since[vm], "GV-FINAL") for vm in VMS]
        return [reports[-1] for reports in found] if all(found) else None

    return sum(final["balance"] for final in wait_for(finals, timeout_s, "the guests' end"))


def measure(installed: Installation, folder: Path, policy: str, arguments: argparse.Namespace) -> Figures:
    """One policy on a slice of its own."""
    quiesce_after_s = 40 + 5 * arguments.snapshots
    installed.ok("up", str(topology(folder, arguments.rate, quiesce_after_s)))
    figures = Figures(policy)
    with installed.client() as client:
        running = Slice(client, "causality", VMS)
        running.wait_until_established()
        take_snapshots(running, figures, arguments.snapshots)
        quiet_from = now(running)
        time.sleep(figures.seconds)
        figures.quiet = growth(quiet_from, now(running, 1))
        for number in range(arguments.snapshots - arguments.restores + 1, arguments.snapshots + 1):
            figures.restores.append(totals(restore(running, f"{policy}{number}")))
            print(f"  {policy}: restored {policy}{number}: {_short(figures.restores[-1])}")
        figures.tokens = tokens_at_the_end(running, quiesce_after_s + 60)
        client.delete("/v1/slices/causality").raise_for_status()
    return figures


def _short(counts: dict[str, int]) -> str:
    return f"{counts['udp_lost']} lost, {counts['udp_duplicates']} twice, {counts['udp_reordered']} out of order"


def _beside(live: dict[str, int], quiet: dict[str, int], kind: str) -> str:
    return f"{live[kind]} (as long without snapshots: {quiet[kind]})"


def show(figures: Figures) -> None:
    """The figures of one policy, for people."""
    live, quiet = figures.live, figures.quiet
    rows = {
        "datagrams a second, slowest VM": f"{figures.datagrams_per_s:.0f}",
        "live: datagrams lost": f"{live['udp_lost']} of {live['udp_sent']}",
        "live: twice (orphans), out of order": f"{live['udp_duplicates']}, {live['udp_reordered']}",
        "live: TCP segments sent again": _beside(live, quiet, "tcp_retrans_segs"),
        "  of them, probes for a late tail": _beside(live, quiet, "tcp_loss_probes"),
        "  timeouts, which slow TCP down": _beside(live, quiet, "tcp_timeouts"),
        "after each restore: datagrams lost": ", ".join(str(one["udp_lost"]) for one in figures.restores),
        "after each restore: twice": ", ".join(str(one["udp_duplicates"]) for one in figures.restores),
        "tokens at the end": f"{figures.tokens} of {TOKENS}",
        "downtime, ms": spread(figures.downtime_ms),
        "frames waited, ms": spread(figures.hold_ms),
        "skew of a cut, ms": spread(figures.skew_ms),
        "snapshot, ms": spread(figures.total_ms),
        "frames held": f"{figures.frames_held}",
        "frames in transit, recorded": f"{figures.frames_in_transit}",
        "frames dropped": f"{figures.frames_dropped}",
        "cuts begun by a future frame": f"{figures.second_triggers} of {len(figures.downtime_ms)}",
    }
    print(f"\n{figures.policy}: {len(figures.skew_ms)} snapshots in a row, {figures.seconds:.0f} s")
    for name, value in rows.items():
        print(f"  {name:<38} {value}")
    for note in figures.notes:
        print(f"  note: {note}")


def spread(values: list[float]) -> str:
    """Median and worst."""
    return f"median {statistics.median(values):.1f}, worst {max(values):.1f}"


def main() -> int:
    """Measure, show, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--restores", type=int, default=5)
    parser.add_argument("--rate", type=int, default=900, help="datagrams a second that each VM tries to send")
    parser.add_argument("--policies", nargs="+", default=["hold", "drop"], choices=["hold", "drop"])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as folder, installation("bench-lossless") as installed:
        for policy in arguments.policies:
            measured.append(measure(installed, Path(folder), policy, arguments))
    for figures in measured:
        show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figures) for figures in measured], indent=2) + "\n")
    faults = [fault for figures in measured if figures.policy == "hold" for fault in figures.faults]
    print(f"\nhold: {'; '.join(faults)}" if faults else "\nhold: nothing lost, nothing twice, nothing broken")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
