"""One TCP stream through a snapshot, as the seed papers drew it: without one, with the oldest way, and with ours.

Two VMs on two hosts and one stream between them, as fast as it goes (``topologies/stream.yaml``). On one and the same
running slice: no snapshot; strategy ``stop`` with policy ``drop`` (VIOLIN, 2007); ``background`` with ``hold``. Each is
captured at the receiver's tap (tcpdump) and becomes a trace (:mod:`bench.tcp_trace`); the figure is drawn from the
round with the median stall of each (:mod:`bench.sequence_plot`). Root, real QEMU and Open vSwitch; a minute a round.

Usage: ``python -m bench.through_snapshot [--rounds 3] [--png FILE] [--json FILE]``.
"""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.report import Target, argument_parser, finish, spread, table
from bench.sequence_plot import draw
from bench.tcp_trace import Trace, trace_of
from geni_violin.hostagent.names import tap_name
from geni_violin.runtime.settings import Settings
from mininet_tests.slice_harness import REPOSITORY, Slice, installation, wait_for

VMS = ("a", "b")
CASES: dict[str, dict[str, str]] = {
    "no snapshot": {},
    "stop + drop (VIOLIN 2007)": {"strategy": "stop", "network": "drop"},
    "background + hold": {"strategy": "background", "network": "hold"},
}
BEFORE_S, AFTER_S = 3.0, 5.0
SNAPLEN_BYTES = 128
STALL_BOUND_MS = 200.0
"""TCP's shortest retransmission timeout on Linux: a stall below it costs no backoff."""


@contextmanager
def captured(tap: str, path: Path) -> Iterator[None]:
    """Capture the TCP segments that leave a tap for its VM, while the block runs."""
    command = ["tcpdump", "-i", tap, "-Q", "out", "-s", str(SNAPLEN_BYTES), "-B", "65536", "-w", str(path)]
    with subprocess.Popen([*command, "tcp or (vlan and tcp)"], stderr=subprocess.PIPE, text=True) as tcpdump:
        assert tcpdump.stderr is not None
        tcpdump.stderr.readline()  # it listens
        try:
            yield
        finally:
            tcpdump.send_signal(signal.SIGINT)
            tcpdump.wait()


def one_case(running: Slice, tap: str, folder: Path, name: str, number: int) -> tuple[Trace, dict[str, Any] | None]:
    """One stretch of the stream, with a snapshot in it or without; its trace and the snapshot."""
    path, snapshot, cut_at = folder / "capture.pcap", None, None
    with captured(tap, path):
        time.sleep(BEFORE_S)
        if options := CASES[name]:
            done = running.take(f"{options['strategy']}-{options['network']}-{number}", **options)
            if done["state"] != "committed":
                raise SystemExit(f"the snapshot was not taken: {done['failure']}")
            snapshot = done["snapshot"]
            cut_at = next(vm["cut_at"] for vm in done["snapshot"]["vms"] if vm["name"] == "b")
        time.sleep(AFTER_S)
    return trace_of(path.read_bytes(), name, cut_at), snapshot


def measure(rounds: int) -> tuple[dict[str, list[Trace]], dict[str, list[dict[str, Any]]]]:
    """All rounds of all cases, interleaved."""
    traces: dict[str, list[Trace]] = {name: [] for name in CASES}
    snapshots: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    with installation("bench-stream") as installed, tempfile.TemporaryDirectory() as folder:
        text = (REPOSITORY / "topologies" / "stream.yaml").read_text().replace("../.cache", str(REPOSITORY / ".cache"))
        topology = Path(folder) / "stream.yaml"
        topology.write_text(text)
        installed.ok("up", str(topology))
        tap = tap_name(Settings(state_dir=installed.state_dir).installation_id, "stream", "b")
        with installed.client() as client:
            running = Slice(client, "stream", VMS)
            wait_for(lambda: _bytes_sent(tap) > 10_000_000, 90, "the stream")
            for number in range(1, rounds + 1):
                for name in CASES:
                    trace, snapshot = one_case(running, tap, Path(folder), name, number)
                    traces[name].append(trace)
                    snapshots[name] += [snapshot] if snapshot else []
                    print(f"  round {number}: {name}: longest stall {1000 * trace.longest_stall_s:.1f} ms", flush=True)
    return traces, snapshots


def _bytes_sent(tap: str) -> int:
    """What has gone to the VM."""
    return int(Path(f"/sys/class/net/{tap}/statistics/tx_bytes").read_text())


def show(traces: dict[str, list[Trace]], snapshots: dict[str, list[dict[str, Any]]]) -> str:
    """The figures of all cases."""
    rows = []
    for name, found in traces.items():
        stalls = spread(1000 * trace.longest_stall_s for trace in found)
        again = sum(trace.segments_sent_again for trace in found)
        megabits = statistics.median(8e-6 * trace.stream_bytes / trace.points[-1][0] for trace in found)
        downtimes = [vm["downtime_ms"] for snapshot in snapshots[name] for vm in snapshot["vms"]]
        down = f"{statistics.median(downtimes):.1f}" if downtimes else "-"
        rows.append((name, f"{stalls.median:.1f}", f"{stalls.worst:.1f}", str(again), down, f"{megabits:.0f}"))
    columns = ("case", "longest stall, ms", "worst round", "segments sent again", "downtime, ms", "Mbit/s")
    return table("One TCP stream through a snapshot, medians", columns, rows)


def main() -> int:
    """Measure, show, draw."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--png", type=Path, default=REPOSITORY / "docs" / "tcp-through-snapshot.png")
    arguments = parser.parse_args()
    traces, snapshots = measure(arguments.rounds)
    print(show(traces, snapshots))
    middle = [sorted(found, key=lambda trace: trace.longest_stall_s)[len(found) // 2] for found in traces.values()]
    draw(middle, arguments.png, before_s=1.0, after_s=3.0, near_s=0.3)
    print(f"drawn: {arguments.png}")
    figures = {
        name: [{k: v for k, v in asdict(trace).items() if k != "points"} for trace in found]
        for name, found in traces.items()
    }
    holding = spread(1000 * trace.longest_stall_s for trace in traces["background + hold"])
    targets = [Target("longest stall with background + hold", holding.median, STALL_BOUND_MS, "ms")]
    return finish("through_snapshot", figures, targets, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
