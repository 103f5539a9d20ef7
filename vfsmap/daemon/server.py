"""The daemon's door: a socket, those who come to it, and the calls they make."""

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import trio

import vfsmap
from vfsmap.daemon.calls import InterfaceCall, Nothing
from vfsmap.daemon.closer import Closer
from vfsmap.daemon.connection import Connection, Limits
from vfsmap.daemon.varlink import (
    INTERFACE,
    SERVICE,
    Call,
    Message,
    Reply,
    VarlinkError,
    decode,
    decode_parameters,
    description,
    error_reply,
)
from vfsmap.errors import NoMemory, ProtocolError, VfsmapError, shortage
from vfsmap.tally import Tallies, clock

log = logging.getLogger("vfsmap.daemon")

_ACCEPT_PAUSE: Final = 0.1
_OWN: Final = f"{INTERFACE}."


class Answer(NamedTuple):
    """What a method returns: a reply's parameters, and descriptors that stay its own."""

    parameters: object
    descriptors: tuple[int, ...] = ()


class Caller:
    """Who calls, and with which descriptors."""

    def __init__(self, connection: Connection, descriptors: list[int]) -> None:
        self.connection = connection
        self._descriptors = descriptors
        self._close_first: list[int] = []

    def descriptor(self, index: int) -> int:
        """Return a descriptor that came with the call; it is closed when the call has ended.

        Raises:
            VarlinkError: there is none of that index.
        """
        if not 0 <= index < len(self._descriptors):
            raise VarlinkError("InvalidParameter", parameter="file")
        return self._descriptors[index]

    def close_first(self, fd: int) -> None:
        """Have a descriptor closed before the reply; only one that we ourselves serve.

        Else the client would be refused, now and then, what its own descriptor is in the way of.
        """
        self._close_first.append(fd)

    async def settle(self) -> None:
        """Close what is to be closed before the reply."""
        for fd in self._close_first:
            self._descriptors.remove(fd)
            await trio.to_thread.run_sync(os.close, fd)


class Method(NamedTuple):
    """A method of the interface."""

    parameters: type[msgspec.Struct]
    handler: Callable[[Caller, Any], Awaitable[Answer]]


