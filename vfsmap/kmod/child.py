"""The process that runs modules' functions for another, and can hurt nobody but itself.

It is told what to load by a line of JSON on its standard input; every line after that asks for one
thing, and is answered by a line.  Once the images are loaded it gives up all system calls but those
for memory and for these lines, so that code gone wild ends with the process.
"""

import base64
import contextlib
import ctypes
import importlib
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import msgspec

from vfsmap.errors import Invalid, VfsmapError
from vfsmap.guard import Policy
from vfsmap.kmod.host import Host
from vfsmap.kmod.loader import Loader
from vfsmap.kmod.native import call
from vfsmap.kmod.store import Store
from vfsmap.kmod.stubs import Runtime
from vfsmap.units import parse_level


class Start(msgspec.Struct):
    """What to load, and how."""

    store: str
    host: str
    """The host's document, in base64; empty: the one that the images were bound to."""
    images: list[str]
    mapper: str
    """The function that maps files: ``module:name``."""
    policy: Policy = "refuse"
    granularity: str = "4K"


class Ask(msgspec.Struct):
    """One request: call a function, or allocate, read, write, toggle, trace, report."""

    what: str
    image: str = ""
    function: str = ""
    arguments: list[int | str] = []
    """Numbers, and buffers in base64; the function gets a buffer's address."""
    address: int = 0
    size: int = 0
    data: str = ""
    enabled: bool = False


class Answer(msgspec.Struct):
    """What came of a request, or the error's class and message."""

    value: int = 0
    buffers: list[str] = []
    facts: dict[str, Any] = {}
    error: str = ""
    message: str = ""


