"""Each rule of the cut, relaxed alone: the sentence of the design that it breaks, and the world in which it shows.

Theory of operation. A relaxation replaces one field of :class:`geni_violin.check.rules.Rules`, or of
:class:`~geni_violin.check.rules.LosslessRules`: a permuted plan, another admission, another rule for when something may
begin. The explorer then looks for harm: an orphan; a color that lies (a frame is taken for one from the future that is
not); and, where frames are held, a frame that is lost, overtaken, or in the channel state when it should not be, or the
other way round. It must find some, or the rule would not be needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from geni_violin.check.bounds import (
    COLORS,
    CONTROLLER_RESTART,
    DEAD_AGENT,
    EMPTY_SWITCH,
    ORPHANS,
    Bounds,
    LosslessBounds,
)
from geni_violin.check.explore import explore
from geni_violin.check.lossless import Lossless
from geni_violin.check.lossless_story import tell as tell_lossless
from geni_violin.check.rules import EXPLORED_PLANS, SOUND, SWITCH, LosslessRules, Rules
from geni_violin.check.transcript import tell
from geni_violin.check.vm import PAUSED
from geni_violin.check.world import World
from geni_violin.core.color import Relation, color_of, relation
from geni_violin.core.cut import (
    BACKGROUND,
    BACKGROUND_HOLDING,
    BACKGROUND_PAUSED_HOLDING,
    PLANS,
    STOP,
    Action,
    FramesReleased,
    Plan,
    PortsRecolored,
    Report,
    Step,
    VmStopped,
)


@dataclass(frozen=True)
class Relaxation:
    """A broken rule. ``sentence`` is the design's; ``bounds`` are of the smallest world that shows the harm."""

    name: str
    sentence: str
    rules: Rules | LosslessRules
    bounds: Bounds | LosslessBounds


@dataclass(frozen=True)
class Counterexample:
    """What a relaxation led to. ``judgments`` is what ``core.history`` finds in it, in words."""

    harm: str
    lines: tuple[str, ...]
    judgments: tuple[str, ...]
    states: int


def _plans(**changed: Plan) -> Mapping[tuple[str, str], Plan]:
    """The real plans, with other ones for these strategies and the policy "drop"."""
    return MappingProxyType({**PLANS, **{(strategy, "drop"): plan for strategy, plan in changed.items()}})


def _admits_future(frame_epoch: int, port_epoch: int) -> bool:
    return relation(color_of(frame_epoch), color_of(port_epoch)) in Relation


def _two_colors(frame_epoch: int, port_epoch: int) -> bool:
    return frame_epoch % 2 in {port_epoch % 2, max(port_epoch - 1, 0) % 2}


_TRIGGER, _HOLD, _START, _RECOLOR, _RELEASE, _STREAM = BACKGROUND
_, _PAUSE, _STOP_RECOLOR, _SEND, _RESUME = STOP

RECOLOR_BEFORE_CUT: Plan = (_TRIGGER, _STOP_RECOLOR, _PAUSE, _SEND, _RESUME)
RELEASE_BEFORE_BARRIER: Plan = (
    _TRIGGER,
    _HOLD,
    _START,
    Step(Action.RECOLOR_PORTS, ()),
    Step(Action.RELEASE_FRAMES, (FramesReleased, PortsRecolored), Report.CUT),
    _STREAM,
)
PAUSE_WITHOUT_CONFIRMATION: Plan = (
    _TRIGGER,
    Step(Action.PAUSE_VM, ()),
    Step(Action.RECOLOR_PORTS, (VmStopped, PortsRecolored), Report.CUT),
    _SEND,
    _RESUME,
)

_BUFFER = Bounds(("background",) * 2, cuts=1, frames=1, judges=frozenset({ORPHANS}))
_PAUSED = replace(_BUFFER, strategies=("stop",) * 2)
_COLORS = frozenset({ORPHANS, COLORS})

_ARM, _, _, _, _, _, _DISARMED, _RETURN, _ = BACKGROUND_HOLDING
RELEASE_BEFORE_CUT: Plan = (
    *(_ARM, _TRIGGER, _HOLD, replace(_RELEASE, report=None), _START, replace(_RECOLOR, report=Report.CUT)),
    *(_DISARMED, _RETURN, _STREAM),
)

_INBOUND, _STOP_FIRST, _, _RESUMING = BACKGROUND_PAUSED_HOLDING[2:6]
RESUMED_BEFORE_RECOLOR: Plan = (
    *(_ARM, _TRIGGER, _INBOUND, _STOP_FIRST, _RESUMING, replace(_RECOLOR, report=None), _RELEASE),
    *(_DISARMED, _RETURN, _STREAM),
)

