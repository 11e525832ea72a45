"""Changes: complete, ordered, and few."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.controller.diff import (
    AddMeter,
    Installed,
    InstallRule,
    RemoveMeter,
    RemoveRule,
    by_key,
    diff,
    meters_of,
)
from geni_violin.controller.pipeline import Match, Rule
from geni_violin.controller.rules import default_rules, slice_rules
from geni_violin.core.errors import ConsistencyViolation
from geni_violin.core.model import NetworkSlice

from .slices import mac, make_slice, slices_on_one_tree, with_armed, with_epochs
from .software_switch import Frame, SoftwareSwitch, Tag, edge_of


def rules_of(networks: list[NetworkSlice], dpid: int = 1) -> list[Rule]:
    return [*default_rules(), *(rule for network in networks for rule in slice_rules(network, dpid))]


@given(slices_on_one_tree(), slices_on_one_tree())
def test_applied_diff_gives_what_is_wanted(before: list[NetworkSlice], after: list[NetworkSlice]) -> None:
    switch, wanted = Installed(by_key(rules_of(before)), meters_of(rules_of(before))), rules_of(after)
    new, retired = meters_of(wanted) - switch.meters, switch.meters - meters_of(wanted)
    switch.apply(diff(switch.rules, wanted, new, retired))
    assert switch.rules == by_key(wanted)
    assert switch.meters == meters_of(wanted)
    assert diff(switch.rules, wanted) == ()


@given(slices_on_one_tree(), slices_on_one_tree())
def test_what_comes_precedes_what_goes(before: list[NetworkSlice], after: list[NetworkSlice]) -> None:
    """New meters, new rules from the last table to the first, old ones from the first to the last, old meters; a
    barrier between."""
    had, wanted = meters_of(rules_of(before)), meters_of(rules_of(after))
    batches = diff(by_key(rules_of(before)), rules_of(after), wanted - had, had - wanted)
    assert all(batches)
    kinds = [{type(change) for change in batch} for batch in batches]
    order = [{AddMeter}, {InstallRule}, {RemoveRule}, {RemoveMeter}]
    assert kinds == [kind for kind in order if kind in kinds]
    for batch in batches:
        tables = [change.rule.table for change in batch if isinstance(change, InstallRule | RemoveRule)]
        assert tables == sorted(tables, reverse=isinstance(batch[0], InstallRule))


@given(st.integers(1, 5), st.data())
def test_nothing_is_lost_between_the_batches_of_a_recolor(epoch: int, data: st.DataObject) -> None:
    """Half-way the port admits the color that comes, its own, and the one that retires."""
    old = make_slice("a", 7, [1, 1, 2], [epoch, epoch, epoch], [1])
    new = with_epochs(old, [epoch + 1, epoch, epoch])
    switch = SoftwareSwitch(rules_of([old]))
    meters = meters_of(rules_of([new])) - switch.meters.keys()
    switch.send(diff(switch.rules, rules_of([new]), meters)[: 1 + bool(meters)])
    color = data.draw(st.sampled_from([epoch - 1, epoch, epoch + 1])) % 3
    colored = Frame(mac(0), tags=(Tag(7, color),))
    assert [port for port, _frame in switch.receive(1002, colored)] == [edge_of(old, "v0")[1]]


@given(st.integers(2, 200), st.integers(0, 5))
def test_recolor_changes_a_constant_number_of_rules(ports: int, epoch: int) -> None:
    """Ingress, two admissions, two floods: five changes for a port among two hundred as for one of two.

    Of an armed port one: the color of what it sends.
    """
    old = make_slice("a", 7, [1] * ports, [epoch] * ports, [])
    new = with_epochs(old, [epoch + 1] + [epoch] * (ports - 1))
    changes = sum(len(batch) for batch in diff(by_key(rules_of([old])), rules_of([new])))
    assert changes <= 5
    armed = make_slice("a", 7, [1] * ports, [epoch] * ports, [])
    armed = with_armed(armed, epoch + 1)
    new = with_epochs(armed, [epoch + 1] + [epoch] * (ports - 1))
    assert sum(len(batch) for batch in diff(by_key(rules_of([armed])), rules_of([new]))) == 1


def test_two_rules_for_one_match_are_refused() -> None:
    one, two = Rule(0, 1, Match(in_port=1), 7, goto=1), Rule(0, 1, Match(in_port=1), 8, goto=1)
    with pytest.raises(ConsistencyViolation):
        diff({}, [one, two])
