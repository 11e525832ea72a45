"""One VM, its edge and its port in a network that loses nothing, driven by the real cut machine of ``core.cut``.

Theory of operation. As in ``check.vm`` the machine's commands become *effects*, which happen one at a time, in the
order of the commands and at any time after them; the recolor's halves happen beside that. New is where frames wait::

    guest -> outbound buffer -> tap -> [colored] network [admitted] -> tap -> plain buffer | agent -> inject -> guest

Some effects have to wait until one of these places is empty (:func:`ready`): these are the rules by which the channel
state is exact and the order kept, and each can be relaxed. :class:`Cell` is all of a VM but its frames.

The edge of a VM that holds frames in the switch has no plain buffer, and nothing outbound waits. What its port lets
out, armed, goes to the hold port, where the agent reads it; otherwise it is with the VM at once, and past the agent::

    guest -> tap -> [colored] network [admitted] -> hold port's tap -> agent -> tap -> guest
                                      [admitted] ------------------------------> tap -> guest

An edge is in one of these modes: DIRECT, the agent sees no frame; KEEP, neither, and the plain buffer keeps them; PASS,
armed and before the cut; HOLD, in the cut; DELIVER, after it; ALL, everything passes on and nothing is recorded: the
cut was undone; BLIND, the agent is dead, so QEMU drops what it should divert.
"""

from collections.abc import Mapping
from typing import NamedTuple

from geni_violin.check.rules import SWITCH, LosslessRules
from geni_violin.check.vm import DONE, EGRESS, INGRESS, MIGRATION, Machines
from geni_violin.core import cut
from geni_violin.core.color import Relation, color_of, relation
from geni_violin.core.cut import Action, Phase

DIRECT, KEEP, PASS, HOLD, DELIVER, ALL, BLIND = range(7)
"""What a VM's edge does with the frames that come from the network."""

DIVERTED = (PASS, HOLD, DELIVER, ALL)
DEAD_AGENT = -2
"""The machine of a VM whose agent is gone."""

LEAVING, INJECTED, UNTAGGED, TAGGED = 1, 2, 4, 8
"""Where frames of a VM are, as far as it matters to what happens next: past its outbound buffer and not colored;
injected and not consumed; between its port and its edge, without and with the slice's tag on."""

_EFFECTS: Mapping[Action, tuple[str, ...]] = {
    Action.ARM_EDGE: ("arm",),
    Action.PAUSE_VM: ("stop",),
    Action.RESUME_VM: ("resume",),
    Action.RELEASE_FRAMES: ("release",),
    Action.RETURN_PATH: ("divert off", "step aside"),
    Action.CANCEL_MIGRATION: ("cancel",),
    Action.HOLD_INBOUND: ("hold inbound", "drain"),
}
_ENDED_BY_CANCEL = ("complete", "switchover")
REVIVED = ("resume", "release")
"""What an agent does for a VM whose cut its predecessor has left."""


class Cell(NamedTuple):
    """A VM, its edge and its port. ``recolor`` has a bit for each half to come, ``unheard`` for each that is lost.

    ``armed`` is the epoch that the port is armed for, 0 if it is not. ``installed``: its switch has its rules.
    """

    strategy: str
    network: str
    ingress: int
    egress: int
    cuts: int
    machine: int = DONE
    todo: tuple[str, ...] = ()
    recolor: int = 0
    unheard: int = 0
    running: bool = True
    mode: int = DIRECT
    out_held: bool = False
    armed: int = 0
    installed: bool = True

    @property
    def holds(self) -> bool:
        """Whether this VM's edge is armed for a cut."""
        return self.network != "drop"

    @property
    def in_switch(self) -> bool:
        """Whether its edge is a hold port of its switch."""
        return self.network == SWITCH

    @property
    def returning(self) -> tuple[str, ...]:
        """What an edge does that steps aside."""
        return ("leave",) if self.in_switch else _EFFECTS[Action.RETURN_PATH]


def command(cell: Cell, actions: tuple[Action, ...]) -> Cell:
    """Put the effects of commands in line."""
    for action in actions:
        if action is Action.RECOLOR_PORTS:
            cell = cell._replace(recolor=INGRESS if cell.armed else INGRESS | EGRESS)
            continue
        todo = cell.todo
        if action is Action.CANCEL_MIGRATION:
            todo = tuple(effect for effect in todo if effect not in _ENDED_BY_CANCEL)
        cell = cell._replace(todo=todo + _effects(cell, action))
    return cell


def _effects(cell: Cell, action: Action) -> tuple[str, ...]:
    if action is Action.HOLD_FRAMES:
        return ("hold", "drain") if cell.holds else ("keep",)
    if action is Action.RETURN_PATH:
        return cell.returning
    return MIGRATION[cell.strategy].get(action) or _EFFECTS[action]


def tell(machines: Machines, cell: Cell, *events: cut.Event) -> Cell:
    """Events reach the VM's machine; what it commands is put in line."""
    for event in events:
        if cell.machine >= 0:
            machine, actions = machines.step(cell.machine, event)
            cell = command(cell._replace(machine=machine), actions)
    return cell


