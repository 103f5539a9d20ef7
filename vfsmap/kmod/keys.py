"""Jump labels and static calls: code that follows the state of a key.

Source: kernel/jump_label.c, kernel/static_call_inline.c and arch/x86/kernel/static_call.c.
"""

from typing import Final

from vfsmap.kmod.branches import (
    BARE_RETURN,
    CALL,
    JUMP,
    TRAMPOLINE_END,
    CallDepth,
    branch,
    return_code,
    wants_thunk,
)
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import JUMPS, STATIC_CALLS, Image
from vfsmap.kmod.nops import NOPS
from vfsmap.kmod.tables import Jump, jump_length, jumps, static_calls

_MOST_NAMED: Final = 4
_ZERO_RESULT: Final = b"\x2e\x2e\x2e\x31\xc0"  # xor %eax, %eax in five bytes


def jump_code(image: Image, jump: Jump, enabled: bool) -> bytes:
    """Return what a jump label becomes when its key is on or off."""
    length = jump_length(image, jump.address)
    if enabled == jump.branch:
        return NOPS[length]
    if length == 5:
        return branch(JUMP, jump.address, jump.target)
    return bytes((0xEB, jump.target - jump.address - 2 & 0xFF))


def enabled(image: Image, host: Host, key: int) -> bool | None:
    """Return the state of a key: the host's, else the image's own as built; else unknown."""
    state = host.keys.get(key)
    if state is None and key in image.memory:
        state = image.memory.s32(key, JUMPS)
    return None if state is None else state > 0


def apply_jumps(image: Image, host: Host) -> None:
    """Set all jump labels to the state of their keys; those of unknown keys stay as built."""
    for jump in jumps(image):
        state = enabled(image, host, jump.key)
        if state is not None:
            image.memory.write(jump.address, jump_code(image, jump, state), JUMPS)


def apply_static_calls(image: Image, host: Host, depth: CallDepth | None) -> None:
    """Direct all static calls to their functions; those of unknown keys stay as built."""
    for site in static_calls(image):
        key = host.trampolines.get(site.key, site.key)
        function = function_of(image, host, key)
        if function is not None:
            code = call_code(image, host, site.address, function, site.tail, depth)
            image.memory.write(site.address, code, STATIC_CALLS)


def unknown_keys(image: Image, host: Host) -> list[str]:
    """Return what to say when nobody knows the states of keys that an image's sites follow."""
    sites = [jump.key for jump in jumps(image) if enabled(image, host, jump.key) is None]
    for site in static_calls(image):
        key = host.trampolines.get(site.key, site.key)
        if function_of(image, host, key) is None:
            sites.append(key)
    if not sites:
        return []
    names = {address: name for name, address in host.symbols.items()}
    keys = sorted({names.get(key, f"{key:#x}") for key in sites})
    shown = ", ".join(keys[:_MOST_NAMED]) + (", ..." if len(keys) > _MOST_NAMED else "")
    return [
        f"the host's document does not tell the states of {len(keys)} keys ({shown}): "
        f"{len(sites)} jump labels and static calls of {image.name} stay as they were built"
    ]


def function_of(image: Image, host: Host, key: int) -> int | None:
    """Return the function a key names; 0 for none, None when nobody knows."""
    function = host.calls.get(key)
    if function is None and key in image.memory:
        function = image.memory.u64(key, STATIC_CALLS)
    return function


def call_code(
    image: Image, host: Host, address: int, function: int, tail: bool, depth: CallDepth | None
) -> bytes:
    """Return the bytes of a static call's site, or (as a tail call) of its trampoline."""
    if tail:
        return _tail_code(image, host, address, function)
    if not function:
        return NOPS[5]
    if depth is not None:
        function = depth.pad(function) or function
    if function == host.symbols.get("__static_call_return0", -1):
        return _ZERO_RESULT
    return branch(CALL, address, function)


def _tail_code(image: Image, host: Host, address: int, function: int) -> bytes:
    first = image.memory.read(address, 2, STATIC_CALLS)
    if first[0] == 0x0F and 0x80 <= first[1] < 0x90:
        target = function or _return_target(image, host, address)
        return first[:1] + branch(first[1], address + 1, target)
    if function:
        return branch(JUMP, address, function)
    if image.is_kernel and not image.dialect.relocates:
        return BARE_RETURN  # written before return thunks are chosen, and not again
    return return_code(host, address)


def _return_target(image: Image, host: Host, address: int) -> int:
    """Return where a conditional tail call of nothing jumps to."""
    if not wants_thunk(host, 0):
        return host.require_symbol("__static_call_return")
    if image.dialect.relocates:
        return host.return_thunk
    return host.require_symbol("__x86_return_thunk")


def is_trampoline(image: Image, address: int) -> bool:
    """Tell whether a static call's trampoline lies at an address."""
    return image.memory.upto(address + 5, 3) == TRAMPOLINE_END
