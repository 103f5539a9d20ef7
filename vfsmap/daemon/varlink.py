"""Varlink without sockets: a stream cut into messages, calls and replies as values.

A message is one JSON object followed by a NUL byte (https://varlink.org/Method-Call).  Descriptors
travel beside a message, as systemd does it: with the first of its bytes, and with no byte of
another message in the same sendmsg(2).  A parameter that is a descriptor holds its index among
those of its message.
"""

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from vfsmap import errors
from vfsmap.errors import ProtocolError, VfsmapError
from vfsmap.units import KIB, MIB

INTERFACE: Final = "io.vfsmap.Mapping"
SERVICE: Final = "org.varlink.service"
CALL_MAX: Final = 64 * KIB
"""Bytes of the largest call that a server reads."""
REPLY_MAX: Final = 32 * MIB
"""Bytes of the largest reply that a client reads."""
DESCRIPTORS_MAX: Final = 8
"""Descriptors of one message."""
KERNEL_DESCRIPTORS_MAX: Final = 253
"""What sendmsg(2) sends at once: SCM_MAX_FD, include/net/scm.h."""
INT_MAX: Final = (1 << 63) - 1

_ERROR = re.compile(r"^error (\w+)", re.MULTILINE)
_PARAMETER = re.compile(r"(?:at `\$\.|field `)([^`]*)`$")

S = TypeVar("S", bound=msgspec.Struct)


class Message(NamedTuple):
    """One message of a stream."""

    raw: bytes
    """Without the NUL byte."""
    descriptors: list[int]
    """The receiver's to close."""


class Framer:
    """Cuts what is received into messages.

    The kernel never reads past bytes that descriptors came with, so descriptors belong to the
    message that holds the last byte of a read.
    """

    def __init__(self, message_max: int = CALL_MAX, descriptors_max: int = DESCRIPTORS_MAX) -> None:
        self._message_max = message_max
        self._descriptors_max = descriptors_max
        self._whole: list[Message] = []
        self._rest = bytearray()
        self._descriptors: list[int] = []

    @property
    def has_part(self) -> bool:
        """Tell whether a message has begun and not ended."""
        return bool(self._rest or self._descriptors)

    @property
    def is_empty(self) -> bool:
        """Tell whether everything that was received has been taken."""
        return not (self._whole or self.has_part)

    def feed(self, data: bytes, descriptors: Iterable[int] = ()) -> None:
        """Take what one read returned.

        Raises:
            ProtocolError: a message is too large or has too many descriptors.
        """
        self._descriptors += descriptors
        known = len(self._rest)
        self._rest += data
        end = self._rest.rfind(0, known)
        if end >= 0:
            whole = bytes(self._rest[:end]).split(b"\0")
            del self._rest[: end + 1]
            mine: list[int] = []
            if not self._rest:
                mine, self._descriptors = self._descriptors, mine
            last = whole.pop()
            self._whole += (Message(raw, []) for raw in whole)
            self._whole.append(Message(last, mine))
            for message in self._whole:
                self._check(len(message.raw), len(message.descriptors))
        self._check(len(self._rest), len(self._descriptors))

    def _check(self, size: int, descriptors: int) -> None:
        if size > self._message_max:
            raise ProtocolError(f"a message of more than {self._message_max} bytes")
        if descriptors > self._descriptors_max:
            raise ProtocolError(f"a message with more than {self._descriptors_max} descriptors")

    def next(self) -> Message | None:
        """Return the next whole message, or None: more has to be received."""
        return self._whole.pop(0) if self._whole else None

    def abandon(self) -> list[int]:
        """Forget everything; return the descriptors, which are the caller's to close."""
        left = [fd for message in self._whole for fd in message.descriptors]
        left += self._descriptors
        self._whole, self._descriptors = [], []
        self._rest.clear()
        return left


class Call(msgspec.Struct, omit_defaults=True):
    """A method call."""

    method: str
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    oneway: bool = False
    more: bool = False
    upgrade: bool = False