def ready(cell: Cell, frames: int, rules: LosslessRules) -> bool:
    """Whether the next effect may happen, given where ``frames`` of the VM are."""
    match cell.todo[0]:
        case "drain":
            return not (rules.drains_before_cut and frames & INJECTED)
        case "release" if cell.mode == HOLD:
            return not (rules.reads_before_release and frames & UNTAGGED)
        case "divert off" | "leave":
            return not (rules.reads_before_return and frames & TAGGED)
        case "step aside" | "release" if cell.mode == KEEP:
            return not (rules.consumes_before_return and frames & INJECTED)
    return True


def perform(cell: Cell, epoch: int) -> tuple[Cell, tuple[cut.Event, ...]]:
    """The first effect in line happens, but to frames. ``epoch`` is what the present snapshot cuts into."""
    effect, cell = cell.todo[0], cell._replace(todo=cell.todo[1:])
    match effect:
        case "arm":
            return cell._replace(mode=PASS), (cut.EdgeArmed(),)
        case "hold":
            return cell._replace(mode=HOLD, out_held=True), ()
        case "hold inbound":
            return cell._replace(mode=HOLD), ()
        case "drain":
            return cell, (cut.FramesHeld(),)
        case "keep":
            return cell._replace(mode=KEEP, out_held=True), (cut.FramesHeld(),)
        case "stop":
            return cell._replace(running=False, cuts=epoch), (cut.VmStopped(0.0),)
        case "switchover":
            return cell._replace(running=False, cuts=epoch), (cut.VmStopped(0.0), cut.MigrationPaused())
        case "resume":
            return cell._replace(running=True), (cut.VmResumed(0.0),)
        case "complete":
            return cell, (cut.MigrationCompleted(0),)
        case "cancel":
            return cell, (cut.MigrationEnded(),)
        case "divert off":
            return cell._replace(mode=KEEP), ()
        case "step aside" | "leave":
            return cell._replace(mode=DIRECT), (cut.PathReturned(),)
    return cell._replace(mode=_mode_after_release(cell), out_held=False), (cut.FramesReleased(),)


def _mode_after_release(cell: Cell) -> int:
    """The cut is over, or undone: then whatever comes is passed on."""
    if cell.mode == HOLD and cell.machine >= 0:
        return DELIVER
    return DIRECT if cell.mode in (DIRECT, KEEP) else ALL


def calm(machines: Machines, cell: Cell, epoch: int) -> Cell:
    """All effects that no frame can notice."""
    while cell.todo and _unnoticed(cell):
        cell, events = perform(cell, epoch)
        cell = tell(machines, cell, *events)
    return cell


def _unnoticed(cell: Cell) -> bool:
    effect = cell.todo[0]
    if effect in ("complete", "cancel"):
        return True
    idle = effect == "release" and not cell.out_held and cell.mode in (DIRECT, ALL)
    return idle or (effect == "resume" and cell.running)


def recolored(machines: Machines, cell: Cell, half: int, epoch: int) -> Cell:
    """One half of the port's rules changes; when both have, the barrier reply confirms it."""
    ingress, egress = (epoch, cell.egress) if half == INGRESS else (cell.ingress, epoch)
    if cell.armed:
        egress = ingress
    after = cell._replace(ingress=ingress, egress=egress, recolor=cell.recolor & ~half, unheard=cell.unheard & ~half)
    if cell.recolor & half and not after.recolor | after.unheard:
        after = tell(machines, after, cut.PortsRecolored(0.0))
    return calm(machines, after, epoch)


def admits(cell: Cell, frame_epoch: int, rules: LosslessRules) -> bool:
    """Whether the port lets a frame of that epoch's color out: both colors of the cut at hand if it is armed."""
    if cell.armed:
        return color_of(frame_epoch) in (color_of(cell.armed), color_of(cell.armed - 1))
    return rules.admits(frame_epoch, cell.egress)


def is_new(cell: Cell, epoch: int, tagged: bool, frame_epoch: int, rules: LosslessRules) -> bool:
    """Whether the agent, whose edge is armed for ``epoch``, takes a frame for one of the new color, by colors alone.

    A frame without a tag passed its port before that was armed, or after it was disarmed, and then the cut is over.
    """
    if tagged:
        return relation(color_of(frame_epoch), color_of(epoch)) is Relation.SAME
    return cell.mode in (DELIVER, ALL) and rules.untagged_is_new_after_cut


def cut_is_reported(machines: Machines, cell: Cell, epoch: int) -> bool:
    """Whether the coordinator has heard that the VM is cut and recolored."""
    if cell.cuts != epoch:
        return False
    if cell.machine < 0:  # it has been, if the ports are recolored and the frames let go
        return cell.ingress == cell.egress == epoch and not cell.out_held and not cell.todo
    return machines.state(cell.machine).phase is Phase.STREAMING


def awaits_trigger(machines: Machines, cell: Cell) -> bool:
    """Whether the VM's edge is armed and nothing has begun its cut."""
    if cell.machine < 0:
        return False
    state = machines.state(cell.machine)
    return state.phase is Phase.WAITING and cut.EdgeArmed in state.seen and not state.trigger


def cancellable(machines: Machines, cell: Cell) -> bool:
    """Whether the VM has a cut that can still be cancelled."""
    return cell.machine >= 0 and machines.state(cell.machine).phase is not Phase.CANCELLING
