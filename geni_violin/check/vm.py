"""One VM, its edge and its port, driven by the real cut machine of ``core.cut``.

Theory of operation. The machine's commands become *effects*, which happen one at a time and later than the command.
What goes to the hypervisor and the edge is carried out in the order in which it was commanded; the recolor is the
controller's, so its two halves (ingress: the color that frames get; egress: what is admitted) happen beside that, in
either order. A confirmation reaches the machine with its effect: a later arrival could only delay what is done next,
and every effect is delayed at will anyway. Effects that no frame can notice (the end of a stream, the resume of a VM
that runs) happen at once.

What an armed edge does with frames is no concern of this module: see ``check.edge``.

``machine`` is a number that :class:`Machines` gave to a ``CutState``; so each transition of the real code is computed
once and looked up ever after.
"""

from collections.abc import Mapping
from typing import NamedTuple

from geni_violin.core import cut
from geni_violin.core.cut import Action, CutState, Phase, Plan

OUTBOUND, TAP, NETWORK, INBOUND = range(4)
"""Where a frame is: held as it leaves its VM; past that but not colored yet; colored; admitted but not received."""

INGRESS, EGRESS = 1, 2
DONE = -1
"""The machine of a VM that has no cut under way."""

PAUSED = "paused"
"""The strategy "background" of a VM whose edge is in the switch: it is paused before."""

MIGRATION: Mapping[str, Mapping[Action, tuple[str, ...]]] = {
    "background": {Action.START_MIGRATION: ("stop", "resume", "complete")},
    "precopy": {Action.START_MIGRATION: ("switchover",), Action.CONTINUE_MIGRATION: ("complete",)},
    "stop": {Action.START_MIGRATION: ("complete",)},
    PAUSED: {Action.START_MIGRATION: ("resume", "complete")},
}
_EFFECTS: Mapping[Action, tuple[str, ...]] = {
    Action.ARM_EDGE: ("arm",),
    Action.RETURN_PATH: ("return path",),
    Action.HOLD_FRAMES: ("hold",),
    Action.HOLD_INBOUND: ("hold inbound",),
    Action.PAUSE_VM: ("stop",),
    Action.RESUME_VM: ("resume",),
    Action.RELEASE_FRAMES: ("release",),
    Action.CANCEL_MIGRATION: ("cancel",),
}
_ENDED_BY_CANCEL = ("complete", "switchover")


class Frame(NamedTuple):
    """A frame on its way. ``epoch`` is its color's (-1: not colored yet); ``sent``: its sender's cuts so far."""

    place: int
    epoch: int
    sent: int
    life: int


class Vm(NamedTuple):
    """A VM with the frames that wait at it or are on their way to it. ``recolor`` has a bit for each half to come."""

    strategy: str
    machine: int
    todo: tuple[str, ...]
    recolor: int
    running: bool
    holding: bool
    ingress: int
    egress: int
    cuts: int
    frames: tuple[Frame, ...]


Answer = tuple[int, tuple[Action, ...]]
Plans = Mapping[tuple[str, str], Plan]
"""By strategy and network policy, as ``core.cut.PLANS``."""


class Machines:
    """Numbers for cut states, and a memory of what the real code answered."""

    def __init__(self, plans: Plans, forgets_the_end: bool = True) -> None:
        self._plans = plans
        self._forgets_the_end = forgets_the_end
        self._states: list[CutState] = []
        self._numbers: dict[CutState, int] = {}
        self._answers: dict[tuple[int, cut.Event], Answer] = {}
        self.steps = 0

    def begin(self, strategy: str, network: str = "drop") -> Answer:
        """A new machine that waits for its trigger, and its first commands."""
        self.steps += 1
        state, commands = cut.begin(CutState(self._plans[strategy, network], 1.0, 1.0), 0.0)
        return self._number(state), _actions(commands)

    def triggered(self, strategy: str) -> Answer:
        """A new machine whose cut the coordinator has asked for, and its first commands."""
        waiting, first = self.begin(strategy)
        machine, actions = self.step(waiting, cut.CutRequested())
        return machine, (*first, *actions)

    def step(self, machine: int, event: cut.Event) -> Answer:
        """What ``core.cut.step`` makes of it; DONE if the cut is over (unless told to keep how it ended)."""
        answer = self._answers.get((machine, event))
        if answer is None:
            self.steps += 1
            state, commands = cut.step(self._states[machine], event, 0.0)
            over = state.phase in cut.FINAL and self._forgets_the_end
            answer = (DONE if over else self._number(state)), _actions(commands)
            self._answers[machine, event] = answer
        return answer

    def state(self, machine: int) -> CutState:
        """The cut state of that number."""
        return self._states[machine]

    def _number(self, state: CutState) -> int:
        if state not in self._numbers:
            self._numbers[state] = len(self._states)
            self._states.append(state)
        return self._numbers[state]


