"""What ``python -m geni_violin.check`` explores: the sound system from several sides.

Theory of operation. One world with everything in it would be too large, and most of its states would say nothing new.
So each exploration here is exhaustive within its own bounds, and together they cover what may meet: each order with
all frames; strategies and network policies mixed; snapshots that fail at any point; a restore; colors that wrap around;
what may befall controller, switches and agents; and, apart from frames, the transaction with its parties and one agent
with its failures. Each must also have seen what it is about
(``must_see``): a search in which no frame was ever in transit would prove nothing.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice

from geni_violin.check.agent import Agent
from geni_violin.check.bounds import CONTROLLER_RESTART, DEAD_AGENT, EMPTY_SWITCH, Bounds, LosslessBounds
from geni_violin.check.control import Control
from geni_violin.check.explore import Exploration, Model, State, explore, retrace
from geni_violin.check.frames import OVERTAKING
from geni_violin.check.lossless import Lossless
from geni_violin.check.lossless_story import tell as tell_held
from geni_violin.check.rules import EXPLORED_PLANS, SWITCH
from geni_violin.check.transcript import tell
from geni_violin.check.vm import PAUSED
from geni_violin.check.world import World
from geni_violin.core.cut import Plan, plan_for

_IN_TRANSIT, _DROPPED = "a frame in transit is received", "a future frame is dropped"
_LATE, _LOST = "a frame sent before the cut is colored after it", "a frame is lost"
_ALL_KINDS = (_IN_TRANSIT, _DROPPED, _LATE, _LOST)
_FUTURE_HELD, _RECORDED = "a future frame is held", "a frame passes and is recorded"
_ALL_KINDS_HELD = (_FUTURE_HELD, _RECORDED, "a frame is held and is recorded", _LATE, "port disarmed", "step aside")
_ALL_KINDS_IN_SWITCH = (*_ALL_KINDS_HELD[:3], "port disarmed", "leave")
_HOLD, _DROP = ("background", "hold"), ("background", "drop")
_SWITCH, _SWITCH_STOP, _PAUSED = (PAUSED, SWITCH), ("stop", SWITCH), (PAUSED, "drop")
_STOP, _PRECOPY = ("stop", "hold"), ("precopy", "drop")


@dataclass(frozen=True)
class Check:
    """One exploration: what it is about, its bounds, and the kinds of moves that it must have seen."""

    name: str
    about: str
    run: Callable[[], "Outcome"]
    must_see: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of it. ``story`` leads to the violation; ``unseen`` is what should have happened and never did."""

    states: int
    moves: int
    violation: str = ""
    story: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    unseen: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was found, in a search that could have found something."""
        return not self.violation and not self.unseen


def perform(check: Check) -> Outcome:
    """Run one exploration."""
    began = time.monotonic()
    outcome = check.run()
    outcome.seconds = time.monotonic() - began
    outcome.unseen = tuple(kind for kind in check.must_see if not outcome.kinds[kind])
    return outcome


def checks(vms: int, cuts: int, frames: int) -> Mapping[str, Check]:
    """All explorations for so many VMs, cuts, and frames on their way at once, by name."""
    found = (*_where_frames_are_dropped(vms, cuts, frames), *_where_frames_are_held(vms, cuts, frames), *_apart(vms))
    return {check.name: check for check in found}


def _where_frames_are_dropped(vms: int, cuts: int, frames: int) -> Iterator[Check]:
    """The policy "drop": an unreliable network, many VMs."""
    buffer, pause = ("background",) * vms, ("stop",) * vms
    mixed = tuple(islice(cycle(("background", "precopy", "stop")), vms))
    failing = ("background", *("precopy",) * (vms - 1))
    few = min(frames, 2)
    worlds = (
        ("buffer order", "every VM in the buffer order", Bounds(buffer, cuts, frames)),
        ("pause order", "every VM in the pause order", Bounds(pause, cuts, frames)),
        ("mixed", "strategies mixed in one slice", Bounds(mixed, cuts, few)),
        ("restore", "the committed slice is restored once", Bounds(buffer, cuts, few, restores=True)),
        ("failure", "snapshots fail, VMs cancelled at every point", Bounds(failing, cuts, 1, aborts=True)),
        ("wrap-around", "the same from epoch 2 on", Bounds(mixed, cuts, 1, first_epoch=2)),
    )
    for name, about, bounds in worlds:
        size = _size(len(bounds.strategies), bounds.cuts, bounds.frames)
        yield Check(name, f"{about}; {size}", _explores(bounds), _must_see(bounds))


def _where_frames_are_held(vms: int, cuts: int, frames: int) -> Iterator[Check]:
    """The policy "hold": a network that loses nothing, mostly between two VMs, because of all that may happen there."""
    few = min(frames, 2)
    fault_in_switch = partial(LosslessBounds, (_SWITCH, _SWITCH), 1)
    fault = partial(LosslessBounds, (_HOLD, _HOLD), 1)
    worlds = (
        ("held", "frames are held", LosslessBounds((_HOLD, _HOLD), cuts, frames)),
        ("held, many", "frames are held", LosslessBounds((_HOLD,) * vms, 1, few)),
        ("held, wrap-around", "the same, strategies mixed", LosslessBounds((_HOLD, _STOP), cuts, few, first_epoch=2)),
        ("held and dropped", "only one VM holds frames", LosslessBounds((_HOLD, _DROP), cuts, few)),
        ("held and paused", "the other is in the pause order", LosslessBounds((_HOLD, _PRECOPY), cuts, few)),
        ("held, failure", "snapshots fail", LosslessBounds((_HOLD, _HOLD), cuts, 1, aborts=True)),
        ("held, one failure", "one fails", LosslessBounds((_HOLD, _HOLD), 1, few, aborts=True)),
        ("held and dropped, failure", "snapshots fail", LosslessBounds((_HOLD, _DROP), cuts, 1, aborts=True)),
        ("in the switch", "frames are held in the switch", LosslessBounds((_SWITCH, _SWITCH), cuts, few)),
        ("in both", "in the switch and in a hypervisor", LosslessBounds((_SWITCH, _HOLD), 1, few, first_epoch=1)),
        ("in the switch, stopped", "strategies mixed", LosslessBounds((_SWITCH_STOP, _SWITCH), 1, few, first_epoch=2)),
        ("in the switch and dropped", "only one holds", LosslessBounds((_SWITCH, _PAUSED), cuts, 1)),
        ("in the switch, failure", "snapshots fail", LosslessBounds((_SWITCH, _SWITCH), cuts, 1, aborts=True)),
        ("in the switch, controller", "it restarts", fault_in_switch(1, faults=(CONTROLLER_RESTART,))),
        ("in the switch, agent", "an agent dies", fault_in_switch(1, aborts=True, faults=(DEAD_AGENT,))),
        ("controller", "the controller restarts", fault(few, faults=(CONTROLLER_RESTART,))),
        ("switch", "a switch restarts empty", fault(few, faults=(EMPTY_SWITCH,))),
        ("controller and switch", "one, then the other", fault(1, faults=(CONTROLLER_RESTART, EMPTY_SWITCH))),
        ("agent", "an agent dies, or the snapshot fails", fault(1, aborts=True, faults=(DEAD_AGENT,))),
    )
    for name, about, bounds in worlds:
        policies = "".join(" " + policy for _, policy in bounds.vms)
        size = _size(len(bounds.vms), bounds.cuts, bounds.frames)
        yield Check(name, f"{about};{policies}; {size}", _explores_held(bounds), _must_see_held(bounds))


def _apart(vms: int) -> Iterator[Check]:
    """What can be explored apart from frames: the transaction, and each strategy's cut."""
    must_see = ("coordinator: CoordinatorRestarted", "coordinator: TimerFired", "coordinator: ManifestPublished")
    for number, holding in ((vms, vms), (2, 1)):
        about = f"the transaction among its parties, {number} VMs of which {holding} hold frames"
        yield Check(f"transaction, {holding} of {number}", about, _control(number, holding), must_see)
    for (strategy, network), plan in EXPLORED_PLANS.items():
        yield Check(
            f"cut {strategy}, {network}",
            f"one VM's {strategy} cut with policy {network} among failures",
            _agent(strategy, network, plan),
            ("the VM dies", "a command fails"),
        )


