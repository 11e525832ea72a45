"""What goes wrong leaves nothing behind: real parts, one small slice, and a look at all that could be left over.

Before and after each mishap the same picture is taken of the machine: VM processes, taps, bridge ports, rules in the
switches, files in the image store. It must not change, and the slice must go on as it was.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from geni_violin.hostagent.names import TAP_KIND, prefix
from geni_violin.runtime.settings import Settings
from mininet_tests.slice_harness import PAIR as VMS
from mininet_tests.slice_harness import Installation, Slice, installation, wait_for, write_pair_topology

STORE_MIB = 480


@dataclass(frozen=True)
class Picture:
    """All that a mishap could leave behind."""

    processes: frozenset[int]
    taps: frozenset[str]
    bridge_ports: frozenset[str]
    rules: tuple[str, ...]
    store: frozenset[str]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def picture(made: Installation) -> Picture:
    """What there is now. Rules are compared without their counters and colors, which advance."""
    identity = Settings(state_dir=made.state_dir).installation_id
    bridges = [name for name in _output("ovs-vsctl", "list-br").split() if name.startswith(f"gv{identity}")]
    ports = {f"{bridge}/{port}" for bridge in bridges for port in _output("ovs-vsctl", "list-ports", bridge).split()}
    rules: list[str] = []
    for bridge in bridges:
        flows = _output("ovs-ofctl", "-O", "OpenFlow13", "--no-stats", "--no-names", "dump-flows", bridge)
        rules += [f"{bridge} table={line.count('table')}" for line in flows.splitlines()]
    taps = {path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith(prefix(identity, TAP_KIND))}
    own = f"{made.state_dir}/run/vms/".encode()
    processes = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _works_below(path, own)}
    store = made.state_dir / "store"
    files = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    return Picture(frozenset(processes), frozenset(taps), frozenset(ports), tuple(sorted(rules)), frozenset(files))


def _works_below(process: Path, folder: bytes) -> bool:
    try:
        return bytes((process / "cwd").readlink()).startswith(folder)
    except OSError:
        return False


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A topology of two VMs on one host."""
    return write_pair_topology(tmp_path_factory.mktemp("topology"))


@pytest.fixture(scope="module")
def machine(topology: Path) -> Iterator[Installation]:
    """An installation with that slice running, and an image store of limited size (a tmpfs)."""
    with installation("bad-input") as made:
        store = made.state_dir / "store"
        store.mkdir()
        _output("mount", "-t", "tmpfs", "-o", f"size={STORE_MIB}m", "tmpfs", str(store))
        try:
            made.ok("up", str(topology))
            yield made
            made.run("down")
        finally:
            made.run("down")
            _output("umount", str(store))


@pytest.fixture
def pair(machine: Installation) -> Iterator[Slice]:
    """The slice, exchanging datagrams."""
    with machine.client() as client:
        running = Slice(client, "pair", VMS)
        wait_for(lambda: all(running.reports(vm, 0) for vm in VMS), 60, "the guests' first reports")
        yield running


def _assert_as_it_was(machine: Installation, pair: Slice, before: Picture) -> None:
    """Nothing left over, the slice runs, all ports in one color, and its guests still talk."""
    assert picture(machine) == before
    view = pair.request("GET", "/v1/slices/pair")
    assert view["state"] == "running"
    assert len({vm["port_color"] for vm in view["vms"]}) == 1
    offsets = pair.offsets()
    first, last = pair.wait_for_reports(offsets, 1), pair.wait_for_reports(offsets, 3)
    assert all(last[vm]["udp_received"] > first[vm]["udp_received"] for vm in VMS)


def _assert_one_line(machine: Installation, *arguments: str, tells: str) -> None:
    """The command fails with one clear line."""
    outcome = machine.run(*arguments)
    assert outcome.code != 0, outcome.out
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert tells in errors[0]
    assert "Traceback" not in outcome.err + outcome.out


@contextmanager
def _filled(machine: Installation, left_mib: int) -> Iterator[None]:
    """The image store's disk with no more than this left on it."""
    filler = machine.state_dir / "store" / "filler"
    try:
        with filler.open("wb") as file:
            free = shutil.disk_usage(filler.parent).free
            os.posix_fallocate(file.fileno(), 0, free - (left_mib << 20))
        yield
    finally:
        filler.unlink()


def test_a_wrong_topology_file_is_refused_with_its_line(machine: Installation, pair: Slice, tmp_path: Path) -> None:
    before = picture(machine)
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: other\nimage: {kernel: k, initrd: i}\nvms:\n  - {name: a, switch: nowhere}\n")
    _assert_one_line(machine, "up", str(bad), tells="bad.yaml:4")
    _assert_as_it_was(machine, pair, before)


def test_a_missing_kernel_leaves_nothing(machine: Installation, pair: Slice, topology: Path, tmp_path: Path) -> None:
    before = picture(machine)
    bad = tmp_path / "kernel.yaml"
    bad.write_text(topology.read_text().replace("vmlinuz", "nothing-here").replace("name: pair", "name: other"))
    _assert_one_line(machine, "up", str(bad), tells="nothing-here")
    _assert_as_it_was(machine, pair, before)


def test_names_that_are_unknown_or_taken(machine: Installation, pair: Slice, topology: Path) -> None:
    before = picture(machine)
    _assert_one_line(machine, "up", str(topology), tells="pair")
    _assert_one_line(machine, "slice", "show", "nobody", tells="nobody")
    _assert_one_line(machine, "snapshot", "take", "nobody", tells="nobody")
    _assert_one_line(machine, "restore", "nothing", tells="nothing")
    _assert_one_line(machine, "slice", "fail", "pair", "--vm", "z", tells="z")
    problem = pair.request("GET", "/v1/slices/nobody", expect=404)
    assert problem["type"].endswith("not-found")
    assert problem["detail"]
    _assert_as_it_was(machine, pair, before)


