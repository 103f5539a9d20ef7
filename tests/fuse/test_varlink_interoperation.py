"""Varlink programs that we did not write talk to the daemon of a real mount, and to our client."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict

import pytest
from asyncvarlink import (
    FileDescriptor,
    GenericVarlinkErrorReply,
    VarlinkClientProtocol,
    VarlinkInterface,
    VarlinkInterfaceRegistry,
    VarlinkMethodCall,
    connect_unix_varlink,
    create_unix_server,
    varlinkmethod,
)
from asyncvarlink.serviceinterface import VarlinkServiceInterface

import vfsmap
from vfsmap.daemon.client import Client, socket_of
from vfsmap.daemon.varlink import INTERFACE, SERVICE, description
from vfsmap.testing.commands import Server, served_pool
from vfsmap.units import KIB


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served_pool(tmp_path_factory.mktemp("varlink"), "64M") as served:
        yield served


@pytest.fixture
def address(server: Server) -> Path:
    found = socket_of(server.directory)
    assert found is not None
    return found


@pytest.fixture
def path(server: Server) -> Path:
    made = server.directory / "file"
    made.write_bytes(bytes(range(256)) * 256)
    return made


# asyncvarlink


class Extent(TypedDict):
    offset: int
    start: int
    length: int


class Medium(TypedDict):
    name: str
    commit: str
    page_size: int
    huge: str


class MapResult(TypedDict):
    lease: int
    pool: FileDescriptor
    inode: int
    offset: int
    length: int
    extents: list[Extent]
    medium: Medium
    sealed: bool


class Size(TypedDict):
    inode: int
    size: int


class Mapping(VarlinkInterface, name=INTERFACE):
    """What the test calls, as asyncvarlink wants it declared."""

    @varlinkmethod
    def Map(
        self, *, file: FileDescriptor, writable: bool | None = None, length: int | None = None
    ) -> MapResult:
        raise NotImplementedError  # only declared: the daemon has it

    @varlinkmethod
    def Release(self, *, lease: int) -> None:
        raise NotImplementedError  # only declared: the daemon has it

    @varlinkmethod
    def Allocate(self, *, file: FileDescriptor, length: int) -> Size:
        raise NotImplementedError  # only declared: the daemon has it


@asynccontextmanager
async def connected(address: Path) -> AsyncIterator[VarlinkClientProtocol]:
    transport, protocol = await connect_unix_varlink(VarlinkClientProtocol, address)
    try:
        yield protocol
    finally:
        transport.close()
        await asyncio.sleep(0)


def test_asyncvarlink_maps_a_file_by_its_descriptor(address: Path, path: Path) -> None:
    async def work() -> None:
        async with connected(address) as protocol:
            proxy = protocol.make_proxy(Mapping)
            with path.open("rb") as file, await proxy.Map(file=file, length=300) as answer:
                start = answer["extents"][0]["start"]
                pool = answer["pool"].fileno()
                assert os.pread(pool, 300, start) == (bytes(range(256)) * 2)[:300]
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.pwrite(pool, b"x", start)
            assert await proxy.Release(lease=answer["lease"]) == {}

    asyncio.run(work())


def test_asyncvarlink_sends_many_calls_at_once_and_each_has_its_own_descriptor(
    address: Path, server: Server
) -> None:
    async def work() -> None:
        async with connected(address) as protocol:
            proxy = protocol.make_proxy(Mapping)
            files = [server.directory / f"many{n}" for n in range(6)]
            # descriptors with every other call, so that a wrong one would be noticed
            calls = []
            for number, file in enumerate(files):
                # asyncvarlink closes what it has sent
                fd = os.open(file, os.O_RDWR | os.O_CREAT)
                calls.append(proxy.Allocate(file=fd, length=(number + 1) * 4 * KIB))
                calls.append(protocol.call(VarlinkMethodCall(f"{INTERFACE}.GetInfo", {})))
            answers = await asyncio.gather(*calls)
            for number, file in enumerate(files):
                status = file.stat()
                assert status.st_size == (number + 1) * 4 * KIB
                assert answers[2 * number] == {"inode": status.st_ino, "size": status.st_size}

    asyncio.run(work())


def test_asyncvarlink_gets_our_errors_by_their_names(address: Path, path: Path) -> None:
    async def work() -> None:
        async with connected(address) as protocol:
            proxy = protocol.make_proxy(Mapping)
            with path.open("rb") as file, pytest.raises(GenericVarlinkErrorReply) as refused:
                await proxy.Map(file=file, writable=True)
            assert refused.value.name == "io.vfsmap.Mapping.Denied"
            assert "O_RDWR" in str(refused.value.parameters["message"])
            reply = await protocol.call(VarlinkMethodCall(f"{INTERFACE}.Nope", {}))
            assert reply is not None
            assert reply[0].error == "org.varlink.service.MethodNotFound"

    asyncio.run(work())


def test_asyncvarlink_reads_about_the_service(address: Path) -> None:
    async def work() -> None:
        async with connected(address) as protocol:
            proxy = protocol.make_proxy(VarlinkServiceInterface)
            info = await proxy.GetInfo()
            assert info["interfaces"] == [SERVICE, INTERFACE]
            assert info["version"] == vfsmap.__version__
            for name in info["interfaces"]:
                told = await proxy.GetInterfaceDescription(interface=name)
                assert told == {"description": description(name)}

    asyncio.run(work())


def test_asyncvarlink_listens_to_events(address: Path, path: Path) -> None:
    async def work() -> list[Any]:
        kinds = []
        async with connected(address) as protocol:
            call = VarlinkMethodCall(f"{INTERFACE}.Events", {}, more=True)
            async for reply, _ in protocol.call_more(call):
                event: Any = reply.parameters["event"]
                kinds.append(event["kind"])
                if kinds == ["ready"]:
                    await asyncio.to_thread(map_and_close, path)
                if kinds[-1] == "ended":
                    break
        return kinds

    assert asyncio.run(work()) == ["ready", "granted", "ended"]


def map_and_close(path: Path) -> None:
    vfsmap.map(path).close()


class Copier(VarlinkInterface, name=INTERFACE):
    """A service that sends a descriptor back."""

    @varlinkmethod(return_parameter="copy")
    def Copy(self, *, file: FileDescriptor, text: str) -> FileDescriptor:
        os.write(file.fileno(), text.encode())
        return FileDescriptor(os.dup(file.fileno()), should_close=True)


def test_our_client_passes_descriptors_to_a_service_of_asyncvarlink_and_back(
    tmp_path: Path,
) -> None:
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        registry = VarlinkInterfaceRegistry()
        registry.register_interface(Copier())
        async with await create_unix_server(registry.protocol_factory, tmp_path / "s"):
            ready.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    reader, writer = os.pipe()
    with Client(tmp_path / "s") as client:
        answer, (copy,) = client.call("Copy", (writer,), file=0, text="hello")
    assert answer == {"copy": 0}
    os.write(copy, b" world")
    assert os.read(reader, 100) == b"hello world"
    for fd in (reader, writer, copy):
        os.close(fd)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


# python -m varlink.cli


def varlink_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "varlink.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_the_varlink_command_tells_what_the_service_is(address: Path) -> None:
    text = varlink_cli("info", f"unix:{address}").stdout
    assert "Vendor: vfsmap" in text
    assert INTERFACE in text


def test_the_varlink_command_shows_the_definition(address: Path) -> None:
    for name in (SERVICE, INTERFACE):
        assert varlink_cli("help", f"unix:{address}/{name}").stdout.strip() == (
            description(name).strip()
        )


def test_the_varlink_command_calls_a_method(address: Path, server: Server) -> None:
    answer = json.loads(varlink_cli("call", f"unix:{address}/{INTERFACE}.GetInfo").stdout)
    assert answer["pool"] == str(server.pool)
    assert answer["trusted"] is True
    leases = varlink_cli("call", f"unix:{address}/{INTERFACE}.Leases", "{}").stdout
    assert isinstance(json.loads(leases)["leases"], list)


def test_the_varlink_command_shows_our_errors(address: Path) -> None:
    result = varlink_cli("call", f"unix:{address}/{INTERFACE}.Release", '{"lease": 99999}')
    assert "io.vfsmap.Mapping.NotFound" in result.stderr
    result = varlink_cli("call", f"unix:{address}/{INTERFACE}.Release", '{"lease": "x"}')
    assert "org.varlink.service.InvalidParameter" in result.stderr


def test_the_varlink_command_follows_a_stream_of_events(address: Path) -> None:
    command = [sys.executable, "-m", "varlink.cli", "call", "-m"]
    with subprocess.Popen(
        [*command, f"unix:{address}/{INTERFACE}.Events"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as watcher:
        assert watcher.stdout is not None
        lines = []
        while "}\n" not in lines:
            lines.append(watcher.stdout.readline())
        assert json.loads("".join(lines))["event"]["kind"] == "ready"
        watcher.terminate()