_IN_SWITCH = LosslessBounds(((PAUSED, SWITCH),) * 2, cuts=1, frames=1, strict=False)
_HELD = LosslessBounds((("background", "hold"),) * 2, cuts=1, frames=1, strict=False)


def _held(name: str, sentence: str, rules: LosslessRules, bounds: LosslessBounds = _HELD) -> Relaxation:
    """A relaxation of one of the rules by which frames are held."""
    return Relaxation(name, sentence, rules, bounds)


HOLDING = (
    _held(
        "future-frames-pass",
        "An armed edge keeps every frame of the new color until its VM is cut.",
        LosslessRules(keeps_future=False),
    ),
    _held(
        "release-before-cut",
        "Held frames are let in only after the cut.",
        LosslessRules(plans=MappingProxyType({**PLANS, ("background", "hold"): RELEASE_BEFORE_CUT})),
    ),
    _held(
        "network-armed-before-edges",
        "The network is armed only when every edge is.",
        LosslessRules(edges_armed_first=False),
    ),
    _held(
        "cut-before-network-armed",
        "VMs are cut only when the network is armed.",
        LosslessRules(network_armed_first=False),
    ),
    _held(
        "held-with-frames-injected",
        "The edge holds only when the VM has consumed all that was passed on to it.",
        LosslessRules(drains_before_cut=False),
    ),
    _held(
        "old-frames-not-recorded",
        "Every frame of the old color that comes after the hold is recorded.",
        LosslessRules(records_held=False),
    ),
    _held(
        "late-frames-left-out",
        "What was sent before the cut and leaves in the new color is in the channel state too.",
        LosslessRules(records_sent=False),
    ),
    _held(
        "sent-record-ignores-the-stop",
        "Of the frames held on their way out those are in transit that were sent before the stop.",
        LosslessRules(sent_before_the_stop_only=False),
    ),
    _held(
        "sent-record-begins-too-early",
        "The record of sent frames begins exactly where the hold does.",
        LosslessRules(sent_record_begins_with_hold=False),
    ),
    _held(
        "recolor-with-frames-in-the-tap",
        "What left a VM before its hold is colored before its ports are recolored.",
        LosslessRules(colored_before_recolor=False),
    ),
    _held(
        "release-with-untagged-frames-in-the-tap",
        "What came to a port before it was armed is read before its VM's edge lets go.",
        LosslessRules(reads_before_release=False),
    ),
    _held(
        "untagged-frames-are-old",
        "A frame without a tag that comes after the cut is of the new color.",
        LosslessRules(untagged_is_new_after_cut=False),
    ),
    _held(
        "disarm-before-retirement",
        "The network is disarmed only when no frame of the old color is alive.",
        LosslessRules(retires_first=False),
    ),
    _held(
        "path-returned-before-disarm",
        "The edges step aside only when the network is disarmed.",
        LosslessRules(disarms_first=False),
    ),
    _held(
        "divert-off-with-tagged-frames-in-the-tap",
        "What came to a port while it was armed is read before the edge steps aside.",
        LosslessRules(reads_before_return=False),
    ),
    _held(
        "direct-path-with-frames-injected",
        "Between the diversion and the direct path frames are kept until all that was diverted is consumed.",
        LosslessRules(consumes_before_return=False),
        replace(_HELD, frames=2),
    ),
    _held(
        "resumed-before-recolor",
        "A VM whose sent frames nobody holds does not run between its stop and the recolor of its ports.",
        LosslessRules(plans=MappingProxyType({**EXPLORED_PLANS, (PAUSED, SWITCH): RESUMED_BEFORE_RECOLOR})),
        _IN_SWITCH,
    ),
    _held(
        "hold-port-left-with-frames-in-it",
        "What came to a hold port is read, and passed on, before the port is left.",
        LosslessRules(reads_before_return=False),
        _IN_SWITCH,
    ),
    _held(
        "controller-adopts-nothing",
        "A controller that starts adopts the colors that it finds in the switches.",
        LosslessRules(adopts_colors_found=False),
        replace(_HELD, faults=(CONTROLLER_RESTART,)),
    ),
    _held(
        "two-memories-lost",
        "A switch and the controller do not lose their memory at the same time in the middle of a cut.",
        LosslessRules(network_remembers=False),
        replace(_HELD, faults=(CONTROLLER_RESTART, EMPTY_SWITCH)),
    ),
    _held(
        "dead-agent-is-forgiven",
        "A snapshot in which an agent died is not committed.",
        LosslessRules(dead_agent_dooms=False),
        replace(_HELD, aborts=True, faults=(DEAD_AGENT,)),
    ),
)
"""The rules by which the policy "hold" loses nothing, and restores what was in transit."""

