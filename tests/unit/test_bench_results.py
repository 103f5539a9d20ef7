"""What benchmarks make of their figures: ratios, verdicts, documents, a page."""

import os
from pathlib import Path

import pytest

from vfsmap.errors import Invalid
from vfsmap_tools.bench import page
from vfsmap_tools.bench.command import SCENARIOS
from vfsmap_tools.bench.handover import round_trip
from vfsmap_tools.bench.results import Curve, Grid, Plot, Rates, Result, load
from vfsmap_tools.bench.runner import Goal, Measure, alternate, distribution, judge, quantiles


@pytest.fixture
def result() -> Result:
    made = Result("fuse", "The mount", "Some words.")
    made.rates = [Rates("create", "/s", {"vfsmap": [1.0, 3.0, 2.0], "peer": [4.0, 4.0, 4.0]})]
    made.grids = [Grid("Sizes", ["what", "MiB"], [["all", 12345]])]
    made.plots = [Plot("growth", "Growth", "size", "ms", [Curve("a", [1, 2], [3, 4])])]
    made.promise("fast", 0.5, 0.4)
    made.promise("small", 2.0, 1.0, at_most=True)
    made.left_out = ["xfs, which is not there"]
    return made


def test_every_round_measures_each_peer_once_and_begins_with_another_one() -> None:
    order: list[str] = []

    def run(peer: str) -> float:
        order.append(peer)
        return len(order)

    (rates,) = alternate([Measure("m", "1/s", run)], {p: p for p in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert [len(rates.rounds[p]) for p in "abc"] == [3, 3, 3]


def test_a_ratio_is_that_of_the_medians(result: Result) -> None:
    assert result.rates[0].ratio("peer") == 0.5
    assert result.rates[0].spread("vfsmap") == (1.5, 2.5)


def test_goals_of_peers_that_took_no_part_are_not_judged(result: Result) -> None:
    result.verdicts.clear()
    judge(result, [Goal("create", "peer", 0.5), Goal("create", "absent", 1), Goal("x", "peer", 1)])
    (verdict,) = result.verdicts
    assert verdict.met
    judge(result, [Goal("create", "peer", 0.51)])
    assert not result.met


def test_a_bound_is_the_least_or_the_most_that_is_allowed(result: Result) -> None:
    assert [verdict.met for verdict in result.verdicts] == [True, False]
    result.promise("exactly", 1.0, 1.0, at_most=True)
    result.promise("exactly", 1.0, 1.0)
    assert [verdict.met for verdict in result.verdicts[2:]] == [True, True]


def test_a_document_holds_all_of_a_result(result: Result, tmp_path: Path) -> None:
    assert load(result.save(tmp_path)) == result


def test_documents_of_others_are_no_results(result: Result, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"kind": "something else"}')
    (tmp_path / "list.json").write_text("[]")
    result.save(tmp_path)
    assert page.found_in(tmp_path, SCENARIOS) == [result]


def test_the_page_shows_promises_kept_and_missed(result: Result) -> None:
    text = page.text([result])
    assert "1 of 2 promises are kept" in text
    assert "| [fuse](#the-mount) | fast | 0.5 | at least 0.4 | kept |" in text
    assert "| [fuse](#the-mount) | small | 2 | at most 1 | **missed** |" in text
    assert "| create, /s | 2 (1.5 to 2.5) | 4 (4 to 4) |" in text
    assert "| all | 12,345 |" in text
    assert "Left out: xfs" in text
    assert "![Growth](fuse-growth.svg)" in text


def test_the_page_is_built_with_its_pictures_and_the_same_each_time(
    result: Result, tmp_path: Path
) -> None:
    result.save(tmp_path)
    built = page.build(tmp_path, SCENARIOS)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"fuse.json", "index.md", "fuse.svg", "fuse-growth.svg"}
    assert b"fuse-growth.svg" in first["index.md"]
    page.build(tmp_path, SCENARIOS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert built.name == "index.md"


def test_a_page_of_nothing_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="vfsmap bench"):
        page.build(tmp_path, SCENARIOS)


def test_quantiles_and_distributions_come_from_the_samples_themselves() -> None:
    samples = [float(n) for n in range(1000, 0, -1)]
    assert quantiles(samples) == [501, 901, 991, 1000]
    curve = distribution("x", samples)
    assert curve.x == sorted(curve.x)
    assert (curve.y[0], curve.x[0]) == (0, 1)


def test_a_byte_goes_to_another_processor_and_back() -> None:
    allowed = os.sched_getaffinity(0)
    found = round_trip()
    assert (found is None) == (len(allowed) < 2)
    assert found is None or found > 0
    assert os.sched_getaffinity(0) == allowed


def test_where_there_is_one_processor_no_byte_goes_to_another() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert round_trip() is None
    finally:
        os.sched_setaffinity(0, allowed)