def test_a_second_snapshot_at_a_time_and_a_name_taken(machine: Installation, pair: Slice) -> None:
    first = pair.request(
        "POST", "/v1/slices/pair/snapshots", {"name": "one", "delays_ms": {"a": 1000}, "second_trigger": False}
    )
    problem = pair.request("POST", "/v1/slices/pair/snapshots", {"name": "two"}, expect=409)
    assert "under way" in problem["detail"]
    assert pair.wait_for_end(first["id"])["state"] == "committed"
    before = picture(machine)
    pair.request("POST", "/v1/slices/pair/snapshots", {"name": "one"}, expect=409)
    _assert_one_line(machine, "snapshot", "take", "pair", "--name", "one", tells="one")
    _assert_as_it_was(machine, pair, before)
    machine.ok("snapshot", "delete", "one")


def test_a_disk_too_small_is_told_ahead(machine: Installation, pair: Slice) -> None:
    before = picture(machine)
    with _filled(machine, left_mib=100):
        done = pair.take("small")
    assert done["state"] == "aborted"
    assert "space" in done["failure"] or "room" in done["failure"]
    _assert_as_it_was(machine, pair, before)


def test_a_disk_that_fills_while_images_stream(machine: Installation, pair: Slice) -> None:
    before = picture(machine)
    body = {"name": "full", "delays_ms": {"a": 1500, "b": 1500}, "second_trigger": False}
    transaction = pair.request("POST", "/v1/slices/pair/snapshots", body)["id"]

    def cutting() -> bool:
        return bool(pair.request("GET", f"/v1/transactions/{transaction}")["state"] == "cutting")

    wait_for(cutting, 20, "the cut")
    with _filled(machine, left_mib=30):
        done = pair.wait_for_end(transaction)
    assert done["state"] == "aborted", done
    assert done["failure"]
    _assert_as_it_was(machine, pair, before)
    names = [found["name"] for found in pair.request("GET", "/v1/snapshots")]
    assert "full" not in names


def test_a_vm_that_dies_in_its_cut(machine: Installation, pair: Slice) -> None:
    assert pair.take("good")["state"] == "committed"
    before = picture(machine)
    pids = {vm["name"]: vm["pid"] for vm in pair.request("GET", "/v1/slices/pair")["vms"]}
    body = {"name": "dead", "delays_ms": {"b": 1500}, "second_trigger": False}
    transaction = pair.request("POST", "/v1/slices/pair/snapshots", body)["id"]

    def one_is_cut() -> bool:
        vms = pair.request("GET", f"/v1/transactions/{transaction}")["snapshot"]["vms"]
        return any(vm["cut_at"] > 0 for vm in vms)

    wait_for(one_is_cut, 20, "the first cut")
    os.kill(pids["b"], signal.SIGKILL)
    done = pair.wait_for_end(transaction)
    assert done["state"] == "aborted"
    assert "b" in done["failure"]
    assert picture(machine) == replace(before, processes=before.processes - {pids["b"]})
    view = pair.request("GET", "/v1/slices/pair")
    assert {vm["name"]: vm["state"] for vm in view["vms"]} == {"a": "running", "b": "failed"}
    assert len({vm["port_color"] for vm in view["vms"]}) == 1
    pair.request("POST", "/v1/snapshots/good/restore", {})
    after = picture(machine)
    _assert_as_it_was(machine, pair, replace(before, processes=after.processes))
    machine.ok("snapshot", "delete", "good")


@pytest.mark.faults
def test_a_coordinator_that_dies_in_a_cut(machine: Installation, pair: Slice, topology: Path) -> None:
    """After a restart the snapshot is absent, both VMs run, all colors have advanced."""
    assert pair.take("first")["state"] == "committed"  # a slice that was never cut has fewer rules
    machine.ok("snapshot", "delete", "first")
    before = picture(machine)
    services = {service["name"]: service for service in machine.ok("status")["services"]}
    body = {"name": "lost", "delays_ms": {"b": 800}, "second_trigger": False}
    pair.request("POST", "/v1/slices/pair/snapshots", body)
    time.sleep(0.4)
    os.kill(services["coordinator"]["pid"], signal.SIGKILL)
    outcome = machine.run("up", str(topology))  # starts the coordinator again; the slice is there
    assert "pair" in outcome.err
    with machine.client() as client:
        again = Slice(client, "pair", VMS)
        wait_for(lambda: again.take("after").get("state") == "committed", 60, "a snapshot after the restart")
        assert [found["name"] for found in again.request("GET", "/v1/snapshots")] == ["after"]
        machine.ok("snapshot", "delete", "after")
        _assert_as_it_was(machine, again, before)


def test_a_port_in_use(topology: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with installation("port-in-use", coordinator_port=str(taken.getsockname()[1])) as made:
            _assert_one_line(made, "up", str(topology), tells=str(taken.getsockname()[1]))
            assert picture(made) == Picture(frozenset(), frozenset(), frozenset(), (), frozenset())


@pytest.mark.faults
def test_down_after_everything_was_killed(topology: Path) -> None:
    """Every part and every VM dies at once; `down` finds and removes what is left, and `up` works again."""
    with installation("all-killed") as made:
        made.ok("up", str(topology))
        services = made.ok("status")["services"]
        for pid in [*(service["pid"] for service in services), *picture(made).processes]:
            os.kill(pid, signal.SIGKILL)
        assert made.run("down").code == 0
        left = picture(made)
        assert (left.processes, left.taps, left.bridge_ports, left.rules) == (frozenset(), frozenset(), frozenset(), ())
        assert made.ok("up", str(topology))["state"] == "running"
