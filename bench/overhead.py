"""What coloring costs the traffic of a slice, beside a plain learning switch on the same bridge.

Two stations on one bridge (``--switches 2``: on two, joined by a patch port). In turn, with the same ends: the slice's
own rules; and one rule above them all, ``actions=NORMAL``, with which the bridge is an ordinary learning switch. A
round measures each twice, in the order a b b a, so that a machine that gets busier favors neither; which is a
alternates. Measured: TCP goodput, and the time of one byte there and back over TCP.

Usage: ``python -m bench.overhead [--rounds 15] [--seconds 1] [--switches 1] [--json FILE]``. Needs root. Ends with 1 if
the target is missed.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.lab import Lab, bridge_name, forget_flows, run, running_lab
from bench.report import Target, argument_parser, finish, spread, table
from mininet_tests.fabric_harness import wait_until

PORT = 5002
ROUND_TRIPS = 3000
WARM_UP_S = 0.3
PLAIN_RULE = "table=0,priority=65000"


@dataclass
class Figures:
    """One of the two pipelines, two entries a round. Round-trip times are medians and 99th percentiles."""

    label: str
    goodput_mbit_s: list[float] = field(default_factory=list)
    rtt_us: list[float] = field(default_factory=list)
    rtt_p99_us: list[float] = field(default_factory=list)
    segments_sent_again: list[int] = field(default_factory=list)


class Bench:
    """The network."""

    def __init__(self, lab: Lab, seconds: float) -> None:
        self.lab, self.seconds = lab, seconds
        self.bridges = [bridge_name(number) for number in range(lab.bridges)]

    def be_plain(self) -> None:
        """Forward as a learning switch."""
        for bridge in self.bridges:
            run("ovs-ofctl", "-O", "OpenFlow13", "add-flow", bridge, f"{PLAIN_RULE},actions=NORMAL")
        forget_flows()

    def be_colored(self) -> None:
        """Forward by the slice's rules."""
        for bridge in self.bridges:
            run("ovs-ofctl", "-O", "OpenFlow13", "--strict", "del-flows", bridge, PLAIN_RULE)
        forget_flows()

    def delivered(self) -> int:
        """How many frames the slice's rules have delivered to the receiver."""
        counters = self.lab.controller.counters("bench")
        return counters[self.lab.stations[1].vm]["frames_delivered"]

    def measure(self, figures: Figures) -> None:
        """One round of one pipeline."""
        self.probe("goodput", WARM_UP_S)
        sender = self.lab.stations[0]
        sent_again = sender.segments_sent_again()
        sent = self.probe("goodput", self.seconds)
        figures.goodput_mbit_s.append(sent["bytes"] * 8e-6 / sent["seconds"])
        figures.segments_sent_again.append(sender.segments_sent_again() - sent_again)
        times = spread(self.probe("rtt", ROUND_TRIPS)["us"])
        figures.rtt_us.append(times.median)
        figures.rtt_p99_us.append(times.p99)

    def probe(self, action: str, amount: float) -> Any:
        """Run one probe from the first station to the second."""
        sender, receiver = self.lab.stations
        program = (sys.executable, "-m", "bench.tcp_probe", action, receiver.address, str(PORT), str(amount))
        return json.loads(run(*sender.command(*program)))

    def check_that_rules_count(self, before: int, is_colored: bool) -> None:
        """See that the frames went the way that is said. Open vSwitch brings its counts up to date twice a second.

        :raise SystemExit: they did not.
        """
        if is_colored:
            wait_until("frames go by the slice's rules", lambda: self.delivered() > before + ROUND_TRIPS, patience_s=10)
        elif self.delivered() > before:
            raise SystemExit("frames went by the slice's rules when they should not")


def measure(rounds: int, seconds: float, switches: int) -> tuple[Figures, Figures]:
    """Both pipelines in turn."""
    colored, plain = Figures("colored"), Figures("plain learning switch (baseline)")
    with running_lab((0, switches - 1)) as lab:
        lab.controller.put(lab.network(vlan_id=9))
        bench = Bench(lab, seconds)
        with lab.stations[1].running("bench.tcp_probe", "serve", str(PORT)):
            for number in range(rounds):
                first, second = (colored, plain) if number % 2 == 0 else (plain, colored)
                for figures in (first, second, second, first):
                    (bench.be_colored if figures is colored else bench.be_plain)()
                    before = bench.delivered()
                    bench.measure(figures)
                    bench.check_that_rules_count(before, figures is colored)
                print(f"  round {number + 1} of {rounds}", file=sys.stderr)
    return colored, plain


def ratios(colored: list[float], plain: list[float]) -> list[float]:
    """Round by round, what the two measurements of each come to, colored to plain."""
    return [
        (colored[index] + colored[index + 1]) / (plain[index] + plain[index + 1]) for index in range(0, len(plain), 2)
    ]


def show(colored: Figures, plain: Figures, switches: int) -> None:
    """A table for people."""
    rows = []
    for label, name, digits in (
        ("goodput, Mbit/s", "goodput_mbit_s", 0),
        ("round trip, median, µs", "rtt_us", 1),
        ("round trip, p99, µs", "rtt_p99_us", 1),
    ):
        values = {figures.label: getattr(figures, name) for figures in (colored, plain)}
        rows += [(f"{label}: {which}", *_spread(found, digits)) for which, found in values.items()]
        rows.append((f"{label}: colored to plain", *_spread(ratios(*values.values()), 3)))
    where = "one bridge" if switches == 1 else f"{switches} bridges"
    title = f"\nTCP between two stations on {where}, {len(plain.rtt_us) // 2} rounds"
    print(table(title, ("", "lowest", "median", "highest"), rows))
    sent_again = [f"{figures.label} {sum(figures.segments_sent_again)}" for figures in (colored, plain)]
    print(f"  TCP segments sent again: {', '.join(sent_again)}")


def _spread(values: list[float], digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values))]


def main() -> int:
    """Measure, show, judge."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one goodput measurement")
    parser.add_argument("--switches", type=int, default=1, choices=(1, 2))
    arguments = parser.parse_args()
    colored, plain = measure(arguments.rounds, arguments.seconds, arguments.switches)
    show(colored, plain, arguments.switches)
    goodput = statistics.median(ratios(colored.goodput_mbit_s, plain.goodput_mbit_s))
    figures = {"switches": arguments.switches, "colored": asdict(colored), "plain": asdict(plain)}
    target = Target("goodput, colored to plain, median of the rounds", goodput, 0.97, at_most=False)
    return finish("overhead", figures, [target], arguments.json)


if __name__ == "__main__":
    sys.exit(main())
