"""The commands against a coordinator on a real socket: JSON as promised, exit codes, one line of error."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_coordinator import FRAMES, SNAPSHOT, Script, serving

from geni_violin.cli import snapshot_commands
from geni_violin.cli.app import app
from geni_violin.cli.outcome import run

SNAPSHOT_KEYS = {
    "name", "id", "slice", "state", "created_at", "strategy", "network", "skew_ms", "total_ms", "frames_held",
    "frames_dropped", "frames_in_transit", "vms",
}  # fmt: skip
SNAPSHOT_VM_KEYS = {"name", "host", "cut_at", "downtime_ms", "received_bytes", "stored_bytes", "memory_bytes"}
SLICE_VM_KEYS = {"name", "host", "state", "pid", "port_color"}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed."""
        return json.loads(self.out)


Command = Callable[..., Outcome]


@pytest.fixture
def script() -> Script:
    """How the fake coordinator behaves."""
    return Script()


@pytest.fixture
def command(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Runs a command against the fake coordinator."""
    monkeypatch.setenv("GENI_VIOLIN_STATE_DIR", str(tmp_path / "state"))

    def run_it(*arguments: str) -> Outcome:
        code = run(app, arguments)
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    with serving(script) as url:
        monkeypatch.setenv("GENI_VIOLIN_COORDINATOR_URL", url)
        yield run_it


def assert_slice(value: dict[str, Any]) -> None:
    """It has the keys of a slice."""
    assert {"name", "state", "epoch", "vms"} <= value.keys()
    assert all(vm.keys() >= SLICE_VM_KEYS for vm in value["vms"])


def assert_snapshot(value: dict[str, Any]) -> None:
    """It has the keys of a snapshot."""
    assert value.keys() >= SNAPSHOT_KEYS
    assert all(vm.keys() >= SNAPSHOT_VM_KEYS for vm in value["vms"])


def assert_error(outcome: Outcome, code: int, text: str) -> None:
    """It ended with that code and one line that says so."""
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert text in outcome.err


def test_slices_as_json(command: Command) -> None:
    listed, shown = command("slice", "list", "--json"), command("slice", "show", "net", "--json")
    assert (listed.code, shown.code) == (0, 0)
    assert_slice(shown.json)
    assert listed.json == [shown.json]


def test_slices_as_tables(command: Command) -> None:
    assert command("slice", "list").out.splitlines() == ["SLICE  STATE    EPOCH  VMS", "net    running      1    2"]
    shown = command("slice", "show", "net").out.splitlines()
    assert shown[0] == "slice net: running, epoch 1, VLAN 7"
    assert shown[2].split() == ["n1", "h1", "running", "4001", "1", "10.9.0.1/24"]


def test_fail_one_vm_or_all(command: Command, script: Script) -> None:
    assert command("slice", "fail", "net", "--vm", "n2", "--json").json["state"] == "failed"
    command("slice", "fail", "net")
    assert script.asked == [("POST /v1/slices/net/fail", {"vm": "n2"}), ("POST /v1/slices/net/fail", {"vm": ""})]


def test_delete_a_slice(command: Command, script: Script) -> None:
    assert command("slice", "delete", "net", "--json").json == {"deleted": "net"}
    assert script.asked == [("DELETE /v1/slices/net", None)]


@pytest.mark.parametrize("arguments", [("slice", "show"), ("slice", "delete"), ("snapshot", "take")])
def test_an_unknown_slice(command: Command, arguments: tuple[str, ...]) -> None:
    assert_error(command(*arguments, "nope"), 3, "there is no slice named 'nope'; geni-violin slice list")


def test_a_name_is_no_path(command: Command, script: Script) -> None:
    assert command("slice", "show", "../snapshots").code != 0
    assert all("/v1/snapshots" not in asked for asked, _body in script.asked)


@pytest.mark.parametrize("events", ["whole", "broken", "refused"])
def test_take_waits_until_the_snapshot_is_committed(command: Command, script: Script, events: str) -> None:
    script.events = events
    outcome = command("snapshot", "take", "net", "--name", "half", "--json")
    assert outcome.code == 0, outcome.err
    assert_snapshot(outcome.json)
    assert outcome.json["state"] == "committed"
    asked, body = script.asked[0]
    assert asked == "POST /v1/slices/net/snapshots"
    assert (body["name"], body["strategy"], body["network"], body["coordination"]) == (
        "half", "background", "hold", "color",
    )  # fmt: skip


def test_take_tells_each_state_where_there_is_no_terminal(command: Command) -> None:
    outcome = command("snapshot", "take", "net")
    assert [text.split(": ")[1] for text in outcome.err.splitlines()] == [
        "preparing", "armed", "cutting", "streaming", "committing", "committed",
    ]  # fmt: skip
    assert "cut skew 12.2 ms" in outcome.out
    assert "\x1b" not in outcome.out + outcome.err


def test_take_without_waiting(command: Command) -> None:
    assert command("snapshot", "take", "net", "--no-wait").out == "t1\n"
    assert command("snapshot", "take", "net", "--no-wait", "--json").json["id"] == "t1"


def test_an_aborted_snapshot_is_an_error_with_its_reason(command: Command, script: Script) -> None:
    script.end, script.failure = "aborted", "VM n2 died during its cut"
    assert_error(
        command("snapshot", "take", "net", "--json"), 8, "the snapshot of net was aborted: VM n2 died during its cut"
    )


def test_a_second_snapshot_at_a_time(command: Command, script: Script) -> None:
    script.busy = True
    assert_error(command("snapshot", "take", "net"), 5, "a snapshot of 'net' is under way already; wait")


def test_none_is_a_loud_warning(command: Command, script: Script) -> None:
    outcome = command("snapshot", "take", "net", "--coordination", "none", "--json")
    assert outcome.code == 0
    assert "NOT CONSISTENT" in outcome.err
    assert_snapshot(outcome.json)
    assert script.asked[0][1]["coordination"] == "none"


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--strategy", "magic", "--strategy cannot be 'magic'; expected background or precopy or stop"),
        ("--network", "lose", "--network cannot be 'lose'; expected hold or drop"),
        ("--coordination", "barrier", "--coordination barrier comes in a later release; expected color or none"),
    ],
)
def test_options_of_take_that_cannot_be(command: Command, script: Script, option: str, value: str, text: str) -> None:
    assert_error(command("snapshot", "take", "net", option, value), 2, text)
    assert script.asked == []


def test_snapshots_as_json(command: Command, script: Script) -> None:
    listed, shown = command("snapshot", "list", "net", "--json"), command("snapshot", "show", "half", "--json")
    assert_snapshot(shown.json)
    assert listed.json == [shown.json]
    assert command("snapshot", "list", "other", "--json").json == []
    assert script.asked[0][0] == "GET /v1/snapshots?slice=net"


def test_snapshots_as_tables(command: Command) -> None:
    assert command("snapshot", "list").out.splitlines()[1].split() == [
        "half", "net", "2026-11-20", "11:56:53", "background", "hold", "2.5", "12.2", "40", "3", "3", "180.0", "MiB",
    ]  # fmt: skip
    shown = command("snapshot", "show", "half").out
    assert "; frames held 40, dropped 3, in transit 3\n" in shown
    assert "note: the old color was waited for by time" in shown
    assert shown.splitlines()[-1].split() == [
        "n2", "h1", "background", "2.5", "14.3", "20", "2", "90.0", "MiB", "128.0", "MiB",
    ]  # fmt: skip
    assert max(map(len, shown.splitlines()[4:])) <= 80


@pytest.mark.parametrize("policy", ["hold", "drop"])
def test_take_with_a_network_policy(command: Command, script: Script, policy: str) -> None:
    assert command("snapshot", "take", "net", "--network", policy, "--no-wait").code == 0
    assert script.asked[0][1]["network"] == policy


def test_frames_as_json_and_as_a_table(command: Command) -> None:
    assert command("snapshot", "frames", "half", "--json").json == [
        {"vm": "n1", "frames": 1, "frame_bytes": 98, "late_frames": 0, "undecided_frames": 0, "note": ""},
        {"vm": "n2", "frames": 2, "frame_bytes": 140, "late_frames": 1, "undecided_frames": 0, "note": "n2: undecided"},
    ]
    assert command("snapshot", "frames", "half").out.splitlines() == [
        "snapshot half: 3 frames in transit at the cut, 238 bytes; a restore replays them",
        "VM  FRAMES  BYTES  HELD AT SENDERS",
        "n1       1     98                0",
        "n2       2    140                1",
        "note: n2: undecided",
    ]
    assert_error(command("snapshot", "frames", "none"), 3, "no snapshot named 'none'")


def test_frames_for_wireshark(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "half.pcap"
    file.write_text("what was there before")
    outcome = command("snapshot", "frames", "half", "--pcap", str(file))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == f"written to {file}"
    assert file.read_bytes() == FRAMES
    assert [one["frames"] for one in command("snapshot", "frames", "half", "--pcap", str(file), "--json").json] == [
        1,
        2,
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["half.pcap"]


def test_frames_into_a_pipe(command: Command, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        assert command("snapshot", "frames", "half", "--pcap", str(pipe)).code == 0
        assert reader.communicate(timeout=30)[0] == FRAMES
    assert pipe.is_fifo()


def test_frames_that_cannot_be_written(command: Command, script: Script, tmp_path: Path) -> None:
    missing, kept = tmp_path / "none" / "half.pcap", tmp_path / "kept.pcap"
    assert_error(
        command("snapshot", "frames", "half", "--pcap", str(missing)), 6, f"cannot write {missing}: No such file"
    )
    assert_error(
        command("snapshot", "frames", "half", "--pcap", str(tmp_path)), 6, f"cannot write {tmp_path}: Is a dir"
    )
    assert_error(
        command("snapshot", "frames", "half", "--pcap", "/dev/full"), 7, "cannot write /dev/full: No space left"
    )
    kept.write_text("kept")
    script.damaged = True
    assert_error(command("snapshot", "frames", "half", "--pcap", str(kept)), 6, "the channel state of VM n2 is damaged")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept.pcap", "kept")]


def test_a_full_disk_leaves_no_half_file(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        path.with_name(path.name + ".partial").write_bytes(data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot_commands, "write_atomically", full)
    file = tmp_path / "half.pcap"
    assert_error(command("snapshot", "frames", "half", "--pcap", str(file)), 7, f"cannot write {file}: No space left")
    assert list(tmp_path.iterdir()) == []


def test_frames_of_a_snapshot_that_recorded_none(command: Command, script: Script, tmp_path: Path) -> None:
    script.channels = ()
    assert command("snapshot", "frames", "half", "--json").json == []
    assert command("snapshot", "frames", "half").out == (
        "snapshot half has no record of frames in transit; a restore replays none\n"
    )
    file = tmp_path / "half.pcap"
    assert_error(
        command("snapshot", "frames", "half", "--pcap", str(file)), 3, "has no frames to write; frames in tran"
    )
    assert not file.exists()


def test_restore(command: Command, script: Script) -> None:
    assert_slice(command("restore", "half", "--as", "copy", "--paused", "--json").json)
    assert script.asked == [("POST /v1/snapshots/half/restore", {"as_slice": "copy", "paused": True})]
    assert_error(command("restore", "none"), 3, "no snapshot named 'none'")


def test_delete_a_snapshot(command: Command) -> None:
    assert command("snapshot", "delete", SNAPSHOT.name).code == 0
    assert_error(command("snapshot", "delete", "none"), 3, "no snapshot named 'none'")


def test_console_is_printed_whole(command: Command, script: Script) -> None:
    assert command("console", "net", "n1").out == script.console
    assert command("console", "net", "n1", "--json").json == {"text": script.console, "next_offset": 25}


def test_no_coordinator(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENI_VIOLIN_COORDINATOR_URL")
    assert_error(command("slice", "list"), 8, "no coordinator runs here; start it with geni-violin up TOPOLOGY")


def test_a_coordinator_that_does_not_answer(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENI_VIOLIN_COORDINATOR_URL", "http://127.0.0.1:1")
    assert_error(command("slice", "list"), 8, "the coordinator at http://127.0.0.1:1 does not answer")


def test_an_address_that_is_none(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENI_VIOLIN_COORDINATOR_URL", "nonsense")
    assert command("slice", "list").code in (2, 8)


def test_a_setting_that_does_not_fit(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENI_VIOLIN_COORDINATOR_PORT", "many")
    assert_error(command("slice", "list"), 2, "the environment variable GENI_VIOLIN_COORDINATOR_PORT is 'many'")


@pytest.mark.parametrize("arguments", [("slice", "shw"), ("bogus",), ("snapshot", "take"), ("status", "--bogus")])
def test_wrong_arguments(command: Command, arguments: tuple[str, ...]) -> None:
    assert_error(command(*arguments), 2, "--help")


def test_a_defect_is_one_line_and_a_traceback_in_a_file(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state" / "log").mkdir(parents=True)

    def broken(_self: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("geni_violin.cli.client.Coordinator.slices", broken)
    assert_error(command("slice", "list"), 70, "ZeroDivisionError: by nought; this is a defect of geni-violin")
    assert "Traceback" in (tmp_path / "state" / "log" / "geni-violin-command.log").read_text()


def test_up_refuses_a_bad_file_before_it_starts_anything(command: Command, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: a\nvms:\n  - {name: n1, address: ten}\n")
    assert_error(command("up", str(bad)), 2, f"{bad}:3: vms[1].address 'ten' is not an address; expected")
    assert_error(command("up", str(tmp_path / "none.yaml")), 2, "cannot be read: No such file")
    assert not (tmp_path / "state").exists()


def test_up_refuses_a_missing_kernel_and_a_bad_name(command: Command, tmp_path: Path) -> None:
    good = tmp_path / "net.yaml"
    good.write_text("name: a\nimage: {kernel: k, initrd: i}\nvms:\n  - {name: n1, address: 10.0.0.1/8}\n")
    assert_error(command("up", str(good)), 6, "net.yaml:2: the kernel")
    for name in ("k", "i"):
        (tmp_path / name).touch()
    assert_error(command("up", str(good), "--name", "A B"), 2, "--name 'A B' is not a name; expected 1 to 31 of a-z")
    assert not (tmp_path / "state").exists()


def _heed_ctrl_c() -> None:
    """A shell has what it runs in the background ignore Ctrl-C, and that is inherited: the tests may run so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_names_the_snapshot_that_goes_on(script: Script, command: Command) -> None:
    script.events = "endless"
    child = subprocess.Popen(
        [sys.executable, "-m", "geni_violin.cli", "snapshot", "take", "net"],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_ctrl_c,  # noqa: PLW1509  (it does nothing that a thread could hold a lock for)
    )
    deadline = time.monotonic() + 30
    while not any("/events" in asked for asked, _body in script.asked) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: the snapshot goes on by itself as transaction t1"
    assert "Traceback" not in err


def test_a_reader_that_goes_away_ends_the_command_quietly(script: Script, command: Command) -> None:
    script.console = "x" * 6000
    line = f"{sys.executable} -m geni_violin.cli console net n1 | head -c 5; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "xxxxx1\n"
    assert done.stderr == ""
