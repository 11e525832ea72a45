"""Any sequence of taking, giving up, deleting, collecting and reopening, against a model that is a dictionary.

After each step every listed snapshot reads back, and after a collection nothing is left that no snapshot needs.
"""

import itertools
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pages_harness import assert_same, image_with, put_image, take_images
from snapshot_harness import request_of

from geni_violin.snapshot_server.backends.memory import MemoryBackend
from geni_violin.snapshot_server.pages.page_store import PageStore

_PAGES = st.dictionaries(st.integers(0, 250), st.integers(0, 30), max_size=150)
_VMS = st.dictionaries(st.sampled_from(["n1", "n2", "n3"]), _PAGES, min_size=1, max_size=2)


class Stores(RuleBasedStateMachine):
    """See the module's theory of operation."""

    def __init__(self) -> None:
        super().__init__()
        self._backend = MemoryBackend()
        self._folder = Path(tempfile.mkdtemp())
        self._store = PageStore(self._backend, self._folder)
        self._model: dict[str, dict[str, bytes]] = {}
        self._names = (f"s{number}" for number in itertools.count())

    @rule(vms=_VMS)
    def take(self, vms: dict[str, dict[int, int]]) -> None:
        name, streams = next(self._names), {vm: image_with(pages) for vm, pages in vms.items()}
        take_images(self._store, name, streams)
        self._model[name] = streams

    @rule(pages=_PAGES, part=st.floats(0, 1), discard=st.booleans())
    def give_up(self, pages: dict[int, int], part: float, discard: bool) -> None:
        name, stream = next(self._names), image_with(pages)
        self._store.stage(request_of(name, name, ("n1", "n2"), expected_bytes=1 << 22))
        put_image(self._store, name, "n2", image_with({page: 40 + seed for page, seed in pages.items()}))
        writer = self._store.open_writer(name, "n1")
        writer.write(memoryview(stream)[: round(part * len(stream))])
        writer.abort()
        if discard:
            self._store.discard(name)
        else:
            put_image(self._store, name, "n1", stream)
            self._store.discard(name)

    @rule(number=st.integers(0, 9))
    def delete(self, number: int) -> None:
        if self._model:
            name = sorted(self._model)[number % len(self._model)]
            self._store.delete(name)
            del self._model[name]

    @rule(min_rubbish=st.sampled_from([0.0, 0.25]))
    def collect(self, min_rubbish: float) -> None:
        stored = self._store.stats().stored_bytes
        plan = self._store.plan_collection(min_rubbish)
        done = self._store.collect(plan)
        stats = self._store.stats()
        assert stats.stored_bytes == stored - done.freed_bytes
        assert (set(done.delete), set(done.rewrite)) == (set(plan.delete), set(plan.rewrite))
        if min_rubbish == 0:
            # All that is left besides needed items is what each pack has around them.
            assert stats.rubbish_bytes <= 100 * stats.packs + 64
            again = self._store.plan_collection(min_rubbish)
            assert (again.delete, again.rewrite) == ((), ())
        if not self._model:
            assert list(self._backend.list("packs/")) == []

    @rule(crashed=st.booleans())
    def reopen(self, crashed: bool) -> None:
        if crashed:
            self._store._packer.close()
            self._store._opened._locks.close()
        else:
            self._store.close()
        self._store = PageStore(self._backend, self._folder)

    @invariant()
    def every_snapshot_reads_back(self) -> None:
        assert {manifest.name for manifest in self._store.snapshots()} == set(self._model)
        for name, streams in self._model.items():
            assert_same(self._store, name, streams)

    def teardown(self) -> None:
        self._store.close()
        shutil.rmtree(self._folder)


Stores.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestStores = Stores.TestCase
