"""``demo``: GEC8's demonstration. A running slice is snapshot, lost, and brought back.

Theory of operation. The demonstration is an installation of its own, in its own state directory, so it meets nobody
else's slices and can be thrown away. Everything goes the way that anybody would go: the parts are started as ``up``
starts them, the rest are requests to the coordinator. What it shows at the end is what the coordinator measured.
However it ends, the slice and the parts are taken down; the logs stay.
"""

import contextlib
import fcntl
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from time import sleep
from typing import Annotated, Any

import typer

from geni_violin.cli.client import SLOW_S, Coordinator, find_coordinator, load_settings, path, understood
from geni_violin.cli.demo_guest import ConsoleReader, GuestReport, compute_on_host, job_of
from geni_violin.cli.doctor import IMAGES, PROJECT
from geni_violin.cli.following import follow_to_the_end
from geni_violin.cli.narration import Narrator
from geni_violin.cli.outcome import complain
from geni_violin.cli.part_commands import bring_up
from geni_violin.cli.printing import Json, print_json, size, slice_table, snapshot_table
from geni_violin.cli.snapshot_commands import begin_snapshot, restore_snapshot
from geni_violin.cli.teardown import take_down
from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, MachineFault
from geni_violin.core.messages import RestoreRequest, SliceView, SnapshotRequest, SnapshotView
from geni_violin.core.model import SliceSpec
from geni_violin.runtime.clock import monotonic_ms
from geni_violin.runtime.settings import Settings

STATE_DIR = Path("/var/lib/geni-violin-demo")
MARKER = "this-is-the-demo"
SILENCE_LIMIT_S = 180.0
"""The program reports every hundredth of its work; a guest that says nothing for so long is stuck."""
_PAUSE_S = 0.3
_TOO_EARLY = (
    "the program was finished before its slice could be killed",
    "give it more work: gv.iterations in topologies/mandelbrot.yaml",
)
Enough = Callable[[GuestReport], bool]


@dataclass(frozen=True)
class Outcome:
    """What the demonstration came to. Times are in milliseconds."""

    equal: bool
    png: str
    snapshot: SnapshotView
    rows: int
    row_at_snapshot: int
    row_when_killed: int
    row_after_restore: int
    restore_ms: float
    demo_ms: float


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the picture goes.")] = Path("demo-output"),
    state_dir: Annotated[Path, typer.Option(metavar="DIR", help="The demonstration's own state.")] = STATE_DIR,
    as_json: Json = False,
) -> None:
    """The GEC8 demonstration, narrated: a running slice is snapshot, lost, and brought back."""
    from geni_violin.topology import read_topology  # noqa: PLC0415

    narrator = Narrator(sys.stderr if as_json else sys.stdout)
    spec = read_topology(PROJECT / "topologies" / "mandelbrot.yaml")
    settings = load_settings(state_dir=state_dir.resolve(), coordinator_port=0, coordinator_url="")
    with _installation(settings, narrator):
        outcome = Demonstration(settings, spec, narrator, output).run()
    if as_json:
        print_json(outcome)
    if not outcome.equal:
        complain(f"the restored program's picture differs from the one computed without VMs; it is {outcome.png}")
        raise typer.Exit(1)
    narrator.heading(f"The restored program's picture is right, byte for byte: {outcome.png}")


@contextlib.contextmanager
def _installation(settings: Settings, narrator: Narrator) -> Iterator[None]:
    """The demonstration's own installation: empty at the start, nothing running at the end, whatever happens."""
    with _alone(settings), _signals({signal.SIGTERM: signal.default_int_handler}):
        take_down(settings, narrator.say)
        _throw_away(settings)
        try:
            yield
        finally:
            _end(settings, narrator)


