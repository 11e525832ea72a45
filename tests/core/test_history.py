"""The independent judge, on histories made by hand (the seeds' figure 2 and its neighbors)."""

from geni_violin.core.history import Cut, Happening, Received, Sent, judge


def test_a_frame_from_the_future_to_the_past_is_an_orphan() -> None:
    verdict = judge([Cut("a", 1), Sent("a", 7), Received("b", 7), Cut("b", 1)], snapshot=1)
    assert verdict.orphans == {7}
    assert not verdict.consistent


def test_a_frame_from_the_past_to_the_future_is_in_transit() -> None:
    verdict = judge([Sent("a", 7), Cut("a", 1), Cut("b", 1), Received("b", 7)], snapshot=1)
    assert verdict.consistent
    assert verdict.in_transit == {7}


def test_frames_within_one_side_cross_nothing() -> None:
    history: list[Happening] = [
        Sent("a", 1),
        Received("b", 1),
        Cut("a", 1),
        Cut("b", 1),
        Sent("a", 2),
        Received("b", 2),
    ]
    verdict = judge(history, snapshot=1)
    assert verdict.consistent
    assert not verdict.in_transit


def test_only_the_order_at_each_vm_counts() -> None:
    by_clock: list[Happening] = [
        Sent("a", 1),
        Cut("a", 1),
        Sent("a", 2),
        Cut("b", 1),
        Received("b", 1),
        Received("b", 2),
    ]
    by_vm = [what for vm in ("b", "a") for what in by_clock if what.vm == vm]
    assert judge(by_clock, 1) == judge(by_vm, 1)


def test_each_snapshot_is_judged_by_its_own_cuts() -> None:
    history: list[Happening] = [Cut("a", 1), Cut("b", 1), Cut("a", 2), Sent("a", 5), Received("b", 5), Cut("b", 2)]
    assert judge(history, snapshot=1).consistent
    assert judge(history, snapshot=2).orphans == {5}


def test_a_vm_without_a_cut_is_all_before_it() -> None:
    assert judge([Cut("a", 1), Sent("a", 3), Received("b", 3)], snapshot=1).orphans == {3}


def test_a_lost_frame_counts_as_in_transit() -> None:
    assert judge([Sent("a", 3), Cut("a", 1), Cut("b", 1)], snapshot=1).in_transit == {3}
