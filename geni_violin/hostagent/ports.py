"""TAP devices and their places on bridges: VMs' ports, and the ends of links that a process carries.

Theory of operation. A TAP device is the host's end of a VM's network interface: what the guest sends comes out of it,
and QEMU reads from it what the guest receives. The host itself must never send a frame into a slice, so IPv6, which
speaks unasked, is switched off before the device is up, and it has no address. Its queue is as long as QEMU's hold
queue, so that a VM that stands still for a moment loses nothing. A device is deleted after its port, or the switch
would keep a port of a device that is gone.

Jumbo frames, 9,000 bytes after the Ethernet header, pass with the slice's tag and up to three of the guest's own: the
kernel counts tags as part of what a device's MTU limits. Open vSwitch takes the device's MTU as it finds it, and its
setting vlan-limit does not matter: rules look at the outer tag alone, and what is inside is carried as it is (3.1).
"""

import asyncio
import contextlib
import fcntl
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from geni_violin.core.errors import GeniViolinError, MachineFault
from geni_violin.hostagent import names
from geni_violin.hostagent.descriptors import duplicates
from geni_violin.hostagent.ovs import OpenVSwitch
from geni_violin.hostagent.switch_end import SwitchEnd
from geni_violin.hostagent.tools import run_tool

JUMBO_BYTES = 9000
"""What a frame may carry after its Ethernet header and its tags."""
_TAGS_BYTES = 16
TAP_MTU = JUMBO_BYTES + _TAGS_BYTES
QUEUE_FRAMES = 10_000
"""What a TAP device keeps for its reader."""
_INTERFACES = Path("/sys/class/net")
_TUNSETIFF, _TUNGETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x800454D2, 0x0002, 0x1000  # linux/if_tun.h


@dataclass(frozen=True)
class VmPort:
    """A VM's place on a bridge. ``port_no`` is its OpenFlow port number; so is its hold port's, if it has one."""

    bridge: str
    tap: str
    port_no: int
    hold_tap: str = ""
    hold_port_no: int = 0


async def create_tap(name: str) -> None:
    """Create a TAP device that is up. One of the same name is taken over. Leaves nothing behind when it fails.

    :raise MachineFault: the kernel refused; with its own words.
    """
    made = not exists(name)
    if made:
        await run_tool("ip", "tuntap", "add", "dev", name, "mode", "tap")
    try:
        _switch_ipv6_off(name)
        await run_tool("ip", "link", "set", "dev", name, "mtu", str(TAP_MTU), "txqueuelen", str(QUEUE_FRAMES), "up")
    except BaseException:
        if made:  # one that was there may be a running VM's
            with contextlib.suppress(GeniViolinError):
                await delete_tap(name)
        raise


async def delete_tap(name: str) -> None:
    """Delete a TAP device; it need not exist.

    :raise MachineFault: it is there and stays.
    """
    if not exists(name):
        return
    try:
        await run_tool("ip", "link", "delete", "dev", name)
    except MachineFault:
        if exists(name):
            raise


def exists(name: str) -> bool:
    """Whether this machine has a network interface of that name."""
    return (_INTERFACES / name).exists()


def taps_of(installation_id: str) -> list[str]:
    """The TAP devices of an installation, of VMs, their hold ports and links."""
    kinds = (names.TAP_KIND, names.HOLD_TAP_KIND, names.LINK_TAP_KIND)
    beginnings = tuple(names.prefix(installation_id, kind) for kind in kinds)
    return sorted(path.name for path in _INTERFACES.iterdir() if path.name.startswith(beginnings))


async def plug(switches: OpenVSwitch, bridge: str, tap: str) -> VmPort:
    """Create a TAP device and put it on a bridge. Leaves nothing behind when it fails.

    :raise MachineFault: one of the two did not work.
    """
    made = not exists(tap)
    await create_tap(tap)
    try:
        port = VmPort(bridge, tap, await switches.add_port(bridge, tap))
        await asyncio.to_thread(_enlarge_buffer, tap)
        return port
    except BaseException:
        if made:
            with contextlib.suppress(GeniViolinError):
                await unplug(switches, bridge, tap)
        raise


async def plug_vm(switches: OpenVSwitch, bridge: str, tap: str, hold_tap: str) -> VmPort:
    """Plug a VM's TAP device, and its hold port's unless that name is empty. Leaves nothing behind when it fails.

    :raise MachineFault: one of them did not work.
    """
    port = await plug(switches, bridge, tap)
    if not hold_tap:
        return port
    try:
        held = await plug(switches, bridge, hold_tap)
    except BaseException:
        with contextlib.suppress(GeniViolinError):
            await unplug(switches, bridge, tap)
        raise
    return replace(port, hold_tap=hold_tap, hold_port_no=held.port_no)


async def unplug_vm(switches: OpenVSwitch, port: VmPort) -> None:
    """Undo :func:`plug_vm`."""
    try:
        if port.hold_tap:
            await unplug(switches, port.bridge, port.hold_tap)
    finally:
        await unplug(switches, port.bridge, port.tap)


def _enlarge_buffer(tap: str) -> None:
    end = SwitchEnd(tap)
    try:
        end.enlarge()
    finally:
        end.close()


async def unplug(switches: OpenVSwitch, bridge: str, tap: str) -> None:
    """Take a TAP device off its bridge and delete it; neither need exist."""
    try:
        await switches.delete_port(bridge, tap)
    finally:
        await delete_tap(tap)


def open_tap(name: str) -> int:
    """A descriptor that reads and writes the frames of a TAP device. While it is open the device has a carrier.

    :raise MachineFault: there is no such device, or another process has it.
    """
    request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise MachineFault(f"cannot open /dev/net/tun: {error.strerror}", "run as root") from error
    try:
        if not exists(name):
            raise MachineFault(f"there is no TAP device {name}")
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        os.close(descriptor)
        raise MachineFault(f"cannot open the TAP device {name}: {error.strerror}") from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def tap_descriptor_of(pid: int, name: str) -> int:
    """A duplicate of a process's descriptor of a TAP device; the caller closes it.

    :raise MachineFault: that process has none, or may not be looked at.
    """
    try:
        found = duplicates(pid, "/dev/net/tun")
    except OSError as error:
        raise MachineFault(f"cannot look at process {pid}: {error.strerror}", "run as root") from error
    wanted = [descriptor for descriptor in found if _device_of(descriptor) == name]
    for descriptor in found:
        if descriptor not in wanted[:1]:
            os.close(descriptor)
    if not wanted:
        raise MachineFault(f"process {pid} does not read the TAP device {name}", "see whether the VM runs")
    return wanted[0]


def _device_of(descriptor: int) -> str:
    try:
        answer = fcntl.ioctl(descriptor, _TUNGETIFF, bytes(40))
    except OSError:  # not attached to any
        return ""
    return answer[:16].rstrip(b"\0").decode()


def has_carrier(name: str) -> bool:
    """Whether somebody reads a TAP device, and the kernel has taken notice."""
    return (_INTERFACES / name / "operstate").read_text().strip() == "up"


def dropped_frames(name: str) -> int:
    """How many frames for its reader a TAP device has dropped since it was made; 0 if it is gone."""
    try:
        return int((_INTERFACES / name / "statistics" / "tx_dropped").read_text())
    except OSError:
        return 0


def _switch_ipv6_off(name: str) -> None:
    switch = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if not switch.exists():
        return  # this kernel has no IPv6
    try:
        switch.write_text("1")
    except OSError as error:
        raise MachineFault(f"cannot switch IPv6 off on {name}: {error.strerror}", "run as root") from error
