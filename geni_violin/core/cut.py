"""How one VM is cut: a pure machine that the host agent runs, one instance a VM and cut.

Theory of operation. A strategy is a *plan*: a tuple of steps, each a command and the events that confirm it. The
machine sends a step's command, waits for its confirmations (in any order, some may come early) and goes on to the next.
The order of the steps is what keeps the two rules of the cut (docs/architecture.md), at every VM and without exception:

- R1, no frame sent after the cut leaves the edge in the old color: whatever lets frames out (the VM's resume, or the
  release of the held frames) comes after the recolor is confirmed.
- R2, no frame of the new color enters before the cut: what admits them (the recolor, or the release of the held frames
  at an edge that is armed) comes after the cut is confirmed.

:func:`geni_violin.core.plan_rules.plan_violations` states this for any plan, so that a new strategy is checked and not
believed. The *pause* order keeps the rules by a paused VM, the *buffer* order by held frames, so that the network's
round trip is no part of the downtime.

Which of the two a strategy can use is decided by the VM's edge. One in the hypervisor holds both directions. One in the
switch, a hold port on the VM's bridge, holds what goes to the VM only (:data:`SWITCH_PLANS`): there a VM must not run
between its stop and the recolor, so a background snapshot is taken of a VM that is paused already.

With the network policy "hold" a cut begins earlier and ends later. The VM's edge is *armed*: it lets frames of the old
color pass and keeps those of the new one. The cut itself waits for a trigger: the coordinator's request, or the first
future frame that reaches the edge (VTDC'07, section 5), whichever comes first. When the network says that no frame of
the old color is left, the edge steps aside again.

Whatever fails before the image has left (no confirmed recolor by the deadline, a broken stream, someone who
cancels), the machine *cancels*: migration ended, VM running, frames released, in this order. The VM then is pre, or
rather its epoch is of no interest: no image of it exists, the snapshot aborts. What a crash of the agent leaves is
mended the same way: a new agent cancels whatever it finds. An edge that was armed then passes everything on, until the
network is no longer armed either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType

from geni_violin.core.model import IN_HYPERVISOR, IN_SWITCH

# --- events: what happened --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EdgeArmed:
    """The VM's edge keeps every frame of the new color, and lets those of the old one pass."""


@dataclass(frozen=True)
class CutRequested:
    """The coordinator wants the cut, at once or after ``delay_ms`` (which spreads cuts on purpose)."""

    delay_ms: float = 0.0


@dataclass(frozen=True)
class FutureFrameSeen:
    """A frame of the new color has reached the edge: the second trigger."""


@dataclass(frozen=True)
class FramesHeld:
    """The VM's edge holds every frame that it can hold: both directions, or those to the VM."""


@dataclass(frozen=True)
class VmStopped:
    """The hypervisor stopped the VM: the cut event. ``at`` is in seconds since 1970."""

    at: float


@dataclass(frozen=True)
class VmResumed:
    """The VM runs again. ``at`` is in seconds since 1970."""

    at: float


@dataclass(frozen=True)
class MigrationPaused:
    """The migration waits before its last pass, with the VM stopped (QEMU's pre-switchover)."""


@dataclass(frozen=True)
class PortsRecolored:
    """Every switch has confirmed by a barrier reply that the VM's ports have the new color."""

    recolor_ms: float


@dataclass(frozen=True)
class FramesReleased:
    """The held frames went on, in order, and none is held any more."""


@dataclass(frozen=True)
class NetworkDisarmed:
    """No frame of the old color is alive, and the VM's ports get frames without a tag again."""


@dataclass(frozen=True)
class PathReturned:
    """The edge has stepped aside: frames reach the VM directly, as before it was armed."""


@dataclass(frozen=True)
class MigrationCompleted:
    """The last byte of the image has left."""

    sent_bytes: int


@dataclass(frozen=True)
class MigrationEnded:
    """A migration that was cancelled, or never begun, is over."""


@dataclass(frozen=True)
class StepFailed:
    """A command could not be carried out, or the migration failed."""

    reason: str


@dataclass(frozen=True)
class CancelRequested:
    """The coordinator wants this cut undone."""

    reason: str


