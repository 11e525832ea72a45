"""Topology files: what a good one means, and that every mistake is told with its line and what was expected."""

from pathlib import Path

import pytest

from geni_violin.core.errors import InvalidInput, MachineFault
from geni_violin.core.model import IN_HYPERVISOR, IN_SWITCH, LinkSpec, SwitchSpec
from geni_violin.topology import read_topology

GOOD = """\
name: mandelbrot
image:
  kernel: vmlinuz
  initrd: guest.cpio.gz
  append: "console=ttyS0 gv.name={vm} gv.index={index} gv.address={address} {{x}}"
  memory_mib: 128
  vcpus: 1
hosts: [{name: h1}, {name: h2}]
switches: [{name: s1, host: h1}, {name: s2, host: h2}, {name: s3, host: h2}]
links: [[s1, s2], [s2, s3]]
vms:
  - {name: n1, switch: s1, address: 10.9.0.1/24, mac: 52:54:00:00:00:01}
  - {name: n2, switch: s2, address: 10.9.0.2/24, mac: "52:54:00:00:00:AA"}
  - {name: n3, switch: s3, address: 10.9.0.3/24, image: {memory_mib: 256, initrd: other.gz}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the good topology boots."""
    for name in ("vmlinuz", "guest.cpio.gz", "other.gz"):
        (tmp_path / name).write_bytes(b"boots")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    """The text as a topology file in ``folder``."""
    path = folder / "net.yaml"
    path.write_text(text)
    return path


def test_a_good_file(folder: Path) -> None:
    spec = read_topology(write(folder, GOOD))
    assert (spec.name, spec.hosts) == ("mandelbrot", ("h1", "h2"))
    assert spec.switches == (SwitchSpec("s1", "h1"), SwitchSpec("s2", "h2"), SwitchSpec("s3", "h2"))
    assert spec.links == (LinkSpec("s1", "s2"), LinkSpec("s2", "s3"))
    assert [(vm.name, vm.index, vm.host, vm.switch, vm.address) for vm in spec.vms] == [
        ("n1", 1, "h1", "s1", "10.9.0.1/24"),
        ("n2", 2, "h2", "s2", "10.9.0.2/24"),
        ("n3", 3, "h2", "s3", "10.9.0.3/24"),
    ]


def test_macs_are_lower_case_and_come_from_the_index_if_absent(folder: Path) -> None:
    macs = [vm.mac for vm in read_topology(write(folder, GOOD)).vms]
    assert macs == ["52:54:00:00:00:01", "52:54:00:00:00:aa", "52:54:00:00:00:03"]


def test_a_vm_overrides_single_keys_of_the_image(folder: Path) -> None:
    first, _second, third = read_topology(write(folder, GOOD)).vms
    assert (first.image.memory_mib, first.image.initrd) == (128, str(folder / "guest.cpio.gz"))
    assert (third.image.memory_mib, third.image.initrd) == (256, str(folder / "other.gz"))
    assert third.image.kernel == first.image.kernel == str(folder / "vmlinuz")


def test_append_is_filled_in_per_vm(folder: Path) -> None:
    vm = read_topology(write(folder, GOOD)).vm("n2")
    assert vm.kernel_command_line() == "console=ttyS0 gv.name=n2 gv.index=2 gv.address=10.9.0.2 {x}"


def test_paths_are_relative_to_the_file_not_to_the_caller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, GOOD)
    monkeypatch.chdir("/")
    assert read_topology(path).vms[0].image.kernel == str(folder / "vmlinuz")


def test_one_host_and_one_switch_by_default(folder: Path) -> None:
    text = "name: a\nimage: {kernel: vmlinuz, initrd: other.gz}\nvms:\n- {name: n1, address: 10.0.0.1/8}\n"
    spec = read_topology(write(folder, text))
    assert (spec.hosts, spec.switches, spec.links) == (("h1",), (SwitchSpec("s1", "h1"),), ())
    assert (spec.vms[0].host, spec.vms[0].switch) == ("h1", "s1")


