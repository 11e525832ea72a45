"""What the guests of bench/store.py are made of."""

from pathlib import Path

from bench.store_content import Recipe, archive, chosen_files, recipe


def test_a_recipe_scales_with_the_memory() -> None:
    small, large = recipe(1000), recipe(2000)
    assert [large.files, large.records, large.random] == [2 * small.files, 2 * small.records, 2 * small.random]
    assert recipe(1000, with_random=False).random == 0
    assert sum((small.files, small.copies, small.records, small.text, small.numbers, small.random)) > 400


def test_the_guest_is_told_all_but_the_files() -> None:
    assert Recipe(1, 2, 3, 4, 5, 6).argument("{index}") == "fill={index}:2:3:4:5:6"


def test_which_files_are_chosen_depends_on_their_paths_alone() -> None:
    sizes = [(f"/usr/bin/{number}", 1000 + number) for number in range(100)]
    chosen = chosen_files(sizes, 10_000)
    assert chosen == chosen_files(reversed(sizes), 10_000)
    total = sum(dict(sizes)[path] for path in chosen)
    assert 10_000 <= total < 10_000 + 1100
    assert len(chosen_files(sizes, 10**9)) == 100


def test_the_archive_is_one_that_linux_reads(tmp_path: Path) -> None:
    (tmp_path / "some file").write_bytes(b"12345")
    data = b"".join(archive(b"program", [str(tmp_path / "some file")]))
    assert len(data) % 4 == 0
    assert _entries(data)["data/0"] == (0o100644, b"12345")
    assert _entries(data)["bin/store_filler"] == (0o100755, b"program")
    assert _entries(data)["init"][1].startswith(b"#!/bin/sh\n")
    assert _entries(data)["data"] == (0o040755, b"")


def _entries(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and contents by name, read as Linux's initramfs documentation says."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        fields = [int(data[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        begin = at + 110 + name_size + (-(110 + name_size) % 4)
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[begin : begin + size])
        at = begin + size + (-size % 4)