@dataclass(frozen=True)
class DeadlinePassed:
    """A timer that was set has run out; ``name`` as in :class:`SetDeadline`."""

    name: str


@dataclass(frozen=True)
class VmDied:
    """The VM's process is gone."""


Event = (
    EdgeArmed
    | CutRequested
    | FutureFrameSeen
    | FramesHeld
    | VmStopped
    | VmResumed
    | MigrationPaused
    | PortsRecolored
    | FramesReleased
    | NetworkDisarmed
    | PathReturned
    | MigrationCompleted
    | MigrationEnded
    | StepFailed
    | CancelRequested
    | DeadlinePassed
    | VmDied
)

# --- commands: what is to be done -------------------------------------------------------------------------------------


class Action(Enum):
    """A command without arguments to the hypervisor, the ports or the controller."""

    ARM_EDGE = "arm edge"
    HOLD_FRAMES = "hold frames"
    HOLD_INBOUND = "hold inbound frames"
    PAUSE_VM = "pause VM"
    START_MIGRATION = "start migration"
    RECOLOR_PORTS = "recolor ports"
    CONTINUE_MIGRATION = "continue migration"
    RESUME_VM = "resume VM"
    RELEASE_FRAMES = "release frames"
    RETURN_PATH = "return path"
    CANCEL_MIGRATION = "cancel migration"


@dataclass(frozen=True)
class SetDeadline:
    """Deliver :class:`DeadlinePassed` at ``at_ms`` on the monotonic clock, unless the cut is over by then."""

    name: str
    at_ms: float


class Report(Enum):
    """Tell the coordinator; what to tell is in the state."""

    ARMED = "armed"
    CUT = "cut"
    SETTLED = "settled"
    STREAMED = "streamed"
    FAILED = "failed"


Command = Action | SetDeadline | Report

# --- plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A command (None: only wait), the events that confirm it, and what is reported once it is confirmed."""

    action: Action | None
    confirmed_by: tuple[type[Event], ...]
    report: Report | None = None


Plan = tuple[Step, ...]

TRIGGER = Step(None, (CutRequested,))

BACKGROUND: Plan = (
    TRIGGER,
    Step(Action.HOLD_FRAMES, (FramesHeld,)),
    Step(Action.START_MIGRATION, (VmStopped, VmResumed)),
    Step(Action.RECOLOR_PORTS, (PortsRecolored,)),
    Step(Action.RELEASE_FRAMES, (FramesReleased,), Report.CUT),
    Step(None, (MigrationCompleted,), Report.STREAMED),
)
"""Buffer order; QEMU's background-snapshot stops and resumes the VM by itself and streams memory as of the stop."""

PRECOPY: Plan = (
    TRIGGER,
    Step(Action.START_MIGRATION, (VmStopped, MigrationPaused)),
    Step(Action.RECOLOR_PORTS, (PortsRecolored,)),
    Step(Action.CONTINUE_MIGRATION, (MigrationCompleted,)),
    Step(Action.RESUME_VM, (VmResumed,), Report.CUT),
    Step(None, (), Report.STREAMED),
)
"""Pause order; the seeds' fake live migration, held at pause-before-switchover for the recolor."""

STOP: Plan = (
    TRIGGER,
    Step(Action.PAUSE_VM, (VmStopped,)),
    Step(Action.RECOLOR_PORTS, (PortsRecolored,), Report.CUT),
    Step(Action.START_MIGRATION, (MigrationCompleted,)),
    Step(Action.RESUME_VM, (VmResumed,), Report.STREAMED),
)
"""Pause order; VIOLIN 2007: the VM is down until the last byte has left."""

_ARM = Step(Action.ARM_EDGE, (EdgeArmed,), Report.ARMED)
_SETTLE = (Step(None, (NetworkDisarmed,)), Step(Action.RETURN_PATH, (PathReturned,), Report.SETTLED))

BACKGROUND_HOLDING: Plan = (_ARM, *BACKGROUND[:-1], *_SETTLE, BACKGROUND[-1])
"""As :data:`BACKGROUND`, with an armed edge."""