def test_a_vm_may_bring_the_whole_image(folder: Path) -> None:
    text = "name: a\nvms:\n- {name: n1, address: 10.0.0.1/8, image: {kernel: vmlinuz, initrd: other.gz}}\n"
    assert read_topology(write(folder, text)).vms[0].image.initrd == str(folder / "other.gz")


def test_an_unused_switch_may_stand_alone(folder: Path) -> None:
    text = GOOD.replace(", [s2, s3]", "").replace("switch: s3", "switch: s2")
    assert len(read_topology(write(folder, text)).switches) == 3


def test_links_may_be_redundant(folder: Path) -> None:
    text = GOOD.replace("[s2, s3]]", "[s2, s3], [s3, s1], [s1, s2]]")
    assert read_topology(write(folder, text)).links[2:] == (LinkSpec("s3", "s1"), LinkSpec("s1", "s2"))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{between: [s2, s3]}", LinkSpec("s2", "s3")),
        ("{between: [s2, s3], delay_ms: 20, loss: 0.01}", LinkSpec("s2", "s3", 20.0, 0.01)),
        ("{loss: 1, delay_ms: .5, between: [s2, s3]}", LinkSpec("s2", "s3", 0.5, 1.0)),
        ("{between: [s2, s3], delay_ms: 10000}", LinkSpec("s2", "s3", 10_000.0)),
    ],
)
def test_a_link_may_have_a_delay_and_a_loss(folder: Path, written: str, meant: LinkSpec) -> None:
    spec = read_topology(write(folder, GOOD.replace("[s2, s3]]", f"{written}]")))
    assert spec.links == (LinkSpec("s1", "s2"), meant)


def test_links_apart_from_the_rest_are_a_mistake(folder: Path) -> None:
    text = GOOD.replace("[s2, s3]]", "[s2, s3], [i1, i2]]")
    text = text.replace("switches: [", "switches: [{name: i1, host: h1}, {name: i2, host: h1}, ")
    with pytest.raises(InvalidInput, match="no links connect the switches 's1' and 'i1'"):
        read_topology(write(folder, text))


@pytest.mark.parametrize(("written", "meant"), [("true", True), ("false", False), ("Yes", True)])
def test_a_vm_may_use_any_source_address(folder: Path, written: str, meant: bool) -> None:
    spec = read_topology(write(folder, GOOD.replace("name: n2,", f"name: n2, any_source: {written},")))
    assert [vm.any_source for vm in spec.vms] == [False, meant, False]


@pytest.mark.parametrize(
    ("written", "vhost", "held_in"),
    [
        ("hold: switch", False, IN_SWITCH),
        ("hold: hypervisor", False, IN_HYPERVISOR),
        ("vhost: true", True, IN_SWITCH),
        ("vhost: true, hold: switch", True, IN_SWITCH),
        ("vhost: false", False, IN_HYPERVISOR),
    ],
)
def test_frames_are_held_in_the_hypervisor_or_in_the_switch(
    folder: Path, written: str, vhost: bool, held_in: str
) -> None:
    spec = read_topology(write(folder, GOOD.replace("name: n2,", f"name: n2, {written},")))
    assert [(vm.vhost, vm.held_in) for vm in spec.vms] == [
        (False, IN_HYPERVISOR),
        (vhost, held_in),
        (False, IN_HYPERVISOR),
    ]


