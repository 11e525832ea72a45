"""Two snapshots of four like guests that run the causality workload, taken by the whole system.

The slice is ``topologies/causality.yaml``, as it stands or with larger guests whose memory is filled
(``store_content``). Everything is real: QEMU, Open vSwitch, agents, coordinator. The second snapshot begins some
seconds after the first was committed. The images are read back from the snapshot server as a restore gets them, and
kept below ``.cache/bench-store``.
"""

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.store_client import ingest_address, opened
from bench.store_content import IMAGES, build_initrd, recipe
from bench.store_guest import CACHE
from mininet_tests.slice_harness import REPOSITORY, Installation, Slice, installation

VMS = ("n1", "n2", "n3", "n4")
BETWEEN_S = 5.0
_READ_AT_A_TIME = 1 << 20
_BOOT_PATIENCE_S = 900.0


@dataclass(frozen=True)
class Taken:
    """Two snapshots of the slice. ``snapshots`` are the coordinator's own figures of each."""

    folder: str
    memory_mib: int
    between_cuts_s: float
    snapshots: tuple[dict[str, Any], dict[str, Any]]

    def images(self, number: int) -> dict[str, Path]:
        """The images of the first (0) or the second (1) snapshot, by VM name."""
        return {vm: Path(self.folder) / f"{number}-{vm}.stream" for vm in VMS}


def taken(memory_mib: int, version: str) -> Taken:
    """The two snapshots, from the cache if they are there. Guests of 96 MiB are those of the topology as it stands."""
    folder = CACHE / f"slice-{memory_mib}-{version}"
    record = folder / "taken.json"
    if not record.exists():
        for old in CACHE.glob(f"slice-{memory_mib}-*"):
            shutil.rmtree(old)
        print(f"  taking two snapshots of four guests of {memory_mib} MiB", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            result = Path(work) / "result"
            result.mkdir()
            topology = _topology(Path(work), memory_mib)
            made = _take(topology, result, memory_mib)
            (result / record.name).write_text(json.dumps(asdict(made)))
            result.rename(folder)
    fields = json.loads(record.read_text())
    return Taken(str(folder), memory_mib, fields["between_cuts_s"], tuple(fields["snapshots"]))


def _topology(folder: Path, memory_mib: int) -> Path:
    """The topology's file, with larger guests if wanted, and absolute paths."""
    text = (REPOSITORY / "topologies" / "causality.yaml").read_text()
    if memory_mib != 96:
        initrd = folder / "guest.initrd"
        build_initrd(initrd, recipe(memory_mib).files)
        filled = recipe(memory_mib, with_random=False).argument("{index}")
        text = text.replace("../.cache/images/causality.initrd", str(initrd))
        text = text.replace("memory_mib: 96", f"memory_mib: {memory_mib}").replace("gv.rate", f"{filled} gv.rate")
    text = text.replace("../.cache/images", str(IMAGES))
    path = folder / "causality.yaml"
    path.write_text(text)
    return path


def _take(topology: Path, folder: Path, memory_mib: int) -> Taken:
    with installation("bench-store") as installed:
        installed.ok("up", str(topology))
        with installed.client() as client:
            running = Slice(client, "causality", VMS)
            _wait_until_established(running)
            snapshots = []
            for number in range(2):
                done = running.take(f"s{number}")
                if done["state"] != "committed":
                    raise SystemExit(f"snapshot {number + 1} was not taken: {done['failure']}")
                snapshots.append(done["snapshot"])
                time.sleep(BETWEEN_S * (1 - number))
            for number, snapshot in enumerate(snapshots):
                for vm in VMS:
                    _fetch(installed, str(snapshot["id"]), folder / f"{number}-{vm}.stream", vm)
            client.delete("/v1/slices/causality").raise_for_status()
    first, second = (min(vm["cut_at"] for vm in snapshot["vms"]) for snapshot in snapshots)
    return Taken(str(folder), memory_mib, second - first, (snapshots[0], snapshots[1]))


def _wait_until_established(running: Slice) -> None:
    """Filled guests begin their workload late, so this is patient."""
    deadline = time.monotonic() + _BOOT_PATIENCE_S
    while True:
        try:
            return running.wait_until_established()
        except AssertionError:
            if time.monotonic() > deadline:
                raise


def _fetch(installed: Installation, snapshot_id: str, path: Path, vm: str) -> None:
    """Write an image to a file, as a restore gets it."""
    services = {service["name"]: service["address"] for service in installed.ok("status")["services"]}
    with httpx.Client(base_url=services["snapshot-server"], trust_env=False) as http:
        address = ingest_address(http)
    with opened(address, {"get": snapshot_id, "vm": vm}) as image, path.open("wb") as file:
        while data := image.recv(_READ_AT_A_TIME):
            file.write(data)
