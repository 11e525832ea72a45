"""The data plane: VMs that are cut again and again while frames fly between them.

Theory of operation. The network is a set of frames: any frame may move next (so they overtake one another for free)
and any frame that no buffer holds may be lost. A running VM may send as long as not too many frames are on their way;
how many it sends in all has no bound. A frame is held (outbound) or passes to the tap; gets its source port's color;
reaches its destination's port, which admits or drops it by color; and is received, at once or, if the VM is paused or
its edge holds frames, when that is over. What a VM does in a cut is the real machine's business (``check.vm``). Once a
frame is colored nobody asks who sent it, and before that nobody asks where it goes, so each frame belongs to one VM at
a time; a state is then a bag of VMs, and swapping names costs a sort.

Snapshots: one begins when none is under way and the frames of the color before last are gone. At any moment it may
fail (*dead*: it will never be committed); then VMs are cancelled one by one, wherever they are, and ports driven on.
A committed slice may be restored once, into a second *life*.

Judged from first principles: a frame carries how many cuts its sender had been through, and a frame that is received
by a VM that has been through fewer, in a snapshot that is not dead, is an orphan. ``check.transcript`` has
``core.history`` judge the same path again. VMs and globals are interned: a state is a tuple of small numbers.
"""

from collections.abc import Iterator

from geni_violin.check import vm as vms
from geni_violin.check.bounds import ALIVE, ANY, COLORS, DEAD, IDLE, RULES, Bounds, Globals
from geni_violin.check.explore import Move
from geni_violin.check.rules import SOUND, Rules
from geni_violin.check.vm import DONE, EGRESS, INBOUND, INGRESS, NETWORK, OUTBOUND, TAP, Frame, Machines, Vm, without
from geni_violin.core.cut import CancelRequested

State = tuple[int, ...]
Local = tuple[Move, int, Globals]


