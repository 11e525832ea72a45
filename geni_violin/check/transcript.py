"""A path through the data plane, told so that a person can follow it, and judged by ``core.history``.

Theory of operation. The explored states hold bags of frames without names. Here the path is walked once more, every
frame gets a number when it is sent, and what happens at each VM is written down twice: as a line of text, and as the
history that the independent judge wants. Two frames that no rule can tell apart may swap numbers; either story is true.

A restored VM goes on from its cut. So what its earlier life did after the cut is put *after* the cut event, and
what its new life does before it: a frame from there to here crosses the cut the wrong way.
"""

from dataclasses import dataclass, field

from geni_violin.check.bounds import Globals
from geni_violin.check.explore import Told, retrace
from geni_violin.check.vm import INBOUND, NETWORK, OUTBOUND, TAP, Frame, Vm
from geni_violin.check.world import State, World
from geni_violin.core.history import Cut, Happening, Received, Sent, judge

_EFFECTS = {
    "hold": "{vm}'s edge holds its frames",
    "stop": "{vm} stops: its cut event",
    "switchover": "{vm} stops: its cut event",
    "resume": "{vm} runs again",
    "release": "{vm}'s held frames are let go",
    "ingress recolored": "{vm}'s port colors what it sends with {color} (epoch {ingress})",
    "egress recolored": "{vm}'s port admits as one of color {egress_color} (epoch {egress})",
    "ingress rolled back": "{vm}'s port colors what it sends with {color} (epoch {ingress}) again",
    "egress rolled back": "{vm}'s port admits as one of color {egress_color} (epoch {egress}) again",
    "cancel": "{vm}'s cut is cancelled",
    "never begun": "{vm}'s cut is called off before anything happened",
    "a snapshot begins": "the snapshot into epoch {epoch} begins: every VM is told to cut",
    "the snapshot fails": "the snapshot fails: it will never be committed",
    "the slice is restored": "every VM is killed and restored as of its cut",
}


@dataclass
class Story:
    """What is known half-way: the lines, the happenings with their lives, and where each numbered frame is."""

    lines: list[str] = field(default_factory=list)
    happenings: list[tuple[int, Happening]] = field(default_factory=list)
    flying: list[tuple[int, int, Frame]] = field(default_factory=list)
    sent: int = 0

    def history(self, snapshot: int) -> list[Happening]:
        """All that happened, for the judge of one snapshot; see above for the order of lives."""
        cut: set[str] = set()
        early: list[Happening] = []
        late: list[Happening] = []
        for life, happening in self.happenings:
            if life == 1 and isinstance(happening, Cut) and happening.snapshot == snapshot:
                cut.add(happening.vm)
            (late if life == 1 and happening.vm in cut else early).append(happening)
        return early + late

    def orphans(self) -> dict[int, frozenset[int]]:
        """The orphans that the independent judge finds, by the epoch that each snapshot cut into."""
        epochs = sorted({what.snapshot for _, what in self.happenings if isinstance(what, Cut)})
        found = {epoch: judge(self.history(epoch), epoch).orphans for epoch in epochs}
        return {epoch: orphans for epoch, orphans in found.items() if orphans}


def tell(world: World, path: list[State]) -> Story:
    """The story of a path that :func:`geni_violin.check.explore.explore` found."""
    story = Story()
    _, before = world.look(world.initial())
    for told in retrace(world, path):
        about, after = world.look(told.after)
        _line(story, world.rules.colors, told, about, after)
        _follow(story, told, about, before, after)
        before = after
    return story


def _line(story: Story, count: int, told: Told[State], about: Globals, after: tuple[Vm, ...]) -> None:
    """One line of text; there are ``count`` colors."""
    kind, frame = told.move.kind, told.move.detail
    if not isinstance(frame, Frame):
        vm = after[told.place]
        colors = {"color": vm.ingress % count, "egress_color": vm.egress % count}
        epochs = {"ingress": vm.ingress, "egress": vm.egress, "epoch": about.epoch}
        story.lines.append(_EFFECTS[kind].format(vm=_name(told.place), **colors, **epochs))
        return
    number = _number(story, told, frame)
    text = kind.replace("a frame", f"frame {number}").replace("a future frame", f"future frame {number}")
    if kind == "a frame is sent":
        held = " and held at its edge" if frame.place == OUTBOUND else ""
        text = f"{_name(told.place)} sends frame {number}{held}"
    elif told.other >= 0:
        text = f"frame {number} gets color {frame.epoch % count} (epoch {frame.epoch}) and goes to {_name(told.other)}"
    else:
        text = f"at {_name(told.place)}, {text}"
    story.lines.append(text)


def _number(story: Story, told: Told[State], frame: Frame) -> int:
    """The number of the frame that a move is about."""
    if told.move.kind == "a frame is sent":
        return story.sent + 1
    wanted = frame._replace(place=TAP, epoch=-1) if told.other >= 0 else frame
    return next(number for number, place, flying in story.flying if (place, flying) == (told.place, wanted))


def _follow(story: Story, told: Told[State], about: Globals, before: tuple[Vm, ...], after: tuple[Vm, ...]) -> None:
    """Write down what happened at VMs, and where frames are now."""
    kind, frame, place = told.move.kind, told.move.detail, told.place
    if kind in ("stop", "switchover"):
        story.happenings.append((about.life, Cut(_name(place), about.epoch)))
    elif kind == "release":
        story.flying = [(n, p, _let_go(f) if p == place else f) for n, p, f in story.flying]
    elif kind == "the slice is restored":
        story.flying = [entry for entry in story.flying if entry[2] in after[entry[1]].frames]
    elif isinstance(frame, Frame):
        _move_frame(story, told, frame, about)
    if place >= 0 and after[place].running and not after[place].holding:
        waiting = [entry for entry in story.flying if entry[1] == place and entry[2].place == INBOUND]
        story.happenings += [(about.life, Received(_name(place), number)) for number, _, _ in waiting]
        story.flying = [entry for entry in story.flying if entry not in waiting]
        if waiting and not isinstance(frame, Frame):
            numbers = ", ".join(str(number) for number, _, _ in waiting)
            story.lines[-1] += f", and it receives what waited: frame {numbers}"


def _let_go(frame: Frame) -> Frame:
    return frame._replace(place=TAP) if frame.place == OUTBOUND else frame


def _move_frame(story: Story, told: Told[State], frame: Frame, about: Globals) -> None:
    """A numbered frame is sent, goes on, or is gone."""
    number = _number(story, told, frame)
    if told.move.kind == "a frame is sent":
        story.sent = number
        story.flying.append((number, told.place, frame))
        story.happenings.append((about.life, Sent(_name(told.place), number)))
        return
    story.flying = [entry for entry in story.flying if entry[0] != number]
    if told.other >= 0:
        story.flying.append((number, told.other, frame))
    elif told.move.kind.endswith(("held", "received")):
        assert frame.place == NETWORK
        story.flying.append((number, told.place, frame._replace(place=INBOUND)))


def _name(place: int) -> str:
    return f"vm{place + 1}"
