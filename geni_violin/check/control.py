"""The control plane: the real transaction among parties that answer, refuse, fail, fall silent, and come back.

Theory of operation. What the coordinator is told are facts that stay true once they are (a VM *has* been cut). So no
message needs a place in the state: the coordinator may learn a fact at any time after it came true, or never, which is
delay, reordering and loss in one. What it has commanded may be carried out at any time after, or never. It may crash at
any moment: before the new state is on disk is the same as never having learned, after it the commands may not have
left. An agent that cannot be reached counts as released, and as settled; its own deadline does the rest, later. Where
answers commute (the promises, the armed edges), they come in one order.

Some VMs may promise to hold frames, the others only to drop them. An *edge* here is the diversion of a VM's frames: it
has to stand whenever the network gives its port frames with the slice's tag on, whatever became of its VM's cut.

A late request is the one thing that a party must refuse: an agent arms no edge for a cut that is cancelled, and the
network is not armed any more for an epoch that all ports have reached. Without the latter the explorer finds a network
that stays armed when the transaction is over.

The state is kept as bits, and :func:`geni_violin.core.transaction.step` is run on the state that the bits stand for; so
VMs can be sorted here too.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from geni_violin.check.explore import Move
from geni_violin.core import transaction as tx
from geni_violin.core import transaction_events as ev
from geni_violin.core.messages import CutPromise, CutReport, EdgeReport, ImageStatus, StreamReport
from geni_violin.core.transaction import Phase

IDLE, WAITING, CUTTING, CUT, SETTLED, STREAMED = "idle", "waiting", "cutting", "cut", "settled", "streamed"
GONE, LOST = "gone", "lost"
"""Where a VM's cut is, by its agent. WAITING: the edge is armed, GONE: undone before the VM was cut, LOST: after."""

ARMED, RETIRED, DISARMED, SEALED, ADVANCED = "armed", "retired", "disarmed", "sealed", "advanced"
ARMED_LATE, PUBLISHED, UNPUBLISHABLE, THROWN_AWAY = "armed late", "published", "unpublishable", "thrown away"
"""What the network and the store did. ARMED_LATE: after all was undone. UNPUBLISHABLE: the store said no, for good."""

Told = tuple[str, ...]
"""The kinds of the commands that a party was sent, sorted."""


class Known(NamedTuple):
    """What the transaction has noted of one VM. ``holds`` is what its agent promises, or will."""

    holds: bool = False
    promised: bool = False
    armed: bool = False
    cut: bool = False
    streamed: bool = False
    stored: bool = False
    settled: bool = False
    released: bool = False


class Party(NamedTuple):
    """One VM: where it really is, whether its edge stands, what its agent was told, what the coordinator knows."""

    stage: str = IDLE
    edge: bool = False
    stored: bool = False
    told: Told = ()
    known: Known = Known()


class Noted(NamedTuple):
    """What the transaction has noted of the rest."""

    phase: str = Phase.PREPARING.value
    asked: frozenset[str] = frozenset()
    network_ready: bool = False
    staged: bool = False
    retired: bool = False
    disarmed: bool = False
    sealed: bool = False
    counted: bool = False
    network_advanced: bool = False
    discarded: bool = False


class Rest(NamedTuple):
    """The network and the store: what the coordinator has noted of them, what they were told and what they did."""

    noted: Noted = Noted()
    told: frozenset[str] = frozenset()
    done: frozenset[str] = frozenset()


State = tuple[Rest, tuple[Party, ...]]
Step = Callable[[tx.TransactionState, ev.Event, float], tx.Transition]
_Answer = tuple[Noted, tuple[Known, ...], tuple[ev.Command, ...]]
_TIMED = ("preparing", "armed", "cutting", "streaming")
_ENDS = tuple(phase.value for phase in tx.FINAL)
_NEXT = {WAITING: (GONE,), CUTTING: (CUT, GONE), CUT: (LOST,), SETTLED: (STREAMED, LOST)}
_CANCELLED = {IDLE: GONE, WAITING: GONE, CUTTING: GONE, CUT: LOST, SETTLED: LOST}
_WAS_CUT = (CUT, SETTLED, STREAMED, LOST)


