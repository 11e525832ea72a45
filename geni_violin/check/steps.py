"""What a single VM does next in a snapshot that holds frames: its cut, its port, its agent, whatever frames do.

Theory of operation. :func:`steps` gives, for a VM and for how far the snapshot is, every move with the VM after it. A
step that a frame might not allow says where that frame must not be; see :func:`geni_violin.check.edge.ready`.
"""

from collections.abc import Iterator

from geni_violin.check import edge as edges
from geni_violin.check.bounds import (
    ARMING,
    CUTTING,
    DEAD_AGENT,
    DISARMING,
    EMPTY_SWITCH,
    NETWORK_ARMING,
    QUIET,
    SETTLING,
    Progress,
)
from geni_violin.check.edge import ALL, BLIND, DIVERTED, LEAVING, REVIVED, Cell
from geni_violin.check.rules import LosslessRules
from geni_violin.check.vm import DONE, EGRESS, INGRESS, Machines
from geni_violin.core.cut import CancelRequested, CutRequested

Step = tuple[str, Cell, str]
"""The move's kind, the VM after it, and the fault that it is, if it is one."""

EFFECTS_ON_FRAMES = ("hold", "release", "step aside")
"""The kinds of moves that also move frames of their VM."""

_HALVES = ((INGRESS, "ingress recolored"), (EGRESS, "egress recolored"))


def steps(machines: Machines, rules: LosslessRules, about: Progress, cell: Cell, where: int) -> Iterator[Step]:
    """Every step that is possible for one VM; ``where`` are its frames (``check.frames.whereabouts``)."""
    if not cell.installed:
        yield "its rules are sent again", cell._replace(installed=True), ""
    else:
        yield from _of_port(machines, rules, about, cell, where)
    yield from _of_cut(machines, rules, about, cell, where)
    if about.faults and about.phase != QUIET:
        yield from (step for step in _faults(cell) if step[2] in about.faults)
    if cell.machine == edges.DEAD_AGENT:
        back = cell._replace(machine=DONE, todo=REVIVED, mode=ALL if cell.mode == BLIND else cell.mode)
        yield "the agent is back", edges.calm(machines, back, about.epoch), ""


def _of_port(machines: Machines, rules: LosslessRules, about: Progress, cell: Cell, where: int) -> Iterator[Step]:
    """The port is armed, recolored, disarmed."""
    arms = about.phase == NETWORK_ARMING or (about.phase == CUTTING and not rules.network_armed_first)
    if arms and not about.dead and cell.holds and not cell.armed:
        yield "port armed", cell._replace(armed=about.epoch), ""
    if cell.armed and (about.phase == DISARMING or (about.phase == SETTLING and not rules.disarms_first)):
        yield "port disarmed", cell._replace(armed=0), ""
    driven = about.dead and about.advances and about.phase == CUTTING
    for half, kind in _HALVES:
        now = cell.ingress if half == INGRESS else cell.egress
        if half == EGRESS and cell.armed:
            continue
        waits = half == INGRESS and rules.colored_before_recolor and about.judged and where & LEAVING and cell.holds
        if (cell.recolor & half and not waits) or (driven and now != about.epoch):
            yield kind, edges.recolored(machines, cell, half, about.epoch), ""


def _of_cut(machines: Machines, rules: LosslessRules, about: Progress, cell: Cell, where: int) -> Iterator[Step]:
    """The cut begins, goes on, or is cancelled."""
    if about.phase == CUTTING and not about.dead:
        if edges.awaits_trigger(machines, cell):
            yield "told to cut", edges.tell(machines, cell, CutRequested()), ""
        if not cell.holds and cell.machine == DONE and cell.cuts < about.epoch and not cell.todo:
            machine, actions = machines.triggered(cell.strategy)
            yield "told to cut", edges.command(cell._replace(machine=machine), actions), ""
    if about.dead and edges.cancellable(machines, cell):
        cancelled = edges.tell(machines, cell, CancelRequested(""))
        yield "cancel", edges.calm(machines, cancelled, about.epoch), ""
    elif cell.todo and edges.ready(cell, where, rules):
        after, events = edges.perform(cell, about.epoch)
        yield cell.todo[0], edges.calm(machines, edges.tell(machines, after, *events), about.epoch), ""
    forgotten = about.phase == SETTLING and cell.machine == DONE and not cell.todo and cell.mode in DIVERTED
    if forgotten and (about.dead or not rules.dead_agent_dooms):
        yield "told to step aside again", cell._replace(todo=cell.returning), ""
    if cell.unheard:
        yield "asks for the recolor again", cell._replace(recolor=cell.recolor | cell.unheard, unheard=0), ""


def _faults(cell: Cell) -> Iterator[Step]:
    """What befalls one VM's agent or switch."""
    if cell.machine >= 0 or cell.mode in DIVERTED:
        mode = BLIND if cell.mode in DIVERTED else cell.mode
        yield DEAD_AGENT, cell._replace(machine=edges.DEAD_AGENT, todo=(), mode=mode), DEAD_AGENT
    if cell.installed:
        yield EMPTY_SWITCH, cell._replace(installed=False), EMPTY_SWITCH


def next_phase(machines: Machines, rules: LosslessRules, about: Progress, cells: tuple[Cell, ...]) -> int:
    """The phase after this one, if all is there that it waits for; else the same."""
    holding = [cell for cell in cells if cell.holds]
    if about.phase == ARMING and not about.dead:
        armed = all(edges.awaits_trigger(machines, cell) for cell in holding)
        return NETWORK_ARMING if armed or not rules.edges_armed_first else ARMING
    if about.phase == NETWORK_ARMING:
        armed = all(cell.armed for cell in holding)
        edges_armed = all(edges.awaits_trigger(machines, cell) for cell in holding)
        return CUTTING if edges_armed and (armed or not rules.network_armed_first) else NETWORK_ARMING
    if about.phase == DISARMING and not any(cell.armed for cell in cells):
        return SETTLING
    settled = all(cell.machine == DONE and not cell.todo and not cell.armed for cell in cells)
    settled = settled and all(cell.mode == edges.DIRECT for cell in cells)
    return QUIET if about.phase == SETTLING and settled and (about.dead or not about.doomed) else about.phase


def retirable(machines: Machines, about: Progress, cells: tuple[Cell, ...]) -> bool:
    """Whether to ask for the old color's end: all VMs are cut, or their cuts undone and the ports driven on."""
    if about.phase != CUTTING:
        return False
    if not about.dead:
        return all(edges.cut_is_reported(machines, cell, about.epoch) for cell in cells)
    at_rest = all(cell.machine == DONE and not cell.todo for cell in cells)
    there = all(cell.ingress == cell.egress == about.epoch for cell in cells)
    return at_rest and (there or not about.advances)
