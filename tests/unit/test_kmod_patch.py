"""Patching small pieces of text: what no real boot at hand shows, by the kernel's own rules."""

import struct

import pytest

from vfsmap.errors import Damaged, NotFound
from vfsmap.kmod.alternatives import apply_alternatives, relocate_code
from vfsmap.kmod.branches import (
    CALL,
    CALL_DEPTH,
    JUMP,
    RETHUNK,
    RETPOLINE,
    RETPOLINE_LFENCE,
    Thunks,
    apply_paravirt,
    apply_retpolines,
    apply_returns,
    branch,
    drop_locks,
    drop_tracing,
    most_thunk_pages,
    seal_entries,
)
from vfsmap.kmod.image import (
    ALTERNATIVES,
    ENDBR,
    FTRACE,
    JUMPS,
    LOCKS,
    NEW,
    OLD,
    PARAVIRT,
    RETPOLINES,
    RETURNS,
    STATIC_CALLS,
    Dialect,
)
from vfsmap.kmod.insn import decode
from vfsmap.kmod.keys import apply_jumps, apply_static_calls
from vfsmap.kmod.nops import fill, optimized
from vfsmap.testing.images import SYMBOLS, TABLE, TEXT, THUNKS, host, image, text_of, to


def retpolined(code: bytes, *features: int, dialect: Dialect = NEW, base: int = TEXT) -> str:
    made = image(code, RETPOLINES, to(base), dialect=dialect, base=base)
    apply_retpolines(made, host(*features), Thunks(made, []))
    return text_of(made)


RAX, R11 = 0, 11


def through(opcode: int, register: int, base: int = TEXT) -> bytes:
    """Return a call or jump by way of a retpoline, as compilers emit it."""
    if register < 8:
        return branch(opcode, base, THUNKS + 32 * register)
    return b"\x2e" + branch(opcode, base + 1, THUNKS + 32 * register)


@pytest.mark.parametrize(
    ("opcode", "register", "features", "wanted"),
    [
        (CALL, RAX, (), "ffd00f1f00"),
        (JUMP, RAX, (), "ffe0cc6690"),
        (CALL, R11, (), "41ffd30f1f00"),
        (JUMP, R11, (), "41ffe3cc6690"),
        (CALL, RAX, (RETPOLINE, RETPOLINE_LFENCE), "0faee8ffd0"),
        (JUMP, RAX, (RETPOLINE, RETPOLINE_LFENCE), "0faee8ffe0"),
        (CALL, R11, (RETPOLINE, RETPOLINE_LFENCE), "0faee841ffd3"),
    ],
)
def test_retpolines_become_indirect_branches(
    opcode: int, register: int, features: tuple[int, ...], wanted: str
) -> None:
    assert retpolined(through(opcode, register), *features) == wanted


def test_retpolines_stay_where_the_mitigation_is_retpolines() -> None:
    assert retpolined(through(CALL, RAX), RETPOLINE) == through(CALL, RAX).hex()


@pytest.mark.parametrize(("opcode", "array"), [(CALL, 0x400), (JUMP, 0x800)])
def test_retpolines_count_calls_where_the_mitigation_is_stuffing(opcode: int, array: int) -> None:
    wanted = branch(opcode, TEXT, THUNKS + array + 32 * RAX).hex()
    assert retpolined(through(opcode, RAX), RETPOLINE, CALL_DEPTH) == wanted
    wanted = "2e" + branch(opcode, TEXT + 1, THUNKS + array + 32 * R11).hex()
    assert retpolined(through(opcode, R11), RETPOLINE, CALL_DEPTH) == wanted
    # the older kernel knows no such mitigation
    code = through(opcode, RAX)
    assert retpolined(code, RETPOLINE, CALL_DEPTH, dialect=OLD) == code.hex()


def test_conditional_jumps_by_way_of_retpolines_hop_over_the_indirect_one() -> None:
    code = b"\x0f\x84" + struct.pack("<i", THUNKS + 32 * R11 - TEXT - 6)
    assert retpolined(code) == "7504" + "41ffe3" + "cc"
    # with a fence in front it does not fit, and so stays
    assert retpolined(code, RETPOLINE, RETPOLINE_LFENCE) == code.hex()


