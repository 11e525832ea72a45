"""Topology files in YAML to ``core.model.SliceSpec``.

Theory of operation. First the shape: each value is taken through :class:`Place`, which knows its line. Then what names
name: hosts and switches exist, names, MACs and addresses are unique. Then the network: the links connect every switch
that has a VM. Last what the machine must have: the files that the VMs boot. So a person always meets the most basic
mistake first, with its line and what was expected.
"""

import ipaddress
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from geni_violin.core.errors import InvalidInput, MachineFault
from geni_violin.core.model import IN_HYPERVISOR, IN_SWITCH, Image, SliceSpec, SwitchSpec, VmSpec
from geni_violin.topology.links import check_connected, read_links
from geni_violin.topology.places import Place, read_document

DEFAULT_HOST, DEFAULT_SWITCH = "h1", "s1"
MEMORY_MIB = (32, 1 << 20)
VCPUS = (1, 255)
_HOLD_EXPECTED = "neither 'vhost: true' nor 'hold: switch': its own broadcasts would come back to it"
PLACEHOLDERS = ("vm", "index", "address")

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_NAME_EXPECTED = "1 to 31 of a-z, 0-9 and '-', not beginning with '-'"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_IMAGE_REQUIRED = ("kernel", "initrd")
_IMAGE_KEYS = ("kernel", "initrd", "append", "memory_mib", "vcpus", "disks")


def read_topology(path: Path | str) -> SliceSpec:
    """The slice that a topology file describes. Kernel and initrd paths come out absolute.

    :raise InvalidInput: the file is wrong; the message is ``FILE:LINE: what is wrong; expected …``.
    :raise MachineFault: the file is right, but a kernel or an initrd that it names is not there.
    """
    document = read_document(Path(path))
    fields = document.mapping(("name", "vms"), ("image", "hosts", "switches", "links"))
    name = _name(fields["name"])
    hosts = _hosts(fields.get("hosts"))
    switches = _switches(fields.get("switches"), hosts)
    links = read_links(fields.get("links"), [switch.name for switch in switches])
    common = _read_image(fields["image"]) if "image" in fields else _ImageDraft()
    reader = _Vms({switch.name: switch.host for switch in switches}, common)
    vms = reader.read(fields["vms"])
    check_connected(fields.get("links", fields["vms"]), links, [vm.switch for vm in vms])
    _check_files(reader.files)
    return SliceSpec(name, hosts, switches, links, vms)


def check_name(text: str, what: str) -> str:
    """A name that does not come from a file, such as a command's argument.

    :raise InvalidInput: it is no name; the message calls it ``what``.
    """
    if not _NAME.fullmatch(text):
        raise InvalidInput(f"{what} {text!r} is not a name", f"expected {_NAME_EXPECTED}")
    return text


def _name(place: Place) -> str:
    text = place.word(f"a name: {_NAME_EXPECTED}")
    if not _NAME.fullmatch(text):
        raise place.wrong(f"{place.what} {text!r} is not a name", _NAME_EXPECTED)
    return text


def _new_name(place: Place, taken: Iterable[str]) -> str:
    name = _name(place)
    if name in taken:
        raise place.wrong(f"{place.what} {name!r} is taken already", "each name once")
    return name


def _hosts(place: Place | None) -> tuple[str, ...]:
    if place is None:
        return (DEFAULT_HOST,)
    names: list[str] = []
    for item in place.items("a list of hosts, as [{name: h1}]"):
        names.append(_new_name(item.mapping(("name",), ())["name"], names))
    return _not_empty(place, names)


def _not_empty(place: Place, values: list[str]) -> tuple[str, ...]:
    if not values:
        raise place.wrong(f"{place.what} is empty", "at least one, or leave the key out")
    return tuple(values)


def _switches(place: Place | None, hosts: tuple[str, ...]) -> tuple[SwitchSpec, ...]:
    if place is None:
        return (SwitchSpec(DEFAULT_SWITCH, hosts[0]),)
    switches: dict[str, SwitchSpec] = {}
    for item in place.items("a list of switches, as [{name: s1, host: h1}]"):
        fields = item.mapping(("name",), ("host",))
        name = _new_name(fields["name"], switches)
        host = fields["host"].known_name("host", hosts) if "host" in fields else _only_host(item, hosts)
        switches[name] = SwitchSpec(name, host)
    _not_empty(place, list(switches))
    return tuple(switches.values())


def _only_host(place: Place, hosts: tuple[str, ...]) -> str:
    if len(hosts) > 1:
        raise place.wrong(f"{place.what} has no 'host'", f"one of {', '.join(hosts)}")
    return hosts[0]


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ImageDraft:
    """An image whose keys may still be missing, with the places of its files."""

    values: Image = field(default_factory=lambda: Image("", ""))
    files: tuple[tuple[str, Place], ...] = ()


def _read_image(place: Place, base: _ImageDraft | None = None) -> _ImageDraft:
    """The keys of ``place`` laid over ``base``."""
    draft = base or _ImageDraft()
    fields = place.mapping((), _IMAGE_KEYS)
    if "disks" in fields:
        raise fields["disks"].wrong("disks are not supported in this release", "no 'disks': VMs boot from an initrd")
    image, files = draft.values, dict(draft.files)
    for key in _IMAGE_REQUIRED:
        if key in fields:
            files[key] = fields[key]
    image = replace(image, kernel=_file(files.get("kernel")), initrd=_file(files.get("initrd")))
    if "append" in fields:
        image = replace(image, append=_append(fields["append"]))
    if "memory_mib" in fields:
        image = replace(image, memory_mib=fields["memory_mib"].integer(*MEMORY_MIB, "MiB"))
    if "vcpus" in fields:
        image = replace(image, vcpus=fields["vcpus"].integer(*VCPUS, "virtual CPUs"))
    return _ImageDraft(image, tuple(files.items()))


