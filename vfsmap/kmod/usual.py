"""What kernels usually do to keys of their own while they boot.

A host's document seldom tells the states of the kernel's own jump labels and static calls: nothing
but a look into the running kernel's memory would.  They hardly differ from boot to boot, though.
For builds that were booted in tests, ``usual.json.xz`` beside this file holds what was seen; the
boot whose CPU is most like the host's is taken.
"""

import functools
from importlib.resources import files
from typing import Final

import msgspec

from vfsmap.kmod.compressed import unpack
from vfsmap.kmod.host import Host, Numbers, number

_FEATURE_WORDS: Final = 22


class _Boot(msgspec.Struct):
    x86_capability: list[int]
    uniproc_patched: bool
    static_key_enabled: dict[str, int]
    static_call_func: Numbers
    runtime_constants: Numbers


class States(msgspec.Struct):
    """States of a kernel's own keys, by address."""

    keys: dict[int, int] = {}
    calls: dict[int, int] = {}
    constants: dict[str, int] = {}

    def moved(self, distance: int) -> "States":
        """Return the states of a kernel that was moved; what its memory decides is then unknown."""
        if not distance:
            return self
        return States(
            {key + distance: state for key, state in self.keys.items()},
            {key + distance: value and value + distance for key, value in self.calls.items()},
            {name: v for name, v in self.constants.items() if name != "dentry_hashtable"},
        )


def usual_states(build_id: str, host: Host) -> States:
    """Return what a kernel is likely to have done to its keys on a host; nothing if unknown."""
    boots = _boots().get(build_id)
    if not boots:
        return States()

    def difference(boot: _Boot) -> int:
        pairs = zip(boot.x86_capability[:_FEATURE_WORDS], host.capability, strict=False)
        bits = sum((mine ^ other).bit_count() for mine, other in pairs)
        return bits + (boot.uniproc_patched != host.uniproc)

    boot = min(boots, key=difference)
    return States(
        {number(key): state for key, state in boot.static_key_enabled.items()},
        {number(key): number(function) for key, function in boot.static_call_func.items()},
        {name: number(value) for name, value in boot.runtime_constants.items()},
    )


@functools.cache
def _boots() -> dict[str, list[_Boot]]:
    raw = files("vfsmap.kmod").joinpath("usual.json.xz").read_bytes()
    return msgspec.json.decode(unpack(raw, "usual.json.xz"), type=dict[str, list[_Boot]])
