"""What a controller that has been restarted finds of a slice on the switches. Pure functions.

Theory of operation. A slice may have been recolored or armed by this controller's predecessor, and who tells it the
slice may not know of that yet. Colors only advance and only a request disarms, so a port whose switch has it one epoch
further, or armed, is taken as it is found. The colors in the rules are told from the epochs in the definition, which
are right or one behind.
"""

from collections.abc import Mapping
from dataclasses import replace

from geni_violin.controller.pipeline import Key, Rule
from geni_violin.controller.rules import admit_rules, ingress_rule, link_rules
from geni_violin.controller.validation import link_end_ids
from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink

RulesBySwitch = Mapping[int, Mapping[Key, Rule]]


def adopted(network: NetworkSlice, found: RulesBySwitch) -> NetworkSlice:
    """The slice with each port as far as its switch has it."""
    ports = (_adopted_port(network.vlan_id, port, found.get(port.dpid, {})) for port in network.ports)
    return replace(network, ports=tuple(ports))


def _adopted_port(vlan_id: int, port: EdgePort, found: Mapping[Key, Rule]) -> EdgePort:
    if port.epoch < 0:  # it will be refused
        return port
    ahead = replace(port, epoch=port.epoch + 1)
    if _has(found, ingress_rule(vlan_id, ahead)):
        port = ahead
    elif not _has(found, ingress_rule(vlan_id, port)):
        return port
    return replace(port, armed=_armed(vlan_id, port, found) or port.armed)


def _has(found: Mapping[Key, Rule], rule: Rule) -> bool:
    there = found.get(rule.key)
    return there is not None and there.vlan_id == rule.vlan_id and there.actions == rule.actions


def _armed(vlan_id: int, port: EdgePort, found: Mapping[Key, Rule]) -> int:
    """The epoch that a port is armed for on its switch; 0 if it is not."""
    for epoch in (port.epoch + 1, port.epoch):
        if epoch and all(_has(found, rule) for rule in admit_rules(vlan_id, replace(port, armed=epoch))):
            return epoch
    return 0


def links_found(network: NetworkSlice, found: RulesBySwitch) -> set[SwitchLink]:
    """The links that a switch takes the slice's frames from."""
    return {
        link for link in network.links if any(_is_in_use(network.vlan_id, *end, found) for end in link_end_ids(link))
    }


def _is_in_use(vlan_id: int, dpid: int, port_no: int, found: RulesBySwitch) -> bool:
    rules = link_rules(vlan_id, port_no)
    return any(rule.key in found.get(dpid, {}) for rule in rules)
