"""The links of a topology file.

Theory of operation. A link is written as its two switches, ``[s1, s2]``, or, if it has a delay or a loss, as a mapping
with the switches in ``between``. Links may be redundant, also several between the same two switches: the network uses a
tree of them. They must connect all switches that have a VM or a link.
"""

from collections.abc import Iterable

from geni_violin.core.model import MAX_LINK_DELAY_MS, LinkSpec
from geni_violin.topology.places import Place

_ENDS_EXPECTED = "two names of switches, as [s1, s2]"
_LINK_EXPECTED = f"{_ENDS_EXPECTED}, or {{between: [s1, s2], delay_ms: 20, loss: 0.01}}"


def read_links(place: Place | None, switches: Iterable[str]) -> tuple[LinkSpec, ...]:
    """The links; none if ``place`` is None.

    :raise InvalidInput: one is wrong.
    """
    if place is None:
        return ()
    return tuple(_link(item, set(switches)) for item in place.items("a list of links, as [[s1, s2]]"))


def _link(place: Place, switches: set[str]) -> LinkSpec:
    if not place.is_mapping:
        return LinkSpec(*_ends(place, switches, _LINK_EXPECTED))
    fields = place.mapping(("between",), ("delay_ms", "loss"))
    a, b = _ends(fields["between"], switches, _ENDS_EXPECTED)
    delay_ms = fields["delay_ms"].number(0, MAX_LINK_DELAY_MS, "milliseconds one way,") if "delay_ms" in fields else 0.0
    loss = fields["loss"].number(0, 1, "the share of frames that are lost,") if "loss" in fields else 0.0
    return LinkSpec(a, b, delay_ms, loss)


def _ends(place: Place, switches: set[str], expected: str) -> tuple[str, str]:
    ends = place.items(expected)
    if len(ends) != 2:
        raise place.wrong(f"{place.what} has {len(ends)} ends", _ENDS_EXPECTED)
    a, b = (end.known_name("switch", switches) for end in ends)
    if a == b:
        raise place.wrong(f"{place.what} joins {a!r} to itself", "two different switches")
    return a, b


def check_connected(place: Place, links: tuple[LinkSpec, ...], with_vms: Iterable[str]) -> None:
    """See that every switch with a VM or a link can be reached from every other.

    :param place: where the error is, if there is one.
    :raise InvalidInput: one cannot.
    """
    used = [*with_vms, *(end for link in links for end in (link.a, link.b))]
    reached = _reachable(links, used[0])
    for switch in used:
        if switch not in reached:
            raise place.wrong(
                f"no links connect the switches {used[0]!r} and {switch!r}",
                "links that connect all switches that have a VM or a link",
            )


def _reachable(links: tuple[LinkSpec, ...], start: str) -> set[str]:
    neighbors: dict[str, set[str]] = {start: set()}
    for link in links:
        neighbors.setdefault(link.a, set()).add(link.b)
        neighbors.setdefault(link.b, set()).add(link.a)
    reached, pending = {start}, [start]
    while pending:
        new = neighbors[pending.pop()] - reached
        reached |= new
        pending += new
    return reached
