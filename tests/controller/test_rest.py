"""The REST interface, from a request's bytes to a switch's, and back."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from ryu.app.wsgi import WSGIApplication
from ryu.lib import hub
from webob import Request

from geni_violin.controller import operations as operations_module
from geni_violin.controller import rest
from geni_violin.controller.meters import Counting, meter_of
from geni_violin.controller.operations import Operations
from geni_violin.controller.rules import (
    admit_rules,
    default_rules,
    foreign_rule,
    local_rule,
    refuse_rule,
    slice_rules,
)
from geni_violin.core.messages import ArmRequest, DisarmRequest, RecolorRequest
from geni_violin.core.model import NetworkSlice, SwitchLink
from geni_violin.runtime.wire import encode

from .slices import make_slice, with_armed, with_epochs
from .wire_switch import BARRIER, FLOW_MOD, METER_MOD, STATS, WireSwitch

RED = make_slice("red", 7, [1, 1, 2], [0, 0, 0], [1])
Answer = tuple[int, Any]


class Service:
    """A controller with two switches, as a REST client sees it."""

    def __init__(self, switches: Iterable[WireSwitch] = ()) -> None:
        self.operations = Operations()
        given = [*switches] or [WireSwitch(dpid, self.operations) for dpid in (1, 2)]
        self.switches = {switch.id: switch for switch in given}
        self.application = WSGIApplication()
        rest.register(self.application, self.operations)
        for switch in given:
            switch.operations = self.operations
            switch.connect()

    def __call__(self, method: str, path: str, body: Any = None) -> Answer:
        request = Request.blank(path, method=method)
        if body is not None:
            request.json = encode(body)
        response = request.get_response(self.application)
        kind = "application/json" if response.status_int == 200 else "application/problem+json"
        assert response.content_type == kind
        return response.status_int, response.json

    def arm(self, epoch: int, *vms: str) -> Answer:
        return self("POST", "/v1/slices/red/arm", ArmRequest(epoch, vms))

    def disarm(self, epoch: int) -> Answer:
        return self("POST", "/v1/slices/red/disarm", DisarmRequest(epoch))

    def recolor(self, epoch: int, *vms: str) -> Answer:
        return self("POST", "/v1/slices/red/recolor", RecolorRequest(epoch, vms or None))


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def red(service: Service) -> Service:
    assert service("PUT", "/v1/slices/red", RED)[0] == 200
    return service


def test_health_names_switches_and_the_instance(service: Service) -> None:
    status, health = service("GET", "/healthz")
    assert (status, health["healthy"], health["switches"]) == (200, True, [1, 2])
    assert health["instance"] != Service()("GET", "/healthz")[1]["instance"]


def test_a_slice_comes_and_goes(red: Service) -> None:
    for dpid, switch in red.switches.items():
        assert set(switch.rules.values()) == {*default_rules(), *slice_rules(RED, dpid)}
    assert red("GET", "/v1/slices") == (200, [encode(RED)])
    assert red("GET", "/v1/slices/red") == (200, {**encode(RED), "tree": encode(RED.links), "parts": [[1, 2]]})
    status, answer = red("DELETE", "/v1/slices/red")
    assert status == 200 and answer["barrier_ms"] >= 0
    assert all(set(switch.rules.values()) == set(default_rules()) for switch in red.switches.values())
    assert red("GET", "/v1/slices/red")[0] == 404
    assert red("DELETE", "/v1/slices/red")[0] == 404


def test_whole_truth(red: Service) -> None:
    blue = make_slice("blue", 8, [1, 2], [0, 0], [1], first_port=11)
    assert red("PUT", "/v1/slices", (blue,)) == (200, {"installed": 1})
    assert red("GET", "/v1/slices") == (200, [encode(blue)])
    assert red("PUT", "/v1/slices", ()) == (200, {"installed": 0})
    assert set(red.switches[1].rules.values()) == set(default_rules())


def test_recolor_sends_few_messages_and_reads_nothing(red: Service) -> None:
    for switch in red.switches.values():
        switch.received.clear()
    status, answer = red.recolor(1, "v0")
    assert status == 200 and answer["barrier_ms"] >= 0
    assert red.switches[1].received.count(FLOW_MOD) <= 5
    assert red.switches[1].received[-1] == BARRIER
    assert set(red.switches[1].received) == {FLOW_MOD, BARRIER}
    assert red.switches[2].received == []
    assert set(red.switches[1].rules.values()) == {*default_rules(), *slice_rules(with_epochs(RED, (1, 0, 0)), 1)}
    assert red("GET", "/v1/slices/red")[1]["ports"][0]["epoch"] == 1


def test_confirming_again_is_a_barrier_only(red: Service) -> None:
    red.recolor(1, "v0")
    red.switches[1].received.clear()
    assert red.recolor(1, "v0")[0] == 200
    assert red.switches[1].received == [BARRIER]


def test_recolors_at_the_same_time(red: Service) -> None:
    """Flood rules are shared by the ports of a switch: the last one on the wire must know of all, so none overtakes."""
    red.switches[1].is_congested = True
    answers: list[Answer] = []
    threads = [hub.spawn(lambda vm=vm: answers.append(red.recolor(1, vm))) for vm in ("v0", "v1", "v2")]
    hub.joinall(threads)
    assert [status for status, _answer in answers] == [200, 200, 200]
    for dpid, switch in red.switches.items():
        assert set(switch.rules.values()) == {*default_rules(), *slice_rules(with_epochs(RED, (1, 1, 1)), dpid)}


def test_counters(red: Service) -> None:
    switch, port = red.switches[1], RED.ports[1]
    switch.packets[local_rule(7, port).key] = 10
    switch.packets[refuse_rule(7, port).key] = 3
    switch.packets[admit_rules(7, port)[0].key] = 5
    switch.packets[foreign_rule(7, port).key] = 2
    status, counters = red("GET", "/v1/slices/red/counters")
    assert status == 200
    assert counters[1] == {"vm": "v1", "color": 0, "frames_delivered": 7, "frames_dropped": 3, "frames_foreign": 2}
    assert red("GET", "/v1/slices/green/counters")[0] == 404


def test_a_cut_under_hold(red: Service) -> None:
    """The recolor of an armed port is one message and its barrier."""
    assert red.arm(1, "v0", "v1", "v2")[0] == 200
    for dpid, switch in red.switches.items():
        assert set(switch.rules.values()) == {*default_rules(), *slice_rules(with_armed(RED, 1), dpid)}
    red.switches[1].received.clear()
    assert red.recolor(1, "v0")[0] == 200
    assert red.switches[1].received == [FLOW_MOD, BARRIER]
    assert red.disarm(1)[0] == 409, "v1 and v2 are not there yet"
    assert red.recolor(1)[0] == 200
    assert red.disarm(1)[0] == 200
    for dpid, switch in red.switches.items():
        assert set(switch.rules.values()) == {*default_rules(), *slice_rules(with_epochs(RED, (1, 1, 1)), dpid)}


def test_colors_tell_who_is_alive_and_disarming_writes_off_what_was_lost(red: Service) -> None:
    def count(dpid: int, counting: Counting, frames: int) -> None:
        meter = meter_of(7, counting, 0)
        assert meter is not None
        red.switches[dpid].meters[meter] += frames

    count(1, Counting.ENTERED, 10)
    count(1, Counting.CROSSED, 6)
    count(2, Counting.RECEIVED, 4)
    answer = red("GET", "/v1/slices/red/colors")
    assert answer[0] == 200
    assert answer[1][0] == {"color": 0, "entered": 10, "ended": 8, "alive": 2}
    assert [counter["alive"] for counter in answer[1]] == [2, 0, 0]
    assert red.recolor(1)[0] == 200
    assert red.disarm(1)[0] == 200
    assert red("GET", "/v1/slices/red/colors")[1][0] == {"color": 0, "entered": 10, "ended": 10, "alive": 0}
    assert red("GET", "/v1/slices/green/colors")[0] == 404


def test_switch_without_meters_works_but_cannot_count() -> None:
    service = Service()
    third = WireSwitch(3, service.operations)
    third.has_meters = False
    third.connect()
    alone = make_slice("red", 7, [3, 3], [0, 0], [])
    assert service("PUT", "/v1/slices/red", alone)[0] == 200
    assert all(rule.meter is None for rule in third.rules.values())
    assert service.recolor(1)[0] == 200
    assert service.disarm(1)[0] == 200
    status, problem = service("GET", "/v1/slices/red/colors")
    assert status == 502 and "cannot count" in problem["detail"]


SPARE = SwitchLink(1, 50, 2, 51)
DOUBLE = NetworkSlice("red", 7, RED.ports, (*RED.links, SPARE))
USED_PORT, SPARE_PORT = RED.links[0].a_port_no, SPARE.a_port_no
"""A slice that gets a second link goes on with the one that it has."""


def test_tree_goes_round_a_link_that_is_down(red: Service) -> None:
    assert red("PUT", "/v1/slices/red", DOUBLE)[0] == 200
    for switch in red.switches.values():
        switch.received.clear()
    red.switches[1].set_port(USED_PORT, False)
    hub.sleep(0.05)
    now = NetworkSlice("red", 7, RED.ports, (SPARE,))
    assert red("GET", "/v1/slices/red")[1]["tree"] == encode(now.links)
    for dpid, switch in red.switches.items():
        assert set(switch.rules.values()) == {*default_rules(), *slice_rules(now, dpid)}
        assert STATS not in switch.received, "nothing is read again"


def ports_in_use(switch: WireSwitch) -> set[int]:
    """The link ports that frames are taken from."""
    matches = (rule.match for rule in switch.rules.values())
    return {match.in_port for match in matches if match.in_port is not None and match.vlan_vid is not None}


def test_new_way_is_not_used_before_all_have_left_the_old_one(red: Service) -> None:
    """A switch that answers late: until it has, nobody gets a rule for the link that is to replace the other."""
    assert red("PUT", "/v1/slices/red", DOUBLE)[0] == 200
    assert ports_in_use(red.switches[1]) == {USED_PORT}
    red.switches[2].late_s = 0.2
    red.switches[1].set_port(USED_PORT, False)
    hub.sleep(0.1)
    assert ports_in_use(red.switches[1]) == set()
    hub.sleep(0.5)
    assert ports_in_use(red.switches[1]) == {SPARE_PORT}
    assert red("GET", "/v1/slices/red")[1]["parts"] == [[1, 2]]


def test_switch_that_does_not_confirm_a_change_of_links_is_given_up(
    red: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on without it; it gets the difference when it connects again."""
    assert red("PUT", "/v1/slices/red", DOUBLE)[0] == 200
    monkeypatch.setattr(operations_module, "INSTALL_DEADLINE_MS", 30.0)
    red.switches[2].answers = False
    red.switches[1].set_port(USED_PORT, False)
    hub.sleep(0.1)
    assert red.switches[2].is_closed
    assert ports_in_use(red.switches[1]) == {SPARE_PORT}
    red.switches[2].answers = True
    red.switches[2].connect()
    spare = NetworkSlice("red", 7, RED.ports, (SPARE,))
    assert set(red.switches[2].rules.values()) == {*default_rules(), *slice_rules(spare, 2)}