@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_branches_in_the_lower_half_of_a_line_go_by_way_of_thunk_pages(dialect: Dialect) -> None:
    page = TEXT + 0x40000
    # the last byte of the indirect branch decides: offsets 0x1e and 0x1f differ
    for offset, is_thunk in ((0, True), (0x1E, True), (0x1F, False), (0x3E, False), (0x3F, True)):
        code = bytes(offset) + branch(CALL, TEXT + offset, THUNKS)
        made = image(code, RETPOLINES, to(TEXT + offset), dialect=dialect)
        thunks = Thunks(made, [page])
        apply_retpolines(made, host(dialect.its_feature), thunks)
        found = made.memory.read(TEXT + offset, 5)
        if is_thunk:
            assert found == branch(CALL, TEXT + offset, page + 32)
            assert bytes(thunks.regions[0].data[30:37]).hex() == "cccc" + "ffe0cc" + "cccc"
        else:
            assert found.hex() == "ffd00f1f00"
            assert thunks.regions == []


def test_thunks_lie_in_upper_halves_only_and_pages_follow_each_other() -> None:
    made = image(b"")
    thunks = Thunks(made, [0x1000, 0x9000])
    places = [thunks.make(register) for register in (0, 8, 15, 3) * 200]
    assert places[:3] == [0x1020, 0x1023, 0x1027]
    for place, register in zip(places, (0, 8, 15, 3) * 200, strict=True):
        last = place + (3 if register < 8 else 4) - 1
        assert place % 64 >= 32
        assert last % 64 >= 32
    assert {place & ~0xFFF for place in places} == {0x1000, 0x9000}
    with pytest.raises(NotFound, match=r"its_pages"):
        Thunks(made, []).make(0)


def test_branches_to_no_retpoline_are_damage() -> None:
    for target in (THUNKS - 64, THUNKS + 32 * 16, THUNKS + 32 * 4):
        with pytest.raises(Damaged, match="goes to no retpoline"):
            retpolined(branch(CALL, TEXT, target))
    with pytest.raises(Damaged, match="no branch"):
        retpolined(b"\x90" * 8)


def test_returns_are_bare_or_go_by_way_of_the_thunk_in_use() -> None:
    thunk, its = SYMBOLS["__x86_return_thunk"], SYMBOLS["its_return_thunk"]
    code = branch(JUMP, TEXT, thunk) + bytes(0x20 - 5) + branch(JUMP, TEXT + 0x20, thunk)
    rows = to(TEXT, TEXT + 0x20)

    bare = image(code, RETURNS, rows)
    apply_returns(bare, host())
    assert text_of(bare, 5) == "c3cccccccc"

    other = image(code, RETURNS, rows)
    apply_returns(other, host(RETHUNK, x86_return_thunk=hex(THUNKS)))
    assert text_of(other, 5) == branch(JUMP, TEXT, THUNKS).hex()

    aligned = image(code, RETURNS, rows)
    apply_returns(aligned, host(RETHUNK, x86_return_thunk=hex(its)))
    assert text_of(aligned, 5) == branch(JUMP, TEXT, its).hex()
    assert text_of(aligned, 5, 0x20) == "c3cccccccc"  # upper halves of lines are safe


@pytest.mark.parametrize(
    ("features", "pages"),
    [
        ((), 0),
        ((NEW.its_feature,), 2),
        ((OLD.its_feature,), 2),
        ((NEW.its_feature, RETPOLINE), 0),
        ((NEW.its_feature, RETPOLINE, RETPOLINE_LFENCE), 2),
    ],
)
def test_thunk_pages_are_set_aside_where_branches_may_need_them(
    features: tuple[int, ...], pages: int
) -> None:
    assert most_thunk_pages(Thunks.LEAST + 1, host(*features)) == pages


def test_the_pages_set_aside_hold_as_many_thunks_as_are_counted_on() -> None:
    thunks = Thunks(image(b"\x90"), [0x1000])
    for _ in range(Thunks.LEAST):
        thunks.make(15)  # the longest
    with pytest.raises(NotFound, match=r"modules\.NAME\.its_pages"):
        thunks.make(0)


