"""The explorer: nothing is found in the sound system, harm in each relaxed one, and it can tell them apart."""

import random
from collections import Counter
from dataclasses import fields, replace

import pytest

from geni_violin.check.__main__ import main
from geni_violin.check.bounds import COLORS, ORPHANS, RULES, Bounds, LosslessBounds
from geni_violin.check.control import Control
from geni_violin.check.explore import Model, State, TooManyStates, explore
from geni_violin.check.frames import LOST, ORPHAN, OVERTAKEN, TOO_FEW, TOO_MANY, WITH_TAG
from geni_violin.check.lossless import Lossless
from geni_violin.check.lossless_story import tell as tell_lossless
from geni_violin.check.relaxations import RELAXATIONS, counterexample
from geni_violin.check.rules import LOSSLESS, SOUND, SWITCH, LosslessRules, Rules
from geni_violin.check.suite import checks, perform
from geni_violin.check.transcript import tell
from geni_violin.check.vm import PAUSED
from geni_violin.check.world import World
from geni_violin.core import transaction as tx
from geni_violin.core import transaction_events as ev

SMALL = checks(vms=2, cuts=2, frames=1)
LYING = {"next-cut-too-early", "roll-back-on-abort"}
"""Relaxations that harm by a color that lies: a frame is lost that no snapshot asks for; there is no orphan."""
HELD = [name for name, relaxation in RELAXATIONS.items() if isinstance(relaxation.bounds, LosslessBounds)]
DROPPED = [name for name in RELAXATIONS if name not in HELD]
HARM = {
    "future-frames-pass": ORPHAN,
    "release-before-cut": TOO_MANY,
    "network-armed-before-edges": WITH_TAG,
    "cut-before-network-armed": LOST,
    "held-with-frames-injected": TOO_FEW,
    "old-frames-not-recorded": TOO_FEW,
    "late-frames-left-out": TOO_FEW,
    "sent-record-ignores-the-stop": TOO_MANY,
    "sent-record-begins-too-early": TOO_MANY,
    "recolor-with-frames-in-the-tap": TOO_FEW,
    "release-with-untagged-frames-in-the-tap": TOO_FEW,
    "untagged-frames-are-old": TOO_MANY,
    "disarm-before-retirement": TOO_FEW,
    "path-returned-before-disarm": WITH_TAG,
    "divert-off-with-tagged-frames-in-the-tap": WITH_TAG,
    "direct-path-with-frames-injected": OVERTAKEN,
    "resumed-before-recolor": ORPHAN,
    "hold-port-left-with-frames-in-it": LOST,
    "controller-adopts-nothing": ORPHAN,
    "two-memories-lost": ORPHAN,
    "dead-agent-is-forgiven": TOO_FEW,
}
"""What each rule of "hold" is for. The judge of histories has a say in orphans and in the channel state."""


@pytest.mark.parametrize("name", SMALL)
def test_the_sound_system_has_no_violation_and_the_search_is_not_vacuous(name: str) -> None:
    outcome = perform(SMALL[name])
    assert outcome.violation == "", outcome.story
    assert outcome.unseen == ()
    assert outcome.states > 100


@pytest.mark.parametrize("name", DROPPED)
def test_each_rule_is_needed(name: str) -> None:
    found = counterexample(RELAXATIONS[name])
    assert found is not None
    assert 5 <= len(found.lines) <= 16
    if name in LYING:
        assert not found.judgments
        assert found.harm != "orphan"
    else:
        assert found.harm.startswith("orphan")
        assert any("is an orphan of" in judgment for judgment in found.judgments), "the independent judge agrees"


@pytest.mark.parametrize("name", HELD)
def test_each_rule_of_holding_is_needed(name: str) -> None:
    found = counterexample(RELAXATIONS[name])
    assert found is not None
    assert found.harm == HARM[name]
    words = {ORPHAN: "is an orphan of", TOO_FEW: "is missing in", TOO_MANY: "should not be in"}.get(found.harm)
    assert [words in judgment for judgment in found.judgments if words] == ([True] if words else [])


def test_every_rule_of_holding_is_relaxed_somewhere() -> None:
    """A field of the rules without a counterexample would be a rule that nobody needs."""
    rules = [relaxation.rules for relaxation in RELAXATIONS.values() if isinstance(relaxation.rules, LosslessRules)]
    relaxed = {
        f.name for f in fields(LosslessRules) if any(getattr(r, f.name) != getattr(LOSSLESS, f.name) for r in rules)
    }
    assert relaxed == {field.name for field in fields(LosslessRules)} - {"admits"}, (
        "what an unarmed port admits is not new"
    )