STOP_HOLDING: Plan = (
    _ARM,
    TRIGGER,
    Step(Action.HOLD_FRAMES, (FramesHeld,)),
    Step(Action.PAUSE_VM, (VmStopped,)),
    Step(Action.RECOLOR_PORTS, (PortsRecolored,)),
    Step(Action.START_MIGRATION, (MigrationCompleted,)),
    Step(Action.RESUME_VM, (VmResumed,)),
    Step(Action.RELEASE_FRAMES, (FramesReleased,), Report.CUT),
    *_SETTLE,
    Step(None, (), Report.STREAMED),
)
"""As :data:`STOP`, with an armed edge. The cut is reported late: until then the edge has to hold the VM's frames."""

PLANS: Mapping[tuple[str, str], Plan] = MappingProxyType(
    {
        ("background", "drop"): BACKGROUND,
        ("precopy", "drop"): PRECOPY,
        ("stop", "drop"): STOP,
        ("background", "hold"): BACKGROUND_HOLDING,
        ("stop", "hold"): STOP_HOLDING,
    }
)
"""By strategy and network policy. No plan holds frames through ``precopy``: its stop comes unannounced, so nobody could
tell which frames the VM had consumed before it."""

BACKGROUND_PAUSED: Plan = (
    TRIGGER,
    Step(Action.PAUSE_VM, (VmStopped,)),
    Step(Action.RECOLOR_PORTS, (PortsRecolored,)),
    Step(Action.START_MIGRATION, (VmResumed,), Report.CUT),
    Step(None, (MigrationCompleted,), Report.STREAMED),
)
"""Pause order; QEMU's background-snapshot of a VM that is paused is of the instant of the pause, and it resumes the VM
by itself. The recolor's round trip is a part of the downtime; what the VM sends need not be held."""

_HOLD_INBOUND = Step(Action.HOLD_INBOUND, (FramesHeld,))

BACKGROUND_PAUSED_HOLDING: Plan = (
    _ARM,
    TRIGGER,
    _HOLD_INBOUND,
    *BACKGROUND_PAUSED[1:3],
    Step(Action.START_MIGRATION, (VmResumed,)),
    Step(Action.RELEASE_FRAMES, (FramesReleased,), Report.CUT),
    *_SETTLE,
    Step(None, (MigrationCompleted,), Report.STREAMED),
)
"""As :data:`BACKGROUND_PAUSED`, with an armed edge that holds what goes to the VM."""

SWITCH_PLANS: Mapping[tuple[str, str], Plan] = MappingProxyType(
    {
        **PLANS,
        ("background", "drop"): BACKGROUND_PAUSED,
        ("background", "hold"): BACKGROUND_PAUSED_HOLDING,
        ("stop", "hold"): tuple(_HOLD_INBOUND if s.action is Action.HOLD_FRAMES else s for s in STOP_HOLDING),
    }
)
"""As :data:`PLANS`, for VMs whose edge is in the switch."""

_NETWORK_ACTIONS = (Action.HOLD_FRAMES, Action.RECOLOR_PORTS, Action.RELEASE_FRAMES)


def plans_at(place: str) -> Mapping[tuple[str, str], Plan]:
    """The plans for an edge that is there: :data:`~geni_violin.core.model.IN_SWITCH`, or in the hypervisor."""
    return SWITCH_PLANS if place == IN_SWITCH else PLANS


def plan_for(strategy: str, network: str, coordination: str, place: str = IN_HYPERVISOR) -> Plan:
    """The plan of a strategy and network policy; with coordination "none" the network's steps are left out.

    Nothing is held or recolored then, so it does not matter in which ``place`` the VM's edge is.

    :raise KeyError: there is no such plan.
    """
    if coordination == "none":
        return tuple(
            Step(None, (), step.report) if step.action in _NETWORK_ACTIONS else step for step in PLANS[strategy, "drop"]
        )
    return plans_at(place)[strategy, network]


# --- the machine ------------------------------------------------------------------------------------------------------


class Phase(Enum):
    """Where a cut is. CUTTING from its trigger until it is reported, then STREAMING; the last three are final."""

    WAITING = "waiting"
    CUTTING = "cutting"
    STREAMING = "streaming"
    CANCELLING = "cancelling"
    STREAMED = "streamed"
    CANCELLED = "cancelled"
    LOST = "lost"


FINAL = frozenset({Phase.STREAMED, Phase.CANCELLED, Phase.LOST})