def test_locks_tracing_and_landing_marks_are_taken_out() -> None:
    locks = image(bytes.fromhex("f0480fc1f0"), LOCKS, to(TEXT, TEXT + 4))
    locks.lock_text = range(TEXT, TEXT + 4)
    drop_locks(locks)
    assert text_of(locks) == "3e480fc1f0"

    tracer = branch(CALL, TEXT, SYMBOLS["__fentry__"])
    traced = image(tracer + b"\xe8\0\0\0\0", FTRACE, struct.pack("<2Q", TEXT, TEXT + 5))
    drop_tracing(traced, host())
    assert text_of(traced) == "0f1f440000" + "e800000000"

    marked = image(bytes.fromhex("f30f1efaf30f1efb"), ENDBR, to(TEXT, TEXT + 4))
    seal_entries(marked)
    assert text_of(marked) == "660f1f00f30f1efb"


def test_paravirtual_calls_become_direct_or_vanish() -> None:
    slots = [hex(SYMBOLS["_paravirt_nop"]), "0x0", hex(THUNKS)]
    rows = b"".join(struct.pack("<QBB6x", TEXT + 7 * i, i, 7) for i in range(3))
    made = image(b"\xff" * 21, PARAVIRT, rows, dialect=OLD)
    apply_paravirt(made, host(pv_ops=slots))
    assert text_of(made, 7) == "0f1f8000000000"
    assert text_of(made, 7, 7) == branch(CALL, TEXT + 7, SYMBOLS["paravirt_BUG"]).hex() + "6690"
    assert text_of(made, 7, 14) == branch(CALL, TEXT + 14, THUNKS).hex() + "6690"
    with pytest.raises(Damaged, match="slot 2 of pv_ops"):
        apply_paravirt(made, host(pv_ops=slots[:2]))
    with pytest.raises(NotFound, match="pv_ops, which the host's document lacks"):
        apply_paravirt(made, host())


def test_a_paravirtual_call_that_does_not_fit_is_damage() -> None:
    made = image(b"\xff" * 8, PARAVIRT, struct.pack("<QBB6x", TEXT, 0, 4), dialect=OLD)
    with pytest.raises(Damaged, match="has 4 bytes for a call at 0xffffffffc0000000"):
        apply_paravirt(made, host(pv_ops=[hex(THUNKS)]))
    assert text_of(made) == "ff" * 8


FEATURE = 9 * 32 + 5


def alternative(
    old: str, new: str, *, dialect: Dialect = NEW, flags: int = 0, features: tuple[int, ...] = ()
) -> str:
    """Apply one alternative to the start of text; its replacement lies 64 bytes behind."""
    first, second = bytes.fromhex(old), bytes.fromhex(new)
    code = first.ljust(64, b"\xcc") + second.ljust(64, b"\xcc")
    offsets = struct.pack("<ii", TEXT - TABLE, TEXT + 64 - TABLE - 4)
    if dialect is OLD:
        feature = FEATURE | (0x8000 if flags & 1 else 0)
        rows = offsets + struct.pack("<HBB", feature, len(first), len(second))
    else:
        rows = offsets + struct.pack("<HHBB", FEATURE, flags, len(first), len(second))
    made = image(code, ALTERNATIVES, rows, dialect=dialect)
    apply_alternatives(made, host(*features, pv_ops=["0x0", hex(SYMBOLS["nop_func"]), hex(THUNKS)]))
    return text_of(made, len(first))


@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_alternatives_follow_the_feature_or_its_absence(dialect: Dialect) -> None:
    old, new = "b801000000", "31c0"
    assert alternative(old, new, dialect=dialect) == old
    applied = alternative(old, new, dialect=dialect, features=(FEATURE,))
    assert applied == "31c0" + "0f1f00"
    assert alternative(old, new, dialect=dialect, flags=1) == applied
    assert alternative(old, new, dialect=dialect, flags=1, features=(FEATURE,)) == old


