"""Counts by duration, and what is read out of them."""

import pytest

from vfsmap.tally import Tallies, Tally, quantile


def test_durations_are_counted_between_powers_of_two() -> None:
    tally = Tally()
    for spent in (0, 1, 2, 3, 4, 1023, 1024):
        tally.note(spent)
    plain = tally.plain("x")
    assert plain["latency"] == [1, 1, 2, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert (plain["count"], plain["time_ns"]) == (7, 2057)


def test_a_tally_that_counted_nothing_is_empty() -> None:
    assert Tally().plain("x")["latency"] == []
    assert quantile([], 0.5) == 0.0


def test_a_name_gets_its_tally_when_it_is_first_asked_for() -> None:
    tallies = Tallies()
    tallies["b"].note(1)
    tallies["a"].errors += 1
    assert [each["name"] for each in tallies.plain()] == ["a", "b"]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1.0])
def test_a_quantile_lies_within_the_bucket_of_the_true_one(share: float) -> None:
    tally = Tally()
    values = [n * n for n in range(1, 1000)]
    for value in values:
        tally.note(value)
    true = values[round(share * len(values)) - 1]
    assert 1 << true.bit_length() - 1 <= quantile(tally.latency, share) <= 1 << true.bit_length()
