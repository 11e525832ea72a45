"""How the controller fares with many ports and switches: installing, recoloring, and what that sends to switches.

The real controller, in a process of its own, and 32 switches in another that speak OpenFlow 1.3 and keep rules, but
forward nothing: so this is the time of the controller, without that of Open vSwitch. The links form a binary tree; the
ports are spread evenly. In each round, for each number of ports in turn:

- *install* the slice, new to the switches; beside it, *unchanged*: the same request again, which costs all but rules;
- *recolor* one port, and all; beside each, *confirm*: the same request again, answered by the barriers alone;
- *arm* all ports, recolor all, *disarm*: what a snapshot with ``hold`` asks for.

Times are from the request to its answer, as a bare client of the REST interface sees them.
Usage: ``python -m bench.scale [--ports 125 250 500 1000] [--switches 32] [--rounds 5] [--json FILE]``.
Ends with 1 if a target is missed.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.fake_switches import FakeSwitches, Totals, running_switches
from bench.report import Spread, Target, argument_parser, finish, spread, table
from bench.rest_client import RestClient
from geni_violin.core.messages import ArmRequest, DisarmRequest, RecolorRequest
from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink
from mininet_tests.fabric_harness import ControllerProcess, wait_until

FIRST_DPID = 0x67765000
FIRST_EDGE_PORT = 100
PARENT, FIRST_CHILD = 1, 2
SINGLE_RECOLORS = 10
KINDS = {
    "install": "install",
    "unchanged": "  baseline: unchanged",
    "recolor_one": "recolor one port",
    "confirm_one": "  baseline: confirm one",
    "recolor_all": "recolor all",
    "confirm_all": "  baseline: confirm all",
    "arm_all": "arm all",
    "recolor_armed": "recolor all, armed",
    "disarm_all": "disarm all",
}
"""What is measured, in the order of the table."""


@dataclass
class Figures:
    """All of one number of ports: the slice's rules and meters, and of each kind of request its times and flow-mods."""

    ports: int
    rules: int = 0
    meters: int = 0
    left_behind: int = 0
    install_bytes: int = 0
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    flow_mods: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def time(self, kind: str) -> Spread:
        """What the measurements of one kind come to."""
        return spread(self.times_ms[kind])


