"""Plans: the shipped ones keep the rules, every way to break one is found, and the verdict agrees with the explorer."""

from dataclasses import replace
from itertools import permutations

import pytest

from geni_violin.check.bounds import Bounds, LosslessBounds
from geni_violin.check.explore import explore
from geni_violin.check.lossless import Lossless
from geni_violin.check.relaxations import (
    PAUSE_WITHOUT_CONFIRMATION,
    RECOLOR_BEFORE_CUT,
    RELEASE_BEFORE_BARRIER,
    RELEASE_BEFORE_CUT,
)
from geni_violin.check.rules import SWITCH, LosslessRules, Rules
from geni_violin.check.vm import PAUSED
from geni_violin.check.world import World
from geni_violin.core.cut import (
    BACKGROUND,
    BACKGROUND_HOLDING,
    BACKGROUND_PAUSED,
    BACKGROUND_PAUSED_HOLDING,
    PLANS,
    PRECOPY,
    STOP,
    STOP_HOLDING,
    SWITCH_PLANS,
    TRIGGER,
    Action,
    EdgeArmed,
    Plan,
    PortsRecolored,
    Report,
    Step,
    VmResumed,
    plan_for,
)
from geni_violin.core.model import IN_SWITCH
from geni_violin.core.plan_rules import plan_violations

_KIND = ("background", "hold")
ENDLESS = "the snapshot never ends"


def _swapped(plan: Plan, one: Action | None, other: Action) -> Plan:
    places = {step.action: place for place, step in enumerate(plan)}
    steps = list(plan)
    steps[places[one]], steps[places[other]] = steps[places[other]], steps[places[one]]
    return tuple(steps)


def _unconfirmed(plan: Plan, action: Action) -> Plan:
    return tuple(replace(step, confirmed_by=()) if step.action is action else step for step in plan)


def _without(plan: Plan, action: Action) -> Plan:
    return tuple(step for step in plan if step.action is not action)


def _reporting(plan: Plan, action: Action, report: Report | None) -> Plan:
    return tuple(replace(step, report=report) if step.action is action else step for step in plan)


_ARM, _, _HOLD, _START, _RECOLOR, _RELEASE, _DISARMED, _RETURN, _STREAM = BACKGROUND_HOLDING
_RELEASED_EARLY = "R1: frames are let out before the recolor is confirmed"
_UNAWARE = "R2: the recolor does not wait for the cut"
_HELD_LATE = "R1: frames are not held before the cut"
_STEPS_ASIDE = "the edge steps aside before the network is disarmed"
_REPORTED_EARLY = "the cut is reported before the ports are recolored"