class World:
    """A model for :func:`geni_violin.check.explore.explore`."""

    def __init__(self, bounds: Bounds, rules: Rules = SOUND) -> None:
        self.bounds, self.rules = bounds, rules
        self.machines = Machines(rules.plans)
        self._vms: list[Vm] = []
        self._vm_numbers: dict[Vm, int] = {}
        self._globals: list[Globals] = []
        self._globals_numbers: dict[Globals, int] = {}
        self._local: dict[tuple[int, int, bool], list[tuple[Move, int, int]]] = {}
        self._coloring: dict[tuple[int, int], list[tuple[Move, Frame, int, int]]] = {}
        self._going: dict[tuple[int, int], bool] = {}
        self._done: dict[tuple[int, int], bool] = {}
        self._spans: list[tuple[int, int]] = []
        self._arrival: dict[tuple[int, Frame], int] = {}

    # --- the model ----------------------------------------------------------------------------------------------------

    def initial(self) -> State:
        """All VMs run, in one color, and nothing flies."""
        epoch = self.bounds.first_epoch
        number = self._vm_number
        cells = tuple(
            number(Vm(strategy, DONE, (), 0, True, False, epoch, epoch, epoch, ()))
            for strategy in self.bounds.strategies
        )
        return (self._globals_number(Globals(epoch, IDLE, self.bounds.frames)), *cells)

    def canonical(self, state: State) -> State:
        """Names do not matter."""
        return (state[0], *sorted(state[1:]))

    def violation(self, state: State) -> str:
        """Whatever a move found, and what must hold in every state."""
        about = self._globals[state[0]]
        if about.verdict:
            return about.verdict
        if about.mode == IDLE:
            return self._unsettled(self.look(state)[1])
        spans = [self._spans[cell] for cell in state[1:]]
        if RULES in self.bounds.judges and max(high for _, high in spans) - min(low for low, _ in spans) > 1:
            return "more than two adjacent epochs of ports"
        return "" if any(self._goes_on(state[0], cell) for cell in state[1:]) else "the snapshot never ends"

    def stuck(self, state: State) -> str:
        """Frames come and go for ever, so nothing is; that snapshots end is seen in each state."""
        return "no frame can be sent" if self.bounds.frames and state else ""

    def _goes_on(self, about_number: int, cell: int) -> bool:
        """Whether the VM's own part of the snapshot can go on; frames have no say in it."""
        known = self._going.get((about_number, cell))
        if known is None:
            cut_moves = self._cut_moves(self._globals[about_number], self._vms[cell])
            known = self._going[about_number, cell] = any(True for _ in cut_moves)
        return known

    def moves(self, state: State) -> Iterator[tuple[Move, int, int, State]]:
        """Every step that is possible."""
        about_number, cells = state[0], state[1:]
        turn = self._turn(about_number, cells)
        for place, cell in enumerate(cells):
            for move, after, about_after in self._local_moves(about_number, cell, turn in (place, ANY)):
                rest = (*cells[:place], after, *cells[place + 1 :])
                yield move, place, -1, self._settle(about_after, after, rest)
            for move, frame, source, about_after in self._colorings(about_number, cell):
                for other, target in enumerate(cells):
                    if other != place:
                        colored = [about_after, *cells]
                        colored[place + 1], colored[other + 1] = source, self._arrive(target, frame)
                        yield move, place, other, tuple(colored)
        yield from self._global_moves(state)

    def look(self, state: State) -> tuple[Globals, tuple[Vm, ...]]:
        """The state in full."""
        return self._globals[state[0]], tuple(self._vms[cell] for cell in state[1:])

    # --- one VM -------------------------------------------------------------------------------------------------------

    def _turn(self, about_number: int, cells: State) -> int:
        """Whose cut may go on: anyone's, but in a dead snapshot only one VM's, the same one whatever the names are.

        No reception in it is judged, and what is done to one VM touches no other, so one order stands for all.
        """
        about = self._globals[about_number]
        if about.mode != DEAD:
            return ANY
        unfinished = [(cell, place) for place, cell in enumerate(cells) if not self._over(about_number, cell)]
        return min(unfinished)[1] if unfinished else ANY

    def _local_moves(self, about_number: int, cell: int, cuts: bool) -> list[tuple[Move, int, int]]:
        known = self._local.get((about_number, cell, cuts))
        if known is None:
            about, vm = self._globals[about_number], self._vms[cell]
            both = (*(self._cut_moves(about, vm) if cuts else ()), *self._frame_moves(about, vm))
            known = []
            for move, after, about_after in both:
                left = about.left + len(vm.frames) - len(after.frames)
                known.append((move, self._vm_number(after), self._globals_number(about_after._replace(left=left))))
            self._local[about_number, cell, cuts] = known
        return known

    def _cut_moves(self, about: Globals, vm: Vm) -> Iterator[tuple[Move, Vm, Globals]]:
        """What the VM's own cut does next, and how it may be undone."""
        for half, name in ((INGRESS, "ingress"), (EGRESS, "egress")):
            yield from self._recoloring(about, vm, half, name)
        if about.mode == DEAD and vms.cancellable(self.machines, vm):
            cancelled = vms.tell(self.machines, vm, CancelRequested(""))
            yield Move("cancel"), vms.calm(self.machines, cancelled, about.epoch), about
            if vm == self._begun(vm):
                yield Move("never begun"), vm._replace(machine=DONE, todo=()), about
        elif vm.todo:
            happened = vms.happen(self.machines, vm, about.epoch)
            yield Move(vm.todo[0]), *self._take_held(about, happened)

    def _recoloring(self, about: Globals, vm: Vm, half: int, name: str) -> Iterator[tuple[Move, Vm, Globals]]:
        """One half of a port's recolor, commanded by the cut or, once the snapshot is dead, for all ports."""
        now = vm.ingress if half == INGRESS else vm.egress
        driven = about.mode == DEAD and self.rules.advances_on_abort
        if vm.recolor & half or (driven and now != about.epoch):
            yield Move(f"{name} recolored"), vms.recolored(self.machines, vm, half, about.epoch), about
        elif about.mode == DEAD and not self.rules.advances_on_abort and vm.machine == DONE and now == about.epoch:
            yield Move(f"{name} rolled back"), vms.recolored(self.machines, vm, half, about.epoch - 1), about

    def _frame_moves(self, about: Globals, vm: Vm) -> Iterator[tuple[Move, Vm, Globals]]:
        """Sending, loss, admission and reception."""
        if vm.running and about.left:
            held = vm.holding and self.rules.holds_outbound
            frame = Frame(OUTBOUND if held else TAP, -1, vm.cuts, about.life)
            sent = vm._replace(frames=tuple(sorted((*vm.frames, frame))))
            yield Move("a frame is sent", frame), sent, about
        for frame in sorted(set(vm.frames)):
            if frame.place == NETWORK:
                yield Move("a frame is lost", frame), without(vm, frame), about
                yield self._admission(about, vm, frame)

    def _take_held(self, about: Globals, vm: Vm) -> tuple[Vm, Globals]:
        """A VM that runs with nothing held receives what waited for it."""
        if not vm.running or vm.holding:
            return vm, about
        verdicts = (self._received(about, vm, frame) for frame in vm.frames if frame.place == INBOUND)
        about = about._replace(verdict=next(filter(None, verdicts), about.verdict))
        return vm._replace(frames=tuple(frame for frame in vm.frames if frame.place != INBOUND)), about

    def _admission(self, about: Globals, vm: Vm, frame: Frame) -> tuple[Move, Vm, Globals]:
        """The port admits the frame, or drops it because it takes it for one from the future."""
        if self.rules.admits(frame.epoch, vm.egress):
            admitted = without(vm, frame)
            admitted = admitted._replace(frames=tuple(sorted((*admitted.frames, frame._replace(place=INBOUND)))))
            waits = "is held" if vm.holding or not vm.running else "is received"
            kind = f"a frame in transit {waits}" if frame.epoch < vm.egress else f"a frame {waits}"
            return Move(kind, frame), *self._take_held(about, admitted)
        if COLORS in self.bounds.judges and frame.epoch <= vm.egress:
            about = about._replace(verdict="an old frame is taken for a new one and dropped")
        return Move("a future frame is dropped", frame), without(vm, frame), about

    def _received(self, about: Globals, vm: Vm, frame: Frame) -> str:
        """The verdict on a reception; empty if it is fine."""
        if frame.life != about.life:
            return "orphan of an earlier life" if frame.sent >= about.kept else ""
        judged = about.epoch if about.mode == ALIVE else about.epoch - 1
        if min(frame.sent, judged) > vm.cuts:
            return "orphan"
        if RULES in self.bounds.judges and about.mode == ALIVE and frame.epoch > vm.cuts:
            return "R2: a frame of the new color enters a VM before its cut"
        return ""

    # --- between VMs --------------------------------------------------------------------------------------------------

    def _colorings(self, about_number: int, cell: int) -> list[tuple[Move, Frame, int, int]]:
        """Each frame of the tap with its color, the VM without it, and the globals after."""
        known = self._coloring.get((about_number, cell))
        if known is None:
            about, vm = self._globals[about_number], self._vms[cell]
            known = []
            for frame in sorted(set(vm.frames)):
                if frame.place != TAP:
                    continue
                broken = RULES in self.bounds.judges and about.mode == ALIVE and frame.sent > vm.ingress
                verdict = "R1: a frame sent after the cut leaves the edge in the old color" if broken else ""
                colored = frame._replace(place=NETWORK, epoch=vm.ingress)
                after = self._globals_number(about._replace(verdict=verdict))
                kind = (
                    "a frame sent before the cut is colored after it"
                    if frame.sent < vm.ingress
                    else "a frame is colored"
                )
                known.append((Move(kind, colored), colored, self._vm_number(without(vm, frame)), after))
            self._coloring[about_number, cell] = known
        return known

    def _arrive(self, cell: int, frame: Frame) -> int:
        number = self._arrival.get((cell, frame))
        if number is None:
            vm = self._vms[cell]
            number = self._vm_number(vm._replace(frames=tuple(sorted((*vm.frames, frame)))))
            self._arrival[cell, frame] = number
        return number

    # --- the slice ----------------------------------------------------------------------------------------------------

    def _global_moves(self, state: State) -> Iterator[tuple[Move, int, int, State]]:
        """A snapshot begins or fails, the slice is restored."""
        about, present = self.look(state)
        last = self.bounds.first_epoch + self.bounds.cuts
        if self.bounds.aborts and about.mode == ALIVE:
            yield Move("the snapshot fails"), -1, -1, self._state(about._replace(mode=DEAD), present)
        if about.epoch < last and self._may_begin(about, present):
            begun = tuple(self._begun(vm) for vm in present)
            next_about = about._replace(epoch=about.epoch + 1, mode=ALIVE)
            yield (
                Move("a snapshot begins"),
                -1,
                -1,
                self._state(next_about, begun),
            )
        if self.bounds.restores and about.life == 1 and about.mode == IDLE and about.kept >= 0:
            restored = tuple(self._restored(about, vm) for vm in present)
            left = self.bounds.frames - sum(len(vm.frames) for vm in restored)
            yield Move("the slice is restored"), -1, -1, self._state(about._replace(life=2, left=left), restored)

    def _may_begin(self, about: Globals, present: tuple[Vm, ...]) -> bool:
        old = any(frame.place == NETWORK and frame.epoch < about.epoch for vm in present for frame in vm.frames)
        if self.rules.waits_for_old_frames and old:
            return False
        untouched = (vm.machine == DONE or vm == self._begun(vm) for vm in present)
        if about.mode == IDLE or self.rules.one_cut_at_a_time:
            return about.mode == IDLE
        return all(untouched) and any(vm.machine == DONE for vm in present)

    def _begun(self, vm: Vm) -> Vm:
        """The VM with a cut begun, of which nothing has been carried out."""
        machine, actions = self.machines.triggered(vm.strategy)
        return vms.command(vm._replace(machine=machine, todo=(), recolor=0), actions)

    def _restored(self, about: Globals, vm: Vm) -> Vm:
        """Back in its committed state; what waited at its edge died with it, what the network carries did not."""
        frames = () if self.rules.fresh_vlan else tuple(frame for frame in vm.frames if frame.place == NETWORK)
        return vm._replace(ingress=about.epoch, egress=about.epoch, cuts=about.epoch, frames=frames)

    def _settle(self, about_number: int, changed: int, cells: State) -> State:
        """End the snapshot when all is done: committed, or aborted with all ports driven on."""
        if not self._over(about_number, changed):
            return (about_number, *cells)
        about = self._globals[about_number]
        if about.mode == IDLE or not all(self._over(about_number, cell) for cell in cells):
            return (about_number, *cells)
        kept = about.epoch if about.mode == ALIVE and self.bounds.restores else about.kept
        ended = tuple(self._vms[cell]._replace(cuts=about.epoch, recolor=0) for cell in cells)
        return self._state(about._replace(mode=IDLE, kept=kept), ended)

    def _over(self, about_number: int, cell: int) -> bool:
        """Whether a VM has nothing left to do in the present snapshot."""
        known = self._done.get((about_number, cell))
        if known is None:
            about, vm = self._globals[about_number], self._vms[cell]
            back = about.mode == DEAD and not self.rules.advances_on_abort
            there = vm.ingress == vm.egress == about.epoch - back and not (back and vm.recolor)
            known = self._done[about_number, cell] = there and vm.machine == DONE and not vm.todo
        return known

    def _unsettled(self, present: tuple[Vm, ...]) -> str:
        """With no snapshot under way every VM runs freely, and no frame is from its port's future."""
        if not all(vm.running and not vm.holding for vm in present):
            return "a VM stays paused, or its frames held"
        if COLORS not in self.bounds.judges:
            return ""
        future = (f for vm in present for f in vm.frames if f.place == NETWORK and f.epoch > vm.egress)
        return "no snapshot is under way, and yet a frame comes from the future" if any(future) else ""

    def _state(self, about: Globals, present: tuple[Vm, ...]) -> State:
        return (self._globals_number(about), *map(self._vm_number, present))

    def _vm_number(self, vm: Vm) -> int:
        number = self._vm_numbers.setdefault(vm, len(self._vms))
        if number == len(self._vms):
            self._vms.append(vm)
            self._spans.append((min(vm.ingress, vm.egress), max(vm.ingress, vm.egress)))
        return number

    def _globals_number(self, about: Globals) -> int:
        number = self._globals_numbers.setdefault(about, len(self._globals))
        if number == len(self._globals):
            self._globals.append(about)
        return number
