"""What the coordinator must not forget: hosts, slices, transactions. SQLAlchemy; SQLite unless told otherwise.

Every method is one database transaction that is durable when it returns (SQLite: WAL, synchronous=FULL), and raises
:class:`MachineFault` when the database cannot be used. The methods block; the asyncio parts call those that write in a
thread.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Engine, String, create_engine, event, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from geni_violin.core.errors import AlreadyExists, MachineFault, NotFound
from geni_violin.core.messages import SnapshotRequest
from geni_violin.core.model import MAX_VLAN_ID, NetworkSlice, SliceSpec
from geni_violin.core.transaction import FINAL, Phase, TransactionState
from geni_violin.runtime.wire import decode, encode


class _Base(DeclarativeBase):
    pass


class _HostRow(_Base):
    __tablename__ = "hosts"
    name: Mapped[str] = mapped_column(String, primary_key=True)
    url: Mapped[str]


class _SliceRow(_Base):
    __tablename__ = "slices"
    name: Mapped[str] = mapped_column(String, primary_key=True)
    spec: Mapped[Any] = mapped_column(JSON)
    network: Mapped[Any] = mapped_column(JSON)
    epoch: Mapped[int]


class _TransactionRow(_Base):
    __tablename__ = "transactions"
    id: Mapped[str] = mapped_column(String, primary_key=True)
    slice: Mapped[str] = mapped_column(String, index=True)
    phase: Mapped[str] = mapped_column(String, index=True)
    record: Mapped[Any] = mapped_column(JSON)


class _CounterRow(_Base):
    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(String, primary_key=True)
    value: Mapped[int]


@dataclass(frozen=True)
class SliceRecord:
    """A slice as last written. ``epoch`` is the truth; that of ``network.ports`` is from when they were installed."""

    spec: SliceSpec
    network: NetworkSlice
    epoch: int

    @property
    def name(self) -> str:
        """The slice's name."""
        return self.spec.name

    def network_at(self, epoch: int) -> NetworkSlice:
        """The slice as the controller should have it, with all ports in ``epoch``."""
        ports = tuple(replace(port, epoch=epoch) for port in self.network.ports)
        return replace(self.network, ports=ports)


@dataclass(frozen=True)
class TransactionRecord:
    """A transaction, with what the core's state does not need to know. ``created_at``: seconds since 1970."""

    id: str
    name: str
    slice: SliceSpec
    request: SnapshotRequest
    created_at: float
    state: TransactionState


class Journal:
    """The coordinator's database.

    :param path: the SQLite file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = _engine(f"sqlite:///{path}")
        _Base.metadata.create_all(self._engine)
        self._numbering = threading.Lock()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        """One database transaction, committed at the end of the block.

        :raise MachineFault: the database cannot be read or written; nothing is changed then.
        """
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except SQLAlchemyError as error:
            words = str(getattr(error, "orig", None) or error).partition("\n")[0]
            hint = f"look at {self._engine.url.database} and at the room on its disk"
            raise MachineFault(f"the coordinator's database cannot be used: {words}", hint) from error

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    # hosts

    def put_host(self, name: str, url: str) -> None:
        """Write down where a host's agent answers."""
        with self._session() as session:
            session.merge(_HostRow(name=name, url=url))

    def hosts(self) -> dict[str, str]:
        """Every host's agent, by host name."""
        with self._session() as session:
            return {row.name: row.url for row in session.scalars(select(_HostRow))}

    # slices

    def add_slice(self, record: SliceRecord) -> None:
        """Write a new slice.

        :raise AlreadyExists: the name is taken.
        """
        with self._session() as session:
            if session.get(_SliceRow, record.name) is not None:
                raise AlreadyExists(f"there is a slice named {record.name!r} already", "choose another name")
            session.add(_slice_row(record))

    def save_slice(self, record: SliceRecord) -> None:
        """Write a slice, new or not."""
        with self._session() as session:
            session.merge(_slice_row(record))

    def slice(self, name: str) -> SliceRecord:
        """The slice of that name.

        :raise NotFound: there is none.
        """
        with self._session() as session:
            row = session.get(_SliceRow, name)
            if row is None:
                raise NotFound(f"there is no slice named {name!r}", "geni-violin slice list shows what there is")
            return _slice_record(row)

    def slices(self) -> list[SliceRecord]:
        """Every slice, by name."""
        with self._session() as session:
            return [_slice_record(row) for row in session.scalars(select(_SliceRow).order_by(_SliceRow.name))]

    def delete_slice(self, name: str) -> None:
        """Forget a slice."""
        with self._session() as session:
            row = session.get(_SliceRow, name)
            if row is not None:
                session.delete(row)

    def next_vlan_id(self) -> int:
        """A VLAN ID that no slice has, and that none had for as long as possible (R3).

        IDs are given out in turn, so one comes again only after all the others; a number that was given out is
        durable before it is used.

        :raise AlreadyExists: all of them are in use.
        """
        in_use = {record.network.vlan_id for record in self.slices()}
        # SQLite takes its lock only with the first write: two readers would find the same number.
        with self._numbering, self._session() as session:
            row = session.get(_CounterRow, "vlan_id") or _CounterRow(name="vlan_id", value=0)
            for _ in range(MAX_VLAN_ID):
                row.value = row.value % MAX_VLAN_ID + 1
                if row.value not in in_use:
                    session.add(row)
                    return row.value
        raise AlreadyExists("all VLAN IDs are in use", "delete a slice that is no longer needed")

    # transactions

    def save_transaction(self, record: TransactionRecord) -> None:
        """Write a transaction's present state; with its end, its slice's new epoch in the same step."""
        with self._session() as session:
            phase = record.state.phase
            row = _TransactionRow(id=record.id, slice=record.slice.name, phase=phase.value, record=encode(record))
            session.merge(row)
            if _has_advanced(record.state):
                slice_row = session.get(_SliceRow, record.slice.name)
                if slice_row is not None:
                    slice_row.epoch = max(slice_row.epoch, record.state.options.epoch)

    def transaction(self, transaction_id: str) -> TransactionRecord:
        """The transaction of that id.

        :raise NotFound: there is none.
        """
        with self._session() as session:
            row = session.get(_TransactionRow, transaction_id)
            if row is None:
                raise NotFound(f"there is no transaction {transaction_id!r}")
            return decode(TransactionRecord, row.record)

    def unfinished(self) -> list[TransactionRecord]:
        """Every transaction that has not come to its end."""
        final = [phase.value for phase in FINAL]
        with self._session() as session:
            rows = session.scalars(select(_TransactionRow).where(_TransactionRow.phase.not_in(final)))
            return [decode(TransactionRecord, row.record) for row in rows]


def _has_advanced(state: TransactionState) -> bool:
    """Whether a transaction is over and has moved all ports on: by its cut, or by undoing what there was of one."""
    cut = state.phase is Phase.COMMITTED or (state.phase is Phase.ABORTED and state.network_advanced)
    return cut and state.options.colored


def _engine(url: str) -> Engine:
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _slice_row(record: SliceRecord) -> _SliceRow:
    network = encode(record.network)
    return _SliceRow(name=record.name, spec=encode(record.spec), network=network, epoch=record.epoch)


def _slice_record(row: _SliceRow) -> SliceRecord:
    return SliceRecord(decode(SliceSpec, row.spec), decode(NetworkSlice, row.network), row.epoch)
