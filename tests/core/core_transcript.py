"""Transcripts of the two machines: what happens, and under it the phase and the commands that follow.

A transcript is a text file. ``#`` begins a comment, ``@ 12 ms: vm1 is cut`` is an event at a time, and the indented
lines under it are what the machine makes of it: its phase, then each command. The first line that is no comment says
which machine it is: ``transaction of vm1, vm2``, ``background cut`` or ``background cut that holds frames``.
:func:`replay` keeps the events and writes the rest anew.
"""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from geni_violin.core import cut
from geni_violin.core import transaction as tx
from geni_violin.core import transaction_events as ev
from geni_violin.core.messages import ChannelSummary, CutPromise, CutReport, EdgeReport, ImageStatus, StreamReport

Event = TypeVar("Event")
_TX_EVENTS: dict[str, Callable[..., ev.Event]] = {
    r"(\w+) is prepared to hold": lambda vm: ev.VmPrepared(CutPromise(vm, "background", "", 128, "hold")),
    r"(\w+) is prepared": lambda vm: ev.VmPrepared(CutPromise(vm, "background", "", 128)),
    r"the network is prepared": lambda: ev.NetworkPrepared(3),
    r"the images are staged": ev.ImagesStaged,
    r"(\w+) is armed": ev.VmArmed,
    r"the network is armed": ev.NetworkArmed,
    r"(\w+) is cut": lambda vm: ev.VmCut(CutReport(vm, 100.0, 2.0, 1.0)),
    r"(\w+) has streamed": lambda vm: ev.VmStreamed(StreamReport(vm, 2.0, 4096)),
    r"(\w+)'s image is stored": lambda vm: ev.ImageStored(ImageStatus(vm, "durable", 4096, 4096)),
    r"the old color is retired": lambda: ev.ColorRetired(by_counters=True),
    r"the frame lifetime has passed": lambda: ev.ColorRetired(by_counters=False),
    r"the network is disarmed": ev.NetworkDisarmed,
    r"(\w+) has settled": lambda vm: ev.VmSettled(vm, EdgeReport(vm, 7, 0, 2, 3)),
    r"(\w+) has settled with nothing kept": lambda vm: ev.VmSettled(vm, None),
    r"the channels are sealed": lambda: ev.ChannelsSealed((ChannelSummary("vm1", 3, 300),)),
    r"the frames are counted": lambda: ev.FramesCounted(8),
    r"the manifest is published": ev.ManifestPublished,
    r"(.+) refuses: (.+)": ev.Refused,
    r"(\w+) is released": ev.VmReleased,
    r"the network has advanced": ev.NetworkAdvanced,
    r"the images are discarded": ev.ImagesDiscarded,
    r"someone cancels: (.+)": ev.CancelRequested,
    r"the timer (\w+) fires": ev.TimerFired,
    r"the coordinator restarts": ev.CoordinatorRestarted,
}
_CUT_EVENTS: dict[str, Callable[..., cut.Event]] = {
    r"the edge is armed": cut.EdgeArmed,
    r"the coordinator wants the cut": cut.CutRequested,
    r"the coordinator wants the cut in (\d+) ms": lambda delay_ms: cut.CutRequested(float(delay_ms)),
    r"a future frame is seen": cut.FutureFrameSeen,
    r"the network is disarmed": cut.NetworkDisarmed,
    r"the path is returned": cut.PathReturned,
    r"the frames are held": cut.FramesHeld,
    r"the VM has stopped": lambda: cut.VmStopped(100.0),
    r"the VM has resumed": lambda: cut.VmResumed(100.002),
    r"the migration is paused": cut.MigrationPaused,
    r"the ports are recolored": lambda: cut.PortsRecolored(1.0),
    r"the frames are released": cut.FramesReleased,
    r"the migration has completed": lambda: cut.MigrationCompleted(4096),
    r"the migration has ended": cut.MigrationEnded,
    r"a step fails: (.+)": cut.StepFailed,
    r"someone cancels: (.+)": cut.CancelRequested,
    r"the deadline (\w+) passes": cut.DeadlinePassed,
    r"the VM dies": cut.VmDied,
}


def replay(text: str) -> str:
    """The transcript with the same comments and events, and what the machines make of them now."""
    lines: list[str] = []
    machine: _Machine | None = None
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            if machine is None:
                machine = _machine(line)
                lines += machine.begin()
            else:
                lines += machine.happens(line)
    return "\n".join(lines) + "\n"