class Control:
    """A model for :func:`geni_violin.check.explore.explore`; ``step`` is replaced only to see the explorer fail.

    The first ``holding`` of the ``vms`` VMs promise to hold frames, the others do not. With ``late_arming`` a network
    whose ports have all reached an epoch can still be armed for it, which must not be.
    """

    def __init__(self, vms: int, holding: int, step: Step = tx.step, late_arming: bool = False) -> None:
        self.vms, self.holding, self.step, self.late_arming = vms, holding, step, late_arming
        self._answers: dict[tuple[Noted, tuple[Known, ...], ev.Event], _Answer | None] = {}

    def initial(self) -> State:
        """A transaction has just begun."""
        return Rest(), tuple(Party(known=Known(holds=place < self.holding)) for place in range(self.vms))

    def canonical(self, state: State) -> State:
        """Names do not matter."""
        return state[0], tuple(sorted(state[1]))

    def violation(self, state: State) -> str:
        """Whole or absent; never back; colors driven on; no frame with a tag on where no edge stands."""
        rest, parties = state
        faults = {**_snapshot_faults(rest, parties), **_network_faults(rest, parties)}
        return next((fault for fault, there in faults.items() if there), "")

    def stuck(self, state: State) -> str:
        """In the end the transaction is over, no VM is in the middle of a cut and no edge stands."""
        rest, parties = state
        if rest.noted.phase not in _ENDS:
            return f"the transaction stays {rest.noted.phase}"
        if any(party.edge for party in parties):
            return "an edge still stands"
        busy = any(party.stage in (WAITING, CUTTING, CUT, SETTLED) for party in parties)
        return "a VM stays in the middle of its cut" if busy else ""

    def moves(self, state: State) -> Iterator[tuple[Move, int, int, State]]:
        """Every step that is possible and changes something."""
        rest, parties = state
        future = _network_armed(rest, parties) and any(party.stage in _WAS_CUT for party in parties)
        aborts = rest.noted.phase in (Phase.ABORTING, Phase.ABORTED)
        for place, party in enumerate(parties):
            for kind, after in _deeds(party, future, aborts):
                yield Move(kind), place, -1, (rest, (*parties[:place], after, *parties[place + 1 :]))
        for kind, done in _rest_deeds(rest, parties, self.late_arming):
            yield Move(kind), -1, -1, (rest._replace(done=rest.done | {done}), parties)
        if rest.noted.phase in _ENDS:
            return
        known = tuple(party.known for party in parties)
        for place, event in self._learnable(rest, parties):
            told = self._tell(state, known, event)
            if told != state:
                yield Move(f"coordinator: {type(event).__name__}"), place, -1, told

    # --- what the coordinator may learn -------------------------------------------------------------------------------

    def _learnable(self, rest: Rest, parties: tuple[Party, ...]) -> Iterator[tuple[int, ev.Event]]:
        """All that may reach the coordinator now."""
        phase = rest.noted.phase
        yield from ((-1, event) for event in _rest_facts(rest))
        for place, party in enumerate(parties):
            yield from ((place, event) for event in _vm_facts(phase, party, _name(place)))
        for place, event in _in_one_order(phase, parties):
            yield place, event
        if phase in _TIMED:
            yield -1, ev.TimerFired(phase)
        yield -1, ev.Refused(_name(0), "")
        yield -1, ev.Refused(ev.NETWORK, "")
        yield -1, ev.CancelRequested("")
        yield -1, ev.CoordinatorRestarted()

    def _tell(self, state: State, known: tuple[Known, ...], event: ev.Event) -> State:
        """The real transaction learns something; its commands become what the parties were told."""
        rest, parties = state
        key = (rest.noted, known, event)
        if key not in self._answers:
            after, commands = self.step(_decode(rest.noted, known), event, 0.0)
            known_after = tuple(_known(after, place, known[place]) for place in range(len(parties)))
            same = (_noted(after), known_after, commands) == (rest.noted, known, ())
            self._answers[key] = None if same else (_noted(after), known_after, commands)
        answer = self._answers[key]
        if answer is None:
            return state
        noted, known, commands = answer
        learned = [party._replace(known=known[place]) for place, party in enumerate(parties)]
        told = {type(command).__name__ for command in commands if not hasattr(command, "vm")}
        for command in commands:
            if isinstance(command, ev.ArmVm | ev.CutVm | ev.SettleVm | ev.CancelVm):
                place = int(command.vm.removeprefix("vm")) - 1
                heard = {*learned[place].told, type(command).__name__}
                learned[place] = learned[place]._replace(told=tuple(sorted(heard)))
        return rest._replace(noted=noted, told=rest.told | (told & _HEEDED)), tuple(learned)


# --- what must never be -----------------------------------------------------------------------------------------------


def _snapshot_faults(rest: Rest, parties: tuple[Party, ...]) -> dict[str, bool]:
    """What must never be said of the snapshot, and whether it can be."""
    phase, done = rest.noted.phase, rest.done
    holding = any(party.known.holds for party in parties)
    whole = all(party.stage == STREAMED and party.stored for party in parties) and RETIRED in done
    if holding:
        whole = whole and {DISARMED, SEALED} <= done
    published = PUBLISHED in done
    return {
        "a snapshot exists that is not whole": published and not whole,
        "a snapshot exists and is aborted": published and phase in (Phase.ABORTING, Phase.ABORTED),
        "a published snapshot's images are thrown away": published and THROWN_AWAY in done,
        "committed, but nothing is published": phase == Phase.COMMITTED and not published,
        "aborted, but images are left": phase == Phase.ABORTED and THROWN_AWAY not in done,
    }