@pytest.mark.parametrize("name", DROPPED)
def test_nothing_is_found_once_the_rule_is_back(name: str) -> None:
    bounds = RELAXATIONS[name].bounds
    assert isinstance(bounds, Bounds)
    assert explore(World(replace(bounds, judges=frozenset({ORPHANS, COLORS, RULES})))).violation == ""


@pytest.mark.parametrize("name", HELD)
def test_nothing_is_found_once_the_rule_of_holding_is_back(name: str) -> None:
    bounds = RELAXATIONS[name].bounds
    assert isinstance(bounds, LosslessBounds)
    assert explore(Lossless(replace(bounds, strict=True))).violation == ""


@pytest.mark.parametrize("name", ["recolor-before-cut", "release-before-barrier", "outbound-not-held"])
def test_the_rules_themselves_are_watched(name: str) -> None:
    """R1 and R2 are broken no later than the orphan that follows from it."""
    relaxation = RELAXATIONS[name]
    assert isinstance(relaxation.bounds, Bounds)
    assert isinstance(relaxation.rules, Rules)
    strict = explore(World(replace(relaxation.bounds, judges=frozenset({ORPHANS, RULES})), relaxation.rules))
    lenient = explore(World(relaxation.bounds, relaxation.rules))
    assert strict.violation
    assert len(strict.path) <= len(lenient.path)


def _walk(world: Model[State], rng: random.Random, steps: int) -> list[State]:
    """A random path, up to the first violation."""
    here = world.canonical(world.initial())
    path = [here]
    for _ in range(steps):
        after = sorted({world.canonical(state) for _, _, _, state in world.moves(here)})  # type: ignore[type-var]
        if not after:
            break
        here = rng.choice(after)
        path.append(here)
        if world.violation(here):
            break
    return path


@pytest.mark.parametrize("name", ["sound", "admit-future", "release-before-barrier"])
def test_the_independent_judge_agrees_on_random_paths(name: str) -> None:
    """What a state says of an orphan is what ``core.history`` says of the whole history, both ways."""
    rng = random.Random(name)
    rules = SOUND if name == "sound" else RELAXATIONS[name].rules
    assert isinstance(rules, Rules)
    bounds = Bounds(("background", "stop", "precopy"), 2, 6, first_epoch=1, judges=frozenset({ORPHANS}))
    orphans = 0
    for _ in range(250):
        world = World(bounds, rules)
        path = _walk(world, rng, steps=90)
        story = tell(world, path)
        assert bool(story.orphans()) == (world.violation(path[-1]) == "orphan"), story.lines
        orphans += bool(story.orphans())
    assert bool(orphans) == (name != "sound")


JUDGED = ["sound", "future-frames-pass", "old-frames-not-recorded", "sent-record-ignores-the-stop"]


@pytest.mark.parametrize("name", JUDGED)
def test_the_independent_judge_agrees_where_frames_are_held(name: str) -> None:
    """Orphans, and the channel state against ``core.history``'s frames in transit, both ways, over three snapshots."""
    rng = random.Random(name)
    rules = LOSSLESS if name == "sound" else RELAXATIONS[name].rules
    assert isinstance(rules, LosslessRules)
    bounds = LosslessBounds(
        (("background", "hold"), ("stop", "hold"), (PAUSED, SWITCH)), 3, 5, first_epoch=1, strict=False
    )
    found, committed, recorded = Counter[str](), 0, 0
    for _ in range(60):
        world = Lossless(bounds, rules)
        path = _walk(world, rng, steps=400)
        story = tell_lossless(world, path)
        verdict = world.violation(path[-1])
        judged = {ORPHAN: story.orphans(), TOO_MANY: story.extra(), TOO_FEW: story.missing()}
        assert {harm for harm, frames in judged.items() if frames} == ({verdict} if verdict else set()), story.lines
        states = [story.channel_state(epoch) for epoch in range(bounds.first_epoch + 1, bounds.first_epoch + 4)]
        _check_order(states, story.channels)
        found[verdict] += 1
        committed += len(story.committed)
        recorded += sum(map(len, states))
    assert committed > 30 or name != "sound"
    assert recorded > 60 or name != "sound"
    harms = set(found) - {""}
    assert harms == set() if name == "sound" else HARM[name] in harms


