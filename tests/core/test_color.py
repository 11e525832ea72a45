"""The color algebra: colors tell the past from the future as long as at most two adjacent epochs are alive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.core.color import COLORS, Relation, admitted_colors, color_of, relation

EPOCHS = st.integers(min_value=0, max_value=10**9)


@given(EPOCHS)
def test_adjacent_epochs_are_told_apart_for_ever(epoch: int) -> None:
    own, following = color_of(epoch), color_of(epoch + 1)
    assert relation(own, own) is Relation.SAME
    assert relation(following, own) is Relation.FUTURE
    assert relation(own, following) is Relation.IN_TRANSIT


@given(EPOCHS)
def test_colors_wrap_around_in_a_fixed_order(epoch: int) -> None:
    assert color_of(epoch + COLORS) == color_of(epoch)
    assert {color_of(epoch + ahead) for ahead in range(COLORS)} == set(range(COLORS))


@given(st.integers(min_value=1, max_value=10**9), st.integers(0, COLORS - 1))
def test_a_port_admits_what_is_not_from_the_future(epoch: int, frame_color: int) -> None:
    admitted = frame_color in admitted_colors(epoch)
    assert admitted == (relation(frame_color, color_of(epoch)) is not Relation.FUTURE)


def test_in_the_first_epoch_nothing_can_be_in_transit() -> None:
    assert admitted_colors(0) == (0,)


@given(st.integers(0, COLORS - 1), st.integers(0, COLORS - 1))
def test_relation_is_the_inverse_seen_from_the_other_side(one: int, other: int) -> None:
    swapped = {
        Relation.SAME: Relation.SAME,
        Relation.FUTURE: Relation.IN_TRANSIT,
        Relation.IN_TRANSIT: Relation.FUTURE,
    }
    assert relation(other, one) is swapped[relation(one, other)]


@given(st.integers(max_value=-1))
def test_a_negative_epoch_is_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match="counts cuts"):
        color_of(epoch)


@pytest.mark.parametrize("pair", [(-1, 0), (0, COLORS), (7, 1)])
def test_what_is_no_color_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a color is 0 to 2"):
        relation(*pair)
