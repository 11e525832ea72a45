"""The benchmark of scale, small: the real controller and fake switches in processes of their own."""

import pytest

from bench.fake_switches import Totals
from bench.report import Target
from bench.scale import FIRST_DPID, Figures, measure, show, slice_of, switch_ports, targets
from geni_violin.controller.rules import slice_rules
from geni_violin.controller.validation import check_slice


@pytest.mark.parametrize(("ports", "switches"), [(5, 1), (7, 2), (125, 32), (1000, 32)])
def test_the_slices_are_valid_and_even(ports: int, switches: int) -> None:
    network = slice_of(ports, switches, vlan_id=5)
    check_slice(network)
    at = [sum(port.dpid == FIRST_DPID + i for port in network.ports) for i in range(switches)]
    assert max(at) - min(at) <= 1
    assert sum(map(len, switch_ports(network).values())) == ports + 2 * (switches - 1)


def test_the_whole_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    measured, totals = measure((6, 12), switches=3, rounds=2)
    large = measured[-1]
    network = slice_of(12, 3, vlan_id=5)
    wanted = sum(len(slice_rules(network, FIRST_DPID + i)) for i in range(3))
    assert large.flow_mods["install"] == [wanted, wanted]
    assert (large.rules, large.left_behind) == (wanted, 0)
    assert large.meters > 0
    assert set(large.flow_mods["confirm_one"]) == {0}
    assert set(large.flow_mods["unchanged"]) == {0}
    assert min(large.flow_mods["recolor_one"]) > 0
    assert large.flow_mods["recolor_all"][0] > max(large.flow_mods["recolor_one"])
    assert totals.refused == 0
    assert all(target.is_met for target in targets(measured, totals))
    show(measured, 3)
    assert "6 to 12 ports" in capsys.readouterr().out


def test_what_grows_with_the_ports_misses_its_target() -> None:
    small, large = Figures(10, rules=100), Figures(20, rules=400, left_behind=1)
    for figures, flow_mods in ((small, 3), (large, 4)):
        for kind in ("install", "recolor_all"):
            figures.times_ms[kind].append(1.0)
        figures.flow_mods["recolor_one"].append(flow_mods)
    large.times_ms["recolor_all"].append(2000.0)
    missed = [target.what for target in targets([small, large], Totals(0, 0, 0, 0, 0, refused=0)) if not target.is_met]
    assert missed == [
        "recolor 20 ports, worst",
        "growth of rules over growth of ports",
        "different numbers of flow-mods to recolor one port",
        "rules and meters left of deleted slices",
    ]
    assert "MISSED" in str(Target("x", 2.0, 1.0))
