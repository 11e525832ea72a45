"""The controller dies in the middle of a cut: traffic goes on, nothing that was held is lost, nothing is undone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mininet_tests.slice_harness import PAIR, Installation, Slice, installation, write_pair_topology

pytestmark = pytest.mark.faults
FINAL = ("committed", "aborted")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, Path]]:
    """An installation with a slice of two VMs, and its topology file."""
    with installation("network-faults") as own:
        topology = write_pair_topology(tmp_path_factory.mktemp("pair"))
        own.ok("up", str(topology))
        yield own, topology


@pytest.fixture
def pair(made: tuple[Installation, Path]) -> Iterator[Slice]:
    """The slice, once its guests talk."""
    with made[0].client() as client:
        running = Slice(client, "pair", PAIR)
        running.wait_until_established()
        yield running


def _kill_controller(own: Installation) -> None:
    (controller,) = (part for part in own.ok("status")["services"] if part["name"] == "controller")
    os.kill(controller["pid"], signal.SIGKILL)


def _mend(own: Installation, topology: Path) -> None:
    """Start what is dead. That the slice is there already, or busy, is no news."""
    outcome = own.run("up", str(topology))
    assert outcome.code in (4, 5) and "starting the controller" in outcome.err, outcome.err


def _assert_sound(running: Slice) -> None:
    for vm, report in running.wait_for_reports(running.offsets(), 2).items():
        for key in ("udp_lost", "udp_duplicates", "udp_reordered", "tcp_dead", "tcp_violations"):
            assert report[key] == 0, f"{vm}: {key} = {report[key]}"


def test_traffic_goes_on_without_a_controller(made: tuple[Installation, Path], pair: Slice) -> None:
    _kill_controller(made[0])
    _assert_sound(pair)
    _mend(*made)
    assert pair.take("after-a-restart")["state"] == "committed"
    _assert_sound(pair)


@pytest.mark.parametrize("after_s", [0.1, 0.7])
def test_a_controller_killed_in_the_middle_of_a_snapshot(
    made: tuple[Installation, Path], pair: Slice, after_s: float
) -> None:
    """One VM cuts at once, the other more than a second later: the controller dies before the first or between them."""
    mending = threading.Thread(target=_mend, args=made)
    body = {"name": f"killed-{after_s}", "delays_ms": {"b": 1200.0}, "second_trigger": False}
    transaction = pair.request("POST", f"/v1/slices/{pair.name}/snapshots", body)
    time.sleep(after_s)
    _kill_controller(made[0])
    mending.start()
    done = pair.wait_for_end(transaction["id"])
    mending.join()
    print(f"\nkilled after {after_s} s: {done['state']} {done['failure']}")
    assert done["state"] in FINAL
    _assert_sound(pair)
    colors = {vm["port_color"] for vm in pair.request("GET", f"/v1/slices/{pair.name}")["vms"]}
    assert len(colors) == 1, "a port was left behind"
    assert pair.take(f"next-{after_s}")["state"] == "committed"
    _assert_sound(pair)
