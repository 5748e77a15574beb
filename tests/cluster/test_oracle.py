"""The oracle of the ledger says what is wrong, and nothing else."""

from __future__ import annotations

from tests.cluster.oracle import ON_ITS_WAY, Losses, Sighting, wrong


def life(began: int, numbers: range, step: int = 1) -> list[Sighting]:
    return [Sighting(number, began, began + step * place, began + 1000) for place, number in enumerate(numbers)]


def test_a_source_that_resumes_is_right() -> None:
    assert wrong([*life(0, range(10)), *life(100, range(10, 20))], 20, Losses(workers=1)) == []


def test_what_is_missing_is_named() -> None:
    assert wrong(life(0, range(1, 9)), 10, Losses()) == ["2 are missing: [0, 9]"]


def test_a_source_begins_anew_only_when_its_node_was_given_up() -> None:
    seen = [*life(0, range(10)), *life(100, range(20))]
    assert wrong(seen, 20, Losses(nodes=1, source=True)) == []
    assert "emitted 10 numbers in two lives" in wrong(seen, 20, Losses(nodes=1))[0]


def test_an_old_copy_that_goes_on_sending_is_found_even_where_beginning_anew_is_allowed() -> None:
    seen = [*life(0, range(20), step=10), *life(100, range(20))]
    assert "9 numbers of the older one" in wrong(seen, 20, Losses(nodes=1, source=True))[0]


def test_numbers_seen_again_need_somebody_who_held_them() -> None:
    seen = [*life(0, range(10)), *life(0, range(3))]
    assert wrong(seen, 10, Losses(workers=3)) == []
    assert "3 numbers were seen again" in wrong(seen, 10, Losses(workers=2))[0]
    assert wrong(seen * ON_ITS_WAY, 10, Losses(workers=2)) != wrong(seen, 10, Losses(nodes=1)) == []