def _network_faults(rest: Rest, parties: tuple[Party, ...]) -> dict[str, bool]:
    """What must never be said of the network and the edges, and whether it can be."""
    begun = "ArmNetwork" in rest.told or any("CutVm" in party.told for party in parties)
    aborted = rest.noted.phase == Phase.ABORTED
    network_armed, holders = _network_armed(rest, parties), [party for party in parties if party.known.holds]
    return {
        "a VM gets frames with the slice's tag on: its edge does not stand": (
            network_armed and not all(party.edge for party in holders)
        ),
        "a VM that should hold frames is cut before its edge is armed": any(
            party.stage == CUTTING and not party.edge for party in holders
        ),
        "the network is disarmed before the old color is retired": DISARMED in rest.done and RETIRED not in rest.done,
        "aborted, but ports may be left behind": aborted and begun and ADVANCED not in rest.done,
        "over, but the network is armed": rest.noted.phase in _ENDS and network_armed,
    }


def _network_armed(rest: Rest, parties: tuple[Party, ...]) -> bool:
    """Whether ports are given frames with the slice's tag on: those of the VMs that hold frames."""
    holding = any(party.known.holds for party in parties)
    armed = ARMED in rest.done and not rest.done & {DISARMED, ADVANCED}
    return holding and (armed or ARMED_LATE in rest.done)


def _name(place: int) -> str:
    return f"vm{place + 1}"


def _promise(place: int, holds: bool) -> CutPromise:
    return CutPromise(_name(place), "background", "", 1, "hold" if holds else "drop")


def _in_one_order(phase: str, parties: tuple[Party, ...]) -> Iterator[tuple[int, ev.Event]]:
    """What may be learned of several VMs, and comes to the same in whatever order: it is learned in this one."""
    if phase == Phase.PREPARING:
        for place in _least(parties, lambda party: not party.known.promised):
            yield place, ev.VmPrepared(_promise(place, parties[place].known.holds))
    if phase == Phase.ARMED:
        for place in _least(parties, lambda party: party.edge and not party.known.armed):
            yield place, ev.VmArmed(_name(place))
    if phase == Phase.ABORTING:
        for place in _least(parties, lambda party: not party.known.released):
            yield place, ev.VmReleased(_name(place))
        for place in _least(parties, lambda party: "SettleVm" in party.told and not party.known.settled):
            yield place, ev.VmSettled(_name(place), None)


def _least(parties: tuple[Party, ...], wanted: Callable[[Party], bool]) -> list[int]:
    """The place of the least party of those wanted, the same one whatever the names are; none, or one."""
    places = [(party, place) for place, party in enumerate(parties) if wanted(party)]
    return [min(places)[1]] if places else []


def _vm_facts(phase: str, party: Party, name: str) -> Iterator[ev.Event]:
    """What may be learned of one VM; what a phase does not heed is left out."""
    if phase in (Phase.CUTTING, Phase.STREAMING):
        if party.stage in _WAS_CUT and phase == Phase.CUTTING:
            yield ev.VmCut(CutReport(name, 0.0, 0.0, 0.0))
        if party.stage == STREAMED:
            yield ev.VmStreamed(StreamReport(name, 0.0, 0))
        if party.stored:
            yield ev.ImageStored(ImageStatus(name, "durable"))
        if "SettleVm" in party.told and party.stage in (SETTLED, STREAMED):
            yield ev.VmSettled(name, EdgeReport(name, 0, 0, 0, 0))


_FACTS: dict[str, ev.Event] = {
    ARMED: ev.NetworkArmed(),
    RETIRED: ev.ColorRetired(by_counters=True),
    DISARMED: ev.NetworkDisarmed(),
    SEALED: ev.ChannelsSealed(()),
    PUBLISHED: ev.ManifestPublished(),
    UNPUBLISHABLE: ev.Refused(ev.STORE, ""),
    ADVANCED: ev.NetworkAdvanced(),
    THROWN_AWAY: ev.ImagesDiscarded(),
}


def _rest_facts(rest: Rest) -> Iterator[ev.Event]:
    """What may be learned of the network and the store."""
    phase = rest.noted.phase
    if phase == Phase.PREPARING:
        yield ev.NetworkPrepared(0)
        yield ev.ImagesStaged()
    if phase == Phase.STREAMING:
        yield ev.FramesCounted(None)
    yield from (fact for done, fact in _FACTS.items() if done in rest.done)


# --- what the parties do ----------------------------------------------------------------------------------------------

