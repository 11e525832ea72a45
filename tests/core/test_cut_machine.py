"""The cut machine under random events: the rules hold, there is an end, and nothing is left paused or held."""

import pytest
from cut_executor import PretendedVm
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.core import cut
from geni_violin.core.cut import PLANS, Action, CutState, Phase, Report

HOLDING = [(strategy, network) for strategy, network in PLANS if network == "hold"]
STRATEGIES = st.sampled_from(sorted(PLANS))
INTERRUPTIONS: tuple[cut.Event, ...] = (
    cut.StepFailed("no"),
    cut.CancelRequested("changed my mind"),
    cut.DeadlinePassed(cut.CUT_DEADLINE),
    cut.DeadlinePassed(cut.STREAM_DEADLINE),
    cut.DeadlinePassed(cut.ARMED_DEADLINE),
    cut.VmDied(),
)
ANY_EVENT: tuple[cut.Event, ...] = (
    *INTERRUPTIONS,
    cut.EdgeArmed(),
    cut.CutRequested(),
    cut.CutRequested(5.0),
    cut.FutureFrameSeen(),
    cut.NetworkDisarmed(),
    cut.PathReturned(),
    cut.FramesHeld(),
    cut.VmStopped(1.0),
    cut.VmResumed(2.0),
    cut.MigrationPaused(),
    cut.PortsRecolored(3.0),
    cut.FramesReleased(),
    cut.MigrationCompleted(5),
    cut.MigrationEnded(),
    cut.DeadlinePassed(cut.DELAY),
    cut.DeadlinePassed("an unknown one"),
)


Kind = tuple[str, str]
"""A strategy and a network policy."""


def _state(kind: Kind) -> CutState:
    return CutState(PLANS[kind], cut_deadline_ms=100.0, stream_deadline_ms=1000.0)


def _vm(kind: Kind) -> PretendedVm:
    return PretendedVm(kind[0], _state(kind))


def _phase(vm: PretendedVm) -> Phase:
    """Where the cut is by now."""
    return vm.state.phase


def _check_rules(vm: PretendedVm) -> None:
    if not vm.undoing:
        assert vm.recolored or not (vm.was_cut and vm.lets_frames_out), "R1"
        assert vm.was_cut or not vm.recolored, "R2"
        if vm.state.phase in (Phase.CUTTING, Phase.STREAMING) and Action.RETURN_PATH not in vm.state.sent:
            assert vm.armed == (Action.ARM_EDGE in vm.state.sent), "an edge steps aside last"


@given(STRATEGIES, st.data())
def test_the_rules_hold_and_the_cut_ends_whatever_interrupts_it(kind: Kind, data: st.DataObject) -> None:
    vm = _vm(kind)
    vm.begin()
    vm.trigger()
    for choice in data.draw(st.lists(st.sampled_from(("do", "do", "tell", "tell", *INTERRUPTIONS)), max_size=20)):
        if choice == "do" and vm.commands:
            vm.carry_out()
        elif choice == "tell" and vm.waiting:
            vm.tell_next()
        elif not isinstance(choice, str):
            vm.tell(choice)
        _check_rules(vm)
    vm.finish()
    assert vm.state.phase in cut.FINAL
    if vm.state.phase is not Phase.LOST:
        assert vm.lets_frames_out
    assert vm.reports.count(Report.FAILED) == (vm.state.phase is not Phase.STREAMED)


@given(STRATEGIES)
def test_undisturbed_it_is_cut_then_streamed(kind: Kind) -> None:
    vm = _vm(kind)
    vm.begin()
    vm.trigger()
    vm.finish()
    holding = [Report.ARMED, Report.CUT, Report.SETTLED, Report.STREAMED]
    assert vm.reports == (holding if kind in HOLDING else [Report.CUT, Report.STREAMED])
    assert _phase(vm) is Phase.STREAMED
    assert vm.recolored
    assert vm.lets_frames_out
    assert not vm.armed
    assert vm.state.trigger == cut.BY_COORDINATOR
    assert vm.state.downtime_ms == pytest.approx(500.0)
    assert (vm.state.recolor_ms, vm.state.sent_bytes) == (1.5, 4096)


@given(STRATEGIES, st.lists(st.sampled_from(ANY_EVENT), max_size=12))
def test_without_a_confirmed_recolor_nothing_lets_frames_out(kind: Kind, events: list[cut.Event]) -> None:
    """Whatever the events are, also senseless ones: no release or resume before PortsRecolored, but to undo the cut."""
    state, commands = cut.begin(_state(kind), 0.0)
    lets_out = {Action.RELEASE_FRAMES, Action.RESUME_VM}
    recolored = False
    for event in events:
        assert recolored or state.phase is Phase.CANCELLING or not lets_out & set(commands)
        recolored = recolored or isinstance(event, cut.PortsRecolored)
        state, commands = cut.step(state, event, 0.0)