BAD: list[tuple[str, str, str, int, str, str]] = [
    # what it shows, text to replace, its replacement, line, problem, expected
    ("unknown key", "vms:\n", "bogus: 1\nvms:\n", 11, "unknown key 'bogus'", "one of name, vms"),
    ("near key", "links:", "lnks:", 10, "the file has an unknown key 'lnks'", "'links' (did you mean that?)"),
    ("near key of image", "memory_mib: 128", "memory: 128", 6, "unknown key 'memory'", "'memory_mib' (did you mean"),
    ("near key of a vm", "address: 10.9.0.2/24", "adress: 10.9.0.2/24", 13, "unknown key 'adress'", "'address' (did"),
    ("key twice", "vms:\n", "name: b\nvms:\n", 11, "name is given twice", "each key once"),
    ("no name", "name: mandelbrot\n", "", 1, "the file has no 'name'", "the keys name, vms"),
    ("no vms", GOOD[GOOD.index("vms:") :], "", 1, "the file has no 'vms'", "the keys name, vms"),
    ("empty vms", GOOD[GOOD.index("vms:") :], "vms: []\n", 11, "vms is empty", "at least one VM"),
    ("null vms", GOOD[GOOD.index("vms:") :], "vms:\n", 11, "vms is nothing", "a list of VMs"),
    ("no address", " address: 10.9.0.2/24,", "", 13, "vms[2] has no 'address'", "the keys name, address"),
    ("a list for a mapping", "{name: n1,", "[name, n1]  # {", 12, "vms[1] is a list", "a mapping with the keys name"),
    ("a name that is none", "name: n1", "name: N_1", 12, "vms[1].name 'N_1' is not a name", "1 to 31 of a-z"),
    ("a name too long", "name: n1", "name: " + "a" * 32, 12, "is not a name", "1 to 31 of a-z"),
    ("a slice name", "name: mandelbrot", "name: -x", 1, "name '-x' is not a name", "1 to 31 of a-z"),
    ("a name that is a list", "name: mandelbrot", "name: [a]", 1, "name is a list", "a name: 1 to 31"),
    ("vm twice", "name: n2", "name: n1", 13, "vms[2].name 'n1' is taken already", "each name once"),
    ("host twice", "{name: h2}]", "{name: h1}]", 8, "hosts[2].name 'h1' is taken already", "each name once"),
    ("switch twice", "{name: s2, host", "{name: s1, host", 9, "switches[2].name 's1' is taken", "each name once"),
    ("no hosts", "hosts: [{name: h1}, {name: h2}]", "hosts: []", 8, "hosts is empty", "at least one"),
    ("unknown host", "host: h1}", "host: h7}", 9, "unknown host 'h7'", "one of h1, h2"),
    ("host unsaid", "{name: s1, host: h1}", "{name: s1}", 9, "switches[1] has no 'host'", "one of h1, h2"),
    ("unknown switch", "switch: s2", "switch: s9", 13, "vms[2].switch names an unknown switch 's9'", "s1, s2, s3"),
    ("switch unsaid", " switch: s2,", "", 13, "vms[2] has no 'switch'", "one of s1, s2, s3"),
    ("unknown switch of a link", "[s2, s3]]", "[s2, s8]]", 10, "links[2][2] names an unknown switch 's8'", "one of s1"),
    ("link of three", "[s2, s3]]", "[s1, s2, s3]]", 10, "links[2] has 3 ends", "two names of switches"),
    ("link to itself", "[s2, s3]]", "[s2, s2]]", 10, "links[2] joins 's2' to itself", "two different"),
    ("one link only", "links: [[s1, s2], [s2, s3]]", "links: [s1, s2]", 10, "links[1] is text ('s1')", "{between: ["),
    ("link without ends", "[s2, s3]]", "{delay_ms: 2}]", 10, "links[2] has no 'between'", "the keys between"),
    ("link between one", "[s2, s3]]", "{between: [s2]}]", 10, "links[2].between has 1 ends", "two names of switches"),
    (
        "link with a near key",
        "[s2, s3]]",
        "{between: [s2, s3], delay: 2}]",
        10,
        "unknown key 'delay'",
        "'delay_ms' (did",
    ),
    ("delay with a unit", "[s2, s3]]", "{between: [s2, s3], delay_ms: 2ms}]", 10, "delay_ms is text ('2ms')", "from 0"),
    ("too long a delay", "[s2, s3]]", "{between: [s2, s3], delay_ms: 10001}]", 10, "delay_ms is 10001", "to 10000"),
    (
        "a delay without end",
        "[s2, s3]]",
        "{between: [s2, s3], delay_ms: .inf}]",
        10,
        "a number ('.inf')",
        "milliseconds",
    ),
    (
        "a negative delay",
        "[s2, s3]]",
        "{between: [s2, s3],\n delay_ms: -1}]",
        11,
        "links[2].delay_ms is a nu",
        "from 0",
    ),
    ("loss in percent", "[s2, s3]]", "{between: [s2, s3], loss: 5}]", 10, "links[2].loss is 5", "share of frames"),
    (
        "loss as truth",
        "[s2, s3]]",
        "{between: [s2, s3], loss: yes}]",
        10,
        "loss is true or false ('yes')",
        "from 0 to 1",
    ),
    ("unconnected", ", [s2, s3]]", "]", 10, "no links connect the switches 's1' and 's3'", "that connect all switches"),
    ("no links at all", "links: [[s1, s2], [s2, s3]]\n", "", 11, "no links connect the switches 's1' and 's2'", "all"),
    (
        "any source as a number",
        "switch: s2,",
        "switch: s2, any_source: 1,",
        13,
        "any_source is a number ('1')",
        "true or",
    ),
    ("held elsewhere", "switch: s2,", "switch: s2, hold: tap,", 13, "unknown place 'tap'", "one of hypervisor, switch"),
    (
        "vhost held by QEMU",
        "switch: s2,",
        "switch: s2, vhost: true, hold: hypervisor,",
        13,
        "unknown place 'hypervisor'",
        "one of switch",
    ),
    (
        "vhost with any source",
        "switch: s2,",
        "switch: s2, vhost: true, any_source: true,",
        13,
        "a VM with any_source cannot have its frames held in the switch",
        "neither 'vhost: true' nor 'hold: switch'",
    ),
    ("no address at all", "10.9.0.2/24", "ten", 13, "vms[2].address 'ten' is not an address", "as 10.9.0.1/24"),
    ("no prefix", "10.9.0.2/24", "10.9.0.2", 13, "is not the address of a host with a prefix", "as 10.9.0.1/24"),
    ("bad prefix", "10.9.0.2/24", "10.9.0.2/33", 13, "'10.9.0.2/33' is not an address", "as 10.9.0.1/24"),
    ("the network itself", "10.9.0.2/24", "10.9.0.0/24", 13, "is not the address of a host", "as 10.9.0.1/24"),
    ("broadcast", "10.9.0.2/24", "10.9.0.255/24", 13, "is not the address of a host", "as 10.9.0.1/24"),
    ("address twice", "10.9.0.2/24", "10.9.0.1/16", 13, "10.9.0.1 is taken by VM 'n1' already", "each VM its own"),
    ("bad mac", "52:54:00:00:00:01", "52:54:00:00:01", 12, "vms[1].mac '52:54:00:00:01' is not a MAC", "six bytes"),
    ("multicast mac", "52:54:00:00:00:01", "01:00:5e:00:00:01", 12, "is not the MAC of one", "unicast"),
    ("mac twice", "52:54:00:00:00:AA", "52:54:00:00:00:01", 13, "52:54:00:00:00:01 is taken by VM 'n1'", "its own"),
    ("derived mac taken", "52:54:00:00:00:AA", "52:54:00:00:00:03", 14, "vms[3]: 52:54:00:00:00:03 is taken", "own"),
    ("placeholder", "{address} {{x}}", "{adress}", 5, "unknown placeholder {adress}", "{vm}, {index}, {address}"),
    ("placeholder of nothing", "{address} {{x}}", "{}", 5, "unknown placeholder {}", "{vm}, {index}, {address}"),
    ("placeholder with format", "{index}", "{index:03d}", 5, "unknown placeholder {index:03d}", "{vm}, {index}"),
    ("placeholder that peeks", "{vm}", "{vm.__class__}", 5, "unknown placeholder {vm.__class__}", "{vm}, {index}"),
    ("lone brace", "{{x}}", "{x", 5, "image.append: expected '}'", "a brace itself is {{ or }}"),
    ("memory as text", "memory_mib: 128", "memory_mib: 128M", 6, "image.memory_mib is text ('128M')", "number of MiB"),
    ("too little memory", "memory_mib: 128", "memory_mib: 31", 6, "image.memory_mib is 31", "from 32 to 1048576"),
    (
        "too much memory",
        "memory_mib: 256",
        "memory_mib: 1048577",
        14,
        "vms[3].image.memory_mib is 1048577",
        "to 1048576",
    ),
    ("octal memory", "memory_mib: 128", "memory_mib: 0200", 6, "image.memory_mib is a number ('0200')", "whole number"),
    ("no cpu", "vcpus: 1", "vcpus: 0", 7, "image.vcpus is 0", "virtual CPUs from 1 to 255"),
    ("half a cpu", "vcpus: 1", "vcpus: 0.5", 7, "image.vcpus is a number ('0.5')", "whole number of virtual CPUs"),
    ("disks", "vcpus: 1", "disks: [a.qcow2]", 7, "disks are not supported in this release", "no 'disks'"),
    ("kernel is a number", "kernel: vmlinuz", "kernel: 5", 3, "image.kernel is a number ('5')", "the path of a file"),
    ("no initrd", "  initrd: guest.cpio.gz\n", "", 11, "VM 'n1' has no initrd", "this key in its 'image'"),
    ("broken YAML", "hosts: [{name: h1},", "hosts: [{name: h1}}", 8, "not YAML:", "a topology file in YAML"),
    ("a tab", "  vcpus: 1", "\tvcpus: 1", 7, "not YAML:", "a topology file in YAML"),
    ("unknown anchor", "vcpus: 1", "vcpus: *one", 7, "not YAML: found undefined alias", "in YAML"),
    ("two documents", "vms:\n", "---\nvms:\n", 11, "not YAML: expected a single document", "in YAML"),
    ("all is text", GOOD, "just words\n", 1, "the file is text ('just words')", "a mapping with the keys name, vms"),
    ("empty", GOOD, "", 1, "the file is empty", "the keys name, image and vms"),
    ("comments only", GOOD, "# nothing\n", 1, "the file is empty", "the keys name, image and vms"),
    ("a key that is a list", "vms:\n", "[1, 2]: 3\nvms:\n", 11, "unknown key 'a list or a mapping'", "one of name"),
    ("control characters", "vcpus: 1", "vcpus: \x01", 1, "not YAML: unacceptable character", "in YAML"),
]


