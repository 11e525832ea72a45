"""The transaction under any events in any order: whole or absent, forward only, and always with an end."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from geni_violin.core import transaction as tx
from geni_violin.core import transaction_events as ev
from geni_violin.core.messages import ChannelSummary, CutPromise, CutReport, EdgeReport, ImageStatus, StreamReport
from geni_violin.core.transaction import FINAL, TRANSITIONS, Options, Phase, TransactionState

VMS = ("vm1", "vm2", "vm3")
VM = st.sampled_from(VMS)
WITHIN_ONE_STEP = {Phase.ARMED, Phase.STREAMING}
"""Phases that may be passed through at once: armed without a network, streaming when all has streamed already."""


def _prepared(vm: str, network: str) -> ev.VmPrepared:
    return ev.VmPrepared(CutPromise(vm, "background", "", 1, network))


def _settled(vm: str) -> ev.VmSettled:
    return ev.VmSettled(vm, EdgeReport(vm, 1, 0, 1, 1))


ANY_EVENT: st.SearchStrategy[ev.Event] = st.one_of(
    st.builds(_prepared, VM, st.sampled_from(("hold", "drop"))),
    VM.map(ev.VmArmed),
    VM.map(lambda vm: ev.VmCut(CutReport(vm, 1.0, 2.0, 3.0))),
    VM.map(lambda vm: ev.VmStreamed(StreamReport(vm, 2.0, 4))),
    VM.map(lambda vm: ev.ImageStored(ImageStatus(vm, "durable"))),
    VM.map(ev.VmReleased),
    VM.map(_settled),
    VM.map(lambda vm: ev.VmSettled(vm, None)),
    st.sampled_from((*VMS, ev.NETWORK, ev.STORE)).map(lambda party: ev.Refused(party, "no")),
    st.sampled_from([phase.value for phase in Phase]).map(ev.TimerFired),
    st.sampled_from(
        (
            ev.NetworkPrepared(2),
            ev.ImagesStaged(),
            ev.NetworkArmed(),
            ev.ColorRetired(by_counters=True),
            ev.NetworkDisarmed(),
            ev.ChannelsSealed(()),
            ev.FramesCounted(5),
            ev.ManifestPublished(),
            ev.NetworkAdvanced(),
            ev.ImagesDiscarded(),
            ev.CancelRequested("changed my mind"),
            ev.CoordinatorRestarted(),
        )
    ),
)
OPTIONS = st.builds(
    Options,
    st.just(VMS),
    st.just(4),
    coordination=st.sampled_from(("color", "none")),
)


def _reachable(before: Phase, after: Phase) -> bool:
    """Whether one step may lead from the one to the other."""
    if before is after or after in TRANSITIONS[before]:
        return True
    return any(_reachable(middle, after) for middle in TRANSITIONS[before] & WITHIN_ONE_STEP)


@given(OPTIONS, st.lists(ANY_EVENT, max_size=60))
@settings(max_examples=300)
def test_any_events_go_forward_and_commit_only_what_is_whole(options: Options, events: list[ev.Event]) -> None:
    state, commands = tx.begin(options, 0.0)
    sent = list(commands)
    for event in events:
        before = state
        state, commands = tx.step(state, event, 1.0)
        sent += commands
        assert _reachable(before.phase, state.phase), (before.phase, event, state.phase)
        if any(isinstance(command, ev.PublishManifest) for command in commands):
            assert state.phase is Phase.COMMITTING
            assert set(state.cuts) == set(state.streams) == set(state.images) == set(VMS)
        if any(isinstance(command, ev.DiscardImages | ev.CancelVm) for command in commands):
            assert state.phase is Phase.ABORTING
        if any(isinstance(command, ev.CutVm) for command in commands):
            assert set(state.promises) == set(VMS)
            assert state.staged
    if state.phase is Phase.ABORTED and options.colored and any(isinstance(command, ev.CutVm) for command in sent):
        assert state.network_advanced


# --- the order of commands --------------------------------------------------------------------------------------------

FACTS: tuple[ev.Event, ...] = (
    *(ev.VmArmed(vm) for vm in VMS),
    *(ev.VmCut(CutReport(vm, 1.0, 2.0, 3.0)) for vm in VMS),
    *(ev.VmStreamed(StreamReport(vm, 2.0, 4)) for vm in VMS),
    *(ev.ImageStored(ImageStatus(vm, "durable")) for vm in VMS),
    *(_settled(vm) for vm in VMS),
    ev.NetworkPrepared(2),
    ev.ImagesStaged(),
    ev.NetworkArmed(),
    ev.ColorRetired(by_counters=True),
    ev.NetworkDisarmed(),
    ev.ChannelsSealed((ChannelSummary("vm1", 2, 120),)),
    ev.FramesCounted(5),
)
"""All that comes to the coordinator when nothing goes wrong, but for the promises and the end."""
UNDONE: tuple[ev.Event, ...] = (
    *(ev.VmReleased(vm) for vm in VMS),
    *(ev.VmSettled(vm, None) for vm in VMS),
    ev.NetworkAdvanced(),
    ev.ImagesDiscarded(),
)
TROUBLE: tuple[ev.Event, ...] = (
    ev.CoordinatorRestarted(),
    ev.CancelRequested("no"),
    ev.Refused("vm2", "no"),
    ev.Refused(ev.NETWORK, "no"),
    *(ev.TimerFired(phase.value) for phase in Phase),
)
POLICIES = st.tuples(*(st.sampled_from(("hold", "drop")) for _ in VMS))


_OF_EDGES = (ev.VmArmed, ev.VmSettled)


@dataclass
class Watcher:
    """What was commanded and heard so far, and whether each command came when it might."""

    policies: tuple[str, ...]
    asked: list[ev.Command] = field(default_factory=list)
    heard: set[ev.Event] = field(default_factory=set)

    def kinds(self) -> set[type[ev.Command]]:
        """The kinds of all commands so far."""
        return {type(command) for command in self.asked}

    def all_of(self, kind: type[ev.Event], only_holding: bool = False) -> bool:
        """Whether an event was heard of every VM (that holds frames)."""
        told = {_vm_of(event) for event in self.heard if isinstance(event, kind)}
        return told >= (set(self.holding) if only_holding else set(VMS))

    @property
    def holding(self) -> list[str]:
        """The VMs whose edges are to be armed."""
        return [vm for vm, policy in zip(VMS, self.policies, strict=True) if policy == "hold"]

    def answered(self, question: type[ev.Command], answer: type[ev.Event]) -> bool:
        """Whether something was asked and has been answered."""
        return question in self.kinds() and any(isinstance(event, answer) for event in self.heard)

    def may(self, command: ev.Command, state: TransactionState) -> bool:
        """Whether the command may be sent by now."""
        aborting = state.phase is Phase.ABORTING
        match command:
            case ev.ArmVm(vm):
                return vm in self.holding and state.staged
            case ev.ArmNetwork(_, vms):
                return list(vms) == self.holding and self.all_of(ev.VmArmed, only_holding=True)
            case ev.CutVm():
                return self.answered(ev.ArmNetwork, ev.NetworkArmed)
            case ev.DisarmNetwork():
                return self.all_of(ev.VmCut) and self.answered(ev.RetireColor, ev.ColorRetired)
            case ev.SettleVm(vm, keep=True):
                return vm in self.holding and self.answered(ev.DisarmNetwork, ev.NetworkDisarmed)
            case ev.SettleVm(vm, keep=False):
                begun = self.kinds() & {ev.ArmNetwork, ev.CutVm}
                undone = self.all_of(ev.VmReleased) and (not begun or ev.NetworkAdvanced() in self.heard)
                return aborting and ev.ArmVm in self.kinds() and undone
            case ev.SealChannels():
                return bool(self.holding) and self.all_of(ev.VmSettled, only_holding=True)
            case ev.PublishManifest():
                return self._is_whole()
            case ev.AdvanceNetwork() | ev.DiscardImages() | ev.CancelVm():
                return aborting
        return True

    def _is_whole(self) -> bool:
        each = all(self.all_of(kind) for kind in (ev.VmCut, ev.VmStreamed, ev.ImageStored))
        retired = self.answered(ev.RetireColor, ev.ColorRetired) and self.answered(ev.CountFrames, ev.FramesCounted)
        return each and retired and (not self.holding or self.answered(ev.SealChannels, ev.ChannelsSealed))


def _vm_of(event: ev.Event) -> str:
    match event:
        case ev.VmArmed(vm) | ev.VmReleased(vm) | ev.VmSettled(vm):
            return vm
        case ev.VmCut(report) | ev.VmStreamed(report):
            return report.vm
        case ev.ImageStored(status):
            return status.vm
    return ""


@given(POLICIES, st.data())
@settings(max_examples=200)
def test_whatever_the_order_of_events_the_order_of_commands_is_kept(
    policies: tuple[str, ...], data: st.DataObject
) -> None:
    """All facts come again and again in any order, early ones too; then trouble, or none, and always an end."""
    watcher = Watcher(policies)
    state, _ = tx.begin(Options(VMS, 4), 0.0)
    promises = [_prepared(vm, policy) for vm, policy in zip(VMS, policies, strict=True)]
    rounds = data.draw(st.integers(0, 14))
    facts = [fact for fact in FACTS if _vm_of(fact) in ("", *watcher.holding) or not isinstance(fact, _OF_EDGES)]
    shuffles = st.permutations(facts)
    events = [*data.draw(st.permutations(promises)), *(fact for _ in range(rounds) for fact in data.draw(shuffles))]
    trouble = data.draw(st.lists(st.tuples(st.integers(0, len(events)), st.sampled_from(TROUBLE)), max_size=2))
    for place, event in sorted(trouble, key=lambda pair: pair[0], reverse=True):
        events.insert(place, event)
    for event in (*events, *(fact for _ in range(14) for fact in data.draw(shuffles)), *UNDONE, *UNDONE, *UNDONE):
        state = _heard(watcher, state, event)
        if state.phase is Phase.COMMITTING:
            state = _heard(watcher, state, ev.ManifestPublished())
    assert state.phase in FINAL
    if state.phase is Phase.COMMITTED:
        assert watcher._is_whole()
        assert state.frames_in_transit == (2 if watcher.holding else 0)
        assert state.frames_held == len(watcher.holding)
    elif ev.ArmVm in watcher.kinds():
        assert watcher.all_of(ev.VmSettled, only_holding=True), "every edge has stepped aside"


def _heard(watcher: Watcher, state: TransactionState, event: ev.Event) -> TransactionState:
    """One event; an answer before its question is heard, but does not count."""
    questions: dict[type[ev.Event], type[ev.Command]] = {
        ev.VmArmed: ev.ArmVm,
        ev.VmCut: ev.CutVm,
        ev.NetworkArmed: ev.ArmNetwork,
        ev.ColorRetired: ev.RetireColor,
        ev.NetworkDisarmed: ev.DisarmNetwork,
        ev.ChannelsSealed: ev.SealChannels,
        ev.FramesCounted: ev.CountFrames,
    }
    question = questions.get(type(event))
    if question is None or question in watcher.kinds():
        watcher.heard.add(event)
    state, commands = tx.step(state, event, 1.0)
    for command in commands:
        assert watcher.may(command, state), (event, command)
    watcher.asked += commands
    return state


@given(OPTIONS, st.lists(ANY_EVENT, max_size=40), ANY_EVENT)
@settings(max_examples=300)
def test_an_event_that_comes_twice_changes_nothing_the_second_time(
    options: Options, events: list[ev.Event], again: ev.Event
) -> None:
    state, _ = tx.begin(options, 0.0)
    for event in (*events, again):
        state, _ = tx.step(state, event, 1.0)
    repeated, commands = tx.step(state, again, 1.0)
    assert repeated.phase is state.phase or again in (ev.NetworkArmed(), ev.ManifestPublished())
    if not isinstance(again, ev.CoordinatorRestarted | ev.NetworkArmed | ev.ManifestPublished):
        assert (repeated, commands) == (state, ())


@given(OPTIONS, st.lists(ANY_EVENT, max_size=60), ANY_EVENT)
def test_after_the_end_nothing_happens(options: Options, events: list[ev.Event], late: ev.Event) -> None:
    state = replace(tx.begin(options, 0.0)[0], phase=Phase.ABORTED)
    assert tx.step(state, late, 1.0) == (state, ())
    for event in events:
        assert tx.step(replace(state, phase=Phase.COMMITTED), event, 1.0)[1] == ()


def test_the_table_is_closed_and_acyclic() -> None:
    assert set(TRANSITIONS) == set(Phase)
    order = list(Phase)
    for before, afters in TRANSITIONS.items():
        assert all(order.index(after) > order.index(before) for after in afters), before
    assert {phase for phase, afters in TRANSITIONS.items() if not afters} == FINAL


@pytest.mark.parametrize("phase", [Phase.COMMITTING, Phase.ABORTING])
def test_no_timer_ends_what_has_no_timer(phase: Phase) -> None:
    """From committing only the snapshot server's own word leads back."""
    state = TransactionState(Options(VMS, 4), 0.0, phase=phase, failure="first")
    assert tx.step(state, ev.TimerFired(phase.value), 1.0) == (state, ())


