import pytest

from vfsmap.errors import Invalid, NotAligned
from vfsmap.units import (
    GIB,
    KIB,
    LEVELS,
    MIB,
    PMD,
    PTE,
    PUD,
    TIB,
    Level,
    align_down,
    align_up,
    format_size,
    largest_level,
    parse_level,
    parse_size,
    require_aligned,
)


def test_levels_are_ordered_and_know_their_size() -> None:
    assert [level.size for level in LEVELS] == [4 * KIB, 2 * MIB, GIB]
    assert [str(level) for level in LEVELS] == ["PTE", "PMD", "PUD"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1 << 40, TIB),
        ("0", 0),
        ("4096", 4096),
        ("64K", 64 * KIB),
        ("64k", 64 * KIB),
        ("2MiB", 2 * MIB),
        ("2MB", 2 * MIB),
        ("1.5G", 3 * GIB // 2),
        (" 8 G ", 8 * GIB),
        ("1T", TIB),
        ("100B", 100),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "x", "-1", "1.2.3", "1.", "8 Q", "1e3", "0x10", "1.5"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="is not a"):
        parse_size(text)


def test_a_negative_number_is_not_a_size() -> None:
    with pytest.raises(Invalid, match="can't be negative: -1"):
        parse_size(-1)


@pytest.mark.parametrize("size", [0, 1, 1023, KIB, 1536, MIB, 3 * MIB, 8 * GIB, 5 * TIB, 1 << 62])
def test_a_size_that_is_written_is_read_back_where_it_is_exact(size: int) -> None:
    text = format_size(size)
    assert parse_size(text) == size or "." in text


def test_sizes_are_written_with_the_largest_unit() -> None:
    assert [format_size(n) for n in (512, 1536, 2 * MIB, GIB + 1, 8 * GIB)] == [
        "512",
        "1.5K",
        "2M",
        "1.0G",
        "8G",
    ]


@pytest.mark.parametrize(
    ("text", "level"),
    [("4K", PTE), ("2m", PMD), ("1G", PUD), ("PTE", PTE), ("pmd", PMD), ("Pud", PUD)],
)
def test_a_level_is_known_by_its_name_and_by_its_size(text: str, level: Level) -> None:
    assert parse_level(text) == level


def test_another_size_is_not_a_level() -> None:
    with pytest.raises(Invalid, match="'4M' is not a level; use 4K, 2M or 1G"):
        parse_level("4M")


def test_rounding_goes_to_the_next_multiple_and_keeps_multiples() -> None:
    assert [align_down(n, 8) for n in (0, 7, 8, 9)] == [0, 0, 8, 8]
    assert [align_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_an_offset_off_the_boundary_is_refused_with_its_value() -> None:
    assert require_aligned("offset", 8192, 4096) == 8192
    with pytest.raises(NotAligned, match="offset 0x1001 is not a multiple of 0x1000") as caught:
        require_aligned("offset", 0x1001, 0x1000)
    assert (caught.value.value, caught.value.align) == (0x1001, 0x1000)


@pytest.mark.parametrize(
    ("offset", "size", "level"),
    [
        (0, GIB, PUD),
        (0, GIB - 1, PMD),
        (2 * MIB, 4 * GIB, PMD),
        (4 * KIB, GIB, PTE),
        (0, 4095, None),
        (1, GIB, None),
    ],
)
def test_the_largest_level_fits_offset_and_size(
    offset: int, size: int, level: Level | None
) -> None:
    assert largest_level(offset, size) == level
