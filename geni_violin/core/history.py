"""What a consistent cut is, said a second time and from first principles.

This module knows nothing of colors, epochs, ports or rules. It is given what happened, in the order in which it
happened at each VM, and says which frames cross the cut the wrong way: a frame is an *orphan* if its reception is
before its receiver's cut and its sending is not before its sender's cut (Mattern 1993, section 2; VTDC'07, section 4).
The explorer and the tests judge the algorithm by it, so it shares no code with what it judges.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sent:
    """``vm`` sent the frame of that number."""

    vm: str
    frame: int


@dataclass(frozen=True)
class Received:
    """``vm`` received the frame of that number."""

    vm: str
    frame: int


@dataclass(frozen=True)
class Cut:
    """The cut event of ``vm`` in the snapshot of that number."""

    vm: str
    snapshot: int


Happening = Sent | Received | Cut


@dataclass(frozen=True)
class Verdict:
    """The frames that cross one snapshot's cut. The snapshot is consistent if and only if there are no orphans."""

    orphans: frozenset[int]
    in_transit: frozenset[int]

    @property
    def consistent(self) -> bool:
        """Whether the cut is consistent."""
        return not self.orphans


def judge(history: Iterable[Happening], snapshot: int) -> Verdict:
    """The verdict on one snapshot. Only the order at each single VM matters.

    A VM without a cut event in this snapshot has all its happenings before the cut.
    """
    cut: set[str] = set()
    sent_before: set[int] = set()
    sent_after: set[int] = set()
    received_before: set[int] = set()
    for happening in history:
        match happening:
            case Cut(vm, number) if number == snapshot:
                cut.add(vm)
            case Sent(vm, frame):
                (sent_after if vm in cut else sent_before).add(frame)
            case Received(vm, frame) if vm not in cut:
                received_before.add(frame)
    return Verdict(
        orphans=frozenset(received_before & sent_after),
        in_transit=frozenset(sent_before - received_before),
    )
