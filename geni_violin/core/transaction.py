"""The snapshot of a slice as one transaction: a pure machine that the coordinator runs.

Theory of operation::

    preparing -> armed -> cutting -> streaming -> committing -> committed
        |          |         |           |             |
        +----------+---------+-----------+-------------+--> aborting -> aborted

What must hold, and why it does:

- *Whole or absent.* ``committing`` is entered only when every VM is cut, every image has left its host whole, every
  image is durable and the channel state is sealed; only there is the manifest published, in one atomic step, which is
  the commit point. From ``committing`` the way back exists only for an answer that says "not published, and will not
  be".
- *Durable before visible.* The driver writes each new state to disk before it sends the commands that follow from it.
  So after a crash :class:`CoordinatorRestarted` finds a state at least as old as any message sent: what had begun to
  commit commits, everything else aborts.
- *Colors only advance.* An abort never takes a color back: once a future frame may have been admitted anywhere, the
  network is driven on to the new epoch at all ports, and only then is the transaction ``aborted``.
- *At most two adjacent epochs.* A transaction is over only when the old color is retired: when no frame of it is
  alive (Mattern's counters, or the maximum frame lifetime), so the next one begins with one color alive.
- *No future frame without an edge that keeps it.* The network is armed only when every edge is, and disarmed only when
  every VM is cut and the old color is retired; the edges step aside after that.
- *No VM left paused.* Aborting asks every agent to cancel; an agent that cannot be reached does so by its own deadline.

Parties answer :class:`Refused` when they cannot or did not; a party that does not answer runs into the phase's timer.
:mod:`geni_violin.core.transaction_events` has the events and the commands.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from geni_violin.core.messages import ChannelSummary, CutPromise, CutReport, EdgeReport, ImageStatus, StreamReport
from geni_violin.core.transaction_events import (
    NETWORK,
    STORE,
    AdvanceNetwork,
    ArmNetwork,
    ArmVm,
    CancelRequested,
    CancelVm,
    ChannelsSealed,
    ColorRetired,
    Command,
    CoordinatorRestarted,
    CountFrames,
    CutVm,
    DisarmNetwork,
    DiscardImages,
    Event,
    FramesCounted,
    ImagesDiscarded,
    ImagesStaged,
    ImageStored,
    ManifestPublished,
    NetworkAdvanced,
    NetworkArmed,
    NetworkDisarmed,
    NetworkPrepared,
    PrepareNetwork,
    PrepareVm,
    PublishManifest,
    Refused,
    RetireColor,
    SealChannels,
    SetTimer,
    SettleVm,
    StageImages,
    TimerFired,
    VmArmed,
    VmCut,
    VmPrepared,
    VmReleased,
    VmSettled,
    VmStreamed,
)


class Phase(StrEnum):
    """The states of a transaction."""

    PREPARING = "preparing"
    ARMED = "armed"
    CUTTING = "cutting"
    STREAMING = "streaming"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTING = "aborting"
    ABORTED = "aborted"


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = MappingProxyType(
    {
        Phase.PREPARING: frozenset({Phase.ARMED, Phase.ABORTING}),
        Phase.ARMED: frozenset({Phase.CUTTING, Phase.ABORTING}),
        Phase.CUTTING: frozenset({Phase.STREAMING, Phase.ABORTING}),
        Phase.STREAMING: frozenset({Phase.COMMITTING, Phase.ABORTING}),
        Phase.COMMITTING: frozenset({Phase.COMMITTED, Phase.ABORTING}),
        Phase.COMMITTED: frozenset(),
        Phase.ABORTING: frozenset({Phase.ABORTED}),
        Phase.ABORTED: frozenset(),
    }
)
"""Every way from a state to another; the documentation's diagram is drawn from it."""

FINAL = frozenset({Phase.COMMITTED, Phase.ABORTED})

_ANSWERS: Mapping[type[Event], type[Command]] = MappingProxyType(
    {
        ImagesStaged: StageImages,
        VmArmed: ArmVm,
        NetworkArmed: ArmNetwork,
        VmCut: CutVm,
        VmStreamed: CutVm,
        ImageStored: CutVm,
        ColorRetired: RetireColor,
        NetworkDisarmed: DisarmNetwork,
        VmSettled: SettleVm,
        ChannelsSealed: SealChannels,
        FramesCounted: CountFrames,
    }
)
"""What an event answers. Nothing is believed before it was asked: it would be of another transaction."""
_UNDONE = (VmReleased, VmSettled, NetworkAdvanced, ImagesDiscarded)
"""What comes of an abort."""