@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_a_replacement_longer_than_its_place_is_damage(dialect: Dialect) -> None:
    assert alternative("31c0", "b801000000", dialect=dialect) == "31c0"
    with pytest.raises(Damaged, match="puts 5 bytes into 2 at 0xffffffffc0000000"):
        alternative("31c0", "b801000000", dialect=dialect, features=(FEATURE,))


@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_calls_in_replacements_keep_their_target(dialect: Dialect) -> None:
    new = branch(CALL, TEXT + 64, THUNKS).hex()
    wanted = branch(CALL, TEXT, THUNKS).hex()
    assert alternative("90" * 5, new, dialect=dialect, features=(FEATURE,)) == wanted


def test_jumps_in_replacements_become_short_where_they_can() -> None:
    near, far = branch(JUMP, TEXT + 64, TEXT + 40).hex(), branch(JUMP, TEXT + 64, THUNKS).hex()
    for dialect, rest in ((OLD, "0f1f00"), (NEW, "cccccc")):
        found = alternative("90" * 5, near, dialect=dialect, features=(FEATURE,))
        assert found == "eb26" + rest
        found = alternative("90" * 5, far, dialect=dialect, features=(FEATURE,))
        assert found == branch(JUMP, TEXT, THUNKS).hex()


@pytest.mark.parametrize(
    ("slot", "wanted"),
    [
        (0, branch(CALL, TEXT, SYMBOLS["BUG_func"]).hex() + "90"),
        (1, "660f1f440000"),
        (2, branch(CALL, TEXT, THUNKS).hex() + "90"),
    ],
)
def test_calls_through_memory_become_direct_or_vanish(slot: int, wanted: str) -> None:
    distance = SYMBOLS["pv_ops"] + 8 * slot - TEXT - 6
    old = "ff15" + struct.pack("<i", distance).hex()
    new = branch(CALL, TEXT + 64, SYMBOLS["BUG_func"]).hex()
    assert alternative(old, new, flags=2, features=(FEATURE,)) == wanted
    with pytest.raises(Damaged, match="no indirect call"):
        alternative("90" * 6, new, flags=2, features=(FEATURE,))


def test_operands_relative_to_the_instruction_are_moved_with_it() -> None:
    # lea 0x100(%rip), %rax, written at 0x1000 and run at 0x800
    code = bytearray.fromhex("488d0500010000")
    relocate_code(code, 7, 0x800, 0x1000, 7)
    assert code.hex() == "488d0500090000"
    # a jump inside the code stays
    code = bytearray.fromhex("eb009090")
    relocate_code(code, 4, 0x800, 0x1000, 4)
    assert code.hex() == "eb009090"
    with pytest.raises(Damaged, match="short branch"):
        relocate_code(bytearray.fromhex("eb70"), 2, 0x800, 0x1000, 2)


def test_nops_are_merged_as_each_kernel_merges_them() -> None:
    code = bytes.fromhex("90" * 9 + "c3" + "90" * 3)
    assert optimized(code, 13, OLD).hex() == "0f1f840000000000" + "90" + "c3" + "0f1f00"
    assert optimized(code, 13, NEW).hex() == "2e0f1f840000000000" + "c3" + "0f1f00"
    # the newer one merges long nops, too, and leaves one that ends the code alone
    assert optimized(bytes.fromhex("66900f1f00c390"), 7, NEW).hex() == "0f1f440000c390"
    assert fill(20, NEW).hex() == "eb12" + "cc" * 18
    assert fill(200, NEW).hex() == "e9c3000000" + "cc" * 195
    assert fill(20, OLD).hex() == "0f1f840000000000" * 2 + "0f1f4000"


def jump_table(*entries: tuple[int, int, int]) -> bytes:
    rows = b""
    for i, (code, target, key) in enumerate(entries):
        at = TABLE + 16 * i
        rows += struct.pack("<iiq", code - at, target - at - 4, key - at - 8)
    return rows