_HEEDED = frozenset(
    {
        *("ArmNetwork", "RetireColor", "DisarmNetwork", "AdvanceNetwork"),
        *("SealChannels", "PublishManifest", "DiscardImages"),
    }
)


def _deeds(party: Party, future: bool, aborts: bool) -> Iterator[tuple[str, Party]]:
    """A VM's agent goes on, gives up by itself, or obeys. Of what ``aborts`` the images are of no interest.

    ``future`` tells whether frames of the new color may have come to the VM's edge.
    """
    yield from _begins(party, future)
    for after in _NEXT.get(party.stage, ()):
        yield f"agent: is {after}", party._replace(stage=after)
    if party.stage == CUT and not party.known.holds:
        yield "agent: is streamed", party._replace(stage=STREAMED)
    if "SettleVm" in party.told and party.edge and party.stage in (CUT, GONE, LOST):
        stage = SETTLED if party.stage == CUT else party.stage
        yield "agent: the edge steps aside", party._replace(stage=stage, edge=False)
    if party.stage == STREAMED and not party.stored and not aborts:
        yield "store: an image is durable", party._replace(stored=True)
    if "CancelVm" in party.told and party.stage in _CANCELLED:
        yield "agent: cancels", party._replace(stage=_CANCELLED[party.stage])


def _begins(party: Party, future: bool) -> Iterator[tuple[str, Party]]:
    """A VM's agent arms the edge, or begins the cut by either trigger."""
    if party.stage == IDLE and "ArmVm" in party.told:
        yield "agent: arms the edge", party._replace(stage=WAITING, edge=True)
    if party.stage in (IDLE, WAITING) and "CutVm" in party.told:
        yield "agent: begins its cut", party._replace(stage=CUTTING)
    if party.stage == WAITING and future:
        yield "agent: a future frame begins its cut", party._replace(stage=CUTTING)


def _rest_deeds(rest: Rest, parties: tuple[Party, ...], late_arming: bool) -> Iterator[tuple[str, str]]:
    """The network and the store do what they were told, or say no: what happens, and what is then done."""
    told, done = rest.told, rest.done
    over = done & {PUBLISHED, UNPUBLISHABLE, THROWN_AWAY}
    possible = {
        ARMED: ("network: is armed", "ArmNetwork" in told and ADVANCED not in done),
        ARMED_LATE: (
            "network: is armed late",
            late_arming and "ArmNetwork" in told and ADVANCED in done and ARMED not in done,
        ),
        RETIRED: (
            "network: the old color is retired",
            "RetireColor" in told and all(party.stage in _WAS_CUT for party in parties),
        ),
        DISARMED: ("network: is disarmed", "DisarmNetwork" in told),
        ADVANCED: ("network: all ports have the new color", "AdvanceNetwork" in told),
        SEALED: ("store: seals the channels", "SealChannels" in told),
        PUBLISHED: ("store: publishes the manifest", "PublishManifest" in told and not over),
        UNPUBLISHABLE: ("store: cannot publish", "PublishManifest" in told and not over),
        THROWN_AWAY: ("store: throws the images away", "DiscardImages" in told),
    }
    yield from ((kind, what) for what, (kind, may) in possible.items() if may and what not in done)


# --- bits and transaction states --------------------------------------------------------------------------------------


def _decode(noted: Noted, known: tuple[Known, ...]) -> tx.TransactionState:
    """The transaction state that the bits stand for."""
    names = [_name(place) for place in range(len(known))]
    by_name = dict(zip(names, known, strict=True))
    return tx.TransactionState(
        tx.Options(tuple(names), 1),
        0.0,
        promises={vm: _promise(place, by_name[vm].holds) for place, vm in enumerate(names) if by_name[vm].promised},
        cuts={vm: CutReport(vm, 0.0, 0.0, 0.0) for vm in names if by_name[vm].cut},
        streams={vm: StreamReport(vm, 0.0, 0) for vm in names if by_name[vm].streamed},
        images={vm: ImageStatus(vm, "durable") for vm in names if by_name[vm].stored},
        armed=frozenset(vm for vm in names if by_name[vm].armed),
        settled=frozenset(vm for vm in names if by_name[vm].settled),
        released=frozenset(vm for vm in names if by_name[vm].released),
        **{
            **noted._asdict(),
            "phase": Phase(noted.phase),
            "retired": ev.ColorRetired(by_counters=True) if noted.retired else None,
        },
    )


def _known(state: tx.TransactionState, place: int, before: Known) -> Known:
    noted = (state.promises, state.armed, state.cuts, state.streams, state.images, state.settled, state.released)
    return Known(before.holds, *(_name(place) in what for what in noted))


def _noted(state: tx.TransactionState) -> Noted:
    flags = {name: getattr(state, name) for name in Noted._fields}
    return Noted(**{**flags, "phase": state.phase.value, "retired": state.retired is not None})
