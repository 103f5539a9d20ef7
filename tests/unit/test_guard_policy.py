"""Pokes: refused and told, or redirected to private blocks; routed by address, split by block."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vfsmap
from vfsmap.errors import Invalid, NotFound, Sealed
from vfsmap.guard import Guards, Poke, TextGuard, Violation
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB, PMD, PTE, PUD, Level

SIZE = 4 * MIB
BASE = 0xFFFFFFFFC0200000


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with tmpfs(size="64M") as place:
        file = place / "text"
        file.write_bytes(random.Random(1).randbytes(SIZE))
        yield file


@contextmanager
def guarded(path: Path, policy: str, granularity: Level = PTE) -> Iterator[TextGuard]:
    private = policy == "redirect"
    options = {"private": True, "cow": granularity} if private else {}
    with vfsmap.map(path, **options) as window:  # type: ignore[arg-type]  # of several types
        # a plain str is no Literal
        yield TextGuard(window, policy, granularity, base=BASE, name="xfs")  # type: ignore[arg-type]


def content(guard: TextGuard) -> bytes:
    with guard.window.view() as view:
        return bytes(view)


def test_a_refused_poke_changes_nothing_and_is_told(path: Path) -> None:
    told: list[Violation] = []
    with vfsmap.map(path) as window:
        guard = TextGuard(window, base=BASE, name="xfs", on_violation=told.append)
        with pytest.raises(Sealed, match=r"xfs is persistent text .* 0xffffffffc0200010"):
            guard.poke(BASE + 16, b"\xe9\0\0\0\0")
        assert content(guard) == path.read_bytes()
    assert [str(violation) for violation in told] == [
        "refused to write 5 bytes at 0xffffffffc0200010 of xfs: e900000000"
    ]
    assert (guard.refused, guard.redirected) == (1, 0)


@pytest.mark.parametrize("granularity", [PTE, PMD])
def test_a_redirected_poke_copies_its_block_and_leaves_the_file(
    path: Path, granularity: Level
) -> None:
    before = path.read_bytes()
    with guarded(path, "redirect", granularity) as guard:
        copied = guard.poke(BASE + 0x1234, b"\x90\x90", before[0x1234:0x1236])
        assert copied == guard.overlaid == granularity.size
        assert content(guard) == before[:0x1234] + b"\x90\x90" + before[0x1236:]
        assert guard.overlaid_in(range(BASE, BASE + SIZE)) == granularity.size
        assert guard.overlaid_in(range(BASE + PMD.size, BASE + SIZE)) == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("granularity", [PTE, PMD])
def test_a_poke_over_the_end_of_a_block_copies_both(path: Path, granularity: Level) -> None:
    before, at = path.read_bytes(), granularity.size - 2
    with guarded(path, "redirect", granularity) as guard:
        assert guard.poke(BASE + at, b"\1\2\3\4\5") == 2 * granularity.size
        assert content(guard) == before[:at] + b"\1\2\3\4\5" + before[at + 5 :]


def test_many_pokes_copy_each_block_once_and_later_ones_win(path: Path) -> None:
    rng = random.Random(2)
    wanted = bytearray(path.read_bytes())
    pokes = []
    for _ in range(5000):
        at, data = rng.randrange(256 * 1024), rng.randbytes(rng.randrange(1, 12))
        pokes.append(Poke(BASE + at, data))
        wanted[at : at + len(data)] = data
    blocks = {
        page
        for poke in pokes
        for page in (
            (poke.address - BASE) // 4096,
            (poke.address - BASE + len(poke.new) - 1) // 4096,
        )
    }
    with guarded(path, "redirect") as guard:
        assert guard.apply(pokes) == 4096 * len(blocks) == guard.overlaid
        assert content(guard) == bytes(wanted)


def test_a_poke_that_finds_something_else_stores_nothing_of_its_batch(path: Path) -> None:
    before = path.read_bytes()
    with guarded(path, "redirect") as guard:
        pokes = [Poke(BASE, b"\1"), Poke(BASE + 8, b"\2", bytes(b ^ 1 for b in before[8:9]))]
        with pytest.raises(Invalid, match=r"xfs has .* at 0xffffffffc0200008, not"):
            guard.apply(pokes)
        assert content(guard) == before
        assert guard.overlaid == 0


@pytest.mark.parametrize(("at", "size"), [(-1, 1), (SIZE, 1), (SIZE - 2, 5), (-SIZE, SIZE)])
def test_a_poke_outside_the_image_is_an_error(path: Path, at: int, size: int) -> None:
    with guarded(path, "redirect") as guard, pytest.raises(Invalid, match="not inside xfs"):
        guard.poke(BASE + at, bytes(size))


def test_a_poke_goes_to_the_image_that_has_the_address(path: Path) -> None:
    with guarded(path, "redirect") as first, vfsmap.map(path, private=True) as window:
        second = TextGuard(window, "redirect", base=BASE + SIZE, name="kvm")
        guards = Guards([first])
        guards.add(second)
        guards.apply([Poke(BASE + 1, b"\1"), Poke(BASE + SIZE + 1, b"\2")])
        assert (first.redirected, second.redirected) == (1, 1)
        assert content(second)[1] == 2
        with pytest.raises(NotFound, match="no image holds the address 0x1000"):
            guards.poke(0x1000, b"\0")
        with pytest.raises(Invalid, match="brd and kvm share addresses"):
            guards.add(TextGuard(window, "redirect", base=BASE + 2 * SIZE - 1, name="brd"))


def test_a_guard_wants_a_window_that_its_policy_can_be_kept_on(path: Path) -> None:
    with vfsmap.map(path) as window:
        with pytest.raises(Invalid, match="redirecting needs a private window"):
            TextGuard(window, "redirect")
        with pytest.raises(Invalid, match="policy 'allow'"):
            TextGuard(window, "allow")  # type: ignore[arg-type]  # that is what is tried
        with pytest.raises(Invalid, match="blocks of 4K or 2M"):
            TextGuard(window, granularity=PUD)
    with (
        vfsmap.map(path, private=True, cow=PMD) as window,
        pytest.raises(Invalid, match="the window copies blocks of PMD, not PTE"),
    ):
        TextGuard(window, "redirect", PTE)
    with (
        vfsmap.map(path, private=True) as window,
        pytest.raises(Invalid, match="takes no plain stores"),
    ):
        TextGuard(window, "redirect", executable=True)


def test_of_many_refused_pokes_the_last_report_covers_the_rest(path: Path) -> None:
    told: list[tuple[int, int, str]] = []

    class Grantor:
        def report(self, offset: int, length: int, detail: str) -> None:
            told.append((offset, length, detail))

    with vfsmap.map(path) as window:
        guard = TextGuard(window, base=BASE)
        window.grantor = Grantor()  # type: ignore[assignment]  # as much of one as is needed
        with pytest.raises(Sealed):
            guard.apply([Poke(BASE + 8 * n, bytes(8)) for n in range(20)])
        window.grantor = None
    start, length, detail = told[-1]
    rest = 20 - (len(told) - 1)
    assert (start, length) == (8 * (len(told) - 1), 8 * rest)
    assert f"refused {rest} more writes" in detail