def _file(place: Place | None) -> str:
    if place is None:
        return ""
    relative = place.text("the path of a file, relative to this file")
    return str((place.path.parent / relative).resolve())


def _append(place: Place) -> str:
    expected = (
        f"no placeholders but {', '.join('{' + name + '}' for name in PLACEHOLDERS)}; a brace itself is {{{{ or }}}}"
    )
    if place.word("the kernel's command line").count("\n"):
        raise place.wrong(f"{place.what} has more than one line", "one line; YAML's '>-' folds long ones")
    text = place.word("the kernel's command line")
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise place.wrong(f"{place.what}: {error}", expected) from error
    for _literal, name, spec, conversion in parts:
        if name is not None and (name not in PLACEHOLDERS or spec or conversion):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise place.wrong(f"{place.what} has an unknown placeholder {{{shown}}}", expected)
    return text


def _check_files(files: Iterable[tuple[str, Place]]) -> None:
    for key, place in files:
        path = _file(place)
        if not Path(path).is_file():
            raise MachineFault(
                f"{place.path}:{place.line}: the {key} {path} does not exist",
                "expected a file; build the guests of the examples by topologies/build-images",
            )


def _hold(fields: Mapping[str, Place], any_source: bool) -> tuple[bool, str]:
    """Whether a VM uses vhost-net, and where its frames are held."""
    vhost = "vhost" in fields and fields["vhost"].truth()
    places = (IN_SWITCH,) if vhost else (IN_HYPERVISOR, IN_SWITCH)
    hold = fields["hold"].known_name("place", places) if "hold" in fields else places[0]
    if hold == IN_SWITCH and any_source:
        words = "a VM with any_source cannot have its frames held in the switch"
        raise fields["any_source"].wrong(words, _HOLD_EXPECTED)
    return vhost, hold


# --- VMs --------------------------------------------------------------------------------------------------------------


class _Vms:
    """Reads the list of VMs and keeps what is taken."""

    def __init__(self, host_of: dict[str, str], common: _ImageDraft) -> None:
        self._host_of, self._common = host_of, common
        self._names: set[str] = set()
        self._addresses: dict[str, str] = {}
        self._macs: dict[str, str] = {}
        self.files: dict[tuple[str, Place], None] = {}
        """What the VMs boot, as ordered pairs of key and place."""

    def read(self, place: Place) -> tuple[VmSpec, ...]:
        items = place.items("a list of VMs, as [{name: n1, switch: s1, address: 10.9.0.1/24}]")
        if not items:
            raise place.wrong("vms is empty", "at least one VM")
        return tuple(self._vm(item, index) for index, item in enumerate(items, 1))

    def _vm(self, place: Place, index: int) -> VmSpec:
        fields = place.mapping(("name", "address"), ("switch", "mac", "image", "any_source", "vhost", "hold"))
        name = _new_name(fields["name"], self._names)
        self._names.add(name)
        switch = self._switch(place, fields.get("switch"))
        address = self._address(fields["address"], name)
        mac = self._mac(fields.get("mac"), place, name, index)
        draft = _read_image(fields["image"], self._common) if "image" in fields else self._common
        for key in _IMAGE_REQUIRED:
            if key not in dict(draft.files):
                raise place.wrong(f"VM {name!r} has no {key}", "this key in its 'image' or in the file's")
        self.files.update(dict.fromkeys(draft.files))
        any_source = "any_source" in fields and fields["any_source"].truth()
        vhost, hold = _hold(fields, any_source)
        return VmSpec(name, index, self._host_of[switch], switch, address, mac, draft.values, any_source, vhost, hold)

    def _switch(self, vm: Place, place: Place | None) -> str:
        if place is not None:
            return place.known_name("switch", self._host_of)
        if len(self._host_of) > 1:
            raise vm.wrong(f"{vm.what} has no 'switch'", f"one of {', '.join(self._host_of)}")
        return next(iter(self._host_of))

    def _address(self, place: Place, vm: str) -> str:
        expected = "an IPv4 address of a host with its prefix length, as 10.9.0.1/24"
        text = place.word(expected)
        try:
            interface = ipaddress.IPv4Interface(text)
        except ValueError:
            raise place.wrong(f"{place.what} {text!r} is not an address", expected) from None
        network = interface.network
        reserved = (network.network_address, network.broadcast_address) if network.prefixlen < 31 else ()
        if not re.search(r"/\d+$", text) or interface.ip in reserved or interface.ip.is_multicast:
            raise place.wrong(f"{place.what} {text!r} is not the address of a host with a prefix length", expected)
        self._claim(place, self._addresses, str(interface.ip), vm)
        return str(interface)

    def _mac(self, place: Place | None, vm_place: Place, vm: str, index: int) -> str:
        if place is None:
            mac = f"52:54:00:00:{index >> 8 & 0xFF:02x}:{index & 0xFF:02x}"
            self._claim(vm_place, self._macs, mac, vm)
            return mac
        expected = "a unicast MAC of six bytes, as 52:54:00:00:00:01"
        mac = place.word(expected).lower()
        if not _MAC.fullmatch(mac):
            raise place.wrong(f"{place.what} {mac!r} is not a MAC", expected)
        if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
            raise place.wrong(f"{place.what} {mac!r} is not the MAC of one interface", expected)
        self._claim(place, self._macs, mac, vm)
        return mac

    def _claim(self, place: Place, taken: dict[str, str], value: str, vm: str) -> None:
        if value in taken:
            raise place.wrong(f"{place.what}: {value} is taken by VM {taken[value]!r} already", "each VM its own")
        taken[value] = vm
