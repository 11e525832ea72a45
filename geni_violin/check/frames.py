"""Frames on their way in a network that loses nothing, where they wait, and how each reception is judged.

Theory of operation. All frames that are on their way are kept in the order in which they were sent, so that a frame is
overtaken if one that comes after it here is received first. A frame waits in one place at a time; of those from one VM
to another that wait in the same place only the first can move on. Between channels there is no order: whatever one
queue for several senders forces on them is one of the orders that are explored.

A frame knows how many cuts its sender had been through when it was sent. So at its reception it can be told from first
principles whether it is an orphan and whether it was in transit, and the latter is compared with what was recorded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from geni_violin.check.bounds import Progress
from geni_violin.check.edge import INJECTED, LEAVING, TAGGED, UNTAGGED, Cell
from geni_violin.check.rules import LosslessRules

OUT, TAP, NET, IN, KEPT, QUEUED, INJECT = range(7)
"""Where a frame is: held as it leaves its VM; past that, not colored; colored; past its receiver's port; in the plain
buffer there; waiting in the agent's queue; injected, not consumed."""

ORPHAN = "orphan"
OVERTAKEN = "a frame overtakes one that was sent before it"
LOST = "a frame is lost"
TOO_MANY = "the channel state has a frame that was not in transit"
TOO_FEW = "the channel state lacks a frame in transit"
OVERTAKING = "a frame is received before one at the hold port"
WITH_TAG = "a VM gets a frame with the slice's tag on"


class Frame(NamedTuple):
    """A frame on its way. ``epoch`` is its color's (-1: not colored yet), ``sent`` its sender's cuts so far.

    ``recorded``: it is in the channel state of the snapshot under way.
    """

    source: int
    target: int
    place: int
    epoch: int
    sent: int
    recorded: bool = False
    tagged: bool = False


Frames = tuple[Frame, ...]


@dataclass(frozen=True)
class Shift:
    """What an effect does to frames: all of them after it, and the places in line of those that the VM receives."""

    frames: Frames
    received: tuple[int, ...] = ()


def whereabouts(frames: Frames, vm: int) -> int:
    """Where frames of a VM are, as :func:`geni_violin.check.edge.ready` wants to know it."""
    found = 0
    for frame in frames:
        if frame.place == TAP and frame.source == vm:
            found |= LEAVING
        elif frame.target == vm and frame.place == INJECT:
            found |= INJECTED
        elif frame.target == vm and frame.place == IN:
            found |= TAGGED if frame.tagged else UNTAGGED
    return found


def first_in_line(frames: Frames) -> Iterator[int]:
    """The places in line of all frames that may move on by themselves."""
    seen: set[tuple[int, int, int]] = set()
    for number, frame in enumerate(frames):
        if frame.place in (TAP, NET, IN, INJECT):
            line = (frame.source, frame.target, frame.place)
            if line not in seen:
                seen.add(line)
                yield number


def overtakes(frames: Frames, number: int) -> bool:
    """Whether a frame is received before one that was sent before it from the same VM to the same VM."""
    channel = frames[number][:2]
    return any(frame[:2] == channel for frame in frames[:number])


def may_overtake(target: Cell) -> bool:
    """Whether a frame may reach a VM before one that was sent before it: past its hold port, once that is left."""
    return target.in_switch and not target.armed


def replaced(frames: Frames, number: int, frame: Frame) -> Frames:
    """One frame has moved on."""
    return (*frames[:number], frame, *frames[number + 1 :])


def without(frames: Frames, numbers: tuple[int, ...]) -> Frames:
    """Some frames have come to an end."""
    return tuple(frame for number, frame in enumerate(frames) if number not in numbers)


def held(frames: Frames, vm: int, rules: LosslessRules) -> Frames:
    """A VM's edge begins to hold. The record of sent frames begins with the first one that is held, and no sooner."""
    if rules.sent_record_begins_with_hold:
        return frames
    leaves = (frame.source == vm and frame.place == TAP for frame in frames)
    return tuple(f._replace(recorded=True) if out else f for f, out in zip(frames, leaves, strict=True))


def let_go(frames: Frames, vm: int, cell: Cell, epoch: int, rules: LosslessRules) -> Shift:
    """A VM's edge holds frames no more. What was sent before the stop leaves in the new color: it is in transit."""

    def after(frame: Frame) -> Frame:
        if frame.source == vm and frame.place == OUT:
            before = frame.sent < epoch or not rules.sent_before_the_stop_only
            late = cell.holds and cell.machine >= 0 and before and rules.records_sent
            return frame._replace(place=TAP, recorded=frame.recorded or late)
        if frame.target == vm and frame.place == QUEUED:
            return frame._replace(place=INJECT)
        return frame

    return Shift(tuple(after(frame) for frame in frames), kept_for(frames, vm))


def kept_for(frames: Frames, vm: int) -> tuple[int, ...]:
    """The places in line of the frames in a VM's plain buffer."""
    return tuple(number for number, frame in enumerate(frames) if frame.target == vm and frame.place == KEPT)


def verdict(about: Progress, frames: Frames, number: int, source: Cell, target: Cell, strict: bool) -> str:
    """What is wrong with the reception of a frame; empty if nothing is."""
    frame = frames[number]
    if frame.tagged:
        return WITH_TAG
    if overtakes(frames, number) and not may_overtake(target):
        return OVERTAKEN
    if not about.judged:
        return ""
    if frame.sent > target.cuts:
        return ORPHAN
    if strict and frame.epoch > target.cuts:
        return "R2: a frame of the new color enters a VM before its cut"
    return inexact(frame, frame.sent < about.epoch <= target.cuts, source, target)


def inexact(frame: Frame, in_transit: bool, source: Cell, target: Cell) -> str:
    """Whether the channel state has this frame and should not, or the other way round.

    A VM whose frames are dropped, or whose sent frames are not recorded, has no exact channel state.
    """
    if frame.recorded and not in_transit:
        return TOO_MANY
    missing = in_transit and not frame.recorded and source.holds and target.holds
    return TOO_FEW if missing else ""
