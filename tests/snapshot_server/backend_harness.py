"""Each kind of backend over an empty store of its own, and a way to open the same store once more."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import obstore
from obstore.store import S3Store
from swift_harness import ACCESS_KEY_ID, BUCKET, SECRET_ACCESS_KEY, Swift

from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.backends.local import LocalBackend
from geni_violin.snapshot_server.backends.memory import MemoryBackend
from geni_violin.snapshot_server.backends.opening import open_backend

CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY}


@dataclass(frozen=True)
class Home:
    """A store: its kind, a backend over it, and what opens another one over the same objects."""

    kind: str
    backend: ObjectBackend
    open_again: Callable[[], ObjectBackend]


def memory_home() -> Home:
    """Objects in this process; opened again, it is the same backend."""
    backend = MemoryBackend()
    return Home("memory", backend, lambda: backend)


def local_home(folder: Path) -> Home:
    """Objects in a folder."""
    return Home("local", LocalBackend(folder), lambda: LocalBackend(folder))


def s3_home(swift: Swift, prefix: str) -> Home:
    """Objects in Swift, below a prefix of its one bucket."""
    return Home("s3", s3_backend(swift, prefix), lambda: s3_backend(swift, prefix))


def s3_backend(swift: Swift, prefix: str) -> ObjectBackend:
    """A backend over objects in Swift."""
    return open_backend(f"s3://{BUCKET}/{prefix}", CREDENTIALS, s3_endpoint=swift.endpoint)


@contextlib.contextmanager
def with_bucket(swift: Swift) -> Iterator[Swift]:
    """Swift, in which there is a bucket."""
    store = S3Store(
        BUCKET,
        endpoint=swift.endpoint,
        region="us-east-1",
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        client_options={"allow_http": True},
    )
    address = obstore.sign(store, "PUT", "", timedelta(minutes=5))
    httpx.put(address, trust_env=False, timeout=60).raise_for_status()
    yield swift