RELAXATIONS: Mapping[str, Relaxation] = MappingProxyType(
    {
        relaxation.name: relaxation
        for relaxation in (
            Relaxation(
                "recolor-before-cut",
                "R2: no frame of the new color enters a VM before its cut.",
                replace(SOUND, plans=_plans(stop=RECOLOR_BEFORE_CUT)),
                _PAUSED,
            ),
            Relaxation(
                "release-before-barrier",
                "R1: no frame that a VM sends after its cut leaves its edge in the old color.",
                replace(SOUND, plans=_plans(background=RELEASE_BEFORE_BARRIER)),
                _BUFFER,
            ),
            Relaxation(
                "admit-future",
                "A frame of color f for a port of color d with f = d + 1 is held or dropped.",
                replace(SOUND, admits=_admits_future),
                _PAUSED,
            ),
            Relaxation(
                "two-colors",
                "Three colors are what allows in-transit frames to be delivered; with two, an old frame could be taken "
                "for a new one.",
                replace(SOUND, admits=_two_colors, colors=2),
                replace(_PAUSED, first_epoch=1),
            ),
            Relaxation(
                "next-cut-too-early",
                "The next cut starts only when no frame of the color before last can be alive.",
                replace(SOUND, waits_for_old_frames=False),
                replace(_PAUSED, cuts=2, judges=_COLORS),
            ),
            Relaxation(
                "two-cuts-at-once",
                "One cut at a time per slice: at most two adjacent epochs are alive.",
                replace(SOUND, one_cut_at_a_time=False),
                replace(_PAUSED, cuts=2, first_epoch=1),
            ),
            Relaxation(
                "outbound-not-held",
                "Buffer the VM's frames at its edge, both directions.",
                replace(SOUND, holds_outbound=False),
                _BUFFER,
            ),
            Relaxation(
                "roll-back-on-abort",
                "Colors only advance. An aborted snapshot never rolls a port back.",
                replace(SOUND, advances_on_abort=False),
                replace(_PAUSED, aborts=True, judges=_COLORS),
            ),
            Relaxation(
                "same-vlan-after-restore",
                "R3: no frame of a slice's earlier life enters a restored VM.",
                replace(SOUND, fresh_vlan=False),
                replace(_PAUSED, restores=True),
            ),
            Relaxation(
                "pause-without-confirmation",
                "Pause the VM and see that it is paused; then recolor its ports.",
                replace(SOUND, plans=_plans(stop=PAUSE_WITHOUT_CONFIRMATION)),
                _PAUSED,
            ),
        )
    }
    | {relaxation.name: relaxation for relaxation in HOLDING}
)
"""By name, in the order in which they are printed."""


def counterexample(relaxation: Relaxation) -> Counterexample | None:
    """A shortest way to harm; None if there is none."""
    if isinstance(relaxation.bounds, LosslessBounds):
        assert isinstance(relaxation.rules, LosslessRules)
        return _where_frames_are_held(Lossless(relaxation.bounds, relaxation.rules))
    assert isinstance(relaxation.rules, Rules)
    world = World(relaxation.bounds, relaxation.rules)
    found = explore(world)
    if not found.violation:
        return None
    story = tell(world, found.path)
    orphans = _judged("is an orphan of", story.orphans())
    return Counterexample(found.violation, tuple(story.lines), orphans, found.states)


def _where_frames_are_held(world: Lossless) -> Counterexample | None:
    found = explore(world)
    if not found.violation:
        return None
    story = tell_lossless(world, found.path)
    judgments = (
        *_judged("is an orphan of", story.orphans()),
        *_judged("is missing in the channel state of", story.missing()),
        *_judged("should not be in the channel state of", story.extra()),
    )
    return Counterexample(found.violation, tuple(story.lines), judgments, found.states)


def _judged(what: str, found: Mapping[int, frozenset[int]]) -> tuple[str, ...]:
    """A judgment on frames, by the epoch that a snapshot cut into, in words."""
    return tuple(
        f"frame {number} {what} the snapshot into epoch {epoch}"
        for epoch, numbers in found.items()
        for number in sorted(numbers)
    )
