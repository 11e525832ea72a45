"""Slices that share every MAC and IP address on the same switches: an original and its copies from the past."""

from collections.abc import Iterator

import pytest

from mininet_tests.slice_harness import PAIR, Installation, Slice, installation, wait_for, write_pair_topology


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation with the slice "pair" running."""
    with installation("copies") as made:
        made.ok("up", str(write_pair_topology(tmp_path_factory.mktemp("topology"))))
        yield made


def test_a_copy_runs_beside_the_original(machine: Installation) -> None:
    """A frame that strays between them carries a number that its receiver knows already, or moves tokens twice."""
    with machine.client() as client:
        original = Slice(client, "pair", PAIR)
        wait_for(lambda: all(original.reports(vm, 0) for vm in PAIR), 60, "the guests' first reports")
        assert original.take("fork")["state"] == "committed"
        copy_view = machine.ok("restore", "fork", "--as", "copy")
        assert copy_view["state"] == "running"
        slices = {found["name"]: found for found in machine.ok("slice", "list")}
        assert slices["pair"]["vlan_id"] != slices["copy"]["vlan_id"]
        copy = Slice(client, "copy", PAIR)
        for running in (original, copy):
            _assert_undisturbed(running)
        assert copy.take("of-the-copy")["state"] == "committed"
        machine.ok("slice", "delete", "pair")
        _assert_undisturbed(copy)
        assert machine.run("restore", "fork", "--as", "copy").code == 4, "the name is taken"
        machine.ok("restore", "fork")
        _assert_undisturbed(original)
        machine.ok("slice", "delete", "copy")


def _assert_undisturbed(running: Slice) -> None:
    """Its guests talk to one another and to nobody else."""
    since = running.offsets()
    first, last = running.wait_for_reports(since, 1), running.wait_for_reports(since, 4)
    for vm in PAIR:
        assert last[vm]["udp_received"] > first[vm]["udp_received"], f"{vm} of {running.name} hears nothing"
        for key in ("udp_duplicates", "udp_foreign", "tcp_dead", "tcp_violations"):
            assert last[vm][key] == 0, f"{running.name}: {vm} {key}"


def test_restored_paused(machine: Installation) -> None:
    """`restore --paused` gives a slice whose VMs stand still until they are told to run."""
    with machine.client() as client:
        original = Slice(client, "pair", PAIR)
        wait_for(lambda: all(original.reports(vm, 0) for vm in PAIR), 60, "the guests' first reports")
        assert original.take("still")["state"] == "committed"
        assert machine.ok("restore", "still", "--as", "standing", "--paused")["state"] == "suspended"
        refused = Slice(client, "standing", PAIR).take("no")
        assert refused["state"] == "aborted"
        assert "running" in refused["failure"]
        assert machine.ok("slice", "resume", "standing")["state"] == "running"
        _assert_undisturbed(Slice(client, "standing", PAIR))
