"""The tree of links that a slice uses. Pure functions.

Theory of operation. Broadcast needs a network without loops, and a slice's links may be redundant, so each slice uses a
spanning tree of those that are up. Kruskal's algorithm, with the links in a fixed order, gives the same tree for the
same links; links that are in use already come first, so that a link that returns disturbs nobody. Where the links that
are up do not join all switches, there is a tree in each part, and traffic goes on inside the parts.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import astuple

from geni_violin.core.model import NetworkSlice, SwitchLink

Tree = tuple[SwitchLink, ...]


def switches_of(network: NetworkSlice) -> frozenset[int]:
    """The datapath ids of all switches that a slice has a port or a link on."""
    ends = {dpid for link in network.links for dpid in (link.a_dpid, link.b_dpid)}
    return frozenset(ends | {port.dpid for port in network.ports})


class _Parts:
    """Which switches are joined so far (union-find)."""

    def __init__(self, dpids: Iterable[int]) -> None:
        self._parent = {dpid: dpid for dpid in dpids}

    def root(self, dpid: int) -> int:
        while self._parent[dpid] != dpid:
            self._parent[dpid] = self._parent[self._parent[dpid]]
            dpid = self._parent[dpid]
        return dpid

    def join(self, a: int, b: int) -> bool:
        """Whether they were apart."""
        root_a, root_b = self.root(a), self.root(b)
        self._parent[root_a] = root_b
        return root_a != root_b

    def all(self) -> list[list[int]]:
        by_root: dict[int, list[int]] = {}
        for dpid in sorted(self._parent):
            by_root.setdefault(self.root(dpid), []).append(dpid)
        return sorted(by_root.values())


def spanning_tree(
    network: NetworkSlice, is_up: Callable[[SwitchLink], bool], in_use: Container[SwitchLink] = ()
) -> Tree:
    """The links that a slice is to use, in a fixed order."""
    parts = _Parts(switches_of(network))
    candidates = sorted(filter(is_up, network.links), key=lambda link: (link not in in_use, astuple(link)))
    return tuple(sorted((c for c in candidates if parts.join(c.a_dpid, c.b_dpid)), key=astuple))


def parts_of(network: NetworkSlice, tree: Iterable[SwitchLink]) -> list[list[int]]:
    """The datapath ids of the switches that a tree joins, part by part; one part if it joins all."""
    parts = _Parts(switches_of(network))
    for link in tree:
        parts.join(link.a_dpid, link.b_dpid)
    return parts.all()