class Reply(msgspec.Struct, omit_defaults=True):
    """A reply, or one of several; ``parameters`` is a struct or a mapping."""

    parameters: Any = {}
    error: str = ""
    continues: bool = False


class RawReply(msgspec.Struct):
    """A reply as it is received."""

    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    error: str | None = None
    continues: bool = False


class VarlinkError(Exception):
    """An error of ``org.varlink.service``: the call and the interface do not fit."""

    def __init__(self, name: str, **parameters: str) -> None:
        super().__init__(name, parameters)
        self.name = f"{SERVICE}.{name}"
        self.parameters = parameters


_encoder: Final = msgspec.json.Encoder()
_DECODE_ERRORS: Final = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


@cache
def _decoder(kind: type[Any]) -> Any:
    return msgspec.json.Decoder(kind)


def encode(message: Call | Reply) -> bytes:
    """Return the bytes of a message, NUL included."""
    return _encoder.encode(message) + b"\0"


def encode_parameters(parameters: object) -> msgspec.Raw:
    """Return a call's parameters, a struct or a mapping, as :class:`Call` holds them."""
    return msgspec.Raw(_encoder.encode(parameters))


def decode(raw: bytes, kind: type[S]) -> S:
    """Return the :class:`Call`, or :class:`RawReply`, that a message holds.

    Raises:
        ProtocolError: it holds none.
    """
    decoder: msgspec.json.Decoder[S] = _decoder(kind)
    try:
        return decoder.decode(raw)
    except _DECODE_ERRORS as exc:
        raise ProtocolError(f"not a varlink {kind.__name__}: {exc}") from exc


def decode_parameters(raw: msgspec.Raw, kind: type[S]) -> S:
    """Return parameters as the struct ``kind``.

    Raises:
        VarlinkError: InvalidParameter, with the name of one that does not fit.
    """
    data = bytes(raw)
    decoder: msgspec.json.Decoder[S] = _decoder(kind)
    try:
        return decoder.decode(b"{}" if data == b"null" else data)
    except _DECODE_ERRORS as exc:
        found = _PARAMETER.search(str(exc))
        name = found[1] if found else "parameters"
        raise VarlinkError("InvalidParameter", parameter=name) from exc


@cache
def description(interface: str) -> str:
    """Return the definition of an interface, as the file that holds it."""
    return resources.files("vfsmap.daemon").joinpath(f"{interface}.varlink").read_text()


@cache
def declared_errors() -> frozenset[str]:
    """Return the names of the errors that ``io.vfsmap.Mapping`` declares."""
    return frozenset(_ERROR.findall(description(INTERFACE)))


def error_reply(exc: VfsmapError | VarlinkError) -> Reply:
    """Return the reply that tells a caller of an error: its class, its message and its fields.

    A class that the interface does not declare goes by the next of its bases that it does.
    """
    if isinstance(exc, VarlinkError):
        return Reply(exc.parameters, error=exc.name)
    name = next(k.__name__ for k in type(exc).__mro__ if k.__name__ in declared_errors())
    fields = {key: value for key, value in vars(exc).items() if isinstance(value, int | str)}
    return Reply({"message": readable(str(exc)), **fields}, error=f"{INTERFACE}.{name}")


def readable(text: str) -> str:
    """Return a text that may name files of any bytes as JSON can carry it."""
    return text.encode(errors="replace").decode()


def error_of(error: str, parameters: dict[str, Any]) -> VfsmapError:
    """Return the error that a reply tells of."""
    interface, _, name = error.rpartition(".")
    kind = getattr(errors, name, None)
    if interface != INTERFACE or not (isinstance(kind, type) and issubclass(kind, VfsmapError)):
        return ProtocolError(f"the daemon answered {error} {parameters}")
    fields = dict(parameters)
    found = kind.__new__(kind)
    Exception.__init__(found, str(fields.pop("message", error)))
    vars(found).update(fields)
    return found
