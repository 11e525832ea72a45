"""One VM's cut among failures: the real machine of ``core.cut``, with an executor that is slow and may fail.

Theory of operation. Here confirmations wait in a queue of their own, commands fail, deadlines pass, the coordinator
cancels, the VM's process dies, each at any moment; and a person pauses and resumes the VM before the cut stops it (the
hypervisor's adapter must not take such a stop for the one that was commanded). What must hold: R1 and R2 as long as the
cut is not being undone; an armed edge is armed before the cut and steps aside only when the network is disarmed; at the
end (unless its process is gone) the VM runs and nothing is held; a VM that counts as streamed was cut, recolored and
sent whole; and there always is an end, provided that what undoes a cut is carried out. The executor does what concerns
one VM in the order of the commands; only the recolor, which is the controller's, and the stream go on beside that.
"""

from collections.abc import Iterator
from typing import NamedTuple

from geni_violin.check import vm as vms
from geni_violin.check.explore import Move
from geni_violin.check.vm import Machines, Vm
from geni_violin.core import cut
from geni_violin.core.cut import Action, Phase, Plan

_UNDOING = (Phase.CANCELLING, Phase.CANCELLED, Phase.LOST)
_HOLDS = {Action.HOLD_FRAMES, Action.HOLD_INBOUND}
_FAILED = cut.StepFailed("")
_INTERRUPTIONS: tuple[cut.Event, ...] = (
    cut.CancelRequested(""),
    cut.DeadlinePassed(cut.ARMED_DEADLINE),
    cut.DeadlinePassed(cut.CUT_DEADLINE),
    cut.DeadlinePassed(cut.STREAM_DEADLINE),
)


class State(NamedTuple):
    """The VM, the events on their way to its machine, and what really happened."""

    vm: Vm
    events: tuple[cut.Event, ...] = ()
    recolor_answer: cut.Event | None = None
    streaming: bool = False
    was_cut: bool = False
    recolored: bool = False
    sent_whole: bool = False
    disturbed: bool = False
    armed: bool = False
    disarmed: bool = False


