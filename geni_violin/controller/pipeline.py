"""The OpenFlow tables as data, and what a rule may be.

Theory of operation. A frame passes three tables (OpenFlow 1.3, chapter 5; no vendor extension is used)::

    from a VM's port        +---------+      +-----------+   metadata = port   +-----------+
    ----------------------> | 0 color | ---> | 1 forward | ------------------> | 2 leave   | ---> to the VM
    from a link, VLAN kept  +---------+      +-----------+   that it leaves by +-----------+ ---> to a link
                             pushes VLAN         |                              to a VM: by port and color,
                             ID and PCP,         +--> flood: links, and the      the VLAN popped (or kept, if
                             checks the          local ports that admit the      the port is armed), or dropped
                             source MAC          color                           to a link: as it is

A VM whose edge is in the switch has a hold port beside its own. Armed, that one gets the frames, with their tag; what
comes out of it goes from table 0 to table 2, which puts it out at the VM's port as it is.

The slice is the VLAN ID, the color is the VLAN priority (docs/architecture.md). Forwarding looks at no color, so only
edge switches change when a VM is cut. Rules may count frames by a meter (:mod:`geni_violin.controller.meters`). Every
rule is checked against the declaration of its table, so a match or action that a table was not designed for cannot
reach a switch.
"""

from dataclasses import dataclass, fields

from geni_violin.core.errors import ConsistencyViolation

COOKIE_MAGIC = 0x6776
"""The high 16 bits of the cookie of every rule that is ours: "gv"."""
COOKIE_MAGIC_MASK = 0xFFFF << 48

MULTICAST = "01:00:00:00:00:00"
"""As a rule's ``eth_dst``: any group address, that is one with this bit set (broadcast included)."""

FROM_VM, FROM_LINK = 0, 1 << 32
"""The metadata of a frame while it is not decided where it goes: where it comes from. Above all port numbers."""

BACK = 1 << 33
"""In the metadata of a frame that comes out of a hold port, beside the number of its VM's port: it has no tag."""

NO_SLICE = 0
"""The VLAN ID in the cookie of rules that belong to no slice."""


@dataclass(frozen=True, slots=True)
class Match:
    """What a rule matches; None is anything. ``vlan_vid`` and ``vlan_pcp`` need a tag to be there."""

    in_port: int | None = None
    vlan_vid: int | None = None
    vlan_pcp: int | None = None
    eth_src: str | None = None
    eth_dst: str | None = None
    metadata: int | None = None

    def used(self) -> frozenset[str]:
        """The names of the fields that this match looks at."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True, slots=True)
class PushVlan:
    """Add an outer 802.1Q tag."""


@dataclass(frozen=True, slots=True)
class SetVlanVid:
    """Set the outer tag's VLAN ID."""

    vlan_vid: int


@dataclass(frozen=True, slots=True)
class SetVlanPcp:
    """Set the outer tag's priority."""

    vlan_pcp: int


@dataclass(frozen=True, slots=True)
class PopVlan:
    """Take the outer tag off."""


@dataclass(frozen=True, slots=True)
class Output:
    """Send a copy of the frame, as it is at this point; never to the port that it came from (OpenFlow 1.3, 5.12)."""

    port_no: int


Action = PushVlan | SetVlanVid | SetVlanPcp | PopVlan | Output
Key = tuple[int, int, Match]
"""What names a rule within a switch: table, priority and match."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One flow entry. ``meter`` counts the frame, ``actions`` are applied in order, then ``metadata`` is written, then
    table ``goto`` is next."""

    table: int
    priority: int
    match: Match
    vlan_id: int
    actions: tuple[Action, ...] = ()
    metadata: int | None = None
    goto: int | None = None
    meter: int | None = None

    @property
    def key(self) -> Key:
        """The rule's name within its switch."""
        return (self.table, self.priority, self.match)

    @property
    def cookie(self) -> int:
        """The rule's cookie."""
        return slice_cookie(self.vlan_id) | self.table << 24


def slice_cookie(vlan_id: int) -> int:
    """What the high 32 bits of all cookies of one slice are; the low 32 bits are 0 here."""
    return COOKIE_MAGIC << 48 | vlan_id << 32


SLICE_COOKIE_MASK = 0xFFFFFFFF << 32


def vlan_id_of_cookie(cookie: int) -> int | None:
    """The VLAN ID in a cookie of ours; None if it is not ours."""
    return (cookie >> 32) & 0xFFFF if cookie >> 48 == COOKIE_MAGIC else None


@dataclass(frozen=True)
class Table:
    """What the rules of one table may do."""

    table_id: int
    name: str
    matches: frozenset[str]
    actions: frozenset[type]
    writes_metadata: bool = False
    next_tables: frozenset[int] = frozenset()


COLOR = Table(
    0,
    "color",
    matches=frozenset({"in_port", "eth_src", "vlan_vid", "vlan_pcp"}),
    actions=frozenset({PushVlan, SetVlanVid, SetVlanPcp}),
    writes_metadata=True,
    next_tables=frozenset({1, 2}),
)
FORWARD = Table(
    1,
    "forward",
    matches=frozenset({"vlan_vid", "vlan_pcp", "eth_dst", "metadata"}),
    actions=frozenset({Output, PopVlan}),
    writes_metadata=True,
    next_tables=frozenset({2}),
)
LEAVE = Table(
    2,
    "leave",
    matches=frozenset({"metadata", "vlan_vid", "vlan_pcp"}),
    actions=frozenset({PopVlan, Output}),
)
TABLES = {table.table_id: table for table in (COLOR, FORWARD, LEAVE)}


def checked(rule: Rule) -> Rule:
    """The rule itself, once it is known to fit its table's declaration.

    :raise ConsistencyViolation: it does not; the message says in what.
    """
    table = TABLES.get(rule.table)
    if table is None:
        raise ConsistencyViolation(f"there is no table {rule.table}")
    excess: set[str] = set(rule.match.used() - table.matches)
    excess |= {type(action).__name__ for action in rule.actions if type(action) not in table.actions}
    if rule.metadata is not None and not table.writes_metadata:
        excess.add("write metadata")
    if rule.goto is not None and rule.goto not in table.next_tables:
        excess.add(f"goto {rule.goto}")
    if excess:
        raise ConsistencyViolation(f"table {table.name} may not have {', '.join(sorted(excess))}: {rule}")
    return rule
