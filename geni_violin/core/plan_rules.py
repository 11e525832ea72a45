"""Which rules of the cut a plan keeps: every strategy, also a new one, is checked and not believed.

Theory of operation. A plan is a sequence of steps; a rule says that one thing (a command sent, an event confirmed, a
report made) comes only after another. Rules say nothing of what a plan never does, unless it has to do it. That plans
which break a rule do harm, and others none, is what ``geni_violin.check`` shows.
"""

from geni_violin.core.cut import (
    Action,
    CutRequested,
    EdgeArmed,
    Event,
    FramesHeld,
    FramesReleased,
    MigrationCompleted,
    NetworkDisarmed,
    PathReturned,
    Plan,
    PortsRecolored,
    Report,
    VmResumed,
    VmStopped,
)

_HOLDS = (Action.HOLD_FRAMES, Action.HOLD_INBOUND)


class _Order:
    """When the steps of a plan send, confirm and report what; None is never."""

    def __init__(self, plan: Plan) -> None:
        self._sent = {step.action: number for number, step in enumerate(plan)}
        self._confirmed = {event: number for number, step in enumerate(plan) for event in step.confirmed_by}
        self._reported = {step.report: number for number, step in enumerate(plan)}
        self.length = len(plan)

    def sent(self, *actions: Action) -> int | None:
        """The first step that sends one of these."""
        return min((self._sent[action] for action in actions if action in self._sent), default=None)

    def confirmed(self, event: type[Event]) -> int | None:
        """The step that this event confirms."""
        return self._confirmed.get(event)

    def resuming(self) -> int | None:
        """The step that lets the VM run again: a resume, or else a migration in the background, which does it too."""
        resume, migration = self.sent(Action.RESUME_VM), self.sent(Action.START_MIGRATION)
        return migration if resume is None and migration == self.confirmed(VmResumed) else resume

    def reported(self, report: Report) -> int | None:
        """The step that is reported so once it is confirmed."""
        return self._reported.get(report)


def _follows(later: int | None, earlier: int | None) -> bool:
    """Whether the one comes only after the other; what never comes is not too early."""
    return later is None or (earlier is not None and earlier < later)


def plan_violations(plan: Plan) -> tuple[str, ...]:
    """Which rules of the cut a plan breaks, in words; empty for a sound one."""
    order = _Order(plan)
    edge = _edge_rules(order) if order.sent(Action.ARM_EDGE) is not None else {}
    return tuple(rule for rule, kept in {**_cut_rules(order), **edge, **_end_rules(order)}.items() if not kept)


def _cut_rules(order: _Order) -> dict[str, bool]:
    """What R1 and R2 ask of every plan, and whether it is so."""
    holds_outbound, held = order.sent(Action.HOLD_FRAMES) is not None, order.sent(*_HOLDS)
    stop, recolored = order.sent(Action.PAUSE_VM, Action.START_MIGRATION), order.confirmed(PortsRecolored)
    resume, runs = order.resuming(), order.confirmed(VmResumed)
    lets_out = order.sent(Action.RELEASE_FRAMES) if holds_outbound else resume
    touches = order.sent(*_HOLDS, Action.PAUSE_VM, Action.START_MIGRATION, Action.RECOLOR_PORTS)
    return {
        "the cut begins before its trigger": _follows(touches, order.confirmed(CutRequested)),
        "R1: frames are let out before the recolor is confirmed": recolored is not None
        and _follows(lets_out, recolored),
        "R2: the recolor does not wait for the cut": _follows(
            order.sent(Action.RECOLOR_PORTS), order.confirmed(VmStopped)
        ),
        "R1: frames are not held before the cut": held is None or _follows(stop, order.confirmed(FramesHeld)),
        "R1: the VM runs without held frames before the recolor is confirmed": holds_outbound
        or (runs is not None and resume is not None and runs >= resume and _follows(runs, recolored)),
    }


def _edge_rules(order: _Order) -> dict[str, bool]:
    """What an edge that is armed asks of a plan, and whether it is so."""
    release, cut = order.sent(Action.RELEASE_FRAMES), order.reported(Report.CUT)
    armed, disarmed, returned = (order.confirmed(event) for event in (EdgeArmed, NetworkDisarmed, PathReturned))
    return {
        "R2: held frames of the new color are let in before the cut": _follows(release, order.confirmed(VmStopped)),
        "R2: an armed edge holds nothing": order.sent(*_HOLDS) is not None,
        "a cut begins before the edge is armed": armed is not None and _follows(order.confirmed(CutRequested), armed),
        "the edge is reported to be armed before it is": armed is not None
        and _follows_or_is(order.reported(Report.ARMED), armed),
        "the cut is reported while the edge still holds frames": _follows_or_is(cut, order.confirmed(FramesReleased)),
        "the edge waits for a network that waits for the cut's report": _follows(disarmed, cut),
        "the edge steps aside before the network is disarmed": disarmed is not None
        and _follows(order.sent(Action.RETURN_PATH), disarmed),
        "the edge never steps aside, or is reported to before it has": returned is not None
        and _follows_or_is(order.reported(Report.SETTLED), returned),
    }


def _follows_or_is(later: int | None, earlier: int | None) -> bool:
    return later is not None and earlier is not None and earlier <= later


def _end_rules(order: _Order) -> dict[str, bool]:
    """What must be so when a plan is through, and whether it is."""
    return {
        "the cut is reported before the ports are recolored": _follows_or_is(
            order.reported(Report.CUT), order.confirmed(PortsRecolored)
        ),
        "the image is reported to have left before it has": _follows_or_is(
            order.reported(Report.STREAMED), order.confirmed(MigrationCompleted)
        ),
        "the image is not of the cut event: the VM is resumed before it has left": _follows(
            order.sent(Action.RESUME_VM), order.confirmed(MigrationCompleted)
        ),
        "the VM may stay paused: the cut ends before its last step": order.reported(Report.STREAMED)
        == order.length - 1,
    }