def tree(switches: int) -> tuple[SwitchLink, ...]:
    """A binary tree: switch i hangs under switch (i - 1) / 2."""
    return tuple(
        SwitchLink(FIRST_DPID + (i - 1) // 2, FIRST_CHILD + (i - 1) % 2, FIRST_DPID + i, PARENT)
        for i in range(1, switches)
    )


def slice_of(ports: int, switches: int, vlan_id: int) -> NetworkSlice:
    """A slice of that many VMs, spread evenly over the switches."""
    edge = tuple(
        EdgePort(
            vm=f"v{i}",
            dpid=FIRST_DPID + i % switches,
            port_no=FIRST_EDGE_PORT + i // switches,
            mac=f"52:54:00:{i >> 16:02x}:{i >> 8 & 0xFF:02x}:{i & 0xFF:02x}",
            epoch=0,
        )
        for i in range(ports)
    )
    return NetworkSlice("scale", vlan_id, edge, tree(switches))


def switch_ports(network: NetworkSlice) -> dict[int, tuple[int, ...]]:
    """By datapath id, the ports that the slice uses."""
    ends = {(port.dpid, port.port_no) for port in network.ports}
    for link in network.links:
        ends |= {(link.a_dpid, link.a_port_no), (link.b_dpid, link.b_port_no)}
    return {dpid: tuple(sorted(number for at, number in ends if at == dpid)) for dpid in {dpid for dpid, _ in ends}}


class Bench:
    """The controller, the switches, and what is measured with them."""

    def __init__(self, client: RestClient, switches: FakeSwitches) -> None:
        self.client, self.switches = client, switches
        self.can_arm = True

    def timed(self, figures: Figures, kind: str, method: str, path: str, body: Any) -> Totals:
        """Send a request; note how long it took and what it made the controller send."""
        before = self.switches.totals()
        answer = self.client.request(method, path, body)
        sent = self.switches.totals().since(before)
        figures.times_ms[kind].append(answer.elapsed_ms)
        figures.flow_mods[kind].append(sent.flow_mods)
        return sent

    def round(self, figures: Figures, network: NetworkSlice) -> None:
        """Measure everything once, with a slice that the switches do not have yet."""
        path, before = f"/v1/slices/{network.name}", self.switches.totals()
        sent = self.timed(figures, "install", "PUT", path, network)
        figures.rules, figures.meters = sent.rules - before.rules, sent.meters - before.meters
        figures.install_bytes = sent.flow_mod_bytes
        self.timed(figures, "unchanged", "PUT", path, network)
        recolor = f"{path}/recolor"
        for port in network.ports[:: max(1, len(network.ports) // SINGLE_RECOLORS)][:SINGLE_RECOLORS]:
            request = RecolorRequest(1, (port.vm,))
            self.timed(figures, "recolor_one", "POST", recolor, request)
            self.timed(figures, "confirm_one", "POST", recolor, request)
        self.client.request("POST", recolor, RecolorRequest(1))
        self.timed(figures, "recolor_all", "POST", recolor, RecolorRequest(2))
        self.timed(figures, "confirm_all", "POST", recolor, RecolorRequest(2))
        self.armed(figures, network, epoch=3)
        self.client.request("DELETE", path)
        after = self.switches.totals()
        figures.left_behind += after.rules - before.rules + after.meters - before.meters

    def armed(self, figures: Figures, network: NetworkSlice, epoch: int) -> None:
        """What a snapshot that holds asks for, if this controller knows it."""
        path, request = f"/v1/slices/{network.name}", ArmRequest(epoch, tuple(port.vm for port in network.ports))
        if not self.can_arm:
            return
        if not figures.times_ms["arm_all"]:
            self.can_arm = self.knows_arming(path)
        if self.can_arm:
            self.timed(figures, "arm_all", "POST", f"{path}/arm", request)
            self.timed(figures, "recolor_armed", "POST", f"{path}/recolor", RecolorRequest(epoch))
            self.timed(figures, "disarm_all", "POST", f"{path}/disarm", DisarmRequest(epoch))

    def knows_arming(self, path: str) -> bool:
        """Whether there is such a request; a body that is none is refused otherwise."""
        return self.client.ask("POST", f"{path}/arm", {}).status != 404


def measure(sizes: Sequence[int], switches: int, rounds: int) -> tuple[list[Figures], Totals]:
    """All sizes in turn, that many times."""
    all_figures = {ports: Figures(ports) for ports in sizes}
    controller = ControllerProcess()
    try:
        controller.start()
        with running_switches(controller.openflow_port, switch_ports(slice_of(max(sizes), switches, 1))) as fakes:
            wait_until("all switches connect", lambda: len(controller.switches()) == switches)
            client, vlan_ids = RestClient(controller.rest_port), iter(range(1, 4095))
            bench = Bench(client, fakes)
            for number in range(1, rounds + 1):
                for ports, figures in all_figures.items():
                    bench.round(figures, slice_of(ports, switches, next(vlan_ids)))
                print(f"  round {number} of {rounds}", file=sys.stderr)
            totals = fakes.totals()
            client.close()
    finally:
        controller.stop()
        controller.client.close()
        controller.log.close()
    return list(all_figures.values()), totals


def show(measured: Sequence[Figures], switches: int) -> None:
    """Tables for people."""
    columns = [f"{figures.ports} ports" for figures in measured]
    for title in ("median", "worst"):
        rows = [
            (label, *(f"{asdict(figures.time(kind))[title]:,.1f}" for figures in measured))
            for kind, label in KINDS.items()
            if measured[0].times_ms[kind]
        ]
        print(table(f"\nRequest to answer over {switches} switches, ms, {title}", ("", *columns), rows))
    rows = [
        ("rules", *(f"{figures.rules:,}" for figures in measured)),
        ("rules a port", *(f"{figures.rules / figures.ports:.1f}" for figures in measured)),
        ("meters", *(f"{figures.meters:,}" for figures in measured)),
        ("MB of flow-mods to install", *(f"{figures.install_bytes / 1e6:.2f}" for figures in measured)),
        *(
            (f"flow-mods to {label.strip()}", *(_range(figures.flow_mods[kind]) for figures in measured))
            for kind, label in KINDS.items()
            if kind not in ("install", "unchanged") and "confirm" not in kind and measured[0].flow_mods[kind]
        ),
    ]
    print(table("\nWhat it comes to", ("", *columns), rows))
    for smaller, larger in itertools.pairwise(measured):
        factor, growth = larger.rules / smaller.rules, larger.ports / smaller.ports
        print(f"  {smaller.ports} to {larger.ports} ports: {growth:.2f} times the ports, {factor:.2f} times the rules")


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def targets(measured: Sequence[Figures], totals: Totals) -> list[Target]:
    """What has to hold at the largest size, and from the smallest to the largest."""
    small, large = measured[0], measured[-1]
    growth = (large.rules / small.rules) / (large.ports / small.ports)
    ones = {count for figures in measured for count in figures.flow_mods["recolor_one"]}
    found = [
        Target(f"install {large.ports} ports, worst", large.time("install").worst, 5000.0, "ms"),
        Target(f"recolor {large.ports} ports, worst", large.time("recolor_all").worst, 1000.0, "ms"),
        Target("growth of rules over growth of ports", growth, 1.05),
        Target("different numbers of flow-mods to recolor one port", len(ones), 1),
        Target("rules and meters left of deleted slices", sum(figures.left_behind for figures in measured), 0),
        Target("messages that the switches refused", totals.refused, 0),
    ]
    if large.times_ms["recolor_armed"]:
        found.append(
            Target(f"recolor {large.ports} armed ports, worst", large.time("recolor_armed").worst, 1000.0, "ms")
        )
    return found


def main() -> int:
    """Measure, show, judge."""
    parser = argument_parser(__doc__)
    parser.add_argument("--ports", type=int, nargs="+", default=[125, 250, 500, 1000])
    parser.add_argument("--switches", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    measured, totals = measure(sorted(arguments.ports), arguments.switches, arguments.rounds)
    show(measured, arguments.switches)
    if not measured[0].times_ms["arm_all"]:
        print("  not measured: this controller does not know arm and disarm")
    figures = {"switches": arguments.switches, "sizes": [asdict(one) for one in measured]}
    return finish("scale", figures, targets(measured, totals), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