BROKEN: dict[str, tuple[str, Plan]] = {
    "no trigger": ("the cut begins before its trigger", tuple(step for step in BACKGROUND if step != TRIGGER)),
    "hold before the trigger": ("the cut begins before its trigger", (BACKGROUND[1], BACKGROUND[0], *BACKGROUND[2:])),
    "background, recolor before the cut": (
        _UNAWARE,
        _swapped(BACKGROUND, Action.RECOLOR_PORTS, Action.START_MIGRATION),
    ),
    "background, release before the recolor": (
        _RELEASED_EARLY,
        _swapped(BACKGROUND, Action.RECOLOR_PORTS, Action.RELEASE_FRAMES),
    ),
    "background, release does not await the recolor": (_RELEASED_EARLY, RELEASE_BEFORE_BARRIER),
    "background, held after the cut": (_HELD_LATE, _swapped(BACKGROUND, Action.HOLD_FRAMES, Action.START_MIGRATION)),
    "background, hold not awaited": (_HELD_LATE, _unconfirmed(BACKGROUND, Action.HOLD_FRAMES)),
    "background, recolor not awaited": (_RELEASED_EARLY, _unconfirmed(BACKGROUND, Action.RECOLOR_PORTS)),
    "background, cut not awaited": (_UNAWARE, _unconfirmed(BACKGROUND, Action.START_MIGRATION)),
    "background, nothing held": (
        "R1: the VM runs without held frames before the recolor is confirmed",
        _without(BACKGROUND, Action.HOLD_FRAMES),
    ),
    "background, no recolor": (_RELEASED_EARLY, _without(BACKGROUND, Action.RECOLOR_PORTS)),
    "background, reported with the cut": (
        _REPORTED_EARLY,
        _reporting(_reporting(BACKGROUND, Action.RELEASE_FRAMES, None), Action.START_MIGRATION, Report.CUT),
    ),
    "background, streamed at once": (
        "the image is reported to have left before it has",
        (*BACKGROUND[:-1], Step(None, (), Report.STREAMED)),
    ),
    "precopy, recolor before the cut": (_UNAWARE, _swapped(PRECOPY, Action.RECOLOR_PORTS, Action.START_MIGRATION)),
    "precopy, resume before the recolor": (_RELEASED_EARLY, _swapped(PRECOPY, Action.RECOLOR_PORTS, Action.RESUME_VM)),
    "precopy, recolor not awaited": (
        _RELEASED_EARLY,
        (
            *_unconfirmed(PRECOPY, Action.RECOLOR_PORTS)[:4],
            replace(PRECOPY[4], confirmed_by=(VmResumed, PortsRecolored)),
            PRECOPY[5],
        ),
    ),
    "stop, recolor before the pause": (_UNAWARE, RECOLOR_BEFORE_CUT),
    "stop, pause not awaited": (_UNAWARE, PAUSE_WITHOUT_CONFIRMATION),
    "stop, resume before the recolor": (_RELEASED_EARLY, _swapped(STOP, Action.RECOLOR_PORTS, Action.RESUME_VM)),
    "stop, resume before the image has left": (
        "the image is not of the cut event: the VM is resumed before it has left",
        _swapped(STOP, Action.START_MIGRATION, Action.RESUME_VM),
    ),
    "stop, streamed before the resume": (
        "the VM may stay paused: the cut ends before its last step",
        _reporting(_reporting(STOP, Action.RESUME_VM, None), Action.START_MIGRATION, Report.STREAMED),
    ),
    "held, release before the cut": ("R2: held frames of the new color are let in before the cut", RELEASE_BEFORE_CUT),
    "in the switch, resumed before the recolor": (
        _RELEASED_EARLY,
        _swapped(BACKGROUND_PAUSED, Action.RECOLOR_PORTS, Action.START_MIGRATION),
    ),
    "in the switch, recolor not awaited": (_RELEASED_EARLY, _unconfirmed(BACKGROUND_PAUSED, Action.RECOLOR_PORTS)),
    "in the switch, hold not awaited": (
        _HELD_LATE,
        _unconfirmed(BACKGROUND_PAUSED_HOLDING, Action.HOLD_INBOUND),
    ),
    "held, nothing held": ("R2: an armed edge holds nothing", _without(STOP_HOLDING, Action.HOLD_FRAMES)),
    "held, trigger before the arming": (
        "a cut begins before the edge is armed",
        (TRIGGER, _ARM, *BACKGROUND_HOLDING[2:]),
    ),
    "held, arming not awaited": (
        "a cut begins before the edge is armed",
        _unconfirmed(BACKGROUND_HOLDING, Action.ARM_EDGE),
    ),
    "held, reported to be armed too early": (
        "the edge is reported to be armed before it is",
        (replace(_ARM, confirmed_by=()), Step(None, (EdgeArmed,)), *BACKGROUND_HOLDING[1:]),
    ),
    "held, reported before the release": (
        "the cut is reported while the edge still holds frames",
        _reporting(_reporting(BACKGROUND_HOLDING, Action.RELEASE_FRAMES, None), Action.RECOLOR_PORTS, Report.CUT),
    ),
    "held, disarmed before the release": (
        "the edge waits for a network that waits for the cut's report",
        (_ARM, TRIGGER, _HOLD, _START, _RECOLOR, _DISARMED, _RELEASE, _RETURN, _STREAM),
    ),
    "held, path returned before the disarming": (
        _STEPS_ASIDE,
        (_ARM, TRIGGER, _HOLD, _START, _RECOLOR, _RELEASE, _RETURN, _DISARMED, _STREAM),
    ),
    "held, disarming not awaited": (_STEPS_ASIDE, tuple(step for step in BACKGROUND_HOLDING if step != _DISARMED)),
    "held, path never returned": (
        "the edge never steps aside, or is reported to before it has",
        _without(BACKGROUND_HOLDING, Action.RETURN_PATH),
    ),
    "held, settled too early": (
        "the edge never steps aside, or is reported to before it has",
        _reporting(
            (*BACKGROUND_HOLDING[:6], replace(_DISARMED, report=Report.SETTLED), _RETURN, _STREAM),
            Action.RETURN_PATH,
            None,
        ),
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_the_shipped_plans_keep_the_rules(kind: tuple[str, str]) -> None:
    assert plan_violations(PLANS[kind]) == ()
    assert plan_violations(SWITCH_PLANS[kind]) == ()


def test_only_an_edge_that_holds_both_directions_lets_a_vm_run_before_the_recolor() -> None:
    for (strategy, network), plan in SWITCH_PLANS.items():
        assert Action.HOLD_FRAMES not in {step.action for step in plan}
        assert plan_for(strategy, network, "color", IN_SWITCH) == plan
        assert plan_for(strategy, network, "none", IN_SWITCH) == plan_for(strategy, network, "none")
    inbound = tuple(
        replace(s, action=Action.HOLD_INBOUND) if s.action is Action.HOLD_FRAMES else s for s in PLANS[_KIND]
    )
    assert _RELEASED_EARLY in plan_violations(inbound)


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_plan_is_found_out(name: str) -> None:
    rule, plan = BROKEN[name]
    assert rule in plan_violations(plan)


def test_an_empty_plan_breaks_rules_and_is_no_error() -> None:
    assert plan_violations(()) != ()
    assert plan_violations((Step(Action.ARM_EDGE, ()),)) != ()


@pytest.mark.parametrize("kind", PLANS)
def test_without_coordination_only_the_network_steps_are_gone(kind: tuple[str, str]) -> None:
    """Nothing is held, armed or colored then, whatever the policy asked for: no plan holds frames without colors."""
    strategy, network = kind
    plain, colored = plan_for(strategy, network, "none"), PLANS[strategy, "drop"]
    assert plan_for(strategy, network, "color") == PLANS[kind]
    assert [step.report for step in plain] == [step.report for step in colored]
    gone = {Action.HOLD_FRAMES, Action.RECOLOR_PORTS, Action.RELEASE_FRAMES}
    assert not gone & {step.action for step in plain}
    for step, original in zip(plain, colored, strict=True):
        assert step == (Step(None, (), original.report) if original.action in gone else original)


@pytest.mark.parametrize(("strategy", "network"), [("teleport", "drop"), ("background", "keep"), ("precopy", "hold")])
def test_an_unknown_plan_is_a_key_error(strategy: str, network: str) -> None:
    with pytest.raises(KeyError):
        plan_for(strategy, network, "color")


@pytest.mark.parametrize("strategy", ["background", "precopy", "stop"])
def test_no_order_that_counts_as_sound_has_an_orphan(strategy: str) -> None:
    """All orders of a plan's steps: whatever :func:`plan_violations` lets pass, the explorer must not fault."""
    passed = 0
    for order in permutations(PLANS[strategy, "drop"]):
        if plan_violations(order):
            continue
        passed += 1
        rules = Rules(plans={**PLANS, (strategy, "drop"): order})
        world = World(Bounds((strategy,) * 2, cuts=1, frames=1), rules)
        assert explore(world).violation in ("", ENDLESS), [step.action for step in order]
    assert passed >= 1


def _lossless(order: Plan, kind: tuple[str, str] = _KIND) -> str:
    rules = LosslessRules(plans={**PLANS, kind: order})
    return explore(Lossless(LosslessBounds((kind,) * 2, cuts=1, frames=1), rules)).violation


def test_no_order_of_a_holding_plan_that_counts_as_sound_does_harm() -> None:
    """The edge first and the image last, as any plan has it; all orders in between."""
    sound = []
    for middle in permutations(BACKGROUND_HOLDING[1:-1]):
        order = (_ARM, *middle, _STREAM)
        if not plan_violations(order):
            sound.append(order)
            assert _lossless(order) in ("", ENDLESS), [step.action for step in order]
    assert BACKGROUND_HOLDING in sound


def test_no_order_of_a_plan_for_the_switch_that_counts_as_sound_does_harm() -> None:
    """The edge first, then the trigger and the hold, and the image last; all orders in between."""
    sound = []
    first, last = BACKGROUND_PAUSED_HOLDING[:3], BACKGROUND_PAUSED_HOLDING[-1]
    for middle in permutations(BACKGROUND_PAUSED_HOLDING[3:-1]):
        order = (*first, *middle, last)
        if not plan_violations(order):
            sound.append(order)
            assert _lossless(order, (PAUSED, SWITCH)) in ("", ENDLESS), [step.action for step in order]
    assert BACKGROUND_PAUSED_HOLDING in sound


@pytest.mark.parametrize("name", [name for name in BROKEN if name.startswith("held, ")])
def test_a_broken_holding_plan_does_harm_in_the_explorer_too(name: str) -> None:
    """But for the reports of an armed and of a settled edge, which are for the coordinator: see ``check.control``."""
    only_reported = name in ("held, reported to be armed too early", "held, settled too early")
    _, plan = BROKEN[name]
    assert bool(_lossless(plan)) != only_reported


def test_in_the_buffer_order_an_early_recolor_is_harmless_while_all_is_held() -> None:
    """Why the buffer order is not the place to show R2: what an early recolor admits waits at the edge."""
    _, early = BROKEN["background, recolor before the cut"]
    rules = Rules(plans={**PLANS, ("background", "drop"): early})
    assert explore(World(Bounds(("background",) * 2, cuts=1, frames=2), rules)).violation == ""
