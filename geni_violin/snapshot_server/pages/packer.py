"""Items to durable packs: the part of the store that works while streams come.

Theory of operation. All streams share what is in the making: a *batch* of up to 64 pages that fills, batches that
workers compress to frames, the *open pack* that takes frames in the order in which they are ready, and a pack that is
being put. Each item on that way is *pending*, so that it is packed once, however many streams bring it at a time.

::

    add ──> batch ──full──> worker: zstd ──> open pack ──full──> worker: put ──> catalog, index
            └── finish ends both, and waits until what this stream needs is durable ──┘

A stream waits where there are too many batches, these where there is no buffer for a pack, of which there are two. So
memory is bounded, however fast streams come and however slow the backend is.

A put that fails, fails every stream that needs one of its items, and those only. When a stream is given up, what only
it needed goes, as far as it is not being put; the rest is rubbish in a pack.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import zstandard
from numpy.typing import NDArray

from geni_violin.core.errors import GeniViolinError, MachineFault, NoSpace
from geni_violin.runtime.scheduling import let_others_go_first
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.catalog import Catalog
from geni_violin.snapshot_server.pages.digests import Digests, Rows, as_array, item_digest, page_digests
from geni_violin.snapshot_server.pages.index import NOWHERE, packs_of, segment_of
from geni_violin.snapshot_server.pages.pack_builder import PackBuilder, new_buffer
from geni_violin.snapshot_server.pages.pack_format import FRAME
from geni_violin.snapshot_server.stream.events import PAGE_BYTES

FRAME_PAGES = 64
"""Pages of a frame: with more the ratio hardly grows, and a restore of few pages reads more in vain."""
LEVEL = -1
"""zstd's level. Of the pages of real guests it makes 0.44 where 1 makes 0.39, in 0.84 of the time."""
COMPRESSORS = 2
_COMPRESSORS_NICENESS = 5
"""How much nicer they are than what feeds them: a stream's own thread has the most to do, one thing after the other."""
MAX_BATCHES = 16
"""The most batches that wait to be compressed: 4 MiB of pages, and the runs that they are parts of."""
MAX_PACKS = 2
"""The most packs in memory: one that fills, one that is being put."""


@dataclass(eq=False)
class Budget:
    """How much streams may add together, and have added."""

    limit_bytes: float = math.inf
    added_bytes: float = 0.0


@dataclass(eq=False)
class Session:
    """One stream's part of what is in the making.

    :ivar budget: of all streams of its snapshot.
    :ivar added_bytes: what its items have added to packs so far.
    :ivar pinned: durable packs with items that it needs.
    :ivar batches: what it needs and is not durable.
    :ivar error: why something that it needs could not be put.
    """

    budget: Budget
    added_bytes: float = 0.0
    pinned: set[int] = field(default_factory=set)
    batches: set["_Batch"] = field(default_factory=set)
    error: GeniViolinError | None = None


@dataclass(eq=False)
class _Batch:
    """Items of one size on their way; ``brought`` by whom how many of them, needed by ``users``."""

    data: NDArray[np.uint8]
    digests: list[bytes] = field(default_factory=list)
    brought: dict[Session, int] = field(default_factory=dict)
    users: set[Session] = field(default_factory=set)
    pack: "_OpenPack | None" = None
    durable: bool = False
    error: GeniViolinError | None = None

    @property
    def is_packed(self) -> bool:
        return self.pack is not None or self.error is not None

    @property
    def is_settled(self) -> bool:
        return self.durable or self.error is not None


@dataclass(eq=False)
class _OpenPack:
    """A pack that fills; its buffer is one of :data:`MAX_PACKS`."""

    builder: PackBuilder
    buffer: NDArray[np.uint8]
    batches: list[_Batch] = field(default_factory=list)


