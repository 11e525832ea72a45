"""A path through the world that loses nothing, told so that a person can follow it, and judged by ``core.history``.

Theory of operation. The path is walked once more with a number for each frame. What happens at each VM is written down
twice: as a line of text, and as the history that the independent judge wants. Beside that the channel state is written
down as it comes to be: which frames are recorded, in which order. The judge says which frames were in transit; the
channel state of a committed snapshot must be just those.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from geni_violin.check.bounds import QUIET, Progress
from geni_violin.check.edge import Cell
from geni_violin.check.explore import Told, retrace
from geni_violin.check.frames import OVERTAKING, Frames
from geni_violin.check.lossless import Cells, Lossless, State
from geni_violin.core.color import color_of
from geni_violin.core.history import Cut, Happening, Received, Sent, judge

_LINES = {
    "a snapshot begins": "the snapshot into epoch {epoch} begins: the edges are to be armed",
    "arm": "{vm}'s edge is armed: it keeps frames of color {new}, all others pass",
    "port armed": "{vm}'s port lets out both colors, with the tag on",
    "told to cut": "{vm} is told to cut",
    "hold": "{vm}'s edge holds its frames",
    "keep": "{vm}'s edge holds its frames",
    "hold inbound": "{vm}'s hold port passes nothing on any more",
    "drain": "{vm}'s hold is confirmed",
    "stop": "{vm} stops: its cut event",
    "switchover": "{vm} stops: its cut event",
    "resume": "{vm} runs again",
    "ingress recolored": "{vm}'s port colors what it sends with {color} (epoch {ingress})",
    "egress recolored": "{vm}'s port admits as one of color {egress_color} (epoch {egress})",
    "release": "{vm}'s held frames are let go",
    "the old color is retired": "the old color counts as retired",
    "port disarmed": "{vm}'s port lets frames out without a tag again",
    "divert off": "{vm}'s frames are diverted no more, they wait in its plain buffer",
    "leave": "{vm}'s hold port is read no more",
    "step aside": "{vm}'s edge steps aside",
    "cancel": "{vm}'s cut is cancelled",
    "the snapshot fails": "the snapshot fails: it will never be committed",
    "all cuts are undone": "all cuts are undone, and no port was armed",
    "the controller restarts": "the controller restarts",
    "a switch restarts empty": "{vm}'s switch restarts empty",
    "its rules are sent again": "{vm}'s switch gets its rules again",
    "asks for the recolor again": "{vm}'s agent asks for the recolor again",
    "an agent dies": "{vm}'s agent dies",
    "told to step aside again": "{vm}'s edge is told again to step aside",
    "the agent is back": "{vm}'s agent is back, and lets everything pass",
    "nothing more can happen": "nothing more can happen",
}


@dataclass
class Story:
    """The lines, the happenings, and by epoch what receivers' and senders' edges recorded, as numbers of frames.

    ``numbers`` are of the frames on their way, in line; ``committed`` are the epochs of snapshots that are;
    ``channels`` tell who sent a frame to whom.
    """

    lines: list[str] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    received: dict[int, list[int]] = field(default_factory=dict)
    sent: dict[int, list[int]] = field(default_factory=dict)
    committed: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    channels: dict[int, tuple[int, int]] = field(default_factory=dict)

    def channel_state(self, epoch: int) -> list[int]:
        """The frames that a restore replays, in order: what receivers recorded, then what senders did."""
        return self.received.get(epoch, []) + self.sent.get(epoch, [])

    def orphans(self) -> dict[int, frozenset[int]]:
        """The orphans that the independent judge finds, by the epoch that each snapshot cut into."""
        found = {epoch: judge(self.happenings, epoch).orphans for epoch in self._epochs()}
        return {epoch: orphans for epoch, orphans in found.items() if orphans}

    def extra(self) -> dict[int, frozenset[int]]:
        """The frames in a channel state that were not in transit, as the independent judge finds."""
        return self._differences(lambda recorded, in_transit: recorded - in_transit)

    def missing(self) -> dict[int, frozenset[int]]:
        """The frames that were in transit and are in no channel state, as the independent judge finds."""
        return self._differences(lambda recorded, in_transit: in_transit - recorded)

    def _differences(
        self, difference: Callable[[frozenset[int], frozenset[int]], frozenset[int]]
    ) -> dict[int, frozenset[int]]:
        """By epoch. Of a snapshot that is not committed only frames that have been received can be told of."""
        over = {happening.frame for happening in self.happenings if isinstance(happening, Received)}
        found = {}
        for epoch in self._epochs():
            recorded = frozenset(self.channel_state(epoch))
            frames = difference(recorded, judge(self.happenings, epoch).in_transit)
            found[epoch] = frames if epoch in self.committed else frames & over
        return {epoch: frames for epoch, frames in found.items() if frames}

    def _epochs(self) -> list[int]:
        cut = {what.snapshot for what in self.happenings if isinstance(what, Cut)}
        return sorted(cut | self.received.keys() | self.sent.keys())


def tell(world: Lossless, path: list[State]) -> Story:
    """The story of a path that :func:`geni_violin.check.explore.explore` found."""
    story = Story()
    about, _, frames = world.look(world.initial())
    for told in retrace(world, path):
        about_after, cells, after = world.look(told.after)
        _follow(story, told, about_after, cells, frames, after)
        if about.judged and about_after.phase == QUIET:
            story.committed.append(about.epoch)
        about, frames = about_after, after
    return story


def _follow(story: Story, told: Told[State], about: Progress, cells: Cells, before: Frames, after: Frames) -> None:
    """One move: its line, what happened at VMs, which frames are gone and which are recorded."""
    kind, lines = told.move.kind, told.move.detail if isinstance(told.move.detail, tuple) else ()
    if kind == "a frame is sent":
        story.numbers.append(len(story.channels) + 1)
        story.channels[story.numbers[-1]] = (told.place, told.other)
        story.happenings.append(Sent(_name(told.place), story.numbers[-1]))
    moved = [story.numbers[line] for line in lines]
    story.lines.append(_line(told, about, cells, moved, before, after))
    if kind in ("stop", "switchover"):
        story.happenings.append(Cut(_name(told.place), about.epoch))
    if kind in ("a frame is received", OVERTAKING, "release", "step aside"):
        story.happenings += [Received(_name(told.place), number) for number in moved]
    recorded = {number for number, frame in zip(story.numbers, before, strict=False) if frame.recorded}
    if len(after) < len(before):
        story.numbers = [number for number in story.numbers if number not in moved]
    now = (number for number, frame in zip(story.numbers, after, strict=True) if frame.recorded)
    record = story.sent if kind in ("hold", "release") else story.received
    for number in now:
        if number not in recorded:
            record.setdefault(about.epoch, []).append(number)


def _line(told: Told[State], about: Progress, cells: Cells, moved: list[int], before: Frames, after: Frames) -> str:
    kind = told.move.kind
    if kind in _LINES:
        return _of_vm(_LINES[kind], told.place, about, cells, moved if kind in ("release", "step aside") else [])
    number, line = moved[0], told.move.detail[0] if isinstance(told.move.detail, tuple) else 0
    if kind == "a frame is sent":
        held = " and held at its edge" if cells[told.place].out_held else ""
        return f"{_name(told.place)} sends frame {number} to {_name(told.other)}{held}"
    text = kind.replace("a frame", f"frame {number}").replace("a future frame", f"future frame {number}")
    if kind.endswith(("is colored", "colored after it")):
        epoch = after[line].epoch
        early = ", which was sent before the cut," if kind.endswith("after it") else ""
        return f"frame {number}{early} gets color {color_of(epoch)} (epoch {epoch})"
    tag = " with its tag on" if kind == "a frame is received" and before[line].tagged else ""
    return f"at {_name(told.place)}, {text}{tag}"


def _of_vm(line: str, place: int, about: Progress, cells: Cells, received: list[int]) -> str:
    """A line about a VM, or about none."""
    cell = cells[place] if place >= 0 else Cell("", "", 0, 0, 0)
    colors = {"color": color_of(cell.ingress), "egress_color": color_of(cell.egress), "new": color_of(about.epoch)}
    text = line.format(vm=_name(place), epoch=about.epoch, ingress=cell.ingress, egress=cell.egress, **colors)
    numbers = ", ".join(str(number) for number in received)
    return f"{text}, and it receives what waited: frame {numbers}" if received else text


def _name(place: int) -> str:
    return f"vm{place + 1}"
