"""Names fit into the kernel's limit, differ where what they stand for differs, and never change."""

from hypothesis import given
from hypothesis import strategies as st

from geni_violin.hostagent import names

IDS = st.text("0123456789abcdef", min_size=4, max_size=4)
WORDS = st.text(min_size=1, max_size=80)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=30, unique=True)


@given(IDS, PAIRS)
def test_names_are_short_and_distinct(installation_id: str, pairs: list[tuple[str, str]]) -> None:
    made = [maker(installation_id, *pair) for maker in (names.bridge_name, names.tap_name) for pair in pairs]
    made += [names.patch_name(installation_id, *pair, number) for pair in pairs for number in range(2)]
    made += [
        names.link_tap_name(installation_id, *pair, number, delay_ms, loss)
        for pair in pairs
        for number, delay_ms, loss in ((0, 1.0, 0.0), (1, 1.0, 0.0), (0, 2.0, 0.0), (0, 1.0, 0.1))
    ]
    assert all(len(name) <= 15 and name.isascii() and " " not in name and "/" not in name for name in made)
    assert len(set(made)) == len(made)


@given(IDS, WORDS, WORDS)
def test_kinds_are_told_apart_by_their_beginnings(installation_id: str, one: str, other: str) -> None:
    link = names.link_tap_name(installation_id, one, other, 0, 1.0, 0.0)
    assert link.startswith(names.prefix(installation_id, names.LINK_TAP_KIND))
    assert not link.startswith(names.prefix(installation_id, names.TAP_KIND))
    assert names.tap_name(installation_id, one, other).startswith(names.prefix(installation_id, names.TAP_KIND))
    bridge = names.bridge_name(installation_id, one, other)
    assert not bridge.startswith(names.prefix(installation_id, names.TAP_KIND))


def test_a_boundary_between_two_words_counts() -> None:
    assert names.tap_name("0123", "ab", "c") != names.tap_name("0123", "a", "bc")


def test_the_two_ends_of_a_link_differ() -> None:
    assert names.patch_name("0123", "b1", "b2", 0) != names.patch_name("0123", "b2", "b1", 0)
    assert names.link_tap_name("0123", "b1", "b2", 0, 1.0, 0.0) != names.link_tap_name("0123", "b2", "b1", 0, 1.0, 0.0)


def test_a_whole_number_is_the_same_delay_as_its_float() -> None:
    assert names.link_tap_name("0123", "b1", "b2", 0, 20, 0) == names.link_tap_name("0123", "b1", "b2", 0, 20.0, 0.0)


@given(IDS, PAIRS)
def test_datapath_ids_have_64_bits_and_differ(installation_id: str, pairs: list[tuple[str, str]]) -> None:
    made = [names.datapath_id(installation_id, *pair) for pair in pairs]
    assert all(1 << 48 <= dpid < 1 << 64 for dpid in made)
    assert len(set(made)) == len(made)


def test_names_never_change() -> None:
    assert names.tap_name("9a51", "s", "a") == "gv9a51t4cfd2308"
    assert names.bridge_name("9a51", "h1", "s1") == "gv9a51-4130dc39"
