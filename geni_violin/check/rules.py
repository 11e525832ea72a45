"""What the data plane is built from: the real rules of ``core``, each of which can be replaced by a broken one.

Theory of operation. :data:`SOUND` is the system as it is. A relaxation (``check.relaxations``) replaces one field, so
that the real code is fed something altered, and nothing in ``core`` knows that it is being tested.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from geni_violin.check.vm import PAUSED
from geni_violin.core import color
from geni_violin.core.cut import PLANS, SWITCH_PLANS, Plan

Admission = Callable[[int, int], bool]
"""Whether a frame colored in one epoch (first) is let out by a port of another (second)."""

SWITCH = "switch"
"""The policy "hold" of a VM whose edge is a hold port of its switch."""

EXPLORED_PLANS: Mapping[tuple[str, str], Plan] = MappingProxyType(
    {
        **PLANS,
        (PAUSED, "drop"): SWITCH_PLANS["background", "drop"],
        (PAUSED, SWITCH): SWITCH_PLANS["background", "hold"],
        ("stop", SWITCH): SWITCH_PLANS["stop", "hold"],
    }
)
"""All plans there are, by what a VM is in a world that is explored."""


def admitted(frame_epoch: int, port_epoch: int) -> bool:
    """The admission of ``core.color``, by colors alone."""
    return color.color_of(frame_epoch) in color.admitted_colors(port_epoch)


@dataclass(frozen=True)
class Rules:
    """The rules of the cut (docs/architecture.md), as the explored network keeps them. ``colors`` is for telling."""

    plans: Mapping[tuple[str, str], Plan] = field(default_factory=lambda: EXPLORED_PLANS)
    admits: Admission = admitted
    holds_outbound: bool = True
    waits_for_old_frames: bool = True
    one_cut_at_a_time: bool = True
    advances_on_abort: bool = True
    fresh_vlan: bool = True
    colors: int = color.COLORS


SOUND = Rules()
"""All rules as they are."""


@dataclass(frozen=True)
class LosslessRules:
    """The rules by which the policy "hold" loses nothing and its channel state is exact, each of which can be broken.

    Of the network and the coordinator: edges are armed first, then the network, then VMs are cut; the old color is
    retired, then the network is disarmed, then the edges step aside. Of an edge: what it waits for and what it records.
    """

    plans: Mapping[tuple[str, str], Plan] = field(default_factory=lambda: EXPLORED_PLANS)
    admits: Admission = admitted
    edges_armed_first: bool = True
    network_armed_first: bool = True
    retires_first: bool = True
    disarms_first: bool = True
    keeps_future: bool = True
    drains_before_cut: bool = True
    colored_before_recolor: bool = True
    reads_before_release: bool = True
    reads_before_return: bool = True
    consumes_before_return: bool = True
    records_held: bool = True
    records_sent: bool = True
    sent_before_the_stop_only: bool = True
    sent_record_begins_with_hold: bool = True
    untagged_is_new_after_cut: bool = True
    adopts_colors_found: bool = True
    network_remembers: bool = True
    dead_agent_dooms: bool = True


LOSSLESS = LosslessRules()
"""All of them as they are."""