# --- state ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What a snapshot is asked to be. ``epoch`` is the one that the VMs are cut into; deadlines are spans.

    ``network`` is the policy asked for; each VM's promise tells the one that it gets.
    """

    vms: tuple[str, ...]
    epoch: int
    coordination: str = "color"
    strategy: str = "background"
    network: str = "hold"
    delays_ms: Mapping[str, float] = field(default_factory=dict)
    prepare_deadline_ms: float = 10_000.0
    cut_deadline_ms: float = 5_000.0
    stream_deadline_ms: float = 600_000.0

    @property
    def colored(self) -> bool:
        """Whether the network takes part."""
        return self.coordination == "color"


@dataclass(frozen=True)
class TransactionState:
    """One snapshot on its way. The mappings are by VM name and grow as reports come in.

    ``asked`` are the commands that are sent once only, and were. ``retired`` tells how the old color was found to be
    retired, None as long as it is not.
    """

    options: Options
    began_ms: float
    phase: Phase = Phase.PREPARING
    promises: Mapping[str, CutPromise] = field(default_factory=dict)
    cuts: Mapping[str, CutReport] = field(default_factory=dict)
    streams: Mapping[str, StreamReport] = field(default_factory=dict)
    images: Mapping[str, ImageStatus] = field(default_factory=dict)
    edges: Mapping[str, EdgeReport] = field(default_factory=dict)
    channels: Mapping[str, ChannelSummary] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    network_ready: bool = False
    staged: bool = False
    armed: frozenset[str] = frozenset()
    dropped_before: int = 0
    dropped_after: int | None = None
    counted: bool = False
    retired: ColorRetired | None = None
    disarmed: bool = False
    settled: frozenset[str] = frozenset()
    sealed: bool = False
    released: frozenset[str] = frozenset()
    network_advanced: bool = False
    discarded: bool = False
    total_ms: float = 0.0
    failure: str = ""

    @property
    def holding(self) -> tuple[str, ...]:
        """The VMs whose edges hold frames."""
        promises = (self.promises.get(vm) for vm in self.options.vms)
        return tuple(promise.vm for promise in promises if promise is not None and promise.network == "hold")

    @property
    def skew_ms(self) -> float:
        """First to last cut event."""
        times = [cut.cut_at for cut in self.cuts.values()]
        return (max(times) - min(times)) * 1000.0 if times else 0.0

    @property
    def frames_dropped(self) -> int:
        """Frames dropped in the network between prepare and the end of the streams, and by edges that were full."""
        in_network = 0 if self.dropped_after is None else max(0, self.dropped_after - self.dropped_before)
        return in_network + sum(edge.frames_overflowed for edge in self.edges.values())

    @property
    def frames_held(self) -> int:
        """Frames that waited at an edge for the cut of its VM."""
        return sum(edge.frames_held for edge in self.edges.values())

    @property
    def frames_in_transit(self) -> int:
        """Frames in the channel state."""
        return sum(channel.frames for channel in self.channels.values())


Transition = tuple[TransactionState, tuple[Command, ...]]


def begin(options: Options, now_ms: float) -> Transition:
    """A new transaction, in ``preparing``."""
    network: tuple[Command, ...] = (PrepareNetwork(),) if options.colored else ()
    state = TransactionState(options, now_ms, network_ready=not options.colored)
    deadline = SetTimer(Phase.PREPARING.value, now_ms + options.prepare_deadline_ms)
    return state, (deadline, *(PrepareVm(vm) for vm in options.vms), *network)


def step(state: TransactionState, event: Event, now_ms: float) -> Transition:
    """The next state and what is to be done, given what happened. Late and repeated events change nothing."""
    if state.phase in FINAL:
        return state, ()
    match event:
        case CoordinatorRestarted():
            return _on_restart(state)
        case Refused(party, reason):
            return _on_refusal(state, party, reason)
        case CancelRequested(reason):
            return (state, ()) if state.phase in (Phase.COMMITTING, Phase.ABORTING) else _abort(state, reason)
        case TimerFired(name):
            return _on_timer(state, name)
    if not _is_awaited(state, event):
        return state, ()
    noted = _note(state, event)
    if noted == state and not isinstance(event, NetworkArmed | ManifestPublished):
        return state, ()
    return _advance(noted, event, now_ms)


def _is_awaited(state: TransactionState, event: Event) -> bool:
    """Whether the event may be believed: it has been asked for, and a promise comes before all that rests on it."""
    if isinstance(event, VmPrepared):
        return state.phase is Phase.PREPARING
    if state.phase is Phase.ABORTING and isinstance(event, _UNDONE):
        return True
    question = _ANSWERS.get(type(event))
    return not isinstance(event, _UNDONE) if question is None else question.__name__ in state.asked


def _note(state: TransactionState, event: Event) -> TransactionState:
    """Write down what an event tells."""
    match event:
        case VmPrepared(promise):
            return replace(state, promises={**state.promises, promise.vm: promise})
        case VmArmed(vm):
            return replace(state, armed=state.armed | {vm})
        case VmCut(cut):
            return replace(state, cuts={**state.cuts, cut.vm: cut})
        case VmStreamed(stream):
            return replace(state, streams={**state.streams, stream.vm: stream})
        case ImageStored(status):
            return replace(state, images={**state.images, status.vm: status})
        case VmSettled(vm, report):
            edges = state.edges if report is None else {**state.edges, vm: report}
            return replace(state, settled=state.settled | {vm}, edges=edges)
        case VmReleased(vm):
            return replace(state, released=state.released | {vm})
    return _note_once(state, event)


def _note_once(state: TransactionState, event: Event) -> TransactionState:
    """Write down what an event tells that comes once in a transaction."""
    match event:
        case NetworkPrepared(frames_dropped):
            return replace(state, network_ready=True, dropped_before=frames_dropped)
        case ImagesStaged():
            return replace(state, staged=True)
        case ColorRetired():
            return replace(state, retired=event)
        case NetworkDisarmed():
            return replace(state, disarmed=True)
        case ChannelsSealed(summaries):
            return replace(state, sealed=True, channels={summary.vm: summary for summary in summaries})
        case FramesCounted(frames_dropped):
            return replace(state, counted=True, dropped_after=frames_dropped)
        case NetworkAdvanced():
            return replace(state, network_advanced=True)
        case ImagesDiscarded():
            return replace(state, discarded=True)
    return state


def _ask(state: TransactionState, *commands: Command) -> Transition:
    """Send commands of a kind that is sent once only, unless they were."""
    kind = type(commands[0]).__name__
    if kind in state.asked:
        return state, ()
    return replace(state, asked=state.asked | {kind}), commands


def _advance(state: TransactionState, event: Event, now_ms: float) -> Transition:
    """Leave the present phase if all that it waits for is there."""
    match state.phase:
        case Phase.PREPARING:
            return _after_preparing(state, now_ms)
        case Phase.ARMED if isinstance(event, NetworkArmed):
            return _cut(state, now_ms)
        case Phase.ARMED if state.armed >= set(state.holding):
            return _ask(state, ArmNetwork(state.options.epoch, state.holding))
        case Phase.CUTTING if state.cuts.keys() == set(state.options.vms):
            return _stream(state, now_ms)
        case Phase.STREAMING:
            return _after_streaming(state, now_ms)
        case Phase.COMMITTING if isinstance(event, ManifestPublished):
            return replace(state, phase=Phase.COMMITTED), ()
        case Phase.ABORTING:
            return _after_aborting(state)
    return state, ()


def _after_preparing(state: TransactionState, now_ms: float) -> Transition:
    """All promises, then room for the images, then armed: the edges first, then the network."""
    options = state.options
    if state.promises.keys() != set(options.vms) or not state.network_ready:
        return state, ()
    if not state.staged:
        return _ask(state, StageImages({vm: promise.memory_bytes for vm, promise in state.promises.items()}))
    armed = replace(state, phase=Phase.ARMED)
    if not options.colored:
        return _cut(armed, now_ms)
    deadline = SetTimer(Phase.ARMED.value, now_ms + options.prepare_deadline_ms)
    edges = tuple(ArmVm(vm, options.epoch, state.promises[vm].strategy) for vm in state.holding)
    after, commands = _ask(armed, *(edges or (ArmNetwork(options.epoch, ()),)))
    return after, (deadline, *commands)


def _cut(state: TransactionState, now_ms: float) -> Transition:
    """Tell all agents at once. From here on a color may have changed somewhere, whatever happens."""
    options = state.options
    deadline = SetTimer(
        Phase.CUTTING.value, now_ms + max(options.delays_ms.values(), default=0.0) + 2 * _cut_span_ms(state)
    )
    promises = (state.promises[vm] for vm in options.vms)
    cuts = (CutVm(p.vm, options.epoch, p.strategy, p.network, options.delays_ms.get(p.vm, 0.0)) for p in promises)
    after, commands = _ask(replace(state, phase=Phase.CUTTING), *cuts)
    return after, (deadline, *commands)


def _cut_span_ms(state: TransactionState) -> float:
    """How long a cut may take to be reported: as long as an image's stream, where the stream comes first."""
    streams_first = any(
        p.strategy == "precopy" or (p.strategy, p.network) == ("stop", "hold") for p in _promises(state)
    )
    return state.options.stream_deadline_ms if streams_first else state.options.cut_deadline_ms


