"""Carries out a cut's commands on a pretended VM, in an order and with failures that a test draws."""

from dataclasses import dataclass, field

from geni_violin.core import cut
from geni_violin.core.cut import Action, CutState, Phase

CONFIRMED: dict[Action, tuple[cut.Event, ...]] = {
    Action.ARM_EDGE: (cut.EdgeArmed(),),
    Action.RETURN_PATH: (cut.PathReturned(),),
    Action.HOLD_FRAMES: (cut.FramesHeld(),),
    Action.PAUSE_VM: (cut.VmStopped(10.0),),
    Action.RECOLOR_PORTS: (cut.PortsRecolored(1.5),),
    Action.CONTINUE_MIGRATION: (cut.MigrationCompleted(4096),),
    Action.RESUME_VM: (cut.VmResumed(10.5),),
    Action.RELEASE_FRAMES: (cut.FramesReleased(),),
    Action.CANCEL_MIGRATION: (cut.MigrationEnded(),),
}
MIGRATION: dict[str, tuple[cut.Event, ...]] = {
    "background": (cut.VmStopped(10.0), cut.VmResumed(10.5), cut.MigrationCompleted(4096)),
    "precopy": (cut.VmStopped(10.0), cut.MigrationPaused()),
    "stop": (cut.MigrationCompleted(4096),),
}


@dataclass
class PretendedVm:
    """A VM whose state follows from the commands that were carried out, in their order."""

    strategy: str
    state: CutState
    running: bool = True
    holding: bool = False
    recolored: bool = False
    was_cut: bool = False
    armed: bool = False
    commands: list[Action] = field(default_factory=list)
    reports: list[cut.Report] = field(default_factory=list)
    deadlines: dict[str, float] = field(default_factory=dict)
    waiting: list[cut.Event] = field(default_factory=list)

    def begin(self) -> None:
        """Start the cut, which waits for its trigger."""
        self._take(cut.begin(self.state, 0.0))

    def trigger(self, delay_ms: float = 0.0) -> None:
        """The coordinator wants the cut, once the edge is armed if it is to be."""
        if Action.ARM_EDGE in self.state.sent:
            self.finish()
        self.tell(cut.CutRequested(delay_ms))

    def tell(self, event: cut.Event, now_ms: float = 0.0) -> None:
        """An event reaches the machine."""
        self._take(cut.step(self.state, event, now_ms))

    def carry_out(self) -> None:
        """The first command that is not done yet is carried out; its confirmations wait to be told."""
        action = self.commands.pop(0)
        events = MIGRATION[self.strategy] if action is Action.START_MIGRATION else CONFIRMED[action]
        for event in events:
            self._happens(event)
        self.waiting += events

    def tell_next(self) -> None:
        """The first confirmation that waits is told."""
        self.tell(self.waiting.pop(0))

    def finish(self) -> None:
        """Carry out and confirm everything until nothing is left; the network is disarmed once the cut is reported."""
        while self.commands or self.waiting or self._awaits_the_network():
            if self.commands:
                self.carry_out()
            elif self.waiting:
                self.tell_next()
            else:
                self.tell(cut.NetworkDisarmed())

    def _awaits_the_network(self) -> bool:
        told = cut.NetworkDisarmed in self.state.seen or self.state.phase is not Phase.STREAMING
        return Action.ARM_EDGE in self.state.sent and not told

    @property
    def lets_frames_out(self) -> bool:
        """Whether frames go in and out."""
        return self.running and not self.holding

    @property
    def undoing(self) -> bool:
        """Whether the rules no longer matter because no image will come of this cut."""
        return self.state.phase in (Phase.CANCELLING, Phase.CANCELLED, Phase.LOST)

    def _take(self, transition: cut.Transition) -> None:
        self.state, commands = transition
        for command in commands:
            match command:
                case Action():
                    self.commands.append(command)
                case cut.Report():
                    self.reports.append(command)
                case cut.SetDeadline(name, at_ms):
                    assert name not in self.deadlines, "a deadline is set once"
                    self.deadlines[name] = at_ms

    def _happens(self, event: cut.Event) -> None:
        match event:
            case cut.FramesHeld() | cut.FramesReleased():
                self.holding = isinstance(event, cut.FramesHeld)
            case cut.VmStopped() | cut.VmResumed():
                self.running = isinstance(event, cut.VmResumed)
                self.was_cut = self.was_cut or isinstance(event, cut.VmStopped)
            case cut.PortsRecolored():
                self.recolored = True
            case cut.EdgeArmed() | cut.PathReturned():
                self.armed = isinstance(event, cut.EdgeArmed)