@contextlib.contextmanager
def _signals(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Other handlers of signals, for the length of the block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(settings: Settings, narrator: Narrator) -> None:
    """Take everything down, in one go whatever signals come; a trouble with that does not hide an earlier one."""
    under_way = sys.exc_info()[1]
    narrator.heading("Taking everything down")
    try:
        with _signals({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}):
            take_down(settings, narrator.say)
        _throw_away(settings, "log")
    except GeniViolinError as error:
        if under_way is None:
            raise
        narrator.say(f"not all could be taken down: {error}")


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """No other demonstration uses the folder meanwhile.

    :raise Conflict: one does.
    :raise InvalidInput: it is the folder of a real installation, whose snapshots a demonstration must not delete.
    :raise MachineFault: the folder cannot be written.
    """
    folder = settings.state_dir
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise InvalidInput(f"{folder} is not a demonstration's", "choose an empty folder by --state-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker = (folder / MARKER).open("w")
    except OSError as error:
        raise MachineFault(
            f"cannot write to {folder}: {error.strerror}", "run as root, or choose --state-dir"
        ) from error
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another demonstration runs in {folder}", "wait for it, or choose --state-dir") from None
        yield


def _throw_away(settings: Settings, *kept: str) -> None:
    for child in settings.state_dir.iterdir():
        if child.name in (MARKER, *kept):
            continue
        shutil.rmtree(child) if child.is_dir() else child.unlink()


@dataclass
class Demonstration:
    """The six steps."""

    settings: Settings
    spec: SliceSpec
    narrator: Narrator
    output: Path
    _report: GuestReport = field(default_factory=GuestReport)

    def run(self) -> Outcome:
        """All of it.

        :raise GeniViolinError: a step does not work; the message says which and why.
        """
        begun_ms = monotonic_ms()
        self._create_slice()
        coordinator = Coordinator(find_coordinator(self.settings))
        try:
            self._watch_half(coordinator)
            row_at_snapshot = self._report.done
            snapshot = self._take_snapshot(coordinator)
            row_when_killed = self._go_on_and_fail(coordinator)
            restore_ms, row_after_restore, picture = self._restore(coordinator, snapshot)
        finally:
            coordinator.close()
        equal, png = self._compare(picture)
        rows, demo_ms = self._report.rows, monotonic_ms() - begun_ms
        outcome = Outcome(
            equal, png, snapshot, rows, row_at_snapshot, row_when_killed, row_after_restore, restore_ms, demo_ms
        )
        self._tell(outcome)
        return outcome

    @property
    def _first_vm(self) -> str:
        return self.spec.vms[0].name

    def _create_slice(self) -> None:
        hosts, vms = len(self.spec.hosts), len(self.spec.vms)
        self.narrator.heading(f"1. A slice of {vms} QEMU VMs on {hosts} hosts, wired by OpenFlow switches")
        view = bring_up(self.settings, self.spec, self.narrator.say)
        self.narrator.table(slice_table(view))

    def _watch_half(self, coordinator: Coordinator) -> None:
        width, height, iterations = job_of(self.spec.vms[0])
        self.narrator.heading("2. An MPI program in it computes a Mandelbrot picture")
        self.narrator.say(
            f"mpiexec, {len(self.spec.vms)} VMs, {width}x{height} points of up to {iterations} iterations"
        )
        reader = ConsoleReader(coordinator, self.spec.name, self._first_vm)
        self._watch(reader, "rows computed", lambda report: report.rows > 0 and 2 * report.done >= report.rows)

    def _watch(self, reader: ConsoleReader, what: str, enough: Enough) -> None:
        """Follow the program until ``enough`` says so.

        :raise MachineFault: the program fails, is stuck, or is finished too early.
        """
        heard_ms = monotonic_ms()
        with self.narrator.bar(what) as move:
            while not enough(self._report):
                if self._report.picture is not None:
                    raise MachineFault(*_TOO_EARLY)
                lines = reader.lines()
                for text in lines:
                    self._report.take(text)
                move(self._report.done, self._report.rows)
                heard_ms = monotonic_ms() if lines else heard_ms
                if monotonic_ms() - heard_ms > SILENCE_LIMIT_S * 1000:
                    raise MachineFault(
                        f"VM {self._first_vm} has said nothing for {SILENCE_LIMIT_S:.0f} s",
                        f"see the logs in {self.settings.log_dir}",
                    )
                sleep(_PAUSE_S)

    def _take_snapshot(self, coordinator: Coordinator) -> SnapshotView:
        request = SnapshotRequest(name="half-way")
        self.narrator.heading("3. Half-way, while frames fly: one REST call snapshots the slice")
        body = json.dumps({"name": request.name})
        url = f"{coordinator.url}{path('slices', self.spec.name, 'snapshots')}"
        self.narrator.say(f"curl -X POST {url} -H 'content-type: application/json' -d '{body}'")
        snapshot = follow_to_the_end(coordinator, begin_snapshot(coordinator, self.spec.name, request), quiet=False)
        images = size(sum(vm.received_bytes for vm in snapshot.vms))
        self.narrator.say(f"committed: {len(snapshot.vms)} images, {images}, after {snapshot.total_ms / 1000:.1f} s")
        return snapshot

    def _go_on_and_fail(self, coordinator: Coordinator) -> int:
        """The program goes on; then its VMs are killed. Gives back the row that it had come to."""
        reader = ConsoleReader(coordinator, self.spec.name, self._first_vm)
        self._report = GuestReport()
        while lines := reader.lines():
            for text in lines:
                self._report.take(text)
        row = self._report.done
        self.narrator.say(f"the program goes on: it was at row {row} when the snapshot was committed")
        self._watch(reader, "rows computed", lambda report: report.done > row)
        if self._report.done == self._report.rows:
            raise MachineFault(*_TOO_EARLY)
        self.narrator.heading("4. All VMs are killed with SIGKILL")
        answer = coordinator.request("POST", path("slices", self.spec.name, "fail"), {"vm": ""}, timeout_s=SLOW_S)
        view = understood(SliceView, answer)
        self.narrator.say(f"at row {self._report.done} of {self._report.rows}; the slice is {view.state}")
        self.narrator.table(slice_table(view))
        return self._report.done

    def _restore(self, coordinator: Coordinator, snapshot: SnapshotView) -> tuple[float, int, bytes]:
        """How long the restore took, the first row that the program then reported, and its picture."""
        self.narrator.heading("5. The slice is restored; the program finishes by itself")
        reader = ConsoleReader(coordinator, self.spec.name, self._first_vm)
        reader.skip()
        begun_ms = monotonic_ms()
        view = restore_snapshot(coordinator, snapshot.id, RestoreRequest())
        restore_ms = monotonic_ms() - begun_ms
        self.narrator.say(f"the slice is {view.state} again after {restore_ms / 1000:.1f} s")
        self._report = GuestReport()
        self._watch(reader, "rows computed", lambda report: report.done > 0)
        row = self._report.done
        self.narrator.say(f"the program goes on at row {row}, as if nothing had happened")
        self._watch(reader, "rows computed", _finished)
        assert self._report.picture is not None
        return restore_ms, row, self._report.picture

    def _compare(self, picture: bytes) -> tuple[bool, str]:
        """Whether the picture is the one that the program computes without any VM; and the PNG's path."""
        self.narrator.say(
            "the picture came over the console of VM n1; now the same program on this machine, without VMs"
        )
        reference = compute_on_host(IMAGES / "mandelbrot", job_of(self.spec.vms[0]))
        equal = picture == reference
        png = (self.output / "mandelbrot.png").resolve()
        write_png(picture, png)
        differing = sum(a != b for a, b in zip(picture, reference, strict=False)) + abs(len(picture) - len(reference))
        said = "equal, byte for byte" if equal else f"DIFFERENT: {differing} bytes of {len(reference)} differ"
        self.narrator.say(f"{len(picture)} bytes from the slice, {len(reference)} from this machine: {said}")
        return equal, str(png)

    def _tell(self, outcome: Outcome) -> None:
        snapshot = outcome.snapshot
        self.narrator.heading("6. What it cost")
        self.narrator.table(snapshot_table(snapshot))
        self.narrator.say(f"cut skew {snapshot.skew_ms:.1f} ms, snapshot {snapshot.total_ms / 1000:.1f} s in total")
        self.narrator.say(
            f"restore {outcome.restore_ms / 1000:.1f} s, whole demonstration {outcome.demo_ms / 1000:.0f} s;"
            f" frames dropped at the cut: {snapshot.frames_dropped}"
        )
        for text in snapshot.notes:
            self.narrator.say(f"note: {text}")


def _finished(report: GuestReport) -> bool:
    return report.picture is not None


def write_png(picture: bytes, png: Path) -> None:
    """A picture in one of Netpbm's formats, as PNG.

    :raise MachineFault: it cannot be written.
    """
    from PIL import Image  # noqa: PLC0415

    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(BytesIO(picture)) as image:
            image.save(png, "PNG")
    except OSError as error:
        raise MachineFault(f"the picture cannot be written to {png}: {error}") from error