def main() -> None:
    """Load, then answer requests until the standard input ends."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        server = Server(msgspec.json.decode(source.readline(), type=Start), sink)
        _answer(sink, Answer(facts=server.reports()))
        server.give_up_everything()
    except VfsmapError as exc:
        _answer(sink, Answer(error=type(exc).__name__, message=str(exc)))
        sys.exit(1)
    except OSError as exc:
        text = f"can't put the images at their addresses: {exc.strerror}"
        _answer(sink, Answer(error="NoMemory", message=text))
        sys.exit(1)
    for line in source:
        try:
            answer = server.handle(msgspec.json.decode(line, type=Ask))
        except VfsmapError as exc:
            answer = Answer(error=type(exc).__name__, message=str(exc))
        except OSError as exc:
            answer = Answer(error="Denied", message=f"not from within the child: {exc.strerror}")
        _answer(sink, answer)


def _answer(sink: BinaryIO, answer: Answer) -> None:
    sink.write(msgspec.json.encode(answer) + b"\n")
    sink.flush()


class Server:
    """The images of this process, and what can be done with them."""

    def __init__(self, start: Start, sink: BinaryIO) -> None:
        self._sink = sink
        self._kept: list[Any] = []
        self._alone = False
        store = Store(Path(start.store))
        if start.host:
            host = Host.decode(base64.b64decode(start.host))
        else:
            host = store.host(store.find(start.images[0])[0])
        module, _, name = start.mapper.partition(":")
        mapper = getattr(importlib.import_module(module), name)
        self._loader = Loader(
            store,
            host,
            mapper,
            policy=start.policy,
            granularity=parse_level(start.granularity),
            resident=True,
        )
        for image in _with_dependencies(store, host, start.images):
            self._loader.load(image)
        stubs = store.index.stubs()
        self._runtime = Runtime(stubs.functions, stubs.variables, host.capability, self._unbound)

    def _unbound(self, name: str) -> NoReturn:
        """Tell that a function without a stub was called; there is no way back from it."""
        message = f"the function called {name}, which has no stand-in outside a kernel"
        _answer(self._sink, Answer(error="Unsupported", message=message))
        os._exit(1)

    def reports(self) -> dict[str, Any]:
        """Return what loading each image took."""
        return {
            name: self._loader.report(loaded, page_sizes=not self._alone)._asdict()
            for name, loaded in self._loader.images.items()
        }

    def give_up_everything(self) -> None:
        """Keep nothing but memory and the two pipes."""
        for loaded in self._loader.images.values():
            _ = loaded.subject  # it is read from the store, and no file can be opened from now on
            loaded.guard.window.grantor = None  # nor can the daemon be reached
        _close_all_but({0, 1, 2, self._sink.fileno()})  # of the daemon's socket above all
        _give_up_everything()
        self._alone = True

    def handle(self, ask: Ask) -> Answer:
        """Do what is asked."""
        if ask.what == "report":
            return Answer(facts=self.reports())
        if ask.what == "read":
            raw = ctypes.string_at(ask.address, ask.size)
            return Answer(buffers=[base64.b64encode(raw).decode()])
        if ask.what == "allocate":
            self._kept.append(ctypes.create_string_buffer(max(ask.size, 1)))
            return Answer(value=ctypes.addressof(self._kept[-1]))
        if ask.what == "write":
            raw = base64.b64decode(ask.data)
            ctypes.memmove(ask.address, raw, len(raw))
            return Answer()
        loaded = self._loader.load(ask.image)
        if ask.what == "address":
            return Answer(value=loaded.subject.address_of(ask.function))
        if ask.what == "toggle":
            return Answer(value=self._loader.toggle(loaded, ask.address, ask.enabled))
        if ask.what == "trace":
            return Answer(value=self._loader.trace(loaded, ask.enabled))
        address = loaded.subject.address_of(ask.function)
        if address not in loaded.variant.text:
            raise Invalid(f"{ask.function} is not in the text of {ask.image} that is kept")
        return self._call(address, ask.arguments)

    def _call(self, address: int, arguments: list[int | str]) -> Answer:
        buffers = []
        numbers: list[int] = []
        for argument in arguments:
            if isinstance(argument, int):
                numbers.append(argument & (1 << 64) - 1)
            else:
                raw = base64.b64decode(argument)
                buffers.append(ctypes.create_string_buffer(raw, max(len(raw), 1)))
                numbers.append(ctypes.addressof(buffers[-1]))
        value = call(address, numbers)
        return Answer(value=value, buffers=[base64.b64encode(b.raw).decode() for b in buffers])


def _with_dependencies(store: Store, host: Host, names: list[str]) -> list[str]:
    """Return the images and those they need, which come first: NAME@ADDRESS."""
    found: list[str] = []
    seen: set[str] = set()  # two modules may need each other

    def visit(name: str) -> None:
        variant = store.find(name, host)[0]
        if variant.name in seen:
            return
        seen.add(variant.name)
        for depended in store.depends(variant):
            if any(v.name == depended.replace("-", "_") for v in store.index.variants):
                visit(depended)
        found.append(f"{variant.name}@{variant.text.start:#x}")

    for name in names:
        visit(name)
    return found


_ALLOWED: Final = (
    *(0, 1, 3, 5, 8),  # read, write, close, fstat, lseek
    *(9, 10, 11, 12, 25, 28),  # mmap, mprotect, munmap, brk, mremap, madvise
    *(13, 14, 15, 24, 39, 186),  # rt_sigaction, _procmask, _return, sched_yield, getpid, gettid
    *(60, 202, 228, 231, 318),  # exit, futex, clock_gettime, exit_group, getrandom
    *(257, 262),  # openat, newfstatat: answered by EPERM
)
_REFUSED: Final = (257, 262)
_TGKILL: Final = 234  # for abort(3): of this process only
_SECCOMP, _NO_NEW_PRIVILEGES, _FILTER = 22, 38, 2
_KILL, _ALLOW, _EPERM = 0x8000_0000, 0x7FFF_0000, 0x0005_0001
_X86_64: Final = 0xC000_003E
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_FIRST_ARGUMENT: Final = 16  # in struct seccomp_data


def _close_all_but(kept: set[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in kept:
            with contextlib.suppress(OSError):  # that of the directory is closed already
                os.close(fd)


def _give_up_everything() -> None:
    """Keep nothing but memory and the two pipes: no files, no signals to others, no new rights."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rules = [(_LOAD_WORD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL)]
    rules.append((_LOAD_WORD, 0, 0, 0))
    for number in _ALLOWED:
        verdict = _EPERM if number in _REFUSED else _ALLOW
        rules += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, verdict)]
    rules += [(_JUMP_EQUAL, 0, 3, _TGKILL), (_LOAD_WORD, 0, 0, _FIRST_ARGUMENT)]
    rules += [(_JUMP_EQUAL, 0, 1, os.getpid()), (_RETURN, 0, 0, _ALLOW)]
    rules.append((_RETURN, 0, 0, _KILL))
    program = b"".join(struct.pack("<HBBI", *rule) for rule in rules)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("<H6xQ", len(rules), ctypes.addressof(buffer))
    library = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if library.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero) or library.prctl(
        _SECCOMP, ctypes.c_ulong(_FILTER), header, zero, zero
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


if __name__ == "__main__":
    main()