def _promises(state: TransactionState) -> tuple[CutPromise, ...]:
    return tuple(state.promises.values())


def _stream(state: TransactionState, now_ms: float) -> Transition:
    streaming = replace(state, phase=Phase.STREAMING)
    deadline = SetTimer(Phase.STREAMING.value, now_ms + 2 * state.options.stream_deadline_ms)
    after, commands = _after_streaming(streaming, now_ms)
    return after, (deadline, *commands)


def _after_streaming(state: TransactionState, now_ms: float) -> Transition:
    """The old color retired, the network disarmed and the edges settled; meanwhile every image gone and durable.

    Then the channel state is sealed and the frames are counted: committing.
    """
    state, commands = _settle(state) if state.options.colored else (state, ())
    vms = set(state.options.vms)
    if state.streams.keys() != vms or state.images.keys() != vms or not _is_settled(state):
        return state, commands
    for missing, command in ((not state.sealed and state.holding, SealChannels()), (not state.counted, CountFrames())):
        if state.options.colored and missing:
            after, last = _ask(state, command)
            return after, (*commands, *last)
    return replace(state, phase=Phase.COMMITTING, total_ms=now_ms - state.began_ms), (*commands, PublishManifest())


def _settle(state: TransactionState) -> Transition:
    """The next thing to ask for on the way from the last cut to a network of one color."""
    if state.retired is None:
        return _ask(state, RetireColor(state.options.epoch))
    if not state.holding:
        return state, ()
    if not state.disarmed:
        return _ask(state, DisarmNetwork(state.options.epoch))
    return _ask(state, *(SettleVm(vm, keep=True) for vm in state.holding))


