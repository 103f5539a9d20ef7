"""Targets for fuzzing, and a command that fuzzes them guided by coverage.

``python -m vfsmap.testing.fuzz protocol --minutes 10``

A target takes bytes, and raises nothing unless there is a bug.  The inputs that were interesting
are kept in ``tests/data``, and every test run feeds them to their target again.
"""

import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import click
import msgspec

from vfsmap.daemon import calls
from vfsmap.daemon.varlink import (
    Call,
    Framer,
    RawReply,
    VarlinkError,
    decode,
    decode_parameters,
    encode,
    error_reply,
)
from vfsmap.errors import ProtocolError, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.fs.inode import ROOT
from vfsmap.fs.repair import repair
from vfsmap.pool import Pool
from vfsmap.pool.layout import record
from vfsmap.pool.scan import scan
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.testing.workload import base
from vfsmap_tools.dump import describe

_KINDS: Final = tuple(
    kind
    for kind in vars(calls).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
)
_TAGS: Final = (0, 1, 2, 3, 16, 17, 18, 19, 20, 200)
_RECORDS_MOST: Final = 20
_READ: Final = 1 << 16


def fuzz_protocol(data: bytes) -> None:
    """Read a stream of messages, cut into the pieces that its first byte tells."""
    step = (data[0] if data else 0) + 1
    framer = Framer(message_max=4096)
    for at in range(1, len(data), step):
        try:
            framer.feed(data[at : at + step])
        except ProtocolError:
            framer.abandon()
            return
        while message := framer.next():
            survive_message(message.raw)


def survive_message(raw: bytes) -> None:
    """Take a message for a call of every method, and for a reply."""
    with suppress(ProtocolError):
        decode(raw, RawReply)
    try:
        call = decode(raw, Call)
    except ProtocolError:
        return
    for kind in _KINDS:
        try:
            decoded = decode_parameters(call.parameters, kind)
        except VarlinkError as exc:
            encode(error_reply(exc))  # what is wrong can be told
            continue
        for value in msgspec.structs.asdict(decoded).values():
            assert value is None or isinstance(value, int | str)


@cache
def _memory() -> tuple[Memory, int]:
    content, _ = base("store")
    return Memory(content), len(content)


def fuzz_pool(data: bytes) -> None:
    """Put records of anybody's making, with a valid checksum, behind a pool's log, and use it.

    Open, check and dump must end with an error of ours at worst, and repair must leave a pool that
    is clean.
    """
    memory, size = _memory()
    mark = memory.mark()
    try:
        pmem = RecordingPmem(memory, size, MEDIA["store"])
        pool = Pool(pmem)
        pool.journal.log.append(list(_records(data)), pool.next_oid)
        found = scan(pmem)
        check(found)
        for _ in describe(found):
            pass
        _use(memory, size)
        repair(RecordingPmem(memory, size, MEDIA["store"]))
        damage = check(scan(RecordingPmem(memory, size, MEDIA["store"]))).damage
        assert not damage, f"after repair: {damage}"
        assert _use(memory, size), "after repair it can't be used"
    finally:
        memory.rollback(mark)


def _use(memory: Memory, size: int) -> bool:
    """Read everything; tell whether that could be done."""
    try:
        fs = FileSystem(Pool(RecordingPmem(memory, size, MEDIA["store"])))
        fs.end_orphans()
        _read_all(fs)
    except VfsmapError:
        return False
    return fs.pool.failed is None


def _read_all(fs: FileSystem) -> None:
    queue, seen = [ROOT], {ROOT}
    for ino in queue:
        inode = fs.get(ino)
        for name in fs.listxattr(ino):
            fs.getxattr(ino, name)
        if inode.is_directory:
            found = {child for _, _, child in fs.entries(ino)} - seen
            queue += sorted(found)
            seen |= found
        elif inode.is_file:
            fs.read(ino, 0, _READ)
            fs.extents(ino)
            fs.seal_of(ino)
            fs.tree_extents(ino)
        elif stat.S_ISLNK(inode.mode):
            fs.readlink(ino)


def _records(data: bytes) -> Iterator[bytes]:
    """Cut data into records: a byte for the tag, one for the object, one for the payload's size."""
    at = 0
    for _ in range(_RECORDS_MOST):
        if at + 3 > len(data):
            return
        kind, oid, length = data[at : at + 3]
        payload = data[at + 3 : at + 3 + length]
        at += 3 + length
        if kind < len(_TAGS):
            yield record(oid, _TAGS[kind], payload)
        else:  # as it is, its size being whatever its first bytes say
            yield payload


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "protocol": fuzz_protocol,
    "pool": fuzz_pool,
}


def corpus(target: str) -> Path:
    """Return where a target's inputs are kept in a checkout."""
    names = {"protocol": "varlink", "pool": "pools"}
    return Path(__file__).parents[2] / "tests" / "data" / names[target]


_PROGRAM: Final = """
import sys
import atheris
with atheris.instrument_imports(include=["vfsmap"], enable_loader_override=False):
    from vfsmap.testing.fuzz import TARGETS
atheris.Setup(sys.argv[1:], TARGETS[sys.argv[1]])
atheris.Fuzz()
"""
"""Fuzzes in a process of its own, which ends with it; the arguments are libFuzzer's."""


@click.command()
@click.argument("target", type=click.Choice(list(TARGETS)))
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--runs", type=int, default=-1, help="End after so many inputs.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep inputs that reach new code there, and those that fail.",
)
def main(target: str, minutes: float, runs: int, seed: int, keep: Path | None) -> None:
    """Feed a target with inputs, guided by the code that they reach; exit with 1 on a failure."""
    with tempfile.TemporaryDirectory(prefix="vfsmap-fuzz-") as scratch:
        kept = keep or Path(scratch)
        kept.mkdir(exist_ok=True)
        options = [f"-max_total_time={int(60 * minutes)}", f"-runs={runs}", f"-seed={seed}"]
        options += ["-max_len=4096", "-timeout=60", f"-artifact_prefix={kept}/"]
        places = [str(kept), str(corpus(target))]
        command = [sys.executable, "-c", _PROGRAM, target, *options, *places]
        sys.exit(1 if subprocess.run(command, check=False).returncode else 0)


if __name__ == "__main__":
    main()