DELAY, ARMED_DEADLINE, CUT_DEADLINE, STREAM_DEADLINE = "delay", "armed", "cut", "stream"
BY_COORDINATOR, BY_FUTURE_FRAME = "coordinator", "future frame"
"""What triggered a cut."""


@dataclass(frozen=True)
class CutState:
    """One VM's cut. ``step`` counts confirmed steps; ``seen`` holds the confirmations that are in.

    ``stopped_at`` and ``resumed_at`` are seconds since 1970; the deadlines are spans, counted from where the frames are
    first held or the VM is first stopped, because from there on the guest notices. An armed edge waits for its trigger
    as long as a cut may take.
    """

    plan: Plan
    cut_deadline_ms: float
    stream_deadline_ms: float
    phase: Phase = Phase.WAITING
    step: int = 0
    seen: frozenset[type[Event]] = frozenset()
    sent: frozenset[Action] = frozenset()
    deadline_set: bool = False
    requested: bool = False
    trigger: str = ""
    held_ms: float | None = None
    released_ms: float | None = None
    stopped_at: float | None = None
    resumed_at: float | None = None
    recolor_ms: float = 0.0
    sent_bytes: int = 0
    failure: str = ""

    @property
    def downtime_ms(self) -> float:
        """STOP to RESUME; 0 as long as one of them is missing."""
        if self.stopped_at is None or self.resumed_at is None:
            return 0.0
        return (self.resumed_at - self.stopped_at) * 1000.0

    @property
    def hold_ms(self) -> float:
        """How long the VM's frames waited; 0 as long as they do."""
        return 0.0 if self.held_ms is None or self.released_ms is None else self.released_ms - self.held_ms


Transition = tuple[CutState, tuple[Command, ...]]


def begin(state: CutState, now_ms: float) -> Transition:
    """Start a cut: what can be done before its trigger."""
    begun, commands = _advance(state, now_ms)
    if Action.ARM_EDGE in begun.sent:
        return begun, (SetDeadline(ARMED_DEADLINE, now_ms + state.cut_deadline_ms), *commands)
    return begun, commands


def step(state: CutState, event: Event, now_ms: float) -> Transition:
    """The next state and what is to be done, given what happened."""
    if state.phase in FINAL:
        return state, ()
    match event:
        case VmDied():
            return _fail(state, "the VM's process is gone", Phase.LOST)
        case CutRequested(delay_ms) if delay_ms > 0:
            return replace(state, requested=True), (SetDeadline(DELAY, now_ms + delay_ms),)
        case CutRequested() | FutureFrameSeen() | DeadlinePassed("delay"):
            return _trigger(state, event, now_ms)
        case DeadlinePassed(name):
            return _on_deadline(state, name)
        case StepFailed(reason) | CancelRequested(reason):
            return (state, ()) if state.phase is Phase.CANCELLING else _cancel(state, reason)
    if not _expected(state, event):
        return state, ()
    noted = _note(state, event, now_ms)
    return _finish_cancel(noted) if noted.phase is Phase.CANCELLING else _advance(noted, now_ms)


def _trigger(state: CutState, event: Event, now_ms: float) -> Transition:
    """The first trigger starts the cut; the others come too late. The order of arming and trigger does not matter."""
    if state.trigger or state.phase is Phase.CANCELLING:
        return state, ()
    trigger = BY_FUTURE_FRAME if isinstance(event, FutureFrameSeen) else BY_COORDINATOR
    return _advance(replace(state, trigger=trigger, seen=state.seen | {CutRequested}), now_ms)


def _expected(state: CutState, event: Event) -> bool:
    """Whether a command that this event confirms was sent, or nothing but a wait is confirmed by it.

    Someone else may pause and resume the VM before its cut: that is no cut event, and not the resume after it.
    """
    if state.phase is Phase.CANCELLING:
        return True
    confirmed = (step for step in state.plan if type(event) in step.confirmed_by)
    return any(step.action is None or step.action in state.sent for step in confirmed)


