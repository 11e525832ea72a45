"""Two sites joined by a wide-area link (``topologies/gec9.yaml``): the whole installation, with real guests."""

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from geni_violin.hostagent.ports import dropped_frames
from geni_violin.runtime.processes import Ledger, is_alive

from .link_watch import Crossing, LinkWatch, crossing
from .slice_harness import REPOSITORY, Installation, Slice, installation

VMS = ("n1", "n2", "n3", "n4")
ROUND_TRIP_MS, LOSS = 40.0, 0.01
WATCH_S = 10.0
LEAST_FRAMES = 4000
DEVIATIONS = 4


@pytest.fixture(scope="module")
def made() -> Iterator[Installation]:
    """The installation with the slice of two sites."""
    with installation("wan") as own:
        own.ok("up", str(REPOSITORY / "topologies" / "gec9.yaml"))
        yield own


@pytest.fixture(scope="module")
def gec9(made: Installation) -> Iterator[Slice]:
    """The slice, once its guests talk."""
    with made.client() as client:
        running = Slice(client, "gec9", VMS)
        running.wait_until_established()
        yield running


def _ends(made: Installation) -> dict[str, str]:
    """The device of each switch's end of the link."""
    files = (made.state_dir / "run" / "links").glob("*.json")
    return {end["switch"]: end["tap"] for end in (json.loads(file.read_text()) for file in files)}


def _counted(made: Installation) -> dict[str, dict[str, Any]]:
    """What each switch's end of the link has counted, as its agent tells."""
    services = {service["name"]: service["address"] for service in made.ok("status")["services"]}
    counted = {}
    for host in ("h1", "h2"):
        (end,) = httpx.get(f"{services[f'hostagent-{host}']}/v1/links", trust_env=False).json()
        counted[end["switch"]] = end
    return counted


def test_the_link_is_as_far_and_as_lossy_as_the_file_says(made: Installation, gec9: Slice) -> None:
    """Of the guests' own frames none is reordered, the dice alone lose any, and within four standard deviations one in
    a hundred. The fastest tenth tells how far the link is, the others how busy the machine.
    """
    taps = _ends(made)
    before = _counted(made)
    with LinkWatch(*taps.values()) as watch:
        time.sleep(WATCH_S)
    after = _counted(made)
    there, back = (
        crossing(watch.sent[taps[near]], watch.came[taps[far]]) for near, far in (("s1", "s2"), ("s2", "s1"))
    )
    round_trip_ms = statistics.median(there.took_ms) + statistics.median(back.took_ms)
    print(f"round trip {round_trip_ms:.2f} ms; lost {_share(there)} there, {_share(back)} back; before and after:")
    print(f"{before}\n{after}\ndropped by devices: {[dropped_frames(tap) for tap in taps.values()]}")
    assert min(*there.took_ms, *back.took_ms) >= ROUND_TRIP_MS / 2
    assert sum(statistics.quantiles(way.took_ms, n=10)[0] for way in (there, back)) <= ROUND_TRIP_MS + 2.0
    assert watch.overlooked == 0
    assert [dropped_frames(tap) for tap in taps.values()] == [0, 0]
    for way, switch in ((there, "s1"), (back, "s2")):
        entered, lost = (after[switch][key] - before[switch][key] for key in ("frames_entered", "frames_lost"))
        assert entered >= way.lost + len(way.took_ms) >= LEAST_FRAMES
        assert lost >= way.lost > 0, "frames went that the dice did not take"
        assert abs(lost - entered * LOSS) <= DEVIATIONS * math.sqrt(entered * LOSS * (1 - LOSS))
    _assert_guests_are_well(gec9)


def _share(way: Crossing) -> str:
    frames = way.lost + len(way.took_ms)
    return f"{way.lost} of {frames} frames ({way.lost / frames:.2%})"


def _assert_guests_are_well(gec9: Slice) -> None:
    for vm, report in gec9.wait_for_reports(gec9.offsets(), 1).items():
        assert report["udp_lost"] > 0, f"{vm} lost no datagram: the link is none of this kind"
        for key in ("udp_duplicates", "udp_reordered", "udp_foreign", "tcp_dead", "tcp_violations"):
            assert report[key] == 0, f"{vm}: {key} = {report[key]}"


def test_each_agent_counts_its_end_of_the_link(made: Installation, gec9: Slice) -> None:
    for switch, end in _counted(made).items():
        assert (end["peer_switch"], end["number"]) == ({"s1": "s2", "s2": "s1"}[switch], 0)
        assert 0 < end["frames_lost"] < end["frames_entered"] / 50
        assert end["frames_arrived"] > LEAST_FRAMES
        assert (end["frames_overflowed"], end["frames_missed"], end["frames_refused"]) == (0, 0, 0)


def test_a_snapshot_across_the_wan_is_consistent(gec9: Slice) -> None:
    """Frames are 20 ms under way and some never arrive: the counters never balance, a lifetime ends the old color."""
    for number in (1, 2):
        done = gec9.take(f"w{number}")
        assert done["state"] == "committed", done["failure"]
        assert done["snapshot"]["frames_in_transit"] > 0
        assert any("lifetime" in note for note in done["snapshot"]["notes"]), done["snapshot"]["notes"]
    _assert_guests_are_well(gec9)
    gec9.request("POST", f"/v1/slices/{gec9.name}/fail", {})
    since = gec9.offsets()
    gec9.request("POST", "/v1/snapshots/w2/restore", {})
    gec9.wait_for_reports(since, 4)
    _assert_guests_are_well(gec9)


def test_nothing_of_the_link_is_left_when_its_slice_is_deleted(made: Installation, gec9: Slice) -> None:
    """The last test of the file: the slice is gone afterwards."""
    ledger, taps = Ledger(made.state_dir / "run" / "processes"), _ends(made)
    carriers = [record for record in ledger.all() if record.name.startswith("link:")]
    assert len(carriers) == 2
    made.ok("slice", "delete", gec9.name)
    assert not any(map(is_alive, carriers))
    assert not any(Path(f"/sys/class/net/{tap}").exists() for tap in taps.values())
    assert ledger.all() == []
    assert _ends(made) == {}