def _check_order(states: list[list[int]], channels: dict[int, tuple[int, int]]) -> None:
    """What a restore replays is in the order in which it was sent, for each sender and receiver."""
    for numbers in states:
        for channel in {channels[number] for number in numbers}:
            of_channel = [number for number in numbers if channels[number] == channel]
            assert of_channel == sorted(of_channel)


def _commits_too_early(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
    """A transaction that does not wait for durable images."""
    images = dict.fromkeys(state.options.vms)
    return tx.step(replace(state, images=images) if state.streams else state, event, now_ms)  # type: ignore[arg-type]


def _aborts_while_committing(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
    """A transaction that aborts after every crash."""
    if isinstance(event, ev.CoordinatorRestarted) and state.phase is tx.Phase.COMMITTING:
        return tx.step(replace(state, phase=tx.Phase.STREAMING), ev.CancelRequested(""), now_ms)
    return tx.step(state, event, now_ms)


def _leaves_ports_behind(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
    """A transaction that counts as aborted before the network has advanced."""
    return tx.step(replace(state, network_advanced=True), event, now_ms)


def _arms_the_network_first(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
    """A transaction that arms edges and network at once."""
    after, commands = tx.step(state, event, now_ms)
    at_once = any(isinstance(command, ev.ArmVm) for command in commands)
    return after, (*commands, ev.ArmNetwork(1, ())) if at_once else commands


def _settles_before_the_disarming(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
    """A transaction that does not wait until the network is disarmed."""
    return tx.step(replace(state, disarmed=True), event, now_ms)


def _disarms_at_once(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
    """A transaction that does not wait until the old color is retired."""
    return tx.step(replace(state, retired=ev.ColorRetired(by_counters=False)), event, now_ms)


def _seals_nothing(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
    """A transaction that commits without a channel state."""
    return tx.step(replace(state, sealed=True), event, now_ms)


@pytest.mark.parametrize(
    ("broken", "violation"),
    [
        (_commits_too_early, "a snapshot exists that is not whole"),
        (_aborts_while_committing, "a snapshot exists and is aborted"),
        (_leaves_ports_behind, "aborted, but ports may be left behind"),
        (_arms_the_network_first, "a VM gets frames with the slice's tag on: its edge does not stand"),
        (_settles_before_the_disarming, "a VM gets frames with the slice's tag on: its edge does not stand"),
        (_disarms_at_once, "the network is disarmed before the old color is retired"),
        (_seals_nothing, "a snapshot exists that is not whole"),
    ],
)
def test_a_broken_transaction_is_found_out(broken: object, violation: str) -> None:
    holding = 0 if broken is _leaves_ports_behind else 1  # ports left behind are seen first where edges stand
    assert explore(Control(2, holding, broken)).violation == violation  # type: ignore[arg-type]


def test_a_transaction_that_never_ends_is_found_out() -> None:
    def deaf(state: tx.TransactionState, event: ev.Event, now_ms: float) -> tx.Transition:
        return (state, ()) if isinstance(event, ev.ImagesDiscarded) else tx.step(state, event, now_ms)

    assert explore(Control(2, 1, deaf)).violation == "the transaction stays aborting"


def test_a_network_that_is_armed_late_is_found_out() -> None:
    """Why the controller refuses to arm ports for an epoch that all of them have reached."""
    assert (
        explore(Control(2, 1, late_arming=True)).violation
        == "a VM gets frames with the slice's tag on: its edge does not stand"
    )


def test_a_search_has_a_limit() -> None:
    with pytest.raises(TooManyStates):
        explore(World(Bounds(("stop",) * 3, 2, 2)), limit=100)


def test_the_command_tells_its_result_by_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--vms", "2", "--cuts", "1", "--frames", "1", "--relax", "all"]) == 0
    printed = capsys.readouterr().out
    assert "frames received in transit" in printed
    silent = [name for name, harm in HARM.items() if harm not in (ORPHAN, TOO_MANY, TOO_FEW)]
    assert printed.count("The judge of histories") == len(RELAXATIONS) - len(LYING) - len(silent)
    assert f"OK: the rules are sound; {len(RELAXATIONS)} of {len(RELAXATIONS)}" in printed


@pytest.mark.parametrize("arguments", [["--vms", "1"], ["--relax", "gravity"], ["--cuts", "none"]])
def test_senseless_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert "error: argument" in capsys.readouterr().err
