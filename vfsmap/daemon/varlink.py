"""Varlink without sockets: messages as bytes, calls and replies as values, errors as names.

A message is one JSON object followed by a NUL byte (https://varlink.org/Method-Call).  Descriptors
travel beside a message, as systemd does it; a parameter that is one holds its index among them.
"""

from importlib import resources
from typing import Any, Final

import msgspec

from vfsmap import errors
from vfsmap.errors import ProtocolError, VfsmapError

INTERFACE: Final = "io.vfsmap.Mapping"
SERVICE: Final = "org.varlink.service"
MESSAGE_MAX: Final = 64 * 1024
"""Bytes of the largest call that a server reads."""
DESCRIPTORS_MAX: Final = 8
"""Descriptors of one message."""

SERVICE_DESCRIPTION: Final = """\
# The Varlink Service Interface is provided by every varlink service. It
# describes the service and the interfaces it implements.
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
"""


def interface_description() -> str:
    """Return the definition of ``io.vfsmap.Mapping``."""
    return resources.files("vfsmap.daemon").joinpath(f"{INTERFACE}.varlink").read_text()


class Call(msgspec.Struct):
    """A method call."""

    method: str
    parameters: dict[str, Any] = {}
    oneway: bool = False
    more: bool = False
    upgrade: bool = False


class Reply(msgspec.Struct, omit_defaults=True):
    """A reply, or one of several."""

    parameters: dict[str, Any] = {}
    error: str = ""
    continues: bool = False


class VarlinkError(Exception):
    """An error of ``org.varlink.service``: the caller and the interface do not fit."""

    def __init__(self, name: str, **parameters: str) -> None:
        super().__init__(name, parameters)
        self.name = f"{SERVICE}.{name}"
        self.parameters = parameters


_call_decoder = msgspec.json.Decoder(Call)
_reply_decoder = msgspec.json.Decoder(Reply)
_encoder = msgspec.json.Encoder()


def encode(message: Call | Reply) -> bytes:
    """Return the bytes of a message, NUL included."""
    return _encoder.encode(message) + b"\0"


def decode_call(raw: bytes) -> Call:
    """Return the call that a message without its NUL holds.

    Raises:
        ProtocolError: it is no call.
    """
    try:
        return _call_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise ProtocolError(f"not a varlink call: {exc}") from exc


def decode_reply(raw: bytes) -> Reply:
    """Return the reply that a message without its NUL holds.

    Raises:
        ProtocolError: it is no reply.
    """
    try:
        return _reply_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise ProtocolError(f"not a varlink reply: {exc}") from exc


T = Any


def convert(parameters: dict[str, Any], kind: type[Any]) -> Any:
    """Return a call's parameters as the struct ``kind``.

    Raises:
        VarlinkError: InvalidParameter, with the name of the first that does not fit.
    """
    try:
        return msgspec.convert(parameters, kind)
    except msgspec.ValidationError as exc:
        text = str(exc)
        name = text.rsplit("$.", 1)[-1].rstrip("`") if "$." in text else text
        raise VarlinkError("InvalidParameter", parameter=name) from exc


def error_reply(exc: VfsmapError | VarlinkError) -> Reply:
    """Return the reply that tells a caller of an error."""
    if isinstance(exc, VarlinkError):
        return Reply(error=exc.name, parameters=dict(exc.parameters))
    name = type(exc).__name__
    return Reply(error=f"{INTERFACE}.{name}", parameters={"message": str(exc)})


def error_of(reply: Reply) -> VfsmapError:
    """Return the error that a reply tells of."""
    interface, _, name = reply.error.rpartition(".")
    kind = getattr(errors, name, None) if interface == INTERFACE else None
    message = str(reply.parameters.get("message") or f"{reply.error} {reply.parameters}")
    if isinstance(kind, type) and issubclass(kind, VfsmapError):
        error = kind.__new__(kind)
        Exception.__init__(error, message)
        return error
    return ProtocolError(f"the daemon answered {message}")