class Handlers(Protocol):
    """What the door needs of the service behind it."""

    @property
    def calls(self) -> Tallies:
        """Where calls are counted, by method."""

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods of the interface but Events, by name."""

    async def stream(self, connection: Connection) -> None:
        """Answer Events until the client hangs up."""

    def trusts(self, connection: Connection) -> bool:
        """Tell whether a client is trusted."""

    def hung_up(self, connection: Connection) -> None:
        """Note that a client is gone."""


class Server:
    """Serves the clients of one socket."""

    def __init__(self, handlers: Handlers, closer: Closer, limits: Limits) -> None:
        self._handlers = handlers
        self._closer = closer
        self._limits = limits
        self._trusted = 0
        self._strangers: dict[int, int] = {}
        self._waiting = 0

    async def run(self, listener: socket.socket) -> None:
        """Accept and serve clients until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError as exc:  # out of descriptors: those who are here go on
                    log.warning("can't accept a client: %s", exc.strerror)
                    await trio.sleep(_ACCEPT_PAUSE)
                    continue
                connection = Connection(sock, self._closer, self._limits)
                nursery.start_soon(self.serve, connection)

    async def serve(self, connection: Connection) -> None:
        """Serve one client until it hangs up or breaks a rule."""
        who = connection.holder
        trusted = connection.trusted = self._handlers.trusts(connection)
        try:
            with self._admitted(who.uid, trusted=trusted):
                await self._converse(connection)
        except ProtocolError as exc:
            # strangers could fill the log
            level = logging.WARNING if trusted else logging.DEBUG
            log.log(level, "process %d of user %d is cut off: %s", who.pid, who.uid, exc)
            if not trusted:
                await self._keep_waiting()
        except (OSError, trio.ClosedResourceError):  # it, or we, hung up in the middle
            pass
        except Exception:
            log.exception("process %d of user %d is cut off by a bug", who.pid, who.uid)
        finally:
            connection.close()
            self._handlers.hung_up(connection)

    async def _keep_waiting(self) -> None:
        """Hang up on a stranger later, so that who comes back at once gains nothing by it."""
        if self._waiting < self._limits.connections_max // 2:
            self._waiting += 1
            try:
                await trio.sleep(self._limits.leisure)
            finally:
                self._waiting -= 1

    async def _converse(self, connection: Connection) -> None:
        """Answer calls until the client hangs up or has what it came for.

        Raises:
            ProtocolError: it has broken a rule; who is not trusted is told so late, or coming back
                at once and doing it again would take the others' time.
        """
        uid = connection.holder.uid
        try:
            while message := await connection.receive():
                try:
                    goes_on = await self._answer(connection, message)
                finally:
                    self._closer.close(uid, message.descriptors)
                if not goes_on:
                    break
                if not connection.trusted:
                    await trio.sleep(self._limits.leisure)
        except ProtocolError:
            if not connection.trusted:
                connection.abandon()
                await trio.sleep(self._limits.penalty)
            raise

    @contextmanager
    def _admitted(self, uid: int, *, trusted: bool) -> Iterator[None]:
        """Count a client.

        Raises:
            ProtocolError: there are too many.
        """
        limits, strangers = self._limits, self._strangers
        all_strangers = sum(strangers.values())
        if trusted:
            if self._trusted + all_strangers >= limits.connections_max:
                raise ProtocolError(f"there are {limits.connections_max} connections already")
            self._trusted += 1
            try:
                yield
            finally:
                self._trusted -= 1
            return
        if (
            strangers.get(uid, 0) >= limits.stranger_connections_max
            or all_strangers >= limits.connections_max // 2
            or self._closer.is_choked(uid)
        ):
            raise ProtocolError("users who are not trusted have too many connections")
        strangers[uid] = strangers.get(uid, 0) + 1
        try:
            yield
        finally:
            strangers[uid] -= 1
            if not strangers[uid]:
                del strangers[uid]

    async def _answer(self, connection: Connection, message: Message) -> bool:
        """Answer a call; False: the connection has served its purpose."""
        call = decode(message.raw, Call)
        answer = Answer({})
        try:
            if call.method == f"{INTERFACE}.Events":
                await self._stream(connection, call)
                return False
            method = self._method(call.method)
            parameters = decode_parameters(call.parameters, method.parameters)
            caller = Caller(connection, message.descriptors)
            tally = self._handlers.calls[call.method.removeprefix(_OWN)]
            began = clock()
            try:
                answer = await method.handler(caller, parameters)
            except BaseException:
                tally.errors += 1
                raise
            finally:
                tally.note(clock() - began)
                await caller.settle()
            reply = Reply(answer.parameters)
        except (VfsmapError, VarlinkError) as exc:
            reply = error_reply(exc)
        except Exception as exc:
            if number := shortage(exc):
                log.error("%s: %s", call.method, os.strerror(number))
                reply = error_reply(NoMemory(f"the daemon is out of it: {os.strerror(number)}"))
            else:
                log.exception("%s failed", call.method)
                reply = error_reply(VfsmapError("this is a bug in the daemon; its log has more"))
        if not call.oneway:
            await connection.send(reply, answer.descriptors)
        return True

    def _method(self, full_name: str) -> Method:
        interface, _, name = full_name.rpartition(".")
        if interface == SERVICE and name in _SERVICE_METHODS:
            return _SERVICE_METHODS[name]
        if interface == INTERFACE and name in self._handlers.methods:
            return self._handlers.methods[name]
        if interface in (SERVICE, INTERFACE):
            raise VarlinkError("MethodNotFound", method=full_name)
        raise VarlinkError("InterfaceNotFound", interface=interface)

    async def _stream(self, connection: Connection, call: Call) -> None:
        decode_parameters(call.parameters, Nothing)
        if not call.more:
            raise VarlinkError("ExpectedMore")
        await self._handlers.stream(connection)


async def _get_info(_: Caller, __: Nothing) -> Answer:
    return Answer(
        {
            "vendor": "vfsmap",
            "product": "vfsmap mapping daemon",
            "version": vfsmap.__version__,
            "url": "https://varlink.org/Service",
            "interfaces": [SERVICE, INTERFACE],
        }
    )


async def _get_interface_description(_: Caller, wanted: InterfaceCall) -> Answer:
    if wanted.interface not in (SERVICE, INTERFACE):
        raise VarlinkError("InterfaceNotFound", interface=wanted.interface)
    return Answer({"description": description(wanted.interface)})


_SERVICE_METHODS: Final = {
    "GetInfo": Method(Nothing, _get_info),
    "GetInterfaceDescription": Method(InterfaceCall, _get_interface_description),
}
