"""Epochs, colors and what a port does with a frame.

Theory of operation. An *epoch* counts the cuts that a VM has been through. The *color* of a port is its epoch
modulo :data:`COLORS`; it travels in the VLAN priority (PCP) of every frame that the port lets in. A receiving
port never sees the sender's epoch, only its color, so the relation between the two is told from colors alone.
With at most two adjacent epochs alive at a time, three colors are enough to tell the past from the future:
Mattern's algorithm as VIOLIN uses it (VTDC'07, section 5, "we actually use three different colors"). With two
colors the past and the future look alike.
"""

from enum import Enum

COLORS = 3
"""How many colors there are. ``geni_violin.check`` shows what breaks with two."""


class Relation(Enum):
    """What a frame is to the port that it reaches (docs/architecture.md, the three cases)."""

    SAME = "same"
    IN_TRANSIT = "in transit"
    FUTURE = "future"


def color_of(epoch: int) -> int:
    """The color (0, 1 or 2) of an epoch.

    :raise ValueError: the epoch is negative.
    """
    if epoch < 0:
        raise ValueError(f"an epoch counts cuts and cannot be {epoch}")
    return epoch % COLORS


def relation(frame_color: int, port_color: int) -> Relation:
    """What a frame of ``frame_color`` is to a port of ``port_color``.

    :raise ValueError: one of them is not a color.
    """
    for color in (frame_color, port_color):
        if not 0 <= color < COLORS:
            raise ValueError(f"a color is 0 to {COLORS - 1}, not {color}")
    ahead = (frame_color - port_color) % COLORS
    return (Relation.SAME, Relation.FUTURE, Relation.IN_TRANSIT)[ahead]


def admitted_colors(epoch: int) -> tuple[int, ...]:
    """The frame colors that a port of this epoch delivers: its own, and that of frames in transit from before.

    In epoch 0 nothing can be in transit, so only color 0 is admitted.
    """
    own = color_of(epoch)
    return (own,) if epoch == 0 else (own, color_of(epoch - 1))