def test_slice_whose_links_cannot_be_confirmed_in_time(red: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request ends; the change goes on, and the request can be repeated."""
    assert red("PUT", "/v1/slices/red", DOUBLE)[0] == 200
    alone = NetworkSlice("red", 7, RED.ports, (SPARE,))
    monkeypatch.setattr(operations_module, "INSTALL_DEADLINE_MS", 50.0)
    red.switches[2].late_s = 0.03
    status, problem = red("PUT", "/v1/slices/red", alone)
    assert status == 502 and "in time" in problem["detail"]
    hub.sleep(0.2)
    assert red("PUT", "/v1/slices/red", alone)[0] == 200
    for dpid, switch in red.switches.items():
        assert set(switch.rules.values()) == {*default_rules(), *slice_rules(alone, dpid)}


def test_switch_that_answers_late_has_still_done_it(red: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "RECOLOR_DEADLINE_MS", 20.0)
    red.switches[1].late_s = 0.1
    status, problem = red.recolor(1, "v0")
    assert status == 502 and "switch 0x1 did not confirm" in problem["detail"]
    hub.sleep(0.15)
    red.switches[1].late_s = 0.0
    assert red.recolor(1, "v0")[0] == 200, "the request can be repeated"
    assert set(red.switches[1].rules.values()) == {*default_rules(), *slice_rules(with_epochs(RED, (1, 0, 0)), 1)}


def test_switch_that_comes_back_empty_gets_everything(red: Service) -> None:
    red.arm(1, "v0", "v1", "v2")
    red.recolor(1, "v0")
    rules, meters = dict(red.switches[1].rules), set(red.switches[1].meters)
    red.switches[1].restart_empty()
    assert red.switches[1].rules == rules
    assert set(red.switches[1].meters) == meters
    assert red("GET", "/v1/slices/red/colors") == (200, []), "what it had counted is gone"


@pytest.mark.parametrize("is_whole_truth", [False, True])
def test_controller_killed_in_the_middle_of_a_cut(red: Service, is_whole_truth: bool) -> None:
    """The new one is told the slice as of before, finds it further on the switches, and sends nothing."""
    red.arm(1, "v0", "v1", "v2")
    red.recolor(1, "v0")
    there = red("GET", "/v1/slices/red")
    again = Service(red.switches.values())
    for switch in again.switches.values():
        switch.received.clear()
    told = again("PUT", "/v1/slices", (RED,)) if is_whole_truth else again("PUT", "/v1/slices/red", RED)
    assert told[0] == 200
    assert again("GET", "/v1/slices/red") == there
    assert {kind for switch in again.switches.values() for kind in switch.received} == {BARRIER}
    assert again.recolor(1)[0] == 200
    assert again.disarm(1)[0] == 200


def test_refusal_in_the_middle_of_a_cut(red: Service) -> None:
    """The connection is given up; the rules are read again, and only the difference is sent."""
    red.arm(1, "v0", "v1", "v2")
    switch = red.switches[1]
    switch.refuses = True
    assert red.recolor(1, "v0")[0] == 502
    assert red.recolor(1, "v0")[0] == 502, "not connected"
    switch.received.clear()
    switch.connect()
    assert switch.received.count(FLOW_MOD) == 1
    assert METER_MOD not in switch.received
    assert red.recolor(1, "v0")[0] == 200


def test_port_made_a_moment_ago_is_waited_for(service: Service) -> None:
    """Its announcement is on its way while the slice comes in; it is before the answer to any barrier."""
    switch = service.switches[1]
    number = next(iter(switch.ports))
    port = switch.ports.pop(number)
    service.operations.port_changed(switch)

    def announce() -> None:
        switch.ports[number] = port
        service.operations.port_changed(switch)

    hub.spawn_after(0.01, announce)
    switch.late_s = 0.02
    network = make_slice("red", 7, [1], [0], [], first_port=number)
    assert service("PUT", "/v1/slices/red", network)[0] == 200


@pytest.mark.parametrize(
    ("request_of", "status", "words"),
    [
        (lambda red: red("PUT", "/v1/slices/blue", RED), 422, "the path names slice 'blue'"),
        (lambda red: red("PUT", "/v1/slices/red", {"name": "red"}), 422, "vlan_id"),
        (lambda red: red("PUT", "/v1/slices/red"), 422, "not JSON"),
        (lambda red: red("PUT", "/v1/slices", {"name": "red"}), 422, "tuple"),
        (lambda red: red("PUT", "/v1/slices/x", make_slice("x", 9, [1], [0], [])), 409, "belongs to slice red"),
        (lambda red: red("PUT", "/v1/slices/x", make_slice("x", 9, [5], [0], [])), 502, "switch 0x5"),
        (lambda red: red.recolor(2, "v0"), 409, "cannot be recolored to 2"),
        (lambda red: red.recolor(1, "v9"), 404, "no VM 'v9'"),
        (lambda red: red("POST", "/v1/slices/green/recolor", RecolorRequest(1)), 404, "no slice 'green'"),
        (lambda red: red("POST", "/v1/slices/red/recolor", {"epoch": "soon"}), 422, "epoch"),
        (lambda red: red.arm(1, "v9"), 404, "no VM 'v9'"),
        (lambda red: red.arm(2, "v0"), 409, "no port can be armed for 2"),
        (lambda red: red("POST", "/v1/slices/red/arm", {"epoch": 1}), 422, "vms"),
        (lambda red: red("POST", "/v1/slices/green/arm", ArmRequest(1, ())), 404, "no slice 'green'"),
        (lambda red: red.disarm(1), 409, "cannot be disarmed for 1"),
        (lambda red: red("PUT", "/v1/slices/x", make_slice("x", 9, [1], [0], [], 5000)), 404, "has no port 5000"),
        (lambda red: red("PATCH", "/v1/slices/red"), 404, "no request PATCH /v1/slices/red"),
        (lambda red: red("GET", "/"), 404, "no request GET /"),
    ],
)
def test_refused_requests_say_why_and_change_nothing(
    red: Service, request_of: Callable[[Service], Answer], status: int, words: str
) -> None:
    before = [dict(switch.rules) for switch in red.switches.values()]
    answered, problem = request_of(red)
    assert (answered, problem["status"]) == (status, status)
    assert words in problem["detail"]
    assert [switch.rules for switch in red.switches.values()] == before
    assert red("GET", "/v1/slices") == (200, [encode(RED)])


def test_silent_switch(red: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "RECOLOR_DEADLINE_MS", 50.0)
    red.switches[1].answers = False
    status, problem = red.recolor(1, "v0")
    assert status == 502 and "switch 0x1 did not confirm" in problem["detail"]
    assert red.recolor(1, "v2")[0] == 200, "the other switch is not affected"


def test_refusing_switch_is_read_again(red: Service) -> None:
    switch = red.switches[1]
    switch.refuses = True
    status, problem = red.recolor(1, "v0")
    assert status == 502 and "OFPFMFC_TABLE_FULL" in problem["detail"]
    assert switch.is_closed
    assert red("GET", "/healthz")[1]["switches"] == [2]
    assert red.recolor(1, "v0")[0] == 502, "not connected"
    switch.connect()
    assert red.recolor(1, "v0")[0] == 200
    assert set(switch.rules.values()) == {*default_rules(), *slice_rules(with_epochs(RED, (1, 0, 0)), 1)}


def test_switch_that_goes_while_it_is_waited_for(red: Service) -> None:
    red.switches[1].answers = False
    waiting = hub.spawn(lambda: red.recolor(1, "v0"))
    hub.sleep(0.01)
    red.operations.switch_left(red.switches[1])
    status, problem = waiting.wait()
    assert status == 502 and "disconnected" in problem["detail"]


def test_second_connection_of_a_switch_replaces_the_first(red: Service) -> None:
    again = WireSwitch(1, red.operations)
    again.rules = dict(red.switches[1].rules)
    again.connect()
    assert red.switches[1].is_closed
    red.operations.switch_left(red.switches[1])
    assert red("GET", "/healthz")[1]["switches"] == [1, 2], "the end of the first says nothing about the second"
    assert red.recolor(1, "v0")[0] == 200


def test_switch_that_does_not_tell_its_rules_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "READ_DEADLINE_MS", 50.0)
    service = Service()
    third = WireSwitch(3, service.operations)
    third.answers = False
    third.connect()
    assert third.is_closed
    assert service("GET", "/healthz")[1]["switches"] == [1, 2]


def test_unexpected_failure_is_a_problem_document(red: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_networks: tuple[NetworkSlice, ...]) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr(red.operations, "replace_all", fail)
    status, problem = red("PUT", "/v1/slices", ())
    assert status == 500 and "a defect" in problem["detail"]
