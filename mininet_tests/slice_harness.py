"""A whole installation for the tests: real parts, real QEMU, real Open vSwitch, driven as a person drives it.

Each installation has a state directory of its own with a fixed name, so that a test run finds and removes what a
crashed one left.
"""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

STATE_DIR_PREFIX = "/var/tmp/geni-violin-test-"
REPOSITORY = Path(__file__).parent.parent
FINAL = ("committed", "aborted")
PAIR = ("a", "b")
PAIR_TOPOLOGY = """
name: pair
image:
  kernel: {images}/vmlinuz
  initrd: {images}/causality.initrd
  append: "console=ttyS0 quiet loglevel=1 tsc=unstable no_timer_check rootfstype=ramfs ipv6.disable=1
    gv.vm={{vm}} gv.index={{index}} gv.address={{address}} gv.peers=10.9.0.1,10.9.0.2
    gv.rate=200 gv.moves=20 gv.tokens=1000"
  memory_mib: 96
vms:
  - {{name: a, address: 10.9.0.1/24}}
  - {{name: b, address: 10.9.0.2/24}}
"""
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


class Installation:
    """One installation of GENI-VIOLIN on this machine."""

    def __init__(self, name: str, **settings: str) -> None:
        self.state_dir = Path(f"{STATE_DIR_PREFIX}{name}")
        wanted = {f"GENI_VIOLIN_{key.upper()}": value for key, value in settings.items()}
        self.environment = {
            **os.environ,
            "GENI_VIOLIN_STATE_DIR": str(self.state_dir),
            "GENI_VIOLIN_COORDINATOR_PORT": "0",
            **wanted,
        }

    def run(self, *arguments: str, timeout_s: float = 180.0) -> Outcome:
        """Run a command to its end."""
        command = [sys.executable, "-m", "geni_violin.cli", *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str) -> Any:
        """Run a command that must succeed; its JSON."""
        outcome = self.run(*arguments, "--json")
        assert outcome.code == 0, f"{arguments}: {outcome.err}"
        return json.loads(outcome.out)

    def remove(self) -> None:
        """Take everything down and forget it."""
        outcome = self.run("down")
        assert outcome.code == 0, outcome.err
        shutil.rmtree(self.state_dir, ignore_errors=True)

    def client(self) -> httpx.Client:
        """A client of the coordinator."""
        services = {service["name"]: service for service in self.ok("status")["services"]}
        return httpx.Client(base_url=services["coordinator"]["address"], timeout=120.0, trust_env=False)

    def log(self, part: str) -> str:
        """A part's log."""
        return (self.state_dir / "log" / f"{part}.log").read_text(errors="replace")


@contextmanager
def installation(name: str, **settings: str) -> Iterator[Installation]:
    """An installation that is clean at the start and gone at the end."""
    made = Installation(name, **settings)
    made.remove()
    made.state_dir.mkdir(parents=True)
    with (made.state_dir / "in-use").open("w") as in_use:  # scripts/clean-leftovers leaves it alone meanwhile
        fcntl.flock(in_use, fcntl.LOCK_EX)
        try:
            yield made
        finally:
            made.remove()


def write_pair_topology(folder: Path) -> Path:
    """The topology file of a small slice named "pair": two VMs on one host that run the causality workload."""
    path = folder / "pair.yaml"
    path.write_text(PAIR_TOPOLOGY.format(images=REPOSITORY / ".cache" / "images"))
    return path


class Slice:
    """A running slice, over REST."""

    def __init__(self, client: httpx.Client, name: str, vms: tuple[str, ...]) -> None:
        self.client, self.name, self.vms = client, name, vms

    def request(self, method: str, path: str, body: Any = None, expect: int | None = None) -> Any:
        """A request to the coordinator; any 2xx unless a status is expected."""
        response = self.client.request(method, path, json=body)
        fine = response.is_success if expect is None else response.status_code == expect
        assert fine, f"{method} {path}: {response.status_code} {response.text}"
        return response.json()

    def take(self, name: str, **options: Any) -> dict[str, Any]:
        """Take a snapshot and wait for its end; the transaction."""
        body = {"name": name, **options}
        transaction = self.request("POST", f"/v1/slices/{self.name}/snapshots", body)
        return self.wait_for_end(transaction["id"])

    def wait_for_end(self, transaction_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The transaction when it is over."""

        def over() -> dict[str, Any] | None:
            found: dict[str, Any] = self.request("GET", f"/v1/transactions/{transaction_id}")
            return found if found["state"] in FINAL else None

        return wait_for(over, timeout_s, f"the end of transaction {transaction_id}")

    def spread(self, rng: random.Random, widest_ms: float) -> dict[str, float]:
        """Delays that spread the cuts over ``widest_ms``: one VM first, one last, the others between."""
        delays = [0.0, widest_ms, *(rng.uniform(0, widest_ms) for _ in self.vms[2:])]
        rng.shuffle(delays)
        return dict(zip(self.vms, delays, strict=True))

    def offsets(self) -> dict[str, int]:
        """How long each VM's console log is now."""
        return {vm: self._console(vm, 0)[1] for vm in self.vms}

    def _console(self, vm: str, offset: int) -> tuple[str, int]:
        text, path = "", f"/v1/slices/{self.name}/vms/{vm}/console?offset="
        while True:
            piece = self.request("GET", f"{path}{offset}")
            if not piece["text"]:
                return text, offset
            text, offset = text + piece["text"], piece["next_offset"]

    def reports(self, vm: str, since: int, kind: str = "GV-STAT") -> list[dict[str, Any]]:
        """What a guest's workload has reported since a place in its console log."""
        lines = self._console(vm, since)[0].split("\n")[:-1]
        found = []
        for line in lines:
            head, _, data = line.strip().partition(" ")
            if head == kind:
                found.append(json.loads(data))
        return found

    def wait_until_established(self) -> None:
        """Return when every guest's workload has its TCP connection to every other."""

        def established() -> bool:
            found = [self.reports(vm, 0) for vm in self.vms]
            return all(reports and reports[-1]["tcp_established"] == len(self.vms) - 1 for reports in found)

        wait_for(established, 90, "all TCP connections")

    def wait_for_reports(self, since: dict[str, int], count: int, timeout_s: float = 60.0) -> dict[str, dict[str, Any]]:
        """The latest report of each VM, once each has made at least ``count`` since then."""

        def enough() -> dict[str, dict[str, Any]] | None:
            reports = {vm: self.reports(vm, since[vm]) for vm in self.vms}
            return {vm: found[-1] for vm, found in reports.items()} if _all_have(reports, count) else None

        return wait_for(enough, timeout_s, f"{count} reports of each VM")


def _all_have(reports: dict[str, list[dict[str, Any]]], count: int) -> bool:
    return all(len(found) >= count for found in reports.values())


def wait_for(condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """The condition's value once it is truthy."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")
