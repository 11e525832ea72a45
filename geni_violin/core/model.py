"""What a slice is: its VMs, switches, links and hosts; and how the network sees it.

Two views of one thing. :class:`SliceSpec` is what a person wrote in a topology file. :class:`NetworkSlice` is what
the controller needs once ports have numbers: edge ports (a VM's network interface on a switch) and the links
between switches.
"""

from dataclasses import dataclass

MAX_VLAN_ID = 4094
"""VLAN IDs 1 to 4094 can name a slice (IEEE 802.1Q reserves 0 and 4095)."""

MAX_LINK_DELAY_MS = 10_000
"""The longest that a link can delay a frame."""

IN_HYPERVISOR, IN_SWITCH = "hypervisor", "switch"
"""Where a VM's edge is, at which its frames are held: in its hypervisor, or at a hold port of its switch."""


@dataclass(frozen=True)
class Image:
    """What a VM boots. ``append`` may name {vm}, {index} (from 1) and {address} (no prefix length)."""

    kernel: str
    initrd: str
    append: str = ""
    memory_mib: int = 128
    vcpus: int = 1
    disks: tuple[str, ...] = ()


@dataclass(frozen=True)
class VmSpec:
    """One VM: its place in the network and its image. ``address`` has a prefix length, as 10.9.0.1/24.

    With ``any_source`` it may send frames with source MAC addresses that are not its own (it is a bridge or a router).
    ``hold`` is where its frames are held, :data:`IN_HYPERVISOR` or :data:`IN_SWITCH`; with ``vhost`` the kernel moves
    them past its hypervisor, so that it can be in the switch only.
    """

    name: str
    index: int
    host: str
    switch: str
    address: str
    mac: str
    image: Image
    any_source: bool = False
    vhost: bool = False
    hold: str = IN_HYPERVISOR

    @property
    def held_in(self) -> str:
        """Where its edge is."""
        return IN_SWITCH if self.vhost else self.hold

    def kernel_command_line(self) -> str:
        """The image's ``append`` with this VM's values filled in."""
        address = self.address.split("/")[0]
        return self.image.append.format(vm=self.name, index=self.index, address=address)


@dataclass(frozen=True)
class SwitchSpec:
    """One OpenFlow switch and the host that it runs on."""

    name: str
    host: str


@dataclass(frozen=True)
class LinkSpec:
    """A link between two switches, by name. ``delay_ms`` is one way; ``loss`` is the share of frames lost, 0 to 1.

    A link with a delay or a loss goes through a delay line in user space; the others are as fast as the machine.
    """

    a: str
    b: str
    delay_ms: float = 0.0
    loss: float = 0.0


@dataclass(frozen=True)
class SliceSpec:
    """A whole slice as written in a topology file. Links may be redundant: the network uses a tree of them."""

    name: str
    hosts: tuple[str, ...]
    switches: tuple[SwitchSpec, ...]
    links: tuple[LinkSpec, ...]
    vms: tuple[VmSpec, ...]

    def vm(self, name: str) -> VmSpec:
        """The VM of that name.

        :raise KeyError: the slice has none.
        """
        for vm in self.vms:
            if vm.name == name:
                return vm
        raise KeyError(name)


@dataclass(frozen=True)
class EdgePort:
    """A VM's port on a switch. ``epoch`` is the number of cuts that its VM has been through.

    An ``armed`` port has an edge that tells frames by their color: it gets them with the slice's tag still on, of the
    colors of both epochs of the cut at hand, ``armed`` - 1 and ``armed`` (the epoch that the VM will be cut into); 0 is
    not armed. With ``any_source`` the VM may use source MAC addresses other than ``mac``.

    A VM whose edge is in the switch has a *hold port* beside it, ``hold_port_no`` (0: none). Armed, that one gets the
    frames instead; what comes out of it, without a tag, is for the VM.
    """

    vm: str
    dpid: int
    port_no: int
    mac: str
    epoch: int
    armed: int = 0
    any_source: bool = False
    hold_port_no: int = 0

    @property
    def armed_port_no(self) -> int:
        """The port that gets the VM's frames while it is armed."""
        return self.hold_port_no or self.port_no


@dataclass(frozen=True)
class SwitchLink:
    """A link between two switches, by datapath id and OpenFlow port number at both ends."""

    a_dpid: int
    a_port_no: int
    b_dpid: int
    b_port_no: int


@dataclass(frozen=True)
class NetworkSlice:
    """A slice as the controller sees it. ``links`` must connect the switches that it uses; they may be redundant."""

    name: str
    vlan_id: int
    ports: tuple[EdgePort, ...]
    links: tuple[SwitchLink, ...] = ()