def test_jump_labels_follow_their_keys() -> None:
    key, other, unknown = TABLE + 0x1000, TABLE + 0x1010, TABLE + 0x1020
    code = bytes.fromhex("0f1f4400006690eb7ee900000000")
    entries = (
        (TEXT, TEXT + 0x1000, key),  # off by default, five bytes
        (TEXT + 5, TEXT + 0x20, key),  # two bytes
        (TEXT + 7, TEXT + 0x20, key | 1),  # jumps while it is off
        (TEXT + 9, TEXT + 0x20, unknown),
    )
    made = image(code, JUMPS, jump_table(*entries))
    apply_jumps(made, host(static_key_enabled={hex(key): 1, hex(other): 0}))
    assert text_of(made) == (
        branch(JUMP, TEXT, TEXT + 0x1000).hex() + "eb19" + "6690" + "e900000000"
    )
    apply_jumps(made, host(static_key_enabled={hex(key): 0}))
    assert text_of(made, 9) == "0f1f440000" + "6690" + "eb17"


@pytest.mark.parametrize(
    ("function", "tail", "features", "wanted"),
    [
        (THUNKS, False, (), branch(CALL, TEXT, THUNKS).hex()),
        (0, False, (), "0f1f440000"),
        (SYMBOLS["__static_call_return0"], False, (), "2e2e2e31c0"),
        (THUNKS, True, (), branch(JUMP, TEXT, THUNKS).hex()),
        (0, True, (), "c3cccccccc"),
        (0, True, (RETHUNK,), branch(JUMP, TEXT, SYMBOLS["__x86_return_thunk"]).hex()),
    ],
)
def test_static_calls_follow_their_keys(
    function: int, tail: bool, features: tuple[int, ...], wanted: str
) -> None:
    key, trampoline = TABLE + 0x2000, TABLE + 0x3000
    rows = struct.pack("<ii", TEXT - TABLE, trampoline + tail - TABLE - 4)
    made = image(b"\xe8\0\0\0\0", STATIC_CALLS, rows)
    where = host(
        *features,
        static_call_func={hex(key): hex(function)},
        tramp_to_key={hex(trampoline): hex(key)},
    )
    apply_static_calls(made, where, None)
    assert text_of(made) == wanted


def test_conditional_tail_calls_of_nothing_jump_to_a_return() -> None:
    key = TABLE + 0x2000
    rows = struct.pack("<ii", TEXT - TABLE, key + 1 - TABLE - 4)
    for features, target in (
        ((), SYMBOLS["__static_call_return"]),
        ((RETHUNK,), SYMBOLS["__x86_return_thunk"]),
    ):
        made = image(b"\x0f\x84\0\0\0\0", STATIC_CALLS, rows)
        apply_static_calls(made, host(*features, static_call_func={hex(key): "0x0"}), None)
        assert text_of(made) == "0f" + branch(0x84, TEXT + 1, target).hex()


@pytest.mark.parametrize(
    ("code", "length", "displacement", "immediate"),
    [
        ("c3", 1, 0, 0),
        ("48b8efcdab8967452301", 10, 0, 8),
        ("66b80100", 4, 0, 2),
        ("e800000000", 5, 0, 4),
        ("0f8400000000", 6, 0, 4),
        ("488d0500010000", 7, 3, 0),
        ("f6050000000001", 7, 2, 1),
        ("f7d8", 2, 0, 0),
        ("c745f801000000", 7, 2, 4),
        ("650fc1042500000000", 9, 5, 0),
        ("660f3a0fc108", 6, 0, 1),
        ("f20f38f1c1", 5, 0, 0),
        ("c5f877", 3, 0, 0),
        ("c4e37d46c120", 6, 0, 1),
        ("62f17c48104001", 7, 6, 0),
        ("a10102030405060708", 9, 0, 8),
        ("c8100001", 4, 0, 3),
    ],
)
def test_instructions_are_as_long_as_the_manual_says(
    code: str, length: int, displacement: int, immediate: int
) -> None:
    found = decode(bytes.fromhex(code) + bytes(4))
    assert found is not None
    assert (found.length, found.displacement) == (length, displacement)
    assert found.immediate_size == immediate


@pytest.mark.parametrize("code", ["06", "0f04", "d4", "66" * 20, "48", "e80000", ""])
def test_what_is_no_instruction_is_told(code: str) -> None:
    assert decode(bytes.fromhex(code)) is None
