"""QEMU's command line, computed from a VM's definition. Pure.

Every path but the kernel's and the initrd's is relative to the VM's own folder, which is QEMU's working directory: a
Unix socket's address is limited to 107 bytes (unix(7)), a folder's path is not.

Each netdev has a chain of filters for :mod:`geni_violin.hostagent.qemu_edge`, from the TAP device to the guest::

    inbound    divert (to a socket) -> hold (buffer) -> inject (from a socket); the sockets are added when needed
    outbound   outer (buffer) <- sent (a record, added when it is needed) <- inner (buffer)

All are made switched off. A buffer's interval, in microseconds of the guest's time, is as long as it can be: it must
never let frames go by itself. An interface with a hold port needs no filters, and where vhost-net moves its frames they
would see none. The guest's receive ring has 1024 places instead of 256, so that more of the frames that are let go at
once fit into it.
"""

from geni_violin.hostagent.hypervisor import VmDefinition

QEMU = "qemu-system-x86_64"
MONITOR_SOCKET = "qmp.sock"
CONSOLE_LOG = "console.log"
PROCESS_LOG = "qemu.log"
PID_FILE = "qemu.pid"
_HOLD_INTERVAL_US = 4_000_000_000
_RECEIVE_RING_FRAMES = 1024


def filter_name(kind: str, index: int) -> str:
    """The id of a filter (divert, hold, inject, outer, sent, inner) of a network interface, counted from 0."""
    return f"{kind}{index}"


def device_name(index: int) -> str:
    """The id of a network interface itself."""
    return f"nic{index}"


def netdev_name(index: int) -> str:
    """The id of a network interface's back end."""
    return f"net{index}"


def command_line(definition: VmDefinition) -> list[str]:
    """The program and its arguments. The VM starts paused."""
    machine = [QEMU, "-name", f"{definition.slice}/{definition.name}", "-accel", definition.accel, "-machine", "pc"]
    machine += ["-cpu", "max", "-m", str(definition.memory_mib), "-smp", _processors(definition.vcpus)]
    machine += ["-nodefaults", "-no-user-config", "-display", "none", "-S", "-pidfile", PID_FILE]
    boot = ["-kernel", definition.kernel, "-initrd", definition.initrd, "-append", definition.append]
    console = ["-chardev", f"file,id=console,path={CONSOLE_LOG},append=on", "-serial", "chardev:console"]
    monitor = ["-qmp", f"unix:{MONITOR_SOCKET},server=on,wait=off"]
    incoming = ["-incoming", "defer"] if definition.incoming else []
    return machine + boot + console + monitor + _network(definition) + incoming


def _processors(vcpus: int) -> str:
    """The virtual CPUs, with room for a second one that never comes.

    Where there can be only one, QEMU's TCG leaves out memory barriers, and a guest's kick of a virtio queue can get
    lost: once in some twenty runs a VM stopped sending for good. The room costs nothing that could be measured.
    """
    return f"{vcpus},maxcpus={max(2, vcpus)}"


def _network(definition: VmDefinition) -> list[str]:
    arguments = []
    vhost = "on" if definition.vhost else "off"
    for index, nic in enumerate(definition.nics):
        arguments += [
            "-netdev",
            f"tap,id={netdev_name(index)},ifname={nic.tap},script=no,downscript=no,vnet_hdr=off,vhost={vhost}",
            "-device",
            f"virtio-net-pci,id={device_name(index)},netdev={netdev_name(index)},mac={nic.mac},rx_queue_size={_RECEIVE_RING_FRAMES},romfile=",
            *([] if nic.hold_tap else _filters(index)),
        ]
    return arguments


def _filters(index: int) -> list[str]:
    """The chain of an interface. Inbound frames meet the filters in this order, outbound ones in the reverse."""
    arguments = []
    for kind, properties in (
        ("hold", f"filter-buffer,queue=tx,interval={_HOLD_INTERVAL_US},status=off"),
        ("outer", f"filter-buffer,queue=rx,interval={_HOLD_INTERVAL_US},status=off"),
        ("inner", f"filter-buffer,queue=rx,interval={_HOLD_INTERVAL_US},status=off"),
    ):
        what, _, rest = properties.partition(",")
        arguments += ["-object", f"{what},id={filter_name(kind, index)},netdev={netdev_name(index)},{rest}"]
    return arguments
