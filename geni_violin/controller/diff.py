"""From the rules that a switch has and those that it should have to the changes to send. Pure functions.

Theory of operation. OpenFlow lets a switch reorder what stands between two barriers (OpenFlow 1.3, 6.2). So the
changes come in batches, a barrier after each: meters that new rules count by; then all rules that are new or different,
the last table first, so that no frame is sent on to a table that is not ready; then all rules that go, the first table
first; then meters that go. In between a switch admits both the color that comes and the color that retires, and loses
no frame of either.

Installing a rule over one of the same key replaces it in one step and keeps its counters.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from geni_violin.controller.pipeline import Key, Rule
from geni_violin.core.errors import ConsistencyViolation


@dataclass(frozen=True, slots=True)
class InstallRule:
    """Add a rule, or replace the one of the same key."""

    rule: Rule


@dataclass(frozen=True, slots=True)
class RemoveRule:
    """Remove the rule of this rule's key."""

    rule: Rule


@dataclass(frozen=True, slots=True)
class AddMeter:
    """Add a meter that the switch does not have; it begins at 0."""

    meter: int


@dataclass(frozen=True, slots=True)
class RemoveMeter:
    """Remove a meter that no rule counts by."""

    meter: int


Change = InstallRule | RemoveRule | AddMeter | RemoveMeter
Batch = tuple[Change, ...]
"""Changes whose order among one another does not matter; a barrier follows."""


@dataclass
class Installed:
    """What a switch has of ours."""

    rules: dict[Key, Rule] = field(default_factory=dict)
    meters: set[int] = field(default_factory=set)

    def apply(self, batches: Iterable[Batch]) -> None:
        """Change as a switch would that is sent ``batches``."""
        for batch in batches:
            for change in batch:
                match change:
                    case InstallRule(rule):
                        self.rules[rule.key] = rule
                    case RemoveRule(rule):
                        self.rules.pop(rule.key, None)
                    case AddMeter(meter):
                        self.meters.add(meter)
                    case RemoveMeter(meter):
                        self.meters.discard(meter)


def by_key(rules: Iterable[Rule]) -> dict[Key, Rule]:
    """Rules by key.

    :raise ConsistencyViolation: two different rules have one key, so one of them would be lost.
    """
    table: dict[Key, Rule] = {}
    for rule in rules:
        if table.setdefault(rule.key, rule) != rule:
            raise ConsistencyViolation(f"two rules for one match: {table[rule.key]} and {rule}")
    return table


def meters_of(rules: Iterable[Rule]) -> set[int]:
    """The meters that rules count by."""
    return {rule.meter for rule in rules if rule.meter is not None}


def diff(
    installed: Mapping[Key, Rule],
    wanted: Iterable[Rule],
    new_meters: Iterable[int] = (),
    retired_meters: Iterable[int] = (),
) -> tuple[Batch, ...]:
    """The batches that turn ``installed`` into ``wanted``, in order; none if they are equal.

    :param new_meters: the meters that the switch lacks.
    :param retired_meters: those that go.
    :raise ConsistencyViolation: ``wanted`` contradicts itself.
    """
    target = by_key(wanted)
    new = [rule for key, rule in target.items() if installed.get(key) != rule]
    old = [rule for key, rule in installed.items() if key not in target]
    add: Batch = tuple(map(AddMeter, sorted(new_meters)))
    install: Batch = tuple(InstallRule(rule) for rule in sorted(new, key=lambda rule: -rule.table))
    remove: Batch = tuple(RemoveRule(rule) for rule in sorted(old, key=lambda rule: rule.table))
    drop: Batch = tuple(map(RemoveMeter, sorted(retired_meters)))
    return tuple(batch for batch in (add, install, remove, drop) if batch)
