"""The data plane with the policy "hold": no frame is lost, none overtaken, and the channel state is exact.

Theory of operation. Unlike ``check.world`` this network loses nothing and keeps the order between each two VMs, as
switches do; so what is lost or overtaken here, the snapshot has lost or overtaken. ``check.edge`` and ``check.steps``
have what happens at one VM, ``check.frames`` where frames wait and how they are judged.

The coordinator is what ``core.transaction`` guarantees (``check.control`` shows that): all edges armed, network armed
port by port, all VMs cut, old color retired, network disarmed port by port, edges step aside. It may let the snapshot
fail at any moment; VMs are then cancelled and the ports driven on. A controller's restart, an empty switch and the
death of an agent come at any moment, too. What only takes time (a switch that answers late or reconnects, a request
that is repeated, a refused rule that is sent again) is in every run: whatever is commanded happens at any time after.

A VM with the policy "drop" may be among the others. It loses frames of the future, and has no channel state.

That a snapshot always ends: whatever moves but the sending of a frame brings it nearer to its end, so it is enough that
there is always such a move.
"""

from collections.abc import Iterator
from itertools import permutations

from geni_violin.check import edge as edges
from geni_violin.check import frames as lines
from geni_violin.check.bounds import (
    ARMING,
    CONTROLLER_RESTART,
    CUTTING,
    DEAD_AGENT,
    DISARMING,
    QUIET,
    SETTLING,
    LosslessBounds,
    Progress,
)
from geni_violin.check.edge import ALL, BLIND, DELIVER, DIRECT, DIVERTED, KEEP, PASS, Cell
from geni_violin.check.explore import Move
from geni_violin.check.frames import IN, INJECT, KEPT, LOST, NET, OUT, OVERTAKING, QUEUED, TAP, Frame, Frames
from geni_violin.check.rules import LOSSLESS, LosslessRules
from geni_violin.check.steps import EFFECTS_ON_FRAMES, next_phase, retirable, steps
from geni_violin.check.vm import DONE, Machines
from geni_violin.core.cut import FutureFrameSeen, NetworkDisarmed

State = tuple[int, tuple[int, ...], Frames]
Told = tuple[Move, int, int, State]
Cells = tuple[Cell, ...]