@given(STRATEGIES, st.lists(st.sampled_from(ANY_EVENT), max_size=25))
def test_nothing_is_commanded_after_the_end_and_no_command_twice(kind: Kind, events: list[cut.Event]) -> None:
    state, commands = cut.begin(_state(kind), 0.0)
    forward = [command for command in commands if isinstance(command, Action)]
    for event in events:
        before = state
        state, commands = cut.step(state, event, 0.0)
        if before.phase in cut.FINAL:
            assert (state, commands) == (before, ())
        if state.phase is not Phase.CANCELLING:
            forward += [command for command in commands if isinstance(command, Action)]
    assert len(forward) == len(set(forward))


@given(STRATEGIES, st.sampled_from(INTERRUPTIONS[1:4]), st.integers(0, 16))
def test_a_deadline_undoes_what_was_never_confirmed(kind: Kind, interruption: cut.Event, steps: int) -> None:
    """The coordinator may be silent for ever: the agent's own deadline ends the cut, at whatever step it is."""
    vm = _vm(kind)
    vm.begin()
    vm.trigger()
    for _ in range(steps):
        if vm.waiting:
            vm.tell_next()
        elif vm.commands:
            vm.carry_out()
    vm.commands = [command for command in vm.commands if command is not Action.RECOLOR_PORTS]
    vm.tell(interruption)
    vm.tell(cut.DeadlinePassed(cut.STREAM_DEADLINE))
    vm.finish()
    assert vm.state.phase in (Phase.STREAMED, Phase.CANCELLED)
    assert vm.lets_frames_out


EARLY = (cut.VmStopped(1.0), cut.VmResumed(2.0), cut.FramesHeld(), cut.PortsRecolored(9.0), cut.PathReturned())


@given(STRATEGIES, st.sampled_from(EARLY))
def test_what_happens_before_the_cut_begins_is_no_part_of_it(kind: Kind, event: cut.Event) -> None:
    """Someone pauses and resumes the VM while its cut waits: neither its cut event nor its resume."""
    waiting, _ = cut.begin(_state(kind), 0.0)
    assert cut.step(waiting, event, 0.0) == (waiting, ())


@pytest.mark.parametrize("strategy", ["precopy", "stop"])
def test_a_resume_before_it_was_commanded_is_not_the_resume(strategy: str) -> None:
    vm = _vm((strategy, "drop"))
    vm.begin()
    vm.trigger()
    vm.tell(cut.VmResumed(1.0))
    while vm.state.phase is Phase.CUTTING or vm.state.phase is Phase.STREAMING:
        if vm.waiting:
            vm.tell_next()
        else:
            vm.carry_out()
    assert _phase(vm) is Phase.STREAMED
    assert vm.running
    assert vm.state.resumed_at == 10.5


@pytest.mark.parametrize("kind", sorted(set(PLANS) - set(HOLDING)))
def test_a_delayed_cut_waits_for_its_time_and_can_be_called_off(kind: Kind) -> None:
    vm = _vm(kind)
    vm.begin()
    vm.trigger(delay_ms=70.0)
    assert vm.deadlines == {cut.DELAY: 70.0}
    assert vm.commands == []
    vm.tell(cut.CancelRequested("never mind"))
    assert _phase(vm) is Phase.CANCELLED
    assert vm.reports == [Report.FAILED]
    assert vm.commands == []


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_the_delay_ends_in_the_cut(kind: Kind) -> None:
    vm = _vm(kind)
    vm.begin()
    vm.trigger(delay_ms=70.0)
    assert _phase(vm) is Phase.WAITING
    vm.tell(cut.DeadlinePassed(cut.DELAY), now_ms=70.0)
    assert _phase(vm) is Phase.CUTTING
    assert vm.state.trigger == cut.BY_COORDINATOR


# --- an armed edge ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOLDING)
@pytest.mark.parametrize("delay_ms", [0.0, 500.0])
def test_the_first_trigger_counts_and_the_other_changes_nothing(kind: Kind, delay_ms: float) -> None:
    """VTDC'07, section 5: a future frame starts the cut without the coordinator, which may ask before or after."""
    vm = _vm(kind)
    vm.begin()
    vm.trigger(delay_ms) if delay_ms else vm.finish()
    vm.tell(cut.FutureFrameSeen())
    assert _phase(vm) is Phase.CUTTING
    assert vm.state.trigger == cut.BY_FUTURE_FRAME
    assert vm.commands == [Action.HOLD_FRAMES]
    for late in (cut.CutRequested(), cut.DeadlinePassed(cut.DELAY), cut.FutureFrameSeen()):
        assert cut.step(vm.state, late, 1.0) == (vm.state, ())


