"""Counting frames by color, exactly: meters that limit nothing. Pure functions.

Theory of operation. Open vSwitch attributes what its flow cache has forwarded to rules up to half a second later, and
by the rules of that later moment: of frames sent during a recolor, thousands were counted under a color that they never
had. A *meter* (OpenFlow 1.3, 5.7) is counted where a frame is forwarded, together with what is done to it, so its count
is exact and up to date at any time. The meters here have one band, at a rate that no port can reach.

Frames are counted by slice and color where they enter the network from a VM, where they come off a link, and where they
go onto one. Within a switch a frame is nowhere for long, so the frames that are alive are those on links::

    alive = crossed + copies x flooded - received           summed over all switches of the slice

``crossed`` are unicast frames that were put on a link. A flooded frame is put on several at once: the number of copies
is part of its meter's name, so that counts keep their meaning when the tree of the slice changes. Whatever drops a
frame inside a switch, of any rule or none, it is then not alive any more, and needs no meter of its own.

A frame that a link loses stays alive for ever by these counts. When a color's end is known from elsewhere, what is left
of it is written off (:class:`Tally`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from geni_violin.core.color import COLORS
from geni_violin.core.messages import ColorCounters

METERS_PER_SLICE = 64
"""A meter's number is its slice's VLAN ID times this, plus what it counts."""


class Counting(IntEnum):
    """What a meter counts. FLOODED is the first of :data:`MAX_COPIES`, by the number of copies from 1."""

    ENTERED = 0
    RECEIVED = 1
    CROSSED = 2
    FLOODED = 3


MAX_COPIES = METERS_PER_SLICE // COLORS - Counting.FLOODED
"""A switch that floods onto more links than this has no meter for it, and its slices cannot be counted."""
HIGHEST_METER = 4095 * METERS_PER_SLICE - 1
"""A switch must allow meters of up to this number."""

Counts = Mapping[int, int]
"""Frames by meter, of one switch."""


def meter_of(vlan_id: int, counting: Counting, color: int, copies: int = 1) -> int | None:
    """The number of a meter; None if there is none for so many copies."""
    if not 1 <= copies <= MAX_COPIES:
        return None
    return vlan_id * METERS_PER_SLICE + COLORS * (counting + copies - 1) + color


def vlan_id_of_meter(meter: int) -> int:
    """The slice that a meter belongs to."""
    return meter // METERS_PER_SLICE


@dataclass(frozen=True)
class _Name:
    counting: Counting
    color: int
    copies: int


def _name_of(meter: int) -> _Name:
    row, color = divmod(meter % METERS_PER_SLICE, COLORS)
    counting = Counting(min(row, Counting.FLOODED))
    return _Name(counting, color, row - Counting.FLOODED + 1 if counting is Counting.FLOODED else 1)


@dataclass
class Tally:
    """What is known of one slice's counts.

    ``written_off`` has, by color, the frames that seem alive and are not. A color that is not in it cannot be told:
    a switch has lost its counts, or this controller has not seen their beginning.
    """

    written_off: dict[int, int] = field(default_factory=dict)

    @classmethod
    def from_zero(cls) -> "Tally":
        """Of a slice all of whose meters are new."""
        return cls(dict.fromkeys(range(COLORS), 0))

    def lose(self) -> None:
        """Counts are gone."""
        self.written_off.clear()

    def write_off(self, alive: Sequence[int], current_color: int) -> None:
        """Only frames of ``current_color`` are alive: what the counters say of the others, by color, is loss."""
        for color in set(range(COLORS)) - {current_color}:
            self.written_off[color] = alive[color]

    def counters(self, vlan_id: int, first: Iterable[Counts], second: Iterable[Counts]) -> list[ColorCounters]:
        """The counters of the colors that can be told, from two reads of all switches, the second after the first.

        Frames received are taken from the first read and frames sent from the second, so that no frame can be missed
        in between: if they balance, none was alive at the time of the first read (Mattern's argument).
        """
        sent, received = by_color(vlan_id, second), by_color(vlan_id, first)
        told = []
        for color, written_off in sorted(self.written_off.items()):
            alive = sent[color].sent - received[color].received - written_off
            if alive >= 0:
                entered = sent[color].entered
                told.append(ColorCounters(color, entered, entered - alive, alive))
        return told


@dataclass
class ColorSums:
    """One color's frames, over all switches. ``entered`` has each copy of a flooded frame as a frame of its own."""

    entered: int = 0
    sent: int = 0
    received: int = 0

    @property
    def alive(self) -> int:
        """Frames that were put on a link and did not come off it."""
        return self.sent - self.received


def by_color(vlan_id: int, switches: Iterable[Counts]) -> list[ColorSums]:
    """The sums of a slice's meters, by color."""
    sums = [ColorSums() for _ in range(COLORS)]
    for counts in switches:
        for meter, frames in counts.items():
            if vlan_id_of_meter(meter) == vlan_id:
                _add(sums, _name_of(meter), frames)
    return sums


def _add(sums: list[ColorSums], name: _Name, frames: int) -> None:
    color = sums[name.color]
    match name.counting:
        case Counting.ENTERED:
            color.entered += frames
        case Counting.RECEIVED:
            color.received += frames
        case Counting.CROSSED:
            color.sent += frames
        case Counting.FLOODED:
            color.sent += name.copies * frames
            color.entered += name.copies * frames