def _actions(commands: tuple[cut.Command, ...]) -> tuple[Action, ...]:
    return tuple(command for command in commands if isinstance(command, Action))


def command(vm: Vm, actions: tuple[Action, ...]) -> Vm:
    """Put the effects of commands in line."""
    for action in actions:
        if action is Action.RECOLOR_PORTS:
            vm = vm._replace(recolor=INGRESS | EGRESS)
            continue
        todo = vm.todo
        if action is Action.CANCEL_MIGRATION:
            todo = tuple(effect for effect in todo if effect not in _ENDED_BY_CANCEL)
        vm = vm._replace(todo=todo + (MIGRATION[vm.strategy].get(action) or _EFFECTS[action]))
    return vm


def tell(machines: Machines, vm: Vm, *events: cut.Event) -> Vm:
    """Events reach the VM's machine; what it commands is put in line."""
    for event in events:
        if vm.machine != DONE:
            machine, actions = machines.step(vm.machine, event)
            vm = command(vm._replace(machine=machine), actions)
    return vm


def perform(vm: Vm, epoch: int) -> tuple[Vm, tuple[cut.Event, ...]]:
    """The first effect in line happens; ``epoch`` is what the present snapshot cuts into."""
    effect, vm = vm.todo[0], vm._replace(todo=vm.todo[1:])
    match effect:
        case "arm":
            return vm, (cut.EdgeArmed(),)
        case "return path":
            return vm, (cut.PathReturned(),)
        case "hold":
            return vm._replace(holding=True), (cut.FramesHeld(),)
        case "hold inbound":
            return vm, (cut.FramesHeld(),)
        case "stop":
            return vm._replace(running=False, cuts=epoch), (cut.VmStopped(0.0),)
        case "switchover":
            return vm._replace(running=False, cuts=epoch), (cut.VmStopped(0.0), cut.MigrationPaused())
        case "resume":
            return vm._replace(running=True), (cut.VmResumed(0.0),)
        case "complete":
            return vm, (cut.MigrationCompleted(0),)
        case "cancel":
            return vm, (cut.MigrationEnded(),)
    frames = (frame._replace(place=TAP) if frame.place == OUTBOUND else frame for frame in vm.frames)
    return vm._replace(holding=False, frames=tuple(sorted(frames))), (cut.FramesReleased(),)


def unnoticed(vm: Vm) -> bool:
    """Whether no frame can notice the next effect."""
    effect = vm.todo[0] if vm.todo else ""
    if effect in ("complete", "cancel"):
        return True
    return (effect == "resume" and vm.running) or (effect == "release" and not vm.holding)


def happen(machines: Machines, vm: Vm, epoch: int) -> Vm:
    """The next effect, its confirmation, and then everything that nobody notices."""
    vm, events = perform(vm, epoch)
    return calm(machines, tell(machines, vm, *events), epoch)


def calm(machines: Machines, vm: Vm, epoch: int) -> Vm:
    """All effects that nobody notices."""
    while unnoticed(vm):
        vm, events = perform(vm, epoch)
        vm = tell(machines, vm, *events)
    return vm


def recolored(machines: Machines, vm: Vm, half: int, epoch: int) -> Vm:
    """One half of the port's rules changes; when both have, the barrier reply confirms it."""
    ingress, egress = (epoch, vm.egress) if half == INGRESS else (vm.ingress, epoch)
    after = vm._replace(ingress=ingress, egress=egress, recolor=vm.recolor & ~half)
    if vm.recolor & half and not after.recolor:
        after = tell(machines, after, cut.PortsRecolored(0.0))
    return calm(machines, after, epoch)


def cancellable(machines: Machines, vm: Vm) -> bool:
    """Whether the VM has a cut that can still be cancelled."""
    return vm.machine != DONE and machines.state(vm.machine).phase is not Phase.CANCELLING


def without(vm: Vm, frame: Frame) -> Vm:
    """The VM with one such frame less."""
    frames = list(vm.frames)
    frames.remove(frame)
    return vm._replace(frames=tuple(frames))
