"""What ``vfsmap top`` makes of two looks at the counters."""

from typing import Any

from vfsmap_tools.top import difference


def stats(time_ns: int, *requests: dict[str, Any]) -> dict[str, Any]:
    return {
        "time_ns": time_ns,
        "started_ns": 0,
        "size": 100,
        "free": 60,
        "inodes": 3,
        "leases": 1,
        "writable_leases": 0,
        "events": {},
        "requests": list(requests),
        "calls": [],
    }


def operation(name: str, latency: list[int], **more: int) -> dict[str, Any]:
    plain = {"errors": 0, "bytes": 0, "time_ns": 0, **more}
    return {"name": name, "count": sum(latency), "latency": latency, **plain}


def test_rates_and_latencies_are_those_of_the_interval_alone() -> None:
    before = stats(10**9, operation("read", [0, 0, 1000], bytes=10, errors=5))
    now = operation("read", [0, 0, 1000, 0, 0, 0, 0, 0, 0, 0, 0, 10], bytes=30, errors=7)
    found = difference(before, stats(3 * 10**9, {**now, "time_ns": 10**8}))
    (read,) = found["requests"]
    assert found["seconds"] == 2
    assert found["requests_per_second"] == read["per_second"] == 5
    assert (read["bytes_per_second"], read["errors_per_second"], read["busy"]) == (10, 1, 0.05)
    assert 1.024 <= read["median_us"] <= read["p99_us"] <= 2.048


def test_what_is_counted_for_the_first_time_has_a_rate_too() -> None:
    found = difference(stats(0), stats(10**9, operation("mkdir", [0, 3])))
    assert found["requests"][0]["per_second"] == 3


def test_the_most_frequent_come_first_and_what_rests_comes_by_its_count() -> None:
    before = stats(0, operation("a", [9]), operation("b", [1]), operation("c", [5]))
    after = stats(10**9, operation("a", [9]), operation("b", [2]), operation("c", [5]))
    assert [each["name"] for each in difference(before, after)["requests"]] == ["b", "a", "c"]
