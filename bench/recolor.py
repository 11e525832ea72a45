"""How long a recolor by REST takes on real Open vSwitch, quiet and under a load of UDP frames.

Two bridges joined by a patch port, four ports, the real controller. Blocks of recolors with and without the load
alternate. Each recolor moves one port by one epoch: the receiver of the load first, then its sender, then two ports
that are idle, so that no frame of the load is from the future and all that is lost was lost by overload. Measured:

- *recolor*: from the request to its answer, which comes after the switch's barrier reply; by a bare client, and every
  fourth, for comparison, by httpx, the library that the command line uses;
- *recolor and purge*: until Open vSwitch has also forgotten its cached flows, when the agent counts it as confirmed;
- *REST alone*, a baseline: a request that the controller answers without asking a switch;
- how much of the load was lost; beside it, as a baseline, of a load without recolors. (Open vSwitch reads a veth
  through a socket that holds some ninety frames, less than 3 ms of this load.)

Usage: ``python -m bench.recolor [--recolors 400] [--mbit 400] [--json FILE]``. Needs root. Ends with 1 if a target is
missed.
"""

import asyncio
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

from bench.lab import Lab, Station, running_lab
from bench.report import Spread, Target, argument_parser, finish, spread, table
from bench.rest_client import RestClient
from geni_violin.core.messages import RecolorRequest
from geni_violin.runtime.openvswitch import forget_cached_flows

HOMES = (0, 1, 0, 1)
SENDER, RECEIVER = 0, 1
ORDER = (RECEIVER, SENDER, 2, 3)
BLOCKS = 10
UDP_PORT = 5001
SETTLE_S = 0.5
KINDS = {
    "rest": "baseline: REST alone",
    "recolor": "recolor",
    "purge": "recolor and purge",
    "recolor_httpx": "recolor, by httpx",
    "purge_httpx": "recolor and purge, by httpx",
}


@dataclass
class Load:
    """What a load amounted to: the bytes of all frames at both ends, with their headers."""

    seconds: float = 0.0
    sent_bytes: int = 0
    carried_bytes: int = 0
    sent_frames: int = 0
    carried_frames: int = 0

    @property
    def carried_mbit_s(self) -> float:
        """The rate at the receiver."""
        return self.carried_bytes * 8e-6 / self.seconds

    @property
    def lost_share(self) -> float:
        """Frames that were sent and not carried, of those sent."""
        return 1.0 - self.carried_frames / self.sent_frames


@dataclass
class Figures:
    """All measurements of one condition, in milliseconds."""

    label: str
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    load: Load = field(default_factory=Load)

    def time(self, kind: str) -> Spread:
        """What the measurements of one kind come to."""
        return spread(self.times_ms[kind])


class Bench:
    """The network, and the epoch that all of its ports are in."""

    def __init__(self, lab: Lab, runner: asyncio.Runner, mbit: float) -> None:
        self.lab, self.runner, self.mbit = lab, runner, mbit
        self.client = RestClient(lab.controller.rest_port)
        self.epoch = 0
        self._pauses = random.Random(1)

    def block(self, figures: Figures, recolors: int) -> None:
        """Some recolors in a row, all ports in turn."""
        for _ in range(0, recolors, len(ORDER)):
            self.epoch += 1
            for index in ORDER:
                self.recolor(figures, self.lab.stations[index].vm)

    def recolor(self, figures: Figures, vm: str) -> None:
        """Measure one, after a pause of random length: nothing is to be in step with Open vSwitch's own rounds."""
        time.sleep(self._pauses.uniform(0.005, 0.025))
        times, path, request = figures.times_ms, "/v1/slices/bench/recolor", RecolorRequest(self.epoch, (vm,))
        times["rest"].append(self.client.request("GET", "/healthz").elapsed_ms)
        by_httpx = vm == self.lab.stations[ORDER[-1]].vm
        began = time.monotonic()
        if by_httpx:
            self.lab.controller.request("POST", path, request)
        else:
            self.client.request("POST", path, request)
        times["recolor_httpx" if by_httpx else "recolor"].append(1000.0 * (time.monotonic() - began))
        self.runner.run(forget_cached_flows(timeout_s=20))
        times["purge_httpx" if by_httpx else "purge"].append(1000.0 * (time.monotonic() - began))

    @contextmanager
    def under_load(self, load: Load) -> Iterator[None]:
        """Have frames on their way from before the block until after it, and add up what was carried."""
        sender, receiver = self.lab.stations[SENDER], self.lab.stations[RECEIVER]
        rate = f"{self.mbit:g}"
        with ExitStack() as sinking:
            sinking.enter_context(receiver.running("bench.udp_load", "sink", str(UDP_PORT)))
            before = _counts(sender, receiver)
            with sender.running("bench.udp_load", "send", receiver.address, str(UDP_PORT), rate):
                began = time.monotonic()
                time.sleep(SETTLE_S)
                yield
                load.seconds += time.monotonic() - began
            time.sleep(SETTLE_S)
            grown = [after - earlier for earlier, after in zip(before, _counts(sender, receiver), strict=True)]
        load.sent_bytes += grown[0]
        load.carried_bytes += grown[1]
        load.sent_frames += grown[2]
        load.carried_frames += grown[3]