def _note(state: CutState, event: Event, now_ms: float) -> CutState:
    """Remember a confirmation and what it tells. A VM's first stop is its cut event; a later one is not."""
    seen = replace(state, seen=state.seen | {type(event)})
    match event:
        case FramesHeld() if state.held_ms is None:
            return replace(seen, held_ms=now_ms)
        case FramesReleased() if state.released_ms is None:
            return replace(seen, released_ms=now_ms)
        case VmStopped(at) if state.stopped_at is None:
            return replace(seen, stopped_at=at)
        case VmResumed(at) if state.resumed_at is None:
            return replace(seen, resumed_at=at)
        case PortsRecolored(recolor_ms):
            return replace(seen, recolor_ms=recolor_ms)
        case MigrationCompleted(sent_bytes):
            return replace(seen, sent_bytes=sent_bytes)
    return seen


def _advance(state: CutState, now_ms: float) -> Transition:
    """Send the current step's command if it is not sent; go on over every step that is confirmed."""
    commands: list[Command] = []
    while state.step < len(state.plan):
        current = state.plan[state.step]
        if current.action is not None and current.action not in state.sent:
            commands.append(current.action)
            state = replace(state, sent=state.sent | {current.action})
        if not set(current.confirmed_by) <= state.seen:
            break
        state = replace(state, step=state.step + 1, phase=_phase_after(state.phase, current))
        if current.report is not None:
            commands.append(current.report)
    state, deadlines = _deadlines(state, now_ms)
    return state, (*deadlines, *commands)


def _phase_after(phase: Phase, confirmed: Step) -> Phase:
    """The phase that a cut is in when a step of it is confirmed."""
    if confirmed == TRIGGER:
        return Phase.CUTTING
    return {Report.CUT: Phase.STREAMING, Report.STREAMED: Phase.STREAMED}.get(confirmed.report or Report.ARMED, phase)


def _deadlines(state: CutState, now_ms: float) -> tuple[CutState, tuple[SetDeadline, ...]]:
    """Set the deadlines once, when the guest can first notice the cut."""
    noticed = state.stopped_at is not None or state.sent & {Action.HOLD_FRAMES, Action.HOLD_INBOUND, Action.PAUSE_VM}
    if state.deadline_set or not noticed:
        return state, ()
    spans = ((CUT_DEADLINE, state.cut_deadline_ms), (STREAM_DEADLINE, state.stream_deadline_ms))
    return replace(state, deadline_set=True), tuple(SetDeadline(name, now_ms + span) for name, span in spans)


def _on_deadline(state: CutState, name: str) -> Transition:
    """Cancel what is not done in time. The cut deadline is met once the ports are recolored."""
    if name == ARMED_DEADLINE:
        return _on_armed_deadline(state)
    met = PortsRecolored in state.seen or Action.RECOLOR_PORTS not in {step.action for step in state.plan}
    if state.phase is Phase.CANCELLING or (name == CUT_DEADLINE and met):
        return state, ()
    what = "the cut was not confirmed" if name == CUT_DEADLINE else "the image had not left"
    return _cancel(state, f"{what} within its deadline")


def _on_armed_deadline(state: CutState) -> Transition:
    """Cancel a cut whose edge is not armed by now, or for which nobody has asked."""
    if state.phase is not Phase.WAITING:
        return state, ()
    if EdgeArmed not in state.seen:
        return _cancel(state, "the edge was not armed within its deadline")
    return (state, ()) if state.requested else _cancel(state, "no cut came within the deadline of the armed edge")


def _cancel(state: CutState, reason: str) -> Transition:
    """Undo the cut. The order matters: no image may come into being once frames are let out."""
    cancelling = replace(state, phase=Phase.CANCELLING, failure=reason, seen=state.seen - {VmResumed, FramesReleased})
    if not state.sent:
        return _finish_cancel(replace(cancelling, seen=frozenset({MigrationEnded, VmResumed, FramesReleased})))
    return cancelling, (Action.CANCEL_MIGRATION, Action.RESUME_VM, Action.RELEASE_FRAMES)


def _finish_cancel(state: CutState) -> Transition:
    if not {MigrationEnded, VmResumed, FramesReleased} <= state.seen:
        return state, ()
    return _fail(state, state.failure, Phase.CANCELLED)


def _fail(state: CutState, reason: str, phase: Phase) -> Transition:
    return replace(state, phase=phase, failure=reason), (Report.FAILED,)
