"""What a host agent refuses of a link, and what decides which frames one loses."""

import pytest

from geni_violin.core.errors import InvalidInput, MachineFault
from geni_violin.core.model import MAX_LINK_DELAY_MS
from geni_violin.hostagent.link_ends import _bind, check_manner, seed_of


@pytest.mark.parametrize(("delay_ms", "loss"), [(0, 0), (20, 0.01), (MAX_LINK_DELAY_MS, 1)])
def test_links_that_can_be(delay_ms: float, loss: float) -> None:
    check_manner(delay_ms, loss)


@pytest.mark.parametrize("delay_ms", [-0.1, MAX_LINK_DELAY_MS + 1, float("inf"), float("nan")])
def test_a_delay_that_cannot_be(delay_ms: float) -> None:
    with pytest.raises(InvalidInput, match=r"cannot have a delay of .* ms; expected 0 to 10000"):
        check_manner(delay_ms, 0)


@pytest.mark.parametrize("loss", [-0.1, 1.1, float("nan")])
def test_a_loss_that_cannot_be(loss: float) -> None:
    with pytest.raises(InvalidInput, match="expected a share from 0 to 1"):
        check_manner(0, loss)


def test_a_seed_that_is_set_gives_each_end_its_own_and_the_same_each_time() -> None:
    assert seed_of(5, "gv0000laaaaaaaa") == seed_of(5, "gv0000laaaaaaaa")
    assert len({seed_of(seed, tap) for seed in (5, 6) for tap in ("gv0000laaaaaaaa", "gv0000lbbbbbbbb")}) == 4


def test_without_one_an_end_has_another_seed_each_time() -> None:
    assert len({seed_of(0, "gv0000laaaaaaaa") for _ in range(4)}) > 1


def test_an_address_that_is_taken_is_told() -> None:
    with _bind("127.0.0.1:0") as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(MachineFault, match=f"cannot take UDP address {address} for a link: Address already in use"):
            _bind(address)