def _is_settled(state: TransactionState) -> bool:
    return not state.options.colored or (state.retired is not None and state.settled >= set(state.holding))


def _on_timer(state: TransactionState, name: str) -> Transition:
    if name != state.phase.value or state.phase in (Phase.COMMITTING, Phase.ABORTING):
        return state, ()
    missing = ", ".join(_missing(state))
    return _abort(state, f"still {state.phase.value} at the deadline; no answer from {missing or 'the network'}")


def _missing(state: TransactionState) -> list[str]:
    """Who has not answered yet in the present phase."""
    if state.phase is Phase.ARMED:
        return [vm for vm in state.holding if vm not in state.armed] or [NETWORK]
    answered: Mapping[str, object] = {
        Phase.PREPARING: state.promises,
        Phase.CUTTING: state.cuts,
        Phase.STREAMING: {vm: 1 for vm in state.streams if vm in state.images},
    }.get(state.phase, {})
    silent = [vm for vm in state.options.vms if vm not in answered]
    if state.phase is Phase.PREPARING and not silent:
        return [STORE] if state.network_ready else [NETWORK]
    return silent


def _on_refusal(state: TransactionState, party: str, reason: str) -> Transition:
    """Nobody's refusal stops an abort; what has begun to commit heeds the snapshot server's alone."""
    if state.phase is Phase.ABORTING or (state.phase is Phase.COMMITTING and party != STORE):
        return state, ()
    return _abort(state, f"{party}: {reason}")


def _abort(state: TransactionState, reason: str) -> Transition:
    return _resend_abort(replace(state, phase=Phase.ABORTING, failure=reason))


def _resend_abort(state: TransactionState) -> Transition:
    """Ask for whatever an abort still lacks. The edges step aside last: the network must not be armed any more."""
    cancels = tuple(CancelVm(vm) for vm in state.options.vms if vm not in state.released)
    advance = (AdvanceNetwork(state.options.epoch),) if _must_advance(state) else ()
    settles = () if cancels or advance else tuple(SettleVm(vm, keep=False) for vm in _unsettled(state))
    return state, (*cancels, *advance, *settles, *(() if state.discarded else (DiscardImages(),)))


def _must_advance(state: TransactionState) -> bool:
    """Whether a future frame may have been admitted somewhere, and the network is not driven on yet."""
    begun = state.asked & {ArmNetwork.__name__, CutVm.__name__}
    return state.options.colored and bool(begun) and not state.network_advanced


def _unsettled(state: TransactionState) -> list[str]:
    """The VMs whose edges were to be armed and have not stepped aside."""
    return [vm for vm in state.holding if vm not in state.settled] if ArmVm.__name__ in state.asked else []


def _after_aborting(state: TransactionState) -> Transition:
    if not state.released >= set(state.options.vms) or _must_advance(state):
        return state, ()
    if _unsettled(state):
        undone = replace(state, asked=state.asked | {"undo"})
        return undone, () if "undo" in state.asked else tuple(SettleVm(vm, keep=False) for vm in _unsettled(state))
    return (replace(state, phase=Phase.ABORTED), ()) if state.discarded else (state, ())


def _on_restart(state: TransactionState) -> Transition:
    """What had begun to commit commits, what had not aborts."""
    if state.phase is Phase.COMMITTING:
        return state, (PublishManifest(),)
    if state.phase is Phase.ABORTING:
        return _resend_abort(state)
    return _abort(state, "the coordinator stopped in the middle of the snapshot")
