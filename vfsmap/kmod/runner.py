"""Running modules' functions: in a child process, so that nothing they do harms the caller."""

import base64
import contextlib
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import msgspec

import vfsmap.errors
from vfsmap.errors import Crashed, VfsmapError
from vfsmap.guard import Policy
from vfsmap.kmod.child import Answer, Ask, Start
from vfsmap.kmod.host import Host
from vfsmap.kmod.pack import Mapper
from vfsmap.units import PTE, Level, format_size

_TIMEOUT: Final = 30.0
_LINE_MAX: Final = 256 << 20


class Result(NamedTuple):
    """What a function returned, and what it left in the buffers it was given."""

    value: int
    buffers: list[bytes]

    def signed(self, bits: int = 32) -> int:
        """Return the value as a signed number of that many bits."""
        value = self.value & (1 << bits) - 1
        return value - (1 << bits) if value >> bits - 1 else value


class Runner:
    """A child with images loaded, whose functions can be called.

    ``with Runner(store, ["crc7"], vfsmap.map) as run: run.call("crc7", "crc7_be", 0, b"abc", 3)``
    """

    def __init__(
        self,
        store: Path,
        images: Sequence[str],
        mapper: Mapper,
        *,
        host: Host | None = None,
        policy: Policy = "refuse",
        granularity: Level = PTE,
        timeout: float = _TIMEOUT,
    ) -> None:
        """Start the child and load the images; ``timeout`` is that of each call, in seconds.

        Raises:
            Crashed: the child has died.
            VfsmapError: an image can't be loaded.
        """
        self._timeout = _TIMEOUT  # loading checks digests, which may take longer than a call
        self._rest = b""
        self._doing = "loading images"
        name = f"{mapper.__module__}:{getattr(mapper, '__qualname__', 'map')}"
        start = Start(
            store=str(store),
            host=base64.b64encode(host.encode()).decode() if host is not None else "",
            images=list(images),
            mapper=name,
            policy=policy,
            granularity=format_size(granularity.size),
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from vfsmap.kmod.child import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.reports: dict[str, Any] = self._exchange(start).facts
        except BaseException:
            self.close()
            raise
        self._timeout = timeout

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def call(self, image: str, function: str, *arguments: int | bytes) -> Result:
        """Call a function with up to six arguments: numbers, or buffers that it may change.

        Raises:
            NotFound: there is no such function.
            Unsupported: it called something that has no stand-in.
            Crashed: it did something that ended the child, or took too long.
        """
        self._doing = f"{image}:{function}"
        answer = self._exchange(
            Ask("call", image=image, function=function, arguments=[_sent(a) for a in arguments])
        )
        return Result(answer.value, [base64.b64decode(buffer) for buffer in answer.buffers])

    def address_of(self, image: str, symbol: str) -> int:
        """Return where something that an image defines lies in the child."""
        return self._exchange(Ask("address", image=image, function=symbol)).value

    def allocate(self, data: bytes) -> int:
        """Put bytes into new memory of the child; return where they are.  It is never freed."""
        address = self._exchange(Ask("allocate", size=len(data))).value
        self.write(address, data)
        return address

    def read(self, address: int, size: int) -> bytes:
        """Return bytes of the child's memory."""
        self._doing = f"reading {size} bytes at {address:#x}"
        return base64.b64decode(self._exchange(Ask("read", address=address, size=size)).buffers[0])

    def write(self, address: int, data: bytes) -> None:
        """Store bytes in the child's memory."""
        self._doing = f"writing {len(data)} bytes at {address:#x}"
        self._exchange(Ask("write", address=address, data=base64.b64encode(data).decode()))

    def toggle(self, image: str, key: int, enabled: bool) -> int:
        """Switch the jump labels of a key, through the guard; return how many there are."""
        return self._exchange(Ask("toggle", image=image, address=key, enabled=enabled)).value

    def trace(self, image: str, enabled: bool) -> int:
        """Let functions call the tracer or not, through the guard; return how many there are."""
        return self._exchange(Ask("trace", image=image, enabled=enabled)).value

    def report(self) -> dict[str, Any]:
        """Return what the images take by now."""
        return self._exchange(Ask("report")).facts

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what a dead child was still to be told
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, message: Start | Ask) -> Answer:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._crashed() from None
        try:
            answer = msgspec.json.decode(self._line(), type=Answer)
        except msgspec.DecodeError:
            raise Crashed(f"{self._doing}: the child answers nonsense") from None
        if answer.error:
            kind = getattr(vfsmap.errors, answer.error, VfsmapError)
            if not (isinstance(kind, type) and issubclass(kind, VfsmapError)):
                kind = Crashed
            error: VfsmapError = VfsmapError.__new__(kind)
            error.args = (answer.message,)
            raise error
        return answer

    def _line(self) -> bytes:
        """Return the child's next line."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([fd], [], [], self._timeout)[0]:
                self.close()
                raise Crashed(f"{self._doing} has not returned after {self._timeout:g} s")
            # a pipe has it
            piece = self._process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not piece:
                raise self._crashed()
            self._rest += piece
            if len(self._rest) > _LINE_MAX:
                self.close()
                raise Crashed(f"{self._doing}: the child answers too much")
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _crashed(self) -> Crashed:
        code = self._process.wait()
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name
        return Crashed(f"{self._doing} ended the child by {how}")


def _sent(argument: int | bytes) -> int | str:
    if isinstance(argument, int):
        return argument & (1 << 64) - 1
    return base64.b64encode(argument).decode()