def test_a_repeated_promise_does_not_stage_twice() -> None:
    """The second request would be refused because its name is taken, and that would abort the snapshot."""
    state, _ = tx.begin(Options(("vm1",), 4), 0.0)
    promise = ev.VmPrepared(CutPromise("vm1", "background", "", 1))
    state, _ = tx.step(state, ev.NetworkPrepared(0), 1.0)
    state, first = tx.step(state, promise, 2.0)
    _, second = tx.step(state, promise, 3.0)
    assert first == (ev.StageImages({"vm1": 1}),)
    assert second == ()


class Parties(RuleBasedStateMachine):
    """The transaction among parties that do what they are told, or say no, or are not heard of again.

    The last VM cannot hold frames.

    ``done`` is what really happened in the world; the transaction hears of it late, twice or never.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: set[ev.Event] = set()
        self.asked: list[ev.Command] = []
        self.published = self.never_to_publish = self.discarded = False
        self.state, commands = tx.begin(Options(VMS, 4), 0.0)
        self.take(commands)

    def take(self, commands: tuple[ev.Command, ...]) -> None:
        """Commands reach the parties at some time."""
        self.asked += commands

    def hear(self, event: ev.Event) -> None:
        """The coordinator hears of something."""
        self.state, commands = tx.step(self.state, event, 1.0)
        self.take(commands)

    def was_asked(self, kind: type[object], vm: str = "") -> bool:
        """Whether such a command has been sent."""
        return any(isinstance(command, kind) and getattr(command, "vm", "") == vm for command in self.asked)

    @rule(vm=VM)
    def a_vm_goes_on(self, vm: str) -> None:
        """Prepared, armed, cut, settled, streamed, stored: each once it is asked for and the one before is done."""
        if self.was_asked(ev.CancelVm, vm):
            self.done.add(ev.VmReleased(vm))
            if self.was_asked(ev.SettleVm, vm):
                self.done.add(ev.VmSettled(vm, None))
            return
        holds = vm != VMS[-1]
        steps: list[tuple[bool, ev.Event]] = [
            (True, _prepared(vm, "hold" if holds else "drop")),
            (not holds or self.was_asked(ev.ArmVm, vm), ev.VmArmed(vm)),
            (self.was_asked(ev.CutVm, vm), ev.VmCut(CutReport(vm, 1.0, 2.0, 3.0))),
            (not holds or self.was_asked(ev.SettleVm, vm), _settled(vm)),
            (True, ev.VmStreamed(StreamReport(vm, 2.0, 4))),
            (True, ev.ImageStored(ImageStatus(vm, "durable"))),
        ]
        possible, fact = next(((may, fact) for may, fact in steps if fact not in self.done), (False, steps[0][1]))
        if possible:
            self.done.add(fact)

    @rule()
    def the_network_and_the_store_do_what_they_were_told(self) -> None:
        """All but the manifest."""
        for kind, event in (
            (ev.PrepareNetwork, ev.NetworkPrepared(0)),
            (ev.StageImages, ev.ImagesStaged()),
            (ev.ArmNetwork, ev.NetworkArmed()),
            (ev.RetireColor, ev.ColorRetired(by_counters=False)),
            (ev.DisarmNetwork, ev.NetworkDisarmed()),
            (ev.SealChannels, ev.ChannelsSealed(())),
            (ev.CountFrames, ev.FramesCounted(1)),
            (ev.AdvanceNetwork, ev.NetworkAdvanced()),
        ):
            if self.was_asked(kind):
                self.done.add(event)

    @precondition(lambda self: self.was_asked(ev.DiscardImages))
    @rule()
    def the_store_discards(self) -> None:
        """It would refuse to discard what is published; it must never be asked to."""
        assert not self.published
        self.discarded = True
        self.done.add(ev.ImagesDiscarded())

    @precondition(lambda self: self.was_asked(ev.PublishManifest) and not self.never_to_publish)
    @rule(can=st.booleans())
    def the_store_publishes_or_never_will(self, can: bool) -> None:
        """The commit point."""
        if can or self.published:
            self.published = True
            self.done.add(ev.ManifestPublished())
        else:
            self.never_to_publish = True
            self.done.add(ev.Refused(ev.STORE, "disk full"))

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def something_is_heard_of(self, data: st.DataObject) -> None:
        """Facts arrive in any order, some more than once."""
        self.hear(data.draw(st.sampled_from(sorted(self.done, key=repr))))

    @rule(vm=VM)
    def everything_so_far_is_heard_of(self, vm: str) -> None:
        """A quick way on; the order is still arbitrary."""
        for event in sorted(self.done, key=lambda event: (vm in repr(event), repr(event))):
            self.hear(event)

    @rule(event=st.sampled_from((ev.CoordinatorRestarted(), ev.CancelRequested("no"), ev.Refused("vm2", "no"))))
    def something_goes_wrong(self, event: ev.Event) -> None:
        """A crash, a person, a VM; at any point."""
        self.hear(event)

    @rule(name=st.sampled_from([phase.value for phase in Phase]))
    def a_timer_fires(self, name: str) -> None:
        """Only a timer that was set."""
        if any(isinstance(command, ev.SetTimer) and command.name == name for command in self.asked):
            self.hear(ev.TimerFired(name))

    @invariant()
    def whole_or_absent(self) -> None:
        """A snapshot that exists is whole and is never taken back."""
        if self.published:
            assert self.state.phase in (Phase.COMMITTING, Phase.COMMITTED)
            whole = {ev.ImageStored(ImageStatus(vm, "durable")) for vm in VMS}
            assert whole <= self.done
            assert not self.discarded
        assert self.published or self.state.phase is not Phase.COMMITTED

    @invariant()
    def aborted_means_all_is_undone(self) -> None:
        """No image is left and no port behind."""
        if self.state.phase is Phase.ABORTED:
            assert self.discarded
            begun = any(isinstance(command, ev.ArmNetwork | ev.CutVm) for command in self.asked)
            assert ev.NetworkAdvanced() in self.done or not begun
            armed = {command.vm for command in self.asked if isinstance(command, ev.ArmVm)}
            assert all(_settled(vm) in self.done or ev.VmSettled(vm, None) in self.done for vm in armed)

    def teardown(self) -> None:
        """If at last everyone answers, it ends."""
        for _ in range(16):
            self.the_network_and_the_store_do_what_they_were_told()
            if self.was_asked(ev.DiscardImages):
                self.the_store_discards()
            if self.was_asked(ev.PublishManifest) and not self.never_to_publish:
                self.the_store_publishes_or_never_will(True)
            for vm in VMS:
                self.a_vm_goes_on(vm)
                self.everything_so_far_is_heard_of(vm)
            self.whole_or_absent()
        assert self.state.phase in FINAL


Parties.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestParties = Parties.TestCase