class Agent:
    """A model for :func:`geni_violin.check.explore.explore`."""

    def __init__(self, strategy: str, network: str, plan: Plan) -> None:
        self.strategy, self.network = strategy, network
        self.machines = Machines({(strategy, network): plan}, forgets_the_end=False)
        self.colored = any(step.action is Action.RECOLOR_PORTS for step in plan)

    def initial(self) -> State:
        """The VM runs; its cut waits for its trigger, and an edge that is to be armed for its arming."""
        machine, actions = self.machines.begin(self.strategy, self.network)
        return State(vms.command(Vm(self.strategy, machine, (), 0, True, False, 0, 0, 0, ()), actions))

    def canonical(self, state: State) -> State:
        """There is one VM only."""
        return state

    def violation(self, state: State) -> str:
        """R1, R2, and how it may end."""
        vm, phase = state.vm, self._phase(state)
        lets_out = vm.running and not vm.holding
        if self.colored and phase not in _UNDOING:
            if state.was_cut and lets_out and not state.recolored:
                return "R1: frames are let out after the cut and before the recolor"
            if state.recolored and not state.was_cut:
                return "R2: the port is recolored before the cut"
            if self._holds and not state.armed and not state.disarmed and self._sent(state) & _HOLDS:
                return "the edge is not armed before the cut, or steps aside before the network is disarmed"
        if state.armed and phase is Phase.STREAMED:
            return "streamed, but the edge is still armed"
        if phase in (Phase.STREAMED, Phase.CANCELLED) and not lets_out:
            return f"{phase.value}, but the VM is paused or its frames are held"
        whole = state.was_cut and state.sent_whole and state.recolored == self.colored
        return "streamed, but not cut, recolored and sent whole" if phase is Phase.STREAMED and not whole else ""

    def stuck(self, state: State) -> str:
        """Every cut ends."""
        return "" if self._phase(state) in cut.FINAL else "the cut never ends"

    def moves(self, state: State) -> Iterator[tuple[Move, int, int, State]]:
        """Every step that is possible."""
        if self._phase(state) not in cut.FINAL:
            for kind, after in self._all_moves(state):
                if after != state:
                    yield Move(kind), 0, -1, after

    def _phase(self, state: State) -> Phase:
        return self.machines.state(state.vm.machine).phase

    def _sent(self, state: State) -> frozenset[Action]:
        return self.machines.state(state.vm.machine).sent

    @property
    def _holds(self) -> bool:
        return self.colored and self.network != "drop"

    def _triggers(self, state: State) -> Iterator[cut.Event]:
        """Whatever may start the cut now. The coordinator does not ask before the edge is armed, if it is to be."""
        if self._phase(state) is not Phase.WAITING or (self._holds and not state.armed):
            return
        yield cut.CutRequested()
        yield cut.CutRequested(1.0)
        if self.machines.state(state.vm.machine).requested:
            yield cut.DeadlinePassed(cut.DELAY)
        if self._holds:
            yield cut.FutureFrameSeen()

    def _all_moves(self, state: State) -> Iterator[tuple[str, State]]:
        phase = self._phase(state)
        if state.events:
            yield "an event arrives", self._tell(state._replace(events=state.events[1:]), state.events[0])
        if state.recolor_answer is not None:
            yield "the recolor is answered", self._tell(state._replace(recolor_answer=None), state.recolor_answer)
        yield from self._effects(state, may_fail=phase is not Phase.CANCELLING)
        for event in self._triggers(state):
            yield f"{type(event).__name__}", self._tell(state, event)
        if self._holds and phase is Phase.STREAMING:
            yield "the network is disarmed", self._tell(state._replace(disarmed=True), cut.NetworkDisarmed())
        for event in _INTERRUPTIONS:
            yield f"{type(event).__name__}", self._tell(state, event)
        yield "the VM dies", self._tell(state, cut.VmDied())
        if (
            not state.disturbed
            and state.vm.running
            and not self._sent(state) & {Action.START_MIGRATION, Action.PAUSE_VM}
        ):
            disturbed = self._tell(self._tell(state._replace(disturbed=True), cut.VmStopped(0.0)), cut.VmResumed(0.0))
            yield "a person pauses and resumes the VM", disturbed

    def _effects(self, state: State, may_fail: bool) -> Iterator[tuple[str, State]]:
        """Commands are carried out, or fail."""
        vm = state.vm
        if vm.todo:
            yield vm.todo[0], self._perform(state)
            if may_fail:
                failed = vm._replace(todo=vm.todo[1:])
                yield "a command fails", state._replace(vm=failed, events=(*state.events, _FAILED))
        if vm.recolor:
            done = state._replace(vm=vm._replace(recolor=0))
            yield "recolor", done._replace(recolored=True, recolor_answer=cut.PortsRecolored(0.0))
            yield "the recolor fails", done._replace(recolor_answer=_FAILED)
            yield "the recolor's answer is lost", done._replace(recolored=True, recolor_answer=_FAILED)
        if state.streaming:
            over = state._replace(streaming=False)
            whole = over._replace(sent_whole=True, events=(*state.events, cut.MigrationCompleted(0)))
            yield "the stream ends", whole
            yield "the stream breaks", over._replace(events=(*state.events, _FAILED))

    def _perform(self, state: State) -> State:
        """The first effect in line; its confirmations queue up."""
        effect = state.vm.todo[0]
        vm, events = vms.perform(state.vm, 1)
        was_cut = state.was_cut or effect in ("stop", "switchover")
        armed = effect == "arm" or (state.armed and effect != "return path")
        state = state._replace(vm=vm, was_cut=was_cut, armed=armed, events=state.events + events)
        return self._stream(state._replace(streaming=state.streaming and effect != "cancel"))

    def _tell(self, state: State, event: cut.Event) -> State:
        return self._stream(state._replace(vm=vms.tell(self.machines, state.vm, event)))

    def _stream(self, state: State) -> State:
        """A stream runs beside whatever is next in line."""
        todo = state.vm.todo
        if todo[:1] != ("complete",):
            return state
        return state._replace(vm=state.vm._replace(todo=todo[1:]), streaming=True)
