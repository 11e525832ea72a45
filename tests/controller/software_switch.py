"""A switch, and a network of them, that executes rules as OpenFlow 1.3 says (chapter 5). It knows nothing of colors."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from geni_violin.controller.diff import AddMeter, Batch, Installed, RemoveMeter, by_key
from geni_violin.controller.pipeline import (
    MULTICAST,
    Key,
    Match,
    Output,
    PopVlan,
    PushVlan,
    Rule,
    SetVlanPcp,
    SetVlanVid,
)
from geni_violin.core.model import NetworkSlice, SwitchLink


@dataclass(frozen=True)
class Tag:
    """An 802.1Q tag."""

    vid: int = 0
    pcp: int = 0


@dataclass(frozen=True)
class Frame:
    """What the tables look at; ``tags`` with the outermost first."""

    eth_dst: str
    payload: str = ""
    tags: tuple[Tag, ...] = ()
    eth_src: str = ""


class SoftwareSwitch:
    """One switch."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules: dict[Key, Rule] = by_key(rules)
        self.packets: Counter[Key] = Counter()
        self.meters: Counter[int] = Counter({rule.meter: 0 for rule in self.rules.values() if rule.meter is not None})

    def send(self, batches: Iterable[Batch]) -> None:
        """Do what flow-mods and meter-mods tell."""
        for batch in batches:
            for change in batch:
                match change:
                    case AddMeter(meter):
                        assert meter not in self.meters, "the switch refuses to add a meter that it has"
                        self.meters[meter] = 0
                    case RemoveMeter(meter):
                        assert not any(rule.meter == meter for rule in self.rules.values()), "its rules would go too"
                        del self.meters[meter]
                    case _:
                        self._change_rule((change,))

    def _change_rule(self, batch: Batch) -> None:
        installed = Installed(self.rules)
        installed.apply([batch])
        meters = {rule.meter for rule in self.rules.values()} - {None}
        assert meters <= self.meters.keys(), "the switch refuses a rule that counts by a meter that it lacks"

    def receive(self, in_port: int, frame: Frame) -> list[tuple[int, Frame]]:
        """Run a frame through the tables; gives back what leaves, by port."""
        out: list[tuple[int, Frame]] = []
        table: int | None = 0
        metadata = 0
        while table is not None:
            rule = self._lookup(table, in_port, frame, metadata)
            if rule is None:
                break
            self.packets[rule.key] += 1
            if rule.meter is not None:
                self.meters[rule.meter] += 1
            frame = self._act(rule, in_port, frame, out)
            metadata = metadata if rule.metadata is None else rule.metadata
            assert rule.goto is None or rule.goto > table, "goto must lead on (5.1)"
            table = rule.goto
        return out

    def _lookup(self, table: int, in_port: int, frame: Frame, metadata: int) -> Rule | None:
        hits = [
            rule
            for rule in self.rules.values()
            if rule.table == table and _matches(rule.match, in_port, frame, metadata)
        ]
        if not hits:
            return None
        best = max(rule.priority for rule in hits)
        chosen = [rule for rule in hits if rule.priority == best]
        assert len(chosen) == 1, f"the specification leaves open which of these is taken: {chosen}"
        return chosen[0]

    def _act(self, rule: Rule, in_port: int, frame: Frame, out: list[tuple[int, Frame]]) -> Frame:
        for action in rule.actions:
            match action:
                case PushVlan():
                    outer = frame.tags[0] if frame.tags else Tag()
                    frame = replace(frame, tags=(outer, *frame.tags))
                case SetVlanVid(vlan_vid):
                    frame = replace(frame, tags=(replace(frame.tags[0], vid=vlan_vid), *frame.tags[1:]))
                case SetVlanPcp(vlan_pcp):
                    frame = replace(frame, tags=(replace(frame.tags[0], pcp=vlan_pcp), *frame.tags[1:]))
                case PopVlan():
                    assert frame.tags, "popping a tag that is not there"
                    frame = replace(frame, tags=frame.tags[1:])
                case Output(port_no) if port_no != in_port:
                    out.append((port_no, frame))
        return frame


def _matches(match: Match, in_port: int, frame: Frame, metadata: int) -> bool:
    tag = frame.tags[0] if frame.tags else None
    group = bool(int(frame.eth_dst[:2], 16) & 1)
    return (
        (match.in_port is None or match.in_port == in_port)
        and (match.vlan_vid is None or (tag is not None and match.vlan_vid == tag.vid))
        and (match.vlan_pcp is None or (tag is not None and match.vlan_pcp == tag.pcp))
        and (match.eth_src is None or match.eth_src == frame.eth_src)
        and (match.eth_dst is None or match.eth_dst == frame.eth_dst or (match.eth_dst == MULTICAST and group))
        and (match.metadata is None or match.metadata == metadata)
    )


@dataclass(frozen=True)
class Crossing:
    """A frame that went over a link."""

    link: SwitchLink
    frame: Frame


class SoftwareNetwork:
    """Switches by datapath id, and the links between them."""

    def __init__(self, links: Iterable[SwitchLink]) -> None:
        self.switches: dict[int, SoftwareSwitch] = {}
        self._peers: dict[tuple[int, int], tuple[tuple[int, int], SwitchLink]] = {}
        for link in links:
            a, b = (link.a_dpid, link.a_port_no), (link.b_dpid, link.b_port_no)
            self._peers |= {a: (b, link), b: (a, link)}
        self.crossings: list[Crossing] = []
        self.lost: set[SwitchLink] = set()
        """Links that lose every frame."""

    def send_from(self, dpid: int, port_no: int, frame: Frame) -> list[tuple[tuple[int, int], Frame]]:
        """Let a VM send; gives back what arrives at edge ports, in any order. A loop is an assertion error."""
        arrived: list[tuple[tuple[int, int], Frame]] = []
        moving = [((dpid, port_no), frame)]
        for _ in range(1000):
            if not moving:
                return arrived
            (here, in_port), current = moving.pop()
            for out_port, sent in self.switches[here].receive(in_port, current):
                if (here, out_port) in self._peers:
                    far_end, link = self._peers[here, out_port]
                    self.crossings.append(Crossing(link, sent))
                    if link not in self.lost and far_end[0] in self.switches:
                        moving.append((far_end, sent))
                else:
                    arrived.append(((here, out_port), sent))
        raise AssertionError("the frame goes round for ever")


def edge_of(network: NetworkSlice, vm: str) -> tuple[int, int]:
    """Where a VM of a slice is: datapath id and port number."""
    return next((port.dpid, port.port_no) for port in network.ports if port.vm == vm)