@pytest.mark.parametrize(
    ("old", "new", "line", "problem", "expected"), [row[1:] for row in BAD], ids=[r[0] for r in BAD]
)
def test_a_mistake_is_told_with_its_line(
    folder: Path, old: str, new: str, line: int, problem: str, expected: str
) -> None:
    assert old in GOOD
    path = write(folder, GOOD.replace(old, new, 1))
    with pytest.raises(InvalidInput) as caught:
        read_topology(path)
    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert problem in caught.value.message
    assert caught.value.hint.startswith("expected ")
    assert expected in caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.yaml: cannot be read: No such file") as caught:
        read_topology(tmp_path / "none.yaml")
    assert caught.value.hint == "expected a topology file in YAML"


def test_a_folder_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        read_topology(tmp_path)


def test_bytes_that_are_not_utf8(folder: Path) -> None:
    path = folder / "net.yaml"
    path.write_bytes(b"name: a\nimage: \xff\n")
    with pytest.raises(InvalidInput, match=r"net\.yaml:2: a byte that is not UTF-8"):
        read_topology(path)


@pytest.mark.parametrize(("key", "file", "line"), [("kernel", "vmlinuz", 3), ("initrd", "other.gz", 14)])
def test_a_missing_boot_file_is_the_machines_fault(folder: Path, key: str, file: str, line: int) -> None:
    path = write(folder, GOOD)
    (folder / file).unlink()
    with pytest.raises(MachineFault, match=rf"net\.yaml:{line}: the {key} {folder}/{file} does not exist") as caught:
        read_topology(path)
    assert "topologies/build-images" in caught.value.hint


def test_a_common_image_that_every_vm_overrides_needs_no_files(folder: Path) -> None:
    text = GOOD.replace("  kernel: vmlinuz\n", "  kernel: nowhere\n")
    for vm in ("n1", "n2"):
        text = text.replace(f"name: {vm},", f"name: {vm}, image: {{kernel: vmlinuz}},")
    text = text.replace("image: {memory_mib: 256,", "image: {kernel: vmlinuz, memory_mib: 256,")
    assert read_topology(write(folder, text)).vms[2].image.kernel == str(folder / "vmlinuz")
