"""The domain that libvirt makes of a VM, alike enough to QEMU's devices as the host agent has them. Pure.

What a migration stream holds must be there when it is loaded: the machine type with its version, the memory, the number
of virtual CPUs and their topology, and each device at its place on the bus. So the domain has what
``hostagent/qemu_command.py`` asks of QEMU and what QEMU adds by itself, and it refuses what libvirt would add: USB,
memory balloon, video. The network interface is at its slot and has its address and receive ring, but is attached to
libvirt's ``user`` network, which every machine has: a single VM has no slice to return to. Edit it on the way, with
``virsh restore --xml``, to attach it elsewhere.
"""

import struct
from xml.etree import ElementTree

from geni_violin.core.errors import Conflict, NotFound
from geni_violin.core.messages import Manifest
from geni_violin.core.model import VmSpec

_RECEIVE_RING_FRAMES = 1024
_FIRST_SLOT = 2
_MACHINE = struct.Struct(">8sBI")
_CONFIGURATION = 7
_MAX_MACHINE_BYTES = 255


def machine_of(stream: bytes) -> str:
    """The machine type, with its version, that a stream was made on.

    :param stream: its beginning.
    :raise Conflict: the stream does not tell.
    """
    if len(stream) > _MACHINE.size:
        _header, kind, length = _MACHINE.unpack_from(stream)
        name = stream[_MACHINE.size : _MACHINE.size + length]
        if kind == _CONFIGURATION and 0 < length <= _MAX_MACHINE_BYTES and name.isascii():
            return name.decode()
    raise Conflict("the image does not tell its machine type, which a domain needs", "export it as qemu or archive")


def domain_xml(manifest: Manifest, vm: str, machine: str) -> str:
    """The domain of one VM.

    :raise NotFound: the snapshot's slice does not tell what the VM is.
    """
    try:
        spec = manifest.slice.vm(vm)
    except KeyError:
        raise NotFound(f"the slice of snapshot {manifest.name} does not tell what VM {vm} is") from None
    domain = ElementTree.Element("domain", type="qemu")
    _add(domain, "name", f"{manifest.slice.name}-{vm}")
    _add(domain, "description", f"VM {vm} of snapshot {manifest.name} of slice {manifest.slice.name}")
    _add(domain, "memory", str(spec.image.memory_mib), unit="MiB")
    processors = max(2, spec.image.vcpus)
    _add(domain, "vcpu", str(processors), placement="static", current=str(spec.image.vcpus))
    _add_boot(domain, spec, machine)
    features = _add(domain, "features")
    for name in ("acpi", "apic"):
        _add(features, name)
    processor = _add(domain, "cpu", mode="maximum")
    # QEMU's own choice for a number of CPUs: cores of one socket.
    _add(processor, "topology", sockets="1", dies="1", cores=str(processors), threads="1")
    _add(_add(domain, "clock", offset="utc"), "timer", name="hpet", present="yes")
    _add_devices(domain, spec)
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode") + "\n"


def _add_boot(domain: ElementTree.Element, spec: VmSpec, machine: str) -> None:
    boot = _add(domain, "os")
    _add(boot, "type", "hvm", arch="x86_64", machine=machine)
    _add(boot, "kernel", spec.image.kernel)
    _add(boot, "initrd", spec.image.initrd)
    _add(boot, "cmdline", spec.kernel_command_line())


def _add_devices(domain: ElementTree.Element, spec: VmSpec) -> None:
    devices = _add(domain, "devices")
    _add(devices, "controller", type="usb", index="0", model="none")
    _add(devices, "controller", type="pci", index="0", model="pci-root")
    interface = _add(devices, "interface", type="user")
    _add(interface, "mac", address=spec.mac)
    _add(interface, "model", type="virtio")
    _add(interface, "driver", name="qemu", rx_queue_size=str(_RECEIVE_RING_FRAMES))
    _add(interface, "rom", enabled="no")
    _add(interface, "address", type="pci", domain="0x0000", bus="0x00", slot=f"0x{_FIRST_SLOT:02x}", function="0x0")
    serial = _add(devices, "serial", type="pty")
    _add(serial, "target", type="isa-serial", port="0")
    for name in ("video", "memballoon"):
        device = _add(devices, name, **({} if name == "video" else {"model": "none"}))
        if name == "video":
            _add(device, "model", type="none")


def _add(parent: ElementTree.Element, tag: str, text: str = "", **attributes: str) -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag, attributes)
    child.text = text or None
    return child