class Packer:
    """See the module's theory of operation."""

    def __init__(self, backend: ObjectBackend, catalog: Catalog) -> None:
        self._backend = backend
        self._catalog = catalog
        self._lock = catalog.lock
        self._sessions: set[Session] = set()
        self._pending: dict[bytes, _Batch] = {}
        self._batch = _new_batch()
        self._open: _OpenPack | None = None
        self._compressing = 0
        self._putting = 0
        self._buffers = [new_buffer() for _ in range(MAX_PACKS)]
        self._compressors = ThreadPoolExecutor(
            COMPRESSORS, "compress", initializer=let_others_go_first, initargs=(_COMPRESSORS_NICENESS,)
        )
        self._putter = ThreadPoolExecutor(1, "put")
        self._putter.submit(int)  # a thread is as nice as the one that makes it, which must not be a compressor
        self._local = threading.local()

    def begin(self, budget: Budget) -> Session:
        """A stream begins."""
        session = Session(budget)
        with self._lock:
            self._sessions.add(session)
        return session

    def add_pages(self, session: Session, rows: Rows) -> Digests:
        """Have these pages stored; gives their digests. ``rows`` must stay as they are.

        :raise GeniViolinError: why something that came earlier could not be put.
        :raise NoSpace: its snapshot has added more than it may.
        """
        digests = page_digests(rows)
        array = as_array(digests)
        with self._lock:
            self._wait_for_room()
            self._refuse_in_vain(session)
            self._fill(session, rows, digests, self._new(session, digests, self._not_found(session, array).tolist()))
        return array

    def add_piece(self, session: Session, piece: bytes) -> bytes:
        """Have a piece stored; gives its digest.

        :raise GeniViolinError: why something that came earlier could not be put.
        :raise NoSpace: its snapshot has added more than it may.
        """
        digest = item_digest(piece)
        with self._lock:
            self._wait_for_room()
            self._refuse_in_vain(session)
            if self._new(session, [digest], self._not_found(session, as_array([digest])).tolist()):
                batch = _Batch(np.frombuffer(piece, np.uint8).reshape(1, -1))
                self._take(session, batch, [digest])
                self._submit(batch)
        return digest

    def finish(self, session: Session) -> None:
        """Have all that the stream brought be durable.

        :raise GeniViolinError: why something of it could not be put.
        """
        with self._lock:
            if session in self._batch.users:
                self._submit(self._batch)
                self._batch = _new_batch()
            self._lock.wait_for(lambda: all(batch.is_packed for batch in session.batches))
            if self._open is not None and any(batch.pack is self._open for batch in session.batches):
                self._close_pack()
            self._lock.wait_for(lambda: all(batch.is_settled for batch in session.batches))
            self._refuse_in_vain(session)

    def end(self, session: Session) -> None:
        """The stream has ended: its image is durable, or given up."""
        with self._lock:
            self._sessions.discard(session)
            for batch in session.batches:
                batch.users.discard(session)
            self._catalog.unpin(session.pinned)
            session.pinned.clear()
            self._drop_what_nobody_needs()
            # Where this was the last stream nothing is left on its way, so that what is in packs can be swept.
            self._lock.wait_for(lambda: self._sessions or not (self._compressing or self._putting))

    def close(self) -> None:
        """End the workers; nothing may be added any more."""
        self._compressors.shutdown()
        self._putter.shutdown()

    # --- under the lock -----------------------------------------------------------------------------------------------

    def _wait_for_room(self) -> None:
        self._lock.wait_for(lambda: self._compressing < MAX_BATCHES)

    @staticmethod
    def _refuse_in_vain(session: Session) -> None:
        if session.error is not None:
            raise session.error
        budget = session.budget
        if budget.added_bytes > budget.limit_bytes:
            words = f"the snapshot has added {budget.added_bytes:.0f} bytes, {budget.limit_bytes:.0f} were left"
            raise NoSpace(f"the slice's quota is used up: {words}", "delete snapshots of the slice, or raise its quota")

    def _not_found(self, session: Session, digests: Digests) -> NDArray[np.intp]:
        """Which of these the index does not have; packs with the others are pinned."""
        places = self._catalog.index.find(digests)
        missing = places == NOWHERE
        packs = set(packs_of(places[~missing]).tolist())
        self._catalog.found(packs)
        self._pin(session, packs)
        return np.flatnonzero(missing)

    def _pin(self, session: Session, packs: set[int]) -> None:
        self._catalog.pin(packs - session.pinned)
        session.pinned |= packs

    def _new(self, session: Session, digests: list[bytes], missing: list[int]) -> list[int]:
        """Which of the items that the index does not have are not on their way either, each once.

        The caller takes them into batches before it lets go of the lock.
        """
        pending = self._pending
        wanted = dict(zip((digests[at] for at in missing), missing, strict=True))
        if pending.keys().isdisjoint(wanted):
            return sorted(wanted.values())
        for batch in {pending[digest] for digest in wanted if digest in pending}:
            session.batches.add(batch)
            batch.users.add(session)
        return sorted(at for digest, at in wanted.items() if digest not in pending)

    def _fill(self, session: Session, rows: Rows, digests: list[bytes], new: list[int]) -> None:
        """Put new pages into the batch that fills, and hand full ones on."""
        while new:
            batch = self._batch
            start = len(batch.digests)
            part, new = new[: FRAME_PAGES - start], new[FRAME_PAGES - start :]
            if len(part) == FRAME_PAGES == part[-1] - part[0] + 1:  # a batch that is in one piece already
                batch.data = rows[part[0] : part[-1] + 1]
            else:
                batch.data[start : start + len(part)] = rows[part]
            self._take(session, batch, [digests[at] for at in part])
            if len(batch.digests) == FRAME_PAGES:
                self._submit(batch)
                self._batch = _new_batch()

    def _take(self, session: Session, batch: _Batch, digests: list[bytes]) -> None:
        batch.digests += digests
        self._pending.update(dict.fromkeys(digests, batch))
        batch.brought[session] = batch.brought.get(session, 0) + len(digests)
        batch.users.add(session)
        session.batches.add(batch)

    def _submit(self, batch: _Batch) -> None:
        self._compressors.submit(self._guarded, self._compress, [batch], batch)
        self._compressing += 1

    def _close_pack(self) -> None:
        """Hand the open pack on to be put."""
        if self._open is not None:
            pack, self._open = self._open, None
            self._putter.submit(self._guarded, self._put, pack.batches, pack)
            self._putting += 1

    def _drop_what_nobody_needs(self) -> None:
        """Of what is not being put; batches that are being compressed are dropped when they are."""
        if not self._batch.users:
            self._forget(self._batch)
            self._batch = _new_batch()
        pack = self._open
        if pack is not None and not all(batch.users for batch in pack.batches):
            pack.builder.keep([bool(batch.users) for batch in pack.batches])
            for batch in pack.batches:
                if not batch.users:
                    self._forget(batch)
            pack.batches = [batch for batch in pack.batches if batch.users]

    def _forget(self, batch: _Batch) -> None:
        for digest in batch.digests:
            self._pending.pop(digest, None)

    # --- workers ------------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[..., None], batches: list[_Batch], argument: object) -> None:
        """Whatever goes wrong in a worker is the error of those who need these batches."""
        try:
            work(argument)
        except BaseException as error:  # handed on to each stream, which would wait for ever
            words = error if isinstance(error, GeniViolinError) else MachineFault(f"pages could not be packed: {error}")
            with self._lock:
                for batch in batches:
                    batch.error = words
                    self._forget(batch)
                    for session in batch.users:
                        session.error = words
        finally:
            with self._lock:
                if work == self._compress:
                    self._compressing -= 1
                else:
                    self._putting -= 1
                self._lock.notify_all()

    def _compress(self, batch: _Batch) -> None:
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=LEVEL)
        count, item_bytes = len(batch.digests), batch.data.shape[1]
        frame = compressor.compress(batch.data[:count].data.cast("B"))
        checksum = item_digest(frame)
        added = (len(frame) + FRAME.itemsize) / count + 32
        with self._lock:
            pack = self._open_pack_for(frame, count)
            if not batch.users:
                self._forget(batch)
                return
            pack.builder.append(frame, checksum, item_bytes, batch.digests)
            pack.batches.append(batch)
            batch.pack, batch.data = pack, _NO_DATA
            for session, brought in batch.brought.items():
                session.added_bytes += brought * added
                session.budget.added_bytes += brought * added

    def _open_pack_for(self, frame: bytes, items: int) -> _OpenPack:
        while self._open is None or not self._open.builder.fits(frame, items):
            self._close_pack()
            if self._buffers:
                buffer = self._buffers.pop()
                self._open = _OpenPack(PackBuilder(buffer), buffer)
            else:
                self._lock.wait()
        return self._open

    def _put(self, pack: _OpenPack) -> None:
        try:
            data, table = pack.builder.finish()
            self._backend.put(pack.builder.key, data)
            with self._lock:
                number = self._catalog.new_number()
            segment = segment_of(number, table)
            with self._lock:
                self._catalog.add(number, pack.builder.id, table, len(data), segment)
                for batch in pack.batches:
                    batch.durable = True
                    self._forget(batch)
                    for session in batch.users:
                        self._pin(session, {number})
                        session.batches.discard(batch)
        finally:
            with self._lock:
                self._buffers.append(pack.buffer)


_NO_DATA = np.empty((0, PAGE_BYTES), np.uint8)
"""In the place of a batch's data when they are packed; a view of them, however short, would keep all of them."""


def _new_batch() -> _Batch:
    return _Batch(np.empty((FRAME_PAGES, PAGE_BYTES), np.uint8))