def _counts(sender: Station, receiver: Station) -> list[int]:
    return [
        sender.counted("rx_bytes"),
        receiver.counted("tx_bytes"),
        sender.counted("rx_packets"),
        receiver.counted("tx_packets"),
    ]


def measure(recolors: int, mbit: float) -> tuple[Figures, Figures, Load]:
    """Quiet and loaded blocks in turn, which comes first alternates; and the load alone after them, for as long."""
    quiet, loaded, alone = Figures("quiet"), Figures(f"{mbit:g} Mbit/s"), Load()
    with running_lab(HOMES) as lab, asyncio.Runner() as runner:
        lab.controller.request("PUT", "/v1/slices/bench", lab.network(vlan_id=9))
        bench, count = Bench(lab, runner, mbit), -(-recolors // BLOCKS)
        bench.block(Figures("warming up"), 8)
        for number in range(BLOCKS):
            for figures in (quiet, loaded) if number % 2 == 0 else (loaded, quiet):
                with bench.under_load(loaded.load) if figures is loaded else ExitStack():
                    bench.block(figures, count)
            with bench.under_load(alone):
                time.sleep(loaded.load.seconds / (number + 1) - SETTLE_S)
            print(f"  block {number + 1} of {BLOCKS}", file=sys.stderr)
        bench.client.close()
    return quiet, loaded, alone


def show(quiet: Figures, loaded: Figures, alone: Load) -> None:
    """Tables for people."""
    columns = ("", "best", "median", "p99", "worst", "n")
    for figures in (quiet, loaded):
        times = {label: figures.time(kind) for kind, label in KINDS.items()}
        rows = [
            (label, *(f"{ms:.2f}" for ms in (one.best, one.median, one.p99, one.worst)), str(one.count))
            for label, one in times.items()
        ]
        print(table(f"\n{figures.label}, ms", columns, rows))
    rows = [
        (label, f"{load.carried_mbit_s:.1f}", f"{load.seconds:.1f}", f"{load.sent_frames:,}", f"{load.lost_share:.2%}")
        for label, load in (("with recolors", loaded.load), ("baseline: without", alone))
    ]
    print(table("\nThe load", ("", "Mbit/s carried", "seconds", "frames sent", "lost"), rows))


def targets(loaded: Figures, mbit: float) -> list[Target]:
    """What has to hold under load; first of all that there was one."""
    time_ms = loaded.time("recolor")
    return [
        Target("load carried", loaded.load.carried_mbit_s, 0.98 * mbit, "Mbit/s", at_most=False),
        Target("recolor under load, median", time_ms.median, 2.0, "ms"),
        Target("recolor under load, p99", time_ms.p99, 15.0, "ms"),
    ]


def main() -> int:
    """Measure, show, judge."""
    parser = argument_parser(__doc__)
    parser.add_argument("--recolors", type=int, default=400, help="with and without load, each")
    parser.add_argument("--mbit", type=float, default=400.0, help="the load, in Mbit/s of whole frames")
    arguments = parser.parse_args()
    quiet, loaded, alone = measure(arguments.recolors, arguments.mbit)
    show(quiet, loaded, alone)
    figures = {"quiet": asdict(quiet), "loaded": asdict(loaded), "load_alone": asdict(alone)}
    return finish("recolor", figures, targets(loaded, arguments.mbit), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
