"""What the coordinator must not forget."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_harness import make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from geni_violin.coordinator.journal import Journal, SliceRecord, TransactionRecord
from geni_violin.core.errors import AlreadyExists, MachineFault, NotFound
from geni_violin.core.messages import (
    ChannelSummary,
    CutPromise,
    CutReport,
    EdgeReport,
    ImageStatus,
    SnapshotRequest,
    StreamReport,
)
from geni_violin.core.model import MAX_VLAN_ID, EdgePort, NetworkSlice, SwitchLink
from geni_violin.core.transaction import FINAL, Options, Phase, TransactionState
from geni_violin.core.transaction_events import ArmVm, ColorRetired, CutVm
from geni_violin.runtime.wire import decode, encode

SPEC = make_spec()


def _slice(name: str = "lab", vlan_id: int = 7, epoch: int = 0) -> SliceRecord:
    ports = tuple(EdgePort(vm.name, 2**63 + index, index, vm.mac, epoch) for index, vm in enumerate(SPEC.vms, 1))
    spec = replace(SPEC, name=name)
    return SliceRecord(spec, NetworkSlice(name, vlan_id, ports, (SwitchLink(1, 2, 2**63, 4),)), epoch)


def _transaction(phase: Phase, *, network_advanced: bool = True, coordination: str = "color") -> TransactionRecord:
    options = Options(tuple(vm.name for vm in SPEC.vms), 1, coordination, delays_ms={"n1": 1.5})
    state = TransactionState(options, 12.25, phase, network_advanced=network_advanced)
    return TransactionRecord("t1", "first", SPEC, SnapshotRequest(name="first"), 1e9 + 1 / 3, state)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "coordinator.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    opened = Journal(path)
    yield opened
    opened.close()


def test_everything_is_there_after_opening_it_again(path: Path, journal: Journal) -> None:
    journal.put_host("h1", "http://a")
    journal.put_host("h1", "http://b")
    journal.add_slice(_slice())
    journal.save_slice(_slice("other", 8))
    journal.save_transaction(_transaction(Phase.STREAMING))
    again = Journal(path)  # beside the first, as after a crash: nothing was closed
    assert again.hosts() == {"h1": "http://b"}
    assert again.slices() == [_slice(), _slice("other", 8)]
    assert again.transaction("t1") == _transaction(Phase.STREAMING)
    again.delete_slice("other")
    again.close()
    assert [record.name for record in journal.slices()] == ["lab"]


def test_every_write_is_synced(path: Path, journal: Journal) -> None:
    with journal._engine.connect() as connection:
        pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("synchronous", "journal_mode")]
    assert pragmas == [2, "wal"]


def test_names(journal: Journal) -> None:
    journal.add_slice(_slice())
    with pytest.raises(AlreadyExists, match="'lab'"):
        journal.add_slice(_slice())
    for ask in (journal.slice, journal.transaction):
        with pytest.raises(NotFound, match="'nothing'"):
            ask("nothing")
    journal.delete_slice("nothing")


def test_vlan_ids_go_round_and_leave_out_those_in_use(journal: Journal) -> None:
    assert [journal.next_vlan_id() for _ in range(3)] == [1, 2, 3]
    journal.add_slice(_slice("a", 4))
    journal.add_slice(_slice("b", 6))
    journal.add_slice(_slice("c", 1))
    assert [journal.next_vlan_id() for _ in range(3)] == [5, 7, 8]
    _set_counter(journal, MAX_VLAN_ID - 1)
    assert [journal.next_vlan_id() for _ in range(3)] == [MAX_VLAN_ID, 2, 3]


def test_a_vlan_id_that_was_given_out_is_remembered_without_a_slice(path: Path, journal: Journal) -> None:
    """R3: also the number of a slice that never came to be, or was deleted, comes again only after all others."""
    given_out = journal.next_vlan_id()
    again = Journal(path)
    assert again.next_vlan_id() == given_out + 1
    again.close()


def test_vlan_ids_for_many_at_once_all_differ(journal: Journal) -> None:
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.extend(journal.next_vlan_id() for _ in range(5))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(1, 31))


def test_no_vlan_id_left(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [_slice(f"s{vlan_id}", vlan_id) for vlan_id in range(1, MAX_VLAN_ID + 1)]
    monkeypatch.setattr(journal, "slices", lambda: every)
    with pytest.raises(AlreadyExists, match="all VLAN IDs are in use"):
        journal.next_vlan_id()


def _set_counter(journal: Journal, value: int) -> None:
    with journal._engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE counters SET value = {value} WHERE name = 'vlan_id'")


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("network_advanced", [False, True])
@pytest.mark.parametrize("coordination", ["color", "none"])
def test_the_epoch_advances_exactly_with_the_end_of_a_colored_transaction_that_cut_or_had_to_move_the_network_on(
    journal: Journal, phase: Phase, network_advanced: bool, coordination: str
) -> None:
    journal.add_slice(_slice())
    journal.save_transaction(_transaction(phase, network_advanced=network_advanced, coordination=coordination))
    over = phase is Phase.COMMITTED or (phase is Phase.ABORTED and network_advanced)
    advanced = over and coordination == "color"
    assert journal.slice("lab").epoch == (1 if advanced else 0)
    assert [record.id for record in journal.unfinished()] == ([] if phase in FINAL else ["t1"])


def test_the_epoch_never_goes_back_and_needs_its_slice(journal: Journal) -> None:
    journal.save_transaction(_transaction(Phase.ABORTED))  # its slice is deleted
    journal.add_slice(_slice(epoch=5))
    journal.save_transaction(_transaction(Phase.COMMITTED))
    assert journal.slice("lab").epoch == 5


def test_a_database_that_cannot_be_written_is_told_and_nothing_is_changed(path: Path, journal: Journal) -> None:
    journal.add_slice(_slice())
    other = sqlite3.connect(path)
    other.execute("CREATE TRIGGER full BEFORE INSERT ON transactions BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    other.commit()
    with pytest.raises(MachineFault, match="disk is full") as caught:
        journal.save_transaction(_transaction(Phase.COMMITTED))
    assert "\n" not in str(caught.value)
    assert journal.slice("lab").epoch == 0
    other.execute("DROP TRIGGER full")
    other.commit()
    other.close()
    journal.save_transaction(_transaction(Phase.COMMITTED))
    assert journal.slice("lab").epoch == 1


# --- what is written is what is read ----------------------------------------------------------------------------------

_vms = st.sampled_from(["n1", "n2", "n3"])
_times = st.floats(0, 1e12, allow_nan=False)
_sizes = st.integers(0, 2**50)
_text = st.text(max_size=20)


@st.composite
def _states(draw: st.DrawFn) -> TransactionState:
    vms = ("n1", "n2", "n3")
    options = st.builds(Options, st.just(vms), st.integers(1, 9), delays_ms=st.dictionaries(_vms, _times))
    promises = st.builds(CutPromise, _vms, _text, _text, _sizes, st.sampled_from(["hold", "drop"]), _text)
    channels = st.builds(ChannelSummary, _vms, _sizes, _sizes, _sizes, _sizes, _text)
    images = st.builds(ImageStatus, _vms, _text, _sizes, _sizes, _text, _text)
    return draw(
        st.builds(
            TransactionState,
            options,
            _times,
            st.sampled_from(Phase),
            promises=st.dictionaries(_vms, promises),
            cuts=st.dictionaries(_vms, st.builds(CutReport, _vms, _times, _times, _times, _times, _text)),
            streams=st.dictionaries(_vms, st.builds(StreamReport, _vms, _times, _sizes)),
            images=st.dictionaries(_vms, images),
            network_ready=st.booleans(),
            staged=st.booleans(),
            edges=st.dictionaries(_vms, st.builds(EdgeReport, _vms, _sizes, _sizes, _sizes, _sizes)),
            channels=st.dictionaries(_vms, channels),
            asked=st.frozensets(st.sampled_from([ArmVm.__name__, CutVm.__name__, "undo"])),
            armed=st.frozensets(_vms),
            retired=st.none() | st.builds(ColorRetired, st.booleans()),
            disarmed=st.booleans(),
            settled=st.frozensets(_vms),
            sealed=st.booleans(),
            dropped_before=_sizes,
            dropped_after=st.none() | _sizes,
            counted=st.booleans(),
            released=st.frozensets(_vms),
            network_advanced=st.booleans(),
            discarded=st.booleans(),
            total_ms=_times,
            failure=_text,
        )
    )


@settings(max_examples=50, deadline=None)
@given(_states())
def test_a_state_survives_json(state: TransactionState) -> None:
    assert decode(TransactionState, json.loads(json.dumps(encode(state)))) == state
