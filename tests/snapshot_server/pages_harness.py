"""What the tests of the page store share: images made of pages by hand, and stores in memory."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from snapshot_harness import image_of, manifest_of, request_of
from stream_harness import Loader, Memory, Record, devices, page_of, stream_of

from geni_violin.core.messages import Manifest
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.page_store import PageStore
from geni_violin.snapshot_server.store import StoredImage

Pages = Mapping[int, int]
"""Of an image's first block: by page number the seed of what is in it, or 0 for a page full of zeros."""


def image_with(pages: Pages, state: bytes = b"a device") -> bytes:
    """A stream of these pages, with so much state of a device."""
    records = [Record(0, page, page_of(seed) if seed else 0) for page, seed in pages.items()]
    return stream_of([records], devices(state))


def loaded(stream: bytes) -> tuple[Memory, bytes]:
    """What QEMU makes of a stream: its memory, and the state of devices."""
    loader = Loader(stream)
    return loader.memory, loader.rest


def put_image(store: PageStore, snapshot_id: str, vm: str, stream: bytes, portion: int = 1 << 20) -> StoredImage:
    """Store a staged image, in portions."""
    writer = store.open_writer(snapshot_id, vm)
    try:
        for start in range(0, len(stream), portion):
            writer.write(memoryview(stream)[start : start + portion])
        return writer.finish()
    except BaseException:
        writer.abort()
        raise


def take_images(store: PageStore, snapshot_id: str, streams: Mapping[str, bytes]) -> Manifest:
    """Stage, store and publish a snapshot of these images; its name is its id."""
    request = request_of(snapshot_id, snapshot_id, tuple(streams), expected_bytes=1 << 26)
    store.stage(request)
    stored = [put_image(store, snapshot_id, vm, stream) for vm, stream in streams.items()]
    return store.publish(manifest_of(request, stored))


def assert_same(store: PageStore, snapshot_id: str, streams: Mapping[str, bytes]) -> None:
    """The snapshot's images load to what these streams load to."""
    for vm, stream in streams.items():
        assert loaded(image_of(store, snapshot_id, vm)) == loaded(stream)


@contextlib.contextmanager
def opened(backend: ObjectBackend, folder: Path) -> Iterator[PageStore]:
    """A store that is closed at the end."""
    store = PageStore(backend, folder)
    try:
        yield store
    finally:
        store.close()


def packs_of(backend: ObjectBackend) -> list[str]:
    """The keys of all packs."""
    return [key for key, _size in backend.list("packs/")]


def seeds(first: int, count: int) -> dict[int, int]:
    """So many pages from number 0 on with seeds from ``first`` on."""
    return {page: first + page for page in range(count)}


def portions(stream: bytes, size: int) -> Sequence[bytes]:
    """A stream in portions."""
    return [stream[start : start + size] for start in range(0, len(stream), size)]