@pytest.mark.parametrize("kind", HOLDING)
@pytest.mark.parametrize("trigger", [cut.CutRequested(), cut.FutureFrameSeen()])
def test_a_trigger_that_is_there_before_the_edge_is_armed_is_remembered(kind: Kind, trigger: cut.Event) -> None:
    vm = _vm(kind)
    vm.begin()
    vm.tell(trigger)
    assert _phase(vm) is Phase.WAITING
    assert vm.commands == [Action.ARM_EDGE]
    vm.carry_out()
    vm.tell_next()
    assert _phase(vm) is Phase.CUTTING


@pytest.mark.parametrize("kind", HOLDING)
def test_an_armed_edge_that_is_forgotten_is_given_up(kind: Kind) -> None:
    vm = _vm(kind)
    vm.begin()
    assert vm.deadlines == {cut.ARMED_DEADLINE: 100.0}
    vm.finish()
    vm.tell(cut.DeadlinePassed(cut.ARMED_DEADLINE))
    assert _phase(vm) is Phase.CANCELLING
    assert "no cut came" in vm.state.failure
    vm.finish()
    assert _phase(vm) is Phase.CANCELLED
    assert vm.lets_frames_out


@pytest.mark.parametrize("kind", HOLDING)
@pytest.mark.parametrize("requested", [False, True])
def test_an_edge_that_is_never_armed_is_given_up_even_if_the_cut_was_asked_for(kind: Kind, requested: bool) -> None:
    vm = _vm(kind)
    vm.begin()
    if requested:
        vm.tell(cut.CutRequested(5.0))
        vm.tell(cut.DeadlinePassed(cut.DELAY))
    vm.tell(cut.DeadlinePassed(cut.ARMED_DEADLINE))
    assert _phase(vm) is Phase.CANCELLING
    assert "not armed" in vm.state.failure


@pytest.mark.parametrize("kind", HOLDING)
@pytest.mark.parametrize("delay_ms", [0.0, 5000.0])
def test_the_armed_deadline_is_met_by_the_coordinators_request(kind: Kind, delay_ms: float) -> None:
    vm = _vm(kind)
    vm.begin()
    vm.trigger(delay_ms)
    before = vm.state
    vm.tell(cut.DeadlinePassed(cut.ARMED_DEADLINE))
    assert vm.state == before


@pytest.mark.parametrize("kind", HOLDING)
def test_the_edge_stays_until_the_network_is_disarmed(kind: Kind) -> None:
    """And what is cancelled meanwhile leaves it standing: it passes everything on until it is told to settle."""
    vm = _vm(kind)
    vm.begin()
    vm.trigger()
    while Report.CUT not in vm.reports:
        vm.carry_out() if vm.commands else vm.tell_next()
    while vm.commands or vm.waiting:
        vm.carry_out() if vm.commands else vm.tell_next()
    assert vm.armed
    assert _phase(vm) is Phase.STREAMING
    assert Report.SETTLED not in vm.reports
    vm.tell(cut.DeadlinePassed(cut.STREAM_DEADLINE))
    vm.finish()
    assert _phase(vm) is Phase.CANCELLED
    assert vm.armed
    assert vm.lets_frames_out


def test_what_is_told_of_a_cut_that_held_frames() -> None:
    """Held from the hold to the release, by the monotonic clock."""
    vm = _vm(("background", "hold"))
    vm.begin()
    vm.trigger()
    now_ms = 0.0
    while Report.CUT not in vm.reports:
        now_ms += 10.0
        if vm.waiting:
            vm.tell(vm.waiting.pop(0), now_ms)
        else:
            vm.carry_out()
    assert (vm.state.held_ms, vm.state.released_ms) == (20.0, 100.0)
    assert vm.state.hold_ms == 80.0
    assert vm.deadlines[cut.CUT_DEADLINE] == 100.0, "it runs from the hold command"


# --- deadlines and streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_the_cut_deadline_is_met_by_the_recolor(kind: Kind) -> None:
    vm = _vm(kind)
    vm.begin()
    vm.trigger()
    while cut.PortsRecolored not in vm.state.seen:
        vm.carry_out()
        while vm.waiting:
            vm.tell_next()
    vm.tell(cut.DeadlinePassed(cut.CUT_DEADLINE))
    assert vm.state.phase is not Phase.CANCELLING
    vm.tell(cut.DeadlinePassed(cut.STREAM_DEADLINE))
    assert vm.state.phase in (Phase.CANCELLING, Phase.STREAMED)


def test_a_stream_that_ends_early_is_remembered() -> None:
    """A small image may have left before the recolor is confirmed."""
    vm = _vm(("background", "drop"))
    vm.begin()
    vm.trigger()
    while cut.MigrationCompleted not in vm.state.seen:
        vm.carry_out()
        while vm.waiting:
            vm.tell_next()
    assert cut.PortsRecolored not in vm.state.seen
    assert vm.reports == []
    vm.finish()
    assert vm.reports == [Report.CUT, Report.STREAMED]
