"""Calls that are counted, and what a host's document leaves open."""

import struct

from vfsmap.kmod.branches import (
    CALL,
    CALL_DEPTH,
    CallDepth,
    branch,
)
from vfsmap.kmod.host import ModuleDocument
from vfsmap.kmod.image import (
    CALLS,
    JUMPS,
)
from vfsmap.kmod.keys import unknown_keys
from vfsmap.testing.images import SYMBOLS, TABLE, TEXT, host, image, text_of, to


def test_calls_are_counted_in_front_of_the_function() -> None:
    function = TEXT + 0x40
    code = branch(CALL, TEXT, function).ljust(0x30, b"\xcc") + b"\x90" * 16 + b"\xc3"
    code = code.ljust(0x100, b"\xcc")
    made = image(code, CALLS, to(TEXT))
    depth = CallDepth(made, host(CALL_DEPTH), [])
    depth.apply()
    pad = function - 9
    assert text_of(made, 5) == branch(CALL, TEXT, pad).hex()
    counter = struct.pack("<I", 0x35010 - function & 0xFFFFFFFF).hex()
    assert made.memory.read(pad, 9).hex() == "6548c13d" + counter + "05"
    assert depth.elsewhere == {}


def test_calls_that_may_not_be_counted_stay() -> None:
    kernel = 0xFFFFFFFF81000100
    for target, counted in ((kernel, True), (SYMBOLS["__fentry__"], False), (0x1000, False)):
        made = image(branch(CALL, TEXT, target), CALLS, to(TEXT))
        where = host(CALL_DEPTH, vmlinux_text_len=0x2000000)
        depth = CallDepth(made, where, [])
        depth.apply()
        wanted = target - 9 if counted else target
        assert text_of(made) == branch(CALL, TEXT, wanted).hex()
        assert list(depth.elsewhere) == ([kernel - 9] if counted else [])


def test_what_modules_call_is_marked_and_of_modules_not_at_hand_it_is_guessed() -> None:
    # four functions of an image, 32 bytes each, with room for a count in front
    functions = [TEXT + 0x20 * n + 0x10 for n in range(4)]
    called, guessed, both, nobodys = functions
    code = (b"\x90" * 16 + b"\xc3".ljust(16, b"\xcc")) * 4

    def resident(*imports: int) -> ModuleDocument:
        return ModuleDocument(imports={f"f{a:x}": hex(a) for a in imports}, text_base="0x1000")

    modules = {
        "here": resident(called, nobodys),
        "gone": resident(guessed, both),
        "idle": resident(called),
        "also_gone": resident(both),
    }
    made = image(code)
    depth = CallDepth(made, host(CALL_DEPTH, modules=modules), callers={"here": [called]})
    depth.apply()
    assert depth.guess() == (2, ["gone", "also_gone"])
    marked = [made.memory.read(a - 9, 1) == b"\x65" for a in functions]
    assert marked == [True, True, True, False]
    # nothing is left to guess when all are at hand
    made = image(code)
    callers = {"here": [called], "gone": [both], "idle": [], "also_gone": [both]}
    depth = CallDepth(made, host(CALL_DEPTH, modules=modules), callers=callers)
    depth.apply()
    assert depth.guess() == (0, [])
    marked = [made.memory.read(a - 9, 1) == b"\x65" for a in functions]
    assert marked == [True, False, True, False]


def test_keys_whose_states_nobody_tells_are_named_and_counted() -> None:
    known, unknown = TEXT + 0x5000, TEXT + 0x6000
    rows = b"".join(
        struct.pack(
            "<iiq", at - TABLE - 16 * n, at + 8 - TABLE - 16 * n - 4, key - TABLE - 16 * n - 8
        )
        for n, (at, key) in enumerate(((TEXT, known), (TEXT + 5, unknown), (TEXT + 10, unknown)))
    )
    made = image((b"\x0f\x1f\x44\0\0" * 3).ljust(0x40, b"\xcc"), JUMPS, rows)
    symbols = {**SYMBOLS, "some_key": unknown}
    where = host(static_key_enabled={hex(known): 1}, kernel_symbols=symbols)
    (doubt,) = unknown_keys(made, where)
    assert "states of 1 keys (some_key): 2 jump labels" in doubt
    where = host(static_key_enabled={hex(known): 1, hex(unknown): 0})
    assert unknown_keys(made, where) == []