def _size(vms: int, cuts: int, frames: int) -> str:
    return f"{vms} VMs, {_count(cuts, 'cut')}, {_count(frames, 'frame')} at once"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _must_see(bounds: Bounds) -> tuple[str, ...]:
    """What cannot be missing once there are two VMs, a cut and a frame."""
    if bounds.frames < 1 or bounds.cuts < 1 or len(bounds.strategies) < 2:
        return ()
    extra = ("cancel",) if bounds.aborts else ()
    return (*_ALL_KINDS, *extra, *(("the slice is restored",) if bounds.restores else ()))


def _explores(bounds: Bounds) -> Callable[[], Outcome]:
    def run() -> Outcome:
        world = World(bounds)
        seen = explore(world)
        return _outcome(seen, tell(world, seen.path).lines if seen.violation else [])

    return run


def _must_see_held(bounds: LosslessBounds) -> tuple[str, ...]:
    """What cannot be missing once there is a frame: held ones, and each kind that belongs in a channel state."""
    if bounds.frames < 1 or bounds.cuts < 1:
        return ()
    if "hold" not in {network for _, network in bounds.vms}:
        overtaken = (OVERTAKING,) if bounds.frames > 1 else ()
        return (*_ALL_KINDS_IN_SWITCH, *overtaken, *(("cancel",) if bounds.aborts else ()), *bounds.faults)
    return (*_ALL_KINDS_HELD, *(("cancel",) if bounds.aborts else ()), *bounds.faults)


def _explores_held(bounds: LosslessBounds) -> Callable[[], Outcome]:
    def run() -> Outcome:
        world = Lossless(bounds)
        seen = explore(world)
        return _outcome(seen, tell_held(world, seen.path).lines if seen.violation else [])

    return run


def _control(vms: int, holding: int) -> Callable[[], Outcome]:
    def run() -> Outcome:
        return _explore_plainly(Control(vms, holding))

    return run


def _agent(strategy: str, network: str, plan: Plan) -> Callable[[], Outcome]:
    """A strategy's cut, in a network that takes part and in one that does not."""

    uncoordinated = "background" if strategy == PAUSED else strategy

    def run() -> Outcome:
        colored, plain = (
            _explore_plainly(Agent(known, network, plan))
            for known, plan in ((strategy, plan), (uncoordinated, plan_for(uncoordinated, "drop", "none")))
        )
        worse = colored if colored.violation else plain
        counts = colored.states + plain.states, colored.moves + plain.moves
        return Outcome(*counts, worse.violation, worse.story, colored.kinds + plain.kinds)

    return run


def _explore_plainly(model: Model[State]) -> Outcome:
    """An exploration whose moves need no more telling than their names."""
    seen = explore(model)
    steps = retrace(model, seen.path) if seen.violation else []
    return _outcome(
        seen, [f"{step.move.kind} (vm{step.place + 1})" if step.place >= 0 else step.move.kind for step in steps]
    )


def _outcome(seen: Exploration[State], story: list[str]) -> Outcome:
    return Outcome(seen.states, seen.moves, seen.violation, story, seen.kinds)
