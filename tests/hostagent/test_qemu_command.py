"""QEMU's command line, from a VM's definition."""

import dataclasses

import pytest

from geni_violin.core.errors import InvalidInput
from geni_violin.hostagent.hypervisor import Nic, VmDefinition
from geni_violin.hostagent.qemu_command import command_line, filter_name

DEFINITION = VmDefinition(
    slice="mandelbrot",
    name="n1",
    host="h1",
    kernel="/images/vmlinuz",
    initrd="/images/guest.initrd",
    append="console=ttyS0 gv.vm=n1",
    memory_mib=128,
    vcpus=2,
    nics=(Nic("gv0000t00000000", "52:54:00:00:00:01"),),
)


def option(arguments: list[str], name: str) -> list[str]:
    """The values of every option of that name."""
    return [arguments[place + 1] for place, word in enumerate(arguments) if word == name]


def test_what_the_guest_boots_and_gets() -> None:
    arguments = command_line(DEFINITION)
    assert option(arguments, "-kernel") == ["/images/vmlinuz"]
    assert option(arguments, "-initrd") == ["/images/guest.initrd"]
    assert option(arguments, "-append") == ["console=ttyS0 gv.vm=n1"]
    assert (option(arguments, "-m"), option(arguments, "-smp")) == (["128"], ["2,maxcpus=2"])
    assert option(arguments, "-accel") == ["tcg"]


def test_it_starts_paused_and_waits_for_an_image_only_if_told() -> None:
    assert "-S" in command_line(DEFINITION)
    assert "-incoming" not in command_line(DEFINITION)
    incoming = command_line(dataclasses.replace(DEFINITION, incoming=True))
    assert option(incoming, "-incoming") == ["defer"]
    assert "-S" in incoming


def test_frames_go_through_the_filter_and_not_past_it() -> None:
    (netdev,) = option(command_line(DEFINITION), "-netdev")
    assert "ifname=gv0000t00000000" in netdev
    assert {"vhost=off", "vnet_hdr=off", "script=no", "downscript=no"} <= set(netdev.split(","))


def test_an_interface_with_a_hold_port_has_no_filters() -> None:
    held = (Nic("gv0000t00000000", "52:54:00:00:00:01", "gv0000h00000000"),)
    for vhost in (False, True):
        arguments = command_line(dataclasses.replace(DEFINITION, nics=held, vhost=vhost))
        (netdev,) = option(arguments, "-netdev")
        assert f"vhost={'on' if vhost else 'off'}" in netdev.split(",")
        assert option(arguments, "-object") == []


def test_vhost_without_a_hold_port_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no hold port"):
        dataclasses.replace(DEFINITION, vhost=True)


def test_each_netdev_has_its_chain_of_filters_and_all_are_off() -> None:
    nics = (DEFINITION.nics[0], Nic("gv0000t00000001", "52:54:00:00:00:02"))
    filters = option(command_line(dataclasses.replace(DEFINITION, nics=nics)), "-object")
    found = [dict(part.split("=") for part in value.split(",")[1:]) for value in filters]
    assert [(one["id"], one["netdev"], one["queue"]) for one in found] == [
        (filter_name(kind, index), f"net{index}", queue)
        for index in range(2)
        for kind, queue in (("hold", "tx"), ("outer", "rx"), ("inner", "rx"))
    ]
    assert all(one["status"] == "off" for one in found)


def test_paths_of_any_length_stay_out_of_socket_addresses() -> None:
    (monitor,) = option(command_line(DEFINITION), "-qmp")
    assert "/" not in monitor


@pytest.mark.parametrize("name", ["", "..", "a/b", "-a", "a,b", "x" * 64, "a b"])
def test_a_name_that_cannot_be_a_file_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot name a slice or a VM"):
        dataclasses.replace(DEFINITION, name=name)
    with pytest.raises(InvalidInput, match="cannot name a slice or a VM"):
        dataclasses.replace(DEFINITION, slice=name)


@pytest.mark.parametrize("mac", ["", "52:54:00:00:00", "52:54:00:00:00:01,script=/bin/sh", "zz:54:00:00:00:01"])
def test_a_mac_address_that_is_none_is_refused(mac: str) -> None:
    with pytest.raises(InvalidInput, match="is not a MAC address"):
        Nic("gv0000t00000000", mac)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InvalidInput):
        dataclasses.replace(DEFINITION, memory_mib=0)
    assert DEFINITION.memory_bytes == 134_217_728