class _Machine:
    """One of the two machines on its way."""

    def begin(self) -> list[str]:
        raise NotImplementedError

    def happens(self, line: str) -> list[str]:
        raise NotImplementedError


class _Transaction(_Machine):
    def __init__(self, vms: tuple[str, ...]) -> None:
        self.state, self.commands = tx.begin(tx.Options(vms, epoch=1), 0.0)

    def begin(self) -> list[str]:
        return _shown(self.state.phase.value, self.state.failure, [_command(c) for c in self.commands])

    def happens(self, line: str) -> list[str]:
        now_ms, event = _read(line, _TX_EVENTS)
        self.state, commands = tx.step(self.state, event, now_ms)
        return _shown(self.state.phase.value, self.state.failure, [_command(c) for c in commands])


class _Cut(_Machine):
    def __init__(self, strategy: str, network: str) -> None:
        state = cut.CutState(cut.PLANS[strategy, network], cut_deadline_ms=5000.0, stream_deadline_ms=60000.0)
        self.state, self.commands = cut.begin(state, 0.0)

    def begin(self) -> list[str]:
        return _shown(self.state.phase.value, self.state.failure, [_cut_command(c) for c in self.commands])

    def happens(self, line: str) -> list[str]:
        now_ms, event = _read(line, _CUT_EVENTS)
        self.state, commands = cut.step(self.state, event, now_ms)
        return _shown(self.state.phase.value, self.state.failure, [_cut_command(c) for c in commands])


def _machine(line: str) -> _Machine:
    if found := re.fullmatch(r"transaction of (.+)", line):
        return _Transaction(tuple(found[1].split(", ")))
    if found := re.fullmatch(r"(\w+) cut( that holds frames)?", line):
        return _Cut(found[1], "hold" if found[2] else "drop")
    raise ValueError(f"a transcript begins with its machine, not with {line!r}")


def _read(line: str, known: Mapping[str, Callable[..., Event]]) -> tuple[float, Event]:
    """The time and the event of a line."""
    found = re.fullmatch(r"@ (\d+) ms: (.+)", line)
    if found is None:
        raise ValueError(f"not an event: {line!r}")
    for pattern, make in known.items():
        if what := re.fullmatch(pattern, found[2]):
            return float(found[1]), make(*what.groups())
    raise ValueError(f"an unknown event: {line!r}")


def _shown(phase: str, failure: str, commands: list[str]) -> list[str]:
    return [f"    {phase}{f' ({failure})' if failure else ''}", *(f"    -> {command}" for command in commands)]


def _command(command: ev.Command) -> str:
    """A transaction's command in words."""
    match command:
        case ev.SetTimer(name, at_ms):
            return f"timer {name} at {at_ms:.0f} ms"
        case ev.CutVm(vm, epoch, strategy, network, delay_ms):
            return f"cut {vm} into epoch {epoch}, {strategy}, {network}, after {delay_ms:g} ms"
        case ev.ArmVm(vm, epoch, strategy):
            return f"arm {vm} for epoch {epoch}, {strategy}"
        case ev.ArmNetwork(epoch, vms):
            return f"arm the network for epoch {epoch}: {', '.join(vms) or 'no VM'}"
        case ev.RetireColor(epoch):
            return f"retire the color before epoch {epoch}"
        case ev.DisarmNetwork(epoch):
            return f"disarm the network in epoch {epoch}"
        case ev.SettleVm(vm, keep):
            return f"settle {vm}, its record is {'kept' if keep else 'not kept'}"
        case ev.AdvanceNetwork(epoch):
            return f"advance the network to epoch {epoch}"
        case ev.StageImages(memory_bytes):
            return f"stage the images of {', '.join(memory_bytes)}"
        case ev.PrepareVm(vm):
            return f"prepare {vm}"
        case ev.CancelVm(vm):
            return f"cancel {vm}"
    return re.sub(r"(?<!^)(?=[A-Z])", " ", type(command).__name__).lower()


def _cut_command(command: cut.Command) -> str:
    """A cut's command in words."""
    match command:
        case cut.SetDeadline(name, at_ms):
            return f"deadline {name} at {at_ms:.0f} ms"
        case cut.Report():
            return f"report {command.value}"
    return command.value
