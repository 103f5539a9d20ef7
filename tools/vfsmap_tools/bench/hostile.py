"""How fast the daemon serves a good client while three hostile ones do their worst."""

import array
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import vfsmap
from vfsmap.daemon.client import socket_of
from vfsmap.units import MIB
from vfsmap_tools.bench import places
from vfsmap_tools.bench.results import Result
from vfsmap_tools.bench.runner import Measure, alternate

LIMIT: Final = 0.5
"""The part of its speed that a good client keeps."""
_STRANGER: Final = 65534
_SECONDS: Final = 1.0


def _flood(path: str) -> None:
    """Ask a question that everybody may ask, without ever reading an answer."""
    question = b'{"method":"io.vfsmap.Mapping.GetInfo"}\0' * 500
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.settimeout(1)
        while True:
            sock.sendall(question)


def _garble(path: str) -> None:
    """Send deep nesting, halves of messages, and noise."""
    chance = random.Random(1)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.settimeout(1)
        sock.sendall(b'{"method":' + b"[" * 20_000 + b"\0")
        sock.sendall(chance.randbytes(100_000))
        sock.recv(4096)


def _stuff(path: str) -> None:
    """Send as many descriptors as a message can have, over and over, and no end of a message."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.settimeout(1)
        rights = array.array("i", [sock.fileno()] * 253)
        while True:
            sock.sendmsg([b"x" * 100], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


ATTACKS: Final[dict[str, Callable[[str], None]]] = {
    "flood": _flood,
    "garble": _garble,
    "stuff": _stuff,
}


@contextmanager
def _under_attack(path: Path) -> Iterator[None]:
    """Have strangers attack a daemon for as long as the block lasts."""
    with ExitStack() as stack:
        attackers = []
        for name in ATTACKS:
            command = places.module("vfsmap_tools.bench.hostile", name, path)
            attackers.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE)))
        try:
            for attacker in attackers:
                assert attacker.stdout is not None
                attacker.stdout.readline()  # it is about to begin
            yield
        finally:
            for attacker in attackers:
                attacker.send_signal(signal.SIGKILL)


def _rate(file: Path) -> float:
    """Return how many mappings a second are made and closed."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < _SECONDS:
        vfsmap.map(file).close()
        count += 1
    return count / spent


def run(quick: bool) -> Result:
    """Measure a good client, left alone and beside hostile ones."""
    result = Result(
        "hostile",
        "A good client among hostile ones",
        "Mappings made and closed by root, alone and while three processes of a stranger flood the "
        "daemon with questions, with noise and halves of messages, and with descriptors.",
    )
    with ExitStack() as stack:
        medium = stack.enter_context(places.tmpfs("512M"))
        mount = stack.enter_context(places.pool(medium, "128M"))
        file = mount / "file"
        file.write_bytes(bytes(4 * MIB))
        stack.enter_context(vfsmap.map(file))  # keeps the connection warm
        path = socket_of(file)
        assert path is not None, "a mount tells where its daemon listens"

        def rate(name: str) -> float:
            if name == "alone":
                return _rate(file)
            with _under_attack(path):
                return _rate(file)

        measures = [Measure("map and close", "1/s", rate)]
        names = {name: name for name in ("under attack", "alone")}
        result.rates = alternate(measures, names, 2 if quick else 9)
        share = result.rates[0].ratio("alone")
        result.promise("a good client's speed under attack, of that alone", share, LIMIT)
    return result


def main() -> None:
    """Attack for ever, as a stranger."""
    name, path = sys.argv[1:]
    os.setgid(_STRANGER)
    os.setuid(_STRANGER)
    print("ready", flush=True)
    while True:
        with suppress(OSError):
            ATTACKS[name](path)


if __name__ == "__main__":
    main()
