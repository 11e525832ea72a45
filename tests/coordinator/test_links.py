"""How the coordinator has links made, and what the controller is told of them."""

from dataclasses import replace

from coordinator_harness import World, make_spec, scenario

from geni_violin.core.messages import LinkRequest
from geni_violin.core.model import LinkSpec, NetworkSlice, SliceSpec, SwitchLink
from geni_violin.runtime.wire import encode

PLAIN, SLOW, LOSSY = LinkSpec("s1", "s2"), LinkSpec("s1", "s2", delay_ms=20.0), LinkSpec("s2", "s1", loss=0.01)


async def create(world: World, spec: SliceSpec) -> NetworkSlice:
    """Create a slice; what the controller has been told of it."""
    response = await world.request("POST", "/v1/slices", {"spec": encode(spec)})
    assert response.status_code == 201, response.text
    return world.controller.slices[spec.name]


@scenario
async def test_links_between_the_same_switches_are_told_apart(world: World) -> None:
    links = (PLAIN, PLAIN, SLOW)
    network = await create(world, replace(make_spec("other"), links=links))
    assert len({link.a_port_no for link in network.links}) == len({link.b_port_no for link in network.links}) == 3
    asked = [request for _, request in world.agents["h1"].host.links]
    assert asked[-2:] == [LinkRequest("h2", "s2", number=1), LinkRequest("h2", "s2", 20.0, number=2)]


@scenario
async def test_the_two_ends_of_a_tunnel_know_each_other(world: World) -> None:
    await create(world, replace(make_spec("other"), links=(SLOW, LOSSY)))
    one, other = (world.agents[host].host.tunnels for host in ("h1", "h2"))
    assert len(one) == 2
    assert {far: near for near, far in one.items()} == other


@scenario
async def test_a_link_without_delay_and_loss_has_no_tunnel(world: World) -> None:
    assert world.agents["h1"].host.links != []
    assert world.agents["h1"].host.tunnels == {}


@scenario
async def test_slices_share_the_ends_of_a_link_that_both_have(world: World) -> None:
    wide = replace(make_spec("one"), links=(SLOW,))
    first = await create(world, wide)
    tunnels = dict(world.agents["h1"].host.tunnels)
    assert (await create(world, replace(wide, name="two"))).links == first.links
    assert world.agents["h1"].host.tunnels == tunnels


@scenario
async def test_both_ends_of_a_link_are_named_in_the_files_order(world: World) -> None:
    network = await create(world, replace(make_spec("other"), links=(LOSSY,)))
    dpids = {switch: world.agents[host].host.dpids[switch] for host, switch in (("h1", "s1"), ("h2", "s2"))}
    (link,) = network.links
    assert isinstance(link, SwitchLink)
    assert (link.a_dpid, link.b_dpid) == (dpids["s2"], dpids["s1"])


@scenario
async def test_a_vm_that_may_use_any_source_address_has_such_a_port(world: World) -> None:
    spec = make_spec("other")
    network = await create(world, replace(spec, vms=(replace(spec.vms[0], any_source=True), *spec.vms[1:])))
    assert [port.any_source for port in network.ports] == [True, False, False]