class Lossless:
    """A model for :func:`geni_violin.check.explore.explore`. A move's detail are the places in line of its frames."""

    def __init__(self, bounds: LosslessBounds, rules: LosslessRules = LOSSLESS) -> None:
        self.bounds, self.rules = bounds, rules
        self.machines = Machines(rules.plans)
        self._cells: list[Cell] = []
        self._cell_numbers: dict[Cell, int] = {}
        self._abouts: list[Progress] = []
        self._about_numbers: dict[Progress, int] = {}
        self._phases: dict[tuple[int, tuple[int, ...]], int] = {}
        self._steps: dict[tuple[int, int, int], list[tuple[str, Cell, str]]] = {}

    # --- the model ----------------------------------------------------------------------------------------------------

    def initial(self) -> State:
        """All VMs run, in one color, every edge stands aside, and nothing is on its way."""
        epoch = self.bounds.first_epoch
        cells = tuple(Cell(strategy, network, epoch, epoch, epoch) for strategy, network in self.bounds.vms)
        return self._state(Progress(epoch, faults=self.bounds.faults), cells, ())

    def canonical(self, state: State) -> State:
        """Names do not matter: of all orders of the VMs that sort them, the one with the least frames."""
        about, cells, frames = state
        ordered = tuple(sorted(cells))
        if len(set(cells)) == len(cells):
            names = tuple(map(ordered.index, cells))
            return about, ordered, _renamed(frames, names)
        orders = (names for names in permutations(range(len(cells))) if _sorts(cells, ordered, names))
        return about, ordered, min(_renamed(frames, names) for names in orders)

    def violation(self, state: State) -> str:
        """Whatever a move found, and what must hold when no snapshot is under way."""
        about = self._abouts[state[0]]
        if about.verdict or about.phase != QUIET:
            return about.verdict
        cells = [self._cells[number] for number in state[1]]
        if not all(cell.running and not cell.out_held and cell.mode == DIRECT for cell in cells):
            return "no snapshot is under way, and yet a VM is paused, or its frames held or diverted"
        one_color = all(cell.ingress == cell.egress == about.epoch and not cell.armed for cell in cells)
        return "" if one_color else "no snapshot is under way, and yet a port is left behind, or armed"

    def stuck(self, state: State) -> str:
        """Frames come and go for ever, so nothing is; that snapshots end is seen in each state."""
        return "no frame can be sent" if self.bounds.frames and state else ""

    def look(self, state: State) -> tuple[Progress, Cells, Frames]:
        """The state in full."""
        return self._abouts[state[0]], tuple(self._cells[number] for number in state[1]), state[2]

    def moves(self, state: State) -> Iterator[Told]:
        """Every step that is possible."""
        about, cells, frames = self.look(state)
        ending = False
        for told in self._all_moves(state, about, cells, frames):
            ending = True
            yield told
        if not ending and about.phase != QUIET:
            stays = about._replace(verdict="the snapshot never ends")
            yield Move("nothing more can happen"), -1, -1, self._state(stays, cells, frames)
        if len(frames) < self.bounds.frames:
            yield from self._sendings(state, cells)

    def _all_moves(self, state: State, about: Progress, cells: Cells, frames: Frames) -> Iterator[Told]:
        """Every step but the sending of a frame."""
        for place, number in enumerate(state[1]):
            yield from self._vm_moves(state, place, number)
        for line in lines.first_in_line(frames):
            yield from self._frame_moves(about, cells, frames, line)
        yield from self._slice_moves(about, cells, frames)

    # --- one VM -------------------------------------------------------------------------------------------------------

    def _vm_moves(self, state: State, place: int, number: int) -> Iterator[Told]:
        about, cells, frames = self.look(state)
        where = lines.whereabouts(frames, place)
        key = (state[0], number, where)
        known = self._steps.get(key)
        if known is None:
            known = self._steps[key] = list(steps(self.machines, self.rules, about, cells[place], where))
        for kind, cell, fault in known:
            after = (*cells[:place], cell, *cells[place + 1 :])
            about_after = _struck(about, fault, self.rules)
            if fault == DEAD_AGENT:
                queued = tuple(n for n, f in enumerate(frames) if f.target == place and f.place == QUEUED)
                yield Move(kind, queued), place, -1, self._settled(about_after, after, lines.without(frames, queued))
            elif kind in EFFECTS_ON_FRAMES:
                yield self._shifted(kind, place, about_after, cells, after, frames)
            else:
                yield Move(kind, ()), place, -1, self._settled(about_after, after, frames)

    def _shifted(self, kind: str, place: int, about: Progress, before: Cells, after: Cells, frames: Frames) -> Told:
        """An effect that moves frames: some of them are received by it, in order."""
        if kind == "hold":
            return Move(kind, ()), place, -1, self._settled(about, after, lines.held(frames, place, self.rules))
        received = lines.kept_for(frames, place)
        if kind == "release":
            shift = lines.let_go(frames, place, before[place], about.epoch, self.rules)
            frames, received = shift.frames, shift.received
        for count, line in enumerate(received):
            ahead = received[:count]
            rest = lines.without(frames, ahead)
            found = self._verdict(about, after, rest, line - count)
            about = about._replace(verdict=about.verdict or found)
        return Move(kind, received), place, -1, self._settled(about, after, lines.without(frames, received))

    def _verdict(self, about: Progress, cells: Cells, frames: Frames, line: int) -> str:
        frame = frames[line]
        return lines.verdict(about, frames, line, cells[frame.source], cells[frame.target], self.bounds.strict)

    # --- one frame ----------------------------------------------------------------------------------------------------

    def _sendings(self, state: State, cells: Cells) -> Iterator[Told]:
        """A VM that runs sends a frame to another."""
        about, numbers, frames = state
        for source, cell in enumerate(cells):
            if not cell.running:
                continue
            place = OUT if cell.out_held else TAP
            for target in range(len(cells)):
                if target != source:
                    sent = Frame(source, target, place, -1, cell.cuts)
                    yield Move("a frame is sent", (len(frames),)), source, target, (about, numbers, (*frames, sent))

    def _frame_moves(self, about: Progress, cells: Cells, frames: Frames, line: int) -> Iterator[Told]:
        """The first frame in a line moves on."""
        frame = frames[line]
        if frame.place == TAP:
            yield self._coloring(about, cells, frames, line)
        elif frame.place == NET:
            yield self._admission(about, cells, frames, line)
        elif frame.place == IN:
            yield from self._reading(about, cells, frames, line)
        elif cells[frame.target].running:
            yield self._reception(about, cells, frames, line)

    def _coloring(self, about: Progress, cells: Cells, frames: Frames, line: int) -> Told:
        """The first switch gives the frame its sender's port's color."""
        frame = frames[line]
        cell = cells[frame.source]
        if not cell.installed:
            return self._end("a frame is lost in the empty switch", about, cells, frames, line)
        if self.bounds.strict and about.judged and frame.sent > cell.ingress:
            about = about._replace(verdict="R1: a frame sent after the cut leaves the edge in the old color")
        late = frame.sent < cell.ingress
        kind = "a frame sent before the cut is colored after it" if late else "a frame is colored"
        return self._on(kind, about, cells, frames, line, frame._replace(place=NET, epoch=cell.ingress))

    def _admission(self, about: Progress, cells: Cells, frames: Frames, line: int) -> Told:
        """The last switch lets the frame out to its receiver's edge, or drops it."""
        frame = frames[line]
        cell = cells[frame.target]
        if not cell.installed:
            return self._end("a frame is lost in the empty switch", about, cells, frames, line)
        if edges.admits(cell, frame.epoch, self.rules):
            there = INJECT if cell.in_switch and not cell.armed else IN
            here = frame._replace(place=there, tagged=bool(cell.armed))
            return self._on("a frame is let out", about, cells, frames, line, here)
        meant = frame.epoch > cell.egress and (not cell.holds or (about.dead and not about.whole))
        if not (meant or about.lossy):
            about = about._replace(verdict=LOST)
        return self._end("a frame is dropped", about, cells, frames, line)

    def _reading(self, about: Progress, cells: Cells, frames: Frames, line: int) -> Iterator[Told]:
        """The edge takes the frame, as its mode has it."""
        frame = frames[line]
        cell = cells[frame.target]
        if cell.mode == DIRECT and cell.in_switch:
            found = about if about.lossy else about._replace(verdict=LOST)
            yield self._end("a frame is lost at a hold port that nobody reads", found, cells, frames, line)
        elif cell.mode == DIRECT and cell.running:
            yield self._reception(about, cells, frames, line)
        elif cell.mode == KEEP:
            yield self._on("a frame is kept", about, cells, frames, line, frame._replace(place=KEPT))
        elif cell.mode == BLIND:
            yield self._end("a frame is lost in a dead agent's diversion", about, cells, frames, line)
        elif cell.mode in DIVERTED:
            yield self._diverted(about, cells, frames, line)

    def _diverted(self, about: Progress, cells: Cells, frames: Frames, line: int) -> Told:
        """The agent reads the frame and its color, takes the tag off, and passes it on or keeps it."""
        frame = frames[line]
        cell = cells[frame.target]
        new = edges.is_new(cell, about.epoch, frame.tagged, frame.epoch, self.rules)
        taken = frame._replace(tagged=False)
        if cell.mode == PASS and not (new and self.rules.keeps_future):
            return self._on("a frame passes", about, cells, frames, line, taken._replace(place=INJECT))
        if cell.mode == PASS:
            seen = edges.tell(self.machines, cell, FutureFrameSeen())
            cells = (*cells[: frame.target], seen, *cells[frame.target + 1 :])
            return self._on("a future frame is held", about, cells, frames, line, taken._replace(place=QUEUED))
        recorded = frame.recorded or (cell.mode != ALL and not new and self.rules.records_held)
        passes = cell.mode in (DELIVER, ALL)
        taken = taken._replace(place=INJECT if passes else QUEUED, recorded=recorded)
        kind = f"a frame {'passes' if passes else 'is held'}{' and is recorded' if recorded else ''}"
        return self._on(kind, about, cells, frames, line, taken)

    def _reception(self, about: Progress, cells: Cells, frames: Frames, line: int) -> Told:
        """The VM receives the frame."""
        found = self._verdict(about, cells, frames, line)
        overtaking = lines.overtakes(frames, line) and lines.may_overtake(cells[frames[line].target])
        kind = OVERTAKING if overtaking else "a frame is received"
        return self._end(kind, about._replace(verdict=found), cells, frames, line)

    def _on(self, kind: str, about: Progress, cells: Cells, frames: Frames, line: int, frame: Frame) -> Told:
        after = self._settled(about, cells, lines.replaced(frames, line, frame))
        return Move(kind, (line,)), frame.source if frame.place == NET else frame.target, -1, after

    def _end(self, kind: str, about: Progress, cells: Cells, frames: Frames, line: int) -> Told:
        after = self._settled(about, cells, lines.without(frames, (line,)))
        return Move(kind, (line,)), frames[line].target, -1, after

    # --- the slice ----------------------------------------------------------------------------------------------------

    def _slice_moves(self, about: Progress, cells: Cells, frames: Frames) -> Iterator[Told]:
        """A snapshot begins, fails, or is past its old color; the controller restarts."""
        if about.phase == QUIET and about.epoch < self.bounds.first_epoch + self.bounds.cuts:
            begins = about._replace(epoch=about.epoch + 1, phase=ARMING, dead=False, whole=False, advances=True)
            begun = tuple(self._begun(cell) if cell.holds else cell for cell in cells)
            yield Move("a snapshot begins", ()), -1, -1, self._settled(begins, begun, frames)
        if about.phase != QUIET and not about.dead and (self.bounds.aborts or about.doomed):
            phase = ARMING if about.phase == ARMING else CUTTING
            fails = about._replace(dead=True, phase=phase, advances=phase == CUTTING)
            yield Move("the snapshot fails", ()), -1, -1, self._settled(fails, cells, frames)
        if self._is_retired(about, cells, frames):
            phase = DISARMING if self.rules.disarms_first else SETTLING
            yield Move("the old color is retired", ()), -1, -1, self._enter(about, phase, cells, frames)
        if about.dead and about.phase == ARMING and all(c.machine == DONE and not c.todo for c in cells):
            yield Move("all cuts are undone", ()), -1, -1, self._enter(about, SETTLING, cells, frames)
        forgettable = all(cell.installed for cell in cells) or not self.rules.network_remembers
        if CONTROLLER_RESTART in about.faults and about.phase != QUIET and forgettable:
            restarted = tuple(self._unheard(about, cell) for cell in cells)
            spent = _struck(about, CONTROLLER_RESTART, self.rules)
            yield Move(CONTROLLER_RESTART, ()), -1, -1, self._settled(spent, restarted, frames)

    def _begun(self, cell: Cell) -> Cell:
        machine, actions = self.machines.begin(cell.strategy, cell.network)
        return edges.command(cell._replace(machine=machine), actions)

    def _is_retired(self, about: Progress, cells: Cells, frames: Frames) -> bool:
        """Whether no frame of the old color is on its way, as the switches count."""
        if not retirable(self.machines, about, cells):
            return False
        return not self.rules.retires_first or not any(f.place == NET and f.epoch < about.epoch for f in frames)

    def _unheard(self, about: Progress, cell: Cell) -> Cell:
        """What the restarted controller had not done is asked for again. It adopts the colors that it finds.

        Where it finds none it has to believe the coordinator, who knows of a color when a cut is reported.
        """
        cell = cell._replace(recolor=0, unheard=cell.unheard | cell.recolor)
        if about.phase < CUTTING or (self.rules.adopts_colors_found and cell.installed):
            return cell
        reported = edges.cut_is_reported(self.machines, cell, about.epoch)
        known = about.epoch if reported else about.epoch - 1
        return cell._replace(ingress=known, egress=known)

    def _settled(self, about: Progress, cells: Cells, frames: Frames) -> State:
        """The state, once the snapshot is as far as it can be without another event; frames have no say in that."""
        about_number, numbers, _ = state = self._state(about, cells, frames)
        phase = self._phases.get((about_number, numbers))
        if phase is None:
            phase = self._phases[about_number, numbers] = next_phase(self.machines, self.rules, about, cells)
        return state if phase == about.phase else self._enter(about, phase, cells, frames)

    def _enter(self, about: Progress, phase: int, cells: Cells, frames: Frames) -> State:
        """The snapshot enters a phase."""
        if phase == CUTTING:
            about = about._replace(whole=True)
        if phase == SETTLING:
            cells = tuple(self._steps_aside(cell) for cell in cells)
        if phase == QUIET:
            return self._ended(about, cells, frames)
        return self._settled(about._replace(phase=phase), cells, frames)

    def _steps_aside(self, cell: Cell) -> Cell:
        """The edge is told that the network is disarmed."""
        if cell.machine >= 0:
            return edges.tell(self.machines, cell, NetworkDisarmed())
        return cell._replace(todo=cell.todo + cell.returning) if cell.mode in DIVERTED else cell

    def _ended(self, about: Progress, cells: Cells, frames: Frames) -> State:
        """Committed, or aborted: then a snapshot that armed no port leaves the epoch as it was."""
        epoch = about.epoch if about.advances else about.epoch - 1
        if about.judged:
            pairs = ((f, cells[f.source], cells[f.target]) for f in frames)
            faults = (lines.inexact(frame, frame.sent < epoch, *both) for frame, *both in pairs)
            about = about._replace(verdict=about.verdict or next(filter(None, faults), ""))
        ended = tuple(cell._replace(cuts=epoch, recolor=0, unheard=0) for cell in cells)
        forgotten = tuple(frame._replace(recorded=False) for frame in frames)
        quiet = about._replace(epoch=epoch, phase=QUIET, dead=False, doomed=False, whole=False, advances=True)
        return self._state(quiet, ended, forgotten)

    # --- numbers ------------------------------------------------------------------------------------------------------

    def _state(self, about: Progress, cells: Cells, frames: Frames) -> State:
        number = self._about_numbers.setdefault(about, len(self._abouts))
        if number == len(self._abouts):
            self._abouts.append(about)
        return number, tuple(self._cell_number(cell) for cell in cells), frames

    def _cell_number(self, cell: Cell) -> int:
        number = self._cell_numbers.setdefault(cell, len(self._cells))
        if number == len(self._cells):
            self._cells.append(cell)
        return number


def _struck(about: Progress, fault: str, rules: LosslessRules) -> Progress:
    """After a fault; it does not come again."""
    if not fault:
        return about
    doomed = about.doomed or (fault == DEAD_AGENT and rules.dead_agent_dooms)
    left = tuple(other for other in about.faults if other != fault)
    return about._replace(faults=left, doomed=doomed, lossy=about.lossy or fault != CONTROLLER_RESTART)


def _sorts(cells: tuple[int, ...], ordered: tuple[int, ...], names: tuple[int, ...]) -> bool:
    return all(ordered[names[place]] == cell for place, cell in enumerate(cells))


def _renamed(frames: Frames, names: tuple[int, ...]) -> Frames:
    if names == tuple(range(len(names))):
        return frames
    return tuple(Frame(names[frame[0]], names[frame[1]], *frame[2:]) for frame in frames)
