"""A slice whose snapshots are kept in a real object store: OpenStack Swift through its S3 interface."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_harness import s3_backend, with_bucket
from swift_harness import ACCESS_KEY_ID, BUCKET, SECRET_ACCESS_KEY, Swift, swift_in

from mininet_tests.slice_harness import PAIR, Installation, Slice, installation, write_pair_topology

PREFIX = "a-slice"
CREDENTIALS = f"[default]\naws_access_key_id = {ACCESS_KEY_ID}\naws_secret_access_key = {SECRET_ACCESS_KEY}\n"


@pytest.fixture
def swift(tmp_path: Path) -> Iterator[Swift]:
    """An object store with an empty bucket."""
    folder = tmp_path / "swift"
    folder.mkdir()
    with swift_in(folder) as running, with_bucket(running) as ready:
        yield ready


@pytest.fixture
def machine(swift: Swift, tmp_path: Path) -> Iterator[Installation]:
    """An installation with the slice "pair" running, whose snapshot server keeps images in that store."""
    credentials = tmp_path / "credentials"
    credentials.write_text(CREDENTIALS)
    credentials.chmod(0o600)
    settings = {
        "store_url": f"s3://{BUCKET}/{PREFIX}",
        "s3_endpoint": swift.endpoint,
        "s3_credentials_file": str(credentials),
    }
    with installation("object-store", **settings) as made:
        made.ok("up", str(write_pair_topology(tmp_path)))
        yield made


def test_a_snapshot_in_an_object_store(machine: Installation, swift: Swift) -> None:
    backend = s3_backend(swift, PREFIX)
    with machine.client() as client:
        running = Slice(client, "pair", PAIR)
        running.wait_until_established()
        taken = machine.ok("snapshot", "take", "pair", "--name", "far")
        assert taken["state"] == "committed"
        _assert_all_is_in_the_store(machine, {key for key, _size in backend.list()}, taken["id"])
        machine.ok("snapshot", "verify", "far")
        stored = machine.ok("store", "stats")["stored_bytes"]
        assert stored == sum(size for key, size in backend.list() if key.startswith("packs/")) > 0
        machine.ok("slice", "fail", "pair")
        since = running.offsets()
        assert machine.ok("restore", "far")["state"] == "running"
        first, last = running.wait_for_reports(since, 1), running.wait_for_reports(running.offsets(), 2)
        for vm in PAIR:
            assert last[vm]["udp_received"] > first[vm]["udp_received"], f"{vm} hears nothing"
            for key in ("udp_duplicates", "udp_foreign", "udp_lost", "tcp_dead", "tcp_violations"):
                assert last[vm][key] == 0, f"{vm} {key} = {last[vm][key]}"
        again = machine.ok("snapshot", "take", "pair", "--name", "farther")
        assert _stored(again) < _stored(taken), "what has not changed is there already"
        for name in ("far", "farther"):
            machine.ok("snapshot", "delete", name)
        left = {key for key, _size in backend.list()}
        assert not [key for key in left if key.startswith(("packs/", "images/", "channels/", "manifests/"))]
    assert SECRET_ACCESS_KEY not in machine.log("snapshot-server")


def _assert_all_is_in_the_store(machine: Installation, keys: set[str], snapshot_id: str) -> None:
    """The object store has the snapshot, the server's own folder nothing of it."""
    assert {f"manifests/{snapshot_id}.json", *(f"images/{snapshot_id}/{vm}" for vm in PAIR)} <= keys
    assert [key for key in keys if key.startswith("packs/")]
    kept = [path for path in (machine.state_dir / "store").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 1 << 20, kept


def _stored(snapshot: dict[str, list[dict[str, int]]]) -> int:
    return sum(vm["stored_bytes"] for vm in snapshot["vms"])
